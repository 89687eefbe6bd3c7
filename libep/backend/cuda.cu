// The CUDA backend. The runtime is linked statically and loads the driver when it is first asked,
// so the library works, without this backend, where there is none.
#define EP_DEVICE_CUDA
#include "backend/nvml.h"
#include "kernels/table.h"

#include <cuda_runtime.h>

#define EP_GPU(name) cuda##name
#define EP_GPU_PROPERTIES cudaDeviceProp
#define EP_GPU_NAME "cuda"
#include "backend/gpu.inl"

namespace ep {
namespace {

static_assert(kOutOfMemory == cudaErrorMemoryAllocation);
static_assert(kPeerAccessAlreadyEnabled == cudaErrorPeerAccessAlreadyEnabled);

Kernels gpu_kernels() {
    return cuda::kernels();
}

mep_status_t load_gpu_kernels(cudaStream_t stream) {
    EP_TRY(gpu_status(static_cast<cudaError_t>(cuda::load_kernels()), "loading the kernels"));
    cuda::use_stack<<<1, 1, 0, stream>>>(1, nullptr);
    return gpu_status(cudaStreamSynchronize(stream), "loading the kernels");
}

mep_status_t allocate_window(void **data, size_t bytes) {
    return gpu_status(cudaMalloc(data, bytes), "allocating a window");
}

DeviceUuid uuid_of(const cudaDeviceProp &properties) {
    DeviceUuid uuid;
    static_assert(sizeof properties.uuid == sizeof uuid, "a UUID has 16 bytes");
    std::memcpy(&uuid, &properties.uuid, sizeof uuid);
    return uuid;
}

// NVLink and its like keep a store of a line together, and they are the links with native atomics;
// PCIe may split it.
bool lines_arrive_whole(int device, int peer) {
    int atomics = 0;
    return cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, device, peer) ==
               cudaSuccess &&
           atomics != 0;
}

bool reaches_unseen(const DeviceUuid &device, const DeviceUuid &peer) {
    return Nvml::of_machine().are_nvlinked(device, peer);
}

const char *no_quant_reason() {
    return "";
}

bool stream_is_capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
           status != cudaStreamCaptureStatusNone;
}

bool closes_in_turn() {
    return false;
}

}  // namespace

const Backend kCudaBackend{MEP_BACKEND_CUDA, EP_GPU_NAME, device_count, unavailable_reason,
                           create_device};

}  // namespace ep
