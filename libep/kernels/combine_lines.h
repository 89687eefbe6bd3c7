// combine where messages go by line (kernels/lines.h): small rounds. The roles are those of
// kernels/combine.h; a warp sums, sends or receives a part of a row, and asks for all that it has
// to know about a token at once.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/kernels.h"
#include "kernels/lines.h"
#include "kernels/phases.h"
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

// ---- Weights that come only now -----------------------------------------------------------------

// What the threads of a block share.
struct LineWeightsShared {
    float values[kWarpsOfBlockMax][kTopkMax];
};

// Before the launch that sums. A warp per own token, which sends each of its ranks a line with a
// weight for each entry of the message that this rank had of the token. A template, so that it is
// made only where there are lines.
template <class Args>
EP_KERNEL combine_weights_by_line(const Args a) {
    after_launches_before();
    EP_SHARED(LineWeightsShared, shared);
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const uint64_t epoch = combine_epoch_of(r);
    float *values = shared.values[Warp::index_in_block()];
    EP_ROLLED
    for (int token = grid_index<Warp>(); token < r.token_count; token += grid_count<Warp>()) {
        const bool has = Warp::rank() < r.topk;
        const int at = token * r.topk + Warp::rank();
        const int32_t choice = has ? r.routing.choices[at] : Routing::kNoChoice;
        const float weight = merged_in_lanes(has ? a.topk_weights[at] : 0, choice, r.topk);
        EP_ROLLED
        for (int peer = 0; peer < layout.shape.rank_count; ++peer) {
            const ExpertRange range = ExpertRange::of(layout, peer);
            const Votes had = Warp::count(range.has(choice));
            const int sends = may_send_weights(r, epoch, peer);
            if (peer == r.rank || had.total == 0 || !Warp::broadcast(sends)) continue;
            if (Warp::rank() < kTopkMax) values[Warp::rank()] = 0;
            Warp::sync();
            if (range.has(choice)) values[had.lower] = weight;
            Warp::sync();
            Vector piece = {{Signal::pack(epoch, 0), 0}};
            if (LineLane::piece() < Layout::kPiecesOfLine)
                __builtin_memcpy(&piece, values + LineLane::piece() * kWeightsOfPiece,
                                 sizeof piece);
            push(layout.weight(r.window(peer), epoch, peer, r.rank, token) +
                     LineLane::piece() * Layout::kPieceBytes,
                 LineLane::line() == 0, LineLane::has_signal(), piece);
            Warp::sync();  // before the next weights take the place of these
        }
    }
}

// Waits for the weights of a token's terms. False if its owner is masked or has failed. One warp.
EP_DEVICE bool await_line_weights(const Wait &wait, const Outgoing &out, Terms *terms) {
    const Round &r = wait.round;
    char *line = r.layout.weight(r.window(r.rank), out.epoch, r.rank, out.source, out.token);
    const char *const at[] = {line + LineLane::piece() * Layout::kPieceBytes};
    const bool here[] = {LineLane::line() == 0};
    Vector piece[1] = {};
    EP_ROLLED
    for (uint32_t attempt = 0;; ++attempt) {
        const int active = is_active(r, out.source);
        const bool whole = pull(at, here, LineLane::has_signal(), out.epoch, piece);
        if (!Warp::broadcast(active)) return false;
        if (whole) break;
        wait.lapse<Warp>(out.epoch, out.source, Awaited::kWeights, attempt);
    }
    if (here[0] && !LineLane::has_signal())
        __builtin_memcpy(terms->weight + LineLane::piece() * kWeightsOfPiece, piece, sizeof piece);
    Warp::sync();
    return true;
}

// ---- Sending ------------------------------------------------------------------------------------

// Sends a lane's sums of a part.
template <Element kPartial>
EP_DEVICE void push_sums(const Round &r, const Outgoing &out, const Part &part,
                         const PartSums<kPartial> &sums) {
    Pieces pieces;
    EP_UNROLL
    for (int step = 0; step < Part::kSteps; ++step) {
        alignas(16) char bytes[sizeof(Vector)];
        store_channels<kPartial, kPieceChannels<kPartial>>(bytes, 0, sums.steps[step]);
        __builtin_memcpy(&pieces.step[step], bytes, sizeof bytes);
    }
    push_part(part,
              r.layout.partial(r.window(out.source), out.epoch, out.source, r.rank, out.token),
              pieces, Signal::pack(out.epoch, 0));
}

// The terms of a token that dispatch received; false if nothing is to be sent. One warp.
template <Element kType>
EP_DEVICE bool find_line_terms(const CombineArgs &a, const Wait &wait, const Outgoing &out,
                               Terms *terms) {
    const Round &r = a.round;
    const int topk_max = r.layout.shape.topk_max;
    const size_t slot = size_t(out.source) * r.layout.shape.token_count_max + out.token;
    const bool given = a.topk_weights != nullptr;
    const int tokens = Signal::value(r.routing.token_counts[out.source]);
    const int sends = may_send(r, Cargo::kPartials, out.epoch, out.source);
    put_terms<kType>(a, slot, given ? nullptr : r.routing.weights + slot * topk_max, terms);
    Warp::sync();
    if (out.token >= tokens || !Warp::broadcast(sends) || terms->count == 0) return false;
    return !given || await_line_weights(wait, out, terms);
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
        wait.lapse<Warp>(epoch, peer, Awaited::kSums, attempt);
    }
}

