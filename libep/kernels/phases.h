// Launches of an operation's halves.
#pragma once

#include "device/device.h"
#include "kernels/fence.h"
#include "kernels/kernels.h"

#include <initializer_list>

namespace ep::EP_DEVICE_NAMESPACE {

// Launches a kernel that has roles, in blocks that `launch_one` launches.
template <class Args, class Launch>
void launch_phases(void (*kernel)(Args), Args args, Phases phases, const Queue &queue,
                   Launch launch_one) {
    Round &r = args.round;
    const int receivers = has_phase(phases, Phases::kReceive) ? r.receiver_block_count : 0;
    const int blocks = kRolesApart ? 1 + r.sender_block_count + receivers : r.sender_block_count;
    // Blocks that do not run beside each other would wait in vain for those after them.
    for (const Phases one : {Phases::kSend, Phases::kReceive, Phases::kBoth}) {
        const bool now =
            kRolesApart ? one == phases : one != Phases::kBoth && has_phase(phases, one);
        r.phases = one;
        if (!now) continue;
        if (one == Phases::kReceive) fence_phase(args, one, queue);
        launch_one(kernel, args, queue, blocks);
        if (one == Phases::kSend) fence_phase(args, one, queue);
    }
}
template <class Args>
void launch_phases(void (*kernel)(Args), const Args &args, Phases phases, const Queue &queue) {
    launch_phases(kernel, args, phases, queue, launch<Args>);
}

}  // namespace ep::EP_DEVICE_NAMESPACE
