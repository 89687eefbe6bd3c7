// What the kernels promise on every device. The device's own test file includes this and says with
// which shapes.
#pragma once

#include "support/fleet.h"
#include "support/pen.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

namespace ep::test {

inline std::string describe(const Rig &rig, uint64_t seed) {
    std::ostringstream text;
    text << rig << ", seed " << seed;
    return text.str();
}

// Lets others run for a while that differs from call to call.
class Jitter {
  public:
    explicit Jitter(uint64_t seed) : random_(seed) {}
    void operator()() {
        const uint64_t draw = random_();
        for (uint64_t i = draw >> 8 & (draw % 4 == 0 ? 255 : 7); i > 0; --i)
            sched_yield();
    }

  private:
    std::mt19937_64 random_;
};

inline uint64_t invalid_ids(const Tokens &tokens, int experts) {
    uint64_t count = 0;
    for (const int64_t id : tokens.topk_idx)
        count += id != -1 && (id < 0 || id >= experts);
    return count;
}

inline void expect_right(const Fleet &fleet, const Round &round) {
    for (int rank = 0; rank < fleet.rig().ranks; ++rank) {
        if (round.lost[rank]) continue;
        EXPECT_TRUE(fleet.dispatched(round, rank));
        EXPECT_TRUE(fleet.combined(round, rank));
    }
}

// What went from rank to rank, and to each expert.
inline void expect_counted(Fleet &fleet, const std::vector<Round> &rounds) {
    const Rig &rig = fleet.rig();
    std::vector<uint64_t> rows(rig.experts);
    std::vector<std::vector<uint64_t>> from_to(rig.ranks, std::vector<uint64_t>(rig.ranks));
    for (const Round &round : rounds)
        for (int e = 0; e < rig.experts; ++e)
            for (const Packed &one : round.rows[e]) {
                ++rows[e];
                ++from_to[one.source][e / rig.local_experts()];
            }
    for (int rank = 0; rank < rig.ranks; ++rank) {
        for (int peer = 0; peer < rig.ranks; ++peer) {
            EXPECT_EQ(fleet.peer_counts(rank, peer).rows_sent, from_to[rank][peer]);
            EXPECT_EQ(fleet.peer_counts(rank, peer).rows_received, from_to[peer][rank]);
        }
        EXPECT_EQ(fleet.peer_counts(rank, rank).waited_ns, 0U);
        for (int e = 0; e < rig.local_experts(); ++e)
            EXPECT_EQ(fleet.expert_rows(rank)[e], rows[rank * rig.local_experts() + e]);
    }
}

// Rounds one after the other, ranks running at their own speeds.
inline void expect_rounds_are_right(const Rig &rig, uint64_t seed, int round_count) {
    SCOPED_TRACE(describe(rig, seed));
    Fleet fleet(rig);
    std::vector<Round> rounds;
    for (int i = 0; i < round_count;
         ++i)  // the first is full, and one rank has nothing in the second
        rounds.push_back(fleet.round(seed + i, i == 0 ? std::vector<int>(rig.ranks, rig.tokens_max)
                                               : i == 1 ? std::vector<int>{0}
                                                        : std::vector<int>{}));
    fleet.run([&](int rank) {
        Jitter jitter(seed ^ rank);
        for (Round &round : rounds) {
            fleet.both(round.tasks[rank]);
            jitter();
        }
    });
    std::vector<uint64_t> invalid(rig.ranks);
    for (const Round &round : rounds) {
        expect_right(fleet, round);
        for (int rank = 0; rank < rig.ranks; ++rank)
            invalid[rank] += invalid_ids(round.tasks[rank].tokens, rig.experts);
    }
    for (int rank = 0; rank < rig.ranks; ++rank) {
        EXPECT_EQ(fleet.state(rank).invalid_expert_ids, invalid[rank]);
        EXPECT_EQ(fleet.state(rank).invalid_messages, 0U);
        EXPECT_EQ(fleet.state(rank).dispatch_tickets / BufferState::kTicketsOfRound,
                  uint64_t(round_count));
        EXPECT_EQ(fleet.active(rank), std::vector<int32_t>(rig.ranks, 1));
        EXPECT_EQ(fleet.state(rank).incident_count, 0U);
    }
    expect_counted(fleet, rounds);
}

// Two rounds in flight, received in the order they were sent by some ranks and the other by others.
inline void expect_either_order_is_right(const Rig &rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    Fleet fleet(rig);
    std::vector<Round> rounds = {fleet.round(seed), fleet.round(seed + 1)};
    fleet.run([&](int rank) {
        Task &one = rounds[0].tasks[rank], &two = rounds[1].tasks[rank];
        Task &first = rank % 2 == 0 ? one : two, &last = rank % 2 == 0 ? two : one;
        fleet.dispatch_send(one);
        fleet.dispatch_send(two);
        fleet.dispatch_receive(first);
        fleet.dispatch_receive(last);
        fleet.combine_send(one);
        fleet.combine_send(two);
        fleet.combine_receive(last);
        fleet.combine_receive(first);
    });
    for (const Round &round : rounds)
        expect_right(fleet, round);
}

// The same inputs give the same bits, also when the ranks run at other speeds.
inline void expect_same_bits(const Rig &rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    std::vector<Round> results;
    for (uint64_t run = 0; run < 2; ++run) {
        Fleet fleet(rig);
        results.push_back(fleet.round(seed));
        fleet.run([&, round = &results.back()](int rank) {
            Jitter jitter(run * 1000 + rank);
            for (const auto phase : {&Fleet::dispatch_send, &Fleet::dispatch_receive,
                                     &Fleet::combine_send, &Fleet::combine_receive}) {
                if (run > 0) jitter();
                (fleet.*phase)(round->tasks[rank]);
            }
        });
    }
    for (int rank = 0; rank < rig.ranks; ++rank) {
        const Task &one = results[0].tasks[rank], &two = results[1].tasks[rank];
        EXPECT_EQ(one.out_x, two.out_x);
        EXPECT_EQ(one.out_src_info, two.out_src_info);
        EXPECT_EQ(one.out, two.out);
    }
}

// ---- Reuse of slots
// -------------------------------------------------------------------------------

using Phase = void (Fleet::*)(Task &);

// Rounds of one operation with F in flight. Before each of its steps `held` waits until all others
// are as far ahead of it as the rules let them.
class HeldRank {
  public:
    HeldRank(Fleet *fleet, std::vector<Round> *rounds, int held)
        : fleet_(*fleet), rounds_(*rounds), held_(held), sent_(fleet->rig().ranks) {}

