// dispatch where messages go by line (kernels/lines.h): small rounds, whose time is a chain of
// dependent steps rather than bytes. A block has a multiprocessor for itself, and a role:
//
//   counter    tells all ranks this one's counts; says whose counts are valid, when all have come
//   senders    send rows, parts of them by each warp, at once: that takes no numbers. They are few,
//              for what waits for the link holds up all that its multiprocessor does
//   receivers  number the choices of a chunk of this rank's tokens, send the heads of its messages,
//              and place its rows on this rank; then wait for messages, and place their rows
//
// Each receiver finds by itself the numbers of its chunk, and where the rows of each source begin,
// in the memory that its threads share. All roles go through one loop, so that there is one copy of
// each step.
#pragma once

#include "device/device.h"
#include "kernels/count.h"
#include "kernels/kernels.h"
#include "kernels/leave_out.h"
#include "kernels/lines.h"
#include "kernels/place.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

// What the lanes of a warp share, one after the other.
union LineWarpShared {
    Entry entries[kTopkMax];   // of the message whose head is sent
    Target targets[kTopkMax];  // where the entries of the token at hand go
};

// What the threads of a block share.
struct LineDispatchShared {
    int32_t sums[kSharedExpertCountMax];        // of each expert: its choices so far
    int32_t begins[2 * kSharedExpertCountMax];  // [source, then the end][local expert]
    int32_t tokens[kLineRankCountMax];          // of each source; 0 if it is masked
    int32_t sends[kLineRankCountMax], lost[kLineRankCountMax];
    int16_t choices[kLineChoiceCountMax];  // [token][topk]  up to the end of the chunk
    int16_t positions[kLineChoiceCountMax];
    LineWarpShared warps[kMovingThreads / kWarpSize];
};

// ---- Choices ------------------------------------------------------------------------------------

enum class LineRole { kCounter, kSender, kReceiver };

// A block among those of its role. A receiver waits for heads that receivers of other ranks send,
// so the blocks of a launch have to run beside each other: there are no more than multiprocessors.
struct LineBlock {
    LineRole role;
    int index, count;

    EP_DEVICE static LineBlock of(const Round &r) {
        const int index = static_cast<int>(grid_index<Block>()) - 1;
        if (index < 0) return {LineRole::kCounter, 0, 1};
        if (index < r.sender_block_count) return {LineRole::kSender, index, r.sender_block_count};
        return {LineRole::kReceiver, index - r.sender_block_count, r.receiver_block_count};
    }
    EP_DEVICE bool has_work(const Round &r) const { return role != LineRole::kSender || r.sends(); }
};

// The tokens of a block, or of several blocks, and this warp among theirs.
struct LineChunk {
    Chunk tokens;
    int warp, warp_count;

    EP_DEVICE static LineChunk of(const Round &r, const LineBlock &block) {
        // The counter's: none, after all tokens.
        if (block.role == LineRole::kCounter) return {{r.token_count, r.token_count}, 0, 1};
        const int sharers = block.role == LineRole::kSender ? block.count : r.receivers_of_chunk;
        const int index = block.index / sharers, share = block.index - index * sharers;
        return {Chunk::of(index, block.count / sharers, r.token_count),
                Warp::index_in_block() * sharers + share, Warp::count_in_block() * sharers};
    }
    EP_DEVICE int token_count() const { return tokens.end - tokens.begin; }
};

// Clears what is counted up. The whole block.
EP_DEVICE void clear_sums(const Round &r, LineDispatchShared *shared) {
    EP_ROLLED
    for (int e = Block::rank(); e < r.layout.shape.expert_count; e += Block::size())
        shared->sums[e] = 0;
    EP_ROLLED
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size())
        shared->lost[peer] = 0;
}

// Decides who takes part, and tells who is behind. The counter's block.
EP_DEVICE void decide_peers(const Round &r, uint64_t epoch, LineDispatchShared *shared) {
    if (Block::rank() == 0) keep_progress(r, Cargo::kMessages, epoch);
    EP_ROLLED
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size()) {
        const Standing standing = decide_standing(r, Cargo::kMessages, epoch, peer);
        if (standing == Standing::kBehind)
            post(r.layout.token_count(r.window(peer), epoch, r.rank),
                 Signal::pack(epoch, kHeldBack));
        shared->sends[peer] = standing == Standing::kInStep;
    }
}

