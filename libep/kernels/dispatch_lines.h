// dispatch where messages go by line (kernels/lines.h): small rounds, whose time is a chain of
// dependent steps rather than bytes. The roles are those of kernels/dispatch.h, but
//
//   * a warp moves a part of a row. What it has read once goes to the peers and, from the same
//     registers, to this rank's own experts;
//   * the blocks of a chunk keep its choices and their numbers in the memory that they share;
//   * each block works out by itself, from all counts, where the rows of each source begin. The
//     counter only says whose counts are valid, so all blocks agree.
#pragma once

#include "device/device.h"
#include "kernels/count.h"
#include "kernels/kernels.h"
#include "kernels/lines.h"
#include "kernels/place.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

// What the lanes of a warp share.
struct LineWarpShared {
    int32_t rows[kTopkMax];   // where the entries of the message at hand go; -1: nowhere
    Entry entries[kTopkMax];  // of the message whose head is sent
};

// What the threads of a block share.
struct LineDispatchShared {
    int32_t sums[kSharedExpertCountMax];  // of each expert: its choices so far
    int32_t begins[2 * kSharedExpertCountMax];  // [source, then the end][local expert]
    int32_t tokens[kLineRankCountMax];          // of each source; 0 if it is masked
    int32_t active[kLineRankCountMax], lost[kLineRankCountMax];
    int16_t choices[kLineChoiceCountMax + 1];  // [token of the chunk][topk]
    int16_t positions[kLineChoiceCountMax + 1];
    LineWarpShared warps[kWarpsOfBlockMax];
};

// ---- Counting -----------------------------------------------------------------------------------

// Clears the sums, and learns who takes part. The whole block.
EP_DEVICE void prepare(const Round &r, LineDispatchShared *shared) {
    for (int e = Block::rank(); e < r.layout.shape.expert_count; e += Block::size())
        shared->sums[e] = 0;
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size()) {
        shared->active[peer] = is_active(r, peer);
        shared->lost[peer] = 0;
    }
    Block::sync();
}

// Tells every rank how many tokens this one has, and how many for each of its experts. The counter.
EP_DEVICE void tell_counts(const DispatchArgs &a, uint64_t epoch, LineDispatchShared *shared) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const int per_rank = layout.local_expert_count;
    tally_choices(a, r.token_count, shared->sums);
    for (int peer = Block::rank(); peer < layout.shape.rank_count; peer += Block::size())
        if (shared->active[peer] != 0)
            post(layout.token_count(r.window(peer), epoch, r.rank),
                 Signal::pack(epoch, r.token_count));
    Block::sync();
    for (int e = Block::rank(); e < layout.shape.expert_count; e += Block::size()) {
        const int peer = e / per_rank;
        if (shared->active[peer] != 0)
            post(layout.count(r.window(peer), epoch, r.rank, e - peer * per_rank),
                 Signal::pack(epoch, shared->sums[e]));
    }
    if (Block::rank() == 0) r.routing.state->dispatch_epoch = epoch;
}

// From counts [source][expert], where each source's rows begin, in their place. The whole block.
EP_DEVICE void add_up_begins(const Round &r, int32_t *begins) {
    const int ranks = r.layout.shape.rank_count, experts = r.layout.local_expert_count;
    for (int e = Block::rank(); e < experts; e += Block::size()) {
        int begin = 0;
        for (int source = 0; source < ranks; ++source) {
            const int count = begins[source * experts + e];
            begins[source * experts + e] = begin;
            begin += count;
        }
        begins[ranks * experts + e] = begin;
    }
    Block::sync();
}

