// Questions that both operations ask about a token's choices, and waits for peers.
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"
#include "kernels/ways.h"

namespace ep::EP_DEVICE_NAMESPACE {

constexpr int kTopkMax = 32;  // MEP_TOPK_MAX

// The experts [first, end) of one rank.
struct ExpertRange {
    int first, end;

    EP_DEVICE static ExpertRange of(const Layout &layout, int rank) {
        return {rank * layout.local_expert_count, (rank + 1) * layout.local_expert_count};
    }
    EP_DEVICE bool has(int32_t choice) const { return choice >= first && choice < end; }
};

// The weight of choice k and of its repeats.
template <class Choice>
EP_DEVICE float merged_weight(const Choice *choices, const float *weights, int k, int topk) {
    float sum = weights == nullptr ? 1.0f : weights[k];
    EP_ROLLED
    for (int other = k + 1; other < topk; ++other)
        if (choices[other] == Routing::repeat_of(choices[k]))
            sum += weights == nullptr ? 1.0f : weights[other];
    return sum;
}

// The same where each lane has one of the token's choices, and its weight. One warp.
EP_DEVICE float merged_in_lanes(float weight, int32_t choice, int topk) {
    if (Warp::all(choice >= Routing::kNoChoice)) return weight;
    float sum = weight;
    EP_ROLLED
    for (int lane = 0; lane < topk; ++lane) {
        const int32_t other = Warp::from(choice, lane);
        const float more = Warp::from(weight, lane);
        if (lane > Warp::rank() && other == Routing::repeat_of(choice)) sum += more;
    }
    return sum;
}

// Calls visit(choice, k, index, weight) for each of a token's choices that is an expert of the
// range, where index counts them in the order of k; returns how many there are. One warp, each lane
// some.
template <class Visit>
EP_DEVICE int each_entry(const int32_t *choices, const float *weights, int topk, ExpertRange range,
                         Visit visit) {
    int count = 0;
    for (int first = 0; first < topk; first += Warp::size()) {
        const int k = first + Warp::rank();
        const int32_t choice = k < topk ? choices[k] : Routing::kNoChoice;
        float weight = k < topk && weights != nullptr ? weights[k] : 1.0f;
        const Votes had = Warp::count(range.has(choice));
        const bool repeats =
            topk > Warp::size() || Warp::count(choice < Routing::kNoChoice).total > 0;
        if (range.has(choice)) {
            if (repeats) weight = merged_weight(choices, weights, k, topk);
            visit(choice, k, count + had.lower, weight);
        }
        count += had.total;
    }
    return count;
}

// The lowest rank above `rank` that owns a choice; rank_count if there is none.
EP_DEVICE int next_owner(const Layout &layout, const int32_t *choices, int topk, int rank) {
    int next = layout.shape.rank_count;
    for (int k = 0; k < topk; ++k) {
        if (choices[k] < 0) continue;
        const int owner = choices[k] / layout.local_expert_count;
        if (owner > rank && owner < next) next = owner;
    }
    return next;
}

// The peers of this rank, the next one first, so that not all send to the same.
EP_DEVICE int peer_at(const Round &r, int step) {
    const int rank = r.rank + step, ranks = r.layout.shape.rank_count;
    return rank < ranks ? rank : rank - ranks;
}

// Does this rank take part? Its own rank always does.
EP_DEVICE bool is_active(const Round &round, int rank) {
    if (rank == round.rank) return true;
    const int32_t active = load(&round.active[rank]), member = load(&round.members[rank]);
    return active != 0 && member != 0;  // both are asked for before the first is looked at
}

// Whether a peer has a part in what this rank sends.
enum class Standing : int32_t {
    kMasked,
    kBehind,  // it may still read what is in the slots: it is only told that the round has begun
    kInStep,
};

// The word by which a rank tells that it has begun a round.
EP_DEVICE uint64_t *begin_word(const Round &r, Cargo cargo, uint64_t *words) {
    return cargo == Cargo::kMessages ? words + r.layout.local_expert_count : words;
}
// Of the arrays of a Pace, and of fences.
EP_DEVICE int operation_of(Cargo cargo) {
    return cargo != Cargo::kMessages;
}

// What a rank keeps in its own window, for peers that ask: the last round that it has begun.
EP_DEVICE uint64_t *progress_of(const Round &r, Cargo cargo, int rank) {
    return r.layout.fence(r.window(rank), operation_of(cargo), rank);
}
// One thread.
EP_DEVICE void keep_progress(const Round &r, Cargo cargo, uint64_t epoch) {
    post(progress_of(r, cargo, r.rank), epoch);
}

// What this rank sends takes the place of what it sent S rounds before. A peer has read that when
// it has begun the round in the middle between them (ARCHITECTURE.md, Reuse of slots).
EP_DEVICE bool is_in_step(const Round &r, uint64_t epoch, uint64_t begun) {
    return begun + r.layout.shape.slot_count / 2 >= epoch;
}

// Asks the peer's window, as nothing that it has told says so: it, or this rank, was masked. What
// an engine carries goes to no slot there.
EP_DEVICE bool is_in_step_there(const Round &r, Cargo cargo, uint64_t epoch, int peer) {
    return r.window(peer) == nullptr || is_in_step(r, epoch, look(progress_of(r, cargo, peer)));
}

EP_DEVICE Standing standing_of(const Round &r, Cargo cargo, uint64_t epoch, int peer) {
    if (peer == r.rank) return Standing::kInStep;
    const uint64_t begun = load(&r.paces[peer].begun[operation_of(cargo)]);
    if (!is_active(r, peer)) return Standing::kMasked;
    return is_in_step(r, epoch, begun) || is_in_step_there(r, cargo, epoch, peer)
               ? Standing::kInStep
               : Standing::kBehind;
}

// The same for all of the launch that sends, by its counter, which tells the peer accordingly.
EP_DEVICE Standing decide_standing(const Round &r, Cargo cargo, uint64_t epoch, int peer) {
    Pace &pace = r.paces[peer];
    Standing standing = standing_of(r, cargo, epoch, peer);
    const bool lacks_weights = cargo == Cargo::kPartials && look(&pace.unweighted) == epoch;
    if (lacks_weights && standing == Standing::kInStep) standing = Standing::kBehind;
    post(&pace.standing[operation_of(cargo)], Signal::pack(epoch, static_cast<uint32_t>(standing)));
    return standing;
}

// What a begin word says to who is behind. Of a combine: to others 0, or that there are no sums for
// them.
constexpr int kHeldBack = (1 << Signal::kValueBits) - 1;
constexpr int kNoSums = 1;

// What a block of a launch does. Devices whose blocks run beside each other have blocks for each
// job, in this order, so that those that others wait for are the first on the device: the counter
// waits for peers' counters only, senders for the counter, receivers for all. Elsewhere each block
// does its share of every job, one after the other.
struct Role {
    bool counts;
    int sender, sender_count;      // -1: not a sender
    int receiver, receiver_count;  // -1: not a receiver

