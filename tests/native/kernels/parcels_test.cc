// What an engine carries between ranks that have no window of each other mapped: packed, and placed
// as if it had been stored there. On the CPU; with EP_DEVICE_EMU on a GPU made of threads.
#include "support/fleet.h"

#if defined(EP_DEVICE_EMU)
#include "kernels/table.h"
#else
#include "backend/cpu_levels.h"
#endif

namespace ep::test {
namespace {

#if defined(EP_DEVICE_EMU)
constexpr int kRounds = 2;  // a launch starts hundreds of threads
#else
constexpr int kRounds = 3;
#endif

using Parcels = Fleet::Parcels;
using Change = void (*)(std::mt19937_64 *random, Cargo cargo, Parcels *parcels);

void leave_alone(std::mt19937_64 *, Cargo, Parcels *) {}

// A round in which nobody waits: what would be waited for has been carried before.
void run_round(Fleet &fleet, Round *round, std::mt19937_64 *random, Change change) {
    const auto all = [&](auto phase) {
        for (Task &task : round->tasks)
            phase(task);
    };
    const auto carry = [&](Cargo cargo) {
        Parcels parcels;
        all([&](Task &task) { parcels.push_back(fleet.pack(cargo, task)); });
        change(random, cargo, &parcels);
        all([&](Task &task) { fleet.place(cargo, task, parcels); });
    };
    all([&](Task &task) { fleet.dispatch_send(task); });
    carry(Cargo::kMessages);
    all([&](Task &task) { fleet.dispatch_receive(task); });
    if (fleet.rig().weights == Weights::kAtCombine) {
        all([&](Task &task) { fleet.send_weights(task); });
        carry(Cargo::kWeights);
    }
    all([&](Task &task) { fleet.combine_send(task); });
    carry(Cargo::kPartials);
    all([&](Task &task) { fleet.combine_receive(task); });
}

void expect_rounds_are_right(const Rig &rig, uint64_t seed) {
    Fleet fleet(rig);
    std::mt19937_64 random(seed);
    for (int i = 0; i < kRounds; ++i) {  // full, one rank with nothing, any
        Round round = fleet.round(seed + i, i == 0   ? std::vector<int>(rig.ranks, rig.tokens_max)
                                            : i == 1 ? std::vector<int>{0}
                                                     : std::vector<int>{});
        run_round(fleet, &round, &random, leave_alone);
        for (int rank = 0; rank < rig.ranks; ++rank) {
            EXPECT_TRUE(fleet.dispatched(round, rank)) << "round " << i;
            EXPECT_TRUE(fleet.combined(round, rank)) << "round " << i;
            EXPECT_EQ(fleet.active(rank), std::vector<int32_t>(rig.ranks, 1));
        }
    }
}

TEST(Parcels, CarryRounds) {
    for (const Weights weights : {Weights::kAtDispatch, Weights::kAtCombine, Weights::kNone})
        expect_rounds_are_right(rig_of_far_ranks(weights), 10);
}

TEST(Parcels, CarryFp8WithItsScales) {
    Rig rig = rig_of_far_ranks(Weights::kAtDispatch);
    rig.quant = Quant::kFp8;
    rig.hidden = 640;  // the scales are no whole vector
    rig.fp32_partials = true;
    expect_rounds_are_right(rig, 20);
}

TEST(Parcels, CarryOnlyTheTokensThatGoThere) {
    Rig rig = rig_of_far_ranks(Weights::kAtDispatch);
    rig.topk = 1;
    Fleet fleet(rig);
    Round round = fleet.round(30, {rig.tokens_max, 0, 0});
    fleet.dispatch_send(round.tasks[0]);
    const size_t record = rig.row_bytes() + fleet.layout().head_bytes;
    size_t bytes = 0, tokens = 0;
    for (const std::vector<char> &parcel : fleet.pack(Cargo::kMessages, round.tasks[0]))
        bytes += parcel.size();
    for (const int64_t id : round.tasks[0].tokens.topk_idx)
        tokens += id >= rig.local_experts() && id < rig.experts;
    constexpr size_t kHeadsMax = 2 * 128;
    EXPECT_GE(bytes, tokens * record);
    EXPECT_LE(bytes, tokens * record + kHeadsMax);
}

// ---- A peer that sends nonsense -----------------------------------------------------------------

constexpr int kHostile = 1;

void forge(std::mt19937_64 *random, Cargo, Parcels *parcels) {
    for (std::vector<char> &parcel : (*parcels)[kHostile]) {
        if (parcel.empty()) continue;
        if ((*random)() % 4 == 0) parcel.resize((*random)() % (2 * parcel.size()));
        const size_t first = (*random)() % 2 == 0 ? 64 : parcel.size();  // often in the heads
        for (int i = int((*random)() % 12); i > 0 && !parcel.empty(); --i)
            parcel[(*random)() % std::min(parcel.size(), first)] = char((*random)());
    }
}

// Honest rows are all there; the sanitizers see steps outside.
TEST(Parcels, OfAPeerReachNothingButItsOwnRows) {
#if defined(EP_DEVICE_EMU)
    constexpr int kSeeds = 4;
#else
    constexpr int kSeeds = 200;
#endif
    uint64_t found = 0;
    for (int seed = 0; seed < kSeeds; ++seed) {
        Rig rig = rig_of_far_ranks(seed % 2 == 0 ? Weights::kAtDispatch : Weights::kAtCombine);
        rig.timeout_ns = 1'000'000;
        Fleet fleet(rig);
        std::mt19937_64 random(seed);
        Round round = fleet.round(seed);
        run_round(fleet, &round, &random, forge);
        for (const int rank : {0, 2}) {
            found += fleet.state(rank).invalid_messages;
            for (const int other : {0, 2})
                EXPECT_EQ(fleet.active(rank)[other], 1) << "seed " << seed;
        }
    }
    EXPECT_GT(found, 0U);
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
