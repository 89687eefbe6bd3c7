// dispatch: every token travels once to each rank that owns one of its experts, and is packed there
// by expert. First its choices are counted and numbered (kernels/count.h), then a launch moves
// rows; its blocks have roles:
//
//   counter    when all ranks have told how many tokens they have for each expert of this one,
//              decides where each source's rows begin in each expert's region
//   senders    write their tokens' rows to the ranks of their experts, in the token's slot, and to
//   the
//              rows of their experts on this rank
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
#include "kernels/place.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

// What the threads of a block share.
struct DispatchShared {
    int32_t counts[kSharedExpertCountMax];  // the counter's, of each global expert
    RowTargets targets[kWarpsOfBlockMax];
};

constexpr int kRowLoads = 14;  // in flight of a lane that moves a whole row

// ---- Rows ---------------------------------------------------------------------------------------

// Copies or casts a token's row to the targets to(0) .. to(count - 1).
template <bool kCast, Element kType, class To>
EP_DEVICE void put_row(const DispatchArgs &a, int token, int count, To to) {
    const int hidden = a.round.hidden;
    const char *row = a.x + token * a.x_stride;
    if constexpr (kCast) {
        cast_fan_out<kType>(count, to, row, hidden, a.quant == Quant::kFp8Pow2);
    } else {
        fan_out<Warp, kRowLoads>(
            count, [&](int i) { return to(i).row; }, row, size_t(hidden) * element_bytes(kType),
            a.round.caching);
        if constexpr (kType == Element::kFp8) {
            const float *scales = a.x_scales.data + token * a.x_scales.row_stride;
            for (int g = Warp::rank(); g < hidden / kScaleGroup; g += Warp::size())
                for (int i = 0; i < count; ++i)
                    if (const Target at = to(i); at.row != nullptr)
                        at.scales[g * at.scale_stride] = scales[g * a.x_scales.group_stride];
        }
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
    int32_t *rows;  // of its entries, shared by the warp
};

// Finds an entry's row. By value: what lies in a window may change between the check and the use.
EP_DEVICE void take_entry(const DispatchArgs &a, const Incoming &in, int index, Entry entry) {
    const Round &r = a.round;
    const int32_t row = row_of(r, in.epoch, in.source, entry);
    in.rows[index] = row;
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
template <bool kCast, Element kType>
EP_DEVICE void place_own(const DispatchArgs &a, const Incoming &in) {
    const int count = take_own(a, in);
    put_row<kCast, kType>(a, in.token, count, [&](int i) { return place_of(a, in.rows[i]); });
    Warp::sync();  // before the next token's rows take the place of this one's
}

// Copies an arrived row, and its scales, to each of the rows.
template <Element kOut>
EP_DEVICE void unpack_row(const DispatchArgs &a, const char *payload, const int32_t *rows,
                          int count) {
    const size_t row_bytes = size_t(a.round.hidden) * element_bytes(kOut);
    fan_out<Warp, kRowLoads>(
        count, [&](int i) { return place_of(a, rows[i]).row; }, payload, row_bytes,
        a.round.caching);
    if constexpr (kOut == Element::kFp8) {
        const auto *scales = reinterpret_cast<const float *>(payload + row_bytes);
        for (int g = Warp::rank(); g < a.round.hidden / kScaleGroup; g += Warp::size())
            for (int i = 0; i < count; ++i)
                if (const Target at = place_of(a, rows[i]); at.row != nullptr)
                    at.scales[g * at.scale_stride] = scales[g];
    }
}

// Waits for a message by flag, and places its row; nothing of it if its source has failed. One
// warp.
template <Element kOut>
EP_DEVICE void receive_message(const DispatchArgs &a, const Wait &wait, const Incoming &in) {
    const Round &r = a.round;
    char *message = r.layout.message(r.window(r.rank), in.epoch, r.rank, in.source, in.token);
    uint64_t signal;
    const bool came = wait.until<Warp>(Layout::flag(message), in.epoch, in.source, &signal);
    const int said = came ? entry_count(r, signal) : 0, count = said < 0 ? 0 : said;
    if (said < 0 && Warp::rank() == 0) fetch_add(&r.state->invalid_messages, uint64_t{1});
    for (int i = Warp::rank(); i < count; i += Warp::size())
        take_entry(a, in, i, Layout::entries(message)[i]);
    keep_row_count(a, in, count);
    Warp::sync();
    unpack_row<kOut>(a, r.layout.payload(message), in.rows, count);
    Warp::sync();  // before the next token's rows take the place of this one's
}

// ---- Sending by flag ----------------------------------------------------------------------------

// Sends a token to all its ranks, and places it here if the launch also receives: one read of its
// row. A rank that it does not go to gets an empty message, so that nobody has to be told how many
// messages there are. One warp.
template <bool kCast, Element kType>
EP_DEVICE void send_token(const DispatchArgs &a, uint64_t epoch, int token, RowTargets *targets) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kCast ? Element::kFp8 : kType);
    const auto message_to = [&](int peer) {
        return layout.message(r.window(peer), epoch, peer, r.rank, token);
    };
    int peers = 0;
    for (int step = 1; step < layout.shape.rank_count; ++step) {
        const int peer = (r.rank + step) % layout.shape.rank_count;
        if (!Warp::broadcast(int{is_active(r, peer)})) continue;
        const int count =
            put_entries(a, token, ExpertRange::of(layout, peer), Layout::entries(message_to(peer)));
        if (Warp::rank() == 0 && count == 0)
            publish(Layout::flag(message_to(peer)), Signal::pack(epoch, 0));
        if (count == 0) continue;
        if (Warp::rank() == 0) {
            targets->peers[peers] = peer;
            targets->counts[peers] = count;
        }
        ++peers;
    }
    const int rows = r.receives() ? take_own(a, {epoch, r.rank, token, targets->rows}) : 0;
    Warp::sync();
    put_row<kCast, kType>(a, token, peers + rows, [&](int i) {
        if (i >= peers) return place_of(a, targets->rows[i - peers]);
        char *payload = layout.payload(message_to(targets->peers[i]));
        return Target{payload, reinterpret_cast<float *>(payload + row_bytes), 1};
    });
    before_publish<Warp>();
    for (int i = Warp::rank(); i < peers; i += Warp::size())
        publish(Layout::flag(message_to(targets->peers[i])),
                Signal::pack(epoch, targets->counts[i]));
    Warp::sync();  // before the next token's targets take the place of this one's
}

