// The kernels of the device that this translation unit is compiled for, as a table.
#pragma once

#include "kernels/combine.h"
#include "kernels/dispatch.h"

#include <initializer_list>

namespace ep::EP_DEVICE_NAMESPACE {

// `block_warps`: the most that a block of a launch has.
inline Kernels kernels(int block_warps) {
    return {block_warps > kShareCountMax ? block_warps : kShareCountMax, launch_dispatch_send,
            launch_dispatch_receive, launch_combine_send, launch_combine_receive};
}

// Loads every kernel onto the current device; see Queue::load_only.
inline int load_kernels() {
    Queue queue;
    queue.load_only = true;
    DispatchArgs dispatch{};
    CombineArgs combine{};
    const float weight = 0;
    combine.topk_weights = &weight;  // with it, the kernel that moves weights is one of them
    for (const Element type : {Element::kBf16, Element::kFp16, Element::kFp32, Element::kFp8}) {
        dispatch.x_type = combine.x_type = type;
        for (const Quant quant : {Quant::kNone, Quant::kFp8}) {
            dispatch.quant = quant;
            launch_dispatch_send(dispatch, queue);
            launch_dispatch_receive(dispatch, queue);
        }
        for (const bool wide : {false, true}) {
            combine.fp32_partials = wide;
            launch_combine_send(combine, queue);
            launch_combine_receive(combine, queue);
        }
    }
    return launch_error();
}

}  // namespace ep::EP_DEVICE_NAMESPACE