// Learns who takes part. Any other whole block.
EP_DEVICE void learn_peers(const Round &r, uint64_t epoch, LineDispatchShared *shared) {
    EP_ROLLED
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size())
        shared->sends[peer] = may_send(r, Cargo::kMessages, epoch, peer);
}

// Learns the choices of all tokens up to the chunk's end, sums up those before it, and numbers its
// own. The whole block.
EP_DEVICE void learn_choices(const DispatchArgs &a, uint64_t epoch, const LineBlock &block,
                             const LineChunk &chunk, LineDispatchShared *shared) {
    const Round &r = a.round;
    const bool keeps =  // for later launches
        block.role == LineRole::kReceiver && block.index % r.receivers_of_chunk == 0;
    const int begin = chunk.tokens.begin * r.topk, last = chunk.tokens.end * r.topk;
    const Lanes lanes(r.topk);
    const int first = lanes.works() ? lanes.place : last;
    EP_ROLLED
    for (int i = first; i < last; i += kChoicesAtOnce * lanes.stride) {
        int experts[kChoicesAtOnce];
        load_choices(a, i, lanes.stride, last, experts);
        EP_UNROLL
        for (int j = 0; j < kChoicesAtOnce; ++j)
            if (i + j * lanes.stride < last)
                shared->choices[i + j * lanes.stride] = static_cast<int16_t>(experts[j]);
    }
    // After what takes longer is on its way.
    if (block.role == LineRole::kCounter)
        decide_peers(r, epoch, shared);
    else
        learn_peers(r, epoch, shared);
    Block::sync();  // the sums are clear now
    EP_ROLLED
    for (int warp_first = lanes.place - Warp::rank(); warp_first < last;
         warp_first += lanes.stride) {
        const int i = warp_first + Warp::rank();
        const bool here = lanes.works() && i < last;
        const int expert = here ? shared->choices[i] : Routing::kNoChoice;
        const bool repeats = lanes.repeats(r, expert);
        if (!here) continue;
        const int choice = expert < 0 ? Routing::kNoChoice
                           : repeats  ? Routing::repeat_of(expert)
                                      : expert;
        if (i < begin) {
            if (choice >= 0) fetch_add(&shared->sums[choice], 1);
            continue;
        }
        shared->choices[i] = static_cast<int16_t>(choice);
        if (!keeps) continue;
        r.routing.choices[i] = choice;
        if (expert == kInvalidExpert) fetch_add(&r.state->invalid_expert_ids, uint64_t{1});
    }
    Block::sync();
    number_choices<1>(shared->choices + begin, last - begin, shared->sums,
                      [&](int i, int32_t number) {
                          shared->positions[begin + i] = static_cast<int16_t>(number);
                          if (keeps) r.routing.positions[begin + i] = number;
                      });
}

// The same of a chunk that a launch before has numbered. The whole block.
EP_DEVICE void recall_choices(const Round &r, const LineChunk &chunk, LineDispatchShared *shared) {
    EP_ROLLED
    for (int i = chunk.tokens.begin * r.topk + Block::rank(); i < chunk.tokens.end * r.topk;
         i += Block::size()) {
        shared->choices[i] = static_cast<int16_t>(r.routing.choices[i]);
        shared->positions[i] = static_cast<int16_t>(r.routing.positions[i]);
    }
    Block::sync();
}

// One token's choices, a lane each.
struct LaneChoice {
    int32_t expert;  // below 0: none, or a repeat
    int32_t position;

    EP_DEVICE static LaneChoice of(const Round &r, int token, const LineDispatchShared &shared) {
        if (Warp::rank() >= r.topk) return {Routing::kNoChoice, 0};
        const int i = token * r.topk + Warp::rank();
        return {shared.choices[i], shared.positions[i]};
    }
};

// Its weight as it was given; see merged_in_lanes().
EP_DEVICE float lane_weight(const DispatchArgs &a, int token) {
    const float *weights = weights_of(a, token);
    return weights != nullptr && Warp::rank() < a.round.topk ? weights[Warp::rank()] : 1.0f;
}

