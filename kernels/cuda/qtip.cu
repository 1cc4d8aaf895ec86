// The C interface of one library: K bits, one kind of code, one lane order (QTIP_BITS, QTIP_CODE,
// QTIP_ORDER). Every function only launches: no allocation, no synchronisation, so a CUDA graph can
// capture it. They return a cudaError_t. `qtip_prepare` must have run once on the device before.
#include "few.cuh"
#include "many.cuh"
#include "reconstruct.cuh"

namespace qtip {
namespace {

// Whether a kernel may start while the one before it ends (programmatic dependent launch).
int overlaps = 1;

template <typename Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, int shared, cudaStream_t stream,
           const Args &args) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = overlaps;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, args);
}

// A kernel for a block of tokens and how it is launched. A unit has 128 `blocks` outputs.
struct Variant {
    void (*kernel)(const GemmArgs);
    int tokens, blocks, threads, shared, layout, ctas_of_sm;
};

constexpr bool kHasTerms = kCode == kTwoTerms;
constexpr bool kHasTable = kCode == kTable;
// Within 227 KiB of shared memory, of which HYB's table takes 128: that leaves room for one CTA of 16
// warps on an SM; the others run two of 8.
constexpr int kStages = kHasTable ? (kBits <= 3 ? 3 : 2) : (kBits <= 4 ? 4 : 3);
constexpr int kWarps = kHasTable && kBits <= 4 ? 16 : 8;
constexpr int kPerSm = kHasTable ? 1 : 2;

template <int NT, int R, int Warps, int Stages, bool Terms, int PerSm>
Variant few() {
    using F = Few<NT, R, Warps, Stages, Terms>;
    static_assert(F::kSharedBytes * PerSm <= kSharedLimit);
    return {few_kernel<NT, R, Warps, Stages, Terms, PerSm>, F::kTokens, 1, Warps * 32,
            F::kSharedBytes, F::kLayout, PerSm};
}

// With half the outputs in a CTA where the memory of all does not fit.
template <int N, int Pairs>
Variant many() {
    constexpr int kFits = Many<N, Pairs>::kIsPossible ? Pairs : 1;
    using M = Many<N, kFits>;
    static_assert(M::kSharedBytes <= kSharedLimit);
    return {many_kernel<N, kFits>, N, kFits, M::kThreads, M::kSharedBytes, M::kLayout, 1};
}

// HYB's table and the weights of more than 4 bits leave no room for x of more tokens.
constexpr bool kIsFull = kHasTable && kBits > 4;

// `variant_for` of cuda.py knows this order.
const Variant kVariants[] = {
    few<1, 2, kWarps, kStages, kHasTerms, kPerSm>(),
    few<2, 2, kWarps, kStages, kHasTerms, kPerSm>(),
    few<4, 2, kWarps, kHasTable ? 2 : 3, false, kPerSm>(),
    few<8, 4, kIsFull ? 4 : 8, kHasTable ? 2 : 3, false, 1>(),
    many<64, 2>(),
    many<128, 2>(),
    many<kIsFull ? 128 : 192, kIsFull ? 2 : 1>(),
    many<kIsFull ? 128 : 256, kIsFull ? 2 : 1>(),
};
constexpr int kNumVariants = sizeof(kVariants) / sizeof(kVariants[0]);

// Of the current device.
int sms() {
    int device = 0, found = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
    return found;
}

int units(const Variant &v, int inputs, int outputs) {
    const int blocks = outputs / kBlock;
    return (blocks + v.blocks - 1) / v.blocks * (inputs / kBlock);
}

int units_of_cta(const Variant &v, int inputs, int outputs) {
    const int most = sms() * v.ctas_of_sm;
    return (units(v, inputs, outputs) + most - 1) / most;
}

int ctas(const Variant &v, int inputs, int outputs) {
    const int of_cta = units_of_cta(v, inputs, outputs);
    return (units(v, inputs, outputs) + of_cta - 1) / of_cta;
}

}  // namespace
}  // namespace qtip

using namespace qtip;

extern "C" {

struct QtipLinear {
    const void *x;  // [tokens, inputs], rows x_stride apart
    int64_t x_stride;
    const void *suh, *weights, *svh, *bias, *table;
    void *y;         // [tokens, outputs], rows y_stride apart
    int64_t y_stride;
    void *fragments; // scratch for the transformed x: qtip_fragment_bytes
    void *parts;     // scratch: qtip_part_bytes
    void *counters;  // uint32 [blocks of tokens x outputs / 128], zero
    int tokens, inputs, outputs, dtype;
    uint32_t multiplier, addend;
    float x_scale;
};

int qtip_prepare() {
    for (const Variant &v : kVariants) {
        cudaError_t error = cudaFuncSetAttribute(
            v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared);
        if (error != cudaSuccess) return error;
    }
    cudaError_t error = cudaFuncSetAttribute(
        dense_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDenseSharedBytes);
    if (error != cudaSuccess) return error;
    cudaFuncAttributes attributes;  // loads the other kernels now, not inside a capture
    error = cudaFuncGetAttributes(&attributes, input_kernel);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, output_kernel);
    return sms() > 0 ? error : cudaErrorNoDevice;
}

