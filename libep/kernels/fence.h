// The fence between SEND and RECEIVE, for devices of which it is not known that a published word
// covers what was stored before it. A launch after SEND tells every peer; one before RECEIVE waits
// until all peers have told. So what RECEIVE reads was stored by launches that had ended before it
// began, and the end of a launch is an order that every device keeps.
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"
#include "kernels/routing.h"

#include <type_traits>

namespace ep::EP_DEVICE_NAMESPACE {

// `Args` says which operation.
template <class Args>
struct FenceArgs {
    static constexpr int kOperation = std::is_same_v<Args, CombineArgs>;  // of Layout::fence

    Round round;
    bool tells;     // or waits
    bool may_wait;  // peers, for weights, before they tell
};

// Until the source has sent the round, is masked, or misses the deadline, which masks it.
EP_DEVICE void await_fence(const Wait &wait, const uint64_t *word, uint64_t epoch, int source) {
    for (uint32_t attempt = 0; observe<Thread>(word) < epoch; ++attempt) {
        if (!is_active(wait.round, source)) return;
        wait.lapse<Thread>(epoch, source, Awaited::kFence, attempt);
    }
}

// A thread per peer.
template <class Args>
EP_KERNEL phase_fence_kernel(const FenceArgs<Args> a) {
    constexpr int kOperation = FenceArgs<Args>::kOperation;
    after_launches_before();
    const Round &r = a.round;
    const HandleState &sent = *r.routing.state;
    const uint64_t epoch = kOperation == 0 ? sent.dispatch_epoch : sent.combine_epoch;
    const Wait wait(r, a.may_wait);
    for (int peer = grid_index<Thread>(); peer < r.layout.shape.rank_count;
         peer += grid_count<Thread>()) {
        // What an engine carries is in the order of the stream anyway.
        const bool far = r.far.box_of != nullptr && r.far.box_of[peer] != Far::kNear;
        if (peer == r.rank || far || !is_active(r, peer)) continue;
        if (kOperation == 1 && !a.tells && has_held_back(r, epoch, peer))
            mask(r, {0, epoch, 0, peer, Awaited::kFence, 0, 0});
        else if (a.tells)
            publish(r.layout.fence(r.window(peer), kOperation, r.rank), epoch);
        else
            await_fence(wait, r.layout.fence(r.window(r.rank), kOperation, peer), epoch, peer);
    }
}

// After a launch of SEND, or before one of RECEIVE.
template <class Args>
void fence_phase(const Args &args, Phases phase, const Queue &queue) {
    if constexpr (kFencesPhases) {
        const bool alone = args.round.layout.shape.rank_count == 1;
        if (!phase_fence || !queue.fences_phases || alone) return;
        FenceArgs<Args> fence{args.round, phase == Phases::kSend, false};
        if constexpr (std::is_same_v<Args, CombineArgs>)
            fence.may_wait = args.topk_weights != nullptr;
        launch(phase_fence_kernel<Args>, fence, queue, 1);
    }
}

}  // namespace ep::EP_DEVICE_NAMESPACE