// ---- Roles --------------------------------------------------------------------------------------

template <bool kCast, Element kType>
EP_DEVICE void send_tokens(const DispatchArgs &a, uint64_t epoch, const Role &role,
                           RowTargets *targets) {
    const Round &r = a.round;
    const int warps = Warp::count_in_block();
    for (int token = role.sender * warps + Warp::index_in_block(); token < r.token_count;
         token += role.sender_count * warps) {
        if (r.sends())
            send_token<kCast, kType>(a, epoch, token, targets);
        else  // a launch that sends has placed them
            place_own<kCast, kType>(a, {epoch, r.rank, token, targets->rows});
    }
}

template <Element kOut>
EP_DEVICE void receive_messages(const DispatchArgs &a, uint64_t epoch, const Role &role,
                                int32_t *rows) {
    const Round &r = a.round;
    const int ranks = r.layout.shape.rank_count, warps = Warp::count_in_block();
    for (int step = 1; step < ranks; ++step) {
        const int source = (r.rank + step) % ranks;
        const int tokens = decided(&r.routing.token_counts[source], epoch);
        // From here on: a source sends only when its own counter has decided, which may have taken
        // as long as this one's, if both waited for a third that is lost.
        const Wait wait(r);
        for (int token = role.receiver * warps + Warp::index_in_block(); token < tokens;
             token += role.receiver_count * warps)
            receive_message<kOut>(a, wait, {epoch, source, token, rows});
    }
}

template <bool kCast, Element kType>
EP_KERNEL dispatch_kernel(const DispatchArgs a) {
    after_launches_before();
    EP_SHARED(DispatchShared, shared);
    const Round &r = a.round;
    const Role role = Role::of(r);
    const uint64_t epoch = dispatch_epoch_of(r);
    RowTargets *targets = &shared.targets[Warp::index_in_block()];
    if (role.counts && r.sends() && Block::rank() == 0) r.routing.state->dispatch_epoch = epoch;
    if (role.counts && r.receives())
        decide_layout(a, epoch, sums_of(a, r.chunk_count + 1, shared.counts));
    if (role.sender >= 0) send_tokens<kCast, kType>(a, epoch, role, targets);
    if (role.receiver >= 0 && r.receives())
        receive_messages<kCast ? Element::kFp8 : kType>(a, epoch, role, targets->rows);
    if (r.sends()) hand_in(&r.state->dispatch_tickets);
}

// ---- Launching ----------------------------------------------------------------------------------

template <bool kCast, Element kType>
int launch_dispatch(DispatchArgs args, Phases phases, const Queue &queue) {
    Round &r = args.round;
    const Shape &shape = r.layout.shape;
    r.choice_bits = choice_bits(shape.expert_count);
    if constexpr (kLineTokenCountMax > 0)
        if (shape.carriage == Carriage::kLine)
            return launch_dispatch_by_line<kCast, kType>(args, phases, queue);
    set_roles(&r, queue, r.token_count, (shape.rank_count - 1) * shape.token_count_max);
    r.chunk_count = chunk_count_max(queue);
    r.phases = Phases::kSend;
    if (has_phase(phases, Phases::kSend) || queue.load_only) {
        if (counts_ahead(r) || queue.load_only)
            launch_all(dispatch_tally, args, queue, r.chunk_count);
        launch_all(dispatch_number, args, queue, r.chunk_count + 1);
    }
    launch_phases(dispatch_kernel<kCast, kType>, args, phases, queue);
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
