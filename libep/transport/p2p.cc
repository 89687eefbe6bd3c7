#include "transport/p2p.h"

#include "base/status.h"

namespace ep {

mep_status_t PeerWindows::create(Device *device, size_t bytes, Sharing sharing) {
    return device->create_window(bytes, sharing, &own_);
}

mep_status_t PeerWindows::connect(Device *device, const std::vector<WindowHandle> &handles,
                                  int rank, const std::vector<bool> &near) {
    mappings_.resize(handles.size());
    for (size_t peer = 0; peer < handles.size(); ++peer) {
        if (static_cast<int>(peer) == rank) {
            mappings_[peer] = own_->mapping();
            continue;
        }
        if (!near[peer]) continue;
        if (handles[peer].bytes != handles[rank].bytes)
            return fail(MEP_MISMATCH, "rank %zu has a window of %llu bytes, this rank of %llu",
                        peer, static_cast<unsigned long long>(handles[peer].bytes),
                        static_cast<unsigned long long>(handles[rank].bytes));
        EP_TRY(device->open_window(handles[peer], &mappings_[peer]));
    }
    return MEP_OK;
}

std::vector<char *> PeerWindows::addresses() const {
    std::vector<char *> addresses;
    for (const auto &mapping : mappings_)
        addresses.push_back(mapping == nullptr ? nullptr : mapping->data());
    return addresses;
}

}  // namespace ep
