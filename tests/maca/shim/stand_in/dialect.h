// A shim for tests: not the MetaX SDK; names from public sources.
//
// The words of the CUDA-like dialect that libep/device/maca.h uses, for clang's HIP front end
// without any HIP headers: gfx90a is a GPU with waves of 64 lanes, which advance together, as
// MetaX's do. What these words compile to is looked at, never run.
#pragma once

#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __launch_bounds__(threads, blocks) __attribute__((amdgpu_flat_work_group_size(1, threads)))

struct dim3 {
    unsigned x, y, z;
    __host__ __device__ constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1)
        : x(x_), y(y_), z(z_) {}
};

// What clang calls for <<<>>>.
typedef struct MCstream_st *mcStream_t;
extern "C" {
int __hipPushCallConfiguration(dim3 grid, dim3 block, size_t shared, mcStream_t stream);
int __hipPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, mcStream_t *stream);
int hipLaunchKernel(const void *function, dim3 grid, dim3 block, void **args, size_t shared,
                    mcStream_t stream);
}

// ---- Places -------------------------------------------------------------------------------------

#define EP_STAND_IN_WORD __device__ static inline __attribute__((always_inline))

template <unsigned (*kValue)()>
struct Coordinate {
    EP_STAND_IN_WORD unsigned value() { return kValue(); }
    __device__ operator unsigned() const { return value(); }
};
EP_STAND_IN_WORD unsigned thread_x() {
    return __builtin_amdgcn_workitem_id_x();
}
EP_STAND_IN_WORD unsigned block_x() {
    return __builtin_amdgcn_workgroup_id_x();
}
EP_STAND_IN_WORD unsigned block_size_x() {
    return __builtin_amdgcn_workgroup_size_x();
}
EP_STAND_IN_WORD unsigned grid_size_x() {
    return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x();
}
template <unsigned (*kValue)()>
struct Coordinates {
    Coordinate<kValue> x;
};
static constexpr Coordinates<thread_x> threadIdx{};
static constexpr Coordinates<block_x> blockIdx{};
static constexpr Coordinates<block_size_x> blockDim{};
static constexpr Coordinates<grid_size_x> gridDim{};

// ---- Order --------------------------------------------------------------------------------------

EP_STAND_IN_WORD void __threadfence_system() {
    __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "");
}
EP_STAND_IN_WORD void __syncthreads() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
EP_STAND_IN_WORD void __syncwarp(unsigned long long) {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}
EP_STAND_IN_WORD int atomicAdd(int *to, int value) {
    return __hip_atomic_fetch_add(to, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
EP_STAND_IN_WORD int atomicCAS_system(int *to, int expected, int value) {
    __hip_atomic_compare_exchange_strong(to, &expected, value, __ATOMIC_RELAXED, __ATOMIC_RELAXED,
                                         __HIP_MEMORY_SCOPE_SYSTEM);
    return expected;
}
EP_STAND_IN_WORD unsigned long long atomicAdd(unsigned long long *to, unsigned long long value) {
    return __hip_atomic_fetch_add(to, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

// ---- Lanes --------------------------------------------------------------------------------------

EP_STAND_IN_WORD int __shfl_sync(unsigned long long, int value, int lane, int width) {
    const int self = __builtin_amdgcn_mbcnt_hi(~0, __builtin_amdgcn_mbcnt_lo(~0, 0));
    return __builtin_amdgcn_ds_bpermute(((self & ~(width - 1)) | (lane & (width - 1))) * 4, value);
}
EP_STAND_IN_WORD unsigned long long __ballot_sync(unsigned long long, int value) {
    return __builtin_amdgcn_uicmpl(value, 0, 33);  // 33: where they differ
}
EP_STAND_IN_WORD int __popcll(unsigned long long bits) {
    return __builtin_popcountll(bits);
}
EP_STAND_IN_WORD long long clock64() {
    return __builtin_readcyclecounter();
}
