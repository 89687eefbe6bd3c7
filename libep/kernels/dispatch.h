// dispatch: every token travels once to each rank that owns one of its experts, and is packed there
// by expert. One launch (two with many choices, see kernels/count.h), whose blocks have roles:
//
//   counter    tells all ranks how many tokens go to each of their experts; when all have told,
//              decides where each source's rows begin in each expert's region
//   senders    write their tokens' rows to the ranks of their experts, in the token's slot; then
//              place the rows of the tokens' experts on this rank
//   receivers  wait for each message, and place its row
//
// SEND and RECEIVE are the halves of that, for callers who want something between them. Nothing is
// ever cleared: what a reader waits for carries the epoch of the round (wire/signal.h).
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/count.h"
#include "kernels/kernels.h"
#include "kernels/lines.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

// What the lanes of a warp share: where the row goes that they move.
struct RowTargets {
    int32_t rows[kTopkMax];                     // here, of the token's entries; -1: none
    int32_t peers[kTopkMax], counts[kTopkMax];  // other ranks, and how many entries go there
    Entry entries[kTopkMax];                    // of the message whose head goes by line
};

// What the threads of a block share.
struct DispatchShared {
    int32_t sums[kSharedExpertCountMax];  // of each expert
    RowTargets targets[kWarpsOfBlockMax];
};

EP_DEVICE Slice whole_row(const Round &r) {
    return {0, r.hidden};
}

constexpr int kRowLoads = 14;  // in flight of a lane that moves a whole row

// ---- Rows ---------------------------------------------------------------------------------------

// Copies or casts a slice of a token's row to the targets to(0) .. to(count - 1).
template <int kLoadsInFlight, bool kCast, Element kType, class To>
EP_DEVICE void put_row(const DispatchArgs &a, int token, Slice slice, int count, To to) {
    const char *row = a.x + token * a.x_stride;
    if constexpr (kCast) {
        cast_fan_out<kType>(count, to, row, slice, a.quant == Quant::kFp8Pow2);
    } else {
        fan_out<Warp, kLoadsInFlight>(
            count, [&](int i) { return to(i).row; }, row,
            size_t(slice.begin) * element_bytes(kType), size_t(slice.end) * element_bytes(kType),
            a.round.caching);
        if constexpr (kType == Element::kFp8) {
            const float *scales = a.x_scales.data + token * a.x_scales.row_stride;
            for (int g = slice.begin / kScaleGroup + Warp::rank(); g < slice.end / kScaleGroup;
                 g += Warp::size())
                for (int i = 0; i < count; ++i)
                    if (const Target at = to(i); at.row != nullptr)
                        at.scales[g * at.scale_stride] = scales[g * a.x_scales.group_stride];
        }
    }
}

EP_DEVICE const float *weights_of(const DispatchArgs &a, int token) {
    return a.topk_weights == nullptr ? nullptr : a.topk_weights + token * a.round.topk;
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

// ---- Sending by line ----------------------------------------------------------------------------

// Does the token name an expert of that rank? One warp.
EP_DEVICE bool goes_to(const DispatchArgs &a, int token, ExpertRange range) {
    const int64_t expert =
        Warp::rank() < a.round.topk ? topk_idx_at(a, token * a.round.topk + Warp::rank()) : -1;
    return !Warp::all(expert < range.first || expert >= range.end);
}

// Sends one part of a token's row; needs no numbers. One warp.
template <bool kCast, Element kType, int kLines>
EP_DEVICE void send_part(const DispatchArgs &a, uint64_t epoch, int token,
                         const Part<kLines> &part) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const char *row = a.x + token * a.x_stride;
    Pieces<kLines> pieces{};
    if constexpr (kCast)
        cast_part<kType>(part, row, r.hidden, a.quant == Quant::kFp8Pow2, &pieces);
    else
        load_part(part, row, size_t(r.hidden) * element_bytes(kType), &pieces);
    if constexpr (!kCast && kType == Element::kFp8)
        load_part_scales(part, a.x_scales.data + token * a.x_scales.row_stride,
                         a.x_scales.group_stride, r.hidden / kScaleGroup, &pieces);
    for (int step = 1; step < layout.shape.rank_count; ++step) {
        const int peer = (r.rank + step) % layout.shape.rank_count;
        const int active = is_active(r, peer);  // loaded beside the choices
        if (!goes_to(a, token, ExpertRange::of(layout, peer)) || !Warp::broadcast(active)) continue;
        char *message = layout.message(r.window(peer), epoch, peer, r.rank, token);
        push_part(part, layout.payload(message), pieces, Signal::pack(epoch, 0));
    }
}