// Waits for all counts, and says whose are valid. The counter.
EP_DEVICE void decide_sources(const DispatchArgs &a, uint64_t epoch, LineDispatchShared *shared) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const int ranks = layout.shape.rank_count, experts = layout.local_expert_count;
    char *window = r.window(r.rank);
    const Wait wait(r);
    const auto count_of = [&](int source, int index) {
        const int count = await_count(wait, layout.count(window, epoch, source, index), epoch,
                                      source);
        if (count < 0) fetch_add(&shared->lost[source], 1);
        return count < 0 ? 0 : count;
    };
    for (int i = Block::rank(); i < ranks * experts; i += Block::size()) {
        const int source = i / experts;
        shared->begins[i] = count_of(source, i - source * experts);
    }
    for (int source = Block::rank(); source < ranks; source += Block::size())
        shared->tokens[source] = count_of(source, experts);
    Block::sync();
    for (int source = Block::rank(); source < ranks; source += Block::size()) {
        const int tokens = shared->lost[source] == 0 ? shared->tokens[source] : 0;
        post(&r.routing.token_counts[source], Signal::pack(epoch, tokens));
    }
    for (int e = Block::rank(); e < experts; e += Block::size()) {
        int begin = 0;
        for (int source = 0; source < ranks; ++source) {
            const bool counts = shared->lost[source] == 0 && shared->tokens[source] != 0;
            const int count = counts ? shared->begins[source * experts + e] : 0;
            if (a.out_layout_range != nullptr)
                a.out_layout_range[size_t(e) * ranks + source] = int64_t{begin} << 32 | count;
            begin += count;
        }
        a.out_count[e] = begin;
    }
}

// A count from a source, once the counter has decided about it. Which checked its limit, but a
// window may change.
EP_DEVICE int decided_count(const Round &r, uint64_t epoch, int source, const uint64_t *word) {
    for (uint32_t attempt = 0;; ++attempt) {
        const uint64_t tokens = look(&r.routing.token_counts[source]), count = look(word);
        if (Signal::is_of(tokens, epoch)) {
            if (Signal::value(tokens) == 0) return 0;
            if (Signal::is_of(count, epoch))
                return Signal::value(count) <= r.layout.shape.token_count_max ? Signal::value(count)
                                                                              : 0;
        }
        pause(attempt);
    }
}

// Learns where the rows of each source begin. The whole block, but the counter's.
EP_DEVICE void await_begins(const Round &r, uint64_t epoch, LineDispatchShared *shared) {
    const int ranks = r.layout.shape.rank_count, experts = r.layout.local_expert_count;
    char *window = r.window(r.rank);
    for (int i = Block::rank(); i < ranks * experts; i += Block::size()) {
        const int source = i / experts;
        shared->begins[i] = decided_count(
            r, epoch, source, r.layout.count(window, epoch, source, i - source * experts));
    }
    for (int source = Block::rank(); source < ranks; source += Block::size())
        shared->tokens[source] = decided(&r.routing.token_counts[source], epoch);
    Block::sync();
    add_up_begins(r, shared->begins);
}

// ---- Chunks -------------------------------------------------------------------------------------

// A chunk of tokens, and this warp among those of the blocks that share it.
struct LineChunk {
    Chunk tokens;
    int warp, warp_count;
    bool first_block;  // the one that remembers choices for later launches

    EP_DEVICE static LineChunk of(const Round &r, int sender) {
        const int share = sender % r.senders_of_chunk;
        return {Chunk::of(sender / r.senders_of_chunk, r.sender_block_count / r.senders_of_chunk,
                          r.token_count),
                Warp::index_in_block() * r.senders_of_chunk + share,
                Warp::count_in_block() * r.senders_of_chunk, share == 0};
    }
    EP_DEVICE int token_count() const { return tokens.end - tokens.begin; }
};

// Learns a chunk's choices, and counts those before it. The whole block.
EP_DEVICE void learn_choices(const DispatchArgs &a, const LineChunk &chunk,
                             LineDispatchShared *shared) {
    const Round &r = a.round;
    const int begin = chunk.tokens.begin * r.topk;
    prepare(r, shared);
    each_choice(a, 0, chunk.tokens.end, [&](int i, int32_t choice, int expert) {
        if (i < begin) {
            if (choice >= 0) fetch_add(&shared->sums[choice], 1);
            return;
        }
        shared->choices[i - begin] = static_cast<int16_t>(choice);
        if (!chunk.first_block) return;
        r.routing.choices[i] = choice;
        if (expert == kInvalidExpert) fetch_add(&r.state->invalid_expert_ids, uint64_t{1});
    });
    Block::sync();
}

