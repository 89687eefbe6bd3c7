// Processes that a test, which is no rank itself, starts, stops and kills by real signals. They are
// forked before anything here has asked a GPU's driver.
#pragma once

#include "support/forked.h"

#include <csignal>
#include <functional>
#include <map>

namespace ep::test {

class Actors {
  public:
    explicit Actors(unsigned seconds_max) : seconds_max_(seconds_max) {}
    Actors(const Actors &) = delete;
    Actors &operator=(const Actors &) = delete;
    ~Actors() {
        for (const auto &[pid, body] : alive_)
            kill(pid, SIGKILL);
        for (const auto &[pid, body] : alive_)
            waitpid(pid, nullptr, 0);
    }

    pid_t start(const std::function<void()> &body) {
        std::fflush(nullptr);  // or the child would print it again
        const pid_t child = fork();
        if (child != 0) {
            alive_[child] = true;
            return child;
        }
        alive_.clear();
        alarm(seconds_max_);
        body();
        std::fflush(nullptr);
        _exit(::testing::Test::HasFailure() ? 1 : 0);
    }

    // body(number) in a process each.
    std::vector<pid_t> start_ranks(int count, const std::function<void(int)> &body) {
        std::vector<pid_t> ranks;
        for (int number = 0; number < count; ++number)
            ranks.push_back(start([&body, number] { body(number); }));
        return ranks;
    }
    void expect_all_end(const std::vector<pid_t> &pids) {
        for (const pid_t pid : pids)
            expect_end(pid);
    }

    static constexpr int kAnyEnd = -1;

    // Waits for one to end: by itself and well, or by `signal`.
    void expect_end(pid_t pid, int signal = 0) {
        int status = 0;
        EXPECT_EQ(waitpid(pid, &status, 0), pid);
        alive_.erase(pid);
        skipped_ = skipped_ || (WIFEXITED(status) && WEXITSTATUS(status) == kSkipped);
        if (skipped_ || signal == kAnyEnd) return;
        EXPECT_EQ(WIFSIGNALED(status) ? WTERMSIG(status) : 0, signal) << "process " << pid;
        EXPECT_TRUE(signal != 0 || status == 0) << "process " << pid << " has failed";
    }

    // Did one of them find that it cannot run here?
    bool skipped() const { return skipped_; }

  private:
    const unsigned seconds_max_;
    std::map<pid_t, bool> alive_;
    bool skipped_ = false;
};

// Does a process that does this end well? False if it finds that it cannot run here.
inline bool can_run(unsigned seconds_max, const std::function<void()> &body) {
    Actors probe(seconds_max);
    probe.expect_end(probe.start(body));
    return !probe.skipped();
}

// Where they meet, in memory that they share.
class Stage {
  public:
    static constexpr int kMarks = 64, kIds = 64;

    void reach(int mark) { ++marks_[mark]; }
    int count(int mark) const { return marks_[mark]; }
    void await(int mark, int count) const {
        while (marks_[mark] < count)
            sched_yield();
    }
    // All of `count` come here.
    void meet(int mark, int count) {
        reach(mark);
        await(mark, count);
    }
    const mep_unique_id_t &id(int index, bool makes) { return ids_[index].of(makes ? 0 : 1); }

  private:
    std::atomic<int> marks_[kMarks] = {};
    IdOfGroup ids_[kIds];
};

}  // namespace ep::test
