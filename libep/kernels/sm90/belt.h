// Pieces of rows on their way through shared memory, a warp's own, by bulk copies: what is under
// way takes memory of the multiprocessor, not registers, which a lane has too few of to keep the
// device's memory busy.
#pragma once

#include "device/device.h"

namespace ep::EP_DEVICE_NAMESPACE {

// Slots that are filled in turn, and emptied in the same order.
struct Belt {
    alignas(128) char slots[kBulkSlots][kBulkSlotBytes];
    uint64_t arrivals[kBulkSlots];
};

// The warp's view of its belt; the same on all lanes.
class WarpBelt {
  public:
    EP_DEVICE explicit WarpBelt(Belt *belt) : belt_(*belt) {
        if (Warp::rank() == 0)
            for (uint64_t &arrival : belt_.arrivals)
                bulk_open(&arrival);
        Warp::sync();
    }

    // Asks for a piece of a row, or for nothing if `from` is nullptr. No lane may still read what
    // was in its slot.
    EP_DEVICE void fetch(const char *from, int bytes) {
        const uint32_t slot = fetched_ % kBulkSlots;
        if (Warp::rank() == 0) {
            bulk_expect(from == nullptr ? 0 : bytes, &belt_.arrivals[slot]);
            if (from != nullptr) bulk_fetch(belt_.slots[slot], from, bytes, &belt_.arrivals[slot]);
        }
        ++fetched_;
    }

    // Waits for the next piece; where it lies.
    EP_DEVICE char *take() {
        const uint32_t slot = taken_ % kBulkSlots, lap = taken_ / kBulkSlots;
        bulk_await(&belt_.arrivals[slot], lap % 2);
        ++taken_;
        return belt_.slots[slot];
    }

  private:
    Belt &belt_;
    uint32_t fetched_ = 0, taken_ = 0;
};

}  // namespace ep::EP_DEVICE_NAMESPACE
