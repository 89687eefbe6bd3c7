// The kernels, compiled for NVIDIA GPUs.
#define EP_DEVICE_CUDA
#include "kernels/table.h"

namespace ep {

Kernels cuda_kernels() {
    return cuda::kernels(cuda::kThreads / cuda::kWarpSize);
}

}  // namespace ep