    void run(Phase send, Phase receive, int ahead_max) {
        for (std::atomic<int> &sent : sent_)
            sent = 0;
        fleet_.run([this, send, receive, ahead_max](int rank) {
            const int in_flight = fleet_.rig().rounds_in_flight, count = int(rounds_.size());
            for (int round = 0; round < count + in_flight - 1; ++round) {
                if (round < count) {
                    if (rank == held_) await_others(ahead_max);
                    (fleet_.*send)(rounds_[round].tasks[rank]);
                    ++sent_[rank];
                }
                const int oldest = round + 1 - in_flight;
                if (oldest < 0) continue;
                if (rank == held_) await_others(ahead_max);
                (fleet_.*receive)(rounds_[oldest].tasks[rank]);
            }
        });
    }

  private:
    void await_others(int ahead_max) {
        const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(25);
        const int goal = std::min(int(rounds_.size()), sent_[held_] + ahead_max);
        for (int rank = 0; rank < int(sent_.size()); ++rank)
            while (rank != held_ && sent_[rank] < goal) {
                ASSERT_LT(std::chrono::steady_clock::now(), give_up) << "rank " << rank << " hangs";
                sched_yield();
            }
    }

    Fleet &fleet_;
    std::vector<Round> &rounds_;
    const int held_;
    std::vector<std::atomic<int>> sent_;
};

// Whose tokens travel: if only the held rank has any, the others need no row of it, and nothing but
// the rules keeps them from running away.
enum class Travel { kAll, kHeldOnly };

inline void expect_held_rank_loses_nothing(const Rig &rig, int held, Travel travel, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed) + ", held rank " + std::to_string(held));
    const int flight = rig.rounds_in_flight;
    std::vector<int> counts(rig.ranks, travel == Travel::kAll ? rig.tokens_max : 0);
    counts[held] = rig.tokens_max;
    Fleet fleet(rig);
    std::vector<Round> rounds;
    for (int i = 0; i < 4 * flight + 2; ++i)
        rounds.push_back(fleet.round(seed + i, counts));
    HeldRank schedule(&fleet, &rounds, held);
    schedule.run(&Fleet::dispatch_send, &Fleet::dispatch_receive, flight);
    // A combine that brings weights waits for those of the others when it is sent.
    const bool waits = rig.weights == Weights::kAtCombine;
    schedule.run(&Fleet::combine_send, &Fleet::combine_receive, waits ? 0 : flight);
    for (const Round &round : rounds)
        expect_right(fleet, round);
}

