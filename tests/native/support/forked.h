// Ranks as processes, forked before anything here has started a thread or asked a GPU's driver. An
// alarm ends each of them, whatever happens.
#pragma once

#include "mooncake_ep.h"

#include <atomic>
#include <cstdio>
#include <functional>
#include <gtest/gtest.h>
#include <new>
#include <sched.h>
#include <string>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace ep::test {

// An object that all processes forked later share.
template <class T>
class Shared {
  public:
    template <class... Args>
    explicit Shared(Args... args)
        : memory_(
              mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) {
        new (memory_) T(args...);
    }
    ~Shared() { munmap(memory_, sizeof(T)); }
    Shared(const Shared &) = delete;
    Shared &operator=(const Shared &) = delete;
    T &operator*() const { return *static_cast<T *>(memory_); }
    T *operator->() const { return static_cast<T *>(memory_); }

  private:
    void *memory_;
};

// The id of one group, which the process of its rank 0 has to make; for Shared.
class IdOfGroup {
  public:
    // Of a rank's process. Rank 0 makes it when it first asks; the others wait for that, or for
    // their alarm.
    const mep_unique_id_t &of(int rank) {
        if (rank == 0 && !made_) {
            EXPECT_EQ(mep_unique_id_create(nullptr, &id_), MEP_OK) << mep_last_error();
            made_ = true;
        }
        while (!made_)
            sched_yield();
        return id_;
    }

  private:
    mep_unique_id_t id_{};
    std::atomic<bool> made_{false};
};

constexpr int kSkipped = 77;  // exit status of a rank that cannot run here

// Ends the process of a rank that cannot run here.
[[noreturn]] inline void skip_rank(const std::string &reason) {
    std::printf("skipped: %s\n", reason.c_str());
    std::fflush(nullptr);
    _exit(kSkipped);
}

// body(rank) in a process for each rank. The calling test fails if one of them does, and is skipped
// if one had to skip.
inline void run_forked(int rank_count, unsigned seconds_max, const std::function<void(int)> &body) {
    std::fflush(nullptr);  // or each child would print it again
    std::vector<pid_t> children;
    for (int rank = 0; rank < rank_count; ++rank) {
        const pid_t child = fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
            alarm(seconds_max);
            body(rank);
            std::fflush(nullptr);
            _exit(::testing::Test::HasFailure() ? 1 : 0);
        }
        children.push_back(child);
    }
    bool skipped = false;
    for (int rank = 0; rank < rank_count; ++rank) {
        int status = 0;
        EXPECT_EQ(waitpid(children[rank], &status, 0), children[rank]);
        const bool skips = WIFEXITED(status) && WEXITSTATUS(status) == kSkipped;
        skipped = skipped || skips;
        EXPECT_TRUE(skips || status == 0)
            << "rank " << rank << " of " << rank_count << " ended with wait status " << status;
    }
    if (skipped) GTEST_SKIP() << "a rank cannot run here; its reason is above";
}

}  // namespace ep::test
