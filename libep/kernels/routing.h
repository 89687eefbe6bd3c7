// Questions that both operations ask about a token's choices, and waits for peers.
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"

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

// How many of the first `count` choices are experts of the range, each counted once.
EP_DEVICE int entries_before(const int32_t *choices, int count, ExpertRange range) {
    int entries = 0;
    for (int k = 0; k < count; ++k)
        entries += range.has(choices[k]);
    return entries;
}

// The weight of choice k and of its repeats.
EP_DEVICE float merged_weight(const int32_t *choices, const float *weights, int k, int topk) {
    float sum = weights == nullptr ? 1.0f : weights[k];
    for (int other = k + 1; other < topk; ++other)
        if (choices[other] == Routing::repeat_of(choices[k]))
            sum += weights == nullptr ? 1.0f : weights[other];
    return sum;
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

// Does this rank take part? Its own rank always does.
EP_DEVICE bool is_active(const Round &round, int rank) {
    return rank == round.rank || load(&round.active[rank]) != 0;
}

// Waits of one block; their deadline counts from its start.
struct Wait {
    const Round &round;
    uint64_t began_ns;

    EP_DEVICE explicit Wait(const Round &r) : round(r), began_ns(now_ns()) {}

    // Until `source` has published a word of this epoch. False if it is masked, or misses the
    // deadline, which masks it. The whole group gets the same answer.
    template <class Group>
    EP_DEVICE bool until(const uint64_t *word, uint64_t epoch, int source, uint64_t *value) const {
        constexpr uint32_t kLooksPerClock = 32;  // the clock costs more than a look
        for (uint32_t attempt = 0;; ++attempt) {
            *value = observe<Group>(word);
            if (!Group::broadcast(int{is_active(round, source)})) return false;
            if (Signal::is_of(*value, epoch)) return true;
            if (attempt % kLooksPerClock == kLooksPerClock - 1 && Group::rank() == 0 &&
                now_ns() - began_ns > round.timeout_ns)
                store(&round.active[source], 0);
            pause(attempt);
        }
    }
};

}  // namespace ep::EP_DEVICE_NAMESPACE
