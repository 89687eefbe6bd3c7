// The MACA backend, compiled by MetaX's mxcc. One translation unit holds all of its device code, so
// that no linking of device code is needed. Names of the runtime are only those that sources of
// others who run on this hardware use too: tests/maca/maca_api.txt.
#define EP_DEVICE_MACA
#include "kernels/table.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <set>

#define EP_GPU(name) mc##name
#define EP_GPU_PROPERTIES mcDeviceProp_t
#if defined(EP_MC_SHIM)  // a stand-in for tests never passes for the runtime
#define EP_GPU_NAME "maca (" EP_MC_SHIM ")"
#else
#define EP_GPU_NAME "maca"
#endif
#include "backend/gpu.inl"

namespace ep {
namespace {

Kernels gpu_kernels() {
    return maca::kernels();
}

// ---- The clock ----------------------------------------------------------------------------------

struct Stretch {
    uint64_t ticks, ns;
};

// How long the device takes for so many looks at its clock, by that clock and by the host's.
mep_status_t time_looks(mcStream_t stream, int looks, uint64_t *device_ticks, Stretch *stretch) {
    using Clock = std::chrono::steady_clock;
    const auto began = Clock::now();
    maca::measure_clock<<<1, 1, 0, stream>>>(looks, device_ticks);
    EP_TRY_GPU(StreamSynchronize(stream));
    stretch->ns = std::chrono::nanoseconds(Clock::now() - began).count();
    EP_TRY_GPU(MemcpyAsync(&stretch->ticks, device_ticks, sizeof stretch->ticks,
                           mcMemcpyDeviceToHost, stream));
    EP_TRY_GPU(StreamSynchronize(stream));
    if (stretch->ticks != 0) return MEP_OK;
    return fail(MEP_DEVICE_ERROR, "the device's clock does not go on, so waits cannot end");
}

// How long a tick of the device's clock takes. The host's time has the launch in it too and, if
// others use the device, their turns: so the longer of two stretches that agree, and of all the
// shortest tick.
mep_status_t measure_tick(mcStream_t stream, uint64_t *device_ticks, double *ns_of_tick) {
    constexpr int kLooksMin = 1 << 16, kLooksMax = 1 << 28, kGrowth = 4;
    constexpr uint64_t kLongNs = 20'000'000;
    constexpr double kAgreement = 1.1;
    double before = 0;
    for (int looks = kLooksMin;; looks *= kGrowth) {
        Stretch stretch;
        EP_TRY(time_looks(stream, looks, device_ticks, &stretch));
        const double now = static_cast<double>(stretch.ns) / static_cast<double>(stretch.ticks);
        *ns_of_tick = before == 0 ? now : std::min(*ns_of_tick, now);
        const bool agrees = now <= before * kAgreement && before <= now * kAgreement;
        if ((agrees && stretch.ns >= kLongNs) || looks == kLooksMax) return MEP_OK;
        before = now;
    }
}

mep_status_t set_clock(mcStream_t stream, uint64_t *device_ticks) {
    double ns_of_tick = 0;
    EP_TRY(measure_tick(stream, device_ticks, &ns_of_tick));
    const auto scaled = static_cast<uint64_t>(ns_of_tick * (uint64_t{1} << maca::kTickBits));
    maca::set_tick<<<1, 1, 0, stream>>>(scaled);
    return gpu_status(mcGetLastError(), "setting the clock");
}

// Once for a device: to a wait that has begun, another length of the tick would be a leap in time.
mep_status_t set_clock_once(mcStream_t stream) {
    static std::mutex mutex;
    static std::set<int> set_devices;
    int device = -1;
    EP_TRY_GPU(GetDevice(&device));
    const std::lock_guard<std::mutex> lock(mutex);
    if (set_devices.count(device) != 0) return MEP_OK;
    void *ticks = nullptr;
    EP_TRY_GPU(Malloc(&ticks, sizeof(uint64_t)));
    const DeviceMemory memory(ticks, [](void *freed) { mcFree(freed); });
    EP_TRY(set_clock(stream, static_cast<uint64_t *>(ticks)));
    EP_TRY_GPU(StreamSynchronize(stream));
    set_devices.insert(device);
    return MEP_OK;
}

mep_status_t load_gpu_kernels(mcStream_t stream) {
    EP_TRY(gpu_status(static_cast<mcError_t>(maca::load_kernels()), "loading the kernels"));
    return set_clock_once(stream);
}

// ---- Other differences --------------------------------------------------------------------------

// Fine-grained: of other memory a cache may keep what peers have written over.
mep_status_t allocate_window(void **data, size_t bytes) {
    return gpu_status(mcExtMallocWithFlags(data, bytes, mcDeviceMallocFinegrained),
                      "allocating a window");
}

// There is none, but a place on the bus, which a process sees whatever devices it is given.
DeviceUuid uuid_of(const mcDeviceProp_t &properties) {
    const int32_t place[] = {properties.pciDomainID, properties.pciBusID, properties.pciDeviceID};
    DeviceUuid uuid{{'m', 'a', 'c', 'a'}};
    constexpr size_t kPrefix = 4;
    static_assert(kPrefix + sizeof place == sizeof uuid, "a UUID has 16 bytes");
    std::memcpy(uuid.bytes + kPrefix, place, sizeof place);
    return uuid;
}

bool lines_arrive_whole(int, int) {
    return false;
}

bool reaches_unseen(const DeviceUuid &, const DeviceUuid &) {
    return false;
}

// Not known how to ask.
bool stream_is_capturing(mcStream_t) {
    return false;
}

// Several processes that close at once have been seen to wait for each other for ever.
bool closes_in_turn() {
    return true;
}

const char *no_quant_reason() {
#if defined(EP_MACA_FP8)
    return "";
#else
    return "this build of the MACA backend casts nothing to FP8; CMake's MEP_MACA_FP8=ON makes one "
           "that does, by arithmetic";
#endif
}

}  // namespace

const Backend kMacaBackend{MEP_BACKEND_MACA, EP_GPU_NAME, device_count, unavailable_reason,
                           create_device};

}  // namespace ep