// ---- Counting -----------------------------------------------------------------------------------

// Tells every rank how many tokens this one has, and how many for each of its experts. The counter.
EP_DEVICE void tell_counts(const Round &r, uint64_t epoch, LineDispatchShared *shared) {
    const Layout &layout = r.layout;
    EP_ROLLED
    for (int e = Block::rank(); e < layout.shape.expert_count; e += Block::size()) {
        const int peer = r.local_experts.quotient(e), index = e - peer * r.local_experts.value;
        if (shared->sends[peer] == 0) continue;
        char *window = r.window(peer);
        post(layout.count(window, epoch, r.rank, index), Signal::pack(epoch, shared->sums[e]));
        count_sent(r, peer, shared->sums[e]);
        if (index == 0)
            post(layout.token_count(window, epoch, r.rank), Signal::pack(epoch, r.token_count));
    }
    if (Block::rank() == 0) r.routing.state->dispatch_epoch = epoch;
}

// Word i of those in a window that tell counts: all sources' counts for each expert, then each
// source's number of tokens.
struct CountWord {
    int source, index;  // as Layout::count() has them

    EP_DEVICE static CountWord of(const Round &r, int i) {
        const int experts = r.layout.local_expert_count;
        const int counts = r.layout.shape.rank_count * experts;
        if (i >= counts) return {i - counts, experts};
        const int source = r.local_experts.quotient(i);
        return {source, i - source * experts};
    }
    EP_DEVICE const uint64_t *in(const Round &r, uint64_t epoch) const {
        return r.layout.count(r.window(r.rank), epoch, source, index);
    }
    // Where the threads of a block keep it.
    EP_DEVICE int32_t *place(const Round &r, LineDispatchShared *shared) const {
        const int experts = r.layout.local_expert_count;
        return index < experts ? &shared->begins[source * experts + index]
                               : &shared->tokens[source];
    }
};

// Waits for all counts, and says whose are valid. The counter.
EP_DEVICE void decide_sources(const DispatchArgs &a, uint64_t epoch, LineDispatchShared *shared) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const int ranks = layout.shape.rank_count, experts = layout.local_expert_count;
    const Wait wait(r);
    drop_absent(r);
    EP_ROLLED
    for (int i = Block::rank(); i < ranks * (experts + 1); i += Block::size()) {
        const CountWord word = CountWord::of(r, i);
        const int count = await_count(wait, word.in(r, epoch), epoch, word.source, word.index == 0);
        if (count < 0) fetch_add(&shared->lost[word.source], 1);
        *word.place(r, shared) = count;
    }
    Block::sync();
    EP_ROLLED
    for (int source = Block::rank(); source < ranks; source += Block::size()) {
        const int tokens = shared->lost[source] == 0 ? shared->tokens[source] : 0;
        post(&r.routing.token_counts[source], Signal::pack(epoch, tokens));
    }
    EP_ROLLED
    for (int e = Block::rank(); e < experts; e += Block::size()) {
        int begin = 0;
        EP_ROLLED
        for (int source = 0; source < ranks; ++source) {
            const bool counts = shared->lost[source] == 0 && shared->tokens[source] != 0;
            const int count = counts ? shared->begins[source * experts + e] : 0;
            if (a.out_layout_range != nullptr)
                a.out_layout_range[size_t(e) * ranks + source] = int64_t{begin} << 32 | count;
            begin += count;
            count_received(r, source, count);
        }
        a.out_count[e] = begin;
        count_expert(r, e, begin);
    }
}