const char *qtip_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

void qtip_overlap(int is_on) { overlaps = is_on; }

// Bits, code and order that this library was built for.
void qtip_built_for(int *bits, int *code, int *order) {
    *bits = kBits, *code = kCode, *order = kOrder;
}

int qtip_variants() { return kNumVariants; }
int qtip_variant_tokens(int variant) { return kVariants[variant].tokens; }

int64_t qtip_fragment_bytes(int variant, int tokens, int inputs) {
    const Variant &v = kVariants[variant];
    return int64_t(tokens + v.tokens - 1) / v.tokens * v.tokens * inputs
           * (v.layout == kTerms ? 4 : 2);
}

int64_t qtip_part_bytes(int variant, int tokens, int inputs, int outputs) {
    const Variant &v = kVariants[variant];
    return int64_t(tokens + v.tokens - 1) / v.tokens * ctas(v, inputs, outputs) * 2 * v.blocks
           * v.tokens * kBlock * 4;
}

// x * suh, Hadamard, float16, as `layout` (see hadamard.cuh) with blocks of 8 token_tiles tokens.
int qtip_input(const void *x, int64_t stride, const void *suh, void *to, int tokens, int inputs,
               int dtype, int layout, int token_tiles, float scale, cudaStream_t stream) {
    InputArgs args{x,      stride, static_cast<const __half *>(suh), static_cast<uint32_t *>(to),
                   tokens, inputs, dtype, layout, token_tiles, scale};
    const int64_t tasks = int64_t(tokens) * (inputs / kBlock);
    const int warps = tasks < 1024 ? 2 : 8;
    return launch(input_kernel, dim3((tasks + warps - 1) / warps), warps * 32, 0, stream, args);
}

// y = x W'.
int qtip_linear(int variant, const QtipLinear *l, cudaStream_t stream) {
    const Variant &v = kVariants[variant];
    const int error = qtip_input(l->x, l->x_stride, l->suh, l->fragments, l->tokens, l->inputs,
                                 l->dtype, v.layout, v.tokens / 8, l->x_scale, stream);
    if (error) return error;
    GemmArgs args{};
    args.x = static_cast<const uint4 *>(l->fragments);
    args.weights = static_cast<const uint8_t *>(l->weights);
    args.parts = static_cast<float *>(l->parts);
    args.counters = static_cast<uint32_t *>(l->counters);
    args.svh = static_cast<const __half *>(l->svh);
    args.bias = l->bias;
    args.y = l->y;
    args.y_stride = l->y_stride;
    args.tokens = l->tokens;
    args.groups = l->inputs / kBlock;
    args.blocks = l->outputs / kBlock;
    args.units_of_cta = units_of_cta(v, l->inputs, l->outputs);
    args.dtype = l->dtype;
    args.x_scale = l->x_scale;
    args.code = {l->multiplier, l->addend, 0x3b603b60u, static_cast<const uint32_t *>(l->table)};
    return launch(v.kernel,
                  dim3(ctas(v, l->inputs, l->outputs), (l->tokens + v.tokens - 1) / v.tokens),
                  v.threads, v.shared, stream, args);
}

// Outputs [first, first + count), multiples of 16, as a dense matrix [count, inputs].
int qtip_dense(const void *weights, void *to, int inputs, int first, int count, int dtype,
               uint32_t multiplier, uint32_t addend, const void *table, cudaStream_t stream) {
    DenseArgs args{static_cast<const uint8_t *>(weights), to, inputs / kBlock, first / 16,
                   count / 16, dtype, {multiplier, addend, 0x3b603b60u, static_cast<const uint32_t *>(table)}};
    const int per_sm = kHasTable ? 1 : 4;
    const int tasks = args.count * args.groups;
    const int ctas = min(sms() * per_sm, (tasks + kDenseWarps - 1) / kDenseWarps);
    return launch(dense_kernel, dim3(ctas), kDenseWarps * 32, kDenseSharedBytes, stream, args);
}

// Hadamard, svh, bias of a product z [tokens, count] of outputs [first, first + count).
int qtip_output(const void *z, int64_t stride, int from, const void *svh, const void *bias, void *y,
                int64_t y_stride, int tokens, int first, int count, int dtype, float x_scale,
                cudaStream_t stream) {
    OutputArgs args{z,        stride, static_cast<const __half *>(svh), bias, y,
                    y_stride, tokens, count, from, dtype, first, kRootBlock / x_scale};
    const int64_t tasks = int64_t(tokens) * (count / kBlock);
    const int64_t ctas = (tasks + 7) / 8;
    return launch(output_kernel, dim3(ctas < sms() * 8 ? ctas : sms() * 8), 256, 0, stream, args);
}

}  // extern "C"
