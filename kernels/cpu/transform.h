// Activations to and from the basis of the coded weights: signs and scales, Hadamards of 128.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int kBlock = 128;

enum Dtype { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };

inline float float_of_bits(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

inline uint16_t bfloat16_of(float number) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16) | 0x40;  // not a number
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// 128 numbers of a tensor, from element `first` on.
inline void read_block(const void* from, int64_t first, int dtype, float* to) {
    if (dtype == kFloat32) {
        std::memcpy(to, (const float*)from + first, kBlock * sizeof(float));
    } else if (dtype == kBfloat16) {
        const uint16_t* bits = (const uint16_t*)from + first;
        for (int i = 0; i < kBlock; ++i) to[i] = float_of_bits(uint32_t(bits[i]) << 16);
    } else {
        const uint16_t* bits = (const uint16_t*)from + first;
        for (int i = 0; i < kBlock; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(bits + i))));
    }
}

inline void write_block(const float* from, void* to, int64_t first, int dtype) {
    if (dtype == kFloat32) {
        std::memcpy((float*)to + first, from, kBlock * sizeof(float));
    } else if (dtype == kBfloat16) {
        uint16_t* bits = (uint16_t*)to + first;
        for (int i = 0; i < kBlock; ++i) bits[i] = bfloat16_of(from[i]);
    } else {
        uint16_t* bits = (uint16_t*)to + first;
        for (int i = 0; i < kBlock; i += 8)
            _mm_storeu_si128((__m128i*)(bits + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    }
}

template <int Half>
inline void butterflies(float* values) {
    for (int first = 0; first < kBlock; first += 2 * Half)
        for (int i = first; i < first + Half; ++i) {
            const float even = values[i], odd = values[i + Half];
            values[i] = even + odd;
            values[i + Half] = even - odd;
        }
}

// By Sylvester's matrix of 128 / sqrt(128).
inline void hadamard(float* values) {
    butterflies<64>(values), butterflies<32>(values), butterflies<16>(values);
    butterflies<8>(values), butterflies<4>(values), butterflies<2>(values), butterflies<1>(values);
    const float scale = 1 / std::sqrt(float(kBlock));
    for (int i = 0; i < kBlock; ++i) values[i] *= scale;
}

// Inputs of each tile in the order of its lanes: [in div 8][in mod 2][(in mod 8) div 2].
inline void order_inputs(const float* from, float* to) {
    for (int tile = 0; tile < kBlock; tile += 16)
        for (int slot = 0; slot < 4; ++slot)
            for (int q = 0; q < 4; ++q)
                to[tile + 4 * slot + q] = from[tile + 8 * (slot / 2) + 2 * q + slot % 2];
}
