// Tries each way between ranks before it is used: every rank stores a word in every peer's window,
// and looks which words came to its own. Local steps; the core gathers what is between them.
#pragma once

#include "base/deadline.h"
#include "transport/facts.h"

#include <memory>
#include <vector>

namespace ep {

class PeerTrial {
  public:
    // Offers a window; a handle of 0 bytes if that fails.
    PeerTrial(Device *device, int rank, int rank_count);

    WindowHandle handle() const { return handle_; }

    // Stores a word in each window of handles [rank_count] that `wanted` [rank_count] names. An
    // error only if the device fails; a window that cannot be mapped is a result.
    mep_status_t knock(const std::vector<WindowHandle> &handles, const std::vector<bool> &wanted);

    // To be called when all ranks have knocked: nobody maps this rank's window any more.
    void seal() {
        if (window_ != nullptr) window_->seal();
    }

    // What became of this rank's own steps: [to], kArrived where only the peer can tell.
    const std::vector<Trial> &sent() const { return sent_; }

    // Waits until a word of each `expected` [rank_count] has come, or the deadline; whose did.
    mep_status_t listen(const std::vector<bool> &expected, const Deadline &deadline,
                        std::vector<uint8_t> *heard);

    // Lets go of the peers' windows.
    void unmap() { mappings_.clear(); }

  private:
    Device *device_;
    int rank_, rank_count_;
    std::unique_ptr<Window> window_;
    WindowHandle handle_{};
    std::vector<std::shared_ptr<Mapping>> mappings_;
    DeviceMemory addresses_{nullptr, [](void *) {}};
    std::vector<Trial> sent_;
};

}  // namespace ep