// ---- Lost ranks
// -----------------------------------------------------------------------------------

constexpr uint64_t kShortNs = 20'000'000, kMediumNs = 1'000'000'000, kLongNs = 30'000'000'000;

// Each survivor has noted once that the dead rank was late, in the first round.
inline void expect_noted(Fleet &fleet, int dead, std::vector<Awaited> any_of) {
    for (int rank = 0; rank < fleet.rig().ranks; ++rank) {
        if (rank == dead) continue;
        EXPECT_EQ(fleet.state(rank).incident_count, 1U) << "rank " << rank;
        const Incident &noted = fleet.state(rank).incidents[0];
        EXPECT_EQ(noted.number, 1U);
        EXPECT_EQ(noted.peer, dead);
        EXPECT_EQ(noted.epoch, 1U);
        EXPECT_EQ(noted.broke_limit, 0);
        EXPECT_GT(noted.waited_ns, kShortNs / 8 * 7);  // rows are due first
        EXPECT_NE(std::find(any_of.begin(), any_of.end(), noted.awaited), any_of.end())
            << "it was waited for " << static_cast<int>(noted.awaited);
    }
}

inline void expect_masked(Fleet &fleet, int dead) {
    for (int rank = 0; rank < fleet.rig().ranks; ++rank)
        for (int peer = 0; rank != dead && peer < fleet.rig().ranks; ++peer)
            EXPECT_EQ(fleet.active(rank)[peer], peer == dead ? 0 : 1)
                << "rank " << rank << " about rank " << peer;
}

// Runs one phase on the survivors; all have done the one before, so only the dead can be late.
inline void expect_ends(Fleet &fleet, Round &round, Phase phase, int dead) {
    const auto start = std::chrono::steady_clock::now();
    fleet.run([&](int rank) { (fleet.*phase)(round.tasks[rank]); }, {dead});
    const auto slack = std::chrono::seconds(20);  // of a loaded machine under a sanitizer
    EXPECT_LT(std::chrono::steady_clock::now() - start,
              std::chrono::nanoseconds(fleet.rig().timeout_ns) + slack);
}

// A rank that never starts.
inline void expect_survivors_go_on(Rig rig, int dead, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed) + ", dead rank " + std::to_string(dead));
    rig.timeout_ns = kShortNs;
    Fleet fleet(rig);
    Round round = fleet.round(seed, {}, {dead});
    expect_ends(fleet, round, &Fleet::dispatch_send, dead);
    expect_ends(fleet, round, &Fleet::dispatch_receive, dead);
    expect_masked(fleet, dead);
    expect_noted(fleet, dead, {Awaited::kCounts, Awaited::kFence});
    fleet.set_timeout_ns(kLongNs);  // from here on nobody waits for the dead
    expect_ends(fleet, round, &Fleet::combine_send, dead);
    expect_ends(fleet, round, &Fleet::combine_receive, dead);
    expect_right(fleet, round);
    Round next = fleet.round(seed + 1, {}, {dead});
    fleet.run([&](int rank) { fleet.both(next.tasks[rank]); }, {dead});
    expect_right(fleet, next);
}

