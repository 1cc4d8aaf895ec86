// The product for more tokens: wgmma, decoded weights in registers, x in shared memory. Two
// warp groups have 128 outputs; a CTA has one or two such pairs, which share x.
#pragma once
#include "gemm.cuh"
#include "hadamard.cuh"
#include "wgmma.cuh"

namespace qtip {

template <int N, int Pairs>
struct Many {
    // Registers are given to groups of 4 warps: of the producing one's group three do nothing. A CTA
    // begins with 168 or 96 a thread, and there are no more than what the producers give back.
    static constexpr int kWarps = 8 * Pairs, kThreads = 32 * (kWarps + 4);
    static constexpr int kProducerRegisters = 32, kRegisters = Pairs == 1 ? 232 : 112;
    static constexpr int kTokens = N, kOutBlocks = Pairs;
    static constexpr int kLayout = kCores;
    static constexpr int kProducts = 8;  // of a unit
    static constexpr int kXParts = 2, kXBytes = kProducts / 2 * N * 32;  // of 64 inputs
    static constexpr int kXStages = kTableBytes ? 2 : 4;
    static constexpr int kUnitBytes = 8 * Pairs * kGroupBytes;
    static constexpr int kChunk = 32;  // tokens whose sums stand in shared memory at once
    static constexpr int kFoundBytes = Pairs * kChunk * kRow * 4;
    static constexpr int kBudget =
        kSharedLimit - kTableBytes - kXStages * kXBytes - kFoundBytes - 512;
    static constexpr int kFit = kBudget / kUnitBytes;
    static constexpr bool kIsPossible = kFit >= 2;
    static constexpr int kWStages = kFit > 6 ? 6 : kFit < 2 ? 2 : kFit;
    using W = Ring<kWStages, kUnitBytes>;
    using X = Ring<kXStages, kXBytes>;
    static constexpr int kSharedBytes = kTableBytes + W::kBytes + X::kBytes + kFoundBytes
                                        + W::kBarrierBytes + X::kBarrierBytes + 16;

    float sums[N / 2];
    Group group;
    uint32_t a[2][2][4] = {};  // of products that run while the next operands are decoded

    // Adds the group's share from its rings' stage `i`; `adds` 0: sums begin anew. Two products are
    // issued at once, while those before them run.
    __device__ __forceinline__ void add(const X &x, int i, int adds, const CodeArgs &code) {
        constexpr int kSteps = kProducts / 2, kOfPart = kSteps / kXParts;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t(&now)[2][4] = a[step % 2], (&before)[2][4] = a[1 - step % 2];
            group.operand(now[0], 2 * step, code);
            group.operand(now[1], 2 * step + 1, code);
            const int item = kXParts * i + step / kOfPart;
            if (step % kOfPart == 0) x.wait_full(item);
            const OperandB b(x.at(item), N * 16, 128);
            const int at = step % kOfPart * (N * 64);
            wgmma_fence();
            wgmma<N>(sums, now[0], b.at(at), step ? 1 : adds);
            wgmma<N>(sums, now[1], b.at(at + N * 32), 1);
            wgmma_commit();
            wgmma_wait<1>();
            // Those before have ended: with their operands and, after a stage's first, its stage.
            asm volatile("" ::"r"(before[0][0]), "r"(before[0][1]), "r"(before[0][2]),
                         "r"(before[0][3]), "r"(before[1][0]), "r"(before[1][1]),
                         "r"(before[1][2]), "r"(before[1][3]));
            if (step % kOfPart == 0 && (step || adds) && (threadIdx.x & 31) == 0)
                x.release(item - 1);
        }
    }
};

template <int N, int Pairs>
__global__ void __launch_bounds__(Many<N, Pairs>::kThreads, 1) many_kernel(const GemmArgs args) {
    using M = Many<N, Pairs>;
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t *table = reinterpret_cast<uint32_t *>(shared);
    uint8_t *memory = shared + kTableBytes;
    float *all_found = reinterpret_cast<float *>(memory + M::W::kBytes + M::X::kBytes);
    const uint32_t barriers = shared_address(all_found) + M::kFoundBytes;
    uint32_t *flags = reinterpret_cast<uint32_t *>(all_found) + M::kFoundBytes / 4
                      + (M::W::kBarrierBytes + M::X::kBarrierBytes) / 4;
    const typename M::W weights{shared_address(memory) + M::X::kBytes, barriers};
    const typename M::X x{shared_address(memory), barriers + M::W::kBarrierBytes};
    const uint8_t *stages = memory + M::X::kBytes;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, pair = warp / 8;
    const Piece<Pairs> piece(args);
    if (threadIdx.x == 0) {
        weights.init(M::kWarps), x.init(M::kWarps);
        fence_async();
    }
    __syncthreads();
    let_next_kernel_start();
    if (warp >= M::kWarps) {
        keep_registers<M::kProducerRegisters>();
        if (warp == M::kWarps)
            produce<Pairs, M::kXParts, M::kWStages - 2, M::kXBytes, M::kWStages>(args, piece,
                                                                                 weights, x);
    } else {
        take_registers<M::kRegisters>();
        fill_table(table, args.code, 32 * M::kWarps);
        wait_for_previous_kernel();
        meet(1, 32 * M::kWarps);

        M work;
        float *found = all_found + pair * (M::kChunk * kRow);
        for (int unit = piece.begin; unit < piece.end;) {
            const int start = unit, block = unit / args.groups * Pairs + pair;
            const int stop = min(piece.end, (unit / args.groups + 1) * args.groups);
            for (; unit < stop; ++unit) {
                const int i = unit - piece.begin;
                weights.wait_full(i);
                work.group.load(stages + i % M::kWStages * M::kUnitBytes + warp * kGroupBytes);
                __syncwarp();
                if (lane == 0) weights.release(i);
                work.add(x, i, unit > start, args.code);
            }
            wgmma_wait<0>();
            if (lane == 0) x.release(M::kXParts * (unit - piece.begin) - 1);
            const Block<Pairs, N> outputs(args, block, 2 + pair, 256);
            if (block < args.blocks) {
#pragma unroll
                for (int chunk = 0; chunk < N / M::kChunk; ++chunk) {
#pragma unroll
                    for (int i = 0; i < M::kChunk / 2; ++i) {
                        const int token = i / 4 * 8 + (lane & 3) * 2 + (i & 1);
                        const int out = warp % 8 * 16 + lane / 4 + 8 * (i >> 1 & 1);
                        found[token * kRow + out] = work.sums[chunk * (M::kChunk / 2) + i];
                    }
                    meet(2 + pair, 256);
                    outputs.write(found, chunk * M::kChunk, M::kChunk, warp % 8, 8);
                    meet(2 + pair, 256);
                }
                outputs.complete(flags + pair, warp % 8, 8);
            }
        }
    }
}

}  // namespace qtip
