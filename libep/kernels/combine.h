// combine: each rank sums its experts' rows of a token and sends one row back; the token's owner
// sums those.
//
//   begin    one block   opens the round, and tells every peer that this rank has come this far
//   weights  the grid    if weights are given only now: owners push them to where their tokens are
//   send     the grid    for each token received: weighs and sums its rows, one row back to its
//   owner arrive   one block   waits until every peer has begun the round; see ARCHITECTURE.md,
//   reuse of slots receive  the grid    for each own token: waits for the rows of its ranks, and
//   sums them in rank order
//
// All sums are in fp32, in an order that depends on nothing but the routing.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/kernels.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

// One block.
EP_KERNEL combine_begin(const CombineArgs a) {
    const Round &r = a.round;
    if (Block::rank() == 0) {
        r.routing.state->combine_epoch = ++r.state->combine_epoch;
        begin_wait(r);
    }
    Block::sync();
    const uint64_t epoch = r.routing.state->combine_epoch;
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size())
        if (peer != r.rank && is_active(r, peer))
            publish<Thread>(r.layout.arrival(r.windows[peer], epoch, r.rank),
                            Signal::pack(epoch, 0));
}

// One warp per own token: a weight for each entry of each of its messages.
EP_KERNEL combine_weights(const CombineArgs a) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const uint64_t epoch = r.routing.state->combine_epoch;
    for (int token = grid_index<Warp>(); token < r.token_count; token += grid_count<Warp>()) {
        const int32_t *choices = r.routing.choices + token * r.topk;
        const float *weights = a.topk_weights + token * r.topk;
        for (int peer = next_owner(layout, choices, r.topk, -1); peer < layout.shape.rank_count;
             peer = next_owner(layout, choices, r.topk, peer)) {
            if (peer == r.rank || !Warp::broadcast(int{is_active(r, peer)})) continue;
            const ExpertRange range = ExpertRange::of(layout, peer);
            char *weight = layout.weight(r.windows[peer], epoch, peer, r.rank, token);
            for (int k = Warp::rank(); k < r.topk; k += Warp::size())
                if (range.has(choices[k]))
                    Layout::weight_values(weight)[entries_before(choices, k, range)] =
                        merged_weight(choices, weights, k, r.topk);
            publish<Warp>(Layout::flag(weight), Signal::pack(epoch, 0));
        }
    }
}

constexpr int kTermCountMax = 32;  // MEP_TOPK_MAX

// Rows to be weighed and summed.
struct Terms {
    const char *row[kTermCountMax];
    float weight[kTermCountMax];
    int count;
};

// The rows of a token's local experts, with the given weights.
template <Element kType>
EP_DEVICE Terms terms_of(const CombineArgs &a, size_t slot, const float *weights) {
    const Round &r = a.round;
    const int32_t *rows = r.routing.rows + slot * r.layout.shape.topk_max;
    const int count = r.routing.row_counts[slot];
    Terms terms;
    terms.count = 0;
    for (int i = 0; i < count; ++i) {
        if (rows[i] < 0) continue;
        terms.row[terms.count] = a.x + rows[i] * (size_t(r.hidden) * element_bytes(kType));
        terms.weight[terms.count++] = weights[i];
    }
    return terms;
}

// The terms' sum over some channels.
template <Element kType, int kCount>
EP_DEVICE Pack<kCount> sum_terms(const Terms &terms, int channel) {
    Pack<kCount> sum = {};
    for (int i = 0; i < terms.count; ++i)
        add(&sum, scaled(terms.weight[i], load_channels<kType, kCount>(terms.row[i], channel)));
    return sum;
}

template <Element kType, Element kPartial>
EP_DEVICE void reduce_terms(const Terms &terms, int hidden, char *row) {
    int channel = Warp::rank() * kPack;
    for (; channel + kPack <= hidden; channel += Warp::size() * kPack)
        store_channels<kPartial, kPack>(row, channel, sum_terms<kType, kPack>(terms, channel));
    for (; channel < hidden; channel += kPackMin)  // only where kPack is more
        store_channels<kPartial, kPackMin>(row, channel,
                                           sum_terms<kType, kPackMin>(terms, channel));
}

