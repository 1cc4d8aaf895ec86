// Tail-biting Viterbi search for bitshift trellises (QTIP, arXiv 2406.11235), on the CPU.
//
// A state is an L-bit number, each step shifts kv = K * V fresh bits in and emits V values, those of
// a table: s(i) = ((s(i-1) << kv) | fresh) mod 2^L. Wanted is the path that is nearest to x.
//
// With e(s, i) = |table[s] - x(i)|^2 and p the low L - kv bits of a state, which are all that its
// successors inherit, the recursion needs no array of states at all:
//
//     least(i)[p] = min over u of  e(u:p, i) + least(i-1)[(u:p) >> kv],     u: the 2^kv high parts
//
// `least` has 2^(L-kv) floats: 64 KiB for 2 bits, 16 KiB for 4. Those of the steps that are walked
// back over are kept (written past the caches), so that the way back asks 2^kv candidates of each
// step again and the search finds no back pointers.
// Per state and tile: V subtractions, V fused multiply-adds, one minimum. The table is laid out in
// the order in which it is read, and several tiles are searched together for each read of it.
//
// Tail-biting takes two passes: a free one over x rotated by half its length tells the bits across
// the seam, the second begins and ends with them. Plain C++17; the instruction set is the
// compiler's (-mavx512f, -mavx2 -mfma, or none).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One vector of neighbouring p. `spread<S>(from)`: each of the first numbers repeated 2^S times.
#if defined(__AVX512F__)
constexpr int kLanesLog2 = 4;
using Vector = __m512;
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector a) { _mm512_store_ps(to, a); }
inline void keep(float* to, Vector a) { _mm512_stream_ps(to, a); }
inline Vector fill(float a) { return _mm512_set1_ps(a); }
inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector square_plus(Vector a, Vector b) { return _mm512_fmadd_ps(a, a, b); }
inline Vector lesser(Vector a, Vector b) { return _mm512_min_ps(a, b); }
template <int S>
inline Vector spread(const float* from) {
    if constexpr (S >= 4) {
        return _mm512_set1_ps(*from);
    } else {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512 few = S == 3   ? _mm512_castpd_ps(_mm512_set1_pd(*(const double*)from))
                           : S == 2 ? _mm512_broadcast_f32x4(_mm_loadu_ps(from))
                                    : _mm512_castps256_ps512(_mm256_loadu_ps(from));
        return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, S), few);
    }
}
#elif defined(__AVX2__)
constexpr int kLanesLog2 = 3;
using Vector = __m256;
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector a) { _mm256_store_ps(to, a); }
inline void keep(float* to, Vector a) { _mm256_stream_ps(to, a); }
inline Vector fill(float a) { return _mm256_set1_ps(a); }
inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector square_plus(Vector a, Vector b) { return _mm256_fmadd_ps(a, a, b); }
inline Vector lesser(Vector a, Vector b) { return _mm256_min_ps(a, b); }
template <int S>
inline Vector spread(const float* from) {
    if constexpr (S >= 3) {
        return _mm256_broadcast_ss(from);
    } else if constexpr (S == 2) {
        const __m256 pair = _mm256_castpd_ps(_mm256_broadcast_sd((const double*)from));
        return _mm256_permutevar_ps(pair, _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
    } else {
        const __m256 four = _mm256_broadcast_ps((const __m128*)from);
        return _mm256_permutevar_ps(four, _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0));
    }
}
#else
constexpr int kLanesLog2 = 0;
using Vector = float;
inline Vector load(const float* from) { return *from; }
inline void store(float* to, Vector a) { *to = a; }
inline void keep(float* to, Vector a) { *to = a; }
inline Vector fill(float a) { return a; }
inline Vector subtract(Vector a, Vector b) { return a - b; }
inline Vector square_plus(Vector a, Vector b) { return a * a + b; }
inline Vector lesser(Vector a, Vector b) { return a < b ? a : b; }
template <int S>
inline Vector spread(const float* from) { return *from; }
#endif
constexpr int kLanes = 1 << kLanesLog2;

struct Code {
    int L, kv, num_steps;
    const float* table;           // [2^L, V]
    std::vector<float> in_order;  // the same as it is read: [p / lanes][u][V][lanes]

    int num_low() const { return 1 << (L - kv); }
    int num_high() const { return 1 << kv; }
};

// A vector holds neighbouring p: there must be as many, and whole runs of a predecessor.
bool fits_lanes(int L, int kv) { return L - kv >= kLanesLog2 && kv >= 1; }