    EP_DEVICE static Role of(const Round &round) {
        const int block = static_cast<int>(grid_index<Block>());
        if constexpr (!kRolesApart)
            return {block == 0, block, static_cast<int>(grid_count<Block>()), block,
                    static_cast<int>(grid_count<Block>())};
        const int sender = block - 1, receiver = sender - round.sender_block_count;
        return {block == 0, receiver >= 0 ? -1 : sender, round.sender_block_count,
                receiver >= 0 ? receiver : -1, round.receiver_block_count};
    }
};

// The epoch of a launch's round. A handle's own is of the round that it sent last.
EP_DEVICE uint64_t epoch_of(const Round &round, const uint64_t &tickets, const uint64_t &sent) {
    return round.sends() ? load(&tickets) / BufferState::kTicketsOfRound + 1 : sent;
}

// What a block of a launch hands in.
EP_DEVICE uint64_t tickets_of_block() {
    const uint64_t others = grid_count<Block>() - 1;
    return grid_index<Block>() == 0 ? BufferState::kTicketsOfRound - others : uint64_t{1};
}

// Ends a block of a launch that sends.
EP_DEVICE void hand_in(uint64_t *tickets) {
    Block::sync();
    if (Block::rank() == 0) fetch_add(tickets, tickets_of_block());
}

// A word that the counter of this launch, or of the one before it, posts when it has decided. It
// does so in the end, whatever peers do.
EP_DEVICE int decided(const uint64_t *word, uint64_t epoch) {
    for (uint32_t attempt = 0;; ++attempt) {
        const uint64_t signal = look(word);
        if (Signal::is_of(signal, epoch)) return Signal::value(signal);
        pause(attempt);
    }
}

// The same for two neighbours.
EP_DEVICE void decided(const uint64_t *words, uint64_t epoch, int *one, int *next) {
    for (uint32_t attempt = 0;; ++attempt) {
        const uint64_t first = look(words), second = look(words + 1);
        *one = Signal::value(first);
        *next = Signal::value(second);
        if (Signal::is_of(first, epoch) && Signal::is_of(second, epoch)) return;
        pause(attempt);
    }
}

// Is the peer to get what this launch has for it? Yes if the counter has told it so, whatever has
// become of it since; who finds it in step earlier than the counter need not ask.
EP_DEVICE bool may_send(const Round &r, Cargo cargo, uint64_t epoch, int peer) {
    if (peer == r.rank) return true;
    const Pace &pace = r.paces[peer];
    const uint64_t begun = load(&pace.begun[operation_of(cargo)]);
    if (is_active(r, peer) && is_in_step(r, epoch, begun)) return true;
    const int standing = decided(&pace.standing[operation_of(cargo)], epoch);
    return standing == static_cast<int>(Standing::kInStep);
}

// The same of weights, which a launch before sends. What it holds back, the counter finds.
EP_DEVICE bool may_send_weights(const Round &r, uint64_t epoch, int peer) {
    const Standing standing = standing_of(r, Cargo::kWeights, epoch, peer);
    if (standing == Standing::kBehind) post(&r.paces[peer].unweighted, epoch);
    return standing == Standing::kInStep;
}

// Masks a peer, and takes note of why, if nobody else has. The incident's number is left open.
EP_DEVICE void mask(const Round &r, const Incident &incident) {
    if (swap(&r.active[incident.peer], 0) == 0) return;
    const uint64_t number = fetch_add(&r.state->incident_count, uint64_t{1}) + 1;
    Incident &kept = r.state->incidents[(number - 1) % BufferState::kIncidentsKept];
    kept.epoch = incident.epoch;
    kept.waited_ns = incident.waited_ns;
    kept.peer = incident.peer;
    kept.awaited = incident.awaited;
    kept.broke_limit = incident.broke_limit;
    publish(&kept.number, number);
}

EP_DEVICE void mask_for_limit(const Round &r, uint64_t epoch, int peer, Awaited awaited) {
    mask(r, {0, epoch, 0, peer, awaited, 1, 0});
}

// Tells the caller which ranks are not in the group. A block.
EP_DEVICE void drop_absent(const Round &r) {
    EP_ROLLED
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size())
        if (load(&r.members[peer]) == 0) store(&r.active[peer], 0);
}