// A count from a source, or its number of tokens, once the counter has decided about it. Which
// checked the limit and that it is there, but a window may change: the word that says the number of
// tokens also when the source goes on to a later round.
EP_DEVICE int decided_count(const Wait &wait, uint64_t epoch, const CountWord &of) {
    const Round &r = wait.round;
    const auto [source, index] = of;
    const uint64_t *word = of.in(r, epoch);
    EP_ROLLED
    for (uint32_t attempt = 0;; ++attempt) {
        const uint64_t tokens = look(&r.routing.token_counts[source]), count = look(word);
        if (!Signal::is_of(tokens, epoch)) {
            pause(attempt);
            continue;
        }
        if (Signal::value(tokens) == 0 || index == r.layout.local_expert_count)
            return Signal::value(tokens);
        if (Signal::is_of(count, epoch))
            return Signal::value(count) <= r.layout.shape.token_count_max ? Signal::value(count)
                                                                          : 0;
        if (!is_active(r, source)) return 0;
        if (wait.lapse<Thread>(epoch, source, Awaited::kCounts, attempt) && source == r.rank)
            return 0;
    }
}

// Learns where the rows of each source begin. The whole block, but the counter's.
EP_DEVICE void await_begins(const Round &r, uint64_t epoch, LineDispatchShared *shared) {
    const Layout &layout = r.layout;
    const int ranks = layout.shape.rank_count, experts = layout.local_expert_count;
    const Wait wait(r);
    EP_ROLLED
    for (int i = Block::rank(); i < ranks * (experts + 1); i += Block::size()) {
        const CountWord word = CountWord::of(r, i);
        *word.place(r, shared) = decided_count(wait, epoch, word);
    }
    Block::sync();
    EP_ROLLED
    for (int e = Block::rank(); e < experts; e += Block::size()) {
        int begin = 0;
        EP_ROLLED
        for (int source = 0; source < ranks; ++source) {
            const int count = shared->begins[source * experts + e];
            shared->begins[source * experts + e] = begin;
            begin += count;
        }
        shared->begins[ranks * experts + e] = begin;
    }
    Block::sync();
}

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

// Sends a part to the ranks of the token's experts, of which each lane has one. One warp.
EP_DEVICE void send_part(const Round &r, uint64_t epoch, int token, int64_t expert,
                         const LineDispatchShared &shared, const Part &part, const Pieces &pieces) {
    const Layout &layout = r.layout;
    EP_ROLLED
    for (int step = 1; step < layout.shape.rank_count; ++step) {
        const int peer = peer_at(r, step);
        const ExpertRange range = ExpertRange::of(layout, peer);
        if (Warp::all(expert < range.first || expert >= range.end) || shared.sends[peer] == 0)
            continue;
        char *message = layout.message(r.window(peer), epoch, peer, r.rank, token);
        push_part(part, layout.payload(message), pieces, Signal::pack(epoch, 0));
    }
}

// Sends the heads of a chunk's messages, also of empty ones: without them nobody can place a row.
// `weight`: of the lane's choice of the warp's first token.
EP_DEVICE void send_heads(const DispatchArgs &a, uint64_t epoch, const LineChunk &chunk,
                          float weight, LineDispatchShared *shared) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    Entry *entries = shared->warps[Warp::index_in_block()].entries;
    const int at = LineLane::line() * Layout::kPiecesOfLine + LineLane::piece();
    const bool here = LineLane::line() < static_cast<int>(layout.head_bytes / Layout::kLineBytes);
    EP_ROLLED
    for (int i = chunk.warp; i < chunk.token_count(); i += chunk.warp_count) {
        const int token = chunk.tokens.begin + i;
        const LaneChoice choice = LaneChoice::of(r, token, *shared);
        if (i != chunk.warp) weight = lane_weight(a, token);
        const float whole = merged_in_lanes(weight, choice.expert, r.topk);
        EP_ROLLED
        for (int step = 1; step < layout.shape.rank_count; ++step) {
            const int peer = peer_at(r, step);
            if (shared->sends[peer] == 0) continue;
            const ExpertRange range = ExpertRange::of(layout, peer);
            const Votes had = Warp::count(range.has(choice.expert));
            if (range.has(choice.expert))
                entries[had.lower] = {choice.expert - range.first, choice.position, whole, 0};
            Warp::sync();
            Vector piece{};
            if (LineLane::has_signal())
                piece = {{Signal::pack(epoch, had.total), 0}};
            else if (at < had.total)
                piece = bit_cast<Vector>(entries[at]);
            push(layout.message(r.window(peer), epoch, peer, r.rank, token) +
                     Warp::rank() * Layout::kPieceBytes,
                 here, LineLane::has_signal(), piece);
            Warp::sync();  // before the next message's entries take the place of this one's
        }
    }
}

