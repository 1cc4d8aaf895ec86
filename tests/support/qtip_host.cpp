// The decoder of the CUDA kernels, compiled for the host: groups of packed bits -> A operands of the
// tensor cores, as the bits of float16 pairs. Only the shuffles and the float16 sums, which the GPU
// has instructions for, are written here a second time.
#include <cstring>

#include "decode.cuh"

namespace {

uint32_t bits_of(double value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

double value_of(uint32_t bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    _Float16 value;
    std::memcpy(&value, &half, 2);
    return static_cast<double>(value);
}

// Exact in double, rounded to float16 once.
uint32_t weight(uint32_t state, int kind, uint32_t multiplier, uint32_t addend) {
    if (kind == 0) {
        const uint32_t both = qtip::two_terms(state, multiplier, addend);
        return bits_of(value_of(both & 0xffff) + value_of(both >> 16));
    }
    const double sum = value_of(qtip::byte_sum(state, multiplier, addend));
    if (kind == 3) return bits_of(static_cast<float>(sum - 1534) * qtip::kMadScale);
    return bits_of(sum * value_of(0x1eee) + value_of(0xc931));
}

template <int K, int Order>
void operands(const uint8_t *group, int kind, uint32_t multiplier, uint32_t addend,
              const uint32_t *table, uint32_t *found) {
    uint32_t words[32][2 * K];
    for (int lane = 0; lane < 32; ++lane) {
        for (int plane = 0; plane < K / 2; ++plane)
            std::memcpy(&words[lane][4 * plane], group + plane * 512 + lane * 16, 16);
        if (K % 2) std::memcpy(&words[lane][2 * K - 2], group + K / 2 * 512 + lane * 8, 8);
    }
    for (int lane = 0; lane < 32; ++lane) {
        const uint32_t *own = words[lane], *previous = words[(lane + 31) % 32];
        const uint32_t *before = words[(lane + 30) % 32];
        for (int tile = 0; tile < 8; ++tile)
            for (int pair = 0; pair < 4; ++pair) {
                uint32_t bits;
                if (kind == 2) {
                    const int at = qtip::step_at<K, 2>(pair);
                    const uint32_t state =
                        qtip::state<K, false>(own, previous, before, tile, at);
                    bits = table[qtip::table_index(state)];
                } else {
                    uint32_t half[2];
                    for (int i = 0; i < 2; ++i) {
                        const int at = qtip::step_at<K, 1>(2 * pair + i);
                        half[i] = weight(qtip::state<K, true>(own, previous, before, tile, at),
                                         kind, multiplier, addend);
                    }
                    bits = half[1] << 16 | half[0];
                }
                found[(lane * 8 + tile) * 4 + qtip::register_of<Order>(2 * pair)] = bits;
            }
    }
}

template <int K>
void groups(const uint8_t *packed, int count, int kind, int order, uint32_t multiplier,
            uint32_t addend, const uint32_t *table, uint32_t *found) {
    for (int i = 0; i < count; ++i) {
        const auto decode = order ? operands<K, 1> : operands<K, 0>;
        decode(packed + i * 256 * K, kind, multiplier, addend, table, found + i * 1024);
    }
}

}  // namespace

// packed: [count][256 K]; found: [count][32 lanes][8 tiles][4 registers]. kind, order: as QTIP_CODE
// and QTIP_ORDER. table: 1024 pairs, of kind 2.
extern "C" void decode(const uint8_t *packed, int count, int bits, int kind, int order,
                       uint32_t multiplier, uint32_t addend, const uint32_t *table,
                       uint32_t *found) {
    using Decode = void (*)(const uint8_t *, int, int, int, uint32_t, uint32_t, const uint32_t *,
                            uint32_t *);
    const Decode of_bits[] = {groups<1>, groups<2>, groups<3>, groups<4>,
                              groups<5>, groups<6>, groups<7>, groups<8>};
    of_bits[bits - 1](packed, count, kind, order, multiplier, addend, table, found);
}
