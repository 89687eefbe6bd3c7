// Which rounds a rank has sent and not yet received. Slots are safe to reuse only within the limit
// that is kept here; ARCHITECTURE.md has the argument.
#pragma once

#include "mooncake_ep.h"

#include "base/status.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ep {

class Rounds {
  public:
    void set_limit(int in_flight_max) { in_flight_max_ = in_flight_max; }

    uint64_t sent() const { return sent_; }

    // May another round be sent? All but the in_flight_max - 1 rounds before it must be received.
    mep_status_t may_send(const char *operation) const {
        if (in_flight_.empty() || in_flight_.front() + in_flight_max_ > sent_ + 1) return MEP_OK;
        return fail(MEP_INVALID_STATE,
                    "%s round %llu is still in flight; receive it before round %llu is sent "
                    "(rounds_in_flight_max is %d)",
                    operation, static_cast<unsigned long long>(in_flight_.front()),
                    static_cast<unsigned long long>(sent_ + 1), in_flight_max_);
    }

    uint64_t send() {
        in_flight_.push_back(++sent_);
        return sent_;
    }

    void receive(uint64_t round) {
        in_flight_.erase(std::find(in_flight_.begin(), in_flight_.end(), round));
    }

    // Nobody will receive it.
    void abandon(uint64_t round) { abandoned_.push_back(round); }

    // Are there any that somebody may still receive?
    bool any_in_flight() const { return in_flight_.size() > abandoned_.size(); }

    // All slots are new.
    void forget_abandoned() {
        for (const uint64_t round : abandoned_)
            receive(round);
        abandoned_.clear();
    }

  private:
    int in_flight_max_ = 1;
    uint64_t sent_ = 0;
    std::vector<uint64_t> in_flight_;  // in the order they were sent
    std::vector<uint64_t> abandoned_;  // of them
};

// Of a buffer; its handles, which may be destroyed later, have a part in it.
struct Pending {
    Rounds dispatches, combines;
};

}  // namespace ep
