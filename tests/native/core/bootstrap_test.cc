// The bootstraps: threads act as ranks; where ranks need an environment of their own, processes do.
#include "core/bootstrap.h"

#include "base/deadline.h"
#include "base/socket.h"
#include "base/status.h"
#include "core/bootstrap_tcp.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <gtest/gtest.h>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace ep {
namespace {

constexpr int64_t kPlentyUs = 20'000'000;  // of a wait that is to succeed, or to fail long before
constexpr int64_t kShortUs = 300'000;      // of a wait that is to reach its deadline
constexpr double kSlackSeconds = 3.0;      // sanitizers on a busy machine

using Clock = std::chrono::steady_clock;
using BootstrapPointer = std::unique_ptr<Bootstrap>;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

int descriptor_count() {
    const std::filesystem::directory_iterator entries("/proc/self/fd");
    return static_cast<int>(std::distance(begin(entries), end(entries)));
}

// What a call left behind on the thread that made it.
struct Outcome {
    mep_status_t status = MEP_OK;
    std::string text;
    double elapsed = 0;

    bool names(const std::string &part) const { return text.find(part) != std::string::npos; }
};

Outcome observe(const std::function<mep_status_t()> &call) {
    const auto start = Clock::now();
    Outcome outcome;
    outcome.status = call();
    if (outcome.status != MEP_OK) outcome.text = last_error();
    outcome.elapsed = seconds_since(start);
    return outcome;
}

std::ostream &operator<<(std::ostream &stream, const Outcome &outcome) {
    return stream << outcome.status << " \"" << outcome.text << "\" after " << outcome.elapsed
                  << " s";
}

void run_threads(int count, const std::function<void(int)> &body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i)
        threads.emplace_back(body, i);
    for (std::thread &thread : threads)
        thread.join();
}

// ---- Media
// ------------------------------------------------------------------------------------------

// A way to meet, for one group.
class Medium {
  public:
    virtual ~Medium() = default;
    virtual mep_status_t make(Membership membership, const Deadline &deadline,
                              BootstrapPointer *bootstrap) = 0;
};

class WorldMedium : public Medium {
  public:
    explicit WorldMedium(int rank_count) { EXPECT_EQ(world_create(rank_count, &world_), MEP_OK); }
    ~WorldMedium() override { world_destroy(world_); }
    mep_status_t make(Membership membership, const Deadline &,
                      BootstrapPointer *bootstrap) override {
        return bootstrap_from_world(membership, world_, bootstrap);
    }

  private:
    mep_world_t *world_ = nullptr;
};

class UniqueIdMedium : public Medium {
  public:
    explicit UniqueIdMedium(int) { EXPECT_EQ(unique_id_create(nullptr, &id_), MEP_OK); }
    ~UniqueIdMedium() override { unique_id_destroy(id_); }
    mep_status_t make(Membership membership, const Deadline &deadline,
                      BootstrapPointer *bootstrap) override {
        return bootstrap_from_unique_id(membership, id_, deadline, bootstrap);
    }

  private:
    mep_unique_id_t id_ = {};
};

int32_t gather_over_bootstrap(void *context, const void *send, void *receive, size_t bytes) {
    return static_cast<Bootstrap *>(context)->all_gather(send, receive, bytes, Deadline(kPlentyUs));
}

// The callback of an application that happens to be made of threads.
class CallbackMedium : public Medium {
  public:
    explicit CallbackMedium(int rank_count) : world_(rank_count), inner_(rank_count) {}
    mep_status_t make(Membership membership, const Deadline &deadline,
                      BootstrapPointer *bootstrap) override {
        BootstrapPointer &inner = inner_[membership.rank];
        EP_TRY(world_.make(membership, deadline, &inner));
        return bootstrap_from_callback(membership, gather_over_bootstrap, inner.get(), bootstrap);
    }

  private:
    WorldMedium world_;
    std::vector<BootstrapPointer> inner_;
};

std::unique_ptr<Medium> make_medium(const std::string &name, int rank_count) {
    if (name == "world") return std::make_unique<WorldMedium>(rank_count);
    if (name == "unique_id") return std::make_unique<UniqueIdMedium>(rank_count);
    return std::make_unique<CallbackMedium>(rank_count);
}

// Byte `i` of what `rank` sends in its all-gather number `round`.
unsigned char pattern(int rank, int round, size_t i) {
    return static_cast<unsigned char>(rank * 31 + round * 7 + i * 3 + 1);
}

// One all-gather whose result is checked. Failing, it returns the status.
mep_status_t gather_pattern(Bootstrap *bootstrap, Membership membership, int round, size_t bytes) {
    std::vector<unsigned char> send(bytes), receive(membership.rank_count * bytes);
    for (size_t i = 0; i < bytes; ++i)
        send[i] = pattern(membership.rank, round, i);
    EP_TRY(bootstrap->all_gather(send.data(), receive.data(), bytes, Deadline(kPlentyUs)));
    size_t wrong_count = 0;
    for (int rank = 0; rank < membership.rank_count; ++rank)
        for (size_t i = 0; i < bytes; ++i)
            wrong_count += receive[rank * bytes + i] != pattern(rank, round, i);
    EXPECT_EQ(wrong_count, 0U) << "round " << round << ", " << bytes << " bytes";
    return MEP_OK;
}

// Every test also promises to leave no descriptor open.
class Leakless : public testing::Test {
  protected:
    void SetUp() override { before_ = descriptor_count(); }
    void TearDown() override { EXPECT_EQ(descriptor_count(), before_) << "descriptors leaked"; }

  private:
    int before_ = 0;
};

// ---- What all media promise
// -------------------------------------------------------------------------

class EveryMedium : public Leakless,
                    public testing::WithParamInterface<std::tuple<std::string, int>> {
  protected:
    const std::string name_ = std::get<0>(GetParam());
    const int rank_count_ = std::get<1>(GetParam());
};

