// y = H (W x) * svh + bias for few tokens: each weight is decoded once for all tokens of a launch
// (of a block of 8 NT tokens), as the A operand of the tensor cores; tokens are the B operand.
//
// Work is the list of (block of 128 outputs, group of 128 inputs), outputs first; each CTA takes a
// contiguous piece of it ("stream-K"), whatever the shape. A warp holds 16 R outputs; the warps of
// the same outputs take turns at the groups. Sums over warps and over CTAs have a fixed order; the
// CTA that comes last to a block of outputs adds the parts and applies Hadamard, svh and bias.
#pragma once
#include "operand.cuh"

namespace qtip {

struct GemmArgs {
    const uint8_t *weights;
    const uint4 *x;       // operand B, as hadamard.cuh writes it
    float *parts;         // [2 CTAs, tokens of a block, 128] for each block of tokens
    uint32_t *counters;   // [blocks of tokens, blocks of outputs], zero before and after
    const __half *svh;    // [outputs]
    const void *bias;     // [outputs] of y's dtype, or null
    void *y;              // [tokens, outputs], rows `y_stride` apart
    int64_t y_stride;
    int tokens, groups, blocks, units_of_cta, dtype;
    float scale;
    CodeArgs code;
};

// NT: n8 tiles of tokens. R: m16 tiles of a warp. Warps of a CTA. Stages of the ring of groups.
// Terms: the two terms of a weight are operands of their own and the MMA adds them: for codes of two
// terms, cheaper while the tensor cores have little to do.
template <int NT, int R, int Warps, int Stages, bool Terms>
struct Gemm {
    static constexpr int kOutWarps = kBlock / (16 * R);
    static constexpr int kSplit = Warps / kOutWarps;  // warps that share outputs
    static constexpr int kTokens = 8 * NT;
    static constexpr int kRow = kBlock + 4;           // of sums in shared memory: no conflicts
    static constexpr int kRingBytes = Warps * Stages * R * kGroupBytes;
    static constexpr int kSharedBytes = kTableBytes + kRingBytes + kTokens * kRow * 4 + 16;
    static constexpr int kVectors = Terms ? 8 * NT * 32 : 4 * NT * 32;  // uint4 of x in a group

    float sums[R][NT][4];
    Group group[R];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < R * NT * 4; ++i) (&sums[0][0][0])[i] = 0.0f;
    }

    // Adds this group's share; x: its B operands.
    __device__ __forceinline__ void add(const uint4 *x, const CodeArgs &code,
                                        const uint32_t *table) {
        if constexpr (Terms) {
#pragma unroll
            for (int tile = 0; tile < 8; ++tile) {
                uint32_t even[R][4], odd[R][4];
#pragma unroll
                for (int r = 0; r < R; ++r)
#pragma unroll
                    for (int pair = 0; pair < 4; ++pair) {
                        even[r][register_of<kOrder>(2 * pair)] =
                            group[r].terms(tile, 2 * pair, code);
                        odd[r][register_of<kOrder>(2 * pair)] =
                            group[r].terms(tile, 2 * pair + 1, code);
                    }
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint4 b = x[(tile * NT + n) * 32];
#pragma unroll
                    for (int r = 0; r < R; ++r) {
                        multiply(sums[r][n], even[r], b.x, b.y);
                        multiply(sums[r][n], odd[r], b.z, b.w);
                    }
                }
            }
        } else {
#pragma unroll
            for (int two = 0; two < 4; ++two) {
                uint32_t first[R][4], second[R][4];
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    group[r].operand(first[r], 2 * two, code, table);
                    group[r].operand(second[r], 2 * two + 1, code, table);
                }
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint4 b = x[(two * NT + n) * 32];
#pragma unroll
                    for (int r = 0; r < R; ++r) {
                        multiply(sums[r][n], first[r], b.x, b.y);
                        multiply(sums[r][n], second[r], b.z, b.w);
                    }
                }
            }
        }
    }

    // The sums of all warps into `found` [tokens of a block, kRow], in the order of the warps.
    __device__ __forceinline__ void gather(float *found, int out_warp, int turn) {
        const int lane = threadIdx.x & 31;
        for (int now = 0; now < kSplit; ++now) {
            if (turn == now) {
#pragma unroll
                for (int r = 0; r < R; ++r)
#pragma unroll
                    for (int n = 0; n < NT; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int token = n * 8 + (lane & 3) * 2 + (i & 1);
                            const int out = (out_warp * R + r) * 16 + lane / 4 + 8 * (i >> 1);
                            float &sum = found[token * kRow + out];
                            sum = now ? sum + sums[r][n][i] : sums[r][n][i];
                        }
            }
            __syncthreads();
        }
    }
};

