#include "backend/shm_names.h"

#include "support/forked.h"

#include <cerrno>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <set>
#include <sys/mman.h>

namespace ep {
namespace {

bool exists(const std::string &name) {
    const int file = shm_open(name.c_str(), O_RDWR, 0);
    if (file >= 0) close(file);
    return file >= 0;
}

void create(const std::string &name) {
    const int file = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
    ASSERT_GE(file, 0) << std::strerror(errno);
    close(file);
}

TEST(ShmNames, AreDifferentAndNotTooLong) {
    std::set<std::string> names;
    for (int i = 0; i < 100; ++i) {
        std::string name;
        ASSERT_EQ(new_shm_name(&name), MEP_OK);
        EXPECT_LT(name.size(), 64U) << name;
        EXPECT_EQ(name.compare(0, 13, "/mooncake_ep-"), 0) << name;
        names.insert(name);
    }
    EXPECT_EQ(names.size(), 100U);
}

TEST(ShmNames, OfTheDeadAreSweptAndOfTheLivingKept) {
    std::string own;
    ASSERT_EQ(new_shm_name(&own), MEP_OK);
    create(own);
    // One more that is not of this form: somebody else's.
    const std::string strange = "/mooncake_ep-strange-" + std::to_string(getpid());
    create(strange);
    struct Text {
        char bytes[64];
    };
    const test::Shared<Text> told;
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
        std::string name;
        if (new_shm_name(&name) == MEP_OK) create(name);
        std::strncpy(told->bytes, name.c_str(), sizeof told->bytes - 1);
        raise(SIGKILL);
    }
    waitpid(child, nullptr, 0);
    const std::string of_the_dead = told->bytes;
    ASSERT_TRUE(exists(of_the_dead));
    sweep_shm_names();
    EXPECT_FALSE(exists(of_the_dead));
    EXPECT_TRUE(exists(own));
    EXPECT_TRUE(exists(strange));
    shm_unlink(own.c_str());
    shm_unlink(strange.c_str());
}

// The number of a process that is gone may be another's by now.
TEST(ShmNames, OfAnEarlierProcessOfThisNumberAreSwept) {
    std::string name;
    ASSERT_EQ(new_shm_name(&name), MEP_OK);
    // ...-PID-START-RANDOM
    size_t at = name.find('-');
    for (int i = 0; i < 2; ++i)
        at = name.find('-', at + 1);
    name[at + 1] = name[at + 1] == '1' ? '2' : '1';
    create(name);
    sweep_shm_names();
    EXPECT_FALSE(exists(name));
    shm_unlink(name.c_str());
}

}  // namespace
}  // namespace ep