// The weights that the owner of a token has given to this combine; nullptr if it failed.
EP_DEVICE const float *await_weights(const CombineArgs &a, int source, int token) {
    const Round &r = a.round;
    const uint64_t epoch = r.routing.state->combine_epoch;
    char *weight = r.layout.weight(r.windows[r.rank], epoch, r.rank, source, token);
    uint64_t signal;
    if (!await<Warp>(r, Layout::flag(weight), epoch, source, &signal)) return nullptr;
    return Layout::weight_values(weight);
}

// One warp per (source, token) that dispatch received.
template <Element kType, Element kPartial>
EP_KERNEL combine_send(const CombineArgs a) {
    const Round &r = a.round;
    const int ranks = r.layout.shape.rank_count, slots = r.layout.shape.token_count_max;
    const uint64_t epoch = r.routing.state->combine_epoch;
    for (int i = grid_index<Warp>(); i < (ranks - 1) * slots; i += grid_count<Warp>()) {
        const int source = (r.rank + 1 + i / slots) % ranks, token = i % slots;
        const size_t slot = size_t(source) * slots + token;
        if (token >= r.routing.token_counts[source] || r.routing.row_counts[slot] == 0) continue;
        const float *weights = a.topk_weights == nullptr
                                   ? r.routing.weights + slot * r.layout.shape.topk_max
                                   : await_weights(a, source, token);
        if (weights == nullptr || !Warp::broadcast(int{is_active(r, source)})) continue;
        const Terms terms = terms_of<kType>(a, slot, weights);
        char *partial = r.layout.partial(r.windows[source], epoch, source, r.rank, token);
        reduce_terms<kType, kPartial>(terms, r.hidden, Layout::partial_row(partial));
        publish<Warp>(Layout::flag(partial), Signal::pack(epoch, 0));
    }
}

// One block.
EP_KERNEL combine_arrive(const CombineArgs a) {
    const Round &r = a.round;
    const uint64_t epoch = r.routing.state->combine_epoch;
    if (Block::rank() == 0) begin_wait(r);
    Block::sync();
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size()) {
        uint64_t signal;
        if (peer != r.rank)
            await<Thread>(r, r.layout.arrival(r.windows[r.rank], epoch, peer), epoch, peer,
                          &signal);
    }
}

// The weighted rows of an own token's local experts; with weights given now, in `merged`.
template <Element kType>
EP_DEVICE Terms own_terms(const CombineArgs &a, int token, float (&merged)[kTermCountMax]) {
    const Round &r = a.round;
    const size_t slot = size_t(r.rank) * r.layout.shape.token_count_max + token;
    if (a.topk_weights == nullptr)
        return terms_of<kType>(a, slot, r.routing.weights + slot * r.layout.shape.topk_max);
    const ExpertRange range = ExpertRange::of(r.layout, r.rank);
    const int32_t *choices = r.routing.choices + token * r.topk;
    int count = 0;
    for (int k = 0; k < r.topk; ++k)
        if (range.has(choices[k]))
            merged[count++] = merged_weight(choices, a.topk_weights + token * r.topk, k, r.topk);
    return terms_of<kType>(a, slot, merged);
}

// The contributions to one token, in rank order; nullptr stands for this rank's own.
struct Parts {
    const char *row[kTermCountMax];
    int count;
};