// ---- Placing ------------------------------------------------------------------------------------

// What a lane knows of a token's entries here.
struct LaneEntry {
    bool here;
    int index;  // among the token's
    int32_t expert, position;
    float weight;
};

// A token of some rank, and how many entries it has here.
struct Arrived {
    int source, token, count;
    bool lost;  // its rank has failed before it came
};

// The row of an entry; -1 if the entry breaks a limit, which only a faulty peer's can.
EP_DEVICE int32_t line_row_of(const Round &r, int source, const LaneEntry &entry,
                              const LineDispatchShared &shared) {
    const int experts = r.layout.local_expert_count;
    if (entry.expert < 0 || entry.expert >= experts) return -1;
    const int32_t *begin = shared.begins + source * experts + entry.expert;
    if (entry.position < 0 || entry.position >= begin[experts] - begin[0]) return -1;
    return entry.expert * r.layout.shape.rank_count * r.layout.shape.token_count_max + begin[0] +
           entry.position;
}

// Writes a part of a token to the rows of its entries; with part 0, also what combine needs. One
// warp.
template <Element kOut>
EP_DEVICE void place_entries(const DispatchArgs &a, const Arrived &arrived, const LaneEntry &entry,
                             const Part &part, const Pieces &pieces, LineDispatchShared *shared) {
    const Round &r = a.round;
    Target *targets = shared->warps[Warp::index_in_block()].targets;
    const int32_t row = entry.here ? line_row_of(r, arrived.source, entry, *shared) : -1;
    if (entry.here) targets[entry.index] = place_of(a, row);
    Warp::sync();
    EP_ROLLED
    for (int i = 0; i < arrived.count; ++i) {
        const Target to = targets[i];
        if (to.row != nullptr)
            place_part<kOut == Element::kFp8>(part, pieces, size_t(r.hidden) * element_bytes(kOut),
                                              to, r.hidden / kScaleGroup);
    }
    if (part.index == 0) {
        const size_t slot = size_t(arrived.source) * r.layout.shape.token_count_max + arrived.token;
        if (Warp::rank() == 0) r.routing.row_counts[slot] = arrived.count;
        if (entry.here) {
            const size_t at = slot * r.layout.shape.topk_max + entry.index;
            r.routing.rows[at] = row;
            r.routing.weights[at] = entry.weight;
            if (row < 0) fetch_add(&r.state->invalid_messages, uint64_t{1});
            if (row >= 0 && a.out_src_info != nullptr) a.out_src_info[row] = arrived.token;
        }
    }
    Warp::sync();  // before the next token's rows take the place of this one's
}

// This rank's own token, whose choices have these weights.
EP_DEVICE LaneEntry own_entry(const Round &r, float weight, Arrived *own,
                              const LineDispatchShared &shared) {
    const ExpertRange range = ExpertRange::of(r.layout, r.rank);
    const LaneChoice choice = LaneChoice::of(r, own->token, shared);
    const bool here = range.has(choice.expert);
    const Votes had = Warp::count(here);
    own->count = had.total;
    return {here, had.lower, choice.expert - range.first, choice.position,
            merged_in_lanes(weight, choice.expert, r.topk)};
}

// ---- Receiving ----------------------------------------------------------------------------------

// The message that is number i of those to be received, in the order in which they are sent. False
// if there is no such token.
EP_DEVICE bool find_message(const Round &r, int i, const LineDispatchShared &shared,
                            Arrived *arrived) {
    const int peers = r.layout.shape.rank_count - 1;
    const int message = r.parts.quotient(i);
    arrived->token = peers == 1 ? message : message / peers;
    arrived->source = peer_at(r, 1 + message - arrived->token * peers);
    return arrived->token < shared.tokens[arrived->source];
}