EP_DEVICE uint64_t timeout_of(const Round &r) {
    return r.timeout_ns == Round::kOfBuffer ? look(&r.state->timeout_ns) : r.timeout_ns;
}

EP_DEVICE bool has_begun(const Round &r, uint64_t epoch, int peer) {
    const uint64_t begun = look(words_from(r, Cargo::kPartials, epoch, peer));
    return Signal::is_of(begun, epoch) || Signal::is_after(begun, epoch);
}

// Has this rank held back from the peer what it needs to give sums: the tokens of the handle's
// dispatch, if that is the last there was, or the weights of this combine? The peer has masked it
// for that.
EP_DEVICE bool has_held_back(const Round &r, uint64_t epoch, int peer) {
    const uint64_t standing = look(&r.paces[peer].standing[0]);
    const bool tokens = Signal::is_of(standing, r.routing.state->dispatch_epoch) &&
                        Signal::value(standing) == static_cast<int>(Standing::kBehind);
    return tokens || look(&r.paces[peer].unweighted) == epoch;
}

// Will what is awaited never come? Its source may have gone on to later rounds, or have told, when
// it began this one, that it has nothing for this rank: either because this rank was late. Who
// waited for it would be late with the next round too, and so for ever.
EP_DEVICE bool waits_in_vain(const Round &r, uint64_t epoch, int source, Awaited awaited) {
    const bool of_own_tokens = awaited == Awaited::kSums || awaited == Awaited::kBegin;
    if (of_own_tokens && has_held_back(r, epoch, source)) return true;
    if (awaited == Awaited::kBegin || awaited == Awaited::kFence) return false;
    const bool dispatches = awaited == Awaited::kCounts || awaited == Awaited::kRows;
    const Cargo cargo = dispatches ? Cargo::kMessages : Cargo::kPartials;
    const uint64_t begun = look(begin_word(r, cargo, words_from(r, cargo, epoch, source)));
    if (Signal::is_after(begun, epoch)) return true;
    if (!Signal::is_of(begun, epoch)) return false;
    return Signal::value(begun) == kHeldBack ||
           (awaited == Awaited::kSums && Signal::value(begun) == kNoSums);
}

// Have all members begun this combine? Each has stored its weights before it tells, so then nobody
// waits for those of a lost rank.
EP_DEVICE bool have_all_begun(const Round &r, uint64_t epoch) {
    for (int peer = 0; peer < r.layout.shape.rank_count; ++peer)
        if (peer != r.rank && load(&r.members[peer]) != 0 &&
            !(is_active(r, peer) && has_begun(r, epoch, peer)))
            return false;
    return true;
}

