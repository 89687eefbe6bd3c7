// The same kernels and promises on a GPU made of threads (device/emu.h), at the warp width that
// CMake compiles this file for. Shapes are small: a launch starts hundreds of threads.
#if !defined(EP_DEVICE_EMU)
#define EP_DEVICE_EMU
#endif
#include "kernels/promises.h"
#include "kernels/table.h"

namespace ep::test {
namespace {

// What does not depend on the width of a warp is shown at the narrowest: each lane is a thread.
constexpr bool kWide = emu::kWarpSize > 4;
constexpr bool kLines = emu::kLineTokenCountMax > 0;
constexpr const char *kWhyNotLines = "a line takes 8 lanes, and a device that has lines";
constexpr const char *kWhyNotWide = "does not depend on the width of a warp; see the narrowest";

constexpr bool kBulkCopies = emu::kHasBulkCopies;

Rig small(Element type, Quant quant, Weights weights) {
    Rig rig;
    rig.experts = 4;
    rig.tokens_max = kWide ? 2 : 3;
    rig.topk = 3;
    rig.type = type;
    rig.quant = quant;
    rig.weights = weights;
    rig.bulk_copies = kBulkCopies;
    return rig;
}

Rig small_bf16(Weights weights) {
    return small(Element::kBf16, Quant::kNone, weights);
}

// By flag rows move by bulk copies, or by the lanes of a warp.
void expect_rounds_are_right_both_ways(Rig rig, uint64_t seed, int round_count) {
    for (const bool bulk_copies : {true, false}) {
        if (bulk_copies && !kBulkCopies) continue;
        rig.bulk_copies = bulk_copies;
        expect_rounds_are_right(rig, seed, round_count);
    }
}

TEST(EmuKernels, CarryRowsAsTheyAre) {
    expect_rounds_are_right_both_ways(small_bf16(Weights::kAtDispatch), 100, kWide ? 1 : 3);
}

TEST(EmuKernels, CarryWeightsGivenAtCombine) {
    Rig rig = small_bf16(Weights::kAtCombine);
    rig.hidden = 264;  // more octets than a warp of 32 has lanes
    rig.fp32_partials = true;
    expect_rounds_are_right_both_ways(rig, 200, 1);
}

TEST(EmuKernels, CastRowsToFp8) {
    Rig rig = small(Element::kBf16, Quant::kFp8, Weights::kNone);
    rig.hidden = 384;  // three groups: not all lanes of a wide warp have one
    expect_rounds_are_right_both_ways(rig, 300, 1);
    rig.type = rig.combine_type = Element::kFp32;
    rig.quant = Quant::kFp8Pow2;
    expect_rounds_are_right_both_ways(rig, 301, 1);
}

TEST(EmuKernels, CarryFp8WithItsScales) {
    expect_rounds_are_right_both_ways(small(Element::kFp8, Quant::kNone, Weights::kNone), 400, 1);
}

// More pieces than a warp has slots for, the last not full; for combine, several chunks of each of
// several rows.
TEST(EmuKernels, MoveLongRowsByBulkCopies) {
    if (!kBulkCopies) GTEST_SKIP() << "no bulk copies on such a GPU";
    Rig rig = small_bf16(Weights::kAtDispatch);
    rig.experts = 4;
    rig.topk = 4;
    rig.hidden = 1160;
    expect_rounds_are_right(rig, 450, 1);
    rig.fp32_partials = true;
    expect_rounds_are_right(rig, 451, 1);
    rig = small(Element::kFp32, Quant::kFp8, Weights::kAtDispatch);
    rig.combine_type = Element::kFp32;
    rig.hidden = 640;
    expect_rounds_are_right(rig, 452, 1);
}

Rig by_line(Rig rig) {
    rig.carriage = Carriage::kLine;
    return rig;
}

TEST(EmuKernels, CarryRowsByLine) {
    if (!kLines) GTEST_SKIP() << kWhyNotLines;
    Rig rig = by_line(small_bf16(Weights::kAtDispatch));
    rig.hidden = 456;  // its last line is not full
    expect_rounds_are_right(rig, 1000, 2);
    rig.type = rig.combine_type = Element::kFp32;
    rig.weights = Weights::kAtCombine;
    rig.hidden = 264;  // two parts
    expect_rounds_are_right(rig, 1010, 1);
    rig.tokens_max = 4;  // more parts than warps: they grow
    rig.hidden = 512;
    expect_rounds_are_right(rig, 1020, 2);
}

TEST(EmuKernels, ServeThreeRanksByLine) {
    if (!kLines) GTEST_SKIP() << kWhyNotLines;
    Rig rig = by_line(small_bf16(Weights::kAtCombine));
    rig.ranks = 3;
    rig.experts = 6;
    rig.topk = 4;
    rig.idx_bytes = 4;
    rig.hidden = 16;
    rig.tokens_max = 5;
    expect_rounds_are_right(rig, 1050, 3);
}

// What is no expert is not taken for the only one there is.
TEST(EmuKernels, ServeOneExpert) {
    Rig rig = small_bf16(Weights::kAtDispatch);
    rig.ranks = rig.experts = 1;
    rig.topk = 2;
    rig.hidden = 8;
    rig.tokens_max = 16;
    expect_rounds_are_right(rig, 1060, 2);
    if (kLines) expect_rounds_are_right(by_line(rig), 1070, 2);
}

TEST(EmuKernels, CarryFp8ByLine) {
    if (!kLines) GTEST_SKIP() << kWhyNotLines;
    Rig rig = by_line(small(Element::kBf16, Quant::kFp8, Weights::kAtDispatch));
    rig.hidden = 1024;  // two parts, the second with one group
    expect_rounds_are_right(rig, 1100, 1);
    rig.hidden = 384;
    rig.quant = Quant::kFp8Pow2;
    expect_rounds_are_right(rig, 1110, 1);
    expect_rounds_are_right(by_line(small(Element::kFp8, Quant::kNone, Weights::kNone)), 1120, 1);
}

TEST(EmuKernels, ReceiveTwoRoundsByLineInEitherOrder) {
    if (emu::kWarpSize != 32) GTEST_SKIP() << "shown at 32 lanes";
    expect_either_order_is_right(by_line(small_bf16(Weights::kAtDispatch)), 1200);
}

TEST(EmuKernels, GoOnWithoutARankThatNeverStartsByLine) {
    if (emu::kWarpSize != 32) GTEST_SKIP() << "shown at 32 lanes";
    Rig rig = by_line(small_bf16(Weights::kNone));
    rig.ranks = 3;
    rig.experts = 6;
    expect_survivors_go_on(rig, 1, 1300);
}

// ---- The fence between SEND and RECEIVE ---------------------------------------------------------

constexpr const char *kWhyNoFence = "such a GPU needs no fence between the phases";

class WithoutFence {
  public:
    WithoutFence() { phase_fence = false; }
    WithoutFence(const WithoutFence &) = delete;
    WithoutFence &operator=(const WithoutFence &) = delete;
    ~WithoutFence() { phase_fence = true; }
};

TEST(EmuKernels, TellTheFenceOnlyBehindSend) {
    if (!emu::kFencesPhases) GTEST_SKIP() << kWhyNoFence;
    const Rig rig = small_bf16(Weights::kAtDispatch);
    Fleet fleet(rig);
    Round round = fleet.round(1400);
    const auto told = [&](int operation) {
        return *fleet.layout().fence(fleet.window(1), operation, 0);
    };
    fleet.dispatch_send(round.tasks[0]);
    EXPECT_EQ(told(0), 1U);
    EXPECT_EQ(told(1), 0U);
    fleet.dispatch_send(round.tasks[1]);
    fleet.run([&](int rank) { fleet.dispatch_receive(round.tasks[rank]); });
    EXPECT_EQ(told(1), 0U);
    fleet.combine_send(round.tasks[0]);
    EXPECT_EQ(told(1), 1U);
    fleet.combine_send(round.tasks[1]);
    fleet.run([&](int rank) { fleet.combine_receive(round.tasks[rank]); });
    expect_right(fleet, round);
}

TEST(EmuKernels, DoWithoutAFenceOnAQueueThatMayBeShared) {
    if (!emu::kFencesPhases) GTEST_SKIP() << kWhyNoFence;
    Rig rig = small_bf16(Weights::kAtDispatch);
    rig.fences = false;
    Fleet fleet(rig);
    Round round = fleet.round(1430);
    fleet.run([&](int rank) { fleet.both(round.tasks[rank]); });
    expect_right(fleet, round);
    EXPECT_EQ(*fleet.layout().fence(fleet.window(1), 0, 0), 0U);
}

// All of a rank's messages are there but not its word.
void expect_received_without_word(bool fenced, int32_t active_after) {
    Rig rig = small_bf16(Weights::kAtDispatch);
    rig.timeout_ns = kShortNs;
    Fleet fleet(rig);
    Round round = fleet.round(1410);
    fleet.dispatch_send(round.tasks[0]);
    {
        const WithoutFence without;
        fleet.dispatch_send(round.tasks[1]);
        if (!fenced) fleet.dispatch_receive(round.tasks[0]);
    }
    if (fenced) fleet.dispatch_receive(round.tasks[0]);
    EXPECT_EQ(fleet.active(0)[1], active_after);
    if (active_after != 0) {
        EXPECT_TRUE(fleet.dispatched(round, 0));
    }
}

TEST(EmuKernels, WaitAtTheFenceUntilTheDeadline) {
    if (!emu::kFencesPhases) GTEST_SKIP() << kWhyNoFence;
    expect_received_without_word(true, 0);
    expect_received_without_word(false, 1);
}

TEST(EmuKernels, WaitAtTheFenceForNoMaskedRank) {
    if (!emu::kFencesPhases) GTEST_SKIP() << kWhyNoFence;
    Rig rig = small_bf16(Weights::kAtDispatch);
    rig.timeout_ns = ep::Round::kNever;
    Fleet fleet(rig);
    Round round = fleet.round(1420, {}, {1});
    fleet.active(0)[1] = 0;
    fleet.both(round.tasks[0]);
    expect_right(fleet, round);
    EXPECT_EQ(*fleet.layout().fence(fleet.window(1), 0, 0), 0U);
}

TEST(EmuKernels, TakeMoreChoicesThanAWarpHasLanes) {
    if (kWide) GTEST_SKIP() << "a token may not have that many";
    Rig rig = small_bf16(Weights::kAtCombine);
    rig.experts = 16;
    rig.topk = 9;
    rig.idx_bytes = 4;
    rig.tokens_max = 2;
    expect_rounds_are_right(rig, 500, 1);
}

TEST(EmuKernels, ServeMoreRanksThanOnePassHasTargets) {
    if (kWide) GTEST_SKIP() << kWhyNotWide;
    Rig rig = small_bf16(Weights::kAtDispatch);
    rig.ranks = 6;
    rig.experts = 12;
    rig.topk = 8;
    expect_rounds_are_right(rig, 600, 1);
}

TEST(EmuKernels, ServeEightRanks) {
    if (kWide) GTEST_SKIP() << kWhyNotWide;
    Rig rig = small_bf16(Weights::kAtDispatch);
    rig.ranks = 8;
    rig.experts = 16;
    rig.topk = 2;
    rig.tokens_max = 9;
    rig.hidden = 16;
    expect_rounds_are_right(rig, 650, 2);
}

TEST(EmuKernels, ReceiveTwoRoundsInEitherOrder) {
    if (kWide) GTEST_SKIP() << kWhyNotWide;
    expect_either_order_is_right(small_bf16(Weights::kAtDispatch), 700);
}

TEST(EmuKernels, LoseNothingWhenARankIsHeld) {
    if (kWide) GTEST_SKIP() << kWhyNotWide;
    for (int flight = 1; flight <= 2; ++flight) {
        Rig rig = small_bf16(Weights::kAtDispatch);
        rig.tokens_max = 2;
        rig.hidden = 8;
        rig.rounds_in_flight = flight;
        expect_held_rank_loses_nothing(rig, flight % 2, Travel::kAll, 800);
    }
}

TEST(EmuKernels, GiveTheSameBitsAtOtherSpeeds) {
    if (kWide) GTEST_SKIP() << kWhyNotWide;
    expect_same_bits(small_bf16(Weights::kAtDispatch), 750);
}

// ---- Lost ranks ---------------------------------------------------------------------------------

Rig of_three_ranks(Rig rig) {
    rig.ranks = 3;
    rig.experts = 6;
    return rig;
}

TEST(EmuKernels, GoOnWithoutARankThatNeverStarts) {
    if (kWide) GTEST_SKIP() << kWhyNotWide;
    Rig rig = of_three_ranks(small_bf16(Weights::kNone));
    expect_survivors_go_on(rig, 1, 900);
}

TEST(EmuKernels, LeaveOutTheRowsOfARankThatDiesAfterItsCounts) {
    if (emu::kWarpSize > 32) GTEST_SKIP() << kWhyNotWide;
    Rig rig = of_three_ranks(small_bf16(Weights::kAtDispatch));
    rig.tokens_max = 4;
    if (!kLines) {
        for (const bool in_halves : {false, true})
            expect_rows_of_lost_are_left_out(rig, 1, in_halves, 910);
        return;
    }
    rig = by_line(rig);
    rig.hidden = 512;  // two parts
    expect_rows_of_lost_are_left_out(rig, 1, true, 920);
    rig = by_line(of_three_ranks(small(Element::kBf16, Quant::kFp8, Weights::kNone)));
    expect_rows_of_lost_are_left_out(rig, 0, false, 930);
}

TEST(EmuKernels, LeaveARankAloneThatIsNotInTheGroup) {
    if (emu::kWarpSize > 32) GTEST_SKIP() << kWhyNotWide;
    Rig rig = of_three_ranks(small_bf16(Weights::kAtCombine));
    rig.hidden = 8;
    expect_absent_is_left_alone(rig, 1, 970);
    if (kLines) expect_absent_is_left_alone(by_line(rig), 2, 980);
}

TEST(EmuKernels, OvertakeNobodyWhoIsNamedAnew) {
    if (emu::kWarpSize > 32) GTEST_SKIP() << kWhyNotWide;
    Rig rig = small_bf16(Weights::kAtCombine);
    rig.hidden = 8;
    rig.topk = rig.experts;
    expect_nothing_overtakes(kLines ? by_line(rig) : rig, 1500);
}

TEST(EmuKernels, HearWhoCatchesUp) {
    if (emu::kWarpSize > 32) GTEST_SKIP() << kWhyNotWide;
    Rig rig = small_bf16(Weights::kAtDispatch);
    rig.hidden = 8;
    rig.tokens_max = kLines ? 3 : 24;
    if (kLines) rig = by_line(rig);
    expect_who_catches_up_is_heard(rig, 1540);
    expect_held_back_weights_are_told(rig, 1550);
    if (kLines) expect_blocks_agree_on_tokens(rig, 1560);
}

TEST(EmuKernels, SendAgainToWhoWasMasked) {
    if (emu::kWarpSize > 32) GTEST_SKIP() << kWhyNotWide;
    Rig rig = of_three_ranks(small_bf16(Weights::kAtDispatch));
    rig.hidden = 8;
    rig.rounds_in_flight = 1;
    expect_unmasked_is_in_step(kLines ? by_line(rig) : rig, 1, 1520);
}

TEST(EmuKernels, KeepEachOtherWhenOneNeverStarts) {
    if (emu::kWarpSize > 32) GTEST_SKIP() << kWhyNotWide;
    Rig rig = of_three_ranks(small_bf16(Weights::kNone));
    rig.hidden = 8;
    expect_survivors_keep_each_other(rig, 1, 2, 950);
    if (kLines) expect_survivors_keep_each_other(by_line(rig), 1, 2, 960);
}

TEST(EmuKernels, KeepEachOtherWhenOneDiesBeforeItsWeights) {
    if (emu::kWarpSize > 32) GTEST_SKIP() << kWhyNotWide;
    Rig rig = of_three_ranks(small_bf16(Weights::kAtCombine));
    rig.hidden = 8;
    rig.topk = rig.experts;  // hardly a token that does not go to all
    expect_survivors_keep_each_other_in_combine(kLines ? by_line(rig) : rig, 1, 2, 990);
}

TEST(EmuKernels, KeepTheLivingWhenOneDiesWhileItSends) {
    if (kWide) GTEST_SKIP() << kWhyNotWide;
    Rig rig = of_three_ranks(small_bf16(Weights::kAtCombine));
    rig.topk = rig.experts;
    rig.hidden = 8;
    if (emu::kFencesPhases) {  // which is one more wait
        expect_uneven_weights_keep_the_living(rig, 1400);
        return;
    }
    expect_one_deadline(rig, 1420);
    rig.weights = Weights::kAtDispatch;
    expect_uneven_rows_keep_the_living(rig, 1430);
}

}  // namespace

Kernels kernels_under_test() {
    return emu::kernels();
}

}  // namespace ep::test
