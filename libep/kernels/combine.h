// combine: each rank sums its experts' rows of a token and sends one row back; the token's owner
// sums those. One launch, whose blocks have roles (before it another, if weights come only now:
// owners push them to where their tokens are):
//
//   counter    tells every peer that this rank has begun the round, and at the end waits until
//              all have (see ARCHITECTURE.md, reuse of slots)
//   senders    for each token received: weigh and sum its rows, one row to its owner
//   receivers  for each own token: wait for the rows of its ranks, and sum them in rank order
//
// All sums are in fp32, in an order that depends on nothing but the routing.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/combine_lines.h"
#include "kernels/kernels.h"
#include "kernels/phases.h"
#include "kernels/routing.h"
#include "kernels/sm90/bulk_sums.h"
#include "kernels/sums.h"
#include "kernels/terms.h"
#include "kernels/ways.h"

namespace ep::EP_DEVICE_NAMESPACE {

// Before the launch that sends. One warp per own token: a weight for each entry of each of its
// messages.
EP_KERNEL combine_weights(const CombineArgs a) {
    after_launches_before();
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const uint64_t epoch = combine_epoch_of(r);
    for (int token = grid_index<Warp>(); token < r.token_count; token += grid_count<Warp>()) {
        const int32_t *choices = r.routing.choices + token * r.topk;
        const float *weights = a.topk_weights + token * r.topk;
        for (int peer = next_owner(layout, choices, r.topk, -1); peer < layout.shape.rank_count;
             peer = next_owner(layout, choices, r.topk, peer)) {
            if (peer == r.rank) continue;
            if (!Warp::broadcast(int{may_send_weights(r, epoch, peer)})) continue;
            const ExpertRange range = ExpertRange::of(layout, peer);
            char *weight = slots_to(r, Cargo::kWeights, epoch, peer).of(token);
            each_entry(choices, weights, r.topk, range, [&](int32_t, int, int index, float value) {
                Layout::weight_values(weight)[index] = value;
            });
            before_publish<Warp>();
            if (Warp::rank() == 0) publish(Layout::flag(weight), Signal::pack(epoch, 0));
        }
    }
}

// What the threads of a block share: each warp's own.
template <class Sums>
struct CombineShared {
    typename Sums::Shared sums[kWarpsOfBlockMax];
    Parts parts[kWarpsOfBlockMax];
};

// What a warp sums rows with.
template <class Sums>
struct Adder {
    Sums sums;
    Parts *parts;  // shared by the warp
};

// ---- Sending ------------------------------------------------------------------------------------

// The token's terms; false if nothing is to be sent. One warp.
template <Element kType>
EP_DEVICE bool find_terms(const CombineArgs &a, const Wait &wait, const Outgoing &out,
                          Terms *terms) {
    const Round &r = a.round;
    const size_t slot = size_t(out.source) * r.layout.shape.token_count_max + out.token;
    const int sends = may_send(r, Cargo::kPartials, out.epoch, out.source);
    const int count = r.routing.row_counts[slot];
    if (!Warp::broadcast(sends) || count == 0) return false;
    const float *weights = a.topk_weights == nullptr
                               ? r.routing.weights + slot * r.layout.shape.topk_max
                               : await_weights(wait, out);
    if (weights == nullptr) return false;
    Warp::sync();  // before these terms take the place of the last ones
    put_terms<kType>(a, slot, weights, terms);
    Warp::sync();
    return true;
}

template <Element kType, Element kPartial, class Sums>
EP_DEVICE void send_partial(const CombineArgs &a, Sums *sums, const Outgoing &out,
                            const Terms &terms) {
    const Round &r = a.round;
    char *partial = slots_to(r, Cargo::kPartials, out.epoch, out.source).of(out.token);
    sums->template of_terms<kType, kPartial>(terms, r.hidden, Layout::partial_row(partial));
    before_publish<Warp>();
    if (Warp::rank() == 0) publish(Layout::flag(partial), Signal::pack(out.epoch, 0));
}

// A warp per token that dispatch received.
template <Element kType, Element kPartial, class Sums>
EP_DEVICE void send_partials(const CombineArgs &a, Adder<Sums> *adder, uint64_t epoch,
                             const Role &role) {
    Terms *terms = &adder->parts->own;
    const Round &r = a.round;
    const Wait wait(r);
    const int peers = r.layout.shape.rank_count - 1, warps = Warp::count_in_block();
    int tokens = 0;  // of the source that has most
    for (int step = 1; step <= peers; ++step) {
        const int count = Signal::value(r.routing.token_counts[peer_at(r, step)]);
        if (count > tokens) tokens = count;
    }
    // Sources side by side: each sums a token when it has all of its rows.
    for (int64_t i = role.sender * warps + Warp::index_in_block(); i < int64_t{tokens} * peers;
         i += role.sender_count * warps) {
        const int token = static_cast<int>(i / peers);
        const int source = peer_at(r, 1 + static_cast<int>(i - int64_t{token} * peers));
        const Outgoing out{epoch, source, token};
        if (token < static_cast<int>(Signal::value(r.routing.token_counts[source])) &&
            find_terms<kType>(a, wait, out, terms))
            send_partial<kType, kPartial>(a, &adder->sums, out, *terms);
    }
}

// ---- Receiving ----------------------------------------------------------------------------------

// Waits for the rows of a token's ranks. One warp.
EP_DEVICE void await_parts(const CombineArgs &a, const Wait &wait, uint64_t epoch, int token,
                           Parts *parts) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const int32_t *choices = r.routing.choices + token * r.topk;
    int count = 0;
    for (int peer = next_owner(layout, choices, r.topk, -1); peer < layout.shape.rank_count;
         peer = next_owner(layout, choices, r.topk, peer)) {
        const char *row = nullptr;
        if (peer != r.rank) {
            char *partial = slots_from(r, Cargo::kPartials, epoch, peer).of(token);
            uint64_t signal;
            if (!wait.until<Warp>(Layout::flag(partial), epoch, peer, Awaited::kSums, &signal))
                continue;
            row = Layout::partial_row(partial);
        }
        if (Warp::rank() == 0) parts->row[count] = row;
        ++count;
    }
    if (Warp::rank() == 0) parts->count = count;
}

