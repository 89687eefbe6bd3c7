// Simulated groups of up to 512 ranks, of every kind that a cluster makes: what the library chooses
// for each pair, as each of its ranks asks, and what it reports, against a reference written here
// from the rules alone. A group is described by seats; the facts that ranks would gather are made
// from them, and so is what is expected.
#include "transport/facts.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <gtest/gtest.h>
#include <random>
#include <string>
#include <tuple>
#include <vector>

namespace ep::test {
namespace {

constexpr int kGpusOfHost = 8;
constexpr int kNcclVersion = 22809;

enum class Kind {
    kMixedHosts,     // as many ranks on a host as there happen to be, some of them threads
    kFarGpus,        // islands of GPUs without peer access between them
    kSetIslands,     // MOONCAKE_EP_ISLAND_RANKS
    kGatedPairs,     // MetaX GPUs, of which only pairs are near
    kUnseenGpus,     // one visible GPU per process
    kNoExport,       // one rank cannot export a handle of its memory
    kNoExportOfGpu,  // the same, and no process sees another's GPU
    kAbsent,         // a sub-group: some ranks are not there
    kMixture
};

// Where a rank is and what it can. Processes and devices are numbered over all hosts.
struct Seat {
    int host = 0, process = 0, device = 0;
    int island = 0;  // of GPUs with peer access to each other
    int near = 0;    // MetaX: the pair it is in
    int island_ranks = 0;
    bool sees_others = true, can_export = true, is_disabled = false, is_absent = false;
};

struct World {
    int32_t backend = MEP_BACKEND_CUDA;
    bool has_network = false;  // NCCL and an address of every rank; else neither
    std::vector<Seat> seats;

