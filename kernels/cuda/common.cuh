// Wrappers of single instructions, and the Hadamard of a warp. sm_80 or newer.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qtip {

constexpr int kBlock = 128;      // Hadamard block; also the outputs of a CTA and inputs of a group
constexpr float kRootBlock = 0.08838834764831845f;  // 1 / sqrt(128)

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <int Bytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void *from) {
    if constexpr (Bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int Pending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Programmatic dependent launch: what stands before `wait` overlaps the kernel before this one.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// D += A B, A 16 x 16 float16 in rows, B 16 x 8, D float32.
__device__ __forceinline__ void multiply(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sylvester's matrix of 128 times the warp's 128 numbers; lane l has 4 l to 4 l + 3.
__device__ __forceinline__ void hadamard(float (&v)[4]) {
    const int lane = threadIdx.x & 31;
    const float a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    v[0] = a + c, v[1] = b + d, v[2] = a - c, v[3] = b - d;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float sign = lane & step ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            v[i] = fmaf(sign, v[i], __shfl_xor_sync(0xffffffffu, v[i], step));
    }
}

enum Dtype { kHalf = 0, kBfloat16 = 1, kFloat = 2 };

// Four neighbours, from and to an array of `dtype`; 8-byte (float: 16-byte) aligned.
__device__ __forceinline__ void load4(float (&v)[4], const void *array, int64_t at, int dtype) {
    if (dtype == kFloat) {
        const float4 f = *reinterpret_cast<const float4 *>(static_cast<const float *>(array) + at);
        v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
        return;
    }
    const uint2 bits = *reinterpret_cast<const uint2 *>(static_cast<const uint16_t *>(array) + at);
    float2 low, high;
    if (dtype == kHalf) {
        low = __half22float2(reinterpret_cast<const __half2 &>(bits.x));
        high = __half22float2(reinterpret_cast<const __half2 &>(bits.y));
    } else {
        low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 &>(bits.x));
        high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 &>(bits.y));
    }
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}

__device__ __forceinline__ uint32_t half_pair(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t &>(pair);
}

__device__ __forceinline__ void store4(void *array, int64_t at, const float (&v)[4], int dtype) {
    if (dtype == kFloat) {
        *reinterpret_cast<float4 *>(static_cast<float *>(array) + at) =
            make_float4(v[0], v[1], v[2], v[3]);
        return;
    }
    uint2 bits;
    if (dtype == kHalf) {
        const __half2 low = __floats2half2_rn(v[0], v[1]), high = __floats2half2_rn(v[2], v[3]);
        bits.x = reinterpret_cast<const uint32_t &>(low);
        bits.y = reinterpret_cast<const uint32_t &>(high);
    } else {
        const __nv_bfloat162 low = __floats2bfloat162_rn(v[0], v[1]);
        const __nv_bfloat162 high = __floats2bfloat162_rn(v[2], v[3]);
        bits.x = reinterpret_cast<const uint32_t &>(low);
        bits.y = reinterpret_cast<const uint32_t &>(high);
    }
    *reinterpret_cast<uint2 *>(static_cast<uint16_t *>(array) + at) = bits;
}

// y = (H v) * scale * svh + bias for one token's block of 128 outputs, by a warp.
__device__ __forceinline__ void finish(float (&v)[4], void *y, int64_t at, int out, int dtype,
                                       const __half *svh, const void *bias, float scale) {
    hadamard(v);
    float by[4], plus[4] = {0, 0, 0, 0};
    load4(by, svh, out, kHalf);
    if (bias) load4(plus, bias, out, dtype);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = fmaf(v[i] * scale, by[i], plus[i]);
    store4(y, at, v, dtype);
}

}  // namespace qtip
