// combine: each rank sums its experts' rows of a token and sends one row back; the token's owner
// sums those.
//
//   begin    one block  opens the round, and tells every peer that this rank has come this far
//   weights  the grid   if weights come only now: owners push them to where their tokens are
//   send     the grid   for each token received: weighs and sums its rows, one row to its owner
//   receive  the grid   for each own token: waits for the rows of its ranks, sums them in rank
//                       order; one block also waits until every peer has begun the round (see
//                       ARCHITECTURE.md, reuse of slots)
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
    if (Block::rank() == 0) r.routing.state->combine_epoch = ++r.state->combine_epoch;
    Block::sync();
    const uint64_t epoch = r.routing.state->combine_epoch;
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size())
        if (peer != r.rank && is_active(r, peer))
            publish(r.layout.arrival(r.windows[peer], epoch, r.rank), Signal::pack(epoch, 0));
}

// One block per own token: a weight for each entry of each of its messages.
EP_KERNEL combine_weights(const CombineArgs a) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const uint64_t epoch = r.routing.state->combine_epoch;
    for (int token = grid_index<Block>(); token < r.token_count; token += grid_count<Block>()) {
        const int32_t *choices = r.routing.choices + token * r.topk;
        const float *weights = a.topk_weights + token * r.topk;
        for (int peer = next_owner(layout, choices, r.topk, -1); peer < layout.shape.rank_count;
             peer = next_owner(layout, choices, r.topk, peer)) {
            if (peer == r.rank || !Block::all(is_active(r, peer))) continue;
            const ExpertRange range = ExpertRange::of(layout, peer);
            char *weight = layout.weight(r.windows[peer], epoch, peer, r.rank, token);
            for (int k = Block::rank(); k < r.topk; k += Block::size())
                if (range.has(choices[k]))
                    Layout::weight_values(weight)[entries_before(choices, k, range)] =
                        merged_weight(choices, weights, k, r.topk);
            uint64_t *const flags[kFanOut] = {Layout::flag(weight)};
            const uint64_t signals[kFanOut] = {Signal::pack(epoch, 0)};
            publish_all<Block>(flags, signals, 1);
        }
    }
}

// Rows to be weighed and summed; nullptr: a row that broke a limit. The threads of a block share
// them.
struct Terms {
    const char *row[kTopkMax];
    float weight[kTopkMax];
    int count;
};

// The rows of a token's local experts, with their weights. The whole block.
template <Element kType>
EP_DEVICE void put_terms(const CombineArgs &a, size_t slot, const float *weights, Terms *terms) {
    const Round &r = a.round;
    const int32_t *rows = r.routing.rows + slot * r.layout.shape.topk_max;
    const int count = r.routing.row_counts[slot];
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kType);
    for (int i = Block::rank(); i < count; i += Block::size()) {
        const int32_t row = rows[i];
        terms->row[i] = row < 0 ? nullptr : a.x + row * row_bytes;
        if (weights != nullptr) terms->weight[i] = weights[i];
    }
    if (Block::rank() == 0) terms->count = count;
}

// The terms' sum over some channels. Several rows are loaded before the first is added.
template <Element kType, int kCount>
EP_DEVICE Pack<kCount> sum_terms(const Terms &terms, int channel) {
    Pack<kCount> sum = {};
    for (int first = 0; first < terms.count; first += kTermsAtOnce) {
        Pack<kCount> values[kTermsAtOnce] = {};
        EP_UNROLL
        for (int i = 0; i < kTermsAtOnce; ++i)
            if (first + i < terms.count && terms.row[first + i] != nullptr)
                values[i] = load_channels<kType, kCount>(terms.row[first + i], channel);
        EP_UNROLL
        for (int i = 0; i < kTermsAtOnce; ++i)
            if (first + i < terms.count && terms.row[first + i] != nullptr)
                add(&sum, scaled(terms.weight[first + i], values[i]));
    }
    return sum;
}

template <Element kType, Element kPartial>
EP_DEVICE void reduce_terms(const Terms &terms, int hidden, char *row) {
    int channel = Block::rank() * kPack;
    for (; channel + kPack <= hidden; channel += Block::size() * kPack)
        store_channels<kPartial, kPack>(row, channel, sum_terms<kType, kPack>(terms, channel));
    if constexpr (kPackMin < kPack)
        for (; channel < hidden; channel += kPackMin)
            store_channels<kPartial, kPackMin>(row, channel,
                                               sum_terms<kType, kPackMin>(terms, channel));
}

// The weights that the owner of a token has given to this combine; nullptr if it failed.
EP_DEVICE const float *await_weights(const CombineArgs &a, const Wait &wait, int source,
                                     int token) {
    const Round &r = a.round;
    const uint64_t epoch = r.routing.state->combine_epoch;
    char *weight = r.layout.weight(r.windows[r.rank], epoch, r.rank, source, token);
    uint64_t signal;
    if (!wait.until<Warp>(Layout::flag(weight), epoch, source, &signal)) return nullptr;
    return Layout::weight_values(weight);
}

