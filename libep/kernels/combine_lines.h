// combine where messages go by line (kernels/lines.h): small rounds. The roles are those of
// kernels/combine.h; a warp sums, sends or receives a part of a row, and asks for all that it has to
// know about a token at once.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/kernels.h"
#include "kernels/lines.h"
#include "kernels/routing.h"
#include "kernels/terms.h"

namespace ep::EP_DEVICE_NAMESPACE {

// How many channels a piece of a partial row holds.
template <Element kPartial>
constexpr int kPieceChannels = static_cast<int>(Layout::kPieceBytes) / element_bytes(kPartial);

// A lane's sums over its pieces of a part.
template <Element kPartial>
struct PartSums {
    Pack<kPieceChannels<kPartial>> steps[Part::kSteps];
};

// The terms' sums over this lane's pieces.
template <Element kType, Element kPartial>
EP_DEVICE void sum_part(const Part &part, const Terms &terms, size_t row_bytes,
                        PartSums<kPartial> *sums) {
    constexpr int kChannels = kPieceChannels<kPartial>;
    *sums = {};
    sum_terms<kType>(
        terms,
        [&](int step) {
            return part.has_piece(step, row_bytes) ? part.piece(step) * kChannels : -1;
        },
        sums->steps);
}

// ---- Sending ------------------------------------------------------------------------------------

// Sums and sends a part, step by step: the link has the first lines while the next are summed.
template <Element kType, Element kPartial>
EP_DEVICE void push_partial(const CombineArgs &a, const Outgoing &out, const Part &part,
                            const Terms &terms) {
    const Round &r = a.round;
    constexpr int kChannels = kPieceChannels<kPartial>;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kPartial);
    char *lines = r.layout.partial(r.window(out.source), out.epoch, out.source, r.rank, out.token);
    EP_UNROLL
    for (int step = 0; step < Part::kSteps; ++step) {
        Pack<kChannels> sums[1] = {};
        sum_terms<kType>(
            terms,
            [&](int) {
                return part.has_piece(step, row_bytes) ? part.piece(step) * kChannels : -1;
            },
            sums);
        alignas(16) char bytes[sizeof(Vector)];
        store_channels<kPartial, kChannels>(bytes, 0, sums[0]);
        Vector piece;
        __builtin_memcpy(&piece, bytes, sizeof bytes);
        if (LineLane::has_signal()) piece.words[0] = Signal::pack(out.epoch, 0);
        push(part.at(lines, step), part.has_line(step), LineLane::has_signal(), piece);
    }
}

// The terms of a token that dispatch received; false if nothing is to be sent. One warp.
template <Element kType>
EP_DEVICE bool find_line_terms(const CombineArgs &a, const Wait &wait, const Outgoing &out,
                               Terms *terms) {
    const Round &r = a.round;
    const int topk_max = r.layout.shape.topk_max;
    const size_t slot = size_t(out.source) * r.layout.shape.token_count_max + out.token;
    const bool given = a.topk_weights != nullptr;
    Warp::sync();  // before these terms take the place of the last ones
    const int tokens = Signal::value(r.routing.token_counts[out.source]);
    const int active = is_active(r, out.source);
    put_terms<kType>(a, slot, given ? nullptr : r.routing.weights + slot * topk_max, terms);
    Warp::sync();
    if (out.token >= tokens || !Warp::broadcast(active) || terms->count == 0) return false;
    if (!given) return true;
    const float *weights = await_weights(wait, out);
    if (weights == nullptr) return false;
    if (Warp::rank() < terms->count) terms->weight[Warp::rank()] = weights[Warp::rank()];
    Warp::sync();
    return true;
}

// A warp per part of a token that dispatch received, all sources side by side.
template <Element kType, Element kPartial>
EP_DEVICE void send_line_partials(const CombineArgs &a, uint64_t epoch, const Role &role,
                                  Terms *terms) {
    const Round &r = a.round;
    const Wait wait(r);
    const int ranks = r.layout.shape.rank_count, peers = ranks - 1;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kPartial);
    const int parts = Part::count(row_bytes), warps = Warp::count_in_block();
    const int items = r.layout.shape.token_count_max * peers * parts;
    for (int i = Warp::index_in_block() * role.sender_count + role.sender; i < items;
         i += role.sender_count * warps) {
        const int message = i / parts;
        const Outgoing out{epoch, (r.rank + 1 + message % peers) % ranks, message / peers};
        if (find_line_terms<kType>(a, wait, out, terms))
            push_partial<kType, kPartial>(a, out, Part(i % parts, row_bytes), *terms);
    }
}

// ---- Receiving ----------------------------------------------------------------------------------

