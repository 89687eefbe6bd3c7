// What an engine has left in the boxes of the inbox, to its places in the window, as the far peers
// would have stored it: for halves of which the one that receives comes later, when the inbox may
// hold another round's. A call that does both receives from the boxes themselves.
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"
#include "kernels/routing.h"
#include "kernels/ways.h"

namespace ep::EP_DEVICE_NAMESPACE {

// Of how many tokens there may be something.
EP_DEVICE int delivered_tokens(const DeliverArgs &a, uint64_t epoch, const uint64_t *words) {
    const Round &r = a.round;
    if (a.cargo == Cargo::kPartials) return r.token_count;
    const uint64_t signal = words[r.layout.local_expert_count];
    const int tokens = Signal::is_of(signal, epoch) ? Signal::value(signal) : 0;
    return tokens <= r.layout.shape.token_count_max ? tokens : 0;  // more is found by RECEIVE
}

EP_DEVICE void deliver_slot(const DeliverArgs &a, uint64_t epoch, char *from, char *to) {
    const uint64_t signal = *Layout::flag(from);
    if (!Signal::is_of(signal, epoch)) return;
    const bool empty = a.cargo == Cargo::kMessages && Signal::value(signal) == 0;
    if (!empty)
        fan_out<Warp, kTermLoads>(
            1, [&](int) { return body_of(a.cargo, to); }, body_of(a.cargo, from), a.body_bytes,
            a.round.caching);
    before_publish<Warp>();
    if (Warp::rank() == 0) publish(Layout::flag(to), signal);
}

EP_DEVICE void deliver_words(const DeliverArgs &a, uint64_t epoch, int source,
                             const uint64_t *words) {
    uint64_t *to = words_here(a.round, a.cargo, epoch, source);
    const int count = a.cargo == Cargo::kMessages ? a.round.layout.local_expert_count + 1 : 1;
    for (int i = grid_index<Thread>(); i < count; i += grid_count<Thread>())
        post(to + i, words[i]);
}

EP_KERNEL deliver_boxes(const DeliverArgs a) {
    after_launches_before();
    const Round &r = a.round;
    const HandleState &state = *r.routing.state;
    const uint64_t epoch = a.cargo == Cargo::kMessages ? state.dispatch_epoch : state.combine_epoch;
    for (int source = 0; source < r.layout.shape.rank_count; ++source) {
        if (r.far.box_of[source] == Far::kNear || !is_active(r, source)) continue;
        const uint64_t *words = words_from(r, a.cargo, epoch, source);
        const Slots from = slots_from(r, a.cargo, epoch, source);
        const Slots to = slots_here(r, a.cargo, epoch, source);
        const int tokens = delivered_tokens(a, epoch, words);
        for (int token = grid_index<Warp>(); token < tokens; token += grid_count<Warp>())
            deliver_slot(a, epoch, from.of(token), to.of(token));
        deliver_words(a, epoch, source, words);
    }
}

inline int launch_deliver(const DeliverArgs &args, const Queue &queue) {
    launch_all(deliver_boxes, args, queue, args.round.layout.shape.token_count_max);
    return launch_error();
}

}  // namespace ep::EP_DEVICE_NAMESPACE
