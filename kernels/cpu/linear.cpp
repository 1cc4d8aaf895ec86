// y = x W' of trellis-coded weights that stay packed in memory, on the CPU.
//
//     y = svh * H (C' (H (suh * x)))        C: the decoded tiles, H: Hadamards of blocks of 128
//
// Of a column of tiles (16 outputs) 8 tiles (128 inputs) are decoded at a time into float32, 8 KiB
// of the first-level cache, and multiplied with every token before the next 8 are decoded. A vector
// of decoded weights has 4 outputs x 4 inputs (2 x 4 with AVX2), as they lie in a tile: 4 numbers of
// x are repeated in all of its quarters, and sums of quarters are put together once, after the last
// input. So nothing is rearranged for a weight. Sums are float32.
//
// For many tokens `trellis_dense` decodes some outputs into rows, which a library for matrices
// multiplies.
//
// Threads take 128 outputs at a time. They are those of the OpenMP library that the process has
// already, torch's, which is called by its name: no second pool beside it. Without one: std::thread.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "decode.h"
#include "transform.h"

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));

namespace {

constexpr int kTile = 16;
constexpr int kTilesAtOnce = kBlock / kTile;
constexpr int kSums = 4 * kTile;  // of a token: 16 outputs x 4 inputs
constexpr int kVectors = 4;       // of sums, that a pass over decoded tiles keeps in registers
constexpr int kOutHalves = kFloats == 16 ? 2 : 1;  // of 8 outputs, in so many vectors
constexpr int kTokensAtOnce = kFloats == 16 ? 6 : 3;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<float[], Free>;

Memory floats(size_t count) {
    return Memory((float*)std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64));
}


// work(i) for i in [0, count), on so many threads.
template <class Work>
void parallel(int count, int threads, const Work& work) {
    std::atomic<int> next{0};
    const auto loop = [&] {
        for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    };
    threads = std::min(threads, count);
    if (threads <= 1) return loop();
    if (GOMP_parallel) {
        using Loop = decltype(loop);
        const auto call = [](void* data) { (*(Loop*)data)(); };
        return GOMP_parallel(call, (void*)&loop, unsigned(threads), 0);
    }
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(loop);
    loop();
    for (auto& other : others) other.join();
}

// Adds the products of T tokens with 8 decoded tiles. x: the first token's 128 numbers, tokens
// `stride` apart. sums: [T][kSums].
template <int T>
void multiply_tiles(const float* weights, const float* x, int64_t stride, float* sums) {
    for (int out_half = 0; out_half < 2; out_half += kOutHalves) {
        float* own = sums + 32 * out_half;
        Floats sum[T][kVectors];
        for (int t = 0; t < T; ++t)
            for (int v = 0; v < kVectors; ++v) sum[t][v] = load(own + kSums * t + kFloats * v);
        for (int quarter = 0; quarter < 4 * kTilesAtOnce; ++quarter) {
            const float* tile = weights + kTileWeights * (quarter / 4) + 32 * (quarter % 4);
            Floats inputs[T];
            for (int t = 0; t < T; ++t) inputs[t] = four(x + stride * t + 4 * quarter);
            for (int v = 0; v < kVectors; ++v) {
                // Lanes of one slot, then of the same inputs for the other 8 outputs.
                const int at = kFloats * v, half = out_half + at / 32;
                const Floats weight = load(tile + 128 * half + at % 32);
                for (int t = 0; t < T; ++t)
                    sum[t][v] = multiply_add(weight, inputs[t], sum[t][v]);
            }
        }
        for (int t = 0; t < T; ++t)
            for (int v = 0; v < kVectors; ++v) store(own + kSums * t + kFloats * v, sum[t][v]);
    }
}

void multiply_tokens(const float* weights, const float* x, int64_t stride, int tokens,
                     float* sums) {
    int t = 0;
    for (; t + kTokensAtOnce <= tokens; t += kTokensAtOnce)
        multiply_tiles<kTokensAtOnce>(weights, x + stride * t, stride, sums + kSums * t);
    x += stride * t, sums += kSums * t;
    switch (tokens - t) {
        case 1: return multiply_tiles<1>(weights, x, stride, sums);
        case 2: return multiply_tiles<2>(weights, x, stride, sums);
#if defined(__AVX512BW__) && defined(__AVX512VBMI2__)
        case 3: return multiply_tiles<3>(weights, x, stride, sums);
        case 4: return multiply_tiles<4>(weights, x, stride, sums);
        case 5: return multiply_tiles<5>(weights, x, stride, sums);
#endif
    }
}

// The sums of 4 inputs to one each: 16 outputs.
void add_quarters(const float* sums, float* to) {
    for (int out = 0; out < kTile; ++out) {
        const float* four = sums + 4 * out;
        to[out] = (four[0] + four[1]) + (four[2] + four[3]);
    }
}

}  // namespace

extern "C" {

struct TrellisLayer {
    const uint8_t* weights;  // [out / 16][in / 16][32 K]
    const float* suh;        // [in]
    const float* svh;        // [out]
    const uint32_t* table;   // of hyb
    int64_t inputs, outputs;
    int bits, code, is_qtip_order;
    uint32_t multiplier, addend;
};

}  // extern "C"

namespace {

// Where weight j of a lane goes: [out div 8][in div 8][in mod 2].
const int kSlots[2][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 4, 5, 2, 3, 6, 7}};

Constants constants_of(const TrellisLayer& layer) {
    return {layer.multiplier, layer.addend, layer.table, kSlots[layer.is_qtip_order]};
}

