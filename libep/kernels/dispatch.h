// dispatch: every token travels once to each rank that owns one of its experts, and is packed there
// by expert.
//
//   count    one block  numbers this rank's tokens for each expert, and publishes how many there
//                       are (with many choices: the grid)
//   send     the grid   writes each token's row to the ranks of its experts, in the token's slot
//   layout   one block  waits for all counts: where each source's rows begin in each expert's
//                       region
//   receive  the grid   waits for each message, and copies its row to where it belongs
//
// Each step is a kernel of its own: the boundary between two kernels orders them for the whole
// grid. Nothing is ever cleared: what a reader waits for carries the epoch of the round
// (wire/signal.h).
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/kernels.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

EP_DEVICE int64_t topk_idx_at(const DispatchArgs &a, int i) {
    return a.topk_idx_bytes == 8 ? static_cast<const int64_t *>(a.topk_idx)[i]
                                 : static_cast<const int32_t *>(a.topk_idx)[i];
}

// The choice that `expert`, which is topk_idx[i], stands for.
EP_DEVICE int32_t choice_of(const DispatchArgs &a, int64_t expert, int i) {
    if (expert < 0 || expert >= a.round.layout.shape.expert_count) {
        if (expert != Routing::kNoChoice)
            fetch_add(&a.round.state->invalid_expert_ids, uint64_t{1});
        return Routing::kNoChoice;
    }
    bool repeats = false;
    for (int before = i - i % a.round.topk; before < i; ++before)
        repeats |= topk_idx_at(a, before) == expert;  // no early end: the loads need not wait
    return repeats ? Routing::repeat_of(static_cast<int>(expert)) : static_cast<int>(expert);
}

constexpr int kChoicesAtOnce =
    kWarpSize == 1 ? 1 : 4;        // of a lane, loaded before the first is used
constexpr int kTalliesAtOnce = 8;  // loaded before the first is added

// The choices are numbered in shares: neighbours, counted and numbered by one warp each, so that
// numbering them in the order of the shares is token order.
struct Share {
    int begin, end;

    EP_DEVICE static Share of(int64_t index, int64_t share_count, int choice_count) {
        if (index >= share_count) return {choice_count, choice_count};
        return {static_cast<int>(choice_count * index / share_count),
                static_cast<int>(choice_count * (index + 1) / share_count)};
    }

    // Few enough that adding up their tallies is no work of its own, and at most `count_max`.
    EP_HOST_DEVICE static int count(int choice_count, int count_max) {
        constexpr int kChoicesMin = 128;
        const int wanted = choice_count / kChoicesMin + 1;
        return wanted < count_max ? wanted : count_max;
    }
};

// Counts one share in `tally`, which is zero, and keeps its choices. One warp.
EP_DEVICE void count_share(const DispatchArgs &a, Share share, int32_t *tally) {
    for (int first = share.begin + Warp::rank(); first < share.end;
         first += kChoicesAtOnce * Warp::size()) {
        int64_t experts[kChoicesAtOnce];
        EP_UNROLL
        for (int j = 0; j < kChoicesAtOnce; ++j) {
            const int i = first + j * Warp::size();
            experts[j] = i < share.end ? topk_idx_at(a, i) : Routing::kNoChoice;
        }
        for (int j = 0; j < kChoicesAtOnce; ++j) {
            const int i = first + j * Warp::size();
            if (i >= share.end) break;
            const int32_t choice = choice_of(a, experts[j], i);
            a.round.routing.choices[i] = choice;
            if (choice >= 0) fetch_add(&tally[choice], 1);
        }
    }
}

