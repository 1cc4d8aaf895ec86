// Tail-biting Viterbi search for bitshift trellises of 16-bit states (QTIP, arXiv 2406.11235), on a
// GPU. ../cpu/viterbi.cpp has the recursion; this one computes it with the same costs.
//
// A step shifts kv = K V bits in. With p a state's low 16 - kv bits, all that its successors inherit,
//
//     least'[p] = min over u of  |table[u:p] - x|^2 + least[(u:p) >> kv],    u: the 2^kv high parts
//
// and p = q:r (r: its low kv bits) reads least[u:q] alone, which all 2^kv r share. So a thread owns
// 128 states for good: one q or several, all u, some r. Their values stay in its registers (V = 1;
// for V = 2 they are read from the caches), `least` lies in shared memory twice, old and new, and a
// step has one barrier. A block of threads searches kTiles tiles beside each other.
//
// Which u was best has to be kept for the way back, 16 MB of costs for each tile being too much: u is
// written over the lowest kv bits of a cost, so that the minimum brings it along. That is at most
// 2^-18 of a cost (kv = 6): of walks nearer to each other than that, either is taken.
// Instructions for a state, V = 1: conversion, subtraction, fused multiply-add, insertion, minimum.

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace {

constexpr int kStateBits = 16;
constexpr int kThreads = 512;
constexpr int kStatesEach = (1 << kStateBits) / kThreads;
constexpr float kNever = 1e30f;  // finite: infinity with u written over it is no number

template <int kBits, int kValues>
struct Shape {
    static constexpr int kHigh = 1 << kBits;                // u, and r
    static constexpr int kLow = 1 << (kStateBits - kBits);  // p
    static constexpr int kStride = 1 << (kStateBits - 2 * kBits);  // q
    static constexpr int kQ = kStatesEach >= kHigh * kHigh ? kStatesEach / (kHigh * kHigh) : 1;
    static constexpr int kR = kStatesEach / kHigh / kQ;  // of each q
    static constexpr int kSplits = kHigh / kR;           // threads that share a q
    // Tiles together: as many as shared memory holds, two at most.
    static constexpr int kTiles = kLow > 8192 ? 1 : 2;
    // The best u of kR neighbouring p.
    using Choice = std::conditional_t<(kR * kBits > 8), uint32_t, uint8_t>;
    static constexpr int kChoices = kLow / kR;
    static constexpr int kSharedBytes = 2 * kTiles * kLow * int(sizeof(float));
    // Steps whose choices fit over the costs, for the way back.
    static constexpr int kAtOnce = kSharedBytes / (kTiles * kChoices * int(sizeof(Choice)));
    static_assert(kR >= 2 && kR % 2 == 0 && kR * kBits <= 32 && kQ * kThreads == kStride * kSplits);
};

struct Task {
    const float* x;       // [tiles, steps, values]
    const __half* table;  // [65536, values]
    int32_t* states;      // [tiles, steps], to fill
    char* scratch;        // choices of each block of threads
    int64_t tiles;
    int steps;
};

__device__ float with_low_bits(float cost, uint32_t mask, uint32_t u) {
    return __uint_as_float((__float_as_uint(cost) & mask) | u);
}

template <int kBits, int kValues>
struct Search : Shape<kBits, kValues> {
    using S = Shape<kBits, kValues>;
    using typename S::Choice;
    using S::kHigh, S::kLow, S::kStride, S::kQ, S::kR, S::kSplits, S::kTiles, S::kChoices, S::kAtOnce;
    static constexpr bool kInRegisters = kValues == 1;
    static constexpr int kUnrolled = kInRegisters ? kHigh : 4;  // u; all of them, to index registers

    const Task& task;
    float* costs;    // [2][kTiles][kLow]
    float* wanted;   // [kTiles][steps * values]
    int* seams;      // [kTiles]
    Choice* choices;  // [steps][kTiles][kChoices]
    __half2 own[kInRegisters ? kStatesEach / 2 : 1];

    __device__ float* cost(int which, int tile) const { return costs + (which * kTiles + tile) * kLow; }

    __device__ int group(int j) const { return (j * kThreads + int(threadIdx.x)) / kSplits; }
    __device__ int first_r() const { return int(threadIdx.x) % kSplits * kR; }

    __device__ void read_values() {
        if constexpr (kInRegisters) {
#pragma unroll
            for (int j = 0; j < kQ; ++j)
#pragma unroll
                for (int u = 0; u < kHigh; ++u)
#pragma unroll
                    for (int r = 0; r < kR; r += 2) {
                        const int p = group(j) << kBits | (first_r() + r);
                        own[((j * kHigh + u) * kR + r) / 2] = *reinterpret_cast<const __half2*>(
                            task.table + (u << (kStateBits - kBits) | p));
                    }
        }
    }

    // One step from costs[from] to the other, at x[at]. Keeps choices if `kept` is not null.
    __device__ void step(int from, int at, Choice* kept) {
        constexpr uint32_t kMask = ~uint32_t(kHigh - 1);
        // Or the compiler converts, or reads, them once for all steps, and has no registers left.
        const __half2* pairs = reinterpret_cast<const __half2*>(task.table);
        asm volatile("" : "+l"(pairs));
        if constexpr (kInRegisters)
#pragma unroll
            for (auto& pair : own) asm volatile("" : "+r"(reinterpret_cast<uint32_t&>(pair)));
        float x[kTiles][kValues];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int v = 0; v < kValues; ++v)
                x[tile][v] = wanted[(tile * task.steps + at) * kValues + v];
#pragma unroll
        for (int j = 0; j < kQ; ++j) {
            const int q = group(j), p = q << kBits | first_r();
            float best[kTiles][kR];
#pragma unroll kUnrolled
            for (int u = 0; u < kHigh; ++u) {
                float origin[kTiles];
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) origin[tile] = cost(from, tile)[u * kStride + q];
                const __half2* far = pairs + (u << (kStateBits - kBits) | p);
#pragma unroll
                for (int r = 0; r < kR; r += kInRegisters ? 2 : 1) {
                    const float2 pair = __half22float2(
                        kInRegisters ? own[((j * kHigh + u) * kR + r) / 2] : far[r]);
#pragma unroll
                    for (int tile = 0; tile < kTiles; ++tile) {
                        if constexpr (kInRegisters) {
                            const float a = pair.x - x[tile][0], b = pair.y - x[tile][0];
                            take(best[tile][r], fmaf(a, a, origin[tile]), u, kMask);
                            take(best[tile][r + 1], fmaf(b, b, origin[tile]), u, kMask);
                        } else {
                            const float a = pair.x - x[tile][0], b = pair.y - x[tile][1];
                            take(best[tile][r], fmaf(b, b, fmaf(a, a, origin[tile])), u, kMask);
                        }
                    }
                }
            }
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) put(best[tile], cost(from ^ 1, tile) + p, p, tile, kept);
            asm volatile("" ::: "memory");  // one q after the other: registers hold no more
        }
        __syncthreads();
    }

    static __device__ void take(float& best, float found, int u, uint32_t mask) {
        found = with_low_bits(found, mask, u);
        best = u == 0 ? found : fminf(best, found);
    }

    __device__ void put(const float (&best)[kR], float* to, int p, int tile, Choice* kept) {
        if constexpr (kR % 4 == 0) {
#pragma unroll
            for (int r = 0; r < kR; r += 4)
                *reinterpret_cast<float4*>(to + r) =
                    make_float4(best[r], best[r + 1], best[r + 2], best[r + 3]);
        } else {
#pragma unroll
            for (int r = 0; r < kR; r += 2)
                *reinterpret_cast<float2*>(to + r) = make_float2(best[r], best[r + 1]);
        }
        if (kept == nullptr) return;
        uint32_t packed = 0;
#pragma unroll
        for (int r = 0; r < kR; ++r) packed |= (__float_as_uint(best[r]) & (kHigh - 1)) << (r * kBits);
        kept[tile * kChoices + p / kR] = Choice(packed);
    }

    // All steps, over x rotated by `first`, from costs[0]; choices of the steps from `from` on.
    // Returns where the last costs are.
    __device__ int run(int first, int from) {
        for (int i = 0; i < task.steps; ++i) {
            const int at = i + first < task.steps ? i + first : i + first - task.steps;
            step(i & 1, at, i >= from ? choices + int64_t(i) * kTiles * kChoices : nullptr);
        }
        return task.steps & 1;
    }

    __device__ void fill(float value) {
        for (int i = threadIdx.x; i < kTiles * kLow; i += kThreads) costs[i] = value;
        __syncthreads();
    }

    // The p of least cost of each tile, into `seams`. A warp for each tile.
    __device__ void find_ends(int which) {
        const int tile = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (tile < kTiles) {
            float least = 2 * kNever;
            int best = 0;
            for (int p = lane; p < kLow; p += 32)
                if (cost(which, tile)[p] < least) least = cost(which, tile)[best = p];
            for (int far = 16; far; far /= 2) {
                const float other = __shfl_xor_sync(~0u, least, far);
                const int at = __shfl_xor_sync(~0u, best, far);
                if (other < least || (other == least && at < best)) least = other, best = at;
            }
            if (lane == 0) seams[tile] = best;
        }
        __syncthreads();
    }

    // From seams after the last step back to before step `until`, whose p are the seams then. The
    // choices come to shared memory, many steps at once. Writes states if `first_tile` is one.
    __device__ void walk_back(int until, int64_t first_tile) {
        Choice* near = reinterpret_cast<Choice*>(costs);
        for (int end = task.steps; end > until;) {
            const int begin = max(until, end - kAtOnce);
            const int4* source = reinterpret_cast<const int4*>(choices + int64_t(begin) * kTiles * kChoices);
            const int count = (end - begin) * kTiles * kChoices * int(sizeof(Choice)) / 16;
            for (int i = threadIdx.x; i < count; i += kThreads)
                reinterpret_cast<int4*>(near)[i] = source[i];
            __syncthreads();
            const int tile = threadIdx.x / 32;
            if (threadIdx.x % 32 == 0 && tile < kTiles) {
                const bool is_wanted = first_tile >= 0 && first_tile + tile < task.tiles;
                int32_t* to = task.states + (first_tile + tile) * task.steps;
                int p = seams[tile];
                for (int i = end - 1; i >= begin; --i) {
                    const uint32_t packed = near[((i - begin) * kTiles + tile) * kChoices + p / kR];
                    const int u = packed >> (p % kR * kBits) & (kHigh - 1);
                    const int state = u << (kStateBits - kBits) | p;
                    if (is_wanted) to[i] = state;
                    p = state >> kBits;
                }
                seams[tile] = p;
            }
            __syncthreads();
            end = begin;
        }
    }

    __device__ void encode(int64_t first_tile) {
        const int size = task.steps * kValues;
        for (int i = threadIdx.x; i < kTiles * size; i += kThreads) {  // of a last one alone, twice
            const int64_t tile = min(first_tile + i / size, task.tiles - 1);
            wanted[i] = task.x[tile * size + i % size];
        }
        fill(0.0f);
        const int half = task.steps / 2, rest = task.steps - half;
        find_ends(run(half, rest));
        walk_back(rest, -1);
        const int seam = threadIdx.x < kTiles ? seams[threadIdx.x] : 0;
        fill(kNever);
        if (threadIdx.x < kTiles) cost(0, threadIdx.x)[seam] = 0.0f;
        __syncthreads();
        run(0, 0);
        walk_back(0, first_tile);
    }
};

