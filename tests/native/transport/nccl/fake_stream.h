// A stream without a GPU: a thread that does one thing after another.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace ep::test {

class FakeStream {
  public:
    FakeStream() : thread_([this] { run(); }) {}
    FakeStream(const FakeStream &) = delete;
    FakeStream &operator=(const FakeStream &) = delete;
    ~FakeStream() {
        push({});
        thread_.join();
    }

    void push(std::function<void()> work) {
        const std::lock_guard<std::mutex> lock(mutex_);
        works_.push_back(std::move(work));
        changed_.notify_all();
    }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return works_.empty(); });
    }

  private:
    void run() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            changed_.wait(lock, [this] { return !works_.empty(); });
            const std::function<void()> work = works_.front();
            if (!work) return;
            lock.unlock();
            work();
            lock.lock();
            works_.pop_front();
            changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> works_;  // the first is being done
    std::thread thread_;
};

}  // namespace ep::test