// Numbers a chunk's choices. The whole block.
EP_DEVICE void number_line_chunk(const Round &r, const LineChunk &chunk,
                                 LineDispatchShared *shared) {
    const int begin = chunk.tokens.begin * r.topk;
    if (Warp::index_in_block() == 0)
        number_choices(shared->choices, chunk.token_count(), r.topk, shared->sums,
                       [&](int i, int32_t number) {
                           shared->positions[i] = static_cast<int16_t>(number);
                           if (chunk.first_block) r.routing.positions[begin + i] = number;
                       });
    Block::sync();
}

// The same of a chunk that a launch before has numbered. The whole block.
EP_DEVICE void recall_choices(const Round &r, const LineChunk &chunk, LineDispatchShared *shared) {
    const int begin = chunk.tokens.begin * r.topk, count = chunk.token_count() * r.topk;
    for (int i = Block::rank(); i < count; i += Block::size()) {
        shared->choices[i] = static_cast<int16_t>(r.routing.choices[begin + i]);
        shared->positions[i] = static_cast<int16_t>(r.routing.positions[begin + i]);
    }
    Block::sync();
}

// One token's choices, a lane each.
struct LaneChoice {
    int32_t expert;  // below 0: none, or a repeat
    int32_t position;

    EP_DEVICE static LaneChoice of(const Round &r, int index, const LineDispatchShared &shared) {
        if (Warp::rank() >= r.topk) return {Routing::kNoChoice, 0};
        const int i = index * r.topk + Warp::rank();
        return {shared.choices[i], shared.positions[i]};
    }
};

// ---- Sending ------------------------------------------------------------------------------------

// A part of a row on its way, first as it was read.
template <bool kCast, Element kType>
struct RowPart {
    Pieces pieces;

    EP_DEVICE void read(const DispatchArgs &a, int token, const Part &part) {
        load_part(part, a.x + token * a.x_stride, size_t(a.round.hidden) * element_bytes(kType),
                  &pieces);
        if constexpr (kType == Element::kFp8)
            load_part_scales(part, a.x_scales.data + token * a.x_scales.row_stride,
                             a.x_scales.group_stride, a.round.hidden / kScaleGroup, &pieces);
    }
    EP_DEVICE void finish(const DispatchArgs &, const Part &) {}
};
template <Element kType>
struct RowPart<true, kType> {
    Pieces pieces;
    UncastPart<kType> uncast;

    EP_DEVICE void read(const DispatchArgs &a, int token, const Part &part) {
        uncast = UncastPart<kType>::of(part, a.x + token * a.x_stride, a.round.hidden);
    }
    EP_DEVICE void finish(const DispatchArgs &a, const Part &part) {
        cast_part(part, uncast, a.quant == Quant::kFp8Pow2, &pieces);
    }
};

// Sends a part to the ranks of the token's experts. One warp.
EP_DEVICE void send_part(const DispatchArgs &a, uint64_t epoch, int token, int32_t expert,
                         const LineDispatchShared &shared, const Part &part,
                         const Pieces &pieces) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    for (int step = 1; step < layout.shape.rank_count; ++step) {
        const int rank = r.rank + step;
        const int peer = rank < layout.shape.rank_count ? rank : rank - layout.shape.rank_count;
        if (Warp::all(!ExpertRange::of(layout, peer).has(expert)) || shared.active[peer] == 0)
            continue;
        char *message = layout.message(r.window(peer), epoch, peer, r.rank, token);
        push_part(part, layout.payload(message), pieces, Signal::pack(epoch, 0));
    }
}

// The weight of this lane's choice.
EP_DEVICE float lane_weight(const DispatchArgs &a, int token, int index,
                            const LineDispatchShared &shared) {
    return merged_weight(shared.choices + index * a.round.topk, weights_of(a, token), Warp::rank(),
                         a.round.topk);
}