// body(rank) on all but the dead; one of them starts so much later.
template <class Body>
void run_with_a_late_rank(Fleet &fleet, int late, uint64_t late_ns, int dead, Body body) {
    const auto late_start = std::chrono::steady_clock::now() + std::chrono::nanoseconds(late_ns);
    fleet.run(
        [&](int rank) {
            while (rank == late && std::chrono::steady_clock::now() < late_start)
                sched_yield();
            body(rank);
        },
        {dead});
}

// The same where a launch sends and receives, and a survivor starts late: who waits for the dead
// rank is late with its own rows, and is not taken for dead for that.
inline void expect_survivors_keep_each_other(Rig rig, int late, int dead, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed) + ", dead rank " + std::to_string(dead));
    rig.timeout_ns = kMediumNs;
    Fleet fleet(rig);
    Round round = fleet.round(seed, std::vector<int>(rig.ranks, rig.tokens_max), {dead});
    run_with_a_late_rank(fleet, late, kMediumNs / 4, dead,
                         [&](int rank) { fleet.both(round.tasks[rank]); });
    expect_masked(fleet, dead);
    expect_right(fleet, round);
}

// The same in combine, with weights that come only then: who waits for those of the dead rank is
// late with its sums.
inline void expect_survivors_keep_each_other_in_combine(Rig rig, int late, int dead,
                                                        uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed) + ", dead rank " + std::to_string(dead));
    Fleet fleet(rig);
    Round round = fleet.round(seed, std::vector<int>(rig.ranks, rig.tokens_max));
    fleet.run([&](int rank) { fleet.dispatch(round.tasks[rank]); });
    constexpr uint64_t kTimeoutNs = 2 * kMediumNs;  // a loaded machine takes long for the rest
    fleet.set_timeout_ns(kTimeoutNs);
    run_with_a_late_rank(fleet, late, kTimeoutNs / 4, dead,
                         [&](int rank) { fleet.combine(round.tasks[rank]); });
    expect_masked(fleet, dead);
    round.lost[dead] = 1;
    for (int rank = 0; rank < rig.ranks; ++rank)
        EXPECT_TRUE(rank == dead || fleet.combined(round, rank));
}

// What a rank sends that dies while it sends reaches some and not others, and who misses it is late
// with what comes next. All of that is done by threads that start together, the deadline far from
// what a loaded machine takes.
constexpr uint64_t kUnevenNs = kMediumNs / 2 * 3;

inline void expect_the_living_are_kept(Fleet &fleet, const Round &round, int dead) {
    for (int rank = 0; rank < fleet.rig().ranks; ++rank) {
        if (rank == dead) continue;
        for (int peer = 0; peer < fleet.rig().ranks; ++peer)
            EXPECT_TRUE(peer == dead || fleet.active(rank)[peer] != 0)
                << "rank " << rank << " masked rank " << peer;
        // With what the dead one has given, where it came; else all would be told to be lost.
        Round without = round;
        without.lost[dead] = 1;
        EXPECT_TRUE(fleet.combined(round, rank) || fleet.combined(without, rank));
    }
}

// All its rows came to rank 0, and not all to rank 1.
inline void expect_uneven_rows_keep_the_living(Rig rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    constexpr int kDead = 2;
    Fleet fleet(rig);
    Round round = fleet.round(seed, std::vector<int>(rig.ranks, rig.tokens_max));
    fleet.dispatch_send(round.tasks[kDead]);
    lose_message(fleet.layout(), fleet.window(1),
                 {kDead, 1, rig.tokens_max - 1, 1, rig.out_row_bytes()}, 1);
    Round left = fleet.without(round, kDead);
    round.tasks[1] = left.tasks[1];
    fleet.set_timeout_ns(kUnevenNs);
    fleet.run([&](int rank) { fleet.both(round.tasks[rank]); }, {kDead});
    expect_the_living_are_kept(fleet, round, kDead);
}