// Turns the counts of each share into the first number of each share, and publishes the totals. One
// block.
EP_DEVICE void publish_counts(const DispatchArgs &a, uint64_t epoch, int32_t *tallies,
                              int share_count) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const int experts = layout.shape.expert_count, per_rank = layout.local_expert_count;
    for (int e = Block::rank(); e < experts; e += Block::size()) {
        int32_t total = 0;
        for (int first = 0; first < share_count; first += kTalliesAtOnce) {
            int32_t counts[kTalliesAtOnce];
            EP_UNROLL
            for (int i = 0; i < kTalliesAtOnce; ++i)
                counts[i] = first + i < share_count ? tallies[size_t(first + i) * experts + e] : 0;
            EP_UNROLL
            for (int i = 0; i < kTalliesAtOnce; ++i) {
                if (first + i < share_count) tallies[size_t(first + i) * experts + e] = total;
                total += counts[i];
            }
        }
        if (is_active(r, e / per_rank))
            publish(layout.count(r.windows[e / per_rank], epoch, r.rank, e % per_rank),
                    Signal::pack(epoch, total));
    }
    for (int peer = Block::rank(); peer < layout.shape.rank_count; peer += Block::size())
        if (is_active(r, peer))
            publish(layout.token_count(r.windows[peer], epoch, r.rank),
                    Signal::pack(epoch, r.token_count));
}

// Gives a warp's choices, one a lane, their numbers, in the order of the lanes.
EP_DEVICE void number_choices(const Round &r, int32_t choice, int i, int32_t *tally) {
    const Equals same = Warp::equals(choice);
    const int32_t next = choice >= 0 ? tally[choice] : 0;
    if (choice >= 0) r.routing.positions[i] = next + same.lower;
    Warp::sync();
    if (choice >= 0 && same.lower == 0) tally[choice] = next + same.total;
    Warp::sync();
}

// Numbers one share from the first numbers in `tally` on. One warp.
EP_DEVICE void number_share(const Round &r, Share share, int32_t *tally) {
    for (int first = share.begin; first < share.end; first += kChoicesAtOnce * Warp::size()) {
        int32_t choices[kChoicesAtOnce];
        EP_UNROLL
        for (int j = 0; j < kChoicesAtOnce; ++j) {
            const int i = first + j * Warp::size() + Warp::rank();
            choices[j] = i < share.end ? r.routing.choices[i] : Routing::kNoChoice;
        }
        EP_UNROLL
        for (int j = 0; j < kChoicesAtOnce; ++j)
            number_choices(r, choices[j], first + j * Warp::size() + Warp::rank(), tally);
    }
}

EP_DEVICE void open_round(const Round &r) {
    if (Block::rank() == 0) r.routing.state->dispatch_epoch = ++r.state->dispatch_epoch;
}

// One block does all the counting. Also opens the round: all after it reads the handle's epoch.
EP_KERNEL dispatch_count(const DispatchArgs a) {
    const Round &r = a.round;
    const int experts = r.layout.shape.expert_count, choice_count = r.token_count * r.topk;
    const int shares = Share::count(choice_count, Warp::count_in_block());
    const Share share = Share::of(Warp::index_in_block(), shares, choice_count);
    int32_t *tally = a.tally + size_t(Warp::index_in_block()) * experts;
    open_round(r);
    for (int e = Block::rank(); e < shares * experts; e += Block::size())
        a.tally[e] = 0;
    Block::sync();
    count_share(a, share, tally);
    Block::sync();
    publish_counts(a, r.routing.state->dispatch_epoch, a.tally, shares);
    Block::sync();
    number_share(r, share, tally);
}

// With many choices the whole grid counts, in three launches: one warp a share...
EP_KERNEL dispatch_tally(const DispatchArgs a) {
    const Round &r = a.round;
    const int experts = r.layout.shape.expert_count, choice_count = r.token_count * r.topk;
    const int shares = Share::count(choice_count, kShareCountMax);
    for (int i = grid_index<Warp>(); i < shares; i += grid_count<Warp>()) {
        int32_t *tally = a.tally + size_t(i) * experts;
        for (int e = Warp::rank(); e < experts; e += Warp::size())
            tally[e] = 0;
        Warp::sync();
        count_share(a, Share::of(i, shares, choice_count), tally);
    }
}

// ... one block that opens the round and publishes the totals...
EP_KERNEL dispatch_publish(const DispatchArgs a) {
    const Round &r = a.round;
    open_round(r);
    Block::sync();
    publish_counts(a, r.routing.state->dispatch_epoch, a.tally,
                   Share::count(r.token_count * r.topk, kShareCountMax));
}

