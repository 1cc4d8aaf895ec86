// Barriers in shared memory and bulk copies into it: rings that a producing warp fills. sm_90.
#pragma once
#include "common.cuh"

namespace qtip {

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the barrier's phase wait for so many bytes of copies too.
__device__ __forceinline__ void expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
    uint32_t is_done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
                     "selp.u32 %0, 1, 0, p;}"
                     : "=r"(is_done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!is_done);
}

// Both addresses and the size are multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int bytes,
                                          uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// What ordinary stores wrote is visible to bulk copies and wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Gives a warp group fewer or more registers than the kernel began with (a multiple of 8).
template <int Registers>
__device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Some warps of a CTA meet; ids from 1 on.
__device__ __forceinline__ void meet(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Stages of shared memory, each with a barrier "full" and one "empty". Item i uses stage i % Stages.
template <int Stages, int Bytes>
struct Ring {
    static constexpr int kBytes = Stages * Bytes;
    static constexpr int kBarrierBytes = 16 * Stages;
    uint32_t memory, barriers;

    __device__ __forceinline__ void init(int readers) const {
        for (int stage = 0; stage < Stages; ++stage) {
            init_barrier(barriers + 16 * stage, 1);
            init_barrier(barriers + 16 * stage + 8, readers);
        }
    }
    __device__ __forceinline__ uint32_t full(int i) const { return barriers + 16 * (i % Stages); }
    __device__ __forceinline__ uint32_t at(int i) const { return memory + i % Stages * Bytes; }
    __device__ __forceinline__ void wait_full(int i) const { wait(full(i), i / Stages & 1); }
    __device__ __forceinline__ void release(int i) const { arrive(full(i) + 8); }
    __device__ __forceinline__ void wait_empty(int i) const {
        if (i >= Stages) wait(full(i) + 8, (i / Stages - 1) & 1);
    }
};

}  // namespace qtip
