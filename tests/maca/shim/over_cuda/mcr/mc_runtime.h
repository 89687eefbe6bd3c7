// A shim for tests: not the MetaX SDK; names from public sources.
//
// The MACA runtime's names over CUDA's, and its waves of 64 lanes over pairs of warps, so that
// nvcc makes of libep/backend/maca.cc a backend that runs on an NVIDIA GPU, and gives results that
// can be compared. It shows nothing of MetaX's hardware, and says what it is: EP_MC_SHIM.
#pragma once

#if defined(__has_include_next)
#if __has_include_next(<mcr/mc_runtime.h>)
#error "The MetaX SDK is on the include path: build with it, not with this shim."
#endif
#endif

#define EP_MC_SHIM "shim over CUDA"

#include <cuda_runtime.h>

#include <cstddef>

// ---- Host ---------------------------------------------------------------------------------------

#define mcError_t cudaError_t
#define mcSuccess cudaSuccess
#define mcGetErrorName cudaGetErrorName
#define mcGetErrorString cudaGetErrorString
#define mcGetLastError cudaGetLastError

#define mcStream_t cudaStream_t
#define mcStreamNonBlocking cudaStreamNonBlocking
#define mcStreamCreateWithFlags cudaStreamCreateWithFlags
#define mcStreamDestroy cudaStreamDestroy
#define mcStreamSynchronize cudaStreamSynchronize

#define mcDeviceProp_t cudaDeviceProp
#define mcGetDeviceCount cudaGetDeviceCount
#define mcGetDevice cudaGetDevice
#define mcSetDevice cudaSetDevice
#define mcDeviceSynchronize cudaDeviceSynchronize
#define mcGetDeviceProperties cudaGetDeviceProperties
#define mcDeviceCanAccessPeer cudaDeviceCanAccessPeer
#define mcDeviceGetPCIBusId cudaDeviceGetPCIBusId
#define mcDeviceEnablePeerAccess cudaDeviceEnablePeerAccess

#define mcMalloc cudaMalloc
#define mcFree cudaFree
#define mcMallocHost cudaMallocHost
#define mcFreeHost cudaFreeHost
#define mcMemsetAsync cudaMemsetAsync
#define mcMemcpy cudaMemcpy
#define mcMemcpyAsync cudaMemcpyAsync
#define mcMemcpyHostToDevice cudaMemcpyHostToDevice
#define mcMemcpyDeviceToHost cudaMemcpyDeviceToHost

#define mcIpcMemHandle_t cudaIpcMemHandle_t
#define mcIpcMemLazyEnablePeerAccess cudaIpcMemLazyEnablePeerAccess
#define mcIpcGetMemHandle cudaIpcGetMemHandle
#define mcIpcOpenMemHandle cudaIpcOpenMemHandle
#define mcIpcCloseMemHandle cudaIpcCloseMemHandle

#define mcFuncAttributes cudaFuncAttributes
#define mcFuncGetAttributes cudaFuncGetAttributes

#define mcDeviceMallocFinegrained 1
inline cudaError_t mcExtMallocWithFlags(void **data, size_t bytes, unsigned) {
    return cudaMalloc(data, bytes);
}

// ---- Waves --------------------------------------------------------------------------------------

// A wave is two neighbouring warps, which exchange values through shared memory and meet at a
// barrier of their own. Unlike a wave's, its lanes need not advance together.
namespace mc_shim {

constexpr int kWaveSize = 64, kWavesMax = 1024 / kWaveSize;

__device__ inline int wave() {
    return threadIdx.x / kWaveSize;
}
__device__ inline void sync_wave() {
    constexpr int kFirstBarrier = 1;  // 0 is the block's; a block has 16, so at most 15 waves
    asm volatile("barrier.sync %0, %1;" ::"r"(kFirstBarrier + wave()), "n"(kWaveSize) : "memory");
}

__device__ inline int shuffle(unsigned long long, int value, int lane, int width) {
    __shared__ int values[kWavesMax][kWaveSize];
    const int self = threadIdx.x % kWaveSize;
    values[wave()][self] = value;
    sync_wave();
    value = values[wave()][(self & ~(width - 1)) | (lane & (width - 1))];
    sync_wave();  // before the next values take the place of these
    return value;
}

__device__ inline unsigned long long ballot(unsigned long long, int value) {
    __shared__ unsigned votes[kWavesMax][2];
    const unsigned half = __ballot_sync(0xffffffffu, value);
    if (threadIdx.x % 32 == 0) votes[wave()][threadIdx.x % kWaveSize / 32] = half;
    sync_wave();
    const unsigned long long all =
        static_cast<unsigned long long>(votes[wave()][1]) << 32 | votes[wave()][0];
    sync_wave();
    return all;
}

__device__ inline void sync(unsigned long long) {
    sync_wave();
}

}  // namespace mc_shim

#define __shfl_sync mc_shim::shuffle
#define __ballot_sync mc_shim::ballot
#define __syncwarp mc_shim::sync