// Sends the head of one message, also of an empty one. One warp; it shares `entries`.
EP_DEVICE void send_head(const DispatchArgs &a, uint64_t epoch, int token, int peer,
                         Entry *entries) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    if (!Warp::broadcast(int{is_active(r, peer)})) return;
    const int count = put_entries(a, token, ExpertRange::of(layout, peer), entries);
    Warp::sync();
    char *message = layout.message(r.window(peer), epoch, peer, r.rank, token);
    const int index = LineLane::line() * Layout::kPiecesOfLine + LineLane::piece();
    Vector piece{};
    if (LineLane::has_signal())
        piece = {{Signal::pack(epoch, count), 0}};
    else if (index < count)
        piece = bit_cast<Vector>(entries[index]);
    const bool here = LineLane::line() < static_cast<int>(layout.head_bytes / Layout::kLineBytes);
    push(message + Warp::rank() * Layout::kPieceBytes, here, LineLane::has_signal(), piece);
    Warp::sync();  // before the next message's entries take the place of this one's
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
    bool keeps;     // this warp also remembers what combine needs
    int32_t *rows;  // of its entries, shared by the warp
};

// Finds an entry's row. By value: what lies in a window may change between the check and the use.
EP_DEVICE void take_entry(const DispatchArgs &a, const Incoming &in, int index, Entry entry) {
    const Round &r = a.round;
    const int32_t row = row_of(r, in.epoch, in.source, entry);
    in.rows[index] = row;
    if (!in.keeps) return;
    const size_t slot = size_t(in.source) * r.layout.shape.token_count_max + in.token;
    const size_t at = slot * r.layout.shape.topk_max + index;
    if (row < 0) fetch_add(&r.state->invalid_messages, uint64_t{1});
    r.routing.rows[at] = row;
    r.routing.weights[at] = entry.weight;
    if (row >= 0 && a.out_src_info != nullptr) a.out_src_info[row] = in.token;
}