// Its weights came to rank 0, and none to rank 1, which starts later.
inline void expect_uneven_weights_keep_the_living(Rig rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    constexpr int kDead = 2, kLate = 1;
    Fleet fleet(rig);
    Round round = fleet.round(seed, std::vector<int>(rig.ranks, rig.tokens_max));
    fleet.run([&](int rank) { fleet.dispatch(round.tasks[rank]); });
    fleet.send_weights(round.tasks[kDead]);
    for (int token = 0; token < rig.tokens_max; ++token)
        *Layout::flag(fleet.layout().weight(fleet.window(kLate), 1, kLate, kDead, token)) = 0;
    fleet.set_timeout_ns(kUnevenNs);
    run_with_a_late_rank(fleet, kLate, kUnevenNs / 4, kDead,
                         [&](int rank) { fleet.combine(round.tasks[rank]); });
    expect_the_living_are_kept(fleet, round, kDead);
}

// Rank 2 knows already that rank 1 is dead, and rank 0 does not.
inline void expect_uneven_masks_keep_the_living(Rig rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    constexpr int kDead = 1;
    Fleet fleet(rig);
    Round round = fleet.round(seed, std::vector<int>(rig.ranks, rig.tokens_max));
    fleet.run([&](int rank) { fleet.dispatch(round.tasks[rank]); });
    fleet.set_timeout_ns(kUnevenNs);
    fleet.active(2)[kDead] = 0;
    fleet.run([&](int rank) { fleet.combine(round.tasks[rank]); }, {kDead});
    expect_the_living_are_kept(fleet, round, kDead);
}

// A rank dies after it has begun a combine, and another begins late: that costs no second deadline.
inline void expect_one_deadline(Rig rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    constexpr int kDead = 2, kLate = 1;
    Fleet fleet(rig);
    Round round = fleet.round(seed, std::vector<int>(rig.ranks, rig.tokens_max));
    fleet.run([&](int rank) { fleet.dispatch(round.tasks[rank]); });
    if (rig.weights == Weights::kAtCombine)
        for (int rank = 0; rank < 2; ++rank)
            fleet.send_weights(round.tasks[rank]);
    fleet.combine_send(round.tasks[kDead]);
    for (int token = 0; token < rig.tokens_max; ++token)
        *Layout::flag(fleet.layout().partial(fleet.window(0), 1, 0, kDead, token)) = 0;
    fleet.set_timeout_ns(kUnevenNs);
    const auto start = std::chrono::steady_clock::now();
    std::chrono::nanoseconds took{};
    run_with_a_late_rank(fleet, kLate, kUnevenNs / 10 * 8, kDead, [&](int rank) {
        fleet.combine_after_weights(round.tasks[rank]);
        if (rank == 0) took = std::chrono::steady_clock::now() - start;
    });
    EXPECT_LT(took.count(), int64_t(kUnevenNs / 10 * 14));
    expect_the_living_are_kept(fleet, round, kDead);
}

// A rank that dies between its counts and the last of its rows: none of its rows is left, counts
// are true to what came, and the rows of the others are where they are said to be, exact, and
// summed.
inline void expect_rows_of_lost_are_left_out(Rig rig, int dead, bool in_halves, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed) + ", dead rank " + std::to_string(dead));
    Fleet fleet(rig);
    Round told = fleet.round(seed, std::vector<int>(rig.ranks, rig.tokens_max));
    fleet.dispatch_send(told.tasks[dead]);
    std::mt19937_64 random(seed);
    for (int rank = 0; rank < rig.ranks; ++rank)
        for (int lost = 1 + int(random() % rig.tokens_max); rank != dead && lost > 0; --lost)
            lose_message(fleet.layout(), fleet.window(rank),
                         {dead, rank, int(random() % rig.tokens_max), 1, rig.out_row_bytes()},
                         random());
    if (in_halves) expect_ends(fleet, told, &Fleet::dispatch_send, dead);
    fleet.set_timeout_ns(in_halves ? kShortNs : kMediumNs / 2);
    expect_ends(fleet, told, in_halves ? &Fleet::dispatch_receive : &Fleet::dispatch, dead);
    expect_masked(fleet, dead);
    expect_noted(fleet, dead, {Awaited::kRows});
    fleet.set_timeout_ns(kLongNs);
    Round left = fleet.without(told, dead);
    for (int rank = 0; rank < rig.ranks; ++rank) {
        if (rank == dead) continue;
        EXPECT_TRUE(fleet.dispatched(left, rank, told));
        EXPECT_EQ(fleet.peer_counts(rank, dead).rows_received, 0U);
        for (int e = 0; e < rig.local_experts(); ++e)
            EXPECT_EQ(fleet.expert_rows(rank)[e], left.rows[rank * rig.local_experts() + e].size());
    }
    expect_ends(fleet, left, &Fleet::combine, dead);
    for (int rank = 0; rank < rig.ranks; ++rank)
        EXPECT_TRUE(rank == dead || fleet.combined(left, rank));
    Round next = fleet.round(seed + 1, {}, {dead});
    fleet.run([&](int rank) { fleet.both(next.tasks[rank]); }, {dead});
    expect_right(fleet, next);
}

