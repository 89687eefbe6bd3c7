// A shim for tests: not the MetaX SDK; names from public sources. See runtime.h.
#include "runtime.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mcr/mc_runtime.h>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace mc_shim {

Runtime &runtime() {
    static Runtime instance;
    return instance;
}
std::string uuid_of(int gpu) {
    char uuid[64];
    std::snprintf(uuid, sizeof uuid, "GPU-%08x-0000-0000-0000-000000000000", gpu);
    return uuid;
}
std::atomic<int> &allocation_count() {
    static std::atomic<int> count{0};
    return count;
}
std::atomic<bool> &frees_wait() {
    static std::atomic<bool> wait{false};
    return wait;
}

namespace {

std::map<const void *, std::string> &kernels() {
    static std::map<const void *, std::string> instance;
    return instance;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    mcStream_t stream;
};
Configuration configuration;

// The GPUs of the host that the process sees, in the order of the list, which ends at the first
// that is none, as CUDA's does. Nobody has written which variable wins if both are set.
std::vector<int> visible() {
    const int count = runtime().device_count;
    const char *list = std::getenv("MACA_VISIBLE_DEVICES");
    if (list == nullptr) list = std::getenv("CUDA_VISIBLE_DEVICES");
    std::vector<int> gpus;
    for (int gpu = 0; list == nullptr && gpu < count; ++gpu)
        gpus.push_back(gpu);
    std::istringstream names(list == nullptr ? "" : list);
    for (std::string name; std::getline(names, name, ',');) {
        int gpu = 0;
        while (gpu < count && name != std::to_string(gpu) && name != uuid_of(gpu))
            ++gpu;
        if (gpu == count) break;
        gpus.push_back(gpu);
    }
    return gpus;
}

bool is(const std::string &kernel, const char *name) {
    return kernel.find(name) != std::string::npos;
}

// Takes as long as a clock with ticks of kTickNs would say.
void measure_clock(int looks, uint64_t *ticks) {
    using Clock = std::chrono::steady_clock;
    auto end = Clock::now() + std::chrono::nanoseconds(int64_t{looks} * kTickNs);
    if (std::vector<int> &turns = runtime().turns_ms; !turns.empty()) {
        end += std::chrono::milliseconds(turns.front());
        turns.erase(turns.begin());
    }
    while (Clock::now() < end) {
    }
    *ticks = runtime().clock_goes ? looks : 0;
}

}  // namespace
}  // namespace mc_shim

using mc_shim::configuration;
using mc_shim::kernels;
using mc_shim::runtime;