// Waits for a part of a peer's row. False if the peer is masked or has failed. One warp.
EP_DEVICE bool await_line_part(const Wait &wait, uint64_t epoch, int peer, const Part &part,
                               char *lines, Pieces *pieces) {
    for (uint32_t attempt = 0;; ++attempt) {
        const int active = is_active(wait.round, peer);
        const bool whole = pull_part(part, lines, epoch, pieces);
        if (!Warp::broadcast(active)) return false;
        if (whole) return true;
        wait.lapse<Warp>(peer, attempt);
    }
}

// One part of an own token. One warp.
template <Element kType, Element kPartial>
EP_DEVICE void receive_token_part(const CombineArgs &a, const Wait &wait, uint64_t epoch, int token,
                                  const Part &part, Terms *terms) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    constexpr int kChannels = kPieceChannels<kPartial>;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kPartial);
    const int32_t choice = Warp::rank() < r.topk
                               ? r.routing.choices[token * r.topk + Warp::rank()]
                               : Routing::kNoChoice;
    put_own_terms<kType>(a, token, terms);
    Warp::sync();
    PartSums<kPartial> own, sums = {};
    sum_part<kType>(part, *terms, row_bytes, &own);
    for (int peer = 0; peer < layout.shape.rank_count; ++peer) {
        if (Warp::all(!ExpertRange::of(layout, peer).has(choice))) continue;
        Pieces arrived;
        char *lines = layout.partial(r.window(r.rank), epoch, r.rank, peer, token);
        if (peer != r.rank && !await_line_part(wait, epoch, peer, part, lines, &arrived)) continue;
        EP_UNROLL
        for (int step = 0; step < Part::kSteps; ++step) {
            alignas(16) char bytes[sizeof(Vector)];
            __builtin_memcpy(bytes, &arrived.step[step], sizeof bytes);
            add(&sums.steps[step], peer == r.rank
                                       ? own.steps[step]
                                       : load_channels<kPartial, kChannels>(bytes, 0));
        }
    }
    EP_UNROLL
    for (int step = 0; step < Part::kSteps; ++step)
        if (part.has_piece(step, row_bytes))
            store_channels<kType, kChannels>(a.out + token * a.out_stride,
                                             part.piece(step) * kChannels, sums.steps[step]);
    Warp::sync();  // before the next token's terms take the place of this one's
}

// A warp per part of an own token.
template <Element kType, Element kPartial>
EP_DEVICE void receive_line_tokens(const CombineArgs &a, uint64_t epoch, const Role &role,
                                   Terms *terms) {
    const Round &r = a.round;
    const Wait wait(r);
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kPartial);
    const int parts = Part::count(row_bytes), warps = Warp::count_in_block();
    for (int i = Warp::index_in_block() * role.receiver_count + role.receiver;
         i < r.token_count * parts; i += role.receiver_count * warps)
        receive_token_part<kType, kPartial>(a, wait, epoch, i / parts,
                                            Part(i % parts, row_bytes), terms);
}

// ---- Roles --------------------------------------------------------------------------------------

// What the threads of a block share: each warp's own.
struct LineCombineShared {
    Terms terms[kWarpsOfBlockMax];
};

template <Element kType, Element kPartial>
EP_KERNEL combine_by_line(const CombineArgs a) {
    after_launches_before();
    EP_SHARED(LineCombineShared, shared);
    const Round &r = a.round;
    const Role role = Role::of(r);
    const uint64_t epoch = combine_epoch_of(r);
    Terms *terms = &shared.terms[Warp::index_in_block()];
    if (role.counts && r.sends()) tell_peers(r, epoch);
    if (role.sender >= 0 && r.sends())
        send_line_partials<kType, kPartial>(a, epoch, role, terms);
    if (role.receiver >= 0 && r.receives())
        receive_line_tokens<kType, kPartial>(a, epoch, role, terms);
    if (role.counts && r.receives()) await_arrivals(r, epoch);
    if (r.sends()) hand_in(&r.state->combine_tickets);
}

// ---- Launching ----------------------------------------------------------------------------------

template <Element kType, Element kPartial>
int launch_combine_by_line(CombineArgs args, Phases phases, const Queue &queue) {
    Round &r = args.round;
    const Shape &shape = r.layout.shape;
    const int64_t parts = Part::count(size_t(r.hidden) * element_bytes(kPartial));
    set_line_roles(&r, queue, (shape.rank_count - 1) * shape.token_count_max * parts, 1,
                   r.token_count * parts);
    launch_phases(combine_by_line<kType, kPartial>, args, phases, queue);
    return launch_error();
}

}  // namespace ep::EP_DEVICE_NAMESPACE
