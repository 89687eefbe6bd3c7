#include "base/late_frees.h"

#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace ep {
namespace {

thread_local LateFrees *the_call = nullptr;
thread_local bool is_beside = false;

struct UnderWay {
    std::mutex mutex;
    std::condition_variable ended;
    int count = 0;
};

// Never destroyed: a thread leaves it after the last one has been told.
UnderWay &under_way() {
    static UnderWay *const the_one = [] {
        // Before what was there first is taken down, as a device's runtime was.
        std::atexit([] { LateFrees::finish(); });
        return new UnderWay;
    }();
    return *the_one;
}

void free_beside(std::vector<std::function<void()>> frees) {
    UnderWay &here = under_way();
    {
        const std::lock_guard<std::mutex> lock(here.mutex);
        ++here.count;
    }
    const auto work = [&here, frees = std::move(frees)] {
        for (const auto &free : frees)
            free();
        const std::lock_guard<std::mutex> lock(here.mutex);
        --here.count;
        here.ended.notify_all();
    };
    try {
        std::thread([work] {
            is_beside = true;
            work();
        }).detach();
    } catch (const std::system_error &) {  // no more threads
        work();
    }
}

}  // namespace

LateFrees::LateFrees() : outer_(the_call) {
    the_call = this;
}

LateFrees::~LateFrees() {
    the_call = outer_;
    if (!frees_.empty()) free_beside(std::move(frees_));
}

void LateFrees::begin() {
    if (the_call != nullptr) the_call->begun_ = true;
}

void LateFrees::run(std::function<void()> free) {
    if (the_call != nullptr && the_call->begun_)
        the_call->frees_.push_back(std::move(free));
    else
        free();
}

bool LateFrees::beside() {
    return is_beside;
}

bool LateFrees::finish() {
    UnderWay &here = under_way();
    std::unique_lock<std::mutex> lock(here.mutex);
    if (here.count == 0) return false;
    here.ended.wait(lock, [&here] { return here.count == 0; });
    return true;
}

}  // namespace ep
