// What RECEIVE of dispatch does at its end if a source was lost between its counts and the last of
// its rows: takes all its rows out and moves up those behind them, as if it had been masked before.
// So counts are true, and combine, which sends a masked rank nothing, finds nothing of it. Rare, so
// one block does it all, once every other has placed its rows.
#pragma once

#include "device/device.h"
#include "kernels/count.h"
#include "kernels/kernels.h"
#include "kernels/place.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

EP_DEVICE void note_lost(const Round &r, uint64_t epoch, int source) {
    post(&r.routing.lost[source], epoch);
}
EP_DEVICE bool is_lost(const Round &r, uint64_t epoch, int source) {
    return look(&r.routing.lost[source]) == epoch;
}

// Where the rows of a source began; of rank_count: where the last ended. By flag; whoever asks
// comes after the counter.
struct DecidedBegins {
    const Round &round;

    EP_DEVICE int operator()(int expert, int source) const {
        const size_t of_expert = size_t(expert) * (round.layout.shape.rank_count + 1);
        return Signal::value(look(&round.routing.begins[of_expert + source]));
    }
};

// ---- Rows ---------------------------------------------------------------------------------------

template <class Begins>
EP_DEVICE int rows_left_out_before(const Round &r, uint64_t epoch, int expert, int source,
                                   const Begins &begins) {
    int count = 0;
    for (int other = 0; other < source; ++other)
        if (is_lost(r, epoch, other)) count += begins(expert, other + 1) - begins(expert, other);
    return count;
}

// Tells combine where the rows are from now on. A block.
template <class Begins>
EP_DEVICE void renumber_rows(const Round &r, uint64_t epoch, const Begins &begins) {
    const Shape &shape = r.layout.shape;
    const int region = shape.rank_count * shape.token_count_max;
    for (int source = 0; source < shape.rank_count; ++source) {
        if (is_lost(r, epoch, source)) continue;
        const int tokens = Signal::value(look(&r.routing.token_counts[source]));
        for (int token = Block::rank(); token < tokens; token += Block::size()) {
            const size_t slot = size_t(source) * shape.token_count_max + token;
            int32_t *rows = r.routing.rows + slot * shape.topk_max;
            for (int i = 0; i < r.routing.row_counts[slot]; ++i)
                if (rows[i] >= 0)
                    rows[i] -= rows_left_out_before(r, epoch, rows[i] / region, source, begins);
        }
    }
}

// Moves `count` rows from one place down to another, by the whole block, several rows at once. Of
// any two rows a thread reads and writes the same places, so that none has to wait for another.
EP_DEVICE void move_rows_down(const DispatchArgs &a, int32_t from, int32_t to, int count) {
    constexpr int kRows = kWarpSize == 1 ? 1 : 4;
    const Element type = a.out_type();
    const int vectors =
        static_cast<int>(size_t(a.round.hidden) * element_bytes(type) / sizeof(Vector));
    for (int first = 0; first < count; first += kRows)
        for (int v = Block::rank(); v < vectors; v += Block::size()) {
            Vector loaded[kRows] = {};
            EP_UNROLL
            for (int i = 0; i < kRows; ++i)
                if (first + i < count)
                    loaded[i] = reinterpret_cast<Vector *>(place_of(a, from + first + i).row)[v];
            EP_UNROLL
            for (int i = 0; i < kRows; ++i)
                if (first + i < count)
                    reinterpret_cast<Vector *>(place_of(a, to + first + i).row)[v] = loaded[i];
        }
    const int groups = type == Element::kFp8 ? a.round.hidden / kScaleGroup : 0;
    for (int i = 0; i < count; ++i) {
        const Target source = place_of(a, from + i), target = place_of(a, to + i);
        for (int g = Block::rank(); g < groups; g += Block::size())
            target.scales[g * target.scale_stride] = source.scales[g * source.scale_stride];
    }
}

// The same of what out_src_info says of them.
EP_DEVICE void move_sources_down(int32_t *tokens, int32_t from, int32_t to, int count) {
    for (int first = 0; first < count; first += Block::size()) {
        const int i = first + Block::rank();
        const int32_t token = i < count ? tokens[from + i] : 0;
        Block::sync();
        if (i < count) tokens[to + i] = token;
        Block::sync();
    }
}

