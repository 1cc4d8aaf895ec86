// The product for few tokens: mma.sync. A warp has 16 R outputs; the warps of the same outputs take
// turns at a CTA's units, and each copies its own weights ahead. Tokens are the B operand.
#pragma once
#include "gemm.cuh"
#include "hadamard.cuh"

namespace qtip {

// NT: n8 tiles of tokens. R: m16 tiles of a warp. Warps of a CTA. Stages of the ring of groups.
// Terms: the two terms of a weight are operands of their own and the MMA adds them: for codes of two
// terms, cheaper while the tensor cores have little to do.
template <int NT, int R, int Warps, int Stages, bool Terms>
struct Few {
    static constexpr int kOutWarps = kBlock / (16 * R);
    static constexpr int kSplit = Warps / kOutWarps;  // warps that share outputs
    static constexpr int kTokens = 8 * NT;
    static constexpr int kRingBytes = Warps * Stages * R * kGroupBytes;
    static constexpr int kSharedBytes = kTableBytes + kRingBytes + kTokens * kRow * 4 + 16;
    static constexpr int kLayout = Terms ? kTerms : kPairs;
    static constexpr int kVectors = Terms ? 8 * NT * 32 : 4 * NT * 32;  // uint4 of x in a group

    float sums[R][NT][4];
    Group group[R];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < R * NT * 4; ++i) (&sums[0][0][0])[i] = 0.0f;
    }

    // Adds this group's share; x: its B operands.
    __device__ __forceinline__ void add(const uint4 *x, const CodeArgs &code) {
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
                    group[r].operand(first[r], 2 * two, code);
                    group[r].operand(second[r], 2 * two + 1, code);
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

template <int NT, int R, int Warps, int Stages, bool Terms, int MinBlocks>
__global__ void __launch_bounds__(Warps * 32, MinBlocks) few_kernel(const GemmArgs args) {
    using F = Few<NT, R, Warps, Stages, Terms>;
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t *table = reinterpret_cast<uint32_t *>(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int out_warp = warp % F::kOutWarps, turn = warp / F::kOutWarps;
    uint8_t *ring = shared + kTableBytes + warp * Stages * R * kGroupBytes;
    float *found = reinterpret_cast<float *>(shared + kTableBytes + F::kRingBytes);
    uint32_t *flag = reinterpret_cast<uint32_t *>(found + F::kTokens * kRow);

    const Piece<1> piece(args);
    const int end = piece.end;
    int unit = piece.begin;
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
        left -= F::kSplit, at += F::kSplit, from += F::kSplit * kGroupBytes;
        while (at >= args.groups) at -= args.groups, from += 7 * row;
    };
#pragma unroll
    for (int stage = 0; stage < Stages - 1; ++stage) request(stage);
    fill_table(table, args.code, Warps * 32);
    let_next_kernel_start();
    wait_for_previous_kernel();
    __syncthreads();

    const uint4 *x = args.x + int64_t(blockIdx.y) * args.groups * F::kVectors + lane;
    F work;
    int mine = unit + turn, stage = 0;
    while (unit < end) {
        const int block = unit / args.groups, start = block * args.groups;
        const int stop = min(end, start + args.groups);
        work.clear();
        for (; mine < stop; mine += F::kSplit) {
            copy_wait<Stages - 2>();
#pragma unroll
            for (int r = 0; r < R; ++r)
                work.group[r].load(ring + (stage * R + r) * kGroupBytes);
            request(stage == 0 ? Stages - 1 : stage - 1);
            stage = stage == Stages - 1 ? 0 : stage + 1;
            work.add(x + int64_t(mine - start) * F::kVectors, args.code);
        }
        work.gather(found, out_warp, turn);
        const Block<1, F::kTokens> outputs(args, block, 1, 32 * Warps);
        outputs.write(found, 0, F::kTokens, warp, Warps);
        outputs.complete(flag, warp, Warps);
        __syncthreads();
        unit = stop;
    }
}

}  // namespace qtip
