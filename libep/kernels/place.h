// Where dispatch puts what it has: questions that its two ways, by flag and by line, both ask.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/kernels.h"

namespace ep::EP_DEVICE_NAMESPACE {

// What the lanes of a warp share: where the row goes that they move, first to other ranks.
struct RowTargets {
    Target to[kTopkMax];
    int32_t peers[kTopkMax], counts[kTopkMax];  // the ranks, and how many entries go there
};

EP_DEVICE const float *weights_of(const DispatchArgs &a, int token) {
    return a.topk_weights == nullptr ? nullptr : a.topk_weights + token * a.round.topk;
}

// A row's place in the outputs.
EP_DEVICE Target place_of(const DispatchArgs &a, int32_t row) {
    if (row < 0) return {nullptr, nullptr, 0};
    const size_t row_bytes = size_t(a.round.hidden) * element_bytes(a.out_type());
    const int region = a.round.layout.shape.rank_count * a.round.layout.shape.token_count_max;
    return {a.out_x + row * row_bytes,
            a.out_scales.data + row / region * a.out_scales.expert_stride +
                row % region * a.out_scales.row_stride,
            a.out_scales.group_stride};
}

// How many entries a message says it has; -1 if it cannot have so many.
EP_DEVICE int entry_count(const Round &r, uint64_t signal) {
    const int count = Signal::value(signal);
    return count <= r.layout.shape.topk_max ? count : -1;
}

}  // namespace ep::EP_DEVICE_NAMESPACE