// One warp.
template <Element kType, Element kPartial, class Sums>
EP_DEVICE void receive_token(const CombineArgs &a, Adder<Sums> *adder, const Wait &wait,
                             uint64_t epoch, int token) {
    Parts *parts = adder->parts;
    put_own_terms<kType>(a, token, &parts->own);
    await_parts(a, wait, epoch, token, parts);
    Warp::sync();
    adder->sums.after_observe();
    adder->sums.template of_parts<kType, kPartial>(*parts, a.round.hidden,
                                                   a.out + token * a.out_stride);
    Warp::sync();  // before the next token's parts take the place of this one's
}

// A warp per own token.
template <Element kType, Element kPartial, class Sums>
EP_DEVICE void receive_tokens(const CombineArgs &a, Adder<Sums> *adder, uint64_t epoch,
                              const Role &role) {
    const Wait wait(a.round, a.topk_weights != nullptr);
    const int warps = Warp::count_in_block();
    for (int token = role.receiver * warps + Warp::index_in_block(); token < a.round.token_count;
         token += role.receiver_count * warps)
        receive_token<kType, kPartial>(a, adder, wait, epoch, token);
}

// ---- Roles --------------------------------------------------------------------------------------

template <Element kType, Element kPartial, class Sums>
EP_KERNEL combine_kernel(const CombineArgs a) {
    after_launches_before();
    EP_SHARED_LARGE(CombineShared<Sums>, shared);
    const Round &r = a.round;
    const Role role = Role::of(r);
    const uint64_t epoch = combine_epoch_of(r);
    const int warp = Warp::index_in_block();
    Adder<Sums> adder{Sums(&shared.sums[warp]), &shared.parts[warp]};
    if (role.counts && r.sends()) tell_peers(r, epoch);
    if (role.sender >= 0 && r.sends()) send_partials<kType, kPartial>(a, &adder, epoch, role);
    if (role.receiver >= 0 && r.receives()) receive_tokens<kType, kPartial>(a, &adder, epoch, role);
    if (role.counts && r.receives()) await_arrivals(r, epoch);
    if (r.sends()) hand_in(&r.state->combine_tickets);
}

// ---- Launching ----------------------------------------------------------------------------------

template <Element kType, Element kPartial, class Sums>
void launch_sums(const CombineArgs &args, Phases phases, const Queue &queue) {
    launch_phases(combine_kernel<kType, kPartial, Sums>, args, phases, queue,
                  [](auto kernel, const auto &a, const Queue &q, int blocks) {
                      launch_large(kernel, a, q, blocks, sizeof(CombineShared<Sums>));
                  });
}

template <Element kType, Element kPartial>
int launch_combine(CombineArgs args, Phases phases, const Queue &queue) {
    Round &r = args.round;
    const Shape &shape = r.layout.shape;
    if constexpr (kLineTokenCountMax > 0)
        if (shape.carriage == Carriage::kLine)
            return launch_combine_by_line<kType, kPartial>(args, phases, queue);
    r.phases = Phases::kSend;
    if (has_phase(phases, Phases::kSend) && args.topk_weights != nullptr && !args.weights_are_sent)
        launch_all(combine_weights, args, queue, r.token_count);
    set_roles(&r, queue, (shape.rank_count - 1) * shape.token_count_max, r.token_count);
    if constexpr (kHasBulkCopies)
        if (queue.load_only || moves_in_bulk(queue))
            launch_sums<kType, kPartial, BulkSums>(args, phases, queue);
    if (queue.load_only || !moves_in_bulk(queue))
        launch_sums<kType, kPartial, LaneSums>(args, phases, queue);
    return launch_error();
}

inline int launch_combine_weights(CombineArgs args, const Queue &queue) {
    args.round.phases = Phases::kSend;
    launch_all(combine_weights, args, queue, args.round.token_count);
    return launch_error();
}

inline int launch_combine(CombineArgs args, Phases phases, const Queue &queue) {
    const bool wide = args.fp32_partials;
    switch (args.x_type) {
        case Element::kBf16:
            return wide ? launch_combine<Element::kBf16, Element::kFp32>(args, phases, queue)
                        : launch_combine<Element::kBf16, Element::kBf16>(args, phases, queue);
        case Element::kFp16:
            return wide ? launch_combine<Element::kFp16, Element::kFp32>(args, phases, queue)
                        : launch_combine<Element::kFp16, Element::kFp16>(args, phases, queue);
        default:
            return launch_combine<Element::kFp32, Element::kFp32>(args, phases, queue);
    }
}

}  // namespace ep::EP_DEVICE_NAMESPACE
