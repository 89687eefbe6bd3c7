// mep_group_update: a group comes together anew, after ranks were lost, or to let some in or out.
// Ranks are processes that real signals kill and stop.
#include "support/abi.h"
#include "support/actors.h"
#include "support/settings.h"
#include "support/tidy.h"

#include <chrono>
#include <cstdio>
#include <random>

namespace ep::test {
namespace {

constexpr unsigned kAlarmSeconds = 60;
constexpr int64_t kShortUs = 150'000;  // of a wait for a rank that is lost
constexpr int kRanks = 3;

// Marks of a stage.
enum Mark { kStarted, kKilled, kLost, kUpdated, kServed, kGoOn, kDone, kWoken };

class Update : public Tidy {
  protected:
    void SetUp() override {
        Tidy::SetUp();
        alarm(kAlarmSeconds);
        if (!can_run(kAlarmSeconds, [] { be_rank(0); })) GTEST_SKIP() << "no device; see above";
    }
    void TearDown() override {
        alarm(0);
        Tidy::TearDown();
    }
    // A process that has asked cannot be forked.
    void ask_drivers() override {}
};

void ignore_warnings() {
    mep_log_set_callback([](void *, int32_t, const char *) {}, nullptr, MEP_LOG_WARNING);
}

mep_group_config_t config_of(int rank, const mep_unique_id_t &id,
                             const std::vector<int32_t> &members) {
    mep_group_config_t config = group_config(rank, kRanks, nullptr);
    config.unique_id = &id;
    config.active_ranks = members.data();
    return config;
}

int first_of(const std::vector<int32_t> &members) {
    return static_cast<int>(std::find(members.begin(), members.end(), 1) - members.begin());
}

int count_of(const std::vector<int32_t> &members) {
    return static_cast<int>(std::count(members.begin(), members.end(), 1));
}

std::vector<int> absent_of(const std::vector<int32_t> &members) {
    std::vector<int> absent;
    for (int rank = 0; rank < kRanks; ++rank)
        if (members[rank] == 0) absent.push_back(rank);
    return absent;
}

// One process's membership, with two buffers.
struct Rank {
    int rank;
    Stage &stage;
    Group group{nullptr};
    mep_buffer_config_t shape = buffer_config(kRanks);
    std::vector<Buffer> buffers;

    Rank(int number, Stage *the_stage) : rank(number), stage(*the_stage) { be_rank(number); }

    void join(int id, const std::vector<int32_t> &members) {
        group = make_group(config_of(rank, stage.id(id, rank == first_of(members)), members));
        while (buffers.size() < 2) {
            shape.rounds_in_flight_max = 2 + static_cast<int>(buffers.size());
            buffers.push_back(make_buffer(group, shape));
        }
    }
    mep_status_t update(int id, const std::vector<int32_t> &members, int64_t timeout_us = 0) {
        mep_group_config_t config =
            config_of(rank, stage.id(id, rank == first_of(members)), members);
        config.timeout_us = timeout_us;
        return mep_group_update(group.get(), &config);
    }

    // Rounds through both buffers, exact for those that take part.
    void expect_rounds(uint64_t seed, int count, const std::vector<int32_t> &members) {
        for (int i = 0; i < count; ++i)
            for (const Buffer &buffer : buffers)
                expect_round(buffer, Plan::of(shape, kRanks, seed + i, absent_of(members)), rank);
    }

    // A round through each buffer in which `lost` is missed. On a GPU the call says nothing itself.
    void expect_loss(uint64_t seed, int lost) {
        for (const Buffer &buffer : buffers) {
            const Plan plan = Plan::of(shape, kRanks, seed, {lost});
            Share share(plan, rank);
            const Handle handle = make_handle(buffer);
            mep_dispatch_args_t args = share.dispatch_args();
            args.timeout_us = kShortUs;
            const mep_status_t status = test::dispatch(buffer, handle, args);
            EXPECT_EQ(status, on_cpu() ? MEP_PEER_FAILED : MEP_OK) << mep_last_error();
            EXPECT_TRUE(share.dispatched());
            EXPECT_EQ(share.combine(buffer, handle), MEP_OK) << mep_last_error();
            EXPECT_TRUE(share.combined());
        }
        stage.meet(kLost, kRanks - 1);
    }
};

// A round whose inputs change, in the same arrays: on a GPU replays of one graph.
class Replayed {
  public:
    Replayed(const Buffer &buffer, const mep_buffer_config_t &shape, int rank)
        : shape_(shape),
          buffer_(buffer),
          handle_(make_handle(buffer)),
          plan_(plan_of(0, {})),
          share_(plan_, rank),
          replay_(captured([this] { queue(); })) {}
    Replayed(const Replayed &) = delete;
    Replayed &operator=(const Replayed &) = delete;

