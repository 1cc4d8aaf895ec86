// Packed tiles to weights, bit for bit those of codes.py and trellis.py.
//
// A tile of 16 inputs x 16 outputs is a circular stream of 256 K bits, of which lane l = 4 (out mod
// 8) + (in mod 8) div 2 owns bits [8 K l, 8 K l + 8 K) and 8 weights, j = 0 to 7. Weight j is that
// of the 16 bits that end with bit 8 K l + (j + 1) K. `cpu.py` stores 16 bits of all 32 lanes after
// one another, K / 2 times, and 8 bits of all lanes if K is odd. So with the 16 bits before a lane's
// own, which are the lane before it's last ones, in front of them, each state is a shift of two
// neighbouring vectors by a constant: one instruction for 32 states. Lanes i and 16 + i are stored as
// a pair: a mask or a shift makes 32-bit lanes of either.

#pragma once

#include "vectors.h"

enum Code { kHalves = 0, kMul1 = 1, kHyb = 2, k1Mad = 3, kHalvesPlus = 4 };

constexpr int kTileWeights = 256;

struct Constants {
    uint32_t multiplier, addend;
    const uint32_t* table;  // of hyb: [1024] pairs of float16, the sign as the index's tenth bit
};

// The lanes' own bits and the 16 before them, as vectors of pairs of 16 bits.
template <int K>
struct Stream {
    static constexpr int kWords = K / 2, kCount = 1 + kWords + K % 2;
    Ints part[kCount][kParts];

    INLINE explicit Stream(const uint8_t* tile) {
        Ints last[kParts], before[kParts];
        for (int p = 0; p < kParts; ++p) {
            for (int i = 0; i < kWords; ++i)
                part[1 + i][p] = load16(tile + 64 * i + 4 * kFloats * p);
            last[p] = part[kWords][p];
            if constexpr (K % 2) {
                const Ints bytes = load8(tile + 64 * kWords + 2 * kFloats * p);
                part[kCount - 1][p] = left_of_16<8>(bytes);
                last[p] = kWords ? bit_or(left_of_16<8>(last[p]), bytes) : bytes;
            }
        }
        rotate(last, before);
        if constexpr (K == 1) {  // the two lanes before
            Ints first[kParts];
            rotate(before, first);
            for (int p = 0; p < kParts; ++p)
                before[p] = bit_or(left_of_16<8>(first[p]), before[p]);
        }
        for (int p = 0; p < kParts; ++p) part[0][p] = before[p];
    }

    // The states whose last bit is number End of their lane.
    template <int End>
    INLINE Ints states(int p) const {
        constexpr int i = End / 16;
        if constexpr (End % 16 == 0) return part[i][p];
        else return window<End % 16>(part[i][p], part[i + 1][p]);
    }
};

// A float16 number in the upper 16 bits of each lane, (bits & 0x8fff) ^ 0x3b60, as a float32: its
// exponent is 12 to 15, so all but the lowest two of its bits, moved and extended, are the same.
INLINE Floats upper_half(Ints bits) {
    return as_floats(masked(right_signed<3>(bits), fill(0x81FFE000u), fill(0x3F6C0000u)));
}

// The weights of states, one in each lane.
template <int C>
INLINE Floats weights_of(Ints state, Ints multiplier, Ints addend) {
    Ints hashed = product(state, multiplier);
    if constexpr (C == kHalvesPlus || C == k1Mad) hashed = plus(hashed, addend);
    if constexpr (C == kHalves || C == kHalvesPlus)
        return round16(add(upper_half(hashed), upper_half(left<16>(hashed))));
    // A float16 number of 1024 + B, B the sum of four bytes, times 0x1eee, plus 0xc931 (mul1); or
    // (B - 510) / 147.8, whose rounding to float16 the last bits of a float32 do not reach (1mad;
    // tests go through all states).
    const Floats sum = to_floats(byte_sums(hashed));
    if constexpr (C == kMul1)
        return round16(multiply_add(add(sum, fill(1024.0f)), fill(0.0067672729492f),
                                    fill(-10.3828125f)));
    return round16(multiply_add(add(sum, fill(-510.0f)), fill(1 / 147.800537109375f), fill(0.0f)));
}

// A tile: to[j][32 lanes].
template <int K, int C>
struct Tile {
    const Stream<K>& stream;
    const Constants& with;
    Ints multiplier, addend;
    float* to;

    template <int J>
    INLINE void one() const {
        for (int p = 0; p < kParts; ++p) {
            const Ints states = stream.template states<(J + 1) * K>(p);
            store(at(J, p), weights_of<C>(bit_and(states, fill(0xFFFFu)), multiplier, addend));
            store(at(J, p) + 16, weights_of<C>(right<16>(states), multiplier, addend));
        }
    }
    template <int M>
    INLINE void two() const {
        for (int p = 0; p < kParts; ++p) {
            const Ints states = stream.template states<(M + 1) * 2 * K>(p);
            pairs(M, p, 0, bit_and(states, fill(0xFFFFu)));
            pairs(M, p, 16, right<16>(states));
        }
    }
    INLINE void pairs(int m, int p, int lane, Ints states) const {
        const Ints hashed = product(states, plus(states, fill(1u)));
        Floats even, odd;
        look_up(with.table, bit_and(right<6>(hashed), fill(1023u)), even, odd);
        store(at(2 * m, p) + lane, even);
        store(at(2 * m + 1, p) + lane, odd);
    }
    INLINE float* at(int j, int p) const { return to + 32 * j + kFloats * p; }
    INLINE void decode() const {
        if constexpr (C == kHyb) {
            two<0>(), two<1>(), two<2>(), two<3>();
        } else {
            one<0>(), one<1>(), one<2>(), one<3>(), one<4>(), one<5>(), one<6>(), one<7>();
        }
    }
};

template <int K, int C>
void decode_tiles(const uint8_t* tiles, int count, const Constants& with, float* to) {
    const Ints multiplier = fill(with.multiplier), addend = fill(with.addend);
    for (int i = 0; i < count; ++i) {
        const Stream<K> stream(tiles + 32 * K * i);
        Tile<K, C>{stream, with, multiplier, addend, to + kTileWeights * i}.decode();
    }
}

using Decoder = void (*)(const uint8_t*, int, const Constants&, float*);

template <int K>
Decoder decoder_of_bits(int code) {
    constexpr Decoder all[] = {decode_tiles<K, kHalves>, decode_tiles<K, kMul1>,
                               decode_tiles<K, kHyb>, decode_tiles<K, k1Mad>,
                               decode_tiles<K, kHalvesPlus>};
    return code < 0 || code > 4 ? nullptr : all[code];
}

inline Decoder decoder_of(int bits, int code) {
    constexpr Decoder (*all[])(int) = {decoder_of_bits<1>, decoder_of_bits<2>, decoder_of_bits<3>,
                                       decoder_of_bits<4>, decoder_of_bits<5>, decoder_of_bits<6>,
                                       decoder_of_bits<7>, decoder_of_bits<8>};
    return bits < 1 || bits > 8 ? nullptr : all[bits - 1](code);
}