template <int V>
void put_in_order(Code& code, int lanes) {
    code.in_order.resize(size_t(V) << code.L);
    float* to = code.in_order.data();
    for (int p = 0; p < code.num_low(); p += lanes)
        for (int u = 0; u < code.num_high(); ++u)
            for (int v = 0; v < V; ++v)
                for (int lane = 0; lane < lanes; ++lane)
                    *to++ = code.table[size_t((u << (code.L - code.kv)) | (p + lane)) * V + v];
}

template <int B>
struct Step {
    const float* x;          // [B][V]
    const float* before[B];  // `least` of each tile
    float* after[B];
    float* kept[B];  // a copy of `after`; null: none
};

template <int S, int V, int B>
void step(const Code& code, const Step<B>& now) {
    Vector wanted[B][V];
    for (int b = 0; b < B; ++b)
        for (int v = 0; v < V; ++v) wanted[b][v] = fill(now.x[b * V + v]);
    const float* values = code.in_order.data();
    const int num_high = code.num_high(), low_bits = code.L - code.kv;
    for (int p = 0; p < code.num_low(); p += kLanes) {
        Vector least[B];
        for (int b = 0; b < B; ++b) least[b] = fill(kInfinity);
        for (int u = 0; u < num_high; ++u, values += V * kLanes) {
            const int origin = ((u << low_bits) | p) >> code.kv;
            for (int b = 0; b < B; ++b) {
                Vector cost = spread<S>(now.before[b] + origin);
                for (int v = 0; v < V; ++v)
                    cost = square_plus(subtract(load(values + v * kLanes), wanted[b][v]), cost);
                least[b] = lesser(least[b], cost);
            }
        }
        for (int b = 0; b < B; ++b) store(now.after[b] + p, least[b]);
        if (now.kept[0])
            for (int b = 0; b < B; ++b) keep(now.kept[b] + p, least[b]);
    }
}

// For codes of which a vector does not fit: the same, one state at a time.
template <int V, int B>
void plain_step(const Code& code, const Step<B>& now) {
    for (int b = 0; b < B; ++b)
        for (int p = 0; p < code.num_low(); ++p) {
            float least = kInfinity;
            for (int u = 0; u < code.num_high(); ++u) {
                const int state = (u << (code.L - code.kv)) | p;
                float cost = now.before[b][state >> code.kv];
                for (int v = 0; v < V; ++v) {
                    const float off = code.table[size_t(state) * V + v] - now.x[b * V + v];
                    cost += off * off;
                }
                least = std::min(least, cost);
            }
            now.after[b][p] = least;
            if (now.kept[b]) now.kept[b][p] = least;
        }
}

template <int V, int B>
void any_step(const Code& code, const Step<B>& now) {
    if (!fits_lanes(code.L, code.kv)) return plain_step<V, B>(code, now);
    switch (std::min(code.kv, kLanesLog2)) {
        case 0:
        case 1: return step<1, V, B>(code, now);
        case 2: return step<2, V, B>(code, now);
        case 3: return step<3, V, B>(code, now);
        default: return step<4, V, B>(code, now);
    }
}

// The best state at step i whose low bits are p.
template <int V>
int best_state(const Code& code, const float* x, const float* before, int p) {
    int best = p;
    float least = kInfinity;
    for (int u = 0; u < code.num_high(); ++u) {
        const int state = (u << (code.L - code.kv)) | p;
        float cost = before[state >> code.kv];
        for (int v = 0; v < V; ++v) {
            const float off = code.table[size_t(state) * V + v] - x[v];
            cost = std::fma(off, off, cost);
        }
        if (cost < least) {
            least = cost;
            best = state;
        }
    }
    return best;
}

// Of one `least`: `spread` reads past its end, and vectors lie at multiples of their size.
size_t padded_low(const Code& code) { return (size_t(code.num_low()) + 31) / 16 * 16; }

// B tiles. `memory`: [B][num_steps + 2][padded_low], of which the first two are worked with and the
// others are `least` before each step.
template <int V, int B>
struct Search {
    const Code& code;
    float* memory;

    float* least(int b, int i) const {
        return memory + (size_t(b) * (code.num_steps + 2) + i) * padded_low(code);
    }
    float* kept(int b, int i) const { return least(b, i + 2); }

    // Over x rotated by `first` steps, from what the first `least` is. Keeps those before the steps
    // from `from` on. Returns which of the two worked with is the last.
    int run(const float* const* x, int first, int from) const {
        float wanted[B * V];
        Step<B> now{wanted, {}, {}, {}};
        for (int i = 0; i < code.num_steps; ++i) {
            const int at = (i + first) % code.num_steps;
            for (int b = 0; b < B; ++b) {
                for (int v = 0; v < V; ++v) wanted[b * V + v] = x[b][at * V + v];
                now.before[b] = least(b, i % 2);
                now.after[b] = least(b, (i + 1) % 2);
                now.kept[b] = i + 1 >= from && i + 1 < code.num_steps ? kept(b, i + 1) : nullptr;
            }
            any_step<V, B>(code, now);
        }
        return code.num_steps % 2;
    }

