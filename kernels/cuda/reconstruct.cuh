// Decodes to a dense matrix [outputs, inputs], for many tokens (cuBLAS multiplies it) and for tests.
#pragma once
#include "operand.cuh"

namespace qtip {

struct DenseArgs {
    const uint8_t *weights;
    void *to;                  // [count, inputs] of float16 or bfloat16
    int groups, first, count;  // first: m16 tile of outputs; count: how many
    int dtype;
    CodeArgs code;
};

constexpr int kDenseWarps = 8;
// A warp's 16 rows of 128 float16, 16 bytes apart from a power of two: no conflicts.
constexpr int kDenseRow = kBlock * 2 + 16;
constexpr int kDenseSharedBytes = kTableBytes + kDenseWarps * (kGroupBytes + 16 * kDenseRow);

__global__ void __launch_bounds__(kDenseWarps * 32) dense_kernel(const DenseArgs args) {
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t *table = reinterpret_cast<uint32_t *>(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    uint8_t *raw = shared + kTableBytes + warp * (kGroupBytes + 16 * kDenseRow);
    uint8_t *rows = raw + kGroupBytes;
    fill_table(table, args.code, kDenseWarps * 32);
    wait_for_previous_kernel();
    let_next_kernel_start();
    __syncthreads();
    const int tasks = args.count * args.groups;
    for (int task = blockIdx.x * kDenseWarps + warp; task < tasks;
         task += gridDim.x * kDenseWarps) {
        const int tile_row = task / args.groups, group_at = task % args.groups;
        Group::request(shared_address(raw),
                       args.weights + (int64_t(args.first + tile_row) * args.groups + group_at)
                                          * kGroupBytes);
        copy_commit();
        copy_wait<0>();
        Group group;
        group.load(raw);
        __syncwarp();
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {
            uint32_t a[4];
            group.operand(a, tile, args.code);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i & 1), k = tile * 16 + lane % 4 * 2 + 8 * (i >> 1);
                *reinterpret_cast<uint32_t *>(rows + row * kDenseRow + k * 2) = a[i];
            }
        }
        __syncwarp();
        // 16 lanes write the 256 bytes of a row.
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = 2 * i + lane / 16, at = lane % 16;
            uint4 bits = *reinterpret_cast<const uint4 *>(rows + row * kDenseRow + at * 16);
            if (args.dtype == kBfloat16) {
                uint32_t *word = &bits.x;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 f = __half22float2(reinterpret_cast<const __half2 &>(word[j]));
                    const __nv_bfloat162 b = __floats2bfloat162_rn(f.x, f.y);
                    word[j] = reinterpret_cast<const uint32_t &>(b);
                }
            }
            const int64_t out = int64_t(tile_row) * 16 + row;
            reinterpret_cast<uint4 *>(args.to)[(out * args.groups + group_at) * 16 + at] = bits;
        }
        __syncwarp();
    }
}

}  // namespace qtip