// ... and again one warp a share.
EP_KERNEL dispatch_number(const DispatchArgs a) {
    const Round &r = a.round;
    const int choice_count = r.token_count * r.topk;
    const int shares = Share::count(choice_count, kShareCountMax);
    for (int i = grid_index<Warp>(); i < shares; i += grid_count<Warp>())
        number_share(r, Share::of(i, shares, choice_count),
                     a.tally + size_t(i) * r.layout.shape.expert_count);
}

// Copies or casts a token's row to each target.
template <bool kCast, Element kType>
EP_DEVICE void put_row(const DispatchArgs &a, int token, const RowTargets &to) {
    const char *row = a.x + token * a.x_stride;
    const int hidden = a.round.hidden;
    if constexpr (kCast) {
        cast_fan_out<kType>(to, row, hidden, a.quant == Quant::kFp8Pow2);
    } else {
        fan_out<Block>(to.row, to.count, row, size_t(hidden) * element_bytes(kType),
                       a.round.caching);
        if constexpr (kType == Element::kFp8) {
            const float *scales = a.x_scales.data + token * a.x_scales.row_stride;
            for (int g = Block::rank(); g < hidden / kScaleGroup; g += Block::size())
                for (int i = 0; i < to.count; ++i)
                    to.scales[i][g * to.scale_stride] = scales[g * a.x_scales.group_stride];
        }
    }
}

// Writes the entries of a message; returns how many there are.
EP_DEVICE int put_entries(const DispatchArgs &a, int token, ExpertRange range, Entry *entries) {
    const Round &r = a.round;
    const int32_t *choices = r.routing.choices + token * r.topk;
    const int32_t *positions = r.routing.positions + token * r.topk;
    const float *weights = a.topk_weights == nullptr ? nullptr : a.topk_weights + token * r.topk;
    for (int k = Block::rank(); k < r.topk; k += Block::size())
        if (range.has(choices[k]))
            entries[entries_before(choices, k, range)] = {
                choices[k] - range.first, positions[k], merged_weight(choices, weights, k, r.topk),
                0};
    return entries_before(choices, r.topk, range);
}

// The messages of one token that wait for its row.
struct Outbox {
    RowTargets to;
    uint64_t *flag[kFanOut];
    uint64_t signal[kFanOut];
};

template <bool kCast, Element kType>
EP_DEVICE void flush(const DispatchArgs &a, int token, Outbox *outbox) {
    put_row<kCast, kType>(a, token, outbox->to);
    publish_all<Block>(outbox->flag, outbox->signal, outbox->to.count);
    outbox->to.count = 0;
}

// One block per token. A rank that the token does not go to gets an empty message, so that nobody
// has to be told how many messages there are.
template <bool kCast, Element kType>
EP_KERNEL dispatch_send(const DispatchArgs a) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const uint64_t epoch = r.routing.state->dispatch_epoch;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kCast ? Element::kFp8 : kType);
    for (int token = grid_index<Block>(); token < r.token_count; token += grid_count<Block>()) {
        Outbox outbox;
        outbox.to.count = 0;
        outbox.to.scale_stride = 1;
        for (int step = 1; step < layout.shape.rank_count; ++step) {
            const int peer = (r.rank + step) % layout.shape.rank_count;
            if (!Block::all(is_active(r, peer))) continue;
            char *message = layout.message(r.windows[peer], epoch, peer, r.rank, token);
            const int count =
                put_entries(a, token, ExpertRange::of(layout, peer), Layout::entries(message));
            if (count == 0) {
                if (Block::rank() == 0) publish(Layout::flag(message), Signal::pack(epoch, 0));
                continue;
            }
            const int i = outbox.to.count++;
            outbox.to.row[i] = layout.payload(message);
            outbox.to.scales[i] = reinterpret_cast<float *>(layout.payload(message) + row_bytes);
            outbox.flag[i] = Layout::flag(message);
            outbox.signal[i] = Signal::pack(epoch, count);
            if (outbox.to.count == kFanOut) flush<kCast, kType>(a, token, &outbox);
        }
        if (outbox.to.count > 0) flush<kCast, kType>(a, token, &outbox);
    }
}

