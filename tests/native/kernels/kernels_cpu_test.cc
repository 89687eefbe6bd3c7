// The kernels on the CPU, where a warp is one lane, against the oracle; at each level of the
// instruction set that this machine has.
#include "backend/cpu_levels.h"
#include "kernels/promises.h"

namespace ep {

// For the names of tests.
void PrintTo(const CpuLevel &level, std::ostream *out) {
    *out << level.name;
}

}  // namespace ep

namespace ep::test {
namespace {

Kernels current = cpu_levels().front().kernels;

class CpuKernels : public ::testing::TestWithParam<CpuLevel> {
  protected:
    void SetUp() override {
        if (!GetParam().supported) GTEST_SKIP() << "this machine has no " << GetParam().name;
        current = GetParam().kernels;
    }
};
INSTANTIATE_TEST_SUITE_P(Level, CpuKernels, ::testing::ValuesIn(cpu_levels()),
                         [](const auto &level) { return std::string(level.param.name); });

constexpr Element kBf16 = Element::kBf16, kFp16 = Element::kFp16, kFp32 = Element::kFp32,
                  kFp8 = Element::kFp8;
constexpr Quant kNone = Quant::kNone;

// Each type of x with each way that it may travel.
struct Journey {
    Element type;
    Quant quant;
    Element combine_type;
    bool fp32_partials;
};
constexpr Journey kJourneys[] = {
    {kBf16, kNone, kBf16, false},          {kFp16, kNone, kFp16, false},
    {kFp32, kNone, kFp32, true},           {kFp8, kNone, kBf16, true},
    {kBf16, Quant::kFp8, kBf16, false},    {kFp16, Quant::kFp8, kFp16, true},
    {kFp32, Quant::kFp8, kFp32, true},     {kBf16, Quant::kFp8Pow2, kBf16, false},
    {kFp16, Quant::kFp8Pow2, kBf16, true}, {kFp32, Quant::kFp8Pow2, kFp16, true},
};

Rig rig_of(const Journey &journey) {
    Rig rig;
    rig.type = journey.type;
    rig.quant = journey.quant;
    rig.combine_type = journey.combine_type;
    rig.fp32_partials = journey.fp32_partials;
    return rig;
}

Rig shaped(int ranks, int experts, int tokens_max, int topk, int hidden) {
    Rig rig;
    rig.ranks = ranks;
    rig.experts = experts;
    rig.tokens_max = tokens_max;
    rig.topk = topk;
    rig.hidden = hidden;
    return rig;
}

constexpr Weights kAllWeights[] = {Weights::kNone, Weights::kAtDispatch, Weights::kAtCombine};

TEST_P(CpuKernels, CarryEveryTypeWithEveryWeights) {
    uint64_t seed = 100;
    for (const Journey &journey : kJourneys)
        for (const Weights weights : kAllWeights) {
            Rig rig = rig_of(journey);
            rig.hidden = 256;
            rig.weights = weights;
            rig.idx_bytes = seed % 2 == 0 ? 4 : 8;
            expect_rounds_are_right(rig, seed += 11, 3);
        }
}

TEST_P(CpuKernels, CarryEveryShape) {
    const Rig shapes[] = {
        shaped(1, 1, 1, 1, 8),     shaped(1, 16, 5, 8, 264), shaped(2, 2, 1, 1, 8),
        shaped(2, 64, 7, 32, 128), shaped(3, 3, 4, 3, 264),  shaped(3, 12, 9, 5, 8),
        shaped(4, 8, 6, 2, 16),    shaped(8, 64, 3, 8, 128), shaped(8, 8, 5, 12, 24),
    };
    uint64_t seed = 200;
    for (const Rig &shape : shapes)
        for (const Weights weights : kAllWeights) {
            Rig rig = shape;
            rig.weights = weights;
            expect_rounds_are_right(rig, seed += 11, 4);
        }
}

TEST_P(CpuKernels, CarryRowsOfARealModel) {
    for (const Quant quant : {kNone, Quant::kFp8})
        for (const Caching caching : {Caching::kKeep, Caching::kBypass}) {
            Rig rig = shaped(2, 4, 2, 4, 7168);
            rig.quant = quant;
            rig.caching = caching;
            expect_rounds_are_right(rig, 300, 1);
        }
}

TEST_P(CpuKernels, GoPastTheCachesWithEveryShape) {
    uint64_t seed = 350;
    for (const Journey &journey : kJourneys) {
        Rig rig = rig_of(journey);
        rig.ranks = 4;
        rig.caching = Caching::kBypass;
        expect_rounds_are_right(rig, seed += 11, 10);
    }
    Rig rig = shaped(2, 4, 5, 4, 24);
    rig.caching = Caching::kBypass;
    expect_rounds_are_right(rig, seed, 10);
}

TEST_P(CpuKernels, GiveTheSameWithSeveralThreads) {
    for (const Weights weights : kAllWeights) {
        Rig rig = shaped(3, 12, 10, 6, 128);
        rig.threads = 3;
        rig.weights = weights;
        expect_rounds_are_right(rig, 400, 4);
    }
}

TEST_P(CpuKernels, ReuseTheirSlots) {
    for (int flight = 1; flight <= 2; ++flight) {
        Rig rig = shaped(3, 6, 4, 3, 128);
        rig.rounds_in_flight = flight;
        expect_rounds_are_right(rig, 500 + flight, 8 * flight + 3);
    }
}

TEST_P(CpuKernels, ReceiveTwoRoundsInEitherOrder) {
    for (uint64_t seed = 600; seed < 610; ++seed)
        expect_either_order_is_right(shaped(3, 6, 5, 4, 128), seed);
}

TEST_P(CpuKernels, GiveTheSameBitsAtOtherSpeeds) {
    uint64_t seed = 700;
    for (const Journey &journey : kJourneys) {
        Rig rig = rig_of(journey);
        rig.ranks = 4;
        rig.threads = 2;
        expect_same_bits(rig, seed += 11);
    }
}

TEST_P(CpuKernels, LoseNothingWhenARankIsHeld) {
    for (int flight = 1; flight <= 3; ++flight)
        for (const Weights weights : kAllWeights)
            for (const Travel travel : {Travel::kAll, Travel::kHeldOnly}) {
                Rig rig = shaped(3, 6, 3, 3, 8);
                rig.rounds_in_flight = flight;
                rig.weights = weights;
                for (int held = 0; held < 3; ++held)
                    expect_held_rank_loses_nothing(rig, held, travel, 800 + 17 * flight);
            }
}

TEST_P(CpuKernels, GoOnWithoutARankThatNeverStarts) {
    for (const Weights weights : kAllWeights)
        for (int dead = 0; dead < 3; ++dead) {
            Rig rig = shaped(3, 6, 4, 4, 128);
            rig.weights = weights;
            expect_survivors_go_on(rig, dead, 900 + dead);
        }
}

TEST_P(CpuKernels, CombineWithoutARankThatStopsAfterDispatch) {
    for (int dead = 0; dead < 3; ++dead)
        expect_combine_without(shaped(3, 6, 4, 4, 128), dead, 1000 + dead);
}

TEST_P(CpuKernels, LeaveARankAloneThatIsNotInTheGroup) {
    for (const Weights weights : kAllWeights)
        for (int absent = 0; absent < 3; ++absent) {
            Rig rig = shaped(3, 6, 4, 4, 128);
            rig.weights = weights;
            expect_absent_is_left_alone(rig, absent, 1050 + absent);
        }
}

TEST_P(CpuKernels, CombineTheSameDispatchAgainAndAgain) {
    Fleet fleet(shaped(2, 8, 6, 4, 128));
    Round kept = fleet.round(1100), other = fleet.round(1101);
    fleet.run([&](int rank) {
        fleet.both(kept.tasks[rank]);
        for (int again = 0; again < 6; ++again) {
            fleet.both(other.tasks[rank]);
            std::vector<char> &out = kept.tasks[rank].out;
            out.assign(out.size(), char(kPoison));
            fleet.combine_send(kept.tasks[rank]);
            fleet.combine_receive(kept.tasks[rank]);
        }
    });
    expect_right(fleet, kept);
    expect_right(fleet, other);
}

// At one level, for they wait long and do the same at each.

TEST(CpuKernelsOfAnyLevel, LeaveOutTheRowsOfARankThatDiesAfterItsCounts) {
    for (size_t i = 0; i < std::size(kJourneys); ++i)
        for (int dead = 0; dead < 3; ++dead) {
            Rig rig = rig_of(kJourneys[i]);
            rig.ranks = 3;
            rig.experts = 6;
            rig.threads = 1 + dead;
            expect_rows_of_lost_are_left_out(rig, dead, true, 950 + dead);
            if (dead == 2 && i % 4 == 0) expect_rows_of_lost_are_left_out(rig, dead, false, 970);
        }
}

TEST(CpuKernelsOfAnyLevel, OvertakeNobodyWhoIsNamedAnew) {
    for (const Weights weights : {Weights::kAtDispatch, Weights::kAtCombine}) {
        Rig rig = shaped(2, 4, 4, 4, 128);
        rig.weights = weights;
        rig.topk = rig.experts;
        expect_nothing_overtakes(rig, 1500);
    }
}

TEST(CpuKernelsOfAnyLevel, HearWhoCatchesUp) {
    for (const int threads : {1, 2}) {
        Rig rig = shaped(2, 4, 8, 4, 128);
        rig.threads = threads;
        expect_who_catches_up_is_heard(rig, 1540);
        expect_held_back_weights_are_told(rig, 1550);
    }
}

TEST(CpuKernelsOfAnyLevel, SendAgainToWhoWasMasked) {
    for (const int in_flight : {1, 2}) {
        Rig rig = shaped(3, 6, 4, 4, 128);
        rig.rounds_in_flight = in_flight;
        expect_unmasked_is_in_step(rig, 1, 1520);
    }
}

TEST(CpuKernelsOfAnyLevel, KeepEachOtherWhenOneDiesBeforeItsWeights) {
    Rig rig = shaped(3, 6, 4, 4, 128);
    rig.weights = Weights::kAtCombine;
    rig.threads = 2;
    rig.topk = rig.experts;  // hardly a token that does not go to all
    expect_survivors_keep_each_other_in_combine(rig, 1, 2, 980);
}

TEST(CpuKernelsOfAnyLevel, KeepTheLivingWhenOneDiesWhileItSends) {
#if defined(__SANITIZE_ADDRESS__)
    GTEST_SKIP() << "it is about time, which is seen without";
#endif
    Rig rig = shaped(3, 6, 4, 6, 128);
    expect_one_deadline(rig, 1300);
    rig.weights = Weights::kAtCombine;
    rig.threads = 2;
    expect_uneven_rows_keep_the_living(rig, 1310);
    expect_uneven_weights_keep_the_living(rig, 1320);
    expect_uneven_masks_keep_the_living(rig, 1330);
}

// All levels of this machine, over rows of every type.
TEST(CpuLevels, GiveTheSameBits) {
    for (const Journey &journey : kJourneys) {
        std::vector<Round> results;
        for (const CpuLevel &level : cpu_levels()) {
            if (!level.supported) continue;
            current = level.kernels;
            Rig rig = rig_of(journey);
            rig.hidden = 384;
            SCOPED_TRACE(describe(rig, 1200) + " " + level.name);
            Fleet fleet(rig);
            Round &round = results.emplace_back(fleet.round(1200));
            fleet.run([&](int rank) { fleet.both(round.tasks[rank]); });
            for (int rank = 0; rank < rig.ranks; ++rank) {
                EXPECT_EQ(round.tasks[rank].out_x, results[0].tasks[rank].out_x);
                EXPECT_EQ(round.tasks[rank].out, results[0].tasks[rank].out);
            }
        }
    }
}

}  // namespace

Kernels kernels_under_test() {
    return current;
}

}  // namespace ep::test