// One block per (source, token) that dispatch received.
template <Element kType, Element kPartial>
EP_KERNEL combine_send(const CombineArgs a) {
    EP_SHARED(Terms, terms);
    const Round &r = a.round;
    const int ranks = r.layout.shape.rank_count, slots = r.layout.shape.token_count_max;
    const uint64_t epoch = r.routing.state->combine_epoch;
    const Wait wait(r);
    for (int i = grid_index<Block>(); i < (ranks - 1) * slots; i += grid_count<Block>()) {
        const int source = (r.rank + 1 + i / slots) % ranks, token = i % slots;
        const size_t slot = size_t(source) * slots + token;
        if (token >= r.routing.token_counts[source] || r.routing.row_counts[slot] == 0) continue;
        const float *weights = a.topk_weights == nullptr
                                   ? r.routing.weights + slot * r.layout.shape.topk_max
                                   : await_weights(a, wait, source, token);
        // Also a barrier, before this token's terms take the place of the last one's.
        if (!Block::all(weights != nullptr && is_active(r, source))) continue;
        put_terms<kType>(a, slot, weights, &terms);
        Block::sync();
        char *partial = r.layout.partial(r.windows[source], epoch, source, r.rank, token);
        reduce_terms<kType, kPartial>(terms, r.hidden, Layout::partial_row(partial));
        uint64_t *const flags[kFanOut] = {Layout::flag(partial)};
        const uint64_t signals[kFanOut] = {Signal::pack(epoch, 0)};
        publish_all<Block>(flags, signals, 1);
    }
}

// Until every peer has begun the round; by one block, beside the others.
EP_DEVICE void await_arrivals(const CombineArgs &a, const Wait &wait) {
    const Round &r = a.round;
    const uint64_t epoch = r.routing.state->combine_epoch;
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size()) {
        uint64_t signal;
        if (peer != r.rank)
            wait.until<Thread>(r.layout.arrival(r.windows[r.rank], epoch, peer), epoch, peer,
                               &signal);
    }
}

// What is summed for one own token: the parts in rank order, where nullptr stands for this rank's
// own.
struct Parts {
    const char *row[kTopkMax];
    int count;
    Terms own;
};

// The weighted rows of an own token's local experts. The whole block.
template <Element kType>
EP_DEVICE void put_own_terms(const CombineArgs &a, int token, Terms *terms) {
    const Round &r = a.round;
    const size_t slot = size_t(r.rank) * r.layout.shape.token_count_max + token;
    const bool given = a.topk_weights != nullptr;
    put_terms<kType>(a, slot, given ? nullptr : r.routing.weights + slot * r.layout.shape.topk_max,
                     terms);
    if (!given) return;
    const ExpertRange range = ExpertRange::of(r.layout, r.rank);
    const int32_t *choices = r.routing.choices + token * r.topk;
    const float *weights = a.topk_weights + token * r.topk;
    for (int k = Block::rank(); k < r.topk; k += Block::size())
        if (range.has(choices[k]))
            terms->weight[entries_before(choices, k, range)] =
                merged_weight(choices, weights, k, r.topk);
}

// Waits for the rows of a token's ranks. The first warp.
EP_DEVICE void await_parts(const CombineArgs &a, const Wait &wait, int token, Parts *parts) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const uint64_t epoch = r.routing.state->combine_epoch;
    const int32_t *choices = r.routing.choices + token * r.topk;
    int count = 0;
    for (int peer = next_owner(layout, choices, r.topk, -1); peer < layout.shape.rank_count;
         peer = next_owner(layout, choices, r.topk, peer)) {
        const char *row = nullptr;
        if (peer != r.rank) {
            char *partial = layout.partial(r.windows[r.rank], epoch, r.rank, peer, token);
            uint64_t signal;
            if (!wait.until<Warp>(Layout::flag(partial), epoch, peer, &signal)) continue;
            row = Layout::partial_row(partial);
        }
        if (Warp::rank() == 0) parts->row[count] = row;
        ++count;
    }
    if (Warp::rank() == 0) parts->count = count;
}

// The parts' sum over some channels.
template <Element kType, Element kPartial, int kCount>
EP_DEVICE Pack<kCount> sum_parts(const Parts &parts, int channel) {
    Pack<kCount> sum = {};
    for (int i = 0; i < parts.count; ++i)
        add(&sum, parts.row[i] == nullptr ? sum_terms<kType, kCount>(parts.own, channel)
                                          : load_channels<kPartial, kCount>(parts.row[i], channel));
    return sum;
}

// One block per own token.
template <Element kType, Element kPartial>
EP_KERNEL combine_receive(const CombineArgs a) {
    EP_SHARED(Parts, parts);
    const Round &r = a.round;
    const Wait wait(r);
    if (grid_index<Block>() == 0) await_arrivals(a, wait);
    for (int token = grid_index<Block>(); token < r.token_count; token += grid_count<Block>()) {
        put_own_terms<kType>(a, token, &parts.own);
        if (Warp::index_in_block() == 0) await_parts(a, wait, token, &parts);
        Block::sync();
        char *row = a.out + token * a.out_stride;
        int channel = Block::rank() * kPack;
        for (; channel + kPack <= r.hidden; channel += Block::size() * kPack)
            store_channels<kType, kPack>(row, channel,
                                         sum_parts<kType, kPartial, kPack>(parts, channel));
        if constexpr (kPackMin < kPack)
            for (; channel < r.hidden; channel += kPackMin)
                store_channels<kType, kPackMin>(
                    row, channel, sum_parts<kType, kPartial, kPackMin>(parts, channel));
        Block::sync();  // before the next token's parts take the place of this one's
    }
}

template <Element kType, Element kPartial>
int launch_combine_send(const CombineArgs &args, const Queue &queue) {
    const Shape &shape = args.round.layout.shape;
    launch_one(combine_begin, args, queue);
    if (args.topk_weights != nullptr)
        launch_all(combine_weights, args, queue, args.round.token_count);
    launch_all(combine_send<kType, kPartial>, args, queue,
               (shape.rank_count - 1) * shape.token_count_max);
    return launch_error();
}

template <Element kType, Element kPartial>
int launch_combine_receive(const CombineArgs &args, const Queue &queue) {
    // At least one block: it waits for the peers' arrival.
    const int tokens = args.round.token_count;
    launch_all(combine_receive<kType, kPartial>, args, queue, tokens > 0 ? tokens : 1);
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