// Sends the head of one message, also of an empty one. `index`: of the token in its chunk. One
// warp.
EP_DEVICE void send_head(const DispatchArgs &a, uint64_t epoch, int token, int index, int peer,
                         LineDispatchShared *shared) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    if (shared->active[peer] == 0) return;
    Entry *entries = shared->warps[Warp::index_in_block()].entries;
    const ExpertRange range = ExpertRange::of(layout, peer);
    const LaneChoice choice = LaneChoice::of(r, index, *shared);
    const Votes had = Warp::count(range.has(choice.expert));
    if (range.has(choice.expert))
        entries[had.lower] = {choice.expert - range.first, choice.position,
                              lane_weight(a, token, index, *shared), 0};
    Warp::sync();
    const int at = LineLane::line() * Layout::kPiecesOfLine + LineLane::piece();
    Vector piece{};
    if (LineLane::has_signal())
        piece = {{Signal::pack(epoch, had.total), 0}};
    else if (at < had.total)
        piece = bit_cast<Vector>(entries[at]);
    const bool here = LineLane::line() < static_cast<int>(layout.head_bytes / Layout::kLineBytes);
    char *message = layout.message(r.window(peer), epoch, peer, r.rank, token);
    push(message + Warp::rank() * Layout::kPieceBytes, here, LineLane::has_signal(), piece);
    Warp::sync();  // before the next message's entries take the place of this one's
}

EP_DEVICE void send_heads(const DispatchArgs &a, uint64_t epoch, const LineChunk &chunk,
                          LineDispatchShared *shared) {
    const int ranks = a.round.layout.shape.rank_count, peers = ranks - 1;
    for (int i = chunk.warp; i < chunk.token_count() * peers; i += chunk.warp_count) {
        const int index = i / peers;
        send_head(a, epoch, chunk.tokens.begin + index, index,
                  (a.round.rank + 1 + i % peers) % ranks, shared);
    }
}

// ---- Placing ------------------------------------------------------------------------------------

// The row of an entry of `source`; -1 if the entry breaks a limit, which only a faulty peer's can.
EP_DEVICE int32_t line_row_of(const Round &r, int source, int expert, int position,
                              const LineDispatchShared &shared) {
    const int experts = r.layout.local_expert_count;
    if (expert < 0 || expert >= experts) return -1;
    const int32_t *begin = shared.begins + source * experts + expert;
    if (position < 0 || position >= begin[experts] - begin[0]) return -1;
    return expert * r.layout.shape.rank_count * r.layout.shape.token_count_max + begin[0] +
           position;
}

// Writes a part to the rows of its warp. One warp.
template <Element kOut>
EP_DEVICE void place_rows(const DispatchArgs &a, const int32_t *rows, int count,
                          const Part &part, const Pieces &pieces) {
    const size_t row_bytes = size_t(a.round.hidden) * element_bytes(kOut);
    for (int i = 0; i < count; ++i) {
        const Target to = place_of(a, rows[i]);
        if (to.row != nullptr)
            place_part<kOut == Element::kFp8>(part, pieces, row_bytes, to,
                                              a.round.hidden / kScaleGroup);
    }
}

// Remembers an entry for combine.
EP_DEVICE void keep_entry(const DispatchArgs &a, size_t slot, int token, int index, int32_t row,
                          float weight) {
    const Routing &routing = a.round.routing;
    const size_t at = slot * a.round.layout.shape.topk_max + index;
    routing.rows[at] = row;
    routing.weights[at] = weight;
    if (row < 0) fetch_add(&a.round.state->invalid_messages, uint64_t{1});
    if (row >= 0 && a.out_src_info != nullptr) a.out_src_info[row] = token;
}

EP_DEVICE size_t slot_of(const Round &r, int source, int token) {
    return size_t(source) * r.layout.shape.token_count_max + token;
}

// Places a part of this rank's own token; that of part 0 remembers it. One warp.
template <Element kOut>
EP_DEVICE void place_own_part(const DispatchArgs &a, int token, int index, const Part &part,
                              const Pieces &pieces, LineDispatchShared *shared) {
    const Round &r = a.round;
    int32_t *rows = shared->warps[Warp::index_in_block()].rows;
    const ExpertRange range = ExpertRange::of(r.layout, r.rank);
    const LaneChoice choice = LaneChoice::of(r, index, *shared);
    const bool own = range.has(choice.expert);
    const Votes had = Warp::count(own);
    const int32_t row =
        own ? line_row_of(r, r.rank, choice.expert - range.first, choice.position, *shared) : -1;
    if (own) rows[had.lower] = row;
    Warp::sync();
    place_rows<kOut>(a, rows, had.total, part, pieces);
    if (part.index == 0) {
        const size_t slot = slot_of(r, r.rank, token);
        if (own) keep_entry(a, slot, token, had.lower, row, lane_weight(a, token, index, *shared));
        if (Warp::rank() == 0) r.routing.row_counts[slot] = had.total;
    }
    Warp::sync();  // before the next token's rows take the place of this one's
}

