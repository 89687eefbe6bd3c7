// What an engine carries between GPUs that do not reach each other's memory: whole boxes, received
// from where they came, or delivered to the window first. On the CPU; with EP_DEVICE_EMU on a GPU
// made of threads.
#include "support/fleet.h"

#if defined(EP_DEVICE_EMU)
#include "kernels/table.h"
#else
#include "backend/cpu_levels.h"
#endif

#include <chrono>

namespace ep::test {
namespace {

class Exchanged {
  public:
    Exchanged(Fleet *fleet, bool in_halves) : fleet_(fleet), in_halves_(in_halves) {}

    void send_dispatch(Round *round) {
        all(round, false, [&](Task &task) { fleet_->dispatch_send(task); });
        carry(Cargo::kMessages, round);
    }
    void receive_dispatch(Round *round) {
        all(round, !in_halves_, [&](Task &task) { fleet_->dispatch_receive(task); });
    }
    void send_combine(Round *round) {
        const bool late = fleet_->rig().weights == Weights::kAtCombine;
        if (late) {
            all(round, false, [&](Task &task) { fleet_->send_weights(task); });
            fleet_->exchange(Cargo::kWeights);
        }
        all(round, late, [&](Task &task) { fleet_->combine_send(task); });
        carry(Cargo::kPartials, round);
    }
    void receive_combine(Round *round) {
        all(round, !in_halves_, [&](Task &task) { fleet_->combine_receive(task); });
    }

  private:
    template <class Phase>
    void all(Round *round, bool from_inbox, Phase phase) {
        for (Task &task : round->tasks) {
            fleet_->receive_from_inbox(task, from_inbox);
            phase(task);
        }
    }
    void carry(Cargo cargo, Round *round) {
        fleet_->exchange(cargo);
        for (Task &task : round->tasks)
            if (in_halves_) fleet_->deliver(cargo, task);
    }

    Fleet *fleet_;
    bool in_halves_;
};

void expect_right(Fleet &fleet, const Round &round, const char *which) {
    for (int rank = 0; rank < fleet.rig().ranks; ++rank) {
        EXPECT_TRUE(fleet.dispatched(round, rank)) << which;
        EXPECT_TRUE(fleet.combined(round, rank)) << which;
        EXPECT_EQ(fleet.active(rank), std::vector<int32_t>(fleet.rig().ranks, 1)) << which;
    }
}

void expect_rounds_are_right(const Rig &rig, uint64_t seed, bool in_halves) {
    Fleet fleet(rig);
    Exchanged exchanged(&fleet, in_halves);
    for (int i = 0; i < 3; ++i) {  // full, one rank with nothing, any
        Round round = fleet.round(seed + i, i == 0   ? std::vector<int>(rig.ranks, rig.tokens_max)
                                            : i == 1 ? std::vector<int>{0}
                                                     : std::vector<int>{});
        exchanged.send_dispatch(&round);
        exchanged.receive_dispatch(&round);
        exchanged.send_combine(&round);
        exchanged.receive_combine(&round);
        expect_right(fleet, round, in_halves ? "in halves" : "whole");
    }
}

TEST(Boxes, CarryRounds) {
    for (const Weights weights : {Weights::kAtDispatch, Weights::kAtCombine, Weights::kNone})
        for (const bool in_halves : {false, true})
            expect_rounds_are_right(rig_of_far_ranks(weights), 10, in_halves);
}

TEST(Boxes, CarryFp8WithItsScales) {
    Rig rig = rig_of_far_ranks(Weights::kAtDispatch);
    rig.quant = Quant::kFp8;
    rig.hidden = 640;  // the scales are no whole vector
    rig.fp32_partials = true;
    for (const bool in_halves : {false, true})
        expect_rounds_are_right(rig, 20, in_halves);
}

// The second round goes through the boxes before the first is received from the window.
TEST(Boxes, AreFreeForTheNextRoundOnceDelivered) {
    Fleet fleet(rig_of_far_ranks(Weights::kAtDispatch));
    Exchanged exchanged(&fleet, true);
    Round first = fleet.round(30), second = fleet.round(31);
    exchanged.send_dispatch(&first);
    exchanged.send_dispatch(&second);
    exchanged.receive_dispatch(&second);
    exchanged.receive_dispatch(&first);
    exchanged.send_combine(&first);
    exchanged.send_combine(&second);
    exchanged.receive_combine(&second);
    exchanged.receive_combine(&first);
    expect_right(fleet, first, "first");
    expect_right(fleet, second, "second");
}

// As after an exchange that was given up: what came of it is not looked at, whole or not.
TEST(Boxes, OfMaskedPeersAreNotLookedAt) {
    for (const bool in_halves : {false, true}) {
        Rig rig = rig_of_far_ranks(Weights::kAtDispatch);
        rig.timeout_ns = 30'000'000'000;  // a wait for them would be seen
        Fleet fleet(rig);
        Round round = fleet.round(40, {rig.tokens_max, rig.tokens_max, rig.tokens_max});
        for (Task &task : round.tasks)
            fleet.dispatch_send(task);
        fleet.exchange(Cargo::kMessages);
        for (int rank = 0; rank < rig.ranks; ++rank)
            for (int peer = 0; peer < rig.ranks; ++peer)
                fleet.active(rank)[peer] = peer == rank;
        const std::vector<char> before(fleet.window(0), fleet.window(0) + fleet.layout().bytes);
        const auto began = std::chrono::steady_clock::now();
        for (Task &task : round.tasks) {
            if (in_halves) fleet.deliver(Cargo::kMessages, task);
            if (in_halves && task.rank == 0) {
                EXPECT_EQ(std::memcmp(before.data(), fleet.window(0), before.size()), 0);
            }
            fleet.receive_from_inbox(task, !in_halves);
            fleet.dispatch_receive(task);
            for (int e = 0; e < rig.local_experts(); ++e) {
                int32_t own = 0;
                for (const Packed &row : round.rows[task.rank * rig.local_experts() + e])
                    own += row.source == task.rank;
                EXPECT_EQ(task.out_count[e], own);
            }
        }
        EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(10));
    }
}

TEST(Boxes, AreWatchedByTheHost) {
    constexpr uint64_t kRounds = 3;
    Fleet fleet(rig_of_far_ranks(Weights::kAtDispatch));
    Round round = fleet.round(50);
    Task &task = round.tasks[1];
    Watch watch{};
    WatchState state{};
    for (uint64_t i = 0; i < kRounds; ++i) {
        fleet.watch(task, &watch, &state, false);
        EXPECT_EQ(watch.begun, i + 1);
        EXPECT_EQ(watch.done, i);
        EXPECT_EQ(watch.timeout_ns, fleet.rig().timeout_ns);
        fleet.watch(task, &watch, &state, true);
        EXPECT_EQ(watch.done, i + 1);
        EXPECT_EQ(fleet.active(1), (std::vector<int32_t>{1, 1, 1}));
    }
    watch.failed = 1;  // given up: nobody far is looked at any more
    fleet.watch(task, &watch, &state, false);
    fleet.watch(task, &watch, &state, true);
    EXPECT_EQ(watch.done, kRounds + 1);
    EXPECT_EQ(fleet.active(1), (std::vector<int32_t>{0, 1, 0}));
}

}  // namespace

Kernels kernels_under_test() {
#if defined(EP_DEVICE_EMU)
    return emu::kernels();
#else
    return cpu_levels().front().kernels;
#endif
}

}  // namespace ep::test
