// A fixed set of threads that run the blocks of one launch after another.
#include "backend/backend.h"
#include "base/status.h"

#include <condition_variable>
#include <mutex>
#include <pthread.h>
#include <system_error>
#include <thread>
#include <vector>

namespace ep {
namespace {

class ThreadPool : public Workers {
  public:
    ThreadPool() = default;
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

    ~ThreadPool() override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        work_.notify_all();
        for (std::thread &thread : threads_)
            thread.join();
    }

    mep_status_t start(int count) {
        try {  // std::thread reports only by exception
            for (int index = 1; index < count; ++index) {
                threads_.emplace_back([this, index] { serve(index); });
                // So that whoever looks at a program's threads knows whose they are.
                pthread_setname_np(threads_.back().native_handle(), "mep_worker");
            }
        } catch (const std::system_error &error) {
            return fail(MEP_SYSTEM_ERROR, "starting thread %zu of %d: %s", threads_.size() + 1,
                        count, error.what());
        }
        return MEP_OK;
    }

    int count() const override { return static_cast<int>(threads_.size()) + 1; }

    void run(Block block, void *context) override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            block_ = block;
            context_ = context;
            busy_ = static_cast<int>(threads_.size());
            ++launch_;
        }
        work_.notify_all();
        block(context, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

  private:
    void serve(int index) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (uint64_t served = 0;; ++served) {
            work_.wait(lock, [&] { return stopping_ || launch_ > served; });
            if (stopping_) return;
            lock.unlock();
            block_(context_, index);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable work_, done_;
    Block block_ = nullptr;
    void *context_ = nullptr;
    uint64_t launch_ = 0;  // launches so far
    int busy_ = 0;         // threads that have not finished the last one
    bool stopping_ = false;
};

}  // namespace

mep_status_t create_workers(int count, std::unique_ptr<Workers> *workers) {
    auto pool = std::make_unique<ThreadPool>();
    EP_TRY(pool->start(count));
    *workers = std::move(pool);
    return MEP_OK;
}

}  // namespace ep
