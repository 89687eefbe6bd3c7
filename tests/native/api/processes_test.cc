// Ranks as processes: they meet over a unique id and share memory. The test itself is rank 0 and
// forks the others before anything has started a thread. An alarm ends each of them, whatever
// happens.
#include "support/abi.h"
#include "support/forked.h"
#include "support/tidy.h"

#include <atomic>
#include <cerrno>
#include <csignal>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

namespace ep::test {
namespace {

constexpr unsigned kAlarmSeconds = 60;

class Processes : public Tidy {
  protected:
    void SetUp() override {
        Tidy::SetUp();
        alarm(kAlarmSeconds);
    }
    void TearDown() override {
        alarm(0);
        Tidy::TearDown();
    }

    // body(rank, group) in a process for each rank. Returns when all have ended; those that a
    // signal was to end are in `killed`.
    template <class Body>
    void run(int rank_count, Body body, const std::vector<int> &killed = {}) {
        fork_ranks(
            rank_count,
            [&](const mep_group_config_t &config) {
                const Group group = make_group(config);
                body(config.rank, group);
            },
            killed);
    }

    // The same with body(config), which may create the group.
    template <class Body>
    void fork_ranks(int rank_count, Body body, const std::vector<int> &killed = {}) {
        mep_unique_id_t id;
        ASSERT_EQ(mep_unique_id_create(nullptr, &id), MEP_OK) << mep_last_error();
        std::vector<pid_t> children;
        for (int rank = 1; rank < rank_count; ++rank) {
            const pid_t child = fork();
            ASSERT_GE(child, 0);
            if (child == 0) {
                alarm(kAlarmSeconds);
                body(config_of(id, rank, rank_count));
                fflush(nullptr);
                _exit(HasFailure() ? 1 : 0);
            }
            children.push_back(child);
        }
        body(config_of(id, 0, rank_count));
        for (int rank = 1; rank < rank_count; ++rank) {
            int status = 0;
            EXPECT_EQ(waitpid(children[rank - 1], &status, 0), children[rank - 1]);
            bool to_be_killed = false;
            for (const int one : killed)
                to_be_killed = to_be_killed || one == rank;
            const int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
            EXPECT_EQ(signal, to_be_killed ? SIGKILL : 0) << "rank " << rank;
            EXPECT_TRUE(to_be_killed || status == 0) << "rank " << rank << " has failed";
        }
    }