// A count from `source`, kept where publish_begins finds it; a limit it breaks masks the source.
EP_DEVICE int32_t await_count(const Wait &wait, const uint64_t *word, uint64_t epoch, int source) {
    const Round &r = wait.round;
    uint64_t signal;
    if (!wait.until<Thread>(word, epoch, source, &signal)) return 0;
    if (Signal::value(signal) <= r.layout.shape.token_count_max) return Signal::value(signal);
    fetch_add(&r.state->invalid_messages, uint64_t{1});
    store(&r.active[source], 0);
    return 0;
}

// One thread per local expert: where each source's rows begin.
EP_DEVICE void publish_begins(const DispatchArgs &a, int expert) {
    const Round &r = a.round;
    const int ranks = r.layout.shape.rank_count;
    int32_t *begins = r.routing.begins + size_t(expert) * (ranks + 1);
    int32_t begin = 0;
    for (int source = 0; source < ranks; ++source) {
        const int32_t count = r.routing.token_counts[source] > 0 ? begins[source] : 0;
        begins[source] = begin;
        if (a.out_layout_range != nullptr)
            a.out_layout_range[size_t(expert) * ranks + source] = int64_t{begin} << 32 | count;
        begin += count;
    }
    begins[ranks] = begin;
    a.out_count[expert] = begin;
}

// One block.
EP_KERNEL dispatch_layout(const DispatchArgs a) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const int ranks = layout.shape.rank_count, experts = layout.local_expert_count;
    const uint64_t epoch = r.routing.state->dispatch_epoch;
    char *window = r.windows[r.rank];
    const Wait wait(r);
    for (int source = Block::rank(); source < ranks; source += Block::size())
        r.routing.token_counts[source] =
            await_count(wait, layout.token_count(window, epoch, source), epoch, source);
    for (int i = Block::rank(); i < ranks * experts; i += Block::size()) {
        const int source = i / experts, expert = i % experts;
        r.routing.begins[size_t(expert) * (ranks + 1) + source] =
            await_count(wait, layout.count(window, epoch, source, expert), epoch, source);
    }
    Block::sync();
    for (int source = Block::rank(); source < ranks; source += Block::size())
        if (!is_active(r, source)) r.routing.token_counts[source] = 0;
    Block::sync();
    for (int expert = Block::rank(); expert < experts; expert += Block::size())
        publish_begins(a, expert);
}

// Where an entry of `source` goes: a row counted over all experts' regions, or -1 if the entry
// breaks a limit, which only a faulty peer's can.
EP_DEVICE int32_t row_of(const Round &r, int source, const Entry &entry) {
    const int ranks = r.layout.shape.rank_count;
    if (entry.local_expert < 0 || entry.local_expert >= r.layout.local_expert_count) return -1;
    const int32_t *begins = r.routing.begins + size_t(entry.local_expert) * (ranks + 1);
    if (entry.position < 0 || entry.position >= begins[source + 1] - begins[source]) return -1;
    return entry.local_expert * ranks * r.layout.shape.token_count_max + begins[source] +
           entry.position;
}

// What the threads of a block know together of the token that they receive.
struct Arrival {
    int32_t rows[kTopkMax];  // of its entries, counted over all experts' regions; -1: none
    int count;
};

// Remembers one entry of a token, for combine and in `arrival`. By value: what lies in a window may
// change between the check and the use.
EP_DEVICE void keep_entry(const DispatchArgs &a, int source, int token, int index, Entry entry,
                          Arrival *arrival) {
    const Round &r = a.round;
    const size_t slot = size_t(source) * r.layout.shape.token_count_max + token;
    const size_t at = slot * r.layout.shape.topk_max + index;
    const int32_t row = row_of(r, source, entry);
    if (row < 0) fetch_add(&r.state->invalid_messages, uint64_t{1});
    arrival->rows[index] = row;
    r.routing.rows[at] = row;
    r.routing.weights[at] = entry.weight;
    if (row >= 0 && a.out_src_info != nullptr) a.out_src_info[row] = token;
}

