#include "transport/rdma.h"

#include <dlfcn.h>
#include <memory>

namespace ep {
namespace {

// The parts of libibverbs that find devices. Declared here: its header is no dependency, and these
// have not changed since its first version.
struct ibv_device;
using GetDeviceList = ibv_device **(*)(int *count);
using FreeDeviceList = void (*)(ibv_device **list);
using GetDeviceName = const char *(*)(ibv_device *device);

std::string join(const std::vector<std::string> &names) {
    std::string text;
    for (const std::string &name : names)
        text += (text.empty() ? "" : ", ") + name;
    return text;
}

// GPUs can drive the queues of mlx5 devices only.
bool gpu_can_drive(const std::string &device) {
    return device.rfind("mlx5_", 0) == 0;
}

std::string reason_for(const std::vector<std::string> &devices) {
    if (devices.empty()) return "no RDMA device found";
    std::vector<std::string> suitable;
    for (const std::string &device : devices)
        if (gpu_can_drive(device)) suitable.push_back(device);
    if (suitable.empty()) return "no mlx5 device found, only " + join(devices);
    return "this version has no transport for it (found " + join(suitable) + ")";
}

}  // namespace

RdmaProbe probe_rdma(const char *library) {
    // Stays loaded: a driver that it loads may have started threads.
    void *const loaded = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (loaded == nullptr) return {{}, std::string("libibverbs cannot be loaded: ") + dlerror()};
    const auto get = reinterpret_cast<GetDeviceList>(dlsym(loaded, "ibv_get_device_list"));
    const auto release = reinterpret_cast<FreeDeviceList>(dlsym(loaded, "ibv_free_device_list"));
    const auto name = reinterpret_cast<GetDeviceName>(dlsym(loaded, "ibv_get_device_name"));
    if (get == nullptr || release == nullptr || name == nullptr)
        return {{}, std::string(library) + " is not libibverbs"};
    RdmaProbe probe;
    int count = 0;
    ibv_device **list = get(&count);
    for (int i = 0; list != nullptr && i < count; ++i)
        if (const char *found = name(list[i])) probe.devices.emplace_back(found);
    if (list != nullptr) release(list);
    probe.reason = reason_for(probe.devices);
    return probe;
}

const RdmaProbe &machine_rdma() {
    static const RdmaProbe probe = probe_rdma("libibverbs.so.1");
    return probe;
}

}  // namespace ep
