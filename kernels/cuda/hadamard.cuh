// The transforms of activations: x * suh, Hadamard, float16, in the order that a kernel reads; and
// Hadamard, svh, bias of a product that cuBLAS made.
#pragma once
#include "common.cuh"

namespace qtip {

enum Layout {
    kTerms = 0,  // B operands of few.cuh, each number twice: [k / 16][NT][lane][4 words]
    kPairs = 1,  // B operands of two k16 steps: [k / 32][NT][lane][4 words]
    kRows = 2,   // [tokens, inputs]
    kCores = 3,  // 8 x 8 blocks for wgmma: [k / 8][NT][8 tokens][8 k]
};

struct InputArgs {
    const void *x;  // [tokens, inputs], rows `stride` apart
    int64_t stride;
    const __half *suh;  // [inputs]
    uint32_t *to;
    int tokens, inputs, dtype, layout, token_tiles;  // token_tiles: n8 tiles of a block of tokens
    float scale;
};

// Words of a block of 8 `tiles` tokens and 128 inputs: all layouts but kRows have these together.
__device__ __forceinline__ int64_t unit_words(int layout, int tiles) {
    return tiles * (layout == kTerms ? 1024 : 512);
}

// A warp: 128 inputs from k on of one row of x, times suh, Hadamard, to token `token` of `to`, a block
// of tokens and 128 inputs (kRows: where they go).
__device__ __forceinline__ void transform_block(const void *x, int64_t row, const __half *suh, int k,
                                                int dtype, float scale, uint32_t *to, int layout,
                                                int tiles, int token) {
    const int at = 4 * (threadIdx.x & 31), tile = token / 8, token8 = token % 8;
    float v[4], by[4];
    load4(v, x, row + k + at, dtype);
    load4(by, suh, k + at, kHalf);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] *= by[i];
    hadamard(v);
    scale *= kRootBlock;
    const uint32_t low = half_pair(v[0] * scale, v[1] * scale);
    const uint32_t high = half_pair(v[2] * scale, v[3] * scale);
    if (layout == kTerms) {
        // Word of a number in its k16 step: 2 (k mod 2) + k div 8; lane: 4 token + (k mod 8) div 2.
        uint32_t *word = to + ((at / 16 * tiles + tile) * 32 + token8 * 4 + at % 8 / 2) * 4
                         + at / 8 % 2;
        word[0] = __byte_perm(low, 0, 0x1010), word[2] = __byte_perm(low, 0, 0x3232);
        word[4] = __byte_perm(high, 0, 0x1010), word[6] = __byte_perm(high, 0, 0x3232);
    } else if (layout == kPairs) {
        uint32_t *word = to + ((at / 32 * tiles + tile) * 32 + token8 * 4 + at % 8 / 2) * 4
                         + at / 8 % 4;
        word[0] = low, word[4] = high;
    } else {
        const int word = layout == kRows ? at / 2 : ((at / 8 * tiles + tile) * 8 + token8) * 4
                                                        + at % 8 / 2;
        *reinterpret_cast<uint2 *>(to + word) = make_uint2(low, high);
    }
}

__global__ void __launch_bounds__(256) input_kernel(const InputArgs args) {
    const int blocks = args.inputs / kBlock;
    const int task = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (task >= args.tokens * blocks) return;
    const int token = task / blocks, block = task % blocks, most = 8 * args.token_tiles;
    const int64_t before = args.layout == kRows
                               ? (int64_t(token) * args.inputs + block * kBlock) / 2
                               : (int64_t(token / most) * blocks + block)
                                     * unit_words(args.layout, args.token_tiles);
    transform_block(args.x, token * args.stride, args.suh, block * kBlock, args.dtype, args.scale,
                    args.to + before, args.layout, args.token_tiles, token % most);
}

struct OutputArgs {
    const void *z;  // [tokens, outputs] of `from`, rows `stride` apart
    int64_t stride;
    const __half *svh;
    const void *bias;
    void *y;  // [tokens, outputs], rows `y_stride` apart, from output `first` on
    int64_t y_stride;
    int tokens, outputs, from, dtype, first;
    float scale;
};

__global__ void __launch_bounds__(256) output_kernel(const OutputArgs args) {
    const int lane = threadIdx.x & 31;
    const int blocks = args.outputs / kBlock;
    const int64_t tasks = int64_t(args.tokens) * blocks;
    const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int64_t task = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; task < tasks;
         task += warps) {
        const int64_t token = task / blocks;
        const int out = int(task % blocks) * kBlock + 4 * lane;
        float v[4];
        load4(v, args.z, token * args.stride + out, args.from);
        finish(v, args.y, token * args.y_stride + args.first + out, args.first + out, args.dtype,
               args.svh, args.bias, args.scale);
    }
}

}  // namespace qtip