EP_DEVICE void keep_row_count(const DispatchArgs &a, const Incoming &in, int count) {
    const Round &r = a.round;
    if (in.keeps && Warp::rank() == 0)
        r.routing.row_counts[size_t(in.source) * r.layout.shape.token_count_max + in.token] = count;
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

// Places a slice of this rank's own token. One warp.
template <int kLoadsInFlight, bool kCast, Element kType>
EP_DEVICE void place_own(const DispatchArgs &a, const Incoming &in, Slice slice) {
    const int count = take_own(a, in);
    put_row<kLoadsInFlight, kCast, kType>(a, in.token, slice, count,
                                          [&](int i) { return place_of(a, in.rows[i]); });
    Warp::sync();  // before the next token's rows take the place of this one's
}

// How many entries a message says it has.
EP_DEVICE int entry_count(const Round &r, uint64_t signal, bool keeps) {
    const int count = Signal::value(signal);
    if (count <= r.layout.shape.topk_max) return count;
    if (keeps && Warp::rank() == 0) fetch_add(&r.state->invalid_messages, uint64_t{1});
    return 0;
}

// Copies an arrived row, and its scales, to each of the rows.
template <Element kOut>
EP_DEVICE void unpack_row(const DispatchArgs &a, const char *payload, const int32_t *rows,
                          int count) {
    const size_t row_bytes = size_t(a.round.hidden) * element_bytes(kOut);
    fan_out<Warp, kRowLoads>(
        count, [&](int i) { return place_of(a, rows[i]).row; }, payload, 0, row_bytes,
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
    const int count = came ? entry_count(r, signal, in.keeps) : 0;
    for (int i = Warp::rank(); i < count; i += Warp::size())
        take_entry(a, in, i, Layout::entries(message)[i]);
    keep_row_count(a, in, count);
    Warp::sync();
    unpack_row<kOut>(a, r.layout.payload(message), in.rows, count);
    Warp::sync();  // before the next token's rows take the place of this one's
}

// What has come of a message by line.
template <int kLines>
struct LineArrival {
    Vector head;
    bool has_head = false;
    PartArrival<kLines> row;
};

// Waits for a message's head, and one part of its row unless the message is empty. Returns the
// number of entries; 0 if the source has failed; -1 if it turns out to have no such token.
template <int kLines>
EP_DEVICE int await_part(const Wait &wait, const Incoming &in, const Part<kLines> &part,
                         LineArrival<kLines> *arrival) {
    const Round &r = wait.round;
    const Layout &layout = r.layout;
    char *message = layout.message(r.window(r.rank), in.epoch, r.rank, in.source, in.token);
    const bool has_head =
        LineLane::line() < static_cast<int>(layout.head_bytes / Layout::kLineBytes);
    for (uint32_t attempt = 0;; ++attempt) {
        const uint64_t tokens = look(&r.routing.token_counts[in.source]);
        if (!arrival->has_head)
            arrival->has_head = pull(message + Warp::rank() * Layout::kPieceBytes, has_head,
                                     LineLane::has_signal(), in.epoch, &arrival->head);
        const bool whole = arrival->row.pull_rest(part, layout.payload(message), in.epoch);
        if (arrival->has_head) {
            const int count = entry_count(
                r, Warp::from(arrival->head.words[0], Layout::kPiecesOfLine), in.keeps && whole);
            if (count == 0 || whole) return count;
        }
        if (Warp::broadcast(
                int{Signal::is_of(tokens, in.epoch) && in.token >= Signal::value(tokens)}))
            return -1;
        if (!Warp::broadcast(int{is_active(r, in.source)})) return 0;
        wait.lapse<Warp>(in.source, attempt);
    }
}

// Waits for one part of a message by line, and places it. False if there is no such token. One
// warp.
template <Element kOut, int kLines>
EP_DEVICE bool receive_part(const DispatchArgs &a, const Wait &wait, const Incoming &in,
                            const Part<kLines> &part) {
    const size_t row_bytes = size_t(a.round.hidden) * element_bytes(kOut);
    LineArrival<kLines> arrival;
    const int count = await_part(wait, in, part, &arrival);
    if (count < 0) return false;
    const int index = LineLane::line() * Layout::kPiecesOfLine + LineLane::piece();
    if (!LineLane::has_signal() && index < count)
        take_entry(a, in, index, bit_cast<Entry>(arrival.head));
    keep_row_count(a, in, count);
    Warp::sync();
    for (int i = 0; i < count; ++i) {
        const Target to = place_of(a, in.rows[i]);
        if (to.row != nullptr)
            place_part<kOut == Element::kFp8>(part, arrival.row.pieces, row_bytes, to,
                                              a.round.hidden / kScaleGroup);
    }
    Warp::sync();  // before the next token's rows take the place of this one's
    return true;
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
    const int rows = r.receives() ? take_own(a, {epoch, r.rank, token, true, targets->rows}) : 0;
    Warp::sync();
    put_row<kRowLoads, kCast, kType>(a, token, whole_row(r), peers + rows, [&](int i) {
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

template <int kLines>
EP_HOST_DEVICE inline int part_count(const Round &r, Element out) {
    return part_count_of<kLines>(size_t(r.hidden) * element_bytes(out));
}

// The channels of one part.
template <int kLines>
EP_DEVICE Slice slice_of(const Round &r, Element type, int part) {
    if constexpr (kLines == 0) return whole_row(r);
    const int channels = Part<kLines>::kBytes / element_bytes(type), end = (part + 1) * channels;
    return {part * channels, end < r.hidden ? end : r.hidden};
}

template <int kLines, bool kCast, Element kType>
EP_DEVICE void send_chunk(const DispatchArgs &a, uint64_t epoch, int index, int32_t *sums,
                          RowTargets *targets) {
    const Round &r = a.round;
    const Chunk chunk = Chunk::of(index, r.sender_block_count, r.token_count);
    const int warp = Warp::index_in_block(), warps = Warp::count_in_block();
    if constexpr (kLines > 0) {
        constexpr Element kOut = kCast ? Element::kFp8 : kType;
        const size_t row_bytes = size_t(r.hidden) * element_bytes(kOut);
        const int parts = part_count<kLines>(r, kOut);
        for (int i = warp; i < (chunk.end - chunk.begin) * parts; i += warps)
            send_part<kCast, kType>(a, epoch, chunk.begin + i / parts,
                                    Part<kLines>(i % parts, row_bytes));
        number_chunk(a, index, sums);
        const int peers = r.layout.shape.rank_count - 1;
        for (int i = warp; i < (chunk.end - chunk.begin) * peers; i += warps)
            send_head(a, epoch, chunk.begin + i / peers,
                      (r.rank + 1 + i % peers) % r.layout.shape.rank_count, targets->entries);
    } else {
        number_chunk(a, index, sums);
        for (int token = chunk.begin + warp; token < chunk.end; token += warps)
            send_token<kCast, kType>(a, epoch, token, targets);
    }
}

template <int kLines, bool kCast, Element kType>
EP_DEVICE void place_chunk(const DispatchArgs &a, uint64_t epoch, int index, int32_t *rows) {
    const Round &r = a.round;
    const Chunk chunk = Chunk::of(index, r.sender_block_count, r.token_count);
    const int parts = part_count<kLines>(r, kCast ? Element::kFp8 : kType);
    for (int i = Warp::index_in_block(); i < (chunk.end - chunk.begin) * parts;
         i += Warp::count_in_block()) {
        const Incoming in{epoch, r.rank, chunk.begin + i / parts, i % parts == 0, rows};
        place_own<(kLines > 0) ? 4 : kRowLoads, kCast, kType>(
            a, in, slice_of<kLines>(r, kCast ? Element::kFp8 : kType, i % parts));
    }
}

// The messages of one source, a warp each, or by line a warp for each part.
template <int kLines, Element kOut>
EP_DEVICE void receive_from(const DispatchArgs &a, const Wait &wait, uint64_t epoch, int source,
                            const Role &role, int32_t *rows) {
    const Round &r = a.round;
    const int warps = Warp::count_in_block();
    const int first = role.receiver * warps + Warp::index_in_block();
    const int stride = role.receiver_count * warps;
    if constexpr (kLines > 0) {
        const int parts = part_count<kLines>(r, kOut);
        for (int i = first; i < r.layout.shape.token_count_max * parts; i += stride) {
            const Incoming in{epoch, source, i / parts, i % parts == 0, rows};
            const Part<kLines> part(i % parts, size_t(r.hidden) * element_bytes(kOut));
            if (!receive_part<kOut>(a, wait, in, part)) return;
        }
    } else {
        const int tokens = decided(&r.routing.token_counts[source], epoch);
        for (int token = first; token < tokens; token += stride)
            receive_message<kOut>(a, wait, {epoch, source, token, true, rows});
    }
}

template <int kLines, bool kCast, Element kType>
EP_KERNEL dispatch_kernel(const DispatchArgs a) {
    EP_SHARED(DispatchShared, shared);
    const Round &r = a.round;
    const Role role = Role::of(r);
    const uint64_t epoch = epoch_of(r, r.state->dispatch_tickets, r.routing.state->dispatch_epoch);
    RowTargets *targets = &shared.targets[Warp::index_in_block()];
    if (role.counts && r.sends()) {
        publish_counts(a, epoch, sums_of(a, r.sender_block_count, shared.sums));
        if (Block::rank() == 0) r.routing.state->dispatch_epoch = epoch;
    }
    if (role.counts && r.receives())
        decide_layout(a, epoch, sums_of(a, r.sender_block_count, shared.sums));
    if (role.sender >= 0 && r.sends())
        send_chunk<kLines, kCast, kType>(a, epoch, role.sender,
                                         sums_of(a, role.sender, shared.sums), targets);
    // By flag, a launch that also sends has placed them.
    if (role.sender >= 0 && r.receives() && (kLines > 0 || !r.sends()))
        place_chunk<kLines, kCast, kType>(a, epoch, role.sender, targets->rows);
    if (role.receiver >= 0 && r.receives()) {
        const Wait wait(r);
        const int ranks = r.layout.shape.rank_count;
        for (int step = 1; step < ranks; ++step)
            receive_from<kLines, kCast ? Element::kFp8 : kType>(
                a, wait, epoch, (r.rank + step) % ranks, role, targets->rows);
    }
    if (r.sends()) hand_in(&r.state->dispatch_tickets);
}

// ---- Launching ----------------------------------------------------------------------------------

template <int kLines, bool kCast, Element kType>
int launch_dispatch(DispatchArgs args, Phases phases, const Queue &queue) {
    Round &r = args.round;
    const Shape &shape = r.layout.shape;
    const int parts = part_count<kLines>(r, kCast ? Element::kFp8 : kType);
    set_roles(&r, queue, r.token_count, (shape.rank_count - 1) * shape.token_count_max * parts);
    if (has_phase(phases, Phases::kSend) && (counts_ahead(r) || queue.load_only))
        launch_all(dispatch_tally, args, queue, r.sender_block_count);
    launch_phases(dispatch_kernel<kLines, kCast, kType>, args, phases, queue);
    return launch_error();
}

template <bool kCast, Element kType>
int launch_dispatch(const DispatchArgs &args, Phases phases, const Queue &queue) {
    if constexpr (kLineTokenCountMax > 0)
        if (args.round.layout.shape.carriage == Carriage::kLine) {
            const Element out = kCast ? Element::kFp8 : kType;
            const int parts = args.round.token_count * part_count<kPartLinesMin>(args.round, out);
            if (parts <= warp_count_max(queue))
                return launch_dispatch<kPartLinesMin, kCast, kType>(args, phases, queue);
            return launch_dispatch<kPartLinesMax, kCast, kType>(args, phases, queue);
        }
    return launch_dispatch<0, kCast, kType>(args, phases, queue);
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
