// The vocabulary on NVIDIA GPUs.
#pragma once

#include "device/queue.h"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define EP_DEVICE_NAMESPACE cuda
#define EP_DEVICE __device__ __forceinline__
#define EP_KERNEL __global__ void
#define EP_UNROLL _Pragma("unroll")

namespace ep::cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 512;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Equals {
    int total;  // lanes with this key
    int lower;  // of them, those before this lane
};

struct Thread {
    EP_DEVICE static int rank() { return 0; }
    EP_DEVICE static int size() { return 1; }
    EP_DEVICE static void sync() {}
    EP_DEVICE static int index_in_block() { return threadIdx.x; }
    EP_DEVICE static int count_in_block() { return blockDim.x; }
    template <class T>
    EP_DEVICE static T broadcast(T value) {
        return value;
    }
};

struct Warp {
    EP_DEVICE static int rank() { return threadIdx.x % kWarpSize; }
    EP_DEVICE static int size() { return kWarpSize; }
    EP_DEVICE static void sync() { __syncwarp(); }
    EP_DEVICE static int index_in_block() { return threadIdx.x / kWarpSize; }
    EP_DEVICE static int count_in_block() { return blockDim.x / kWarpSize; }
    template <class T>
    EP_DEVICE static T broadcast(T value) {
        return __shfl_sync(kAllLanes, value, 0);
    }
    template <int kLanes>
    EP_DEVICE static float max_over(float value) {
        for (int step = kLanes / 2; step > 0; step /= 2)
            value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
        return value;
    }
    EP_DEVICE static Equals equals(int key) {
        const unsigned same = __match_any_sync(kAllLanes, key);
        return {__popc(same), __popc(same & ((1u << rank()) - 1))};
    }
};

struct Block {
    EP_DEVICE static int rank() { return threadIdx.x; }
    EP_DEVICE static int size() { return blockDim.x; }
    EP_DEVICE static void sync() { __syncthreads(); }
};

template <class Group>
EP_DEVICE int grid_index() {
    return blockIdx.x * Group::count_in_block() + Group::index_in_block();
}
template <class Group>
EP_DEVICE int grid_count() {
    return gridDim.x * Group::count_in_block();
}

EP_DEVICE int32_t load(const int32_t *from) {
    int32_t value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
EP_DEVICE void store(int32_t *to, int32_t value) {
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
EP_DEVICE int32_t fetch_add(int32_t *to, int32_t value) {
    return atomicAdd(to, value);
}
EP_DEVICE uint64_t fetch_add(uint64_t *to, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long *>(to), value);
}

template <class Group>
EP_DEVICE void publish(uint64_t *word, uint64_t value) {
    Group::sync();
    if (Group::rank() == 0)
        asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
template <class Group>
EP_DEVICE uint64_t observe(const uint64_t *word) {
    uint64_t value = 0;
    if (Group::rank() == 0)
        asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    value = Group::broadcast(value);
    Group::sync();
    return value;
}

EP_DEVICE uint64_t now_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
EP_DEVICE void pause(uint32_t attempt) {
    if (attempt > 16) __nanosleep(64);
}

#include "device/lanes.h"

template <class Args>
void launch_one(void (*kernel)(Args), const Args &args, const Queue &queue) {
    kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(args);
}
template <class Args>
void launch_all(void (*kernel)(Args), const Args &args, const Queue &queue) {
    kernel<<<queue.block_count, kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(args);
}
inline int launch_error() {
    return cudaGetLastError();
}

}  // namespace ep::cuda