// Adds the parts of a token's ranks in rank order, this rank's own among them, and writes the sum.
// One warp.
template <Element kType, Element kPartial>
EP_DEVICE void add_parts(const CombineArgs &a, const Wait &wait, uint64_t epoch, int token,
                         int32_t choice, const Part &part, const PartSums<kPartial> &own) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    constexpr int kChannels = kPieceChannels<kPartial>;
    PartSums<kPartial> sums = {};
    EP_ROLLED
    for (int peer = 0; peer < layout.shape.rank_count; ++peer) {
        if (Warp::all(!ExpertRange::of(layout, peer).has(choice))) continue;
        Pieces arrived;
        char *lines = layout.partial(r.window(r.rank), epoch, r.rank, peer, token);
        if (peer != r.rank && !await_line_part(wait, epoch, peer, part, lines, &arrived)) continue;
        EP_UNROLL
        for (int step = 0; step < Part::kSteps; ++step) {
            alignas(16) char bytes[sizeof(Vector)];
            __builtin_memcpy(bytes, &arrived.step[step], sizeof bytes);
            add(&sums.steps[step],
                peer == r.rank ? own.steps[step] : load_channels<kPartial, kChannels>(bytes, 0));
        }
    }
    EP_UNROLL
    for (int step = 0; step < Part::kSteps; ++step)
        if (part.has_piece(step, size_t(r.hidden) * element_bytes(kPartial)))
            store_channels<kType, kChannels>(a.out + token * a.out_stride,
                                             part.piece(step) * kChannels, sums.steps[step]);
}

// ---- Roles --------------------------------------------------------------------------------------

// What the threads of a block share: each warp's own.
struct LineCombineShared {
    Terms terms[kSummingThreads / kWarpSize];
};

// A warp's items are parts of rows: a sender's, those of tokens that dispatch received, all sources
// side by side; a receiver's, those of own tokens. One loop for both, so that there is one copy of
// each step.
template <Element kType, Element kPartial>
EP_DEVICE void combine_parts(const CombineArgs &a, uint64_t epoch, const Role &role, Terms *terms) {
    const Round &r = a.round;
    const bool sends = role.sender >= 0;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kPartial);
    const int parts = r.parts.value, peers = r.layout.shape.rank_count - 1;
    const int items = (sends ? r.layout.shape.token_count_max * peers : r.token_count) * parts;
    const int block = sends ? role.sender : role.receiver;
    const int blocks = sends ? role.sender_count : role.receiver_count;
    const int warps = Warp::count_in_block();
    const Wait wait(r, !sends && a.topk_weights != nullptr);
    EP_ROLLED
    for (int i = Warp::index_in_block() * blocks + block; i < items; i += blocks * warps) {
        const int message = r.parts.quotient(i);
        const Part part(i - message * parts, row_bytes);
        Outgoing out{epoch, r.rank, message};
        int32_t choice = Routing::kNoChoice;
        Warp::sync();  // before these terms take the place of the last ones
        if (sends) {
            out.token = peers == 1 ? message : message / peers;
            const int rank = r.rank + 1 + message - out.token * peers;
            out.source = rank <= peers ? rank : rank - peers - 1;
            if (!find_line_terms<kType>(a, wait, out, terms)) continue;
        } else {
            if (Warp::rank() < r.topk) choice = r.routing.choices[message * r.topk + Warp::rank()];
            put_own_terms<kType>(a, message, terms);
            Warp::sync();
        }
        PartSums<kPartial> sums;
        sum_part<kType>(part, *terms, row_bytes, &sums);
        if (sends)
            push_sums(r, out, part, sums);
        else
            add_parts<kType>(a, wait, epoch, message, choice, part, sums);
    }
}

template <Element kType, Element kPartial>
EP_WIDE_KERNEL(kSummingThreads)
combine_by_line(const CombineArgs a) {
    after_launches_before();
    EP_SHARED(LineCombineShared, shared);
    const Round &r = a.round;
    const Role role = Role::of(r);
    const uint64_t epoch = combine_epoch_of(r);
    if (role.counts && r.sends()) tell_peers(r, epoch);
    if (role.sender >= 0 ? r.sends() : role.receiver >= 0 && r.receives())
        combine_parts<kType, kPartial>(a, epoch, role, &shared.terms[Warp::index_in_block()]);
    if (role.counts && r.receives()) await_arrivals(r, epoch);
    if (r.sends()) hand_in(&r.state->combine_tickets);
}

// ---- Launching ----------------------------------------------------------------------------------

template <Element kType, Element kPartial>
int launch_combine_by_line(CombineArgs args, Phases phases, const Queue &queue) {
    Round &r = args.round;
    const Shape &shape = r.layout.shape;
    const int parts = Part::count(size_t(r.hidden) * element_bytes(kPartial));
    // A multiprocessor that sends is held up by the link, so others receive. Both sum as much.
    const int senders = (queue.block_count - 1) / 2, receivers = queue.block_count - 1 - senders;
    r.sender_block_count =
        blocks_for(int64_t(shape.rank_count - 1) * shape.token_count_max * parts, senders);
    r.receiver_block_count = blocks_for(int64_t(r.token_count) * parts, receivers);
    r.parts = Divisor::of(parts);
    r.phases = Phases::kSend;
    if ((has_phase(phases, Phases::kSend) && args.topk_weights != nullptr) || queue.load_only)
        launch_all(combine_weights_by_line<CombineArgs>, args, queue, r.token_count);
    launch_phases(combine_by_line<kType, kPartial>, args, phases, queue,
                  [](auto kernel, const CombineArgs &now, const Queue &on, int blocks) {
                      launch_wide(kernel, now, on, blocks, kSummingThreads);
                  });
    return launch_error();
}

}  // namespace ep::EP_DEVICE_NAMESPACE