// A rank that is not in the group: whatever the mask says, it is neither sent to nor waited for.
inline void expect_absent_is_left_alone(Rig rig, int absent, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed) + ", absent rank " + std::to_string(absent));
    rig.timeout_ns = ep::Round::kNever;
    Fleet fleet(rig);
    for (int rank = 0; rank < rig.ranks; ++rank)
        fleet.present(rank)[absent] = 0;
    const std::vector<char> before(fleet.window(absent),
                                   fleet.window(absent) + fleet.layout().bytes);
    for (int halves = 0; halves < 2; ++halves) {
        Round round = fleet.round(seed + halves, {}, {absent});
        fleet.run(
            [&](int rank) {
                fleet.active(rank).assign(rig.ranks, 1);
                if (halves == 0) {
                    fleet.both(round.tasks[rank]);
                    return;
                }
                for (const Phase phase : {&Fleet::dispatch_send, &Fleet::dispatch_receive,
                                          &Fleet::combine_send, &Fleet::combine_receive})
                    (fleet.*phase)(round.tasks[rank]);
            },
            {absent});
        expect_masked(fleet, absent);
        expect_right(fleet, round);
    }
    EXPECT_EQ(std::memcmp(before.data(), fleet.window(absent), before.size()), 0);
    EXPECT_EQ(fleet.state(absent == 0 ? 1 : 0).incident_count, 0U);
}

// What lies in a rank's window but for the words that say that a round has begun.
inline std::vector<char> cargo_in_window(Fleet &fleet, int rank) {
    const Layout &layout = fleet.layout();
    std::vector<char> copy(fleet.window(rank), fleet.window(rank) + layout.bytes);
    for (int source = 0; source < layout.shape.rank_count; ++source) {
        for (int slot = 0; slot < layout.shape.slot_count; ++slot) {
            *layout.token_count(copy.data(), slot, source) = 0;
            *layout.arrival(copy.data(), slot, source) = 0;
        }
        for (int operation = 0; operation < Layout::kOperations; ++operation)
            *layout.fence(copy.data(), operation, source) = 0;
    }
    return copy;
}

// The callers name all ranks as active, whoever was masked.
inline void name_all(Fleet &fleet) {
    for (int rank = 0; rank < fleet.rig().ranks; ++rank)
        fleet.active(rank).assign(fleet.rig().ranks, 1);
}

constexpr int kAheadRank = 0, kBehindRank = 1;