extern "C" {

const char *mcGetErrorName(mcError_t error) {
    return error == mcErrorNoDevice ? "mcErrorNoDevice" : "another error";
}
const char *mcGetErrorString(mcError_t error) {
    return error == mcErrorNoDevice ? "the shim has no devices" : "an error of the shim";
}
mcError_t mcGetLastError() {
    return mcSuccess;
}

// ---- Devices ------------------------------------------------------------------------------------

mcError_t mcGetDeviceCount(int *count) {
    *count = static_cast<int>(mc_shim::visible().size());
    return *count > 0 ? mcSuccess : mcErrorNoDevice;
}
mcError_t mcGetDevice(int *device) {
    *device = 0;
    return mcSuccess;
}
mcError_t mcSetDevice(int) {
    return mcSuccess;
}
mcError_t mcDeviceSynchronize() {
    return mcSuccess;
}
mcError_t mcGetDeviceProperties(mcDeviceProp_t *properties, int device) {
    *properties = {};
    properties->multiProcessorCount = mc_shim::kBlocks;
    properties->pciBusID = mc_shim::visible().at(device);
    return mcSuccess;
}
mcError_t mcDeviceCanAccessPeer(int *can, int, int) {
    *can = 1;
    return mcSuccess;
}
mcError_t mcDeviceGetPCIBusId(char *address, int bytes, int device) {
    std::snprintf(address, bytes, "0000:%02X:00.0", mc_shim::visible().at(device));
    return mcSuccess;
}
mcError_t mcDeviceEnablePeerAccess(int, unsigned) {
    return mcSuccess;
}
mcError_t mcStreamCreateWithFlags(mcStream_t *stream, unsigned) {
    static char one;
    *stream = reinterpret_cast<mcStream_t>(&one);
    return mcSuccess;
}
mcError_t mcStreamDestroy(mcStream_t) {
    return mcSuccess;
}
mcError_t mcStreamSynchronize(mcStream_t) {
    return mcSuccess;
}

// ---- Memory -------------------------------------------------------------------------------------

mcError_t mcMalloc(void **data, size_t bytes) {
    constexpr size_t kAlignment = 256;
    *data = aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (*data == nullptr) return mcErrorMemoryAllocation;
    ++mc_shim::allocation_count();
    return mcSuccess;
}
mcError_t mcExtMallocWithFlags(void **data, size_t bytes, unsigned flags) {
    runtime().flags.push_back(flags);
    return mcMalloc(data, bytes);
}
mcError_t mcFree(void *data) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(mc_shim::kFreeSeconds);
    while (mc_shim::frees_wait() && std::chrono::steady_clock::now() < end)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    free(data);
    --mc_shim::allocation_count();
    return mcSuccess;
}
mcError_t mcMallocHost(void **data, size_t bytes, unsigned) {
    return mcMalloc(data, bytes);
}
mcError_t mcFreeHost(void *data) {
    return mcFree(data);
}
mcError_t mcMemsetAsync(void *data, int value, size_t bytes, mcStream_t) {
    std::memset(data, value, bytes);
    return mcSuccess;
}
mcError_t mcMemcpy(void *to, const void *from, size_t bytes, mcMemcpyKind) {
    std::memcpy(to, from, bytes);
    return mcSuccess;
}
mcError_t mcMemcpyAsync(void *to, const void *from, size_t bytes, mcMemcpyKind kind, mcStream_t) {
    return mcMemcpy(to, from, bytes, kind);
}
mcError_t mcIpcGetMemHandle(mcIpcMemHandle_t *handle, void *) {
    *handle = {};
    return mcSuccess;
}
mcError_t mcIpcOpenMemHandle(void **memory, mcIpcMemHandle_t, unsigned) {
    static char others[64];
    *memory = others;
    return runtime().opens ? mcSuccess : mcErrorNoDevice;
}
mcError_t mcIpcCloseMemHandle(void *) {
    ++runtime().closed;
    return mcSuccess;
}

// ---- Kernels: what clang's host code calls ------------------------------------------------------

mcError_t mcFuncGetAttributes(mcFuncAttributes *, const void *function) {
    return kernels().count(function) != 0 ? mcSuccess : mcErrorInvalidDeviceFunction;
}

char __hip_fatbin_;
void *__hip_gpubin_handle_;
void **__hipRegisterFatBinary(const void *) {
    static void *module;
    return &module;
}
void __hipUnregisterFatBinary(void **) {}
void __hipRegisterFunction(void **, const void *function, char *, const char *name, unsigned,
                           void *, void *, void *, void *, int *) {
    kernels()[function] = name;
}
void __hipRegisterVar(void **, void *, char *, const char *, int, size_t, int, int) {}

int __hipPushCallConfiguration(dim3 grid, dim3 block, size_t shared, mcStream_t stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
int __hipPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, mcStream_t *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *stream = configuration.stream;
    return 0;
}
int hipLaunchKernel(const void *function, dim3 grid, dim3 block, void **args, size_t, mcStream_t) {
    const std::string &kernel = kernels().at(function);
    runtime().launches.push_back({kernel, grid.x, block.x});
    if (mc_shim::is(kernel, "measure_clock"))
        mc_shim::measure_clock(*static_cast<int *>(args[0]), *static_cast<uint64_t **>(args[1]));
    if (mc_shim::is(kernel, "set_tick")) {
        runtime().tick = *static_cast<uint64_t *>(args[0]);
        ++runtime().set_ticks;
    }
    return mcSuccess;
}

}  // extern "C"