template <int kBits, int kValues>
__global__ void __launch_bounds__(kThreads, 1) search(const Task task) {
    using S = Search<kBits, kValues>;
    extern __shared__ float4 shared[];
    float* costs = reinterpret_cast<float*>(shared);
    float* wanted = costs + S::kSharedBytes / sizeof(float);
    __shared__ int seams[S::kTiles];
    const int64_t choices = int64_t(task.steps) * S::kTiles * S::kChoices;
    S found{{}, task, costs, wanted, seams,
            reinterpret_cast<typename S::Choice*>(task.scratch) + blockIdx.x * choices, {}};
    found.read_values();
    for (int64_t tile = int64_t(blockIdx.x) * S::kTiles; tile < task.tiles;
         tile += int64_t(gridDim.x) * S::kTiles)
        found.encode(tile);
}

template <int kBits, int kValues>
int64_t scratch_bytes(int steps) {
    using S = Shape<kBits, kValues>;
    return int64_t(steps) * S::kTiles * S::kChoices * sizeof(typename S::Choice);
}

template <int kBits, int kValues>
int shared_bytes(int steps) {
    using S = Shape<kBits, kValues>;
    return S::kSharedBytes + S::kTiles * steps * kValues * int(sizeof(float));
}

template <int kBits, int kValues>
cudaError_t launch(const Task& task, int blocks, cudaStream_t stream) {
    const int bytes = shared_bytes<kBits, kValues>(task.steps);
    const cudaError_t failed = cudaFuncSetAttribute(
        search<kBits, kValues>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (failed != cudaSuccess) return failed;
    search<kBits, kValues><<<blocks, kThreads, bytes, stream>>>(task);
    return cudaGetLastError();
}

}  // namespace

