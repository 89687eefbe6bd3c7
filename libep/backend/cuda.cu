// The CUDA backend. The runtime is linked statically and loads the driver when it is first asked,
// so the library works, without this backend, where there is none.
#define EP_DEVICE_CUDA
#include "kernels/table.h"

#include <cuda_runtime.h>

#define EP_GPU(name) cuda##name
#define EP_GPU_NAME "cuda"

namespace ep {
namespace {

Kernels gpu_kernels() {
    return cuda::kernels();
}

int load_gpu_kernels(cudaStream_t stream) {
    const int error = cuda::load_kernels();
    if (error != cudaSuccess) return error;
    cuda::use_stack<<<1, 1, 0, stream>>>(1, nullptr);
    return cudaStreamSynchronize(stream);
}

}  // namespace
}  // namespace ep

#include "backend/gpu.inl"

namespace ep {

const Backend kCudaBackend{MEP_BACKEND_CUDA, EP_GPU_NAME, device_count, unavailable_reason,
                           create_device};

}  // namespace ep
