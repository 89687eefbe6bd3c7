// dispatch: every token travels once to each rank that owns one of its experts, and is packed there
// by expert. One launch (before it another, if there are many choices to count; kernels/count.h),
// whose blocks have roles:
//
//   counter    tells every rank how many tokens this one has for each of its experts; when all have
//              told, decides where each source's rows begin in each expert's region
//   senders    number a chunk's choices; write its rows to the ranks of their experts, in the
//              token's slot, and to the rows of their experts on this rank
//   receivers  wait for each message, and place its row
//
// SEND and RECEIVE are the halves of that, for callers who want something between them. Nothing is
// ever cleared: what a reader waits for carries the epoch of the round (wire/signal.h).
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/count.h"
#include "kernels/dispatch_lines.h"
#include "kernels/kernels.h"
#include "kernels/leave_out.h"
#include "kernels/phases.h"
#include "kernels/place.h"
#include "kernels/routing.h"
#include "kernels/rows.h"
#include "kernels/sm90/bulk_rows.h"
#include "kernels/ways.h"

namespace ep::EP_DEVICE_NAMESPACE {

// What the threads of a block share.
template <class Rows>
struct DispatchShared {
    typename Rows::Shared rows[kWarpsOfBlockMax];
    CountShared count;
    RowTargets targets[kWarpsOfBlockMax];
};

// What a warp moves rows with.
template <class Rows>
struct Mover {
    Rows rows;
    RowTargets *targets;  // shared by the warp
};

// ---- Rows ---------------------------------------------------------------------------------------

// Copies the scales of a row to its targets.
EP_DEVICE void put_scales(const float *scales, int64_t stride, int group_count,
                          const Targets &targets) {
    const Target *to = targets.to;
    for (int g = Warp::rank(); g < group_count; g += Warp::size()) {
        const float scale = scales[g * stride];
        for (int i = 0; i < targets.count; ++i)
            if (to[i].row != nullptr)
                put_scale(&to[i].scales[g * to[i].scale_stride], scale, targets.caching_of(i));
    }
}

// Copies or casts a token's row to its targets, of which so many are messages.
template <bool kCast, Element kType, class Rows>
EP_DEVICE void put_row(const DispatchArgs &a, Rows *rows, int token, int count, int messages,
                       const Target *to) {
    const Targets targets{to, count, messages, a.round.caching};
    const int hidden = a.round.hidden;
    const char *row = a.x + token * a.x_stride;
    if constexpr (kCast) {
        rows->template cast_fan_out<kType>(targets, row, hidden, a.quant == Quant::kFp8Pow2);
    } else {
        rows->fan_out(targets, row, size_t(hidden) * element_bytes(kType));
        if constexpr (kType == Element::kFp8)
            put_scales(a.x_scales.data + token * a.x_scales.row_stride, a.x_scales.group_stride,
                       hidden / kScaleGroup, targets);
    }
}

// Writes the entries of a message; returns how many there are. One warp.
EP_DEVICE int put_entries(const DispatchArgs &a, int token, ExpertRange range, Entry *entries) {
    const Round &r = a.round;
    return each_entry(r.routing.choices + token * r.topk, weights_of(a, token), r.topk, range,
                      [&](int32_t choice, int k, int index, float weight) {
                          entries[index] = {choice - range.first,
                                            r.routing.positions[token * r.topk + k], weight, 0};
                      });
}

// ---- Placing ------------------------------------------------------------------------------------

// Where an entry of `source` goes: a row counted over all experts' regions, or -1 if the entry
// breaks a limit, which only a faulty peer's can.
EP_DEVICE int32_t row_of(const Round &r, uint64_t epoch, int source, const Entry &entry) {
    const int ranks = r.layout.shape.rank_count;
    if (entry.local_expert < 0 || entry.local_expert >= r.layout.local_expert_count) return -1;
    const uint64_t *begins = r.routing.begins + size_t(entry.local_expert) * (ranks + 1) + source;
    int begin, end;
    decided(begins, epoch, &begin, &end);
    if (entry.position < 0 || entry.position >= end - begin) return -1;
    return entry.local_expert * ranks * r.layout.shape.token_count_max + begin + entry.position;
}

// A token from somewhere, whose rows a warp places.
struct Incoming {
    uint64_t epoch;
    int source, token;
    Target *to;  // of its entries, shared by the warp
};

// Finds an entry's row. By value: what lies in a window may change between the check and the use.
EP_DEVICE void take_entry(const DispatchArgs &a, const Incoming &in, int index, Entry entry) {
    const Round &r = a.round;
    const int32_t row = row_of(r, in.epoch, in.source, entry);
    in.to[index] = place_of(a, row);
    const size_t slot = size_t(in.source) * r.layout.shape.token_count_max + in.token;
    const size_t at = slot * r.layout.shape.topk_max + index;
    if (row < 0) fetch_add(&r.state->invalid_messages, uint64_t{1});
    r.routing.rows[at] = row;
    r.routing.weights[at] = entry.weight;
    if (row >= 0 && a.out_src_info != nullptr) a.out_src_info[row] = in.token;
}

EP_DEVICE void keep_row_count(const DispatchArgs &a, const Incoming &in, int count) {
    const Round &r = a.round;
    if (Warp::rank() == 0)
        r.routing.row_counts[size_t(in.source) * r.layout.shape.token_count_max + in.token] = count;
}

// Finds the rows of this rank's own token: no message, straight from its choices. Returns how many
// there are. One warp.
EP_DEVICE int take_own(const DispatchArgs &a, const Incoming &in) {
    const Round &r = a.round;
    const ExpertRange range = ExpertRange::of(r.layout, r.rank);
    const int count = each_entry(
        r.routing.choices + in.token * r.topk, weights_of(a, in.token), r.topk, range,
        [&](int32_t choice, int k, int index, float weight) {
            take_entry(
                a, in, index,
                {choice - range.first, r.routing.positions[in.token * r.topk + k], weight, 0});
        });
    keep_row_count(a, in, count);
    Warp::sync();
    return count;
}

// Places this rank's own token. One warp.
template <bool kCast, Element kType, class Rows>
EP_DEVICE void place_own(const DispatchArgs &a, Rows *rows, const Incoming &in) {
    const int count = take_own(a, in);
    put_row<kCast, kType>(a, rows, in.token, count, 0, in.to);
    Warp::sync();  // before the next token's targets take the place of this one's
}

// Copies an arrived row, and its scales, to its targets.
template <Element kOut, class Rows>
EP_DEVICE void unpack_row(const DispatchArgs &a, Rows *rows, const char *payload, int count,
                          const Target *to) {
    const size_t row_bytes = size_t(a.round.hidden) * element_bytes(kOut);
    const Targets targets{to, count, 0, a.round.caching};
    rows->fan_out(targets, payload, row_bytes);
    if constexpr (kOut == Element::kFp8)
        put_scales(reinterpret_cast<const float *>(payload + row_bytes), 1,
                   a.round.hidden / kScaleGroup, targets);
}

// Waits for a message by flag, and places its row. False if its source has failed before it came.
// One warp.
template <Element kOut, class Rows>
EP_DEVICE bool receive_message(const DispatchArgs &a, Rows *rows, const Wait &wait,
                               const Incoming &in) {
    const Round &r = a.round;
    char *message = slots_from(r, Cargo::kMessages, in.epoch, in.source).of(in.token);
    uint64_t signal;
    const bool came =
        wait.until<Warp>(Layout::flag(message), in.epoch, in.source, Awaited::kRows, &signal);
    rows->after_observe();
    const int said = came ? entry_count(r, signal) : 0, count = said < 0 ? 0 : said;
    if (said < 0 && Warp::rank() == 0) fetch_add(&r.state->invalid_messages, uint64_t{1});
    for (int i = Warp::rank(); i < count; i += Warp::size())
        take_entry(a, in, i, Layout::entries(message)[i]);
    keep_row_count(a, in, count);
    if (!came && Warp::rank() == 0) note_lost(r, in.epoch, in.source);
    Warp::sync();
    unpack_row<kOut>(a, rows, r.layout.payload(message), count, in.to);
    Warp::sync();  // before the next token's targets take the place of this one's
    return came;
}

// ---- Sending by flag ----------------------------------------------------------------------------

// Sends a token to all its ranks, and places it here if the launch also receives: one read of its
// row. A rank that it does not go to gets an empty message, so that nobody has to be told how many
// messages there are. One warp.
template <bool kCast, Element kType, class Rows>
EP_DEVICE void send_token(const DispatchArgs &a, Mover<Rows> *mover, uint64_t epoch, int token) {
    RowTargets *targets = mover->targets;
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kCast ? Element::kFp8 : kType);
    const auto message_to = [&](int peer) {
        return slots_to(r, Cargo::kMessages, epoch, peer).of(token);
    };
    int peers = 0;
    for (int step = 1; step < layout.shape.rank_count; ++step) {
        const int peer = (r.rank + step) % layout.shape.rank_count;
        if (!Warp::broadcast(int{may_send(r, Cargo::kMessages, epoch, peer)})) continue;
        const int count =
            put_entries(a, token, ExpertRange::of(layout, peer), Layout::entries(message_to(peer)));
        if (Warp::rank() == 0 && count == 0)
            publish(Layout::flag(message_to(peer)), Signal::pack(epoch, 0));
        if (count == 0) continue;
        if (Warp::rank() == 0) {
            char *payload = layout.payload(message_to(peer));
            targets->to[peers] = {payload, reinterpret_cast<float *>(payload + row_bytes), 1};
            targets->peers[peers] = peer;
            targets->counts[peers] = count;
        }
        ++peers;
    }
    const int rows = r.receives() ? take_own(a, {epoch, r.rank, token, targets->to + peers}) : 0;
    Warp::sync();
    put_row<kCast, kType>(a, &mover->rows, token, peers + rows, peers, targets->to);
    mover->rows.before_publish(peers);
    for (int i = Warp::rank(); i < peers; i += Warp::size())
        publish(Layout::flag(message_to(targets->peers[i])),
                Signal::pack(epoch, targets->counts[i]));
    Warp::sync();  // before the next token's targets take the place of this one's
}