// What is compiled: bits of a step, values of a state.
#define FOR_EACH_CODE(F) F(2, 1) F(3, 1) F(4, 1) F(5, 1) F(6, 1) F(4, 2) F(6, 2)

extern "C" {

// Bytes of scratch memory that each block of threads needs; 0 for a code that this does not search.
int64_t viterbi_scratch_bytes(int bits, int values, int steps) {
#define BYTES(B, V) if (bits == B && values == V) return scratch_bytes<B, V>(steps);
    FOR_EACH_CODE(BYTES)
#undef BYTES
    return 0;
}

// Bytes of shared memory that a block of threads needs beside 1 KiB of the system's and of ours.
int viterbi_shared_bytes(int bits, int values, int steps) {
#define SHARED(B, V) if (bits == B && values == V) return shared_bytes<B, V>(steps);
    FOR_EACH_CODE(SHARED)
#undef SHARED
    return 0;
}

// x: float32 [tiles, steps * values], finite. table: float16 [65536, values]. states: int32 [tiles,
// steps], to fill. scratch: for `blocks` blocks. All on the GPU. Returns a CUDA error or 0.
int viterbi_search(const float* x, int64_t tiles, int steps, const void* table, int bits, int values,
                   int32_t* states, void* scratch, int blocks, void* stream) {
    const Task task{x, static_cast<const __half*>(table), states, static_cast<char*>(scratch), tiles,
                    steps};
#define LAUNCH(B, V) \
    if (bits == B && values == V) return launch<B, V>(task, blocks, static_cast<cudaStream_t>(stream));
    FOR_EACH_CODE(LAUNCH)
#undef LAUNCH
    return cudaErrorInvalidValue;
}

const char* viterbi_error(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // extern "C"
