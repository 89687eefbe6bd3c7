// Around an exchange by an engine that knows no deadline: tells the host that it has begun, and
// when; and once it is over, whether because the host has given it up, which masks all far peers.
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

// Of the round that is carried.
EP_DEVICE uint64_t incident_epoch(const WatchArgs &a) {
    const HandleState &state = *a.round.routing.state;
    return a.cargo == Cargo::kMessages ? state.dispatch_epoch : state.combine_epoch;
}

EP_KERNEL watch_kernel(const WatchArgs a) {
    after_launches_before();
    const Round &r = a.round;
    const bool first = grid_index<Thread>() == 0;
    if (!a.ends && first) {
        post(&a.watch->timeout_ns, timeout_of(r));
        post(&a.watch->begun, ++a.state->begun);
    }
    if (!a.ends) return;
    const bool failed = look(&a.watch->failed) != 0;
    for (int peer = grid_index<Thread>(); failed && peer < r.layout.shape.rank_count;
         peer += grid_count<Thread>())
        if (r.far.box_of[peer] != Far::kNear)
            mask(r, {0, incident_epoch(a), timeout_of(r), peer, Awaited::kExchange, 0, 0});
    if (first) post(&a.watch->done, a.state->begun);
}

inline int launch_watch(const WatchArgs &args, const Queue &queue) {
    launch(watch_kernel, args, queue, 1);
    return launch_error();
}

}  // namespace ep::EP_DEVICE_NAMESPACE