// ---- Roles --------------------------------------------------------------------------------------

template <bool kCast, Element kType, class Rows>
EP_DEVICE void send_tokens(const DispatchArgs &a, Mover<Rows> *mover, uint64_t epoch,
                           const Role &role) {
    const Round &r = a.round;
    const Chunk chunk = Chunk::of(role.sender, role.sender_count, r.token_count);
    for (int token = chunk.begin + Warp::index_in_block(); token < chunk.end;
         token += Warp::count_in_block()) {
        if (r.sends())
            send_token<kCast, kType>(a, mover, epoch, token);
        else  // a launch that sends has placed them
            place_own<kCast, kType>(a, &mover->rows, {epoch, r.rank, token, mover->targets->to});
    }
}

// False if one did not come.
template <Element kOut, class Rows>
EP_DEVICE bool receive_messages(const DispatchArgs &a, Mover<Rows> *mover, uint64_t epoch,
                                const Role &role) {
    const Round &r = a.round;
    const int peers = r.layout.shape.rank_count - 1, warps = Warp::count_in_block();
    int places = 0;  // in the order of the source that has most
    for (int step = 1; step <= peers; ++step) {
        const SendOrder order(decided(&r.routing.token_counts[peer_at(r, step)], epoch),
                              r.chunk_count_max);
        if (order.size() > places) places = order.size();
    }
    // From when it is decided whose tokens count: a source sends only when its own counter has
    // decided, which may have taken as long as this one's, if both waited for a third that is lost.
    const Wait wait(r);
    bool all_came = true;
    // Sources side by side, as their messages come.
    for (int64_t i = role.receiver * warps + Warp::index_in_block(); i < int64_t{places} * peers;
         i += role.receiver_count * warps) {
        const int place = static_cast<int>(i / peers);
        const int source = peer_at(r, 1 + static_cast<int>(i - int64_t{place} * peers));
        const SendOrder order(Signal::value(r.routing.token_counts[source]), r.chunk_count_max);
        const int token = place < order.size() ? order.token(place) : -1;
        if (token >= 0)
            all_came &= receive_message<kOut>(a, &mover->rows, wait,
                                              {epoch, source, token, mover->targets->to});
    }
    return all_came;
}

