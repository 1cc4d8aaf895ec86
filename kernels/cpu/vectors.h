// Vectors for the trellis decoder: lanes of 32 bits, which are pairs of 16 where bits are cut out.
//
// AVX-512 (with BW and VBMI2) or AVX2 (with FMA and F16C), as the compiler is told. The 32 lanes of
// a tile are kParts vectors of pairs.

#pragma once

#include <immintrin.h>

#include <cstdint>

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512BW__) && defined(__AVX512VBMI2__)

constexpr int kFloats = 16;
using Ints = __m512i;
using Floats = __m512;

INLINE Ints fill(uint32_t a) { return _mm512_set1_epi32(int(a)); }
INLINE Ints load16(const uint8_t* from) { return _mm512_loadu_si512(from); }
INLINE Ints load8(const uint8_t* from) {  // bytes, each into the low half of its 16 bits
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
}
INLINE Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
INLINE Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
INLINE Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints product(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
template <int S>
INLINE Ints left(Ints a) { return _mm512_slli_epi32(a, S); }
template <int S>
INLINE Ints right(Ints a) { return _mm512_srli_epi32(a, S); }
template <int S>
INLINE Ints right_signed(Ints a) { return _mm512_srai_epi32(a, S); }
template <int S>
INLINE Ints left_of_16(Ints a) { return _mm512_slli_epi16(a, S); }
// Of each pair of 16 bits a and b: the upper 16 of a:b << S.
template <int S>
INLINE Ints window(Ints a, Ints b) { return _mm512_shldi_epi16(a, b, S); }
// (a & mask) ^ flip
INLINE Ints masked(Ints a, Ints mask, Ints flip) {
    return _mm512_ternarylogic_epi32(a, mask, flip, 0x6A);
}
INLINE Ints byte_sums(Ints a) {  // of the four bytes of each lane
    return _mm512_madd_epi16(_mm512_maddubs_epi16(a, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
}
// Of 16 pairs (lane i, lane 16 + i): each lane's number from the lane before it.
INLINE void rotate(const Ints* from, Ints* to) {
    alignas(64) static const uint16_t before[32] = {
        31, 30, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
        14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29};
    to[0] = _mm512_permutexvar_epi16(_mm512_load_si512(before), from[0]);
}
// table[index]: the float16 numbers of its lower and of its upper 16 bits.
INLINE void look_up(const uint32_t* table, Ints index, Floats& lower, Floats& upper) {
    const Ints found = _mm512_i32gather_epi32(index, table, 4);
    lower = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(found));
    upper = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(right<16>(found)));
}

INLINE Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
INLINE Ints as_ints(Floats a) { return _mm512_castps_si512(a); }
INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
INLINE void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
INLINE Floats fill(float a) { return _mm512_set1_ps(a); }
INLINE Floats four(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Twice (AVX2) or four times four numbers: the second ones `near` behind the first, the third and
// fourth `far` behind those.
INLINE Floats fours(const float* from, int near, int far) {
    const __m512 first = _mm512_castps128_ps512(_mm_loadu_ps(from));
    const __m512 half = _mm512_insertf32x4(first, _mm_loadu_ps(from + near), 1);
    const __m512 more = _mm512_insertf32x4(half, _mm_loadu_ps(from + far), 2);
    return _mm512_insertf32x4(more, _mm_loadu_ps(from + far + near), 3);
}
INLINE void store_upper_halves(uint16_t* to, Ints a) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(right<16>(a)));
}

#else

constexpr int kFloats = 8;
using Ints = __m256i;
using Floats = __m256;

INLINE Ints fill(uint32_t a) { return _mm256_set1_epi32(int(a)); }
INLINE Ints load16(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
INLINE Ints load8(const uint8_t* from) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
}
INLINE Ints bit_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
INLINE Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
INLINE Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
INLINE Ints product(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
template <int S>
INLINE Ints left(Ints a) { return _mm256_slli_epi32(a, S); }
template <int S>
INLINE Ints right(Ints a) { return _mm256_srli_epi32(a, S); }
template <int S>
INLINE Ints right_signed(Ints a) { return _mm256_srai_epi32(a, S); }
template <int S>
INLINE Ints left_of_16(Ints a) { return _mm256_slli_epi16(a, S); }
template <int S>
INLINE Ints window(Ints a, Ints b) {
    return bit_or(_mm256_slli_epi16(a, S), _mm256_srli_epi16(b, 16 - S));
}
INLINE Ints masked(Ints a, Ints mask, Ints flip) {
    return _mm256_xor_si256(_mm256_and_si256(a, mask), flip);
}
INLINE Ints byte_sums(Ints a) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}
INLINE void rotate(const Ints* from, Ints* to) {
    const Ints swapped = bit_or(left<16>(from[1]), right<16>(from[1]));  // lanes 15 and 31
    const Ints seam = _mm256_permute2x128_si256(swapped, from[0], 0x21);
    const Ints middle = _mm256_permute2x128_si256(from[0], from[1], 0x21);
    to[0] = _mm256_alignr_epi8(from[0], seam, 12);
    to[1] = _mm256_alignr_epi8(from[1], middle, 12);
}
INLINE void look_up(const uint32_t* table, Ints index, Floats& lower, Floats& upper) {
    const Ints found = _mm256_i32gather_epi32((const int*)table, index, 4);
    const Ints mixed = _mm256_packus_epi32(bit_and(found, fill(0xFFFFu)), right<16>(found));
    const Ints apart = _mm256_permute4x64_epi64(mixed, 0xD8);
    lower = _mm256_cvtph_ps(_mm256_castsi256_si128(apart));
    upper = _mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1));
}

INLINE Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
INLINE Ints as_ints(Floats a) { return _mm256_castps_si256(a); }
INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
INLINE void store(float* to, Floats a) { _mm256_storeu_ps(to, a); }
INLINE Floats fill(float a) { return _mm256_set1_ps(a); }
INLINE Floats four(const float* from) { return _mm256_broadcast_ps((const __m128*)from); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats fours(const float* from, int near, int) {
    const __m256 first = _mm256_castps128_ps256(_mm_loadu_ps(from));
    return _mm256_insertf128_ps(first, _mm_loadu_ps(from + near), 1);
}
INLINE void store_upper_halves(uint16_t* to, Ints a) {
    const Ints mixed = _mm256_packus_epi32(right<16>(a), right<16>(a));
    const Ints apart = _mm256_permute4x64_epi64(mixed, 0xD8);
    _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(apart));
}

#endif

constexpr int kParts = 16 / kFloats;

// To float16's 11 bits, ties to even: a number in its normal range, or 0. As the sum with a number
// that has the same sign and an exponent 13 higher is rounded.
INLINE Floats round16(Floats a) {
    const Ints power = bit_and(as_ints(a), fill(0xFF800000u));
    const Floats large = as_floats(plus(power, fill(13u << 23)));
    return subtract(add(a, large), large);
}
// To bfloat16, ties to even: a number that is not near the largest.
INLINE void store_bfloat16(uint16_t* to, Floats a) {
    const Ints bits = as_ints(a), is_odd = bit_and(right<16>(bits), fill(1u));
    store_upper_halves(to, plus(plus(bits, fill(0x7FFFu)), is_odd));
}