// Of two ranks one stops in the middle of a round, and the other goes on without masking it for
// good: nothing takes the place of what it has not read, however far the other gets.
inline void expect_nothing_overtakes(Rig rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    rig.rounds_in_flight = 1;
    Fleet fleet(rig);
    Round round = fleet.round(seed, std::vector<int>(rig.ranks, rig.tokens_max));
    fleet.run([&](int rank) { fleet.dispatch(round.tasks[rank]); });
    Round next = fleet.round(seed + 1, std::vector<int>(rig.ranks, rig.tokens_max));
    fleet.run([&](int rank) { fleet.dispatch_send(next.tasks[rank]); });
    fleet.set_timeout_ns(kShortNs);
    fleet.dispatch_receive(next.tasks[kAheadRank]);
    // It has begun the second dispatch and no combine: the slots of one more of each are free.
    std::vector<char> before;
    Round more = fleet.round(seed + 2, std::vector<int>(rig.ranks, rig.tokens_max));
    for (int times = 0; times < 4; ++times) {
        name_all(fleet);
        fleet.dispatch(more.tasks[kAheadRank]);
        name_all(fleet);
        fleet.combine(round.tasks[kAheadRank]);
        const std::vector<char> after = cargo_in_window(fleet, kBehindRank);
        EXPECT_TRUE(times == 0 || before == after) << "after " << times << " more";
        before = after;
    }
}

// Until a rank has told another that it has begun the round of an epoch; what it says.
inline int told(const uint64_t *word, uint64_t epoch) {
    uint64_t signal = 0;
    while (!Signal::is_of(signal = __atomic_load_n(word, __ATOMIC_ACQUIRE), epoch))
        sched_yield();
    return Signal::value(signal);
}

constexpr uint64_t kCatchUpNs = kLongNs;  // a timeout that nobody should have to wait for
constexpr int kHeldBackWord = (1 << Signal::kValueBits) - 1;

// Two ranks with one round in flight, of which one is late for the second dispatch, and has done it
// when the other is in the third, where it holds its tokens back.
inline void expect_who_catches_up_is_heard(Rig rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    rig.rounds_in_flight = 1;
    Fleet fleet(rig);
    std::vector<Round> rounds;
    for (int i = 0; i < 3; ++i)
        rounds.push_back(fleet.round(seed + i, std::vector<int>(rig.ranks, rig.tokens_max)));
    fleet.run([&](int rank) { fleet.dispatch(rounds[0].tasks[rank]); });
    fleet.set_timeout_ns(kShortNs);
    fleet.dispatch(rounds[1].tasks[kAheadRank]);
    name_all(fleet);
    fleet.set_timeout_ns(kCatchUpNs);
    std::thread ahead([&] { fleet.both(rounds[2].tasks[kAheadRank]); });
    uint64_t *word = fleet.layout().token_count(fleet.window(kBehindRank), 3, kAheadRank);
    EXPECT_EQ(told(word, 3), kHeldBackWord);
    fleet.dispatch(rounds[1].tasks[kBehindRank]);
    EXPECT_TRUE(fleet.dispatched(rounds[1], kBehindRank));
    const auto start = std::chrono::steady_clock::now();
    fleet.both(rounds[2].tasks[kBehindRank]);
    ahead.join();
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::nanoseconds(kCatchUpNs / 2));
    EXPECT_TRUE(fleet.dispatched(rounds[2], kAheadRank));
    EXPECT_EQ(fleet.active(kBehindRank)[kAheadRank], 0);
    EXPECT_TRUE(fleet.dispatched(fleet.without(rounds[2], kAheadRank), kBehindRank));
}

// The launch that sends weights finds the peer behind; it has caught up when the next one tells.
inline void expect_held_back_weights_are_told(Rig rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    rig.rounds_in_flight = 1;
    rig.weights = Weights::kAtCombine;
    Fleet fleet(rig);
    Round round = fleet.round(seed, std::vector<int>(rig.ranks, rig.tokens_max));
    fleet.run([&](int rank) { fleet.dispatch(round.tasks[rank]); });
    fleet.set_timeout_ns(kShortNs);
    fleet.combine(round.tasks[kAheadRank]);
    name_all(fleet);
    fleet.send_weights(round.tasks[kAheadRank]);
    fleet.combine(round.tasks[kBehindRank]);
    name_all(fleet);
    fleet.set_timeout_ns(kCatchUpNs);
    const auto start = std::chrono::steady_clock::now();
    std::thread ahead([&] { fleet.combine_after_weights(round.tasks[kAheadRank]); });
    fleet.combine(round.tasks[kBehindRank]);
    ahead.join();
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::nanoseconds(kCatchUpNs / 2));
    uint64_t *word = fleet.layout().arrival(fleet.window(kBehindRank), 2, kAheadRank);
    EXPECT_EQ(told(word, 2), kHeldBackWord);
}