TEST_P(EveryMedium, GathersFromAllRanksInRankOrder) {
    const auto medium = make_medium(name_, rank_count_);
    run_threads(rank_count_, [&](int rank) {
        const Membership membership = {rank, rank_count_};
        BootstrapPointer bootstrap;
        ASSERT_EQ(medium->make(membership, Deadline(kPlentyUs), &bootstrap), MEP_OK);
        int round = 0;
        for (const size_t bytes : {8, 0, 1, 4096, 100'000, MEP_ALL_GATHER_BYTES_MAX, 3})
            EXPECT_EQ(gather_pattern(bootstrap.get(), membership, ++round, bytes), MEP_OK);
    });
}

TEST_P(EveryMedium, ManyAllGathersInARowDoNotMix) {
    constexpr unsigned kSeed = 20240601;
    SCOPED_TRACE(kSeed);
    std::mt19937 random(kSeed);
    std::vector<size_t> sizes(300);
    for (size_t &bytes : sizes)
        bytes = random() % 700;
    const auto medium = make_medium(name_, rank_count_);
    run_threads(rank_count_, [&](int rank) {
        const Membership membership = {rank, rank_count_};
        BootstrapPointer bootstrap;
        ASSERT_EQ(medium->make(membership, Deadline(kPlentyUs), &bootstrap), MEP_OK);
        for (size_t round = 0; round < sizes.size(); ++round)
            ASSERT_EQ(gather_pattern(bootstrap.get(), membership, round, sizes[round]), MEP_OK);
    });
}

TEST_P(EveryMedium, TooManyBytesAreRefusedAndChangeNothing) {
    const auto medium = make_medium(name_, rank_count_);
    run_threads(rank_count_, [&](int rank) {
        const Membership membership = {rank, rank_count_};
        BootstrapPointer bootstrap;
        ASSERT_EQ(medium->make(membership, Deadline(kPlentyUs), &bootstrap), MEP_OK);
        const Outcome refused = observe([&] {
            return bootstrap->all_gather(nullptr, nullptr, MEP_ALL_GATHER_BYTES_MAX + 1,
                                         Deadline(kPlentyUs));
        });
        EXPECT_EQ(refused.status, MEP_INVALID_ARGUMENT);
        EXPECT_TRUE(refused.names("1048577")) << refused;
        EXPECT_EQ(gather_pattern(bootstrap.get(), membership, 1, 16), MEP_OK);
    });
}

TEST_P(EveryMedium, RanksOutOfRangeAreRefused) {
    const auto medium = make_medium(name_, rank_count_);
    for (const Membership membership :
         {Membership{-1, rank_count_}, Membership{rank_count_, rank_count_}, Membership{0, 0},
          Membership{0, MEP_RANK_COUNT_MAX + 1}}) {
        // The callback medium holds an inner bootstrap by rank; its own check is tested below.
        if (name_ == "callback") continue;
        BootstrapPointer bootstrap;
        EXPECT_EQ(medium->make(membership, Deadline(kShortUs), &bootstrap), MEP_INVALID_ARGUMENT);
        EXPECT_EQ(bootstrap, nullptr);
    }
}

const auto kName = [](const auto &instance) {
    return std::get<0>(instance.param) + "_" + std::to_string(std::get<1>(instance.param));
};

INSTANTIATE_TEST_SUITE_P(Bootstrap, EveryMedium,
                         testing::Combine(testing::Values("world", "unique_id", "callback"),
                                          testing::Values(1, 2, 5)),
                         kName);

// ---- What happens when a rank does not do its part
// --------------------------------------------------

class Faults : public Leakless, public testing::WithParamInterface<std::string> {
  protected:
    static constexpr int kRankCount = 5;
    static constexpr unsigned char kUntouched = 0xEE;

    // All ranks join; then each does `part`, which says what its all-gather returned. Nobody leaves
    // before all have done their part.
    std::vector<Outcome> run(
        const std::function<Outcome(int rank, BootstrapPointer &bootstrap)> &part) {
        const auto medium = make_medium(GetParam(), kRankCount);
        std::vector<BootstrapPointer> bootstraps(kRankCount);
        std::vector<Outcome> outcomes(kRankCount);
        run_threads(kRankCount, [&](int rank) {
            ASSERT_EQ(medium->make({rank, kRankCount}, Deadline(kPlentyUs), &bootstraps[rank]),
                      MEP_OK);
            ASSERT_EQ(gather_pattern(bootstraps[rank].get(), {rank, kRankCount}, 0, 32), MEP_OK);
        });
        run_threads(kRankCount, [&](int rank) { outcomes[rank] = part(rank, bootstraps[rank]); });
        return outcomes;
    }

    // An all-gather that is to fail; checks that it then leaves the output alone.
    static Outcome gather(BootstrapPointer &bootstrap, size_t bytes, int64_t timeout_us) {
        const std::vector<unsigned char> send(bytes, 1);
        std::vector<unsigned char> receive(kRankCount * bytes, kUntouched);
        const Outcome outcome = observe([&] {
            return bootstrap->all_gather(send.data(), receive.data(), bytes, Deadline(timeout_us));
        });
        if (outcome.status != MEP_OK) {
            EXPECT_EQ(receive, std::vector<unsigned char>(kRankCount * bytes, kUntouched));
        }
        return outcome;
    }
};

TEST_P(Faults, MissingRanksAreNamedOnEveryWaitingRank) {
    const auto outcomes = run([](int rank, BootstrapPointer &bootstrap) {
        return rank == 2 || rank == 4 ? Outcome{} : gather(bootstrap, 64, kShortUs);
    });
    for (const int rank : {0, 1, 3}) {
        EXPECT_EQ(outcomes[rank].status, MEP_TIMEOUT) << outcomes[rank];
        EXPECT_TRUE(outcomes[rank].names("ranks 2, 4 of 5")) << outcomes[rank];
        EXPECT_LT(outcomes[rank].elapsed, kSlackSeconds);
    }
}

TEST_P(Faults, TheFirstDeadlineEndsTheWaitOfAll) {
    const auto outcomes = run([](int rank, BootstrapPointer &bootstrap) {
        if (rank == 4) return Outcome{};
        return gather(bootstrap, 64, rank == 1 ? kShortUs : kPlentyUs);
    });
    for (const int rank : {0, 1, 2, 3}) {
        EXPECT_EQ(outcomes[rank].status, MEP_TIMEOUT) << outcomes[rank];
        EXPECT_TRUE(outcomes[rank].names("rank 4 of 5")) << outcomes[rank];
        EXPECT_LT(outcomes[rank].elapsed, kSlackSeconds);
    }
}

TEST_P(Faults, MissingRankZeroIsNamedOnEveryWaitingRank) {
    const auto outcomes = run([](int rank, BootstrapPointer &bootstrap) {
        return rank == 0 ? Outcome{} : gather(bootstrap, 64, kShortUs);
    });
    for (const int rank : {1, 2, 3, 4}) {
        EXPECT_EQ(outcomes[rank].status, MEP_TIMEOUT) << outcomes[rank];
        EXPECT_TRUE(outcomes[rank].names("rank 0 of 5")) << outcomes[rank];
        EXPECT_LT(outcomes[rank].elapsed, kSlackSeconds);
    }
}

TEST_P(Faults, AFailedBootstrapStaysFailedAndSaysWhy) {
    const auto outcomes = run([](int rank, BootstrapPointer &bootstrap) {
        if (rank == 3) return Outcome{};
        gather(bootstrap, 64, kShortUs);
        return gather(bootstrap, 64, kPlentyUs);
    });
    for (const int rank : {0, 1, 2, 4}) {
        EXPECT_EQ(outcomes[rank].status, MEP_TIMEOUT) << outcomes[rank];
        EXPECT_TRUE(outcomes[rank].names("rank 3 of 5")) << outcomes[rank];
        EXPECT_LT(outcomes[rank].elapsed, kSlackSeconds);
    }
}

TEST_P(Faults, ARankThatComesAfterTheDeadlineHearsOfTheFailure) {
    std::promise<void> over;
    const auto is_over = over.get_future().share();
    const auto outcomes = run([&](int rank, BootstrapPointer &bootstrap) {
        if (rank == 2) {
            is_over.wait_for(std::chrono::microseconds(kPlentyUs));
            return gather(bootstrap, 64, kPlentyUs);
        }
        // The hub's is the first deadline: who gives up before it is a rank that has left.
        const Outcome outcome = gather(bootstrap, 64, rank == 0 ? kShortUs : kPlentyUs);
        if (rank == 0) over.set_value();
        return outcome;
    });
    EXPECT_EQ(outcomes[2].status, MEP_TIMEOUT) << outcomes[2];
    EXPECT_TRUE(outcomes[2].names("rank 2 of 5")) << outcomes[2];
}

TEST_P(Faults, DifferentSizesAreAMismatchOnAllRanks) {
    for (const size_t bytes_of_rank_3 : {size_t{0}, size_t{65}, size_t{MEP_ALL_GATHER_BYTES_MAX}}) {
        const auto outcomes = run([&](int rank, BootstrapPointer &bootstrap) {
            return gather(bootstrap, rank == 3 ? bytes_of_rank_3 : 64, kPlentyUs);
        });
        for (const Outcome &outcome : outcomes) {
            EXPECT_EQ(outcome.status, MEP_MISMATCH) << outcome;
            EXPECT_TRUE(outcome.names("64")) << outcome;
            EXPECT_TRUE(outcome.names(std::to_string(bytes_of_rank_3))) << outcome;
            EXPECT_LT(outcome.elapsed, kSlackSeconds);
        }
    }
}

TEST_P(Faults, ALargeMismatchIsHeardEvenFromAHubThatLeavesAtOnce) {
    const auto outcomes = run([](int rank, BootstrapPointer &bootstrap) {
        const Outcome outcome = gather(bootstrap, rank == 0 ? 64 : 1'000'000, kPlentyUs);
        bootstrap.reset();
        return outcome;
    });
    for (const Outcome &outcome : outcomes)
        EXPECT_EQ(outcome.status, MEP_MISMATCH) << outcome;
}

TEST_P(Faults, ARankThatLeavesIsNamedAtOnceOnAllOthers) {
    for (const int leaver : {0, 3}) {
        const auto outcomes = run([&](int rank, BootstrapPointer &bootstrap) {
            if (rank != leaver) return gather(bootstrap, 64, kPlentyUs);
            bootstrap.reset();
            return Outcome{};
        });
        for (int rank = 0; rank < kRankCount; ++rank) {
            if (rank == leaver) continue;
            EXPECT_EQ(outcomes[rank].status, MEP_BOOTSTRAP_FAILED) << outcomes[rank];
            EXPECT_TRUE(outcomes[rank].names("rank " + std::to_string(leaver) + " of 5"))
                << outcomes[rank];
            EXPECT_LT(outcomes[rank].elapsed, kSlackSeconds);
        }
    }
}

TEST_P(Faults, ARankThatLeavesAfterItsAllGatherSpoilsItForNobody) {
    const auto outcomes = run([](int, BootstrapPointer &bootstrap) {
        const Outcome outcome = gather(bootstrap, 50'000, kPlentyUs);
        bootstrap.reset();
        return outcome;
    });
    for (const Outcome &outcome : outcomes)
        EXPECT_EQ(outcome.status, MEP_OK) << outcome;
}

INSTANTIATE_TEST_SUITE_P(Bootstrap, Faults, testing::Values("world", "unique_id"),
                         [](const auto &instance) { return instance.param; });

// ---- The callback, one rank alone
// -------------------------------------------------------------------

using CallbackBootstrapTest = Leakless;

int32_t fail_with_7(void *context, const void *, void *, size_t) {
    ++*static_cast<int *>(context);
    return 7;
}

TEST_F(CallbackBootstrapTest, ItsFailureIsReportedAndItIsNotCalledAgain) {
    int call_count = 0;
    BootstrapPointer bootstrap;
    ASSERT_EQ(bootstrap_from_callback({1, 2}, fail_with_7, &call_count, &bootstrap), MEP_OK);
    for (int i = 0; i < 2; ++i) {
        const Outcome outcome =
            observe([&] { return bootstrap->all_gather(nullptr, nullptr, 0, Deadline(kShortUs)); });
        EXPECT_EQ(outcome.status, MEP_BOOTSTRAP_FAILED);
        EXPECT_TRUE(outcome.names("returned 7")) << outcome;
    }
    EXPECT_EQ(call_count, 1);
}

TEST_F(CallbackBootstrapTest, WrongArgumentsAreRefused) {
    BootstrapPointer bootstrap;
    EXPECT_EQ(bootstrap_from_callback({0, 1}, nullptr, nullptr, &bootstrap), MEP_INVALID_ARGUMENT);
    EXPECT_EQ(bootstrap_from_callback({2, 2}, fail_with_7, nullptr, &bootstrap),
              MEP_INVALID_ARGUMENT);
    EXPECT_EQ(bootstrap, nullptr);
}

TEST(AloneBootstrapTest, GathersFromItself) {
    EXPECT_EQ(gather_pattern(bootstrap_alone().get(), {0, 1}, 1, 100), MEP_OK);
}

// ---- The world
// --------------------------------------------------------------------------------------

using WorldTest = Leakless;

TEST_F(WorldTest, ARankJoinsOnceAtATime) {
    WorldMedium medium(2);
    BootstrapPointer first, second;
    ASSERT_EQ(medium.make({1, 2}, Deadline(0), &first), MEP_OK);
    const Outcome again = observe([&] { return medium.make({1, 2}, Deadline(0), &second); });
    EXPECT_EQ(again.status, MEP_BOOTSTRAP_FAILED);
    EXPECT_TRUE(again.names("rank 1")) << again;
    first.reset();
    EXPECT_EQ(medium.make({1, 2}, Deadline(0), &second), MEP_OK);
}

TEST_F(WorldTest, RankCountsMustAgree) {
    WorldMedium medium(2);
    BootstrapPointer bootstrap;
    const Outcome outcome = observe([&] { return medium.make({0, 3}, Deadline(0), &bootstrap); });
    EXPECT_EQ(outcome.status, MEP_INVALID_ARGUMENT);
    EXPECT_TRUE(outcome.names("3") && outcome.names("2")) << outcome;
}

TEST_F(WorldTest, MayBeDestroyedBeforeItsGroups) {
    std::vector<BootstrapPointer> bootstraps(2);
    {
        WorldMedium medium(2);
        for (int rank = 0; rank < 2; ++rank)
            ASSERT_EQ(medium.make({rank, 2}, Deadline(0), &bootstraps[rank]), MEP_OK);
    }
    run_threads(2, [&](int rank) {
        EXPECT_EQ(gather_pattern(bootstraps[rank].get(), {rank, 2}, 1, 10), MEP_OK);
        bootstraps[rank].reset();
    });
}

TEST_F(WorldTest, RanksMeetAgainAfterAFailureAndAfterLeaving) {
    WorldMedium medium(2);
    {
        BootstrapPointer lonely;
        ASSERT_EQ(medium.make({0, 2}, Deadline(0), &lonely), MEP_OK);
        EXPECT_EQ(lonely->all_gather(nullptr, nullptr, 0, Deadline(0)), MEP_TIMEOUT);
    }
    run_threads(2, [&](int rank) {
        for (int group = 0; group < 50; ++group) {
            BootstrapPointer bootstrap;
            ASSERT_EQ(medium.make({rank, 2}, Deadline(0), &bootstrap), MEP_OK);
            ASSERT_EQ(gather_pattern(bootstrap.get(), {rank, 2}, group, 10), MEP_OK);
        }
    });
}

TEST_F(WorldTest, LeavingKeepsTheCallersLastError) {
    WorldMedium medium(1);
    BootstrapPointer bootstrap;
    ASSERT_EQ(medium.make({0, 1}, Deadline(0), &bootstrap), MEP_OK);
    fail(MEP_UNSUPPORTED, "what went wrong");
    bootstrap.reset();
    EXPECT_STREQ(last_error(), "what went wrong");
}

// ---- TCP: who may join
// ------------------------------------------------------------------------------

class TcpJoin : public Leakless {
  protected:
    void SetUp() override {
        Leakless::SetUp();
        ASSERT_EQ(resolve_ipv4("127.0.0.1", &hub_.ipv4), 0);
        ASSERT_EQ(open_listener(hub_, kListenBacklog, &listener_), 0);
        ASSERT_EQ(local_endpoint(listener_.number(), &hub_), 0);
        std::memcpy(secret_.bytes, "open sesame", 11);
    }
    void TearDown() override {
        listener_.close();
        Leakless::TearDown();
    }

    mep_status_t make(Membership membership, int64_t timeout_us, BootstrapPointer *bootstrap) {
        if (membership.rank == 0)
            return tcp_host(std::move(listener_), membership.rank_count, {secret_, false},
                            Deadline(timeout_us), bootstrap);
        return tcp_join(hub_, membership, {secret_, false}, Deadline(timeout_us), bootstrap);
    }

    Outcome join(Membership membership, int64_t timeout_us) {
        BootstrapPointer bootstrap;
        return observe([&] { return make(membership, timeout_us, &bootstrap); });
    }

    // The right ranks meet and gather, whatever `disturb` does meanwhile.
    void expect_group_forms(int rank_count, const std::function<void()> &disturb) {
        run_threads(rank_count + 1, [&](int rank) {
            if (rank == rank_count) return disturb();
            BootstrapPointer bootstrap;
            const Outcome outcome =
                observe([&] { return make({rank, rank_count}, kPlentyUs, &bootstrap); });
            ASSERT_EQ(outcome.status, MEP_OK) << outcome;
            EXPECT_LT(outcome.elapsed, kSlackSeconds);
            EXPECT_EQ(gather_pattern(bootstrap.get(), {rank, rank_count}, 1, 1000), MEP_OK);
        });
    }

    Hello hello(Membership membership) const {
        return {kHelloMagic, kProtocol, kVersion, membership.rank, membership.rank_count, secret_};
    }

    Descriptor connect() const {
        Descriptor connected;
        EXPECT_EQ(connect_to(hub_, Deadline(kPlentyUs), &connected), 0);
        return connected;
    }

    static void say(const Descriptor &socket, const void *data, size_t size) {
        size_t count = 0;
        EXPECT_EQ(send_more(socket.number(), {{data, size}, {nullptr, 0}}, &count), 0);
        EXPECT_EQ(count, size);
    }

    // Reads until `size` bytes are there or the connection ends. Returns how many came.
    static size_t hear(const Descriptor &socket, void *data, size_t size) {
        const Deadline deadline(kPlentyUs);
        size_t count = 0;
        while (count < size && !deadline.passed()) {
            pollfd entry = {socket.number(), POLLIN, 0};
            wait_ready(&entry, 1, deadline, 1000);
            if (receive_more(socket.number(), data, size, &count) != 0) break;
        }
        return count;
    }

    // What the hub answers to a hand-made Hello.
    Outcome answer_to(const Hello &hello) const {
        const Descriptor socket = connect();
        say(socket, &hello, sizeof hello);
        Reply reply = {};
        char text[kErrorTextMax] = "";
        EXPECT_EQ(hear(socket, &reply, sizeof reply), sizeof reply);
        EXPECT_LT(reply.bytes, sizeof text);
        hear(socket, text, std::min<size_t>(reply.bytes, sizeof text - 1));
        Outcome outcome;
        outcome.status = reply.status;
        outcome.text = text;
        return outcome;
    }

    Endpoint hub_ = {};
    Descriptor listener_;
    Secret secret_ = {};
};

TEST_F(TcpJoin, MissingRanksAreNamedOnEveryRankThatCame) {
    std::vector<Outcome> outcomes(5);
    run_threads(5, [&](int rank) {
        if (rank != 1 && rank != 3) outcomes[rank] = join({rank, 5}, kShortUs);
    });
    for (const int rank : {0, 2, 4}) {
        EXPECT_EQ(outcomes[rank].status, MEP_TIMEOUT) << outcomes[rank];
        EXPECT_TRUE(outcomes[rank].names("ranks 1, 3 of 5")) << outcomes[rank];
        EXPECT_LT(outcomes[rank].elapsed, kSlackSeconds);
    }
}

TEST_F(TcpJoin, ListsAtMostSixteenMissingRanks) {
    const Outcome outcome = join({0, 100}, 1000);
    EXPECT_EQ(outcome.status, MEP_TIMEOUT);
    EXPECT_TRUE(outcome.names("15, 16 and 83 more of 100")) << outcome;
}

TEST_F(TcpJoin, MissingRankZeroIsNamedWhetherItListensOrNot) {
    const Outcome not_in_call = join({1, 2}, kShortUs);
    EXPECT_EQ(not_in_call.status, MEP_TIMEOUT);
    EXPECT_TRUE(not_in_call.names("rank 0 of 2")) << not_in_call;
    listener_.close();
    const Outcome not_there = join({1, 2}, kShortUs);
    EXPECT_EQ(not_there.status, MEP_TIMEOUT);
    EXPECT_TRUE(not_there.names("rank 0 of 2")) << not_there;
    EXPECT_TRUE(not_there.names("refused")) << not_there;
    EXPECT_LT(not_in_call.elapsed + not_there.elapsed, kSlackSeconds);
}

TEST_F(TcpJoin, WrongRanksAreToldWhyAndTheRightOnesStillMeet) {
    struct Case {
        Hello hello;
        mep_status_t status;
        const char *word;
    };
    std::vector<Case> cases(6, {hello({1, 3}), MEP_BOOTSTRAP_FAILED, ""});
    cases[0].hello.secret.bytes[31] ^= 1;
    cases[0].word = "secret";
    cases[1].hello.rank_count = 4;
    cases[1].status = MEP_MISMATCH;
    cases[1].word = "rank_count 4";
    cases[2].hello.version += 1;
    cases[2].status = MEP_MISMATCH;
    cases[2].word = "library version";
    cases[3].hello.protocol += 1;
    cases[3].status = MEP_MISMATCH;
    cases[3].word = "protocol";
    cases[4].hello.rank = 3;
    cases[4].word = "not in [0, 3)";
    cases[5].hello.rank = -2147483647;
    cases[5].word = "not in [0, 3)";
    std::promise<void> refused;
    const auto all_refused = refused.get_future().share();
    run_threads(4, [&](int rank) {
        if (rank == 3) {
            for (const Case &c : cases) {
                const Outcome outcome = answer_to(c.hello);
                EXPECT_EQ(outcome.status, c.status) << outcome;
                EXPECT_TRUE(outcome.names(c.word)) << outcome;
            }
            return refused.set_value();
        }
        // The last rank waits, so that the hub still is at the door.
        if (rank == 2) all_refused.wait_for(std::chrono::microseconds(kPlentyUs));
        const Outcome outcome = join({rank, 3}, kPlentyUs);
        EXPECT_EQ(outcome.status, MEP_OK) << outcome;
    });
}

TEST_F(TcpJoin, ARefusedRankReturnsTheHubsWords) {
    std::vector<Outcome> outcomes(2);
    run_threads(2, [&](int rank) {
        outcomes[rank] = join({rank, rank == 0 ? 2 : 3}, rank == 0 ? kShortUs : kPlentyUs);
    });
    EXPECT_EQ(outcomes[1].status, MEP_MISMATCH) << outcomes[1];
    EXPECT_TRUE(outcomes[1].names("rank_count 3 of rank 1 differs from rank 0's, 2"));
    EXPECT_EQ(outcomes[0].status, MEP_TIMEOUT) << outcomes[0];
    EXPECT_TRUE(outcomes[0].names("rank 1 of 2 did not join")) << outcomes[0];
    EXPECT_TRUE(outcomes[0].names("last refused: rank_count 3")) << outcomes[0];
}

TEST_F(TcpJoin, ASecondRankOfTheSameNumberIsRefused) {
    std::vector<Outcome> outcomes(3);
    std::promise<void> refused;
    const auto is_refused = refused.get_future().share();
    std::atomic<int> joined_count{0};
    run_threads(4, [&](int thread) {
        // Threads 1 and 2 both claim rank 1; the loser lets rank 2 come.
        if (thread == 3) is_refused.wait_for(std::chrono::microseconds(kPlentyUs));
        const int rank = thread == 0 ? 0 : thread == 3 ? 2 : 1;
        const Outcome outcome = join({rank, 3}, kPlentyUs);
        if (outcome.status == MEP_OK) {
            ++joined_count;
            return;
        }
        EXPECT_EQ(outcome.status, MEP_BOOTSTRAP_FAILED) << outcome;
        EXPECT_TRUE(outcome.names("rank 1 of 3 is taken")) << outcome;
        refused.set_value();
    });
    EXPECT_EQ(joined_count, 3);
}

TEST_F(TcpJoin, StrangersDelayNobody) {
    std::vector<Descriptor> strangers;
    expect_group_forms(5, [&] {
        std::mt19937 random(7);
        for (int i = 0; i < 40; ++i) {
            unsigned char noise[600];
            for (unsigned char &byte : noise)
                byte = static_cast<unsigned char>(random());
            Descriptor stranger;
            // The group may be complete already, and the listener closed.
            if (connect_to(hub_, Deadline(kPlentyUs), &stranger) != 0) continue;
            size_t count = 0;
            const Hello half = hello({1, 5});
            const size_t size = i % 4 == 0 ? sizeof noise : i % 4 == 1 ? sizeof half / 2 : 0;
            const void *data = i % 4 == 0 ? static_cast<const void *>(noise) : &half;
            send_more(stranger.number(), {{data, size}, {nullptr, 0}}, &count);
            if (i % 4 != 3) strangers.push_back(std::move(stranger));  // else it hangs up
        }
    });
}

TEST_F(TcpJoin, StrangersThatCameFirstAndStaySilentKeepNobodyOut) {
    std::vector<Descriptor> strangers;
    const Hello half = hello({1, 5});
    for (int i = 0; i < 200; ++i) {
        strangers.push_back(connect());
        if (i % 3 == 0) say(strangers.back(), &half, 1 + i % (sizeof half - 1));
        if (i % 7 == 0) strangers.back().close();
    }
    expect_group_forms(5, [] {});
}

TEST_F(TcpJoin, ARankThatIsLostBeforeAllHaveJoinedFailsTheGroupAtOnce) {
    run_threads(2, [&](int thread) {
        if (thread == 0) {
            const Outcome outcome = join({0, 4}, kPlentyUs);
            EXPECT_EQ(outcome.status, MEP_BOOTSTRAP_FAILED) << outcome;
            EXPECT_TRUE(outcome.names("rank 2 of 4")) << outcome;
            EXPECT_LT(outcome.elapsed, kSlackSeconds);
            return;
        }
        // Ranks 1 and 2 are accepted in this order, and rank 2 hangs up.
        Descriptor sockets[2];
        for (int i = 0; i < 2; ++i) {
            sockets[i] = connect();
            const Hello ours = hello({i + 1, 4});
            say(sockets[i], &ours, sizeof ours);
            Reply accepted = {};
            EXPECT_EQ(hear(sockets[i], &accepted, sizeof accepted), sizeof accepted);
            EXPECT_EQ(accepted.status, MEP_OK);
        }
        sockets[1].close();
        Reply error = {};
        EXPECT_EQ(hear(sockets[0], &error, sizeof error), sizeof error);
        EXPECT_EQ(error.status, MEP_BOOTSTRAP_FAILED);
    });
}

TEST_F(TcpJoin, AMessageThatBreaksALimitFailsTheGroup) {
    const std::vector<Request> requests = {{kRequestMagic, 1, UINT64_MAX},
                                           {kRequestMagic, 1, MEP_ALL_GATHER_BYTES_MAX + 1},
                                           {kRequestMagic, 2, 8},
                                           {0, 1, 8}};
    const Endpoint loopback = {hub_.ipv4, 0};
    for (const Request &request : requests) {
        ASSERT_EQ(open_listener(loopback, kListenBacklog, &listener_), 0);
        ASSERT_EQ(local_endpoint(listener_.number(), &hub_), 0);
        run_threads(2, [&](int rank) {
            if (rank == 1) {
                const Descriptor socket = connect();
                const Hello ours = hello({1, 2});
                say(socket, &ours, sizeof ours);
                Reply replies[2];
                EXPECT_EQ(hear(socket, replies, sizeof replies), sizeof replies);
                say(socket, &request, sizeof request);
                Reply error = {};
                EXPECT_EQ(hear(socket, &error, sizeof error), sizeof error);
                EXPECT_EQ(error.status, MEP_BOOTSTRAP_FAILED);
                return;
            }
            BootstrapPointer hub;
            ASSERT_EQ(make({0, 2}, kPlentyUs, &hub), MEP_OK);
            const Outcome outcome =
                observe([&] { return gather_pattern(hub.get(), {0, 2}, 1, 8); });
            EXPECT_EQ(outcome.status, MEP_BOOTSTRAP_FAILED) << outcome;
            EXPECT_TRUE(outcome.names("rank 1 of 2")) << outcome;
        });
    }
}

TEST_F(TcpJoin, AnAnswerThatBreaksALimitFailsTheRank) {
    const std::vector<Reply> replies = {
        {kReplyMagic, 0, UINT64_MAX, MEP_OK, 0},
        {kReplyMagic, 0, UINT64_MAX, MEP_TIMEOUT, 0},
        {kReplyMagic, 0, kErrorTextMax + 1, -1, 0},
        {kReplyMagic, 9, 0, MEP_OK, 0},
        {kReplyMagic, 0, 0, 5, 0},
        {0, 0, 0, MEP_OK, 0},
    };
    for (const Reply &reply : replies) {
        run_threads(2, [&](int rank) {
            if (rank == 1) {
                const Outcome outcome = join({1, 2}, kPlentyUs);
                EXPECT_EQ(outcome.status, MEP_BOOTSTRAP_FAILED) << outcome;
                EXPECT_TRUE(outcome.names("rank 0 of 2")) << outcome;
                return;
            }
            Descriptor socket;
            pollfd entry = {listener_.number(), POLLIN, 0};
            wait_ready(&entry, 1, Deadline(kPlentyUs), 20'000);
            ASSERT_EQ(accept_one(listener_.number(), &socket), 0);
            say(socket, &reply, sizeof reply);
            Hello heard;
            char end;
            EXPECT_EQ(hear(socket, &heard, sizeof heard), sizeof heard);
            EXPECT_EQ(hear(socket, &end, 1), 0U);
        });
    }
}

TEST_F(TcpJoin, AHubThatHangsUpWithoutAWordIsTriedAgain) {
    run_threads(3, [&](int rank) {
        if (rank != 0) {
            const Outcome outcome = join({rank, 3}, kPlentyUs);
            EXPECT_EQ(outcome.status, MEP_OK) << outcome;
            return;
        }
        for (int i = 0; i < 4; ++i) {
            pollfd entry = {listener_.number(), POLLIN, 0};
            wait_ready(&entry, 1, Deadline(kPlentyUs), 20'000);
            Descriptor dropped;
            ASSERT_EQ(accept_one(listener_.number(), &dropped), 0);
        }
        EXPECT_EQ(join({0, 3}, kPlentyUs).status, MEP_OK);
    });
}

// ---- The unique id
// ----------------------------------------------------------------------------------

using UniqueId = Leakless;

Outcome join_by_id(Membership membership, const mep_unique_id_t &id) {
    BootstrapPointer bootstrap;
    return observe(
        [&] { return bootstrap_from_unique_id(membership, id, Deadline(kShortUs), &bootstrap); });
}

TEST_F(UniqueId, ServesOneGroup) {
    mep_unique_id_t id;
    ASSERT_EQ(unique_id_create(nullptr, &id), MEP_OK);
    EXPECT_EQ(join_by_id({0, 1}, id).status, MEP_OK);
    const Outcome again = join_by_id({0, 1}, id);
    EXPECT_EQ(again.status, MEP_INVALID_ARGUMENT);
    EXPECT_TRUE(again.names("already used")) << again;
}

TEST_F(UniqueId, CannotBeUsedAfterItsDestruction) {
    mep_unique_id_t id;
    ASSERT_EQ(unique_id_create("localhost", &id), MEP_OK);
    unique_id_destroy(id);
    EXPECT_TRUE(join_by_id({0, 1}, id).names("already used"));
}

TEST_F(UniqueId, DestructionClosesOnlyItsOwnListener) {
    mep_unique_id_t id, other;
    ASSERT_EQ(unique_id_create(nullptr, &id), MEP_OK);
    unique_id_destroy(id);
    ASSERT_EQ(unique_id_create(nullptr, &other), MEP_OK);  // takes the same descriptor
    const int count = descriptor_count();
    fail(MEP_UNSUPPORTED, "what went wrong");
    unique_id_destroy(id);
    EXPECT_EQ(descriptor_count(), count);
    EXPECT_STREQ(last_error(), "what went wrong");
    unique_id_destroy(other);
    EXPECT_EQ(descriptor_count(), count - 1);
}

TEST_F(UniqueId, DamagedBytesAreRefusedOnEveryRank) {
    mep_unique_id_t id;
    ASSERT_EQ(unique_id_create(nullptr, &id), MEP_OK);
    for (int i = 0; i < MEP_UNIQUE_ID_BYTES; ++i)
        for (const int rank : {0, 1}) {
            mep_unique_id_t damaged = id;
            damaged.bytes[i] ^= 0x10;
            EXPECT_EQ(join_by_id({rank, 2}, damaged).status, MEP_INVALID_ARGUMENT) << "byte " << i;
        }
    EXPECT_EQ(join_by_id({0, 2}, mep_unique_id_t{}).status, MEP_INVALID_ARGUMENT);
    unique_id_destroy(mep_unique_id_t{});
    unique_id_destroy(id);
}

TEST_F(UniqueId, AddressesOfNobodyHereAreRefused) {
    mep_unique_id_t id;
    for (const char *address : {"", "0.0.0.0", "198.51.100.7", "not an address"}) {
        const Outcome outcome = observe([&] { return unique_id_create(address, &id); });
        EXPECT_EQ(outcome.status, MEP_INVALID_ARGUMENT) << outcome;
        EXPECT_TRUE(outcome.names(address)) << outcome;
    }
}

TEST_F(UniqueId, AnyOtherRankKeepsItsListenerIntact) {
    mep_unique_id_t id;
    ASSERT_EQ(unique_id_create(nullptr, &id), MEP_OK);
    EXPECT_EQ(join_by_id({1, 2}, id).status, MEP_TIMEOUT);
    EXPECT_EQ(join_by_id({0, 1}, id).status, MEP_OK);
}

// ---- Ranks that are processes
// -----------------------------------------------------------------------

// Runs `body` in a child process; it says whether all went well. The kernel ends a child that
// hangs.
pid_t start_process(const std::function<bool()> &body) {
    const pid_t child = ::fork();
    if (child != 0) return child;
    ::alarm(30);
    const bool good = body();
    ::_exit(good && !testing::Test::HasFailure() ? 0 : 1);
}

void expect_success(const std::vector<pid_t> &children) {
    for (const pid_t child : children) {
        int status = -1;
        EXPECT_EQ(::waitpid(child, &status, 0), child);
        EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "child status " << status;
    }
}

TEST_F(UniqueId, RankZeroMustBeInTheProcessThatMadeIt) {
    mep_unique_id_t id;
    ASSERT_EQ(unique_id_create(nullptr, &id), MEP_OK);
    expect_success({start_process([&] {
        const Outcome outcome = join_by_id({0, 1}, id);
        EXPECT_EQ(outcome.status, MEP_INVALID_ARGUMENT) << outcome;
        EXPECT_TRUE(outcome.names("process that called mep_unique_id_create")) << outcome;
        const int count = descriptor_count();
        unique_id_destroy(id);
        EXPECT_EQ(descriptor_count(), count);
        return true;
    })});
    unique_id_destroy(id);
}

TEST_F(UniqueId, JoinsProcesses) {
    mep_unique_id_t id;
    ASSERT_EQ(unique_id_create(nullptr, &id), MEP_OK);
    const auto be_rank = [&](int rank) {
        BootstrapPointer bootstrap;
        return bootstrap_from_unique_id({rank, 3}, id, Deadline(kPlentyUs), &bootstrap) == MEP_OK &&
               gather_pattern(bootstrap.get(), {rank, 3}, 1, 5000) == MEP_OK;
    };
    const pid_t first = start_process([&] { return be_rank(1); });
    const pid_t second = start_process([&] { return be_rank(2); });
    EXPECT_TRUE(be_rank(0));
    expect_success({first, second});
}

class FromEnvironment : public Leakless {
  protected:
    void SetUp() override {
        Leakless::SetUp();
        Descriptor listener;
        Endpoint endpoint = {};
        ASSERT_EQ(resolve_ipv4("127.0.0.1", &endpoint.ipv4), 0);
        ASSERT_EQ(open_listener(endpoint, 1, &listener), 0);
        ASSERT_EQ(local_endpoint(listener.number(), &endpoint_), 0);
        set({{"RANK", "0"},
             {"WORLD_SIZE", "1"},
             {"MASTER_ADDR", "127.0.0.1"},
             {"MASTER_PORT", std::to_string(endpoint_.port - 1)},
             {"MOONCAKE_EP_PORT_OFFSET", ""},
             {"MOONCAKE_EP_SECRET", ""}});
    }
    void TearDown() override {
        for (const char *name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                                 "MOONCAKE_EP_PORT_OFFSET", "MOONCAKE_EP_SECRET"})
            ::unsetenv(name);
        Leakless::TearDown();
    }

    static void set(const std::map<std::string, std::string> &variables) {
        for (const auto &[name, value] : variables)
            ::setenv(name.c_str(), value.c_str(), 1);
    }

    static Outcome join(Membership membership, int64_t timeout_us) {
        BootstrapPointer bootstrap;
        return observe([&] {
            return bootstrap_from_environment(&membership, Deadline(timeout_us), &bootstrap);
        });
    }

    // Meets and gathers as a process of rank `rank`, `group_count` times; the groups live side by
    // side.
    static bool be_rank(int rank, int rank_count, int group_count) {
        set({{"RANK", std::to_string(rank)}, {"WORLD_SIZE", std::to_string(rank_count)}});
        std::vector<BootstrapPointer> groups(group_count);
        for (BootstrapPointer &group : groups) {
            Membership membership = {};
            const Outcome outcome = observe([&] {
                return bootstrap_from_environment(&membership, Deadline(kPlentyUs), &group);
            });
            EXPECT_EQ(outcome.status, MEP_OK) << outcome;
            if (group == nullptr) return false;
            EXPECT_EQ(membership.rank, rank);
            EXPECT_EQ(membership.rank_count, rank_count);
            EXPECT_EQ(gather_pattern(group.get(), membership, 1, 3000), MEP_OK);
        }
        return true;
    }

    Endpoint endpoint_ = {};  // where rank 0 is to listen
};

TEST_F(FromEnvironment, JoinsProcessesOfSeveralSizes) {
    for (const int rank_count : {1, 2, 5}) {
        std::vector<pid_t> children;
        for (int rank = rank_count - 1; rank >= 0; --rank)
            children.push_back(start_process([&] { return be_rank(rank, rank_count, 1); }));
        expect_success(children);
    }
}

TEST_F(FromEnvironment, GroupsFollowEachOtherOnOnePort) {
    set({{"MOONCAKE_EP_PORT_OFFSET", "1"},
         {"MOONCAKE_EP_SECRET",
          "a secret of any length, "
          "even one of many more bytes"}});
    std::vector<pid_t> children;
    for (int rank = 0; rank < 3; ++rank)
        children.push_back(start_process([&] { return be_rank(rank, 3, 10); }));
    expect_success(children);
}

TEST_F(FromEnvironment, ADifferentSecretIsRefused) {
    const auto be_rank_with = [](int rank, const char *secret) {
        set({{"RANK", std::to_string(rank)}, {"WORLD_SIZE", "2"}, {"MOONCAKE_EP_SECRET", secret}});
        const Outcome outcome = join({}, rank == 0 ? 3 * kShortUs : kPlentyUs);
        EXPECT_EQ(outcome.status, rank == 0 ? MEP_TIMEOUT : MEP_BOOTSTRAP_FAILED) << outcome;
        EXPECT_TRUE(outcome.names("secret of rank 1 differs")) << outcome;
        return true;
    };
    const pid_t hub = start_process([&] { return be_rank_with(0, "right"); });
    const pid_t spoke = start_process([&] { return be_rank_with(1, "wrong"); });
    expect_success({hub, spoke});
}

TEST_F(FromEnvironment, AnEarlierListenerOnThePortDelaysTheGroupOnly) {
    Descriptor earlier;
    ASSERT_EQ(open_listener(endpoint_, 8, &earlier), 0);
    const pid_t hub = start_process([&] {
        earlier.close();  // this process' copy
        return be_rank(0, 2, 1);
    });
    const pid_t spoke = start_process([&] {
        earlier.close();
        return be_rank(1, 2, 1);
    });
    // Rank 1 has come to the wrong door; only now it opens for rank 0.
    Descriptor misled;
    const Deadline deadline(kPlentyUs);
    while (!misled.is_open() && !deadline.passed()) {
        pollfd entry = {earlier.number(), POLLIN, 0};
        wait_ready(&entry, 1, deadline, 1000);
        accept_one(earlier.number(), &misled);
    }
    earlier.close();
    misled.close();
    expect_success({hub, spoke});
}

TEST_F(FromEnvironment, MissingVariablesAreNamed) {
    set({{"WORLD_SIZE", "2"}, {"MASTER_ADDR", ""}, {"RANK", ""}});
    const Outcome outcome = join({}, kShortUs);
    EXPECT_EQ(outcome.status, MEP_INVALID_ARGUMENT);
    EXPECT_TRUE(outcome.names("not set: RANK, MASTER_ADDR")) << outcome;
}

TEST_F(FromEnvironment, OneRankNeedsNoAddress) {
    set({{"MASTER_ADDR", ""}, {"MASTER_PORT", ""}});
    EXPECT_EQ(join({}, kShortUs).status, MEP_OK);
}

TEST_F(FromEnvironment, WhatTheConfigSaysMustAgree) {
    set({{"RANK", "1"}, {"WORLD_SIZE", "2"}});
    EXPECT_TRUE(join({2, 0}, kShortUs).names("RANK is 1"));
    EXPECT_TRUE(join({0, 3}, kShortUs).names("WORLD_SIZE is 2"));
    const Outcome agreed = join({1, 2}, 1000);
    EXPECT_EQ(agreed.status, MEP_TIMEOUT) << agreed;
}

TEST_F(FromEnvironment, WrongValuesAreNamed) {
    const std::vector<std::pair<std::string, std::string>> wrong = {
        {"RANK", "2"},
        {"RANK", "one"},
        {"WORLD_SIZE", "1025"},
        {"MASTER_PORT", "65536"},
        {"MASTER_PORT", "65535"},  // and one more is no port
        {"MOONCAKE_EP_PORT_OFFSET", "x"},
        {"MASTER_ADDR", "no such host"}};
    const std::map<std::string, std::string> right = {{"RANK", "1"},
                                                      {"WORLD_SIZE", "2"},
                                                      {"MASTER_ADDR", "127.0.0.1"},
                                                      {"MASTER_PORT", "29500"},
                                                      {"MOONCAKE_EP_PORT_OFFSET", "1"}};
    for (const auto &[name, value] : wrong) {
        set(right);
        set({{name, value}});
        const Outcome outcome = join({}, kShortUs);
        EXPECT_EQ(outcome.status, MEP_INVALID_ARGUMENT) << outcome;
        EXPECT_TRUE(outcome.names(name) && outcome.names(value)) << outcome;
    }
}

}  // namespace
}  // namespace ep