// Has this rank masked one in this combine?
EP_DEVICE bool has_masked_one(const Round &r, uint64_t epoch) {
    const uint64_t count = look(&r.state->incident_count);
    if (count == 0) return false;
    const Incident &newest = r.state->incidents[(count - 1) % BufferState::kIncidentsKept];
    if (observe<Thread>(&newest.number) != count) return true;  // it is being written
    return newest.epoch == epoch && newest.awaited != Awaited::kCounts &&
           newest.awaited != Awaited::kRows;
}

// Waits of one block; their deadline counts from its start. With `may_wait`, what is waited for may
// itself wait for a third rank: sums for the weights of this combine.
struct Wait {
    const Round &round;
    bool may_wait;
    uint64_t began_ns;

    EP_DEVICE explicit Wait(const Round &r, bool may_wait_itself = false)
        : round(r), may_wait(may_wait_itself), began_ns(now_ns()) {}

    // Who waits in vain shall not be late with what others wait for next: so rows are due a while
    // before weights and sums, these before what tells of a begin, and after that what waits
    // itself.
    EP_DEVICE bool is_late(uint64_t epoch, int source, Awaited awaited, uint64_t waited_ns) const {
        if (source != round.rank && waits_in_vain(round, epoch, source, awaited)) return true;
        constexpr int kMargins = 16;  // of the timeout
        const uint64_t timeout_ns = timeout_of(round), margin_ns = timeout_ns / kMargins;
        const bool ends_early = awaited == Awaited::kWeights || awaited == Awaited::kSums;
        const int early = awaited == Awaited::kRows ? 2 : ends_early ? 1 : 0;
        if (waited_ns <= timeout_ns - early * margin_ns) return false;
        if (!may_wait || have_all_begun(round, epoch)) return true;
        if (!has_begun(round, epoch, source)) return waited_ns > timeout_ns;
        return waited_ns > timeout_ns + (has_masked_one(round, epoch) ? timeout_ns : margin_ns);
    }

    // Until `source` has published a word of this epoch. False if it is masked, or misses the
    // deadline, which masks it. The whole group gets the same answer.
    template <class Group>
    EP_DEVICE bool until(const uint64_t *word, uint64_t epoch, int source, Awaited awaited,
                         uint64_t *value) const {
        for (uint32_t attempt = 0;; ++attempt) {
            *value = observe<Group>(word);
            if (!Group::broadcast(int{is_active(round, source)})) return false;
            if (Signal::is_of(*value, epoch)) return true;
            lapse<Group>(epoch, source, awaited, attempt);
        }
    }

    // The same for a posted word; one thread. With `counts`, which one for each source and
    // operation says, the time is added to the source's, and it is kept that it has begun the
    // round.
    EP_DEVICE bool until_posted(const uint64_t *word, uint64_t epoch, int source, Awaited awaited,
                                bool counts, uint64_t *value) const {
        uint64_t *begun = &round.paces[source].begun[awaited != Awaited::kCounts];
        const uint64_t known = counts ? load(begun) : 0;
        bool active = true;
        uint32_t attempt = 0;
        for (;; ++attempt) {
            *value = look(word);
            active = is_active(round, source);
            if (!active || Signal::is_of(*value, epoch)) break;
            // Who has begun a later round has begun this one.
            if (awaited == Awaited::kBegin && Signal::is_after(*value, epoch)) break;
            if (lapse<Thread>(epoch, source, awaited, attempt) && source == round.rank)
                return false;
        }
        if (counts && active && known < epoch) post(begun, epoch);
        if (counts && attempt > 0)
            fetch_add(&round.peer_counts[source].waited_ns, now_ns() - began_ns);
        return active;
    }

    // Between two looks. At the deadline, which the group's first thread hears of, masks the
    // source. This rank itself cannot be masked; it waits for its own words, which a faulty peer
    // may have overwritten.
    template <class Group>
    EP_DEVICE bool lapse(uint64_t epoch, int source, Awaited awaited, uint32_t attempt) const {
        bool late = false;
        if (clock_is_due(attempt) && Group::rank() == 0) {
            const uint64_t waited_ns = now_ns() - began_ns;
            late = is_late(epoch, source, awaited, waited_ns);
            if (late && source != round.rank)
                mask(round, {0, epoch, waited_ns, source, awaited, 0, 0});
        }
        pause(attempt);
        return late;
    }
};

// Shares out the blocks of a launch, for so many things to send and to receive.
inline void set_roles(Round *round, const Queue &queue, int send_count, int receive_count) {
    const int senders = sender_block_count_max(queue), receivers = receiver_block_count_max(queue);
    const auto between = [](int count, int most) {
        return count < 1 ? 1 : count < most ? count : most;
    };
    round->sender_block_count = kRolesApart ? between(send_count, senders) : senders;
    round->receiver_block_count = kRolesApart ? between(receive_count, receivers) : receivers;
}

}  // namespace ep::EP_DEVICE_NAMESPACE