// Writes a CTA's part of a block of outputs; true for the CTA that completes the block, whose
// `found` then holds the sums of all parts.
template <int Tokens, int Row>
__device__ __forceinline__ bool complete(float *found, uint32_t *flag, const GemmArgs &args,
                                         int block, int tokens) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int from = block * args.groups;
    const int first = from / args.units_of_cta;
    const int last = (from + args.groups - 1) / args.units_of_cta;
    float *parts = args.parts + int64_t(blockIdx.y) * gridDim.x * 2 * Tokens * kBlock;
    // A CTA's first block has the even slot, its last one the odd one.
    auto slot = [&](int cta) {
        const bool is_first = cta * args.units_of_cta >= from;
        return parts + (2 * cta + !is_first) * int64_t(Tokens * kBlock);
    };
    float *mine = slot(blockIdx.x);
    for (int token = warp; token < tokens; token += warps)
        __stcg(reinterpret_cast<float4 *>(mine + token * kBlock) + lane,
               *reinterpret_cast<const float4 *>(found + token * Row + 4 * lane));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t *counter = args.counters + blockIdx.y * args.blocks + block;
        const bool is_last = atomicAdd(counter, 1u) == uint32_t(last - first);
        if (is_last) *counter = 0;
        *flag = is_last;
    }
    __syncthreads();
    if (!*flag) return false;
    __threadfence();
    for (int token = warp; token < tokens; token += warps) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int cta = first; cta <= last; ++cta) {
            const float4 part =
                __ldcg(reinterpret_cast<const float4 *>(slot(cta) + token * kBlock) + lane);
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        *reinterpret_cast<float4 *>(found + token * Row + 4 * lane) = sum;
    }
    return true;  // each warp finishes the tokens that it summed
}

template <int NT, int R, int Warps, int Stages, bool Terms, int MinBlocks>
__global__ void __launch_bounds__(Warps * 32, MinBlocks) gemm_kernel(const GemmArgs args) {
    using G = Gemm<NT, R, Warps, Stages, Terms>;
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t *table = reinterpret_cast<uint32_t *>(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int out_warp = warp % G::kOutWarps, turn = warp / G::kOutWarps;
    uint8_t *ring = shared + kTableBytes + warp * Stages * R * kGroupBytes;
    float *found = reinterpret_cast<float *>(shared + kTableBytes + G::kRingBytes);
    uint32_t *flag = reinterpret_cast<uint32_t *>(found + G::kTokens * G::kRow);

    const int end = min((int(blockIdx.x) + 1) * args.units_of_cta, args.blocks * args.groups);
    int unit = blockIdx.x * args.units_of_cta;
    // This warp's next request: how many units are left, where it stands in its block of outputs.
    int left = end - unit - turn, at = (unit + turn) % args.groups;
    const int64_t row = int64_t(args.groups) * kGroupBytes;
    const uint8_t *from = args.weights + int64_t((unit + turn) / args.groups * 8 + out_warp * R) * row
                          + int64_t(at) * kGroupBytes;
    const uint32_t ring_address = shared_address(ring);
    auto request = [&](int stage) {
        if (left > 0) {
#pragma unroll
            for (int r = 0; r < R; ++r)
                Group::request(ring_address + (stage * R + r) * kGroupBytes, from + r * row);
        }
        copy_commit();
        left -= G::kSplit, at += G::kSplit, from += G::kSplit * kGroupBytes;
        while (at >= args.groups) at -= args.groups, from += 7 * row;
    };
#pragma unroll
    for (int stage = 0; stage < Stages - 1; ++stage) request(stage);
    fill_table(table, args.code);
    let_next_kernel_start();
    wait_for_previous_kernel();
    __syncthreads();

    const int token_block = blockIdx.y;
    const int tokens = min(G::kTokens, args.tokens - token_block * G::kTokens);
    const uint4 *x = args.x + int64_t(token_block) * args.groups * G::kVectors + lane;
    G work;
    int mine = unit + turn, stage = 0;
    while (unit < end) {
        const int block = unit / args.groups, start = block * args.groups;
        const int stop = min(end, start + args.groups);
        work.clear();
        for (; mine < stop; mine += G::kSplit) {
            copy_wait<Stages - 2>();
#pragma unroll
            for (int r = 0; r < R; ++r)
                work.group[r].load(ring + (stage * R + r) * kGroupBytes);
            request(stage == 0 ? Stages - 1 : stage - 1);
            stage = stage == Stages - 1 ? 0 : stage + 1;
            work.add(x + int64_t(mine - start) * G::kVectors, args.code, table);
        }
        work.gather(found, out_warp, turn);
        const bool is_whole = unit == start && stop == start + args.groups;
        if (is_whole || complete<G::kTokens, G::kRow>(found, flag, args, block, tokens)) {
            for (int token = warp; token < tokens; token += Warps) {
                float v[4];
                load4(v, found, token * G::kRow + 4 * lane, kFloat);
                const int64_t row = token_block * G::kTokens + token;
                const int out = block * kBlock + 4 * lane;
                finish(v, args.y, row * args.y_stride + out, out, args.dtype, args.svh,
                       args.bias, args.scale);
            }
        }
        __syncthreads();
        unit = stop;
    }
}

}  // namespace qtip