// What a block does that moves rows. False if one did not come.
template <bool kCast, Element kType, class Rows>
EP_DEVICE bool move_rows(const DispatchArgs &a, uint64_t epoch, const Role &role,
                         DispatchShared<Rows> *shared) {
    const int warp = Warp::index_in_block();
    Mover<Rows> mover{Rows(&shared->rows[warp]), &shared->targets[warp]};
    if (role.sender >= 0) send_tokens<kCast, kType>(a, &mover, epoch, role);
    bool all_came = true;
    if (role.receiver >= 0 && a.round.receives())
        all_came = receive_messages<kCast ? Element::kFp8 : kType>(a, &mover, epoch, role);
    mover.rows.finish();
    return all_came;
}

// What the block does that counts for all others.
EP_DEVICE void count_for_all(const DispatchArgs &a, uint64_t epoch, CountShared *shared) {
    const Round &r = a.round;
    int32_t *sums = sums_of(a, r.chunk_count, shared->sums);
    if (r.sends()) {
        if (Block::rank() == 0) {
            r.routing.state->dispatch_epoch = epoch;
            keep_progress(r, Cargo::kMessages, epoch);
        }
        publish_counts(a, epoch, sums);
    }
    if (r.receives()) decide_layout(a, epoch, sums);
}

template <bool kCast, Element kType, class Rows>
EP_KERNEL dispatch_kernel(const DispatchArgs a) {
    after_launches_before();
    EP_SHARED_LARGE(DispatchShared<Rows>, shared);
    const Round &r = a.round;
    const Role role = Role::of(r);
    const uint64_t epoch = dispatch_epoch_of(r);
    if (role.counts) count_for_all(a, epoch, &shared.count);
    if (role.sender >= 0 && r.sends())
        number_chunk(a, role.sender, sums_of(a, role.sender, shared.count.sums), &shared.count);
    const bool all_came =
        (role.sender < 0 && role.receiver < 0) || move_rows<kCast, kType>(a, epoch, role, &shared);
    if (r.receives())
        end_receiving(a, epoch, !all_came, DecidedBegins{r});
    else
        hand_in(&r.state->dispatch_tickets);
}

