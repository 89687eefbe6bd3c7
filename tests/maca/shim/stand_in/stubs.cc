// A shim for tests: not the MetaX SDK; names from public sources.
//
// A MACA runtime on a machine without devices, to link libep/backend/maca.cc with: it is asked only
// how many there are. The rest of it must not be called.
#include <cstdio>
#include <cstdlib>
#include <mcr/mc_runtime.h>

namespace {

[[noreturn]] mcError_t refuse(const char *function) {
    std::fprintf(stderr, "%s was called, though there is no device\n", function);
    std::abort();
}

}  // namespace

extern "C" {

const char *mcGetErrorName(mcError_t) {
    return "mcErrorNoDevice";
}
const char *mcGetErrorString(mcError_t) {
    return "the shim has no devices";
}
mcError_t mcGetLastError() {
    return mcSuccess;
}
mcError_t mcGetDeviceCount(int *) {
    return mcErrorNoDevice;
}

#define EP_STUB(name, ...)        \
    mcError_t name(__VA_ARGS__) { \
        return refuse(#name);     \
    }

EP_STUB(mcStreamCreateWithFlags, mcStream_t *, unsigned)
EP_STUB(mcStreamDestroy, mcStream_t)
EP_STUB(mcStreamSynchronize, mcStream_t)
EP_STUB(mcGetDevice, int *)
EP_STUB(mcSetDevice, int)
EP_STUB(mcDeviceSynchronize, void)
EP_STUB(mcGetDeviceProperties, mcDeviceProp_t *, int)
EP_STUB(mcDeviceCanAccessPeer, int *, int, int)
EP_STUB(mcDeviceGetPCIBusId, char *, int, int)
EP_STUB(mcDeviceEnablePeerAccess, int, unsigned)
EP_STUB(mcMalloc, void **, size_t)
EP_STUB(mcExtMallocWithFlags, void **, size_t, unsigned)
EP_STUB(mcFree, void *)
EP_STUB(mcMemsetAsync, void *, int, size_t, mcStream_t)
EP_STUB(mcMemcpy, void *, const void *, size_t, mcMemcpyKind)
EP_STUB(mcMemcpyAsync, void *, const void *, size_t, mcMemcpyKind, mcStream_t)
EP_STUB(mcIpcGetMemHandle, mcIpcMemHandle_t *, void *)
EP_STUB(mcIpcOpenMemHandle, void **, mcIpcMemHandle_t, unsigned)
EP_STUB(mcIpcCloseMemHandle, void *)
EP_STUB(mcFuncGetAttributes, mcFuncAttributes *, const void *)

// What clang's host code calls to tell of its kernels, and to launch them.
char __hip_fatbin_;
void *__hip_gpubin_handle_;
void **__hipRegisterFatBinary(const void *) {
    return nullptr;
}
void __hipUnregisterFatBinary(void **) {}
void __hipRegisterFunction(void **, const void *, char *, const char *, unsigned, void *, void *,
                           void *, void *, int *) {}
void __hipRegisterVar(void **, void *, char *, const char *, int, size_t, int, int) {}
EP_STUB(__hipPushCallConfiguration)
EP_STUB(__hipPopCallConfiguration)
EP_STUB(hipLaunchKernel)

}  // extern "C"
