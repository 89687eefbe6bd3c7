// A fixture: after each test the process has the descriptors, threads and shared memory that it had
// before, and nobody has logged a warning that the test did not expect.
#pragma once

#include "mooncake_ep.h"

#include <chrono>
#include <cstring>
#include <dirent.h>
#include <functional>
#include <gtest/gtest.h>
#include <mutex>
#include <sched.h>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace ep::test {

inline std::set<std::string> entries_of(const char *folder, const char *prefix) {
    std::set<std::string> entries;
    DIR *directory = opendir(folder);
    if (directory == nullptr) return entries;
    while (const dirent *entry = readdir(directory))
        if (std::strncmp(entry->d_name, prefix, std::strlen(prefix)) == 0)
            entries.insert(entry->d_name);
    closedir(directory);
    return entries;
}

class Tidy : public ::testing::Test {
  protected:
    void SetUp() override {
        // A sanitizer starts a thread of its own with the first that the program starts.
        std::thread([] {}).join();
        ask_drivers();
        mep_log_set_callback(&Tidy::keep_line, this, MEP_LOG_WARNING);
        descriptors_ = entries_of("/proc/self/fd", "").size();
        threads_ = entries_of("/proc/self/task", "").size();
        shared_ = shared_memory();
    }

    void TearDown() override {
        // Threads leave /proc a little after they were joined, and other programs may be at work in
        // /dev/shm for a moment.
        EXPECT_TRUE(soon([this] { return entries_of("/proc/self/task", "").size() <= threads_; }))
            << "threads are left";
        EXPECT_EQ(entries_of("/proc/self/fd", "").size(), descriptors_) << "descriptors are left";
        const std::set<std::string> now = shared_memory();
        EXPECT_TRUE(soon([&] {
            for (const std::string &name : shared_memory())
                if (now.count(name) > shared_.count(name)) return false;
            return true;
        })) << "shared memory is left";
        mep_log_set_callback(nullptr, nullptr, MEP_LOG_WARNING);
        for (const std::string &line : lines_)
            EXPECT_TRUE(expects_warnings_) << "logged: " << line;
    }

    void expect_warnings() { expects_warnings_ = true; }

    // A GPU's driver keeps descriptors and threads from the first time that it is asked.
    virtual void ask_drivers() {
        mep_backend_info_t info{};
        info.struct_size = sizeof info;
        mep_backend_query(MEP_BACKEND_CUDA, &info);
    }

  private:
    static void keep_line(void *context, int32_t, const char *message) {
        Tidy &self = *static_cast<Tidy *>(context);
        const std::lock_guard<std::mutex> lock(self.mutex_);
        self.lines_.emplace_back(message);
    }
    // Windows; the file by which processes take turns (base/host_turn.h) stays for all.
    static std::set<std::string> shared_memory() { return entries_of("/dev/shm", "mooncake_ep-"); }

    static bool soon(const std::function<bool()> &holds) {
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
        while (!holds()) {
            if (std::chrono::steady_clock::now() > deadline) return false;
            sched_yield();
        }
        return true;
    }

    size_t descriptors_ = 0, threads_ = 0;
    std::set<std::string> shared_;
    std::mutex mutex_;
    std::vector<std::string> lines_;
    bool expects_warnings_ = false;
};

}  // namespace ep::test
