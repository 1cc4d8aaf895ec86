// A lane's share of a group of packed weights, and its tiles as A operands of m16n8k16.
#pragma once
#include "common.cuh"
#include "decode.cuh"

#ifndef QTIP_BITS
#error "QTIP_BITS, QTIP_CODE and QTIP_ORDER choose what this library decodes"
#endif

namespace qtip {

enum Code { kTwoTerms = 0, kByteSum = 1, kTable = 2, kByteMean = 3 };

constexpr int kBits = QTIP_BITS;
constexpr int kCode = QTIP_CODE;
constexpr int kOrder = QTIP_ORDER;
constexpr int kValues = kCode == kTable ? 2 : 1;  // weights of a state
constexpr int kGroupBytes = 256 * kBits;          // of a group: 32 lanes x 8 K bytes
constexpr int kTableEntries = 1024;
constexpr int kTableBytes = kCode == kTable ? kTableEntries * 32 * 4 : 0;

// What a code is computed with.
struct CodeArgs {
    uint32_t multiplier, addend;
    uint32_t flip;          // 0x3b603b60
    const uint32_t *table;  // 2^9 pairs of float16, of HYB
};

// Where a kernel's dynamic shared memory begins, after what CUDA keeps for itself: known when this is
// compiled, the table's address is part of the load.
constexpr int kTableAt = 1024;

// A table with each entry once for every bank: no two lanes ever conflict.
__device__ __forceinline__ void fill_table(uint32_t *shared, const CodeArgs &code,
                                           int threads) {
    if constexpr (kCode == kTable) {
        if (shared_address(shared) != kTableAt) __trap();
        for (int i = threadIdx.x; i < kTableEntries * 8; i += threads) {
            const int entry = i / 8;
            uint32_t pair = __ldg(code.table + entry % 512);
            if (entry >= 512) pair ^= 0x8000u;
            reinterpret_cast<uint4 *>(shared)[i] = make_uint4(pair, pair, pair, pair);
        }
    }
}

struct Group {
    uint32_t own[2 * kBits];
    uint32_t previous[kSharedWords<kBits>];
    uint32_t before[kSharedWords<kBits>];

    // Reads what `request` put at `from` (shared memory, this warp's) and exchanges with neighbours.
    __device__ __forceinline__ void load(const uint8_t *from) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int plane = 0; plane < kBits / 2; ++plane) {
            const uint4 words = reinterpret_cast<const uint4 *>(from)[plane * 32 + lane];
            own[4 * plane] = words.x, own[4 * plane + 1] = words.y;
            own[4 * plane + 2] = words.z, own[4 * plane + 3] = words.w;
        }
        if constexpr (kBits % 2) {
            const uint2 words =
                reinterpret_cast<const uint2 *>(from + (kBits / 2) * 512)[lane];
            own[2 * kBits - 2] = words.x, own[2 * kBits - 1] = words.y;
        }
#pragma unroll
        for (int i = 0; i < kSharedWords<kBits>; ++i) {
            previous[i] = __shfl_sync(0xffffffffu, own[i], lane + 31);
            before[i] = kBits == 1 ? __shfl_sync(0xffffffffu, own[i], lane + 30) : 0;
        }
    }

    // Starts the copy of a group from `from` (global) to `to` (shared).
    static __device__ __forceinline__ void request(uint32_t to, const uint8_t *from) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int plane = 0; plane < kBits / 2; ++plane)
            copy_async<16>(to + plane * 512 + lane * 16, from + plane * 512 + lane * 16);
        if constexpr (kBits % 2)
            copy_async<8>(to + (kBits / 2) * 512 + lane * 8,
                          from + (kBits / 2) * 512 + lane * 8);
    }

    template <bool Clean>
    __device__ __forceinline__ uint32_t state_of(int tile, int step) const {
        return state<kBits, Clean>(own, previous, before, tile, step_at<kBits, kValues>(step));
    }

    // Tile `tile` as the A operand, rounded to float16 as the code defines it.
    __device__ __forceinline__ void operand(uint32_t (&a)[4], int tile,
                                            const CodeArgs &code) const {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            uint32_t &found = a[register_of<kOrder>(2 * pair)];
            if constexpr (kCode == kTable) {
                const uint32_t s = state_of<false>(tile, pair);
                const uint32_t twice = s * (s * 2 + 2);  // the index stands at bits 7 to 16
                const uint32_t at = (twice & 0x1ff80u) | (threadIdx.x & 31) * 4;
                asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(found) : "r"(at), "n"(kTableAt));
            } else if constexpr (kCode == kByteSum) {
                const uint32_t both = sums(tile, pair, code.multiplier, 0);
                const __half2 value = __hfma2(reinterpret_cast<const __half2 &>(both),
                                              __half2half2(__ushort_as_half(0x1eee)),
                                              __half2half2(__ushort_as_half(0xc931)));
                found = reinterpret_cast<const uint32_t &>(value);
            } else if constexpr (kCode == kByteMean) {
                const uint32_t both = sums(tile, pair, code.multiplier, code.addend);
                const float2 from_1024 = __half22float2(reinterpret_cast<const __half2 &>(both));
                found = half_pair((from_1024.x - 1534.0f) * kMadScale,
                                  (from_1024.y - 1534.0f) * kMadScale);
            } else {
                const uint32_t low = terms(tile, 2 * pair, code);
                const uint32_t high = terms(tile, 2 * pair + 1, code);
                const __half2 x = reinterpret_cast<const __half2 &>(low);
                const __half2 y = reinterpret_cast<const __half2 &>(high);
                const __half2 value = __halves2half2(__hadd(__low2half(x), __high2half(x)),
                                                     __hadd(__low2half(y), __high2half(y)));
                found = reinterpret_cast<const uint32_t &>(value);
            }
        }
    }

    // Byte sums of two states, as float16 numbers above 1024.
    __device__ __forceinline__ uint32_t sums(int tile, int pair, uint32_t multiplier,
                                             uint32_t addend) const {
        const uint32_t low = byte_sum(state_of<true>(tile, 2 * pair), multiplier, addend);
        const uint32_t high = byte_sum(state_of<true>(tile, 2 * pair + 1), multiplier, addend);
        return high * 65536u + low;
    }

    __device__ __forceinline__ uint32_t terms(int tile, int t, const CodeArgs &code) const {
        return two_terms(state_of<true>(tile, t), code.multiplier, code.addend, code.flip);
    }
};

}  // namespace qtip
