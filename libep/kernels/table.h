// The kernels of the device that this translation unit is compiled for, as a table.
#pragma once

#include "kernels/combine.h"
#include "kernels/deliver.h"
#include "kernels/dispatch.h"
#include "kernels/knock.h"
#include "kernels/parcels.h"
#include "kernels/watch.h"

#include <initializer_list>

namespace ep::EP_DEVICE_NAMESPACE {

inline Kernels kernels() {
    return {chunk_count_max,        launch_dispatch, launch_combine, suits_lines,    launch_knock,
            launch_combine_weights, launch_pack,     launch_place,   launch_deliver, launch_watch};
}

// Loads every kernel onto the current device; see Queue::load_only.
inline int load_kernels() {
    Queue queue;
    queue.load_only = true;
    DispatchArgs dispatch{};
    CombineArgs combine{};
    const float weight = 0;
    combine.topk_weights = &weight;  // with it, the kernel that moves weights is one of them
    const auto load = [&](Carriage carriage, Element type) {
        for (Round *round : {&dispatch.round, &combine.round}) {
            round->layout.shape.carriage = carriage;
            round->hidden = kScaleGroup;
        }
        dispatch.x_type = combine.x_type = type;
        for (const Quant quant : {Quant::kNone, Quant::kFp8}) {
            dispatch.quant = quant;
            launch_dispatch(dispatch, Phases::kBoth, queue);
        }
        for (const bool wide : {false, true}) {
            combine.fp32_partials = wide;
            launch_combine(combine, Phases::kBoth, queue);
        }
    };
    for (const Element type : {Element::kBf16, Element::kFp16, Element::kFp32, Element::kFp8}) {
        load(Carriage::kFlag, type);
        load(Carriage::kLine, type);
    }
    launch_deliver({}, queue);
    launch_watch({}, queue);
    return launch_knock({}, queue);
}

}  // namespace ep::EP_DEVICE_NAMESPACE
