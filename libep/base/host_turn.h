// One process of a host at a time, for what may not be done by several at once.
#pragma once

#include "base/deadline.h"

namespace ep {

// A turn, among this user's processes and their threads, until the end of a scope or of the
// process.
class HostTurn {
  public:
    // Waits for it. Without /dev/shm there are none.
    explicit HostTurn(const Deadline &deadline);
    HostTurn(const HostTurn &) = delete;
    HostTurn &operator=(const HostTurn &) = delete;
    ~HostTurn();

    bool has_come() const { return file_ >= 0; }

  private:
    int file_ = -1;  // locked; the kernel unlocks it when its last descriptor goes
};

}  // namespace ep