// Waits for a message's head, and for one part of its row unless the message is empty. It has no
// entries if its source has failed. One warp.
EP_DEVICE LaneEntry await_entry(const Wait &wait, uint64_t epoch, Arrived *arrived,
                                const Part &part, Pieces *pieces) {
    const Round &r = wait.round;
    const Layout &layout = r.layout;
    char *message =
        layout.message(r.window(r.rank), epoch, r.rank, arrived->source, arrived->token);
    const char *const at[] = {message + Warp::rank() * Layout::kPieceBytes};
    const bool here[] = {LineLane::line() <
                         static_cast<int>(layout.head_bytes / Layout::kLineBytes)};
    Vector head[1] = {};
    int said = 0;
    EP_ROLLED
    for (uint32_t attempt = 0;; ++attempt) {
        const bool has_head = pull(at, here, LineLane::has_signal(), epoch, head);
        const bool has_part = pull_part(part, layout.payload(message), epoch, pieces);
        if (has_head) {
            said = entry_count(r, Warp::from(head[0].words[0], Layout::kPiecesOfLine));
            if (said <= 0 || has_part) break;
        }
        if (!Warp::broadcast(int{is_active(r, arrived->source)})) {
            said = 0;
            arrived->lost = true;
            break;
        }
        wait.lapse<Warp>(epoch, arrived->source, Awaited::kRows, attempt);
    }
    if (said < 0 && part.index == 0 && Warp::rank() == 0)
        fetch_add(&r.state->invalid_messages, uint64_t{1});
    if (arrived->lost && Warp::rank() == 0) note_lost(r, epoch, arrived->source);
    arrived->count = said < 0 ? 0 : said;
    const int index = LineLane::line() * Layout::kPiecesOfLine + LineLane::piece();
    const auto entry = bit_cast<Entry>(head[0]);
    return {!LineLane::has_signal() && index < said, index, entry.local_expert, entry.position,
            entry.weight};
}

// ---- All roles ----------------------------------------------------------------------------------

// What a block does before its first item, once that is on its way.
EP_DEVICE void begin_block(const DispatchArgs &a, uint64_t epoch, const LineBlock &block,
                           const LineChunk &chunk, LineDispatchShared *shared) {
    const Round &r = a.round;
    const int head = chunk.tokens.begin + chunk.warp;  // the first that this warp sends
    const bool has_head = block.role == LineRole::kReceiver && head < chunk.tokens.end;
    const float weight = has_head ? lane_weight(a, head) : 1.0f;
    if (block.role == LineRole::kSender) {
        learn_peers(r, epoch, shared);
        Block::sync();
        return;
    }
    clear_sums(r, shared);
    if (r.sends())
        learn_choices(a, epoch, block, chunk, shared);
    else
        recall_choices(r, chunk, shared);
    if (block.role == LineRole::kCounter) {
        if (r.sends()) tell_counts(r, epoch, shared);
        if (r.receives()) decide_sources(a, epoch, shared);
    }
    if (block.role != LineRole::kReceiver) return;
    if (r.sends()) send_heads(a, epoch, chunk, weight, shared);
    if (r.receives()) await_begins(r, epoch, shared);
}