  private:
    static mep_group_config_t config_of(const mep_unique_id_t &id, int rank, int rank_count) {
        mep_group_config_t config = group_config(rank, rank_count, nullptr);
        config.unique_id = &id;
        return config;
    }
};

void await(const std::atomic<int> &counter, int goal) {
    while (counter < goal)
        sched_yield();
}

// The tests run once more with P2P disabled.
bool reaches_nobody() {
    return getenv("MOONCAKE_EP_DISABLE_P2P") != nullptr;
}
constexpr const char *kWhyReachesNobody = "no memory is reached in this run";

TEST_F(Processes, CarryTokensThereAndBack) {
    for (const int rank_count : {2, 3})
        for (const int thread_count : {1, 2})
            run(rank_count, [=](int rank, const Group &group) {
                mep_buffer_config_t config = buffer_config(rank_count);
                config.cpu_thread_count = thread_count;
                const Buffer buffer = make_buffer(group, config);
                for (uint64_t seed = 1; seed <= 30; ++seed)
                    expect_round(buffer, Plan::of(config, rank_count, seed), rank);
            });
}

// A machine of its own, whose /dev/shm is small.
TEST_F(Processes, AFullSharedMemoryFailsAllAndLeavesTheRestAsItWas) {
    if (reaches_nobody()) GTEST_SKIP() << kWhyReachesNobody;
    run_forked(1, kAlarmSeconds, [this](int) {
        if (unshare(CLONE_NEWNS) != 0 ||
            mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
            mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=1m") != 0)
            skip_rank(std::string("no /dev/shm of its own: ") + std::strerror(errno));
        run(2, [](int rank, const Group &group) {
            const mep_buffer_config_t small = buffer_config(2);
            const Buffer first = make_buffer(group, small);
            expect_round(first, Plan::of(small, 2, 1), rank);
            mep_buffer_config_t large = small;
            large.token_count_max = 4000;
            for (int i = 0; i < 3; ++i) {  // nothing of it stays behind and takes its room
                mep_buffer_t *none = nullptr;
                EXPECT_EQ(mep_buffer_create(group.get(), &large, &none), MEP_OUT_OF_MEMORY);
                EXPECT_NE(std::string(mep_last_error()).find("in /dev/shm"), std::string::npos)
                    << mep_last_error();
            }
            const Buffer second = make_buffer(group, small);
            for (const Buffer *buffer : {&first, &second})
                expect_round(*buffer, Plan::of(small, 2, 2), rank);
        });
    });
}

TEST_F(Processes, ReachEachOtherThroughSharedMemory) {
    if (reaches_nobody()) GTEST_SKIP() << kWhyReachesNobody;
    run(2, [](int rank, const Group &group) {
        mep_transport_info_t info{};
        info.struct_size = sizeof info;
        EXPECT_EQ(mep_group_query_transport(group.get(), 1 - rank, &info), MEP_OK);
        EXPECT_EQ(info.kind, MEP_TRANSPORT_SHM);
        EXPECT_STREQ(info.name, "shm");
    });
}

// No file may grow in one of them, and so no shared memory. The others still share theirs.
TEST_F(Processes, GoAnotherWayToARankThatCannotShareItsMemory) {
    if (reaches_nobody()) GTEST_SKIP() << kWhyReachesNobody;
    expect_warnings();
    fork_ranks(3, [](const mep_group_config_t &config) {
        rlimit before{};
        getrlimit(RLIMIT_FSIZE, &before);
        if (config.rank == 1) {
            signal(SIGXFSZ, SIG_IGN);
            const rlimit none{0, before.rlim_max};
            setrlimit(RLIMIT_FSIZE, &none);
        }
        const Group group = make_group(config);
        for (int peer = 0; peer < 3; ++peer) {
            if (peer == config.rank) continue;
            mep_transport_info_t info{};
            info.struct_size = sizeof info;
            EXPECT_EQ(mep_group_query_transport(group.get(), peer, &info), MEP_OK);
            const bool apart = peer == 1 || config.rank == 1;
            EXPECT_EQ(info.kind, apart ? MEP_TRANSPORT_COLLECTIVE : MEP_TRANSPORT_SHM);
            if (apart) {
                EXPECT_STREQ(info.reason, "by TCP: rank 1 cannot share its memory");
            }
        }
        const mep_buffer_config_t shape = buffer_config(3);
        const Buffer buffer = make_buffer(group, shape);
        for (uint64_t seed = 1; seed <= 10; ++seed)
            expect_round(buffer, Plan::of(shape, 3, seed), config.rank);
        setrlimit(RLIMIT_FSIZE, &before);
    });
}

TEST_F(Processes, FailTogetherAndStartAgain) {
    run(3, [](int rank, const Group &group) {
        const mep_buffer_config_t good = buffer_config(3);
        mep_buffer_config_t config = good;
        if (rank == 1) config.topk_max = 0;
        mep_buffer_t *buffer = nullptr;
        EXPECT_EQ(mep_buffer_create(group.get(), &config, &buffer), MEP_INVALID_ARGUMENT);
        EXPECT_EQ(buffer, nullptr);
        expect_round(make_buffer(group, good), Plan::of(good, 3, 5), rank);
    });
}

TEST_F(Processes, GoOnWithoutARankThatWasKilled) {
    expect_warnings();
    const Shared<std::atomic<int>> sent(0);
    run(3,
        [&](int rank, const Group &group) {
            const mep_buffer_config_t config = buffer_config(3);
            const Buffer buffer = make_buffer(group, config);
            expect_round(buffer, Plan::of(config, 3, 10), rank);
            if (rank == 2) raise(SIGKILL);
            const Plan plan = Plan::of(config, 3, 11, {2});
            const Handle handle = make_handle(buffer);
            Share share(plan, rank);
            mep_dispatch_args_t args = share.dispatch_args(MEP_PHASE_SEND);
            args.timeout_us = 50'000;
            EXPECT_EQ(mep_dispatch(buffer.get(), handle.get(), &args), MEP_OK);
            ++*sent;
            await(*sent, 2);
            args.phases = MEP_PHASE_RECEIVE;
            EXPECT_EQ(mep_dispatch(buffer.get(), handle.get(), &args), MEP_PEER_FAILED);
            EXPECT_TRUE(share.dispatched());
            EXPECT_EQ(share.combine(buffer, handle), MEP_OK) << mep_last_error();
            EXPECT_TRUE(share.combined());
            expect_round(buffer, Plan::of(config, 3, 12, {2}), rank);
        },
        {2});
}

TEST_F(Processes, EndWheneverARankIsKilled) {
    expect_warnings();
    for (int victims_round = 1; victims_round <= 40; victims_round += 13) {
        const Shared<std::atomic<int>> victim(0);
        run(3,
            [&](int rank, const Group &group) {
                const mep_buffer_config_t config = buffer_config(3);
                const Buffer buffer = make_buffer(group, config);
                if (rank == 2) *victim = getpid();
                bool failed = false;
                for (int round = 0; !failed; ++round) {
                    // The victim is killed wherever it is when rank 0 comes to this round.
                    if (rank == 0 && round == victims_round) kill(*victim, SIGKILL);
                    const Plan plan = Plan::of(config, 3, round);
                    const Handle handle = make_handle(buffer);
                    Share share(plan, rank);
                    mep_dispatch_args_t dispatch = share.dispatch_args();
                    mep_combine_args_t combine = share.combine_args();
                    dispatch.timeout_us = combine.timeout_us = 100'000;
                    for (const mep_status_t status :
                         {mep_dispatch(buffer.get(), handle.get(), &dispatch),
                          mep_combine(buffer.get(), handle.get(), &combine)}) {
                        EXPECT_TRUE(status == MEP_OK || status == MEP_PEER_FAILED)
                            << mep_last_error();
                        failed = failed || status != MEP_OK;
                    }
                }
                // A slow machine may have made them miss each other before.
                if (rank == 0) kill(*victim, SIGKILL);
                while (rank == 2)
                    pause();
            },
            {2});
    }
}

}  // namespace
}  // namespace ep::test
