// Turns among processes: those that wait, and those that end while they have one.
#include "base/host_turn.h"

#include <chrono>
#include <csignal>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

namespace ep {
namespace {

constexpr int64_t kShortUs = 100'000, kPlentyUs = 20'000'000;

TEST(HostTurn, ComesToOneAtATime) {
    const HostTurn mine{Deadline(kPlentyUs)};
    ASSERT_TRUE(mine.has_come());
    const auto start = Deadline::Clock::now();
    const HostTurn other{Deadline(kShortUs)};  // this process has it, but another place
    EXPECT_FALSE(other.has_come());
    EXPECT_GE(Deadline::Clock::now() - start, std::chrono::microseconds(kShortUs));
}

TEST(HostTurn, ComesWhenTheOneBeforeIsOver) {
    std::thread other;
    {
        const HostTurn mine{Deadline(kPlentyUs)};
        ASSERT_TRUE(mine.has_come());
        other = std::thread([] { EXPECT_TRUE(HostTurn(Deadline(kPlentyUs)).has_come()); });
        std::this_thread::sleep_for(std::chrono::microseconds(kShortUs));
    }
    other.join();
}

TEST(HostTurn, EndsWithTheProcessThatHasIt) {
    int ready[2];
    ASSERT_EQ(pipe(ready), 0);
    const pid_t child = fork();
    if (child == 0) {
        const HostTurn turn{Deadline(kPlentyUs)};
        const char come = turn.has_come() ? 1 : 0;
        if (write(ready[1], &come, 1) == 1) pause();
        _exit(1);
    }
    char come = 0;
    ASSERT_EQ(read(ready[0], &come, 1), 1);
    EXPECT_EQ(come, 1);
    EXPECT_FALSE(HostTurn(Deadline(kShortUs)).has_come());
    kill(child, SIGKILL);
    EXPECT_TRUE(HostTurn(Deadline(kPlentyUs)).has_come());
    waitpid(child, nullptr, 0);
    close(ready[0]);
    close(ready[1]);
}

}  // namespace
}  // namespace ep
