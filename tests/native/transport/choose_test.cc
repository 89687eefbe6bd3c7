// The transport of every pair, case by case; simulated_groups_test.cc asks it of whole clusters.
#include "transport/facts.h"

#include <algorithm>
#include <cstring>
#include <gtest/gtest.h>
#include <numeric>
#include <random>

namespace ep::test {
namespace {

// Where a rank is. Ranks of one process see the same GPUs.
struct Place {
    int host, process, device;
};

struct Group {
    GroupFacts facts;

    Group(int32_t backend, const std::vector<Place> &places) {
        for (const Place &place : places) {
            RankFacts rank{};
            std::snprintf(rank.host, sizeof rank.host, "host %d", place.host);
            rank.process[0] = place.process;
            rank.backend = backend;
            rank.engine = kEngineTcp;
            rank.device[0] = static_cast<char>(place.device);
            rank.device[1] = static_cast<char>(place.device >> 8);
            facts.ranks.push_back(rank);
        }
        const Access all = backend == MEP_BACKEND_CPU ? Access::kSame : Access::kPeer;
        facts.access.assign(places.size() * places.size(), all);
        choose_engine(&facts);
    }
    Access &access(int from, int to) { return facts.access[from * facts.rank_count() + to]; }
    // After trials that all arrived.
    Trial &trial(int from, int to) {
        facts.trials.resize(facts.access.size(), Trial::kArrived);
        return facts.trials[from * facts.rank_count() + to];
    }
    std::string unreachable() const {
        std::string text;
        count_unreachable(facts, &text);
        return text;
    }
};

std::vector<Place> processes(int count, int ranks_of_host) {
    std::vector<Place> places;
    for (int rank = 0; rank < count; ++rank)
        places.push_back({rank / ranks_of_host, rank, rank % ranks_of_host});
    return places;
}

// A pair is asked in either order, by any rank, and always gets one answer.
void expect_one_answer(const GroupFacts &facts) {
    for (int one = 0; one < facts.rank_count(); ++one)
        for (int other = one; other < facts.rank_count(); ++other) {
            const TransportChoice there = choose_transport(facts, one, other);
            const TransportChoice back = choose_transport(facts, other, one);
            ASSERT_EQ(there.kind, back.kind) << one << " and " << other;
            ASSERT_EQ(there.reason, back.reason) << one << " and " << other;
            ASSERT_FALSE(there.reason.empty());
        }
}

TEST(Choice, FollowsWhereRanksAre) {
    const Group cpus(MEP_BACKEND_CPU, {{0, 1, 0}, {0, 1, 0}, {0, 2, 0}, {1, 3, 0}});
    EXPECT_EQ(choose_transport(cpus.facts, 0, 0).kind, MEP_TRANSPORT_SELF);
    EXPECT_EQ(choose_transport(cpus.facts, 0, 1).kind, MEP_TRANSPORT_THREAD);
    EXPECT_EQ(choose_transport(cpus.facts, 1, 2).kind, MEP_TRANSPORT_SHM);
    EXPECT_EQ(choose_transport(cpus.facts, 2, 3).kind, 0);
    EXPECT_EQ(
        cpus.unreachable(),
        "ranks 0 and 3 cannot reach each other: they are on different hosts; TCP carries rows "
        "if MOONCAKE_EP_TCP_ADDRESS is set on every rank; nor can 2 more pairs");
    const Group gpus(MEP_BACKEND_CUDA, {{0, 1, 0}, {0, 1, 1}, {0, 2, 2}});
    EXPECT_EQ(choose_transport(gpus.facts, 0, 1).kind, MEP_TRANSPORT_THREAD);
    EXPECT_EQ(choose_transport(gpus.facts, 0, 2).kind, MEP_TRANSPORT_IPC);
    EXPECT_EQ(gpus.unreachable(), "");
    expect_one_answer(cpus.facts);
    expect_one_answer(gpus.facts);
}

TEST(Streams, AreSharedByThreadsOfOneProcessOnOneDevice) {
    EXPECT_TRUE(
        any_share_streams(Group(MEP_BACKEND_MACA, {{0, 1, 0}, {0, 1, 1}, {0, 1, 0}}).facts));
    EXPECT_FALSE(any_share_streams(Group(MEP_BACKEND_MACA, {{0, 1, 0}, {0, 1, 1}}).facts));
    EXPECT_FALSE(any_share_streams(Group(MEP_BACKEND_MACA, {{0, 1, 0}, {0, 2, 0}}).facts));
    EXPECT_FALSE(any_share_streams(Group(MEP_BACKEND_MACA, {{0, 1, 0}, {1, 1, 0}}).facts));
}

TEST(Choice, KeepsToIslands) {
    Group group(MEP_BACKEND_CUDA, processes(8, 8));
    for (int from = 0; from < 8; ++from)
        for (int to = 0; to < 8; ++to)
            if (from / 4 != to / 4) group.access(from, to) = Access::kRefused;
    for (int one = 0; one < 8; ++one)
        for (int other = one + 1; other < 8; ++other)
            EXPECT_EQ(choose_transport(group.facts, one, other).kind,
                      one / 4 == other / 4 ? MEP_TRANSPORT_IPC : MEP_TRANSPORT_COLLECTIVE);
    EXPECT_EQ(choose_transport(group.facts, 7, 0).reason,
              "by TCP: not all ranks can load NCCL; the device of rank 0 has no peer access to "
              "that of rank 7");
    EXPECT_EQ(far_peers(group.facts, 5),
              (std::vector<bool>{true, true, true, true, false, false, false, false}));
    expect_one_answer(group.facts);
}

TEST(Choice, SaysHowToOpenTheGate) {
    Group group(MEP_BACKEND_MACA, processes(4, 4));
    for (int rank = 0; rank < 4; ++rank)
        group.facts.ranks[rank].physical = 3 - rank;
    group.access(0, 2) = Access::kGated;
    EXPECT_EQ(choose_transport(group.facts, 0, 2).reason,
              "by TCP: not all ranks can load MCCL; GPUs 3-1 of rank 0 and rank 2 are not near; "
              "MOONCAKE_EP_MACA_P2P_PAIRS=3-1 or MOONCAKE_EP_MACA_ALLOW_NODE_P2P=1 allows them");
    expect_one_answer(group.facts);
}

TEST(Choice, NeedsBothDirections) {
    Group group(MEP_BACKEND_CUDA, processes(3, 3));
    group.access(2, 1) = Access::kRefused;
    EXPECT_EQ(choose_transport(group.facts, 1, 2).reason,
              "by TCP: not all ranks can load NCCL; the device of rank 2 has no peer access to "
              "that of rank 1");
    EXPECT_EQ(choose_transport(group.facts, 0, 1).kind, MEP_TRANSPORT_IPC);
    expect_one_answer(group.facts);
}

TEST(Choice, TakesGpusThatAProcessDoesNotSee) {
    Group group(MEP_BACKEND_CUDA, processes(4, 4));
    for (int from = 0; from < 4; ++from)
        for (int to = 0; to < 4; ++to)
            if (from != to) group.access(from, to) = Access::kUnknown;
    const TransportChoice choice = choose_transport(group.facts, 0, 3);
    EXPECT_EQ(choice.kind, MEP_TRANSPORT_IPC);
    EXPECT_NE(choice.reason.find("does not see the other's GPU"), std::string::npos);
    EXPECT_EQ(choice.reason.find("tried"), std::string::npos);
    group.trial(0, 3);
    EXPECT_NE(choose_transport(group.facts, 0, 3).reason.find("tried in both directions"),
              std::string::npos);
    expect_one_answer(group.facts);
}

TEST(Choice, SaysWhatATrialFound) {
    struct Case {
        Trial trial;
        const char *why;
    };
    for (const Case &found :
         {Case{Trial::kLost, "a word that rank 2 stored did not arrive at rank 1"},
          Case{Trial::kNotMapped, "rank 2 cannot map the memory of rank 1"},
          Case{Trial::kNotShared, "rank 1 cannot share its memory"}}) {
        Group group(MEP_BACKEND_CUDA, processes(3, 3));
        group.trial(2, 1) = found.trial;
        EXPECT_EQ(choose_transport(group.facts, 1, 2).kind, MEP_TRANSPORT_COLLECTIVE);
        EXPECT_EQ(choose_transport(group.facts, 0, 1).kind, MEP_TRANSPORT_IPC);
        EXPECT_EQ(choose_transport(group.facts, 1, 2).reason,
                  std::string("by TCP: not all ranks can load NCCL; ") + found.why);
        expect_one_answer(group.facts);
    }
}

// ---- Engines, for ranks that do not reach each other's memory
// -------------------------------------

Group cpus_of_two_hosts(EngineKind engine) {
    Group group(MEP_BACKEND_CPU, {{0, 1, 0}, {0, 2, 0}, {1, 3, 0}});
    for (RankFacts &rank : group.facts.ranks)
        rank.engine = engine;
    choose_engine(&group.facts);
    return group;
}

TEST(Choice, TakesTheCallersEngineWhereMemoryIsNotReached) {
    const Group group = cpus_of_two_hosts(kEngineCaller);
    EXPECT_EQ(choose_transport(group.facts, 0, 1).kind, MEP_TRANSPORT_SHM);
    EXPECT_EQ(choose_transport(group.facts, 0, 2).kind, MEP_TRANSPORT_COLLECTIVE);
    EXPECT_EQ(choose_transport(group.facts, 2, 1).reason,
              "by the caller's all_to_all: they are on different hosts");
    EXPECT_EQ(group.unreachable(), "");
    expect_one_answer(group.facts);
}

TEST(Choice, TakesTcpBetweenHostsOnlyIfAllHaveAnAddress) {
    Group group = cpus_of_two_hosts(kEngineTcp);
    EXPECT_EQ(
        group.unreachable(),
        "ranks 0 and 2 cannot reach each other: they are on different hosts; TCP carries rows "
        "if MOONCAKE_EP_TCP_ADDRESS is set on every rank; nor can 1 more pair");
    for (RankFacts &rank : group.facts.ranks)
        std::snprintf(rank.tcp_address, sizeof rank.tcp_address, "10.0.0.1");
    choose_engine(&group.facts);
    EXPECT_EQ(group.unreachable(), "");
    EXPECT_EQ(choose_transport(group.facts, 1, 2).reason, "by TCP: they are on different hosts");
    expect_one_answer(group.facts);
}

TEST(Choice, ReachesNoMemoryOfARankThatDisablesIt) {
    Group group(MEP_BACKEND_CPU, {{0, 1, 0}, {0, 1, 0}, {0, 1, 0}});
    group.facts.ranks[1].p2p_disabled = 1;
    EXPECT_EQ(choose_transport(group.facts, 0, 2).kind, MEP_TRANSPORT_THREAD);
    EXPECT_EQ(choose_transport(group.facts, 2, 1).reason,
              "by TCP: MOONCAKE_EP_DISABLE_P2P or disable_p2p is set on rank 1");
    expect_one_answer(group.facts);
}

TEST(Choice, ReachesNoMemoryOfAnotherIsland) {
    Group group(MEP_BACKEND_CPU, std::vector<Place>(5));
    for (RankFacts &rank : group.facts.ranks)
        rank.island_ranks = 2;
    EXPECT_EQ(choose_transport(group.facts, 2, 3).kind, MEP_TRANSPORT_THREAD);
    EXPECT_EQ(choose_transport(group.facts, 2, 1).reason,
              "by TCP: they are on different islands: MOONCAKE_EP_ISLAND_RANKS is 2 on rank 1");
    EXPECT_EQ(choose_transport(group.facts, 3, 4).kind, MEP_TRANSPORT_COLLECTIVE);
    group.facts.ranks[2].island_ranks = group.facts.ranks[3].island_ranks = 0;
    EXPECT_EQ(choose_transport(group.facts, 2, 1).kind, MEP_TRANSPORT_COLLECTIVE);
    EXPECT_EQ(choose_transport(group.facts, 2, 3).kind, MEP_TRANSPORT_THREAD);
    expect_one_answer(group.facts);
}

TEST(Choice, TakesNcclIfAllHaveItAndAGpuOfTheirOwn) {
    constexpr int kVersion = 22809;
    Group group(MEP_BACKEND_CUDA, processes(4, 2));
    const auto reason = [&group] {
        choose_engine(&group.facts);
        return choose_transport(group.facts, 1, 2).reason;
    };
    for (RankFacts &rank : group.facts.ranks)
        rank.nccl = kVersion;
    EXPECT_EQ(reason(), "by NCCL: they are on different hosts");
    group.facts.ranks[2].nccl = 0;
    const std::string tcp = "TCP carries rows if MOONCAKE_EP_TCP_ADDRESS is set on every rank";
    EXPECT_EQ(reason(), "they are on different hosts; not all ranks can load NCCL; " + tcp);
    group.facts.ranks[2].nccl = kVersion + 1;
    EXPECT_EQ(
        reason(),
        "they are on different hosts; rank 2 has another version of NCCL than rank 0; " + tcp);
    group.facts.ranks[2].nccl = kVersion;
    std::memcpy(group.facts.ranks[1].device, group.facts.ranks[0].device,
                sizeof group.facts.ranks[0].device);
    EXPECT_EQ(reason(),
              "they are on different hosts; ranks 0 and 1 share a GPU, which NCCL refuses; " + tcp);
    for (RankFacts &rank : group.facts.ranks)
        std::snprintf(rank.tcp_address, sizeof rank.tcp_address, "10.0.0.1");
    EXPECT_EQ(reason(),
              "by TCP: ranks 0 and 1 share a GPU, which NCCL refuses; they are on "
              "different hosts");
    for (RankFacts &rank : group.facts.ranks)
        rank.engine = kEngineCallerOnStream;
    EXPECT_EQ(reason(), "by the caller's all_to_all_on_stream: they are on different hosts");
    expect_one_answer(group.facts);
}

// Ranks are only numbers: with others for the same places, each pair of places gets the same.
TEST(Choice, DoesNotDependOnTheOrderOfRanks) {
    std::mt19937 random(1);
    for (const int count : {2, 7, 64, 512}) {
        std::vector<Place> places;
        for (int i = 0; i < count; ++i)  // unequal hosts, some processes with several ranks
            places.push_back({int(random() % 5), int(random() % count), i});
        for (Place &place : places)  // a process is on one host
            place.host = place.process % 5;
        std::vector<int> order(count);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random);
        std::vector<Place> shuffled;
        for (const int place : order)
            shuffled.push_back(places[place]);
        Group first(MEP_BACKEND_CUDA, places), second(MEP_BACKEND_CUDA, shuffled);
        for (int i = 0; i < count; ++i) {
            const int from = int(random() % count), to = int(random() % count);
            first.access(order[from], order[to]) = second.access(from, to) = Access::kRefused;
        }
        for (int one = 0; one < count; ++one)
            for (int other = 0; other < count; ++other)
                ASSERT_EQ(choose_transport(second.facts, one, other).kind,
                          choose_transport(first.facts, order[one], order[other]).kind)
                    << "places " << order[one] << " and " << order[other] << " of " << count;
        expect_one_answer(second.facts);
    }
}

}  // namespace
}  // namespace ep::test