// A warp's items are parts of rows: a sender's, those of all tokens; a receiver's, those of its
// chunk and of messages. False if one did not come.
template <bool kCast, Element kType>
EP_DEVICE bool move_parts(const DispatchArgs &a, uint64_t epoch, const LineBlock &block,
                          LineDispatchShared *shared) {
    const Round &r = a.round;
    constexpr Element kOut = kCast ? Element::kFp8 : kType;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kOut);
    const int parts = r.parts.value, most = r.layout.shape.token_count_max;
    const bool sends = block.role == LineRole::kSender;
    const bool receives = block.role == LineRole::kReceiver && r.receives();
    const LineChunk chunk = LineChunk::of(r, block);
    const int own = sends || receives ? chunk.token_count() * parts : 0;
    const int messages = receives ? most * (r.layout.shape.rank_count - 1) * parts : 0;
    const int message_step = block.count * Warp::count_in_block();
    int item = chunk.warp;
    // From the last warp on: the first have own tokens.
    int message = (Warp::count_in_block() - 1 - Warp::index_in_block()) * block.count + block.index;
    Wait wait(r);
    RowPart<kCast, kType> row{};
    bool all_came = true;
    EP_ROLLED
    for (bool first = true; first || item < own || message < messages; first = false) {
        const bool is_own = item < own;
        const int index = r.parts.quotient(is_own ? item : message);
        const Part part((is_own ? item : message) - index * parts, row_bytes);
        const int token = chunk.tokens.begin + index;
        Arrived arrived{r.rank, token, 0, false};
        int64_t expert = Routing::kNoChoice;
        float weight = 1;
        if (is_own) row.read(a, token, part);
        if (sends && is_own && Warp::rank() < r.topk)
            expert = topk_idx_at(a, token * r.topk + Warp::rank());
        if (is_own && !sends) weight = lane_weight(a, token);
        if (first) {
            begin_block(a, epoch, block, chunk, shared);
            wait.began_ns = now_ns();  // it is decided whose tokens count
        }
        LaneEntry entry{};
        if (is_own) {
            row.finish(a, part);
            item += chunk.warp_count;
            if (sends) {
                send_part(r, epoch, token, expert, *shared, part, row.pieces);
                continue;
            }
            entry = own_entry(r, weight, &arrived, *shared);
        } else {
            const int number = message;
            message += message_step;
            if (number >= messages || !find_message(r, number, *shared, &arrived)) continue;
            entry = await_entry(wait, epoch, &arrived, part, &row.pieces);
            all_came &= !arrived.lost;
        }
        place_entries<kOut>(a, arrived, entry, part, row.pieces, shared);
    }
    return all_came;
}

template <bool kCast, Element kType>
EP_WIDE_KERNEL(kMovingThreads)
dispatch_by_line(const DispatchArgs a) {
    after_launches_before();
    EP_SHARED(LineDispatchShared, shared);
    const Round &r = a.round;
    const LineBlock block = LineBlock::of(r);
    const uint64_t epoch = dispatch_epoch_of(r);
    const bool all_came = !block.has_work(r) || move_parts<kCast, kType>(a, epoch, block, &shared);
    // What a sender has stored nobody here asks for.
    if (!r.receives() || block.role == LineRole::kSender) {
        hand_in(r.sends() ? &r.state->dispatch_tickets : &r.state->receive_tickets);
        return;
    }
    end_receiving(a, epoch, !all_came, [&](int expert, int source) {
        return shared.begins[source * r.layout.local_expert_count + expert];
    });
}

// ---- Launching ----------------------------------------------------------------------------------

template <bool kCast, Element kType>
int launch_dispatch_by_line(DispatchArgs args, Phases phases, const Queue &queue) {
    Round &r = args.round;
    const Shape &shape = r.layout.shape;
    const int parts = Part::count(size_t(r.hidden) * element_bytes(kCast ? Element::kFp8 : kType));
    const int tokens = r.token_count < 1 ? 1 : r.token_count;
    const int senders = wide_sender_block_count_max(queue);
    const int64_t own = int64_t(tokens) * parts;
    const int64_t messages = int64_t(shape.rank_count - 1) * shape.token_count_max * parts;
    r.sender_block_count = blocks_for(own, senders);
    // Several receivers for the parts of each token while there are blocks.
    const int blocks = blocks_for(own + messages, queue.block_count - 1 - senders);
    const int wanted = blocks_for(parts, blocks);
    r.receivers_of_chunk = blocks < tokens            ? 1
                           : blocks / tokens < wanted ? blocks / tokens
                                                      : wanted;
    r.receiver_block_count = blocks / r.receivers_of_chunk * r.receivers_of_chunk;
    r.parts = Divisor::of(parts);
    r.local_experts =
        Divisor::of(r.layout.local_expert_count < 1 ? 1 : r.layout.local_expert_count);
    r.phases = phases;  // receivers have work in each
    // Warps without rows to move count all the same, and hold up the others.
    const bool few = own + messages <= int64_t(r.receiver_block_count) * 2 * kWarpsOfBlockMax;
    launch_wide(dispatch_by_line<kCast, kType>, args, queue,
                1 + r.sender_block_count + r.receiver_block_count,
                few ? kWarpsOfBlockMax * kWarpSize : kMovingThreads);
    return launch_error();
}

}  // namespace ep::EP_DEVICE_NAMESPACE
