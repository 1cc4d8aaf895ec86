// y = x W' of trellis-coded weights that stay packed in memory, on the CPU.
//
//     y = svh * H (C' (H (suh * x)))        C: the decoded tiles, H: Hadamards of blocks of 128
//
// Of a column of tiles (16 outputs) 8 tiles (128 inputs) are decoded at a time into float32, 8 KiB
// of the first-level cache, and multiplied with every token before the next 8 are decoded. Factors
// are float32, or rounded to bfloat16 where the caller wants that; sums are float32.
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
#include "products.h"
#include "transform.h"

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));

namespace {

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

Constants constants_of(const TrellisLayer& layer) {
    return {layer.multiplier, layer.addend, layer.table};
}

// 16 outputs: decodes 128 inputs at a time, and calls what multiplies them.
struct Column {
    const TrellisLayer& layer;
    Decoder decode;
    const uint8_t* tiles;

    template <class Multiply>
    void run(const Memory& weights, const Multiply& multiply) const {
        const Constants with = constants_of(layer);
        const int64_t tile_bytes = 32 * layer.bits;
        for (int64_t k = 0; k < layer.inputs / kTile; k += kTilesAtOnce) {
            decode(tiles + k * tile_bytes, kTilesAtOnce, with, weights.get());
            multiply(kTile * k);
        }
    }
};

// Outputs [128 i, 128 i + 128) of all tokens. x: [tokens][in] of float32 or bfloat16, ordered.
void linear_block(const TrellisLayer& layer, Decoder decode, int i, const void* x, int x_dtype,
                  int tokens, float* z) {
    const Order order = kOrders[layer.is_qtip_order];
    const int64_t column_bytes = layer.inputs * 2 * layer.bits;
    const Memory weights = floats(kTilesAtOnce * kTileWeights);
    const Memory sums = floats(size_t(tokens) * kSums);
    for (int column = 0; column < kTilesAtOnce; ++column) {
        const Column own{layer, decode,
                         layer.weights + (int64_t(i) * kTilesAtOnce + column) * column_bytes};
        std::fill_n(sums.get(), size_t(tokens) * kSums, 0.0f);
        float* to = z + kTile * column;
        if (x_dtype == kFloat32) {
            own.run(weights, [&](int64_t k) {
                multiply_tokens(weights.get(), order, (const float*)x + k, layer.inputs, tokens,
                                sums.get());
            });
            for (int t = 0; t < tokens; ++t) add_up<4>(sums.get() + kSums * t, to + kBlock * t);
        }
#if defined(__AVX512BF16__)
        else {
            alignas(64) uint16_t narrow[kTilesAtOnce * kTileWeights];
            own.run(weights, [&](int64_t k) {
                to_bfloat16(weights.get(), narrow);
                dot_tokens(narrow, order, (const uint16_t*)x + k, layer.inputs, tokens,
                           sums.get());
            });
            for (int t = 0; t < tokens; ++t) add_up<2>(sums.get() + kDotSums * t, to + kBlock * t);
        }
#endif
    }
}

// 128 outputs from `first` on of a token, whose row of y begins at `row_start`.
void finish(const TrellisLayer& layer, int64_t first, float* row, void* y, int64_t row_start,
            int dtype) {
    hadamard(row);
    for (int o = 0; o < kBlock; ++o) row[o] *= layer.svh[first + o];
    write_block(row, y, row_start + first, dtype);
}

// One row of 128 inputs of 8 decoded tiles, float32 or bfloat16. `lanes`: of the output's 4.
void write_row(const float* lanes, Order order, void* to, int64_t first, int dtype) {
    for (int i = 0; i < kBlock; i += kFloats) {
        const float* from = lanes + kTileWeights * (i / kTile) + order.inputs * (i % kTile / 8);
        const Floats row = fours(from, 32, order.inputs);
        if (dtype == kFloat32) store((float*)to + first + i, row);
        else store_bfloat16((uint16_t*)to + first + i, row);
    }
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

// Whether trellis_linear takes bfloat16.
int trellis_has_bfloat16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// x: what trellis_input made, float32 or bfloat16. y: [tokens, out], rows `y_stride` apart.
void trellis_linear(const TrellisLayer* layer, const void* x, int x_dtype, int tokens, void* y,
                    int64_t y_stride, int dtype, int threads) {
    const Decoder decode = decoder_of(layer->bits, layer->code);
    parallel(int(layer->outputs / kBlock), threads, [&](int i) {
        const Memory z = floats(size_t(tokens) * kBlock);
        linear_block(*layer, decode, i, x, x_dtype, tokens, z.get());
        for (int t = 0; t < tokens; ++t) {
            float* row = z.get() + kBlock * t;
            finish(*layer, kBlock * i, row, y, y_stride * t, dtype);
        }
    });
}

// Decoded outputs [first, first + count), multiples of 128: rows [count][in] in trellis_input's
// order, float32 or bfloat16.
void trellis_dense(const TrellisLayer* layer, int64_t first, int64_t count, void* to, int dtype,
                   int threads) {
    const Decoder decode = decoder_of(layer->bits, layer->code);
    const Constants with = constants_of(*layer);
    const Order order = kOrders[layer->is_qtip_order];
    const int64_t tile_bytes = 32 * layer->bits, num_tiles = layer->inputs / kTile;
    parallel(int(count / kTile), threads, [&](int column) {
        const Memory weights = floats(kTilesAtOnce * kTileWeights);
        const uint8_t* tiles =
            layer->weights + (first / kTile + column) * num_tiles * tile_bytes;
        for (int64_t k = 0; k < num_tiles; k += kTilesAtOnce) {
            decode(tiles + k * tile_bytes, kTilesAtOnce, with, weights.get());
            for (int out = 0; out < kTile; ++out) {
                const int64_t at = (int64_t(column) * kTile + out) * layer->inputs + kTile * k;
                const float* lanes = weights.get() + order.outputs * (out / 8) + 4 * (out % 8);
                write_row(lanes, order, to, at, dtype);
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
            finish(*layer, first + b, row, y, y_stride * t, dtype);
        }
    });
}

}  // extern "C"
