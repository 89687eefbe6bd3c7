// Counting for dispatch: which experts this rank's tokens chose, the number of each choice among
// this rank's tokens for its expert, and, from all ranks' counts, where each source's rows begin.
//
// The numbers of a chunk's choices (a chunk: neighbours among the tokens) follow from how many
// choices there are of each expert before it. With few choices in all, the block of a chunk counts
// those itself; with many, a launch before counts each chunk once.
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"
#include "kernels/routing.h"
#include "kernels/ways.h"

namespace ep::EP_DEVICE_NAMESPACE {

struct Chunk {
    int begin, end;  // tokens

    EP_DEVICE static Chunk of(int index, int chunk_count, int token_count) {
        const int64_t tokens = token_count;
        return {static_cast<int>(tokens * index / chunk_count),
                static_cast<int>(tokens * (index + 1) / chunk_count)};
    }
};

// The order in which a rank sends its tokens, if it has as many multiprocessors as this one: all
// chunks at once, each from its beginning. Whoever waits for them in another waits longer.
struct SendOrder {
    int token_count, chunk_count;

    EP_DEVICE SendOrder(int tokens, int chunk_count_max)
        : token_count(tokens), chunk_count(tokens < chunk_count_max ? tokens : chunk_count_max) {}
    // Places in the order; there may be none for a token at some.
    EP_DEVICE int size() const {
        return token_count == 0 ? 0 : (token_count + chunk_count - 1) / chunk_count * chunk_count;
    }
    EP_DEVICE int token(int place) const {
        const Chunk chunk = Chunk::of(place % chunk_count, chunk_count, token_count);
        const int token = chunk.begin + place / chunk_count;
        return token < chunk.end ? token : -1;
    }
};

// For Round::choice_bits: of an expert, and one more for the negative numbers that stand for none.
inline int choice_bits(int expert_count) {
    int bits = 2;  // -1 and -2 are not the same
    while (bits < 31 && (1 << (bits - 1)) < expert_count)
        ++bits;
    return bits;
}

EP_HOST_DEVICE inline bool counts_ahead(const Round &r) {
    return r.chunk_count > 1 && r.token_count * r.topk > kChoicesCountedByAllMax;
}

EP_DEVICE int64_t topk_idx_at(const DispatchArgs &a, int i) {
    return a.topk_idx_bytes == 8 ? static_cast<const int64_t *>(a.topk_idx)[i]
                                 : static_cast<const int32_t *>(a.topk_idx)[i];
}

constexpr int kInvalidExpert = -2;

// Is topk_idx[i], which is `expert`, named by the same token before? Looks at each; used where a
// warp does not have a lane for each choice of a token.
EP_DEVICE bool is_repeat(const DispatchArgs &a, int64_t expert, int i) {
    bool repeats = false;
    for (int before = i - i % a.round.topk; before < i; ++before)
        repeats |= topk_idx_at(a, before) == expert;
    return repeats;
}

constexpr int kChoicesAtOnce =
    kWarpSize == 1 ? 1 : 4;  // of a lane, loaded before the first is used
constexpr int kManyLooks = kWarpSize == 1 ? 1 : 8;
constexpr int kTalliesAtOnce = kWarpSize == 1 ? 1 : 32;  // loaded before the first is added

// A warp's share of a block's choices: whole tokens, if they have no more choices than it has
// lanes.
struct Lanes {
    int used, place, stride;  // lanes at work; of this lane in the block's; of all lanes at work
    int first;                // of this lane's token

    EP_DEVICE explicit Lanes(int topk)
        : used(topk <= Warp::size() ? Warp::size() / topk * topk : Warp::size()),
          place(Warp::index_in_block() * used + Warp::rank()),
          stride(Warp::count_in_block() * used),
          first(Warp::rank() / topk * topk) {}
    EP_DEVICE bool works() const { return Warp::rank() < used; }

