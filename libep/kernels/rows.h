// How a warp moves rows by flag: by loads and stores of its lanes here, by bulk copies in
// sm90/bulk_rows.h, which has the same functions.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"

namespace ep::EP_DEVICE_NAMESPACE {

class LaneRows {
  public:
    struct Shared {};  // by the lanes of a warp
    EP_DEVICE explicit LaneRows(Shared *) {}

    // What the warp has observed may be read.
    EP_DEVICE void after_observe() {}

    // Copies a row, without its scales, to its targets.
    EP_DEVICE void fan_out(const Targets &targets, const char *from, size_t bytes) {
        constexpr int kLoads = 14;  // in flight of a lane
        ep::EP_DEVICE_NAMESPACE::fan_out<Warp, kLoads>(
            targets.count, [to = targets.to](int i) { return to[i].row; }, from, bytes,
            targets.caching);
    }

    // Casts a row to its targets; see kernels/cast.h.
    template <Element kType>
    EP_DEVICE void cast_fan_out(const Targets &targets, const char *from, int hidden,
                                bool power_of_two) {
        ep::EP_DEVICE_NAMESPACE::cast_fan_out<kType>(targets, from, hidden, power_of_two);
    }

    // What went to the first `count` of the last row's targets may be published by any lane.
    EP_DEVICE void before_publish(int) { ep::EP_DEVICE_NAMESPACE::before_publish<Warp>(); }

    // The last call: shared memory may be given up.
    EP_DEVICE void finish() {}
};

}  // namespace ep::EP_DEVICE_NAMESPACE