    // Of as many tokens as there may be, because a graph has a fixed number.
    Plan plan_of(uint64_t seed, const std::vector<int> &lost) const {
        return Plan::of(shape_, kRanks, seed, lost, true);
    }
    void expect_round(uint64_t seed, const std::vector<int> &lost) {
        SCOPED_TRACE("replay, seed " + std::to_string(seed));
        plan_ = plan_of(seed, lost);
        share_.fill();
        for (Tensor *output : {&share_.out_x, &share_.out_count, &share_.out})
            output->poison();
        replay_();
        EXPECT_TRUE(share_.dispatched());
        EXPECT_TRUE(share_.combined());
    }

  private:
    void queue() {
        mep_dispatch_args_t dispatch = share_.dispatch_args();
        mep_combine_args_t combine = share_.combine_args();
        dispatch.stream = combine.stream = stream();
        const auto good = [](mep_status_t status) {
            EXPECT_TRUE(status == MEP_OK || status == MEP_PEER_FAILED) << mep_last_error();
        };
        good(mep_dispatch(buffer_.get(), handle_.get(), &dispatch));
        good(mep_combine(buffer_.get(), handle_.get(), &combine));
    }

    const mep_buffer_config_t shape_;
    const Buffer &buffer_;
    Handle handle_;
    Plan plan_;
    Share share_;
    std::function<void()> replay_;
};

// Graphs of the survivors, captured before: they miss the rank in the time that was set meanwhile,
// go on without it, and after the update with the process that takes its place.
void replay_across_an_update(Stage *stage, int number) {
    const std::vector<int32_t> all(kRanks, 1);
    Rank rank(number, stage);
    rank.join(0, all);
    Replayed first(rank.buffers[0], rank.shape, number),
        second(rank.buffers[1], rank.shape, number);
    const auto expect_rounds = [&](uint64_t seed, int count, const std::vector<int> &lost) {
        for (int i = 0; i < count; ++i) {
            first.expect_round(seed + i, lost);
            second.expect_round(seed + i, lost);
            if (i % 4 == 0)
                rank.expect_rounds(seed + i, 1, lost.empty() ? all : std::vector{1, 1, 0});
        }
    };
    expect_rounds(10, 9, {});
    EXPECT_EQ(mep_group_set_timeout(rank.group.get(), kShortUs), MEP_OK);
    stage->reach(kStarted);
    while (number == 2)
        pause();
    stage->await(kKilled, 1);
    expect_rounds(20, 1, {2});
    stage->meet(kLost, kRanks - 1);
    expect_rounds(30, 9, {2});
    // The new process has its start-up before it.
    EXPECT_EQ(rank.update(1, all, kTestTimeoutUs), MEP_OK) << mep_last_error();
    EXPECT_EQ(mep_group_set_timeout(rank.group.get(), kTestTimeoutUs), MEP_OK);
    expect_rounds(40, 1, {});
    stage->reach(kServed);
    expect_rounds(50, 40, {});
}

TEST_F(Update, GraphsCapturedBeforeGoOn) {
    const auto body = [] {
        const Shared<Stage> stage;
        Actors actors(kAlarmSeconds);
        std::vector<pid_t> ranks = actors.start_ranks(
            kRanks, [&](int number) { replay_across_an_update(&*stage, number); });
        stage->await(kStarted, kRanks);
        const auto killed = std::chrono::steady_clock::now();
        kill(ranks[2], SIGKILL);
        actors.expect_end(ranks[2], SIGKILL);
        stage->reach(kKilled);
        ranks[2] = actors.start([&] {
            const std::vector<int32_t> all(kRanks, 1);
            Rank rank(2, &*stage);
            rank.join(1, all);
            const auto expect_rounds = [&](uint64_t seed, int count) {
                for (int i = 0; i < count; ++i) {
                    for (const Buffer &buffer : rank.buffers)
                        expect_round(buffer, Plan::of(rank.shape, kRanks, seed + i, {}, true), 2);
                    if (i % 4 == 0) rank.expect_rounds(seed + i, 1, all);
                }
            };
            expect_rounds(40, 1);
            stage->reach(kServed);
            expect_rounds(50, 40);
        });
        stage->await(kServed, kRanks);
        const std::chrono::duration<double> served = std::chrono::steady_clock::now() - killed;
        std::printf("killed, and in its place another serves again, after %.2f s\n",
                    served.count());
        if (!on_cpu()) {  // there a sanitizer may be at work; tests/python/test_update.py asks for
                          // it
            EXPECT_LT(served.count(), 2 + kShortUs / 1e6);
        }
        actors.expect_all_end(ranks);
    };
    on_cpu() ? body() : with_all_kernels(body);
}

TEST_F(Update, AKilledRankIsReplaced) {
    const Shared<Stage> stage;
    Actors actors(kAlarmSeconds);
    const std::vector<int32_t> all(kRanks, 1);
    std::vector<pid_t> ranks = actors.start_ranks(kRanks, [&](int number) {
        Rank rank(number, &*stage);
        rank.join(0, all);
        rank.expect_rounds(10, 5, all);
        stage->reach(kStarted);
        while (number == 2)
            pause();
        stage->await(kKilled, 1);
        rank.expect_loss(20, 2);
        rank.expect_rounds(30, 3, {1, 1, 0});
        EXPECT_EQ(rank.update(1, all), MEP_OK) << mep_last_error();
        rank.expect_rounds(40, 20, all);
    });
    stage->await(kStarted, kRanks);
    kill(ranks[2], SIGKILL);
    actors.expect_end(ranks[2], SIGKILL);
    stage->reach(kKilled);
    ranks[2] = actors.start([&] {
        Rank rank(2, &*stage);
        rank.join(1, all);
        rank.expect_rounds(40, 20, all);
    });
    actors.expect_all_end(ranks);
}

// Which stores into windows that nobody looks at any more, in the middle of what it was doing.
TEST_F(Update, AStoppedRankThatWakesIsNotHeard) {
    const Shared<Stage> stage;
    Actors actors(kAlarmSeconds);
    const std::vector<int32_t> all(kRanks, 1);
    std::vector<pid_t> ranks = actors.start_ranks(kRanks, [&](int number) {
        Rank rank(number, &*stage);
        rank.join(0, all);
        rank.expect_rounds(10, 2, all);
        stage->reach(kStarted);
        if (number == 2) {  // is stopped here; then sends on and on, whoever answers
            stage->await(kKilled, 1);
            ignore_warnings();
            const Plan plan = Plan::of(rank.shape, kRanks, 99);
            Share share(plan, number);
            const Handle handle = make_handle(rank.buffers[0]);
            Tensor active(kInt32, {kRanks});
            mep_dispatch_args_t args = share.dispatch_args();
            args.timeout_us = 1;
            args.active_ranks = active.view();
            for (;;) {
                active.fill<int32_t>({1, 1, 1});
                test::dispatch(rank.buffers[0], handle, args);
                stage->reach(kWoken);
            }
        }
        stage->await(kKilled, 1);
        rank.expect_loss(20, 2);
        EXPECT_EQ(rank.update(1, all), MEP_OK) << mep_last_error();
        stage->meet(kUpdated, kRanks);
        stage->await(kGoOn, 1);
        rank.expect_rounds(40, 100, all);
        stage->reach(kDone);
    });
    stage->await(kStarted, kRanks);
    kill(ranks[2], SIGSTOP);
    stage->reach(kKilled);
    const pid_t second = actors.start([&] {
        Rank rank(2, &*stage);
        rank.join(1, all);
        stage->meet(kUpdated, kRanks);
        stage->await(kGoOn, 1);
        rank.expect_rounds(40, 100, all);
        stage->reach(kDone);
    });
    stage->await(kUpdated, kRanks);
    const int woken = stage->count(kWoken);
    kill(ranks[2], SIGCONT);
    stage->await(kWoken, woken + 2);
    stage->reach(kGoOn);
    while (stage->count(kDone) < kRanks)  // it stops wherever it is
        for (const int signal : {SIGSTOP, SIGCONT}) {
            kill(ranks[2], signal);
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    EXPECT_GT(stage->count(kWoken), woken + 2) << "it was awake meanwhile";
    kill(ranks[2], SIGKILL);
    actors.expect_end(ranks[2], SIGKILL);
    for (const pid_t rank : {ranks[0], ranks[1], second})
        actors.expect_end(rank);
}

TEST_F(Update, ARankLeavesForGoodAndAnotherComesLater) {
    const Shared<Stage> stage;
    Actors actors(kAlarmSeconds);
    const std::vector<int32_t> all(kRanks, 1), two{1, 1, 0}, last{0, 1, 1};
    std::vector<pid_t> ranks = actors.start_ranks(kRanks, [&](int number) {
        Rank rank(number, &*stage);
        if (number < 2) {
            rank.join(0, two);  // R is a capacity
            rank.expect_rounds(10, 5, two);
            EXPECT_EQ(rank.update(1, all), MEP_OK) << mep_last_error();
        } else {
            rank.join(1, all);
        }
        rank.expect_rounds(20, 5, all);
        if (number == 0) return;  // the hub of the old meeting point
        EXPECT_EQ(rank.update(2, last), MEP_OK) << mep_last_error();
        rank.expect_rounds(30, 5, last);
        mep_transport_info_t way{};
        way.struct_size = sizeof way;
        EXPECT_EQ(mep_group_query_transport(rank.group.get(), 0, &way), MEP_OK);
        EXPECT_EQ(way.kind, MEP_TRANSPORT_NONE);
        EXPECT_STREQ(way.reason, "rank 0 is not in the group");
        // The caller's mask is told, too, and nobody waits.
        const Plan plan = Plan::of(rank.shape, kRanks, 41, {0});
        Share share(plan, number);
        const Handle handle = make_handle(rank.buffers[0]);
        Tensor active(kInt32, {kRanks});
        active.fill<int32_t>({1, 1, 1});
        mep_dispatch_args_t args = share.dispatch_args();
        args.active_ranks = active.view();
        args.timeout_us = -1;
        EXPECT_EQ(test::dispatch(rank.buffers[0], handle, args), MEP_OK);
        EXPECT_TRUE(share.dispatched());
        EXPECT_EQ(std::vector<int32_t>(active.data<int32_t>(), active.data<int32_t>() + kRanks),
                  (std::vector<int32_t>{0, 1, 1}));
        stage->meet(kDone, 2);  // before one of them takes the memory back
    });
    actors.expect_all_end(ranks);
}

// The newcomer dies when the others wait for its buffers; they go on as before, and try again.
TEST_F(Update, WhatFailsChangesNothing) {
    const Shared<Stage> stage;
    Actors actors(kAlarmSeconds);
    const std::vector<int32_t> all(kRanks, 1), two{1, 1, 0};
    std::vector<pid_t> ranks = actors.start_ranks(2, [&](int number) {
        Rank rank(number, &*stage);
        rank.join(0, two);
        rank.expect_rounds(10, 5, two);
        const mep_status_t status = rank.update(1, all, 2'000'000);
        EXPECT_TRUE(status == MEP_TIMEOUT || status == MEP_BOOTSTRAP_FAILED)
            << mep_status_name(status);
        rank.expect_rounds(20, 5, two);
        EXPECT_EQ(rank.update(2, all), MEP_OK) << mep_last_error();
        rank.expect_rounds(30, 5, all);
    });
    const pid_t first = actors.start([&] {
        Rank rank(2, &*stage);
        rank.group = make_group(config_of(2, stage->id(1, false), all));
        rank.buffers.push_back(make_buffer(rank.group, [&] {
            rank.shape.rounds_in_flight_max = 2;
            return rank.shape;
        }()));
        raise(SIGKILL);
    });
    actors.expect_end(first, SIGKILL);
    ranks.push_back(actors.start([&] {
        Rank rank(2, &*stage);
        rank.join(2, all);
        rank.expect_rounds(30, 5, all);
    }));
    actors.expect_all_end(ranks);
}

TEST_F(Update, RoundsInFlightAreReceivedFirst) {
    const Shared<Stage> stage;
    Actors actors(kAlarmSeconds);
    const std::vector<int32_t> all(kRanks, 1);
    std::vector<pid_t> ranks = actors.start_ranks(kRanks, [&](int number) {
        Rank rank(number, &*stage);
        rank.join(0, all);
        const Plan plan = Plan::of(rank.shape, kRanks, 11);
        Share share(plan, number);
        const Handle handle = make_handle(rank.buffers[1]);
        EXPECT_EQ(share.dispatch(rank.buffers[1], handle, MEP_PHASE_SEND), MEP_OK);
        EXPECT_EQ(rank.update(1, all), MEP_INVALID_STATE);
        EXPECT_NE(std::string(mep_last_error()).find("in flight"), std::string::npos)
            << mep_last_error();
        EXPECT_EQ(share.dispatch(rank.buffers[1], handle, MEP_PHASE_RECEIVE), MEP_OK);
        EXPECT_TRUE(share.dispatched());
        // One that nobody will receive does not count: its slot is new after the update.
        {
            const Handle forgotten = make_handle(rank.buffers[0]);
            Share other(plan, number);
            EXPECT_EQ(other.dispatch(rank.buffers[0], forgotten, MEP_PHASE_SEND), MEP_OK);
        }
        EXPECT_EQ(rank.update(2, all), MEP_OK) << mep_last_error();
        EXPECT_EQ(share.combine(rank.buffers[1], handle), MEP_INVALID_STATE);
        EXPECT_NE(std::string(mep_last_error()).find("updated"), std::string::npos)
            << mep_last_error();
        EXPECT_EQ(share.dispatch(rank.buffers[1], handle), MEP_OK);
        EXPECT_EQ(share.combine(rank.buffers[1], handle), MEP_OK);
        EXPECT_TRUE(share.combined());
        rank.expect_rounds(20, 5, all);
    });
    actors.expect_all_end(ranks);
}

TEST_F(Update, SaysWhatIsWrongWithItsArguments) {
    const Shared<Stage> stage;
    Actors actors(kAlarmSeconds);
    const std::vector<int32_t> all(kRanks, 1), two{1, 1, 0};
    std::vector<pid_t> ranks = actors.start_ranks(kRanks, [&](int number) {
        Rank rank(number, &*stage);
        rank.join(0, all);
        ignore_warnings();  // of a connection that is refused
        const auto says = [&](mep_status_t status, const char *words,
                              const mep_group_config_t &config) {
            EXPECT_EQ(mep_group_update(rank.group.get(), &config), status);
            EXPECT_NE(std::string(mep_last_error()).find(words), std::string::npos)
                << mep_last_error();
        };
        const mep_unique_id_t &id = stage->id(1, number == 0);
        mep_group_config_t config = config_of(number, id, all);
        config.rank_count = 2;
        says(MEP_INVALID_ARGUMENT, "config.rank_count is 2; it must be 0, or 3", config);
        config = config_of(number, id, all);
        config.unique_id = nullptr;
        says(MEP_INVALID_ARGUMENT, "an update needs one", config);
        const std::vector<int32_t> strange{1, 7, 1};
        says(MEP_INVALID_ARGUMENT, "config.active_ranks[1] is 7", config_of(number, id, strange));
        if (number == 2) says(MEP_INVALID_ARGUMENT, "this rank's own", config_of(number, id, two));
        // The ranks do not mean the same ranks.
        if (number < 2) {
            const std::vector<int32_t> other{1, 1, 0}, mine{1, 1, 1};
            const auto &members = number == 0 ? other : mine;
            mep_group_config_t differs = config_of(number, id, members);
            differs.timeout_us = 500'000;
            const mep_status_t status = mep_group_update(rank.group.get(), &differs);
            EXPECT_TRUE(status == MEP_TIMEOUT || status == MEP_MISMATCH ||
                        status == MEP_BOOTSTRAP_FAILED)
                << mep_status_name(status);
        }
        rank.expect_rounds(20, 5, all);
        // Not as many buffers.
        if (number == 1) rank.buffers.pop_back();
        EXPECT_EQ(rank.update(2, all), MEP_MISMATCH) << mep_last_error();
        EXPECT_NE(std::string(mep_last_error()).find("buffers of the group"), std::string::npos);
    });
    actors.expect_all_end(ranks);
}

// Ranks come and go in a random order; all that stays behind is what there was after the first
// time.
TEST_F(Update, ManyTimesLeaveNothingBehind) {
    const Shared<Stage> stage;
    Actors actors(kAlarmSeconds);
    constexpr int kUpdates = 30;
    std::vector<std::vector<int32_t>> members{{1, 1, 1}};
    std::mt19937_64 random(17);
    while (members.size() <= kUpdates) {
        std::vector<int32_t> next;
        for (int rank = 0; rank < kRanks; ++rank)
            next.push_back(static_cast<int32_t>(random() % 2));
        if (count_of(next) > 0) members.push_back(next);
    }
    const auto life = [&](int number, int from) {  // until it is not named any more
        Rank rank(number, &*stage);
        rank.join(from, members[from]);
        rank.expect_rounds(100 * from, 3, members[from]);
        size_t descriptors = 0;
        for (int i = from + 1; i <= kUpdates && members[i][number] != 0; ++i) {
            EXPECT_EQ(rank.update(i, members[i]), MEP_OK) << mep_last_error();
            rank.expect_rounds(100 * i, 3, members[i]);
            // What the connections to the others take may differ.
            const size_t now = entries_of("/proc/self/fd", "").size();
            if (descriptors == 0) descriptors = now + kRanks * kRanks;
            EXPECT_LE(now, descriptors);
        }
    };
    std::vector<pid_t> lives;
    for (int i = 0; i <= kUpdates; ++i)
        for (int number = 0; number < kRanks; ++number)
            if (members[i][number] != 0 && (i == 0 || members[i - 1][number] == 0))
                lives.push_back(actors.start([&, number, i] { life(number, i); }));
    for (const pid_t one : lives)
        actors.expect_end(one);
}

// The ranks of a world are threads, and its new world is of those that are left.
TEST_F(Update, ThreadsMeetInAWorld) {
    if (!on_cpu()) GTEST_SKIP() << "the ranks of GPUs are processes here";
    const World first = make_world(2), second = make_world(3), third = make_world(1);
    const std::vector<int32_t> two{1, 1, 0}, all(kRanks, 1), one{0, 1, 0};
    const mep_buffer_config_t shape = buffer_config(kRanks);
    const auto config = [&](int rank, const World &world, const std::vector<int32_t> &members) {
        mep_group_config_t made = group_config(rank, kRanks, world.get());
        made.active_ranks = members.data();
        return made;
    };
    run_ranks(kRanks, [&](int rank) {
        Group group{nullptr};
        Buffer buffer{nullptr};
        if (rank < 2) {
            group = make_group(config(rank, first, two));
            buffer = make_buffer(group, shape);
            expect_round(buffer, Plan::of(shape, kRanks, 5, {2}), rank);
            const mep_group_config_t next = config(rank, second, all);
            EXPECT_EQ(mep_group_update(group.get(), &next), MEP_OK) << mep_last_error();
        } else {
            group = make_group(config(rank, second, all));
            buffer = make_buffer(group, shape);
        }
        expect_round(buffer, Plan::of(shape, kRanks, 6), rank);
        if (rank != 1) return;
        const mep_group_config_t alone = config(rank, third, one);
        EXPECT_EQ(mep_group_update(group.get(), &alone), MEP_OK) << mep_last_error();
        expect_round(buffer, Plan::of(shape, kRanks, 7, {0, 2}), rank);
    });
}

}  // namespace
}  // namespace ep::test