    // Where lanes have whole tokens: does a lower lane of this lane's token name the expert too?
    EP_DEVICE bool repeats(const Round &r, int expert) const {
        return Warp::repeats(static_cast<unsigned>(expert), r.choice_bits, first) && expert >= 0;
    }
};

// What topk_idx says at i, i + stride, ..., each below `last`: an expert, kNoChoice or
// kInvalidExpert. All are on their way before the first is used, so nothing here may depend on a
// load.
EP_DEVICE void load_choices(const DispatchArgs &a, int i, int stride, int last,
                            int (&experts)[kChoicesAtOnce]) {
    int64_t ids[kChoicesAtOnce];
    const auto at = [&](int j) { return i + j * stride < last ? i + j * stride : last - 1; };
    if (a.topk_idx_bytes == 8) {
        EP_UNROLL
        for (int j = 0; j < kChoicesAtOnce; ++j)
            ids[j] = static_cast<const int64_t *>(a.topk_idx)[at(j)];
    } else {
        EP_UNROLL
        for (int j = 0; j < kChoicesAtOnce; ++j)
            ids[j] = static_cast<const int32_t *>(a.topk_idx)[at(j)];
    }
    EP_UNROLL
    for (int j = 0; j < kChoicesAtOnce; ++j) {
        const bool valid = ids[j] >= 0 && ids[j] < a.round.layout.shape.expert_count;
        experts[j] = valid                          ? static_cast<int>(ids[j])
                     : ids[j] == Routing::kNoChoice ? Routing::kNoChoice
                                                    : kInvalidExpert;
    }
}

// Calls take(i, choice, expert) for topk_idx[i], i of the tokens [begin, end). The whole block.
template <class Take>
EP_DEVICE void each_choice(const DispatchArgs &a, int begin, int end, Take take) {
    const int topk = a.round.topk, last = end * topk;
    const Lanes lanes(topk);
    // All lanes of a warp stay together: they ask each other.
    for (int first = begin * topk + lanes.place - Warp::rank(); first < last;
         first += kChoicesAtOnce * lanes.stride) {
        int experts[kChoicesAtOnce];
        load_choices(a, first + Warp::rank(), lanes.stride, last, experts);
        EP_UNROLL
        for (int j = 0; j < kChoicesAtOnce; ++j) {
            if (first + j * lanes.stride >= last) break;
            const int i = first + Warp::rank() + j * lanes.stride;
            const int expert = lanes.works() && i < last ? experts[j] : Routing::kNoChoice;
            const bool repeats = topk <= Warp::size() ? lanes.repeats(a.round, expert)
                                                      : expert >= 0 && is_repeat(a, expert, i);
            if (lanes.works() && i < last)
                take(i,
                     expert < 0 ? Routing::kNoChoice
                     : repeats  ? Routing::repeat_of(expert)
                                : expert,
                     expert);
        }
    }
}

// Adds up the choices of each expert among the tokens [0, end).
EP_DEVICE void tally_choices(const DispatchArgs &a, int end, int32_t *tally) {
    each_choice(a, 0, end, [&](int, int32_t choice, int) {
        if (choice >= 0) fetch_add(&tally[choice], 1);
    });
}

// Keeps a choice in the handle.
EP_DEVICE void keep_choice(const Round &r, int i, int32_t choice, int expert) {
    r.routing.choices[i] = choice;
    if (expert == kInvalidExpert) fetch_add(&r.state->invalid_expert_ids, uint64_t{1});
}

// Where a block adds up choices of each expert: `shared` if there is room, otherwise a row of its
// own.
EP_DEVICE int32_t *sums_of(const DispatchArgs &a, int row, int32_t *shared) {
    const int experts = a.round.layout.shape.expert_count;
    return experts <= kSharedExpertCountMax ? shared
                                            : a.tally + size_t(a.round.chunk_count + row) * experts;
}

// What the threads of a block that counts or numbers share.
struct CountShared {
    int32_t sums[kSharedExpertCountMax];            // of each expert
    int32_t choices[kWarpsOfBlockMax * kWarpSize];  // one of each thread
};

EP_DEVICE void clear_sums(const DispatchArgs &a, int32_t *sums) {
    for (int e = Block::rank(); e < a.round.layout.shape.expert_count; e += Block::size())
        sums[e] = 0;
    Block::sync();
}

// The first launch, when counts_ahead(): a block per chunk keeps and counts its choices.
EP_KERNEL dispatch_tally(const DispatchArgs a) {
    after_launches_before();
    EP_SHARED(CountShared, shared);
    const Round &r = a.round;
    const int experts = r.layout.shape.expert_count;
    for (int i = grid_index<Block>(); i < r.chunk_count; i += grid_count<Block>()) {
        const Chunk chunk = Chunk::of(i, r.chunk_count, r.token_count);
        int32_t *sums = sums_of(a, i, shared.sums);
        clear_sums(a, sums);
        each_choice(a, chunk.begin, chunk.end, [&](int at, int32_t choice, int expert) {
            keep_choice(r, at, choice, expert);
            if (choice >= 0) fetch_add(&sums[choice], 1);
        });
        Block::sync();
        for (int e = Block::rank(); e < experts; e += Block::size())
            a.tally[size_t(i) * experts + e] = sums[e];
        Block::sync();  // before the next chunk's sums take the place of these
    }
}

// Adds up the tallies of the first `count` chunks. The whole block.
EP_DEVICE void add_tallies(const DispatchArgs &a, int count, int32_t *sums) {
    const int experts = a.round.layout.shape.expert_count;
    // As many threads for an expert as there are.
    const int shares = experts < Block::size() ? Block::size() / experts : 1;
    for (int i = Block::rank(); i < shares * experts; i += Block::size()) {
        const int expert = i % experts;
        int32_t sum = 0;
        for (int first = i / experts; first < count; first += kTalliesAtOnce * shares) {
            int32_t counts[kTalliesAtOnce];
            EP_UNROLL
            for (int j = 0; j < kTalliesAtOnce; ++j)
                counts[j] = first + j * shares < count
                                ? a.tally[size_t(first + j * shares) * experts + expert]
                                : 0;
            EP_UNROLL
            for (int j = 0; j < kTalliesAtOnce; ++j)
                sum += counts[j];
        }
        if (sum != 0) fetch_add(&sums[expert], sum);
    }
}

// How many choices of each expert the tokens before a chunk made; of all tokens for the chunk after
// the last. The whole block.
EP_DEVICE void count_before(const DispatchArgs &a, int chunk, int32_t *sums) {
    const Round &r = a.round;
    clear_sums(a, sums);
    if (counts_ahead(r))
        add_tallies(a, chunk, sums);
    else
        tally_choices(a, Chunk::of(chunk, r.chunk_count, r.token_count).begin, sums);
    Block::sync();
}

// Numbers choices of one token after the other; those of one are of different experts. `next` are
// the numbers that come next. Calls take(i, number) for the choices. The whole block, which shares
// both; kLooksAtOnce choices are loaded before the first is compared.
template <int kLooksAtOnce, class Choice, class Take>
EP_DEVICE void number_choices(const Choice *choices, int count, int32_t *next, Take take) {
    // As many at once as there are threads: each asks which of those before it are of its expert.
    for (int first = 0; first < count; first += Block::size()) {
        const int i = first + Block::rank();
        const int32_t choice = i < count ? choices[i] : Routing::kNoChoice;
        const int end = choice >= 0 ? i : first;
        int number = 0, before = first;
        for (; before + kLooksAtOnce <= end; before += kLooksAtOnce) {
            EP_UNROLL
            for (int j = 0; j < kLooksAtOnce; ++j)
                number += choices[before + j] == choice;
        }
        for (; before < end; ++before)
            number += choices[before] == choice;
        if (choice >= 0) take(i, next[choice] + number);
        Block::sync();
        if (choice >= 0) fetch_add(&next[choice], 1);
        Block::sync();
    }
}

// Keeps and numbers the choices of one chunk. The whole block; `next` has room for each expert.
EP_DEVICE void number_chunk(const DispatchArgs &a, int index, int32_t *next, CountShared *shared) {
    const Round &r = a.round;
    const Chunk chunk = Chunk::of(index, r.chunk_count, r.token_count);
    if (!counts_ahead(r))
        each_choice(a, chunk.begin, chunk.end,
                    [&](int i, int32_t choice, int expert) { keep_choice(r, i, choice, expert); });
    count_before(a, index, next);
    const int last = chunk.end * r.topk;
    for (int first = chunk.begin * r.topk; first < last; first += Block::size()) {
        const int rest = last - first, count = rest < Block::size() ? rest : Block::size();
        if (Block::rank() < count)
            shared->choices[Block::rank()] = r.routing.choices[first + Block::rank()];
        Block::sync();
        number_choices<kManyLooks>(shared->choices, count, next, [&](int i, int32_t number) {
            r.routing.positions[first + i] = number;
        });
    }
}

// What the buffer counts. Nobody waits for these.
EP_DEVICE void count_sent(const Round &r, int peer, int rows) {
    if (rows != 0) fetch_add(&r.peer_counts[peer].rows_sent, uint64_t(rows));
}
EP_DEVICE void count_received(const Round &r, int source, int rows) {
    if (rows != 0) fetch_add(&r.peer_counts[source].rows_received, uint64_t(rows));
}
EP_DEVICE void count_expert(const Round &r, int expert, int rows) {
    if (rows != 0) fetch_add(&r.expert_rows[expert], uint64_t(rows));
}

// Tells every rank how many tokens this one has, and how many for each of its experts. A block.
EP_DEVICE void publish_counts(const DispatchArgs &a, uint64_t epoch, int32_t *sums) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const int per_rank = layout.local_expert_count;
    for (int peer = Block::rank(); peer < layout.shape.rank_count; peer += Block::size()) {
        const Standing standing = decide_standing(r, Cargo::kMessages, epoch, peer);
        if (standing != Standing::kMasked)
            post(words_to(r, Cargo::kMessages, epoch, peer) + per_rank,
                 Signal::pack(epoch, standing == Standing::kBehind ? kHeldBack : r.token_count));
    }
    count_before(a, r.chunk_count, sums);
    for (int e = Block::rank(); e < layout.shape.expert_count; e += Block::size()) {
        if (!may_send(r, Cargo::kMessages, epoch, e / per_rank)) continue;
        post(words_to(r, Cargo::kMessages, epoch, e / per_rank) + e % per_rank,
             Signal::pack(epoch, sums[e]));
        count_sent(r, e / per_rank, sums[e]);
    }
    Block::sync();  // before other sums take the place of these
}