// The source goes on to a later round while this rank receives: all its blocks go by what the
// counter has decided.
inline void expect_blocks_agree_on_tokens(const Rig &rig, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed));
    for (int run = 0; run < 6; ++run) {
        Fleet fleet(rig);
        Round round = fleet.round(seed + run, std::vector<int>(rig.ranks, rig.tokens_max));
        for (int rank = 0; rank < rig.ranks; ++rank)
            fleet.dispatch_send(round.tasks[rank]);
        Task &task = round.tasks[kBehindRank];
        std::thread goes_on([&] {
            told(&task.token_counts[kAheadRank], 1);
            for (int i = run * 40; i > 0; --i)
                sched_yield();
            const uint64_t later = 1 + rig.layout().shape.slot_count;
            __atomic_store_n(
                fleet.layout().token_count(fleet.window(kBehindRank), later, kAheadRank),
                Signal::pack(later, kHeldBackWord), __ATOMIC_RELEASE);
        });
        fleet.dispatch_receive(task);
        goes_on.join();
        EXPECT_TRUE(fleet.dispatched(round, kBehindRank));
    }
}

// A rank that the others have masked for some rounds, and that has gone on with them, is sent to
// again as soon as all name it, whoever begins first.
inline void expect_unmasked_is_in_step(const Rig &rig, int masked, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed) + ", masked rank " + std::to_string(masked));
    Fleet fleet(rig);
    for (int i = 0; i < 2 * rig.rounds_in_flight + 1; ++i) {
        Round round = fleet.round(seed + i);
        for (int rank = 0; rank < rig.ranks; ++rank)
            for (int peer = 0; peer < rig.ranks; ++peer)
                fleet.active(rank)[peer] = (rank == masked) == (peer == masked);
        fleet.run([&](int rank) { fleet.both(round.tasks[rank]); });
    }
    Round round = fleet.round(seed + 100, std::vector<int>(rig.ranks, rig.tokens_max));
    name_all(fleet);
    for (const auto &[send, receive] :
         {std::pair<Phase, Phase>{&Fleet::dispatch_send, &Fleet::dispatch_receive},
          std::pair<Phase, Phase>{&Fleet::combine_send, &Fleet::combine_receive}}) {
        for (int rank = 0; rank < rig.ranks; ++rank)
            (fleet.*send)(round.tasks[rank]);
        fleet.run([&, now = receive](int rank) { (fleet.*now)(round.tasks[rank]); });
    }
    expect_right(fleet, round);
    for (int rank = 0; rank < rig.ranks; ++rank)
        EXPECT_EQ(fleet.active(rank), std::vector<int32_t>(rig.ranks, 1));
}

// A rank that takes part in dispatch, and then no more: its experts' share is left out of combine.
inline void expect_combine_without(Rig rig, int dead, uint64_t seed) {
    SCOPED_TRACE(describe(rig, seed) + ", dead rank " + std::to_string(dead));
    Fleet fleet(rig);
    Round round = fleet.round(seed);
    fleet.run([&](int rank) {
        fleet.dispatch_send(round.tasks[rank]);
        fleet.dispatch_receive(round.tasks[rank]);
    });
    fleet.set_timeout_ns(kShortNs);
    expect_ends(fleet, round, &Fleet::combine_send, dead);
    expect_ends(fleet, round, &Fleet::combine_receive, dead);
    expect_masked(fleet, dead);
    expect_noted(fleet, dead,
                 {Awaited::kSums, Awaited::kWeights, Awaited::kBegin, Awaited::kFence});
    round.lost[dead] = 1;
    for (int rank = 0; rank < rig.ranks; ++rank)
        EXPECT_TRUE(rank == dead || fleet.combined(round, rank));
}

}  // namespace ep::test
