// Packed tiles to weights, bit for bit those of codes.py and trellis.py.
//
// A tile of 16 inputs x 16 outputs is a circular stream of 256 K bits, of which lane l = 4 (out mod
// 8) + (in mod 8) div 2 owns bits [8 K l, 8 K l + 8 K) and 8 weights, j = 0 to 7. Weight j is that
// of the 16 bits that end with bit 8 K l + (j + 1) K. `cpu.py` stores 16 bits of all 32
// lanes after one another, K / 2 times, and 8 bits of all lanes if K is odd. So with the 16 bits
// before a lane's own, which are the lane before it's last ones, in front of them, each state is a
// shift of two neighbouring vectors by a constant: one instruction for 32 states.

#pragma once

#include "vectors.h"

enum Code { kHalves = 0, kMul1 = 1, kHyb = 2, k1Mad = 3, kHalvesPlus = 4 };

constexpr int kTileWeights = 256;

struct Constants {
    uint32_t multiplier, addend;
    const uint32_t* table;  // of hyb: [1024] pairs of float16, the sign as the index's tenth bit
    const int* slots;       // where weight j of all lanes goes: [8]
};

// The lanes' own bits and the 16 before them, as vectors of 16 bits.
template <int K>
struct Stream {
    static constexpr int kWords = K / 2, kCount = 1 + kWords + K % 2;
    Halves part[kCount][kParts];

    explicit Stream(const uint8_t* tile) {
        Halves last[kParts], before[kParts];
        for (int p = 0; p < kParts; ++p) {
            for (int i = 0; i < kWords; ++i)
                part[1 + i][p] = load16(tile + 64 * i + 4 * kFloats * p);
            last[p] = part[kWords][p];
            if constexpr (K % 2) {
                const Halves bytes = load8(tile + 64 * kWords + 2 * kFloats * p);
                part[kCount - 1][p] = shift_left<8>(bytes);
                last[p] = kWords ? or16(shift_left<8>(last[p]), bytes) : bytes;
            }
        }
        rotate(last, before);
        if constexpr (K == 1) {  // the two lanes before
            Halves first[kParts];
            rotate(before, first);
            for (int p = 0; p < kParts; ++p)
                before[p] = or16(shift_left<8>(first[p]), before[p]);
        }
        for (int p = 0; p < kParts; ++p) part[0][p] = before[p];
    }

    // The states whose last bit is number End of their lane.
    template <int End>
    Halves states(int p) const {
        constexpr int i = End / 16;
        if constexpr (End % 16 == 0) return part[i][p];
        else return window<End % 16>(part[i][p], part[i + 1][p]);
    }
};

// One vector of states to the weights of its lower and of its upper lanes.
template <int C>
inline void weights_of(Halves state, const Constants& with, Floats& low, Floats& high) {
    const Halves by = fill16(with.multiplier), by_high = fill16(with.multiplier >> 16);
    Halves lower = low_product(state, by);
    Halves upper = add16(high_product(state, by), low_product(state, by_high));
    if constexpr (C == kHalvesPlus || C == k1Mad) {
        const Halves addend = fill16(with.addend);
        lower = add16(lower, addend);
        upper = add_carry(add16(upper, fill16(with.addend >> 16)), lower, addend);
    }
    if constexpr (C == kHalves || C == kHalvesPlus) {  // the sum of two float16 numbers
        const Halves mask = fill16(0x8FFF), flip = fill16(0x3B60);
        lower = masked(lower, mask, flip);
        upper = masked(upper, mask, flip);
        low = round16(add(low_floats(lower), low_floats(upper)));
        high = round16(add(high_floats(lower), high_floats(upper)));
    } else {  // 0x6400 + B is the float16 number 1024 + B, B the sum of four bytes
        const Halves sum = add16(add16(byte_sum(lower), byte_sum(upper)), fill16(0x6400));
        // mul1: float16 0x1eee and 0xc931. 1mad: (B - 510) / 147.8, whose rounding to float16 the
        // last bits of a float32 do not reach (tests go through all states).
        const Floats scale = fill(C == kMul1 ? 0.0067672729f : 1 / 147.800537109375f);
        const Floats shift = fill(C == kMul1 ? -10.3828125f : 0.0f);
        const Floats centre = fill(C == kMul1 ? 0.0f : -1534.0f);
        low = round16(multiply_add(add(low_floats(sum), centre), scale, shift));
        high = round16(multiply_add(add(high_floats(sum), centre), scale, shift));
    }
}

// A tile: to[slot][32 lanes].
template <int K, int C>
struct Tile {
    Stream<K> stream;
    const Constants& with;
    float* to;

    template <int J>
    void one() const {
        for (int p = 0; p < kParts; ++p) {
            Floats low, high;
            weights_of<C>(stream.template states<(J + 1) * K>(p), with, low, high);
            put(J, p, low, high);
        }
    }
    template <int M>
    void two() const {
        for (int p = 0; p < kParts; ++p) {
            const Halves state = stream.template states<(M + 1) * 2 * K>(p);
            const Halves hashed = low_product(state, add16(state, fill16(1)));
            Halves even, odd;
            look_up(with.table, shift_right<6>(hashed), even, odd);
            put(2 * M, p, low_floats(even), high_floats(even));
            put(2 * M + 1, p, low_floats(odd), high_floats(odd));
        }
    }
    void put(int j, int p, Floats low, Floats high) const {
        float* at = to + 32 * with.slots[j] + 2 * kFloats * p;
        store(at, low);
        store(at + kFloats, high);
    }
    void decode() const {
        if constexpr (C == kHyb) {
            two<0>(), two<1>(), two<2>(), two<3>();
        } else {
            one<0>(), one<1>(), one<2>(), one<3>(), one<4>(), one<5>(), one<6>(), one<7>();
        }
    }
};

template <int K, int C>
void decode_tiles(const uint8_t* tiles, int count, const Constants& with, float* to) {
    for (int i = 0; i < count; ++i)
        Tile<K, C>{Stream<K>(tiles + 32 * K * i), with, to + kTileWeights * i}.decode();
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
