// From a lane's packed bits to the weights of its tiles. Compiles for the GPU and, with any C++17
// compiler, for the host, where the tests compare every state with the reference.
//
// A group is 8 tiles of 16 x 16 weights, neighbours along the inputs: 16 outputs x 128 inputs. A
// lane owns 8 weights of each tile: positions 8 lane + t of its sequence, t = 0..7. Their fresh bits
// are 8 K bits of the tile's circular stream, read here as a little-endian integer of K bytes (its
// byte 0 holds the *last* bits). A state is 16 bits that end with its own fresh ones, so the first
// states also need the last bits of the lane before (K = 1: of the two lanes before).
//
// The words of a lane for a group, 2 K of them (the layout that `pack` in cuda.py writes):
//   w[4 i + j / 2], half j % 2   bytes 2 i, 2 i + 1 of tile j's integer, i < K / 2
//   w[2 K - 2 + j / 4], byte j % 4   its last byte, K odd
// So one shuffle of a 16-bit plane serves two tiles, and every state is a byte permutation away from
// a shifted word: left shifts run as multiplications, beside the logic pipe, which is the bottleneck.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define QTIP_INLINE __host__ __device__ __forceinline__
#else
#define QTIP_INLINE inline
#endif

namespace qtip {

// Bytes of the pair (b:a) that the four nibbles of `selector` name; 0-3 are a's, 4-7 b's.
QTIP_INLINE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
    return __byte_perm(a, b, selector);
#else
    uint64_t pair = (uint64_t(b) << 32) | a;
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) {
        uint32_t byte = uint32_t(pair >> (8 * ((selector >> (4 * i)) & 7))) & 0xff;
        found |= byte << (8 * i);
    }
    return found;
#endif
}

// Words of the lane before (`previous`) that a lane needs: those of plane 0, or both if K = 1.
template <int K>
constexpr int kSharedWords = K == 1 ? 2 : 4;

// 32 bits of tile j's stream from its byte `first` on (even); more than the window needs is garbage.
template <int K>
QTIP_INLINE uint32_t view(const uint32_t *w, const uint32_t *previous, const uint32_t *before,
                          int j, int first) {
    const uint32_t half = 2 * (j & 1);
    if (K == 1) {
        const uint32_t byte = j & 3;
        const uint32_t two = permute(w[j / 4], previous[j / 4], byte | (4 + byte) << 4);
        return permute(two, before[j / 4], 0x10 | (4 + byte) << 8);
    }
    const uint32_t follower = previous[j / 2];
    if (K % 2) {
        const uint32_t top = permute(w[2 * K - 2 + j / 4], follower,
                                     (j & 3) | (4 + half) << 4 | (5 + half) << 8);
        if (first == K - 1) return top;
        if (first == K - 3)
            return permute(w[4 * (first / 2) + j / 2], top, half | (half + 1) << 4 | 0x5400);
    }
    const uint32_t low = w[4 * (first / 2) + j / 2];
    const uint32_t high = first + 2 == K ? follower : w[4 * (first / 2 + 1) + j / 2];
    return permute(low, high, half | (half + 1) << 4 | (4 + half) << 8 | (5 + half) << 12);
}

// The state whose lowest bit is bit `at` of tile j's stream. Clean: nothing above its 16 bits.
template <int K, bool Clean>
QTIP_INLINE uint32_t state(const uint32_t *w, const uint32_t *previous, const uint32_t *before,
                           int j, int at) {
    const int first = 2 * (at / 16);
    const int shift = at - 8 * first;  // 0 to 15
    const uint32_t bits = view<K>(w, previous, before, j, first);
    if (!Clean) return bits >> shift;
    if (shift == 0) return permute(bits, 0, 0x4410);
    if (shift <= 8) return permute(bits << (8 - shift), 0, 0x4421);
    return permute(bits << (16 - shift), 0, 0x4432);
}

// Bit of the tile's stream where step `i` of a lane ends, with V weights to a step.
template <int K, int V>
QTIP_INLINE constexpr int step_at(int i) {
    return 8 * K - (i + 1) * K * V;
}

// 3INST and MCG: two float16 numbers in one word, whose sum is the weight.
QTIP_INLINE uint32_t two_terms(uint32_t state, uint32_t multiplier, uint32_t addend,
                               uint32_t flip = 0x3b603b60u) {
    const uint32_t x = state * multiplier + addend;
#ifdef __CUDA_ARCH__
    // Two immediates would take two instructions: `flip` is kept in a register.
    uint32_t found;
    asm("lop3.b32 %0, %1, 0x8fff8fff, %2, 0x6a;" : "=r"(found) : "r"(x), "r"(flip));
    return found;
#else
    return (x & 0x8fff8fffu) ^ flip;
#endif
}

// MUL1, 1MAD: the float16 number 1024 + (sum of the four bytes), as bits.
QTIP_INLINE uint32_t byte_sum(uint32_t state, uint32_t multiplier, uint32_t addend) {
    const uint32_t x = state * multiplier + addend;
#ifdef __CUDA_ARCH__
    return __dp4a(x, 0x01010101u, 0x6400u);
#else
    return 0x6400u + (x & 0xff) + (x >> 8 & 0xff) + (x >> 16 & 0xff) + (x >> 24);
#endif
}

// 1MAD: (sum - 510) times this, in float32, rounded to float16 (equal to the quotient for all sums).
constexpr float kMadScale = 1.0f / 147.800537109375f;

// HYB: index into the table of 2^10 pairs, whose upper half has the first number negated.
QTIP_INLINE uint32_t table_index(uint32_t state) {
    return ((state * state + state) >> 6) & 0x3ff;
}

// A tile's element (row of the A operand, column) that t stands for: which of the operand's four
// registers (rows g, g + 8, then columns + 8) and which half of it.
//   EXL3's order: t = 4 (out div 8) + 2 (in div 8) + in mod 2; QTIP's swaps the first two.
template <int Order>
QTIP_INLINE constexpr int register_of(int t) {
    return Order == 0 ? (t >> 2 & 1) + 2 * (t >> 1 & 1) : t >> 1;
}

}  // namespace qtip