// ---- Launching ----------------------------------------------------------------------------------

template <bool kCast, Element kType, class Rows>
void launch_rows(const DispatchArgs &args, Phases phases, const Queue &queue) {
    launch_phases(dispatch_kernel<kCast, kType, Rows>, args, phases, queue,
                  [](auto kernel, const auto &a, const Queue &q, int blocks) {
                      launch_large(kernel, a, q, blocks, sizeof(DispatchShared<Rows>));
                  });
}

template <bool kCast, Element kType>
int launch_dispatch(DispatchArgs args, Phases phases, const Queue &queue) {
    Round &r = args.round;
    const Shape &shape = r.layout.shape;
    r.choice_bits = choice_bits(shape.expert_count);
    if constexpr (kLineTokenCountMax > 0)
        if (shape.carriage == Carriage::kLine)
            return launch_dispatch_by_line<kCast, kType>(args, phases, queue);
    set_roles(&r, queue, r.token_count, (shape.rank_count - 1) * shape.token_count_max);
    r.chunk_count = r.sender_block_count;
    r.chunk_count_max = chunk_count_max(queue);
    r.phases = Phases::kSend;
    if ((has_phase(phases, Phases::kSend) && counts_ahead(r)) || queue.load_only)
        launch_all(dispatch_tally, args, queue, r.chunk_count);
    if constexpr (kHasBulkCopies)
        if (queue.load_only || moves_in_bulk(queue))
            launch_rows<kCast, kType, BulkRows>(args, phases, queue);
    if (queue.load_only || !moves_in_bulk(queue))
        launch_rows<kCast, kType, LaneRows>(args, phases, queue);
    return launch_error();
}

// Launchers for each type of x that is copied, and for each that is cast.
inline int launch_dispatch(DispatchArgs args, Phases phases, const Queue &queue) {
    const bool cast = args.quant != Quant::kNone;
    switch (args.x_type) {
        case Element::kBf16:
            return cast ? launch_dispatch<true, Element::kBf16>(args, phases, queue)
                        : launch_dispatch<false, Element::kBf16>(args, phases, queue);
        case Element::kFp16:
            return cast ? launch_dispatch<true, Element::kFp16>(args, phases, queue)
                        : launch_dispatch<false, Element::kFp16>(args, phases, queue);
        case Element::kFp32:
            return cast ? launch_dispatch<true, Element::kFp32>(args, phases, queue)
                        : launch_dispatch<false, Element::kFp32>(args, phases, queue);
        default:
            return launch_dispatch<false, Element::kFp8>(args, phases, queue);
    }
}

}  // namespace ep::EP_DEVICE_NAMESPACE
