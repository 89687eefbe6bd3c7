// A word from each rank to each peer's window, to try the ways there before they are relied on.
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"

namespace ep::EP_DEVICE_NAMESPACE {

EP_KERNEL knock_kernel(const KnockArgs a) {
    after_launches_before();
    for (int peer = grid_index<Thread>(); peer < a.rank_count; peer += grid_count<Thread>())
        if (a.windows[peer] != nullptr)
            publish(reinterpret_cast<uint64_t *>(a.windows[peer]) + a.rank, KnockArgs::kWord);
}

inline int launch_knock(const KnockArgs &args, const Queue &queue) {
    launch(knock_kernel, args, queue, 1);
    return launch_error();
}

}  // namespace ep::EP_DEVICE_NAMESPACE
