// Vectors for the trellis decoder: 16-bit numbers, and the floats that half as many become.
//
// AVX-512 (with BW and VBMI2) or AVX2 (with FMA and F16C), as the compiler is told. A tile's 32
// lanes are kParts vectors of 16-bit numbers.

#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512BW__) && defined(__AVX512VBMI2__)

constexpr int kFloats = 16;
using Halves = __m512i;
using Floats = __m512;

inline Halves fill16(int a) { return _mm512_set1_epi16(short(a)); }
inline Halves load16(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline Halves load8(const uint8_t* from) {  // bytes, each into the low half of its 16 bits
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
}
inline Halves add16(Halves a, Halves b) { return _mm512_add_epi16(a, b); }
inline Halves or16(Halves a, Halves b) { return _mm512_or_si512(a, b); }
inline Halves low_product(Halves a, Halves b) { return _mm512_mullo_epi16(a, b); }
inline Halves high_product(Halves a, Halves b) { return _mm512_mulhi_epu16(a, b); }
inline Halves byte_sum(Halves a) { return _mm512_maddubs_epi16(a, _mm512_set1_epi8(1)); }
template <int S>
inline Halves shift_left(Halves a) { return _mm512_slli_epi16(a, S); }
template <int S>
inline Halves shift_right(Halves a) { return _mm512_srli_epi16(a, S); }
// The upper 16 bits of a:b << S.
template <int S>
inline Halves window(Halves a, Halves b) { return _mm512_shldi_epi16(a, b, S); }
// (a & mask) ^ flip
inline Halves masked(Halves a, Halves mask, Halves flip) {
    return _mm512_ternarylogic_epi32(a, mask, flip, 0x6A);
}
// a + 1 where sum < addend, both unsigned: the carry of the lower halves.
inline Halves add_carry(Halves a, Halves sum, Halves addend) {
    return _mm512_mask_add_epi16(a, _mm512_cmplt_epu16_mask(sum, addend), a, fill16(1));
}
// Each lane's number from the lane before it, the first one's from the last.
inline void rotate(const Halves* from, Halves* to) {
    alignas(64) static const uint16_t before[32] = {
        31, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
        15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30};
    to[0] = _mm512_permutexvar_epi16(_mm512_load_si512(before), from[0]);
}

// Float16 numbers: those of the lower and of the upper half of the lanes.
inline Floats low_floats(Halves a) { return _mm512_cvtph_ps(_mm512_castsi512_si256(a)); }
inline Floats high_floats(Halves a) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1)); }
inline Floats round16(Floats a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, 0)); }

// table[index] for each half of the lanes, put apart again: the 16 lower bits and the upper ones.
inline void look_up(const uint32_t* table, Halves index, Halves& lower, Halves& upper) {
    const __m512i low =
        _mm512_i32gather_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(index)), table, 4);
    const __m512i high = _mm512_i32gather_epi32(
        _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(index, 1)), table, 4);
    const auto narrow = [](__m512i a, __m512i b) {
        const __m512i first = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(a));
        return _mm512_inserti64x4(first, _mm512_cvtepi32_epi16(b), 1);
    };
    lower = narrow(low, high);
    upper = narrow(_mm512_srli_epi32(low, 16), _mm512_srli_epi32(high, 16));
}

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
inline Floats fill(float a) { return _mm512_set1_ps(a); }
inline Floats four(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

#else

constexpr int kFloats = 8;
using Halves = __m256i;
using Floats = __m256;

inline Halves fill16(int a) { return _mm256_set1_epi16(short(a)); }
inline Halves load16(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline Halves load8(const uint8_t* from) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
}
inline Halves add16(Halves a, Halves b) { return _mm256_add_epi16(a, b); }
inline Halves or16(Halves a, Halves b) { return _mm256_or_si256(a, b); }
inline Halves low_product(Halves a, Halves b) { return _mm256_mullo_epi16(a, b); }
inline Halves high_product(Halves a, Halves b) { return _mm256_mulhi_epu16(a, b); }
inline Halves byte_sum(Halves a) { return _mm256_maddubs_epi16(a, _mm256_set1_epi8(1)); }
template <int S>
inline Halves shift_left(Halves a) { return _mm256_slli_epi16(a, S); }
template <int S>
inline Halves shift_right(Halves a) { return _mm256_srli_epi16(a, S); }
template <int S>
inline Halves window(Halves a, Halves b) {
    return or16(_mm256_slli_epi16(a, S), _mm256_srli_epi16(b, 16 - S));
}
inline Halves masked(Halves a, Halves mask, Halves flip) {
    return _mm256_xor_si256(_mm256_and_si256(a, mask), flip);
}
inline Halves add_carry(Halves a, Halves sum, Halves addend) {
    const Halves is_at_least = _mm256_cmpeq_epi16(_mm256_max_epu16(sum, addend), sum);
    return add16(add16(a, fill16(1)), is_at_least);  // which is -1
}
inline void rotate(const Halves* from, Halves* to) {
    const Halves middle = _mm256_permute2x128_si256(from[0], from[1], 0x21);
    const Halves seam = _mm256_permute2x128_si256(from[1], from[0], 0x21);
    to[0] = _mm256_alignr_epi8(from[0], seam, 14);
    to[1] = _mm256_alignr_epi8(from[1], middle, 14);
}

inline Floats low_floats(Halves a) { return _mm256_cvtph_ps(_mm256_castsi256_si128(a)); }
inline Floats high_floats(Halves a) { return _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)); }
inline Floats round16(Floats a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, 0)); }

inline void look_up(const uint32_t* table, Halves index, Halves& lower, Halves& upper) {
    const int* from = (const int*)table;
    const __m256i low = _mm256_i32gather_epi32(
        from, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(index)), 4);
    const __m256i high = _mm256_i32gather_epi32(
        from, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(index, 1)), 4);
    const auto narrow = [](__m256i a, __m256i b) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
    };
    const __m256i mask = _mm256_set1_epi32(0xFFFF);
    lower = narrow(_mm256_and_si256(low, mask), _mm256_and_si256(high, mask));
    upper = narrow(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));
}

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats a) { _mm256_storeu_ps(to, a); }
inline Floats fill(float a) { return _mm256_set1_ps(a); }
inline Floats four(const float* from) { return _mm256_broadcast_ps((const __m128*)from); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

#endif

constexpr int kParts = 16 / kFloats;
