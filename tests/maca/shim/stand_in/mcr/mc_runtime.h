// A shim for tests: not the MetaX SDK; names from public sources.
//
// What libep says to the MACA runtime, as declarations, so that it can be compiled where there is
// no SDK: its kernels and its host half by clang as for another GPU with waves of 64 lanes
// (dialect.h), and linked with runtime.cc. Names, parameters and their sources:
// ../../../maca_api.txt. Sizes of structs and values of flags are made up, but for the numbers of
// errors.
#pragma once

#if defined(__has_include_next)
#if __has_include_next(<mcr/mc_runtime.h>)
#error "The MetaX SDK is on the include path: build with it, not with this shim."
#endif
#endif

#define EP_MC_SHIM "shim without a runtime"

#include <cstddef>
#include <cstdint>

#if defined(__HIP__)
#include "../dialect.h"
#else  // for runtime.cc
struct dim3 {
    unsigned x, y, z;
};
#endif

extern "C" {

typedef enum mcError_t {
    mcSuccess = 0,
    mcErrorMemoryAllocation = 2,
    mcErrorInvalidDeviceFunction = 98,
    mcErrorNoDevice = 100,
    mcErrorPeerAccessAlreadyEnabled = 704,
} mcError_t;
const char *mcGetErrorName(mcError_t error);
const char *mcGetErrorString(mcError_t error);
mcError_t mcGetLastError(void);

typedef struct MCstream_st *mcStream_t;
enum { mcStreamNonBlocking = 1 };
mcError_t mcStreamCreateWithFlags(mcStream_t *stream, unsigned flags);
mcError_t mcStreamDestroy(mcStream_t stream);
mcError_t mcStreamSynchronize(mcStream_t stream);

typedef struct mcDeviceProp_t {
    char name[256];
    size_t totalGlobalMem;
    int multiProcessorCount, warpSize, clockRate;
    int pciBusID, pciDeviceID, pciDomainID;
} mcDeviceProp_t;
mcError_t mcGetDeviceCount(int *count);
mcError_t mcGetDevice(int *device);
mcError_t mcSetDevice(int device);
mcError_t mcDeviceSynchronize(void);
mcError_t mcGetDeviceProperties(mcDeviceProp_t *properties, int device);
mcError_t mcDeviceCanAccessPeer(int *can, int device, int peer);
mcError_t mcDeviceGetPCIBusId(char *address, int bytes, int device);
mcError_t mcDeviceEnablePeerAccess(int peer, unsigned flags);

enum { mcDeviceMallocFinegrained = 1 };
mcError_t mcMalloc(void **data, size_t bytes);
mcError_t mcExtMallocWithFlags(void **data, size_t bytes, unsigned flags);
mcError_t mcFree(void *data);
mcError_t mcMallocHost(void **data, size_t bytes, unsigned flags = 0);
mcError_t mcFreeHost(void *data);
mcError_t mcMemsetAsync(void *data, int value, size_t bytes, mcStream_t stream);
typedef enum mcMemcpyKind { mcMemcpyHostToDevice = 1, mcMemcpyDeviceToHost = 2 } mcMemcpyKind;
mcError_t mcMemcpy(void *to, const void *from, size_t bytes, mcMemcpyKind kind);
mcError_t mcMemcpyAsync(void *to, const void *from, size_t bytes, mcMemcpyKind kind,
                        mcStream_t stream);

typedef struct mcIpcMemHandle_t {
    char reserved[64];
} mcIpcMemHandle_t;
enum { mcIpcMemLazyEnablePeerAccess = 0 };
mcError_t mcIpcGetMemHandle(mcIpcMemHandle_t *handle, void *data);
mcError_t mcIpcOpenMemHandle(void **data, mcIpcMemHandle_t handle, unsigned flags);
mcError_t mcIpcCloseMemHandle(void *data);

typedef struct mcFuncAttributes {
    size_t sharedSizeBytes, localSizeBytes;
} mcFuncAttributes;
mcError_t mcFuncGetAttributes(mcFuncAttributes *attributes, const void *function);

}  // extern "C"