// The whole block.
template <class Begins>
EP_DEVICE void close_gaps(const DispatchArgs &a, uint64_t epoch, int expert, const Begins &begins) {
    const Round &r = a.round;
    const int ranks = r.layout.shape.rank_count;
    const int first = expert * ranks * r.layout.shape.token_count_max;
    int at = 0;
    for (int source = 0; source < ranks; ++source) {
        const int begin = begins(expert, source), told = begins(expert, source + 1) - begin;
        const int count = is_lost(r, epoch, source) ? 0 : told;
        if (begin != at) {
            move_rows_down(a, first + begin, first + at, count);
            if (a.out_src_info != nullptr)
                move_sources_down(a.out_src_info, first + begin, first + at, count);
        }
        if (Block::rank() == 0) {
            count_received(r, source, count - told);
            if (a.out_layout_range != nullptr)
                a.out_layout_range[size_t(expert) * ranks + source] = int64_t{at} << 32 | count;
        }
        at += count;
    }
    if (Block::rank() != 0) return;
    a.out_count[expert] = at;
    count_expert(r, expert, at - begins(expert, ranks));
}

// One block, alone.
template <class Begins>
EP_DEVICE void leave_out_lost(const DispatchArgs &a, uint64_t epoch, const Begins &begins) {
    const Round &r = a.round;
    renumber_rows(r, epoch, begins);
    for (int expert = 0; expert < r.layout.local_expert_count; ++expert)
        close_gaps(a, epoch, expert, begins);
    for (int source = Block::rank(); source < r.layout.shape.rank_count; source += Block::size())
        if (is_lost(r, epoch, source))
            post(&r.routing.token_counts[source], Signal::pack(epoch, 0));
}

// ---- When ---------------------------------------------------------------------------------------

EP_DEVICE bool has_lost(const Round &r, uint64_t epoch) {
    bool any = false;
    for (int source = 0; source < r.layout.shape.rank_count; ++source)
        any = any || is_lost(r, epoch, source);
    return any;
}

// Whether all tickets of a launch have been handed in, where each launch hands in kTicketsOfRound.
EP_DEVICE bool are_all(uint64_t tickets) {
    return tickets % BufferState::kTicketsOfRound == 0;
}

// Ends a block of a launch that receives, where blocks run beside each other, and nobody shall wait
// for the answer to a ticket: of those in which a thread has `missed` a message, one waits for all
// others.
template <class Begins>
EP_DEVICE void end_beside_others(const DispatchArgs &a, uint64_t epoch, uint64_t *tickets,
                                 bool missed, const Begins &begins) {
    BufferState *state = a.round.state;
    const uint64_t mine = tickets_of_block();
    if (block_any(missed) && block_any(Block::rank() == 0 && swap(&state->repairs, 1) == 0)) {
        for (uint32_t attempt = 0; !are_all(look(tickets) + mine); ++attempt)
            pause(attempt);
        after_leavers(tickets);
        leave_out_lost(a, epoch, begins);
        Block::sync();
        if (Block::rank() == 0) store(&state->repairs, 0);  // nobody else asks in this launch
    }
    if (Block::rank() == 0) leave(tickets, mine);
}

// The same elsewhere: the last block looks whether one has.
template <class Begins>
EP_DEVICE void end_among_others(const DispatchArgs &a, uint64_t epoch, uint64_t *tickets,
                                const Begins &begins) {
    const uint64_t mine = tickets_of_block();
    before_publish<Block>();
    if (!block_any(Block::rank() == 0 && are_all(leave(tickets, mine) + mine))) return;
    after_leavers(tickets);
    if (has_lost(a.round, epoch)) leave_out_lost(a, epoch, begins);
}

template <class Begins>
EP_DEVICE void end_receiving(const DispatchArgs &a, uint64_t epoch, bool missed,
                             const Begins &begins) {
    const Round &r = a.round;
    uint64_t *tickets = r.sends() ? &r.state->dispatch_tickets : &r.state->receive_tickets;
    if constexpr (kRolesApart)
        end_beside_others(a, epoch, tickets, missed, begins);
    else
        end_among_others(a, epoch, tickets, begins);
}

}  // namespace ep::EP_DEVICE_NAMESPACE