// Sends a chunk, and places its tokens' rows on this rank. A warp's first part is read before all
// else, and sent before its token has numbers.
template <bool kCast, Element kType>
EP_DEVICE void send_line_chunk(const DispatchArgs &a, uint64_t epoch, int sender,
                               LineDispatchShared *shared) {
    const Round &r = a.round;
    constexpr Element kOut = kCast ? Element::kFp8 : kType;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kOut);
    const LineChunk chunk = LineChunk::of(r, sender);
    const int parts = Part::count(row_bytes), items = chunk.token_count() * parts;
    RowPart<kCast, kType> row{};
    const auto read = [&](int item) {
        row.read(a, chunk.tokens.begin + item / parts, Part(item % parts, row_bytes));
    };
    const auto send = [&](int item) {
        const Part part(item % parts, row_bytes);
        row.finish(a, part);
        const int index = item / parts;
        if (r.sends())
            send_part(a, epoch, chunk.tokens.begin + index,
                      LaneChoice::of(r, index, *shared).expert, *shared, part, row.pieces);
    };
    const auto place = [&](int item) {
        const int index = item / parts;
        place_own_part<kOut>(a, chunk.tokens.begin + index, index, Part(item % parts, row_bytes),
                             row.pieces, shared);
    };
    if (chunk.warp < items) read(chunk.warp);
    if (r.sends())
        learn_choices(a, chunk, shared);
    else
        recall_choices(r, chunk, shared);
    if (chunk.warp < items) send(chunk.warp);
    if (r.sends()) {
        number_line_chunk(r, chunk, shared);
        send_heads(a, epoch, chunk, shared);
    }
    if (r.receives()) {
        await_begins(r, epoch, shared);
        if (chunk.warp < items) place(chunk.warp);
    }
    for (int item = chunk.warp + chunk.warp_count; item < items; item += chunk.warp_count) {
        read(item);
        send(item);
        if (r.receives()) place(item);
    }
}

// ---- Receiving ----------------------------------------------------------------------------------

// Waits for a message's head, and for one part of its row unless the message is empty. Returns the
// number of entries: 0 also if the source has failed, -1 if it breaks a limit.
EP_DEVICE int await_part(const Wait &wait, uint64_t epoch, int source, int token,
                         const Part &part, Vector *head, Pieces *pieces) {
    const Round &r = wait.round;
    const Layout &layout = r.layout;
    char *message = layout.message(r.window(r.rank), epoch, r.rank, source, token);
    const char *const at[] = {message + Warp::rank() * Layout::kPieceBytes};
    const bool here[] = {LineLane::line() <
                         static_cast<int>(layout.head_bytes / Layout::kLineBytes)};
    bool has_head = false, has_part = false;
    for (uint32_t attempt = 0;; ++attempt) {
        if (!has_head) has_head = pull(at, here, LineLane::has_signal(), epoch, head);
        if (!has_part) has_part = pull_part(part, layout.payload(message), epoch, pieces);
        if (has_head) {
            const int count = entry_count(r, Warp::from(head->words[0], Layout::kPiecesOfLine));
            if (count <= 0 || has_part) return count;
        }
        if (!Warp::broadcast(int{is_active(r, source)})) return 0;
        wait.lapse<Warp>(source, attempt);
    }
}