    // From p after the last step back to before step `until`; returns the p there.
    int back(int b, const float* x, int first, int until, int p, uint16_t* states) const {
        for (int i = code.num_steps - 1; i >= until; --i) {
            const int at = (i + first) % code.num_steps;
            const int state = best_state<V>(code, x + at * V, kept(b, i), p);
            if (states) states[at] = uint16_t(state);
            p = state >> code.kv;
        }
        return p;
    }

    void encode(const float* const* x, uint16_t* const* states) const {
        const int half = code.num_steps / 2, rest = code.num_steps - half;
        const int num_low = code.num_low();
        for (int b = 0; b < B; ++b) std::fill_n(least(b, 0), num_low, 0.0f);
        const int last = run(x, half, rest);
        int seam[B];
        for (int b = 0; b < B; ++b) {
            const float* end = least(b, last);
            const int p = int(std::min_element(end, end + num_low) - end);
            seam[b] = back(b, x[b], half, rest, p, nullptr);
        }
        for (int b = 0; b < B; ++b) {
            for (float* start : {least(b, 0), kept(b, 0)}) {
                std::fill_n(start, num_low, kInfinity);
                start[seam[b]] = 0.0f;
            }
        }
        run(x, 0, 0);
        for (int b = 0; b < B; ++b) back(b, x[b], 0, 0, seam[b], states[b]);
    }
};

template <int V, int B>
void encode_tiles(const Code& code, const float* x, int64_t first, int64_t end, float* memory,
                  uint16_t* states) {
    const float* tiles[B];
    uint16_t* results[B];
    std::vector<uint16_t> unwanted(code.num_steps);
    for (int b = 0; b < B; ++b) {  // of a last group that is not whole, the last tile again
        const int64_t tile = std::min(first + b, end - 1);
        tiles[b] = x + tile * code.num_steps * V;
        results[b] = first + b < end ? states + tile * code.num_steps : unwanted.data();
    }
    Search<V, B>{code, memory}.encode(tiles, results);
}

constexpr int kMostTogether = 4;

template <int V>
void encode_all(Code& code, const float* x, int64_t num_tiles, uint16_t* states, float* memory,
                int num_threads) {
    put_in_order<V>(code, fits_lanes(code.L, code.kv) ? kLanes : 1);
    int together = kMostTogether;  // but every thread has something to do
    while (together > 1 && num_tiles < int64_t(together) * num_threads) together /= 2;
    const size_t floats = size_t(kMostTogether) * (code.num_steps + 2) * padded_low(code);
    std::atomic<int64_t> next{0};
    const auto work = [&](int thread) {
        float* own = memory + floats * thread;
        for (int64_t at; (at = next.fetch_add(together)) < num_tiles;) {
            const int64_t end = std::min(at + together, num_tiles);
            if (together == 4) encode_tiles<V, 4>(code, x, at, end, own, states);
            else if (together == 2) encode_tiles<V, 2>(code, x, at, end, own, states);
            else encode_tiles<V, 1>(code, x, at, end, own, states);
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < num_threads; ++thread) others.emplace_back(work, thread);
    work(0);
    for (auto& other : others) other.join();
}

}  // namespace

extern "C" {

// Floats of working memory that `viterbi_encode` needs.
int64_t viterbi_memory_floats(int L, int kv, int num_steps, int num_threads) {
    const Code code{L, kv, num_steps, nullptr, {}};
    return int64_t(padded_low(code)) * (num_steps + 2) * kMostTogether * num_threads;
}

// x: [num_tiles, num_steps * V], finite. table: [2^L, V]. memory: at a multiple of 64 bytes.
// states: [num_tiles, num_steps], to fill.
// Returns 0, or 1 if the code is not one that this can search.
int viterbi_encode(const float* x, int64_t num_tiles, int num_steps, const float* table, int L,
                   int kv, int V, uint16_t* states, float* memory, int num_threads) {
    if (L < 1 || L > 16 || kv < 1 || kv > L || num_steps < 2 || num_threads < 1) return 1;
    Code code{L, kv, num_steps, table, {}};
    if (V == 1) encode_all<1>(code, x, num_tiles, states, memory, num_threads);
    else if (V == 2) encode_all<2>(code, x, num_tiles, states, memory, num_threads);
    else return 1;
    return 0;
}

}  // extern "C"