EP_DEVICE Parts await_parts(const CombineArgs &a, int token) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const uint64_t epoch = r.routing.state->combine_epoch;
    const int32_t *choices = r.routing.choices + token * r.topk;
    Parts parts;
    parts.count = 0;
    for (int peer = next_owner(layout, choices, r.topk, -1); peer < layout.shape.rank_count;
         peer = next_owner(layout, choices, r.topk, peer)) {
        if (peer == r.rank) {
            parts.row[parts.count++] = nullptr;
            continue;
        }
        char *partial = layout.partial(r.windows[r.rank], epoch, r.rank, peer, token);
        uint64_t signal;
        if (await<Warp>(r, Layout::flag(partial), epoch, peer, &signal))
            parts.row[parts.count++] = Layout::partial_row(partial);
    }
    return parts;
}

// The parts' sum over some channels.
template <Element kType, Element kPartial, int kCount>
EP_DEVICE Pack<kCount> sum_parts(const Parts &parts, const Terms &own, int channel) {
    Pack<kCount> sum = {};
    for (int i = 0; i < parts.count; ++i)
        add(&sum, parts.row[i] == nullptr ? sum_terms<kType, kCount>(own, channel)
                                          : load_channels<kPartial, kCount>(parts.row[i], channel));
    return sum;
}

// One warp per own token.
template <Element kType, Element kPartial>
EP_KERNEL combine_receive(const CombineArgs a) {
    const Round &r = a.round;
    for (int token = grid_index<Warp>(); token < r.token_count; token += grid_count<Warp>()) {
        float merged[kTermCountMax];
        const Terms own = own_terms<kType>(a, token, merged);
        const Parts parts = await_parts(a, token);
        char *row = a.out + token * a.out_stride;
        int channel = Warp::rank() * kPack;
        for (; channel + kPack <= r.hidden; channel += Warp::size() * kPack)
            store_channels<kType, kPack>(row, channel,
                                         sum_parts<kType, kPartial, kPack>(parts, own, channel));
        for (; channel < r.hidden; channel += kPackMin)  // only where kPack is more
            store_channels<kType, kPackMin>(
                row, channel, sum_parts<kType, kPartial, kPackMin>(parts, own, channel));
    }
}

template <Element kType, Element kPartial>
int launch_combine_send(const CombineArgs &args, const Queue &queue) {
    launch_one(combine_begin, args, queue);
    if (args.topk_weights != nullptr) launch_all(combine_weights, args, queue);
    launch_all(combine_send<kType, kPartial>, args, queue);
    return launch_error();
}

template <Element kType, Element kPartial>
int launch_combine_receive(const CombineArgs &args, const Queue &queue) {
    launch_one(combine_arrive, args, queue);
    launch_all(combine_receive<kType, kPartial>, args, queue);
    return launch_error();
}

inline int launch_combine_send(const CombineArgs &args, const Queue &queue) {
    const bool wide = args.fp32_partials;
    switch (args.x_type) {
        case Element::kBf16:
            return wide ? launch_combine_send<Element::kBf16, Element::kFp32>(args, queue)
                        : launch_combine_send<Element::kBf16, Element::kBf16>(args, queue);
        case Element::kFp16:
            return wide ? launch_combine_send<Element::kFp16, Element::kFp32>(args, queue)
                        : launch_combine_send<Element::kFp16, Element::kFp16>(args, queue);
        default:
            return launch_combine_send<Element::kFp32, Element::kFp32>(args, queue);
    }
}

inline int launch_combine_receive(const CombineArgs &args, const Queue &queue) {
    const bool wide = args.fp32_partials;
    switch (args.x_type) {
        case Element::kBf16:
            return wide ? launch_combine_receive<Element::kBf16, Element::kFp32>(args, queue)
                        : launch_combine_receive<Element::kBf16, Element::kBf16>(args, queue);
        case Element::kFp16:
            return wide ? launch_combine_receive<Element::kFp16, Element::kFp32>(args, queue)
                        : launch_combine_receive<Element::kFp16, Element::kFp16>(args, queue);
        default:
            return launch_combine_receive<Element::kFp32, Element::kFp32>(args, queue);
    }
}

}  // namespace ep::EP_DEVICE_NAMESPACE