EP_DEVICE uint64_t dispatch_epoch_of(const Round &r) {
    return epoch_of(r, r.state->dispatch_tickets, r.routing.state->dispatch_epoch);
}

// Waits for a count from `source`; -1 if it has failed, or holds its tokens back. A limit it breaks
// masks the source. With `counts`, the time that passes is counted.
EP_DEVICE int await_count(const Wait &wait, const uint64_t *word, uint64_t epoch, int source,
                          bool counts) {
    const Round &r = wait.round;
    uint64_t signal;
    if (!wait.until_posted(word, epoch, source, Awaited::kCounts, counts, &signal)) return -1;
    if (Signal::value(signal) <= r.layout.shape.token_count_max) return Signal::value(signal);
    if (source != r.rank && waits_in_vain(r, epoch, source, Awaited::kCounts)) {
        mask(r, {0, epoch, now_ns() - wait.began_ns, source, Awaited::kCounts, 0, 0});
        return -1;
    }
    fetch_add(&r.state->invalid_messages, uint64_t{1});
    if (source != r.rank) mask_for_limit(r, epoch, source, Awaited::kCounts);
    return -1;
}

// One thread per local expert: decides where each source's rows begin. `counts`: [source][expert].
EP_DEVICE void decide_begins(const DispatchArgs &a, uint64_t epoch, int expert,
                             const int32_t *counts) {
    const Round &r = a.round;
    const int ranks = r.layout.shape.rank_count, experts = r.layout.local_expert_count;
    uint64_t *begins = r.routing.begins + size_t(expert) * (ranks + 1);
    int begin = 0;
    for (int source = 0; source < ranks; ++source) {
        const bool counted = Signal::value(look(&r.routing.token_counts[source])) != 0;
        const int told = counts[source * experts + expert];
        const int count = counted && told > 0 ? told : 0;  // below 0: this rank's own, spoilt
        post(&begins[source], Signal::pack(epoch, begin));
        if (a.out_layout_range != nullptr)
            a.out_layout_range[size_t(expert) * ranks + source] = int64_t{begin} << 32 | count;
        begin += count;
        count_received(r, source, count);
    }
    post(&begins[ranks], Signal::pack(epoch, begin));
    a.out_count[expert] = begin;
    count_expert(r, expert, begin);
}

