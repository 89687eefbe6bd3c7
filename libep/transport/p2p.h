// Peer to peer: each rank's window, mapped by every other. Local steps only; the core gathers the
// handles in between.
#pragma once

#include "backend/backend.h"

#include <memory>
#include <vector>

namespace ep {

class PeerWindows {
  public:
    // This rank's window, of `bytes` bytes.
    mep_status_t create(Device *device, size_t bytes, Sharing sharing);

    WindowHandle handle() const { return own_->handle(); }

    // Maps the windows of the ranks that are `near` [rank_count], from their handles [rank_count].
    mep_status_t connect(Device *device, const std::vector<WindowHandle> &handles, int rank,
                         const std::vector<bool> &near);

    // To be called when all ranks have connected.
    void seal() { own_->seal(); }

    // Each rank's window, as mapped here; nullptr: it is not near.
    std::vector<char *> addresses() const;

  private:
    std::unique_ptr<Window> own_;
    std::vector<std::shared_ptr<Mapping>> mappings_;
};

}  // namespace ep