    int rank_count() const { return static_cast<int>(seats.size()); }
    bool on_gpus() const { return backend != MEP_BACKEND_CPU; }
};

// ---- Worlds -------------------------------------------------------------------------------------

int32_t backend_of(Kind kind, unsigned seed) {
    switch (kind) {
        case Kind::kGatedPairs:
            return MEP_BACKEND_MACA;
        case Kind::kMixedHosts:
        case Kind::kNoExport:
        case Kind::kSetIslands:
        case Kind::kAbsent:
            return seed % 2 == 0 ? MEP_BACKEND_CPU : MEP_BACKEND_CUDA;
        case Kind::kMixture:
            return MEP_BACKEND_CPU + static_cast<int32_t>(seed % 3);
        default:
            return MEP_BACKEND_CUDA;
    }
}

// Full hosts of processes with a GPU each. In the smallest groups an island or a pair is one rank.
std::vector<Seat> regular_seats(int rank_count) {
    const bool is_small = rank_count < kGpusOfHost;
    std::vector<Seat> seats(rank_count);
    for (int rank = 0; rank < rank_count; ++rank) {
        seats[rank].host = is_small ? rank / 2 : rank / kGpusOfHost;
        seats[rank].process = seats[rank].device = rank;
        seats[rank].island = is_small ? rank : rank / 4;
        seats[rank].near = is_small ? rank : rank / 2;
    }
    return seats;
}

// Hosts of unequal size, processes of up to some threads; with `sharing`, several ranks on a GPU.
std::vector<Seat> irregular_seats(int rank_count, int sharing, std::mt19937 *random) {
    std::vector<Seat> seats(rank_count);
    const unsigned host_count = std::max(2, rank_count / 6);
    int device = 0;
    for (Seat &seat : seats) {
        seat.host = static_cast<int>((*random)() % host_count);
        seat.process = seat.host * kGpusOfHost + static_cast<int>((*random)() % kGpusOfHost);
        seat.device = device++;
        if (sharing > 0 && (*random)() % sharing == 0) seat.device = seat.process + rank_count;
        seat.island = seat.device / 4;
        seat.near = seat.device / 2;
    }
    return seats;
}

void mix(std::vector<Seat> *seats, std::mt19937 *random) {
    const auto one_in = [random](int count) { return (*random)() % count == 0; };
    for (Seat &seat : *seats) {
        seat.island_ranks = one_in(3) ? 16 : 0;
        seat.sees_others = one_in(2);
        seat.can_export = !one_in(16);
        seat.is_disabled = one_in(16);
        seat.is_absent = one_in(8);
    }
}

World make_world(Kind kind, int rank_count, unsigned seed) {
    std::mt19937 random(seed * 1000 + rank_count);
    World world;
    world.backend = backend_of(kind, seed);
    std::vector<Seat> &seats = world.seats;
    seats = regular_seats(rank_count);
    const int one = static_cast<int>(random() % rank_count);
    if (kind != Kind::kFarGpus)  // else only where it is the subject
        for (Seat &seat : seats)
            seat.island = 0;
    if (kind == Kind::kMixedHosts) seats = irregular_seats(rank_count, 0, &random);
    if (kind == Kind::kMixture) {
        seats = irregular_seats(rank_count, random() % 2 ? 4 : 0, &random);
        mix(&seats, &random);
    }
    if (kind == Kind::kNoExport || kind == Kind::kNoExportOfGpu) seats[one].can_export = false;
    for (Seat &seat : seats) {
        if (kind == Kind::kSetIslands) seat.island_ranks = rank_count < kGpusOfHost ? 1 : 4;
        if (kind == Kind::kUnseenGpus || kind == Kind::kNoExportOfGpu) seat.sees_others = false;
        if (kind == Kind::kAbsent) seat.is_absent = random() % 3 == 0;
    }
    seats[one].is_absent = false;  // who else would ask?
    return world;
}

// ---- What ranks would gather --------------------------------------------------------------------

bool sees(const Seat &from, const Seat &to) {
    return from.process == to.process || from.sees_others;
}

Access access_of(const World &world, const Seat &from, const Seat &to) {
    if (!world.on_gpus()) return Access::kSame;
    if (from.host != to.host || !sees(from, to)) return Access::kUnknown;
    if (from.island != to.island) return Access::kRefused;
    const bool is_gated = world.backend == MEP_BACKEND_MACA && from.near != to.near;
    return is_gated ? Access::kGated : Access::kPeer;
}

Trial trial_of(const World &world, const Seat &from, const Seat &to) {
    if (from.host != to.host) return Trial::kNotMade;
    if (from.process == to.process) return Trial::kArrived;
    if (!to.can_export) return Trial::kNotShared;
    const bool is_far = world.on_gpus() && from.island != to.island;
    return is_far ? Trial::kNotMapped : Trial::kArrived;
}

GroupFacts gather(const World &world) {
    GroupFacts facts;
    for (const Seat &seat : world.seats) {
        RankFacts rank{};
        std::snprintf(rank.host, sizeof rank.host, "host %d", seat.host);
        rank.process[0] = seat.process;
        rank.backend = world.backend;
        rank.physical = seat.device;
        std::memcpy(rank.device, &seat.device, world.on_gpus() ? sizeof seat.device : 0);
        rank.engine = kEngineTcp;
        rank.p2p_disabled = seat.is_disabled;
        rank.nccl = world.has_network && world.on_gpus() ? kNcclVersion : 0;
        rank.island_ranks = seat.island_ranks;
        rank.absent = seat.is_absent;
        if (world.has_network) std::snprintf(rank.tcp_address, sizeof rank.tcp_address, "10.0.0.1");
        facts.ranks.push_back(rank);
        for (const Seat &peer : world.seats) {
            facts.access.push_back(access_of(world, seat, peer));
            facts.trials.push_back(trial_of(world, seat, peer));
        }
    }
    choose_engine(&facts);
    return facts;
}

// ---- The reference ------------------------------------------------------------------------------

struct Expected {
    int32_t kind;
    std::string words;  // that the reason has to have
};

// What keeps stores of one rank from the other's memory, both being on one host.
std::string barrier(const World &world, int from, int to) {
    const Seat &a = world.seats[from], &b = world.seats[to];
    const std::string here = "rank " + std::to_string(from), there = "rank " + std::to_string(to);
    const bool is_far = world.on_gpus() && a.island != b.island;
    if (is_far && sees(a, b))
        return "the device of " + here + " has no peer access to that of " + there;
    if (world.backend == MEP_BACKEND_MACA && a.near != b.near && sees(a, b))
        return "of " + here + " and " + there +
               " are not near; MOONCAKE_EP_MACA_P2P_PAIRS=" + std::to_string(a.device) + "-" +
               std::to_string(b.device) + " or ";
    if (a.process == b.process) return "";
    if (!b.can_export) return there + " cannot share its memory";
    return is_far ? here + " cannot map the memory of " + there : "";
}

// Why a pair does not go by memory; "" if it does. Of several reasons a user reads one.
std::string why_far(const World &world, int low, int high) {
    const Seat &a = world.seats[low], &b = world.seats[high];
    if (a.host != b.host) return "they are on different hosts";
    for (const int ranks : {a.island_ranks, b.island_ranks})
        if (ranks > 0 && low / ranks != high / ranks)
            return "they are on different islands: MOONCAKE_EP_ISLAND_RANKS is " +
                   std::to_string(ranks);
    if (a.is_disabled || b.is_disabled)
        return "disable_p2p is set on rank " + std::to_string(a.is_disabled ? low : high);
    const std::string out = barrier(world, low, high);
    return out.empty() ? barrier(world, high, low) : out;
}

// "NCCL", "MCCL", "TCP", or "" where nothing carries rows between ranks without memory in common.
std::string engine_of(const World &world) {
    std::vector<std::pair<int, int>> gpus;
    bool is_one_host = true;
    for (const Seat &seat : world.seats)
        if (!seat.is_absent) {
            gpus.push_back({seat.host, seat.device});
            is_one_host = is_one_host && seat.host == gpus[0].first;
        }
    std::sort(gpus.begin(), gpus.end());
    const bool is_shared = std::adjacent_find(gpus.begin(), gpus.end()) != gpus.end();
    if (world.on_gpus() && world.has_network && !is_shared)
        return world.backend == MEP_BACKEND_MACA ? "MCCL" : "NCCL";
    return is_one_host || world.has_network ? "TCP" : "";
}

Expected expected(const World &world, const std::string &engine, int one, int other) {
    if (one == other) return {MEP_TRANSPORT_SELF, "the rank itself"};
    const int low = std::min(one, other), high = std::max(one, other);
    for (const int rank : {low, high})
        if (world.seats[rank].is_absent)
            return {MEP_TRANSPORT_NONE, "rank " + std::to_string(rank) + " is not in the group"};
    const std::string why = why_far(world, low, high);
    if (!why.empty() && engine.empty()) return {MEP_TRANSPORT_NONE, why};
    if (!why.empty()) return {MEP_TRANSPORT_COLLECTIVE, why};
    const Seat &a = world.seats[low], &b = world.seats[high];
    if (a.process == b.process) return {MEP_TRANSPORT_THREAD, "threads of one process"};
    if (!world.on_gpus()) return {MEP_TRANSPORT_SHM, "POSIX shared memory"};
    const bool is_unseen = !sees(a, b) || !sees(b, a);
    return {MEP_TRANSPORT_IPC,
            is_unseen ? "does not see the other's GPU" : "GPU memory mapped by its IPC handle"};
}

// ---- Comparison ---------------------------------------------------------------------------------

void expect_decisions(const World &world, const GroupFacts &facts) {
    const std::string engine = engine_of(world);
    for (int one = 0; one < world.rank_count(); ++one)
        for (int other = one; other < world.rank_count(); ++other) {
            const Expected right = expected(world, engine, one, other);
            const TransportChoice here = choose_transport(facts, one, other);
            const TransportChoice there = choose_transport(facts, other, one);
            ASSERT_EQ(here.kind, right.kind) << one << " and " << other << ": " << here.reason;
            ASSERT_NE(here.reason.find(right.words), std::string::npos)
                << one << " and " << other << ": " << here.reason << "; not: " << right.words;
            if (right.kind == MEP_TRANSPORT_COLLECTIVE) {
                ASSERT_EQ(here.reason.rfind("by " + engine + ": ", 0), 0u) << here.reason;
            }
            ASSERT_EQ(there.kind, here.kind) << one << " and " << other;
            ASSERT_EQ(there.reason, here.reason) << one << " and " << other;
        }
}

// A buffer over a pair without a transport is refused with this text.
void expect_report(const World &world, const std::vector<GroupFacts> &views) {
    const std::string engine = engine_of(world);
    int count = 0;
    std::string begin, words;
    for (int one = 0; one < world.rank_count(); ++one)
        for (int other = one + 1; other < world.rank_count(); ++other) {
            if (world.seats[one].is_absent || world.seats[other].is_absent) continue;
            const Expected right = expected(world, engine, one, other);
            if (right.kind != MEP_TRANSPORT_NONE || count++ > 0) continue;
            begin = "ranks " + std::to_string(one) + " and " + std::to_string(other) +
                    " cannot reach each other: ";
            words = right.words;
        }
    const std::string more = "nor can " + std::to_string(count - 1) + " more pair";
    for (const GroupFacts &facts : views) {
        std::string text;
        ASSERT_EQ(count_unreachable(facts, &text), count);
        ASSERT_EQ(text.empty(), count == 0);
        ASSERT_EQ(text.rfind(begin, 0), 0u) << text;
        ASSERT_NE(text.find(words, begin.size()), std::string::npos) << text;
        ASSERT_EQ(text.find(more) != std::string::npos, count > 1) << text;
        ASSERT_EQ(text.find("TCP carries rows if MOONCAKE_EP_TCP_ADDRESS is set") != text.npos,
                  count > 0)
            << text;
    }
}

class SimulatedGroups : public testing::TestWithParam<std::tuple<Kind, int>> {};

TEST_P(SimulatedGroups, DecideAsTheRulesSayOnEveryRank) {
    const auto [kind, rank_count] = GetParam();
    const bool large = rank_count > 64, mixed = kind == Kind::kMixture;
    const unsigned world_count = mixed ? (large ? 2 : 20) : (large ? 1 : 2);
    for (unsigned seed = 1; seed <= world_count; ++seed) {
        World world = make_world(kind, rank_count, seed);
        for (const bool has_network : {false, true}) {
            SCOPED_TRACE("seed " + std::to_string(seed) + (has_network ? ", a network" : ""));
            world.has_network = has_network;
            // Of two ranks: each works out for itself what carries rows.
            const std::vector<GroupFacts> views = {gather(world), gather(world)};
            ASSERT_NO_FATAL_FAILURE(expect_decisions(world, views[seed % 2]));
            ASSERT_NO_FATAL_FAILURE(expect_report(world, views));
        }
    }
}

std::string name_of(const testing::TestParamInfo<std::tuple<Kind, int>> &info) {
    static const char *const kNames[] = {"MixedHosts",    "FarGpus",    "SetIslands",
                                         "GatedPairs",    "UnseenGpus", "NoExport",
                                         "NoExportOfGpu", "Absent",     "Mixture"};
    const auto [kind, rank_count] = info.param;
    return kNames[static_cast<int>(kind)] + std::to_string(rank_count);
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, SimulatedGroups,
    testing::Combine(testing::Values(Kind::kMixedHosts, Kind::kFarGpus, Kind::kSetIslands,
                                     Kind::kGatedPairs, Kind::kUnseenGpus, Kind::kNoExport,
                                     Kind::kNoExportOfGpu, Kind::kAbsent, Kind::kMixture),
                     testing::Values(2, 3, 8, 64, 512)),
    name_of);

}  // namespace
}  // namespace ep::test