// This rank's own token: no message, straight from its choices. The whole block.
EP_DEVICE void keep_own(const DispatchArgs &a, int token, Arrival *arrival) {
    const Round &r = a.round;
    const ExpertRange range = ExpertRange::of(r.layout, r.rank);
    const int32_t *choices = r.routing.choices + token * r.topk;
    const float *weights = a.topk_weights == nullptr ? nullptr : a.topk_weights + token * r.topk;
    for (int k = Block::rank(); k < r.topk; k += Block::size())
        if (range.has(choices[k]))
            keep_entry(a, r.rank, token, entries_before(choices, k, range),
                       {choices[k] - range.first, r.routing.positions[token * r.topk + k],
                        merged_weight(choices, weights, k, r.topk), 0},
                       arrival);
    if (Block::rank() == 0) arrival->count = entries_before(choices, r.topk, range);
}

// Waits for a token's message; nothing of it arrives if its source has failed. The first warp.
EP_DEVICE void keep_message(const DispatchArgs &a, const Wait &wait, int source, int token,
                            char *message, Arrival *arrival) {
    const Round &r = a.round;
    uint64_t signal;
    int count = 0;
    if (wait.until<Warp>(Layout::flag(message), r.routing.state->dispatch_epoch, source, &signal))
        count = Signal::value(signal);
    if (count > r.layout.shape.topk_max) {
        if (Warp::rank() == 0) fetch_add(&r.state->invalid_messages, uint64_t{1});
        count = 0;
    }
    for (int i = Warp::rank(); i < count; i += Warp::size())
        keep_entry(a, source, token, i, Layout::entries(message)[i], arrival);
    if (Warp::rank() == 0) arrival->count = count;
}

// The rows of at most kFanOut entries from *next on, as places in the outputs.
EP_DEVICE RowTargets next_targets(const DispatchArgs &a, const Arrival &arrival, int *next) {
    const Round &r = a.round;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(a.out_type());
    const int region = r.layout.shape.rank_count * r.layout.shape.token_count_max;
    RowTargets to;
    to.count = 0;
    to.scale_stride = a.out_scales.group_stride;
    while (*next < arrival.count && to.count < kFanOut) {
        const int32_t row = arrival.rows[(*next)++];
        if (row < 0) continue;
        to.row[to.count] = a.out_x + row * row_bytes;
        to.scales[to.count++] = a.out_scales.data + row / region * a.out_scales.expert_stride +
                                row % region * a.out_scales.row_stride;
    }
    return to;
}

// Copies an arrived row, and its scales, to each target.
template <Element kOut>
EP_DEVICE void unpack_row(const DispatchArgs &a, const char *payload, const RowTargets &to) {
    const size_t row_bytes = size_t(a.round.hidden) * element_bytes(kOut);
    fan_out<Block>(to.row, to.count, payload, row_bytes, a.round.caching);
    if constexpr (kOut == Element::kFp8) {
        const auto *scales = reinterpret_cast<const float *>(payload + row_bytes);
        for (int g = Block::rank(); g < a.round.hidden / kScaleGroup; g += Block::size())
            for (int i = 0; i < to.count; ++i)
                to.scales[i][g * to.scale_stride] = scales[g];
    }
}