// Waits for all counts, and decides for all blocks whose tokens count. The counter; `counts` has
// room for one of each global expert.
EP_DEVICE void decide_layout(const DispatchArgs &a, uint64_t epoch, int32_t *counts) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const int ranks = layout.shape.rank_count, experts = layout.local_expert_count;
    const Wait wait(r);
    drop_absent(r);
    for (int i = Block::rank(); i < ranks * experts; i += Block::size())
        counts[i] =
            await_count(wait, words_from(r, Cargo::kMessages, epoch, i / experts) + i % experts,
                        epoch, i / experts, i % experts == 0);
    for (int source = Block::rank(); source < ranks; source += Block::size()) {
        const int tokens = await_count(
            wait, words_from(r, Cargo::kMessages, epoch, source) + experts, epoch, source, false);
        // Not yet of this round. Of a source that has failed, nothing will be read.
        post(&r.routing.token_counts[source], Signal::pack(0, tokens < 0 ? 0 : tokens));
    }
    Block::sync();
    for (int source = Block::rank(); source < ranks; source += Block::size()) {
        const int tokens = Signal::value(look(&r.routing.token_counts[source]));
        const bool active = is_active(r, source);
        post(&r.routing.token_counts[source], Signal::pack(epoch, active ? tokens : 0));
    }
    Block::sync();
    for (int expert = Block::rank(); expert < experts; expert += Block::size())
        decide_begins(a, epoch, expert, counts);
}

}  // namespace ep::EP_DEVICE_NAMESPACE
