// What both products share: y = H (W x) * svh + bias, each weight decoded once for a block of tokens.
//
// Work is the list of (128 or 256 outputs, group of 128 inputs), outputs first; each CTA takes a
// contiguous piece of it ("stream-K"), whatever the shape. Weights are decoded as operand A of the
// tensor cores. Sums over warps and over CTAs have a fixed order: the CTA that comes last to a block
// of outputs adds the parts and applies Hadamard, svh and bias.
#pragma once
#include "operand.cuh"
#include "pipeline.cuh"

namespace qtip {

constexpr int kSharedLimit = 227 << 10;  // of a CTA
constexpr int kRow = kBlock + 4;         // of sums in shared memory: no conflicts

struct GemmArgs {
    const uint8_t *weights;
    const uint4 *x;       // operand B, as hadamard.cuh writes it
    float *parts;         // [2 CTAs, blocks of a unit, tokens, 128] for each block of tokens
    uint32_t *counters;   // [blocks of tokens, blocks of outputs], zero before and after
    const __half *svh;    // [outputs]
    const void *bias;     // [outputs] of y's dtype, or null
    void *y;              // [tokens, outputs], rows `y_stride` apart
    int64_t y_stride;
    int tokens, groups, blocks, units_of_cta, dtype;
    float x_scale;
    CodeArgs code;
};

// A CTA's piece of the list. `Blocks` blocks of 128 outputs are a unit's.
template <int Blocks>
struct Piece {
    int begin, end, groups, blocks;

    __device__ __forceinline__ explicit Piece(const GemmArgs &args)
        : groups(args.groups), blocks(args.blocks) {
        const int all = (blocks + Blocks - 1) / Blocks * groups;
        begin = blockIdx.x * args.units_of_cta;
        end = min(begin + args.units_of_cta, all);
    }
};

// The producing warp of many.cuh: fills the rings with a piece's weights and x, in order. Lead: units that
// weights run ahead of x. Parts: copies that a unit's x comes in.
template <int Blocks, int Parts, int Lead, int PartBytes, int WStages, class W, class X>
__device__ __forceinline__ void produce(const GemmArgs &args, const Piece<Blocks> &piece,
                                        const W &weights, const X &x) {
    const int lane = threadIdx.x & 31, count = piece.end - piece.begin;
    const int64_t row = int64_t(piece.groups) * kGroupBytes;
    auto push_weights = [&](int i) {
        const int unit = piece.begin + i, block = unit / piece.groups * Blocks;
        const int rows = 8 * min(Blocks, piece.blocks - block);
        weights.wait_empty(i);
        if (lane == 0) expect(weights.full(i), rows * kGroupBytes);
        __syncwarp();
        if (lane < rows)
            copy_bulk(weights.at(i) + lane * kGroupBytes,
                      args.weights + (block * 8 + lane) * row
                          + int64_t(unit % piece.groups) * kGroupBytes,
                      kGroupBytes, weights.full(i));
    };
    const int ahead = min(count, WStages);
    for (int i = 0; i < ahead; ++i) push_weights(i);
    wait_for_previous_kernel();
    fence_async();
    const uint8_t *from = reinterpret_cast<const uint8_t *>(args.x)
                          + int64_t(blockIdx.y) * piece.groups * Parts * PartBytes;
    for (int i = 0; i < count; ++i) {
        if (i + Lead >= ahead && i + Lead < count) push_weights(i + Lead);
        for (int part = 0; part < Parts; ++part) {
            const int item = i * Parts + part;
            x.wait_empty(item);
            if (lane == 0) {
                expect(x.full(item), PartBytes);
                const int at = (piece.begin + i) % piece.groups * Parts + part;
                copy_bulk(x.at(item), from + int64_t(at) * PartBytes, PartBytes, x.full(item));
            }
            __syncwarp();
        }
    }
}

// A block of 128 outputs of which this CTA has a part or all, and the threads that write it.
template <int Blocks, int Tokens>
struct Block {
    const GemmArgs &args;
    int number, tokens;  // of tokens of this launch's block of tokens
    int first, last;     // CTAs
    int meeting, threads;

    __device__ __forceinline__ Block(const GemmArgs &args, int number, int meeting, int threads)
        : args(args), number(number), meeting(meeting), threads(threads) {
        tokens = min(Tokens, args.tokens - int(blockIdx.y) * Tokens);
        const int from = number / Blocks * args.groups;
        first = from / args.units_of_cta;
        last = (from + args.groups - 1) / args.units_of_cta;
    }
    __device__ __forceinline__ bool is_whole() const { return first == last; }

    // A CTA's first block has the even slot, its last one the odd one.
    __device__ __forceinline__ float *slot(int cta) const {
        const int is_last = cta * args.units_of_cta < number / Blocks * args.groups;
        const int64_t at = (int64_t(blockIdx.y) * gridDim.x + cta) * 2 + is_last;
        return args.parts + (at * Blocks + number % Blocks) * (Tokens * kBlock);
    }

    __device__ __forceinline__ void write_y(float (&v)[4], int token) const {
        const int64_t row = int64_t(blockIdx.y) * Tokens + token;
        const int out = number * kBlock + 4 * (threadIdx.x & 31);
        finish(v, args.y, row * args.y_stride + out, out, args.dtype, args.svh, args.bias,
               kRootBlock / args.x_scale);
    }

    // Tokens [from, from + count) of sums in `found` [count][kRow], by the warps `warp` of `warps`.
    __device__ __forceinline__ void write(const float *found, int from, int count, int warp,
                                          int warps) const {
        const int lane = threadIdx.x & 31;
        float *mine = slot(blockIdx.x) + 4 * lane;
        for (int i = warp; i < count; i += warps) {
            if (from + i >= tokens) break;
            const float4 sum = *reinterpret_cast<const float4 *>(found + i * kRow + 4 * lane);
            if (is_whole()) {
                float v[4] = {sum.x, sum.y, sum.z, sum.w};
                write_y(v, from + i);
            } else {
                __stcg(reinterpret_cast<float4 *>(mine + (from + i) * kBlock), sum);
            }
        }
    }

    // After all of it: adds the parts of all CTAs if this is the last one to come.
    __device__ __forceinline__ void complete(uint32_t *flag, int warp, int warps) const {
        if (is_whole()) return;
        __threadfence();
        meet(meeting, threads);
        if (warp == 0 && (threadIdx.x & 31) == 0) {
            uint32_t *counter = args.counters + blockIdx.y * args.blocks + number;
            const bool is_last = atomicAdd(counter, 1u) == uint32_t(last - first);
            if (is_last) *counter = 0;
            *flag = is_last;
        }
        meet(meeting, threads);
        if (!*flag) return;
        __threadfence();
        for (int token = warp; token < tokens; token += warps) {
            float v[4] = {0, 0, 0, 0};
            const int64_t at = token * kBlock + 4 * (threadIdx.x & 31);
#pragma unroll 4
            for (int cta = first; cta <= last; ++cta) {
                const float4 part = __ldcg(reinterpret_cast<const float4 *>(slot(cta) + at));
                v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
            }
            write_y(v, token);
        }
    }
};

}  // namespace qtip