// One block per (source, token), this rank's own first: they are at hand while others travel.
template <bool kCast, Element kType>
EP_KERNEL dispatch_receive(const DispatchArgs a) {
    EP_SHARED(Arrival, arrival);
    const Round &r = a.round;
    const int ranks = r.layout.shape.rank_count, slots = r.layout.shape.token_count_max;
    const uint64_t epoch = r.routing.state->dispatch_epoch;
    const Wait wait(r);
    for (int i = grid_index<Block>(); i < ranks * slots; i += grid_count<Block>()) {
        const int source = (r.rank + i / slots) % ranks, token = i % slots;
        if (token >= r.routing.token_counts[source]) continue;
        const bool own = source == r.rank;
        char *message =
            own ? nullptr : r.layout.message(r.windows[r.rank], epoch, r.rank, source, token);
        if (own)
            keep_own(a, token, &arrival);
        else if (Warp::index_in_block() == 0)
            keep_message(a, wait, source, token, message, &arrival);
        Block::sync();
        if (Block::rank() == 0)
            r.routing.row_counts[size_t(source) * slots + token] = arrival.count;
        for (int next = 0; next < arrival.count;) {
            const RowTargets to = next_targets(a, arrival, &next);
            if (own)
                put_row<kCast, kType>(a, token, to);
            else
                unpack_row<kCast ? Element::kFp8 : kType>(a, r.layout.payload(message), to);
        }
        Block::sync();  // before the next token's arrival takes the place of this one's
    }
}

inline void launch_dispatch_count(const DispatchArgs &args, const Queue &queue) {
    const int choice_count = args.round.token_count * args.round.topk;
    if (choice_count <= kOneBlockChoiceCountMax) launch_one(dispatch_count, args, queue);
    if constexpr (kOneBlockChoiceCountMax != kNoLimit) {
        if (choice_count <= kOneBlockChoiceCountMax && !queue.load_only) return;
        const int shares = Share::count(choice_count, kShareCountMax);
        launch_all(dispatch_tally, args, queue, shares);
        launch_one(dispatch_publish, args, queue);
        launch_all(dispatch_number, args, queue, shares);
    }
}

template <bool kCast, Element kType>
int launch_dispatch_send(const DispatchArgs &args, const Queue &queue) {
    launch_dispatch_count(args, queue);
    launch_all(dispatch_send<kCast, kType>, args, queue, args.round.token_count);
    return launch_error();
}

template <bool kCast, Element kType>
int launch_dispatch_receive(const DispatchArgs &args, const Queue &queue) {
    launch_one(dispatch_layout, args, queue);
    const Shape &shape = args.round.layout.shape;
    launch_all(dispatch_receive<kCast, kType>, args, queue,
               shape.rank_count * shape.token_count_max);
    return launch_error();
}

// Launchers for each type of x that is copied, and for each that is cast.
inline int launch_dispatch_send(const DispatchArgs &args, const Queue &queue) {
    const bool cast = args.quant != Quant::kNone;
    switch (args.x_type) {
        case Element::kBf16:
            return cast ? launch_dispatch_send<true, Element::kBf16>(args, queue)
                        : launch_dispatch_send<false, Element::kBf16>(args, queue);
        case Element::kFp16:
            return cast ? launch_dispatch_send<true, Element::kFp16>(args, queue)
                        : launch_dispatch_send<false, Element::kFp16>(args, queue);
        case Element::kFp32:
            return cast ? launch_dispatch_send<true, Element::kFp32>(args, queue)
                        : launch_dispatch_send<false, Element::kFp32>(args, queue);
        default:
            return launch_dispatch_send<false, Element::kFp8>(args, queue);
    }
}

inline int launch_dispatch_receive(const DispatchArgs &args, const Queue &queue) {
    const bool cast = args.quant != Quant::kNone;
    switch (args.x_type) {
        case Element::kBf16:
            return cast ? launch_dispatch_receive<true, Element::kBf16>(args, queue)
                        : launch_dispatch_receive<false, Element::kBf16>(args, queue);
        case Element::kFp16:
            return cast ? launch_dispatch_receive<true, Element::kFp16>(args, queue)
                        : launch_dispatch_receive<false, Element::kFp16>(args, queue);
        case Element::kFp32:
            return cast ? launch_dispatch_receive<true, Element::kFp32>(args, queue)
                        : launch_dispatch_receive<false, Element::kFp32>(args, queue);
        default:
            return launch_dispatch_receive<false, Element::kFp8>(args, queue);
    }
}

}  // namespace ep::EP_DEVICE_NAMESPACE
