// NVIDIA's management library, loaded where it is: it also knows the GPUs of a host that a
// process's CUDA does not see (CUDA_VISIBLE_DEVICES).
#pragma once

#include "backend/backend.h"

#include <string>

namespace ep {

class Nvml {
  public:
    // This machine's. Without the library it knows nothing.
    static const Nvml &of_machine();
    explicit Nvml(const char *library);

    // Of the GPU at a PCI address, "GPU-..."; "" if it is not known.
    std::string uuid(const std::string &pci_address) const;

    // Does NVLink join the two, as far as is known?
    bool are_nvlinked(const DeviceUuid &one, const DeviceUuid &other) const;

  private:
    struct Device;
    using GetBy = int (*)(const char *name, Device **device);
    using GetUuid = int (*)(Device *device, char *uuid, unsigned bytes);
    using GetStatus = int (*)(Device *one, Device *other, int index, int *status);

    GetBy by_pci_address_ = nullptr, by_uuid_ = nullptr;
    GetUuid get_uuid_ = nullptr;
    GetStatus get_p2p_status_ = nullptr;
};

// As NVIDIA's tools write it: "GPU-", and hexadecimal digits in groups of 8, 4, 4, 4 and 12.
std::string nvidia_uuid_text(const DeviceUuid &uuid);

}  // namespace ep
