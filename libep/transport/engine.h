// Who carries bytes between ranks that do not reach each other's memory: one exchange among all
// ranks of a group at a time, in the same order on all of them.
#pragma once

#include "mooncake_ep.h"

#include "base/deadline.h"

#include <cstddef>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace ep {

// Memory that is not filled with zeros first, as all of it is written.
template <class T>
struct Unfilled : std::allocator<T> {
    template <class Other>
    struct rebind {
        using other = Unfilled<Other>;
    };
    template <class Other>
    void construct(Other *at) noexcept {
        ::new (static_cast<void *>(at)) Other;
    }
    template <class Other, class... Args>
    void construct(Other *at, Args &&...args) {
        ::new (static_cast<void *>(at)) Other(std::forward<Args>(args)...);
    }
};
using Parcel = std::vector<char, Unfilled<char>>;

class Engine {
  public:
    virtual ~Engine() = default;

    // Sends `send` [rank] to each peer, none of them empty, and receives as much from each as it
    // sends, into `receive` [rank]. `with` [rank], this rank's own ignored: with whom. A peer that
    // does not send all of its own by the deadline, or more than `bytes_max`, or whose connection
    // is lost, is taken out of `with`, its parcel is left empty, and it is not heard any more. An
    // error only if this rank can exchange nothing at all.
    virtual mep_status_t exchange(const std::vector<Parcel> &send, size_t bytes_max,
                                  const Deadline &deadline, std::vector<bool> *with,
                                  std::vector<Parcel> *receive) = 0;
};

// A collective gather of `bytes` bytes of each rank, in their order, and zeros of ranks that are
// not there; how the ranks of an engine meet.
using AllGather = std::function<mep_status_t(const void *send, void *receive, size_t bytes)>;

// A connection for each pair of ranks that are there. Collective. `address`: host name or IPv4
// address of this machine by which the others reach it. Who connects has to know a secret that went
// through `all_gather`.
mep_status_t engine_by_tcp(int rank, int rank_count, const char *address,
                           const AllGather &all_gather, const Deadline &deadline,
                           std::unique_ptr<Engine> *engine);

// The caller's callback: how many bytes, and then the bytes. `present` [rank]: who is there.
// Deadlines are the callback's own affair, and if it fails, all that follows fails.
std::unique_ptr<Engine> engine_by_callback(int rank, const std::vector<bool> &present,
                                           mep_all_to_all_callback_t callback, void *context);

}  // namespace ep
