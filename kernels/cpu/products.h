// Products of decoded tiles with tokens, and their sums.
//
// A vector of decoded weights has 4 outputs x 4 inputs (2 x 4 with AVX2), as they lie in a tile: 4
// numbers of x are repeated in all of its quarters, and the quarters' sums are put together once, after
// the last input. So nothing is rearranged for a weight.

#pragma once

#include <cstring>

#include "decode.h"

constexpr int kTile = 16;
constexpr int kTilesAtOnce = 8;
constexpr int kSums = 4 * kTile;  // of a token: 16 outputs x 4 inputs
constexpr int kDotSums = 2 * kTile;  // of pairs of products
constexpr int kVectors = 4;       // of sums, that a pass over decoded tiles keeps in registers
constexpr int kOutHalves = kFloats == 16 ? 2 : 1;  // of 8 outputs, in so many vectors
constexpr int kTokensAtOnce = kFloats == 16 ? 6 : 3;

// Where the weights of a decoded tile lie, [8][32 lanes]: so far apart are those of the other 8
// inputs, of the other 8 outputs. Inputs of other parity are 32 apart.
struct Order {
    int inputs, outputs;
};
constexpr Order kOrders[] = {{64, 128}, {128, 64}};  // of EXL3, of QTIP

// Adds products of T tokens with the weights of 8 decoded tiles for inputs of `Parities` parities, the
// first of which is `first`, of 8 outputs for each kFloats / 8 vectors. sum: of each parity by itself.
template <int T, int Parities>
INLINE void add_products(const float* tile, Order order, const float* x, int64_t stride, int first,
                         Floats (&sum)[Parities][T][kVectors]) {
    for (int i = 0; i < 2 * kTilesAtOnce; ++i) {
        for (int p = 0; p < Parities; ++p) {
            const int parity = first + p;
            Floats inputs[T];
            for (int t = 0; t < T; ++t) inputs[t] = four(x + stride * t + 4 * parity);
            for (int v = 0; v < kVectors; ++v) {
                const int at = kFloats * v;
                const Floats weight =
                    load(tile + 32 * parity + order.outputs * (at / 32) + at % 32);
                for (int t = 0; t < T; ++t)
                    sum[p][t][v] = multiply_add(weight, inputs[t], sum[p][t][v]);
            }
        }
        x += 8;
        tile += i % 2 ? kTileWeights - order.inputs : order.inputs;
    }
}

// Adds the products of T tokens with 8 decoded tiles. x: the first token's 128 numbers, tokens
// `stride` apart. sums: [T][kSums].
//
// An addition waits for the one before it: of few tokens the sums of inputs of either parity go on
// beside each other. Of more they do so one after the other, so that a token's sum is the same bit
// for bit whatever shares its step.
template <int T>
void multiply_tiles(const float* weights, Order order, const float* x, int64_t stride,
                    float* sums) {
    constexpr int kParities = T <= 2 ? 2 : 1;
    for (int out_half = 0; out_half < 2; out_half += kOutHalves) {
        const float* tile = weights + order.outputs * out_half;
        for (int first = 0; first < 2; first += kParities) {
            Floats sum[kParities][T][kVectors];
            for (auto& of_parity : sum)
                for (auto& of_token : of_parity)
                    for (Floats& of_vector : of_token) of_vector = fill(0.0f);
            add_products<T, kParities>(tile, order, x, stride, first, sum);
            for (int t = 0; t < T; ++t)
                for (int v = 0; v < kVectors; ++v) {
                    float* to = sums + 32 * out_half + kSums * t + kFloats * v;
                    Floats total = load(to);
                    for (int p = 0; p < kParities; ++p) total = add(total, sum[p][t][v]);
                    store(to, total);
                }
        }
    }
}

inline void multiply_tokens(const float* weights, Order order, const float* x, int64_t stride,
                            int tokens, float* sums) {
    int t = 0;
    for (; t + kTokensAtOnce <= tokens; t += kTokensAtOnce)
        multiply_tiles<kTokensAtOnce>(weights, order, x + stride * t, stride, sums + kSums * t);
    x += stride * t, sums += kSums * t;
    switch (tokens - t) {
        case 1: return multiply_tiles<1>(weights, order, x, stride, sums);
        case 2: return multiply_tiles<2>(weights, order, x, stride, sums);
#if defined(__AVX512BW__) && defined(__AVX512VBMI2__)
        case 3: return multiply_tiles<3>(weights, order, x, stride, sums);
        case 4: return multiply_tiles<4>(weights, order, x, stride, sums);
        case 5: return multiply_tiles<5>(weights, order, x, stride, sums);
#endif
    }
}

// The sums of N inputs each to those of 16 outputs.
template <int N>
inline void add_up(const float* sums, float* to) {
    for (int out = 0; out < kTile; ++out) {
        const float* of_out = sums + N * out;
        to[out] = of_out[0] + of_out[1];
        if constexpr (N == 4) to[out] += of_out[2] + of_out[3];
    }
}

#if defined(__AVX512BF16__)

// The same with weights and x in bfloat16: two products and two additions in each of 16 lanes. A
// vector has the 32 lanes of a tile, 8 outputs x 4 inputs, so sums are of 2 inputs each.
constexpr int kDotTokensAtOnce = 12;

// 8 tiles in the order of float32's: [8][32 lanes] each.
inline void to_bfloat16(const float* weights, uint16_t* to) {
    for (int i = 0; i < kTilesAtOnce * kTileWeights; i += 32) {
        const __m512bh both = _mm512_cvtne2ps_pbh(load(weights + i + 16), load(weights + i));
        _mm512_storeu_si512(to + i, (__m512i)both);
    }
}

// sums: [T][16 outputs][2].
template <int T>
void dot_tiles(const uint16_t* weights, Order order, const uint16_t* x, int64_t stride,
               float* sums) {
    Floats sum[T][2];
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < 2; ++v) sum[t][v] = load(sums + kDotSums * t + 16 * v);
    for (int i = 0; i < 2 * kTilesAtOnce; ++i) {
        for (int parity = 0; parity < 2; ++parity) {
            const uint16_t* lanes = weights + 32 * parity;
            const __m512bh first = (__m512bh)_mm512_loadu_si512(lanes);
            const __m512bh second = (__m512bh)_mm512_loadu_si512(lanes + order.outputs);
            for (int t = 0; t < T; ++t) {
                long long four_inputs;
                std::memcpy(&four_inputs, x + stride * t + 4 * parity, 8);
                const __m512bh inputs = (__m512bh)_mm512_set1_epi64(four_inputs);
                sum[t][0] = _mm512_dpbf16_ps(sum[t][0], first, inputs);
                sum[t][1] = _mm512_dpbf16_ps(sum[t][1], second, inputs);
            }
        }
        x += 8;
        weights += i % 2 ? kTileWeights - order.inputs : order.inputs;
    }
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < 2; ++v) store(sums + kDotSums * t + 16 * v, sum[t][v]);
}

inline void dot_tokens(const uint16_t* weights, Order order, const uint16_t* x, int64_t stride,
                       int tokens, float* sums) {
    int t = 0;
    for (; t + kDotTokensAtOnce <= tokens; t += kDotTokensAtOnce)
        dot_tiles<kDotTokensAtOnce>(weights, order, x + stride * t, stride, sums + kDotSums * t);
    for (; t + 4 <= tokens; t += 4)
        dot_tiles<4>(weights, order, x + stride * t, stride, sums + kDotSums * t);
    for (; t < tokens; ++t)
        dot_tiles<1>(weights, order, x + stride * t, stride, sums + kDotSums * t);
}

#endif
