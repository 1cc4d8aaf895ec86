// The transforms of activations: x * suh, Hadamard, float16, in the order that a kernel reads; and
// Hadamard, svh, bias of a product that cuBLAS made.
#pragma once
#include "common.cuh"

namespace qtip {

enum Layout {
    kTerms = 0,  // B operands of gemm.cuh, each number twice: [k / 16][NT][lane][4 words]
    kPairs = 1,  // B operands of two k16 steps: [k / 32][NT][lane][4 words]
    kRows = 2,   // [tokens, inputs]
    kCores = 3,  // 8 x 8 blocks for wgmma: [k / 64][8 of k][tokens / 8][8 tokens][8 k]
};

struct InputArgs {
    const void *x;  // [tokens, inputs], rows `stride` apart
    int64_t stride;
    const __half *suh;  // [inputs]
    uint32_t *to;
    int tokens, inputs, dtype, layout, token_tiles;  // token_tiles: n8 tiles of a block of tokens
    float scale;
};

// Where the pair of inputs (k, k + 1) of a token goes, in words. k is even.
__device__ __forceinline__ int64_t place(const InputArgs &args, int token, int k) {
    const int tiles = args.token_tiles;
    if (args.layout == kRows) return (int64_t(token) * args.inputs + k) / 2;
    const int block = token / (8 * tiles), tile = token / 8 % tiles;
    const int64_t of_block = int64_t(block) * tiles * args.inputs * 4;  // words of 8 tokens x 1 k
    if (args.layout == kCores)
        return of_block + ((int64_t(k / 8) * tiles + tile) * 8 + token % 8) * 4 + k % 8 / 2;
    const int lane = token % 8 * 4 + k % 8 / 2;
    return of_block + ((int64_t(k / 32) * tiles + tile) * 32 + lane) * 4 + k / 8 % 4;
}

__global__ void __launch_bounds__(256) input_kernel(const InputArgs args) {
    const int lane = threadIdx.x & 31;
    const int blocks = args.inputs / kBlock;
    const int task = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (task >= args.tokens * blocks) return;
    const int token = task / blocks, k = task % blocks * kBlock + 4 * lane;
    float v[4], by[4];
    load4(v, args.x, token * args.stride + k, args.dtype);
    load4(by, args.suh, k, kHalf);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] *= by[i];
    hadamard(v);
    const float scale = kRootBlock * args.scale;
    const uint32_t low = half_pair(v[0] * scale, v[1] * scale);
    const uint32_t high = half_pair(v[2] * scale, v[3] * scale);
    if (args.layout != kTerms) {
        args.to[place(args, token, k)] = low;
        args.to[place(args, token, k + 2)] = high;
        return;
    }
    // Word of a number k in its k16 step: 2 (k mod 2) + (k div 8); lane: 4 token + (k mod 8) div 2.
    const int tiles = args.token_tiles, tile = token / 8 % tiles, block = token / (8 * tiles);
    const int64_t step = int64_t(block) * (args.inputs / 16) + k / 16;
    uint32_t *to = args.to + ((step * tiles + tile) * 32 + token % 8 * 4 + k % 8 / 2) * 4
                   + k / 8 % 2;
    to[0] = __byte_perm(low, 0, 0x1010), to[2] = __byte_perm(low, 0, 0x3232);
    to[4] = __byte_perm(high, 0, 0x1010), to[6] = __byte_perm(high, 0, 0x3232);
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