// Outputs [128 i, 128 i + 128) of all tokens. x: [tokens][in], ordered.
void linear_block(const TrellisLayer& layer, Decoder decode, int i, const float* x, int tokens,
                  void* y, int64_t y_stride, int dtype) {
    const Constants with = constants_of(layer);
    const int64_t tile_bytes = 32 * layer.bits, num_tiles = layer.inputs / kTile;
    const Memory weights = floats(kTilesAtOnce * kTileWeights);
    const Memory sums = floats(size_t(tokens) * kSums), z = floats(size_t(tokens) * kBlock);
    for (int column = 0; column < kTilesAtOnce; ++column) {
        const uint8_t* tiles =
            layer.weights + (int64_t(i) * kTilesAtOnce + column) * num_tiles * tile_bytes;
        std::fill_n(sums.get(), size_t(tokens) * kSums, 0.0f);
        for (int64_t k = 0; k < num_tiles; k += kTilesAtOnce) {
            decode(tiles + k * tile_bytes, kTilesAtOnce, with, weights.get());
            multiply_tokens(weights.get(), x + kTile * k, layer.inputs, tokens, sums.get());
        }
        for (int t = 0; t < tokens; ++t)
            add_quarters(sums.get() + kSums * t, z.get() + kBlock * t + kTile * column);
    }
    for (int t = 0; t < tokens; ++t) {
        float* row = z.get() + kBlock * t;
        hadamard(row);
        for (int o = 0; o < kBlock; ++o) row[o] *= layer.svh[kBlock * i + o];
        write_block(row, y, y_stride * t + kBlock * i, dtype);
    }
}

// One row of 128 inputs of 8 decoded tiles.
void write_row(const float* weights, int out, float* row) {
    for (int tile = 0; tile < kTilesAtOnce; ++tile)
        for (int slot = 0; slot < 4; ++slot)
            std::memcpy(row + kTile * tile + 4 * slot,
                        weights + kTileWeights * tile + 128 * (out / 8) + 32 * slot + 4 * (out % 8),
                        4 * sizeof(float));
}

}  // namespace

extern "C" {

// 1 if such a layer can be computed.
int trellis_is_known(int bits, int code) { return decoder_of(bits, code) != nullptr; }

// x [tokens, in], rows `x_stride` apart, to the basis of the coded weights and the order of their
// inputs: `to`, [tokens][in] of `to_dtype`.
void trellis_input(const TrellisLayer* layer, const void* x, int64_t x_stride, int dtype,
                   int tokens, void* to, int to_dtype, int threads) {
    const int blocks = int(layer->inputs / kBlock);
    parallel(tokens, tokens > 1 ? threads : 1, [&](int t) {
        alignas(64) float values[kBlock], ordered[kBlock];
        for (int b = 0; b < blocks; ++b) {
            read_block(x, x_stride * t + kBlock * b, dtype, values);
            for (int k = 0; k < kBlock; ++k) values[k] *= layer->suh[kBlock * b + k];
            hadamard(values);
            order_inputs(values, ordered);
            write_block(ordered, to, layer->inputs * t + kBlock * b, to_dtype);
        }
    });
}

// x: what trellis_input made, float32. y: [tokens, out], rows `y_stride` apart.
void trellis_linear(const TrellisLayer* layer, const float* x, int tokens, void* y,
                    int64_t y_stride, int dtype, int threads) {
    const Decoder decode = decoder_of(layer->bits, layer->code);
    parallel(int(layer->outputs / kBlock), threads, [&](int i) {
        linear_block(*layer, decode, i, x, tokens, y, y_stride, dtype);
    });
}

// Decoded outputs [first, first + count), multiples of 128: rows [count][in] in trellis_input's
// order, float32 or bfloat16.
void trellis_dense(const TrellisLayer* layer, int64_t first, int64_t count, void* to, int dtype,
                   int threads) {
    const Decoder decode = decoder_of(layer->bits, layer->code);
    const Constants with = constants_of(*layer);
    const int64_t tile_bytes = 32 * layer->bits, num_tiles = layer->inputs / kTile;
    parallel(int(count / kTile), threads, [&](int column) {
        const Memory weights = floats(kTilesAtOnce * kTileWeights);
        alignas(64) float row[kBlock];
        const uint8_t* tiles =
            layer->weights + (first / kTile + column) * num_tiles * tile_bytes;
        for (int64_t k = 0; k < num_tiles; k += kTilesAtOnce) {
            decode(tiles + k * tile_bytes, kTilesAtOnce, with, weights.get());
            for (int out = 0; out < kTile; ++out) {
                write_row(weights.get(), out, row);
                const int64_t at = (int64_t(column) * kTile + out) * layer->inputs + kTile * k;
                write_block(row, to, at, dtype);
            }
        }
    });
}

// z [tokens][count], float32 or bfloat16, products with outputs [first, first + count) -> those
// outputs of y [tokens, out].
void trellis_output(const TrellisLayer* layer, const void* z, int z_dtype, int tokens,
                    int64_t first, int64_t count, void* y, int64_t y_stride, int dtype,
                    int threads) {
    parallel(tokens, threads, [&](int t) {
        alignas(64) float row[kBlock];
        for (int64_t b = 0; b < count; b += kBlock) {
            read_block(z, count * t + b, z_dtype, row);
            hadamard(row);
            for (int o = 0; o < kBlock; ++o) row[o] *= layer->svh[first + b + o];
            write_block(row, y, y_stride * t + first + b, dtype);
        }
    });
}

}  // extern "C"