// Waits for one part of a message, and places it; that of part 0 remembers it. One warp.
template <Element kOut>
EP_DEVICE void receive_part(const DispatchArgs &a, const Wait &wait, uint64_t epoch, int source,
                            int token, const Part &part, LineDispatchShared *shared) {
    const Round &r = a.round;
    int32_t *rows = shared->warps[Warp::index_in_block()].rows;
    Vector head{};
    Pieces pieces;
    const int said = await_part(wait, epoch, source, token, part, &head, &pieces);
    const int count = said < 0 ? 0 : said;
    const int index = LineLane::line() * Layout::kPiecesOfLine + LineLane::piece();
    const bool has_entry = !LineLane::has_signal() && index < count;
    const auto entry = bit_cast<Entry>(head);
    const int32_t row =
        has_entry ? line_row_of(r, source, entry.local_expert, entry.position, *shared) : -1;
    if (has_entry) rows[index] = row;
    Warp::sync();
    place_rows<kOut>(a, rows, count, part, pieces);
    if (part.index == 0) {
        const size_t slot = slot_of(r, source, token);
        if (has_entry) keep_entry(a, slot, token, index, row, entry.weight);
        if (Warp::rank() == 0) r.routing.row_counts[slot] = count;
        if (Warp::rank() == 0 && said < 0) fetch_add(&r.state->invalid_messages, uint64_t{1});
    }
    Warp::sync();  // before the next token's rows take the place of this one's
}

// The messages of all sources, a warp for each part, in about the order in which they are sent: of
// each chunk the first token, then of each the second.
template <Element kOut>
EP_DEVICE void receive_by_line(const DispatchArgs &a, uint64_t epoch, const Role &role,
                               LineDispatchShared *shared) {
    const Round &r = a.round;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kOut);
    const int ranks = r.layout.shape.rank_count, most = r.layout.shape.token_count_max;
    const int parts = Part::count(row_bytes), warps = Warp::count_in_block();
    const int chunks = most < r.chunk_count ? most : r.chunk_count;
    const Wait wait(r);
    await_begins(r, epoch, shared);
    const int items = (most + chunks - 1) / chunks * (ranks - 1) * chunks * parts;
    for (int i = Warp::index_in_block() * role.receiver_count + role.receiver; i < items;
         i += role.receiver_count * warps) {
        const int message = i / parts, index = message % chunks, in_step = message / chunks;
        const int source = (r.rank + 1 + in_step % (ranks - 1)) % ranks;
        const int tokens = shared->tokens[source], used = tokens < chunks ? tokens : chunks;
        if (index >= used) continue;
        const Chunk chunk = Chunk::of(index, used, tokens);
        const int token = chunk.begin + in_step / (ranks - 1);
        if (token < chunk.end)
            receive_part<kOut>(a, wait, epoch, source, token, Part(i % parts, row_bytes), shared);
    }
}

// ---- Roles --------------------------------------------------------------------------------------

template <bool kCast, Element kType>
EP_KERNEL dispatch_by_line(const DispatchArgs a) {
    after_launches_before();
    EP_SHARED(LineDispatchShared, shared);
    const Round &r = a.round;
    const Role role = Role::of(r);
    const uint64_t epoch = dispatch_epoch_of(r);
    if (role.counts) prepare(r, &shared);
    if (role.counts && r.sends()) tell_counts(a, epoch, &shared);
    if (role.counts && r.receives()) decide_sources(a, epoch, &shared);
    if (role.sender >= 0) send_line_chunk<kCast, kType>(a, epoch, role.sender, &shared);
    if (role.receiver >= 0 && r.receives())
        receive_by_line<kCast ? Element::kFp8 : kType>(a, epoch, role, &shared);
    if (r.sends()) hand_in(&r.state->dispatch_tickets);
}

// ---- Launching ----------------------------------------------------------------------------------

template <bool kCast, Element kType>
int launch_dispatch_by_line(DispatchArgs args, Phases phases, const Queue &queue) {
    Round &r = args.round;
    const Shape &shape = r.layout.shape;
    const int64_t parts =
        Part::count(size_t(r.hidden) * element_bytes(kCast ? Element::kFp8 : kType));
    // Several blocks for the parts of each token while there are blocks.
    const int tokens = r.token_count < 1 ? 1 : r.token_count;
    const int blocks = kBlocksOfProcessor * queue.block_count / tokens;
    const int useful = static_cast<int>(parts + kPartsOfBlock - 1) / kPartsOfBlock;
    r.senders_of_chunk = blocks < 1 ? 1 : blocks < useful ? blocks : useful;
    set_line_roles(&r, queue, tokens * parts, r.senders_of_chunk,
                   (shape.rank_count - 1) * shape.token_count_max * parts);
    launch_phases(dispatch_by_line<kCast, kType>, args, phases, queue);
    return launch_error();
}

}  // namespace ep::EP_DEVICE_NAMESPACE
