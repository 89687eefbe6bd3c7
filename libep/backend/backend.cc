#include "backend/backend.h"

#include <sys/random.h>
#include <unistd.h>

namespace ep {

const Backend *find_backend(int32_t id) {
    for (const Backend *backend : {&kCpuBackend, &kCudaBackend, &kMacaBackend})
        if (backend->id == id) return backend;
    return nullptr;
}

ProcessIdentity process_identity() {
    static const uint64_t nonce = [] {
        uint64_t random = 0;
        if (getrandom(&random, sizeof random, 0) != sizeof random)
            random = reinterpret_cast<uintptr_t>(&random);  // still differs by address layout
        return random;
    }();
    // The process number as well: a forked child has the same nonce.
    return {{nonce, static_cast<uint64_t>(getpid())}};
}

}  // namespace ep
