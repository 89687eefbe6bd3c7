// The CUDA backend of a build without it.
#include "backend/backend.h"
#include "base/status.h"

namespace ep {
namespace {

int device_count() {
    return 0;
}

const char *unavailable_reason() {
    return "this build of the library has no CUDA backend";
}

mep_status_t create_device(int, std::shared_ptr<Device> *) {
    return fail(MEP_UNSUPPORTED, "backend cuda is not available: %s", unavailable_reason());
}

}  // namespace

const Backend kCudaBackend{MEP_BACKEND_CUDA, "cuda", device_count, unavailable_reason,
                           create_device};

}  // namespace ep
