#include "backend/nvml.h"

#include <dlfcn.h>

namespace ep {
namespace {

// Values of nvml.h, which is no dependency.
constexpr int kSuccess = 0, kP2pNvlink = 2, kP2pOk = 0;

template <class Function>
void find(void *library, const char *name, Function *function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

const Nvml &Nvml::of_machine() {
    static const Nvml nvml("libnvidia-ml.so.1");
    return nvml;
}

Nvml::Nvml(const char *library) {
    void *const loaded = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (loaded == nullptr) return;
    int (*init)() = nullptr;  // for as long as the process runs
    find(loaded, "nvmlInit_v2", &init);
    if (init == nullptr || init() != kSuccess) return;
    find(loaded, "nvmlDeviceGetHandleByPciBusId_v2", &by_pci_address_);
    find(loaded, "nvmlDeviceGetHandleByUUID", &by_uuid_);
    find(loaded, "nvmlDeviceGetUUID", &get_uuid_);
    find(loaded, "nvmlDeviceGetP2PStatus", &get_p2p_status_);
}

std::string Nvml::uuid(const std::string &pci_address) const {
    if (by_pci_address_ == nullptr || get_uuid_ == nullptr) return "";
    constexpr unsigned kUuidBytesMax = 96;
    char uuid[kUuidBytesMax] = "";
    Device *device = nullptr;
    const bool known = by_pci_address_(pci_address.c_str(), &device) == kSuccess &&
                       get_uuid_(device, uuid, sizeof uuid) == kSuccess;
    return known ? uuid : "";
}

bool Nvml::are_nvlinked(const DeviceUuid &one, const DeviceUuid &other) const {
    if (by_uuid_ == nullptr || get_p2p_status_ == nullptr) return false;
    Device *first = nullptr, *second = nullptr;
    int status = -1;
    return by_uuid_(nvidia_uuid_text(one).c_str(), &first) == kSuccess &&
           by_uuid_(nvidia_uuid_text(other).c_str(), &second) == kSuccess &&
           get_p2p_status_(first, second, kP2pNvlink, &status) == kSuccess && status == kP2pOk;
}

std::string nvidia_uuid_text(const DeviceUuid &uuid) {
    constexpr char kDigits[] = "0123456789abcdef";
    constexpr bool kEndsGroup[sizeof uuid.bytes] = {false, false, false, true,  false,
                                                    true,  false, true,  false, true};
    std::string text = "GPU-";
    for (size_t i = 0; i < sizeof uuid.bytes; ++i) {
        const auto byte = static_cast<unsigned char>(uuid.bytes[i]);
        text += kDigits[byte >> 4];
        text += kDigits[byte & 15];
        if (kEndsGroup[i]) text += '-';
    }
    return text;
}

}  // namespace ep
