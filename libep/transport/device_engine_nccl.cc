#include "base/log.h"
#include "base/status.h"
#include "transport/device_engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <future>
#include <mutex>
#include <thread>

namespace ep {
namespace {

using Clock = std::chrono::steady_clock;

uint64_t load(const uint64_t &word) {
    return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}

mep_status_t nccl_status(const Nccl &nccl, int result, const char *what) {
    if (result == Nccl::kSuccess) return MEP_OK;
    return fail(MEP_SYSTEM_ERROR, "%s: %s: %s", nccl.name, what, nccl.error_text(result));
}

// Runs a function that may wait for ever, in a thread that is left behind if it does. The function
// owns all that it touches.
template <class Function>
bool ends_in_time(const Deadline &deadline, Function function) {
    std::packaged_task<void()> task(std::move(function));
    std::future<void> done = task.get_future();
    std::thread thread(std::move(task));
    if (deadline.never()) done.wait();
    if (deadline.never() || done.wait_until(deadline.end()) == std::future_status::ready) {
        thread.join();
        return true;
    }
    thread.detach();
    return false;
}

// Ends exchanges that last too long, which NCCL itself waits for without end.
class Watchdog {
  public:
    Watchdog(const Nccl &nccl, Nccl::Communicator *communicator, Watch *watch, Device *device,
             WatchState *state)
        : nccl_(nccl), communicator_(communicator), watch_(watch), device_(device), state_(state) {
        thread_ = std::thread([this] { run(); });
    }
    Watchdog(const Watchdog &) = delete;
    Watchdog &operator=(const Watchdog &) = delete;
    ~Watchdog() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stops_ = true;
        }
        wake_.notify_all();
        thread_.join();
    }

    // For who uses the communicator, which may be gone when this is true.
    std::mutex &mutex() { return mutex_; }
    bool gave_up() const { return gave_up_; }

  private:
    void run() {
        constexpr auto kPeriod = std::chrono::milliseconds(5);
        std::unique_lock<std::mutex> lock(mutex_);
        uint64_t seen = 0;
        Clock::time_point since = Clock::now();
        while (!wake_.wait_for(lock, kPeriod, [this] { return stops_; })) {
            const uint64_t done = load(watch_->done), begun = load(watch_->begun);
            if (begun == done || begun != seen) {
                seen = begun;
                since = Clock::now();
            } else if (const char *reason = problem(since); reason != nullptr) {
                give_up(reason);
                return;
            }
        }
    }

    const char *problem(Clock::time_point since) const {
        int error = Nccl::kSuccess;
        if (nccl_.get_async_error(communicator_, &error) == Nccl::kSuccess &&
            error != Nccl::kSuccess && error != Nccl::kInProgress)
            return nccl_.error_text(error);
        const uint64_t timeout_ns = load(watch_->timeout_ns);
        const bool late = timeout_ns != Round::kNever &&
                          Clock::now() - since > std::chrono::nanoseconds(timeout_ns);
        return late ? "the deadline has passed" : nullptr;
    }

    // First tells the kernel behind the exchange, so that nothing of it is taken for whole.
    void give_up(const char *reason) {
        log(MEP_LOG_WARNING, "%s: an exchange is given up, and all far ranks are masked: %s",
            nccl_.name, reason);
        constexpr uint64_t kFailed = 1;
        device_->write(&state_->failed, &kFailed, sizeof kFailed);
        gave_up_ = true;
        nccl_.abort(communicator_);
    }

    const Nccl &nccl_;
    Nccl::Communicator *const communicator_;
    Watch *const watch_;
    Device *const device_;
    WatchState *const state_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stops_ = false;
    std::atomic<bool> gave_up_{false};
    std::thread thread_;  // last: it uses all the others
};

class NcclEngine : public DeviceEngine {
  public:
    NcclEngine(Device *device, const Nccl &nccl)
        : device_(device),
          nccl_(nccl),
          watch_memory_(nullptr, nullptr),
          state_memory_(nullptr, nullptr) {}
    NcclEngine(const NcclEngine &) = delete;
    NcclEngine &operator=(const NcclEngine &) = delete;
    ~NcclEngine() override {
        if (watchdog_ == nullptr) return;
        const bool gone = watchdog_->gave_up();
        watchdog_.reset();
        if (gone) return;
        // It waits for the graphs that have captured exchanges to be destroyed.
        constexpr int64_t kWaitUs = 5'000'000;
        if (!ends_in_time(
                Deadline(kWaitUs),
                [destroy = nccl_.destroy, communicator = communicator_] { destroy(communicator); }))
            log(MEP_LOG_WARNING,
                "%s: graphs that captured calls of this group are still there; destroy them first",
                nccl_.name);
    }

    mep_status_t create(int rank, const std::vector<bool> &far, const AllGather &all_gather,
                        const Deadline &deadline);
    mep_status_t allocate(size_t bytes, std::shared_ptr<char> *memory) override;
    mep_status_t exchange(const Round &round, const std::vector<Exchange> &exchanges,
                          const Queue &queue) override;
    const char *no_capture_reason() const override { return ""; }
    std::string take_failure() override {
        if (watchdog_ == nullptr || !watchdog_->gave_up() || told_) return "";
        told_ = true;
        return "an exchange by " + std::string(nccl_.name) +
               " was given up, as a rank missed the deadline or went away, and with it each rank "
               "whose memory is not reached";
    }

  private:
    struct Setup {
        Nccl::Communicator *communicator = nullptr;
        int result = Nccl::kSuccess;
        mep_status_t status = MEP_OK;
    };
    mep_status_t meet(int rank, int rank_count, const AllGather &all_gather, Nccl::UniqueId *id);
    mep_status_t try_own_memory(int rank_count, const AllGather &all_gather);
    mep_status_t allocate_own(size_t bytes, std::shared_ptr<char> *memory);
    Watch *watch() const { return static_cast<Watch *>(watch_memory_.get()); }
    WatchState *state() const { return static_cast<WatchState *>(state_memory_.get()); }

    Device *const device_;
    const Nccl &nccl_;
    Nccl::Communicator *communicator_ = nullptr;
    DeviceMemory watch_memory_, state_memory_;
    bool has_own_memory_ = false;  // NCCL's, on all ranks or on none
    std::unique_ptr<Watchdog> watchdog_;
    bool told_ = false;
};

int queue_all(const Nccl &nccl, Nccl::Communicator *communicator,
              const std::vector<Exchange> &exchanges, void *stream) {
    int result = nccl.group_start();
    for (size_t peer = 0; peer < exchanges.size(); ++peer) {
        const Exchange &one = exchanges[peer];
        const int number = static_cast<int>(peer);
        if (one.bytes == 0) continue;
        if (result == Nccl::kSuccess)
            result = nccl.send(one.send, one.bytes, Nccl::kBytes, number, communicator, stream);
        if (result == Nccl::kSuccess)
            result =
                nccl.receive(one.receive, one.bytes, Nccl::kBytes, number, communicator, stream);
    }
    const int ended = nccl.group_end();
    return result == Nccl::kSuccess ? ended : result;
}

mep_status_t NcclEngine::meet(int rank, int rank_count, const AllGather &all_gather,
                              Nccl::UniqueId *id) {
    struct Word {
        Nccl::UniqueId id;
        int32_t result;
    } mine{};
    if (rank == 0) mine.result = nccl_.get_unique_id(&mine.id);
    std::vector<Word> all(rank_count);
    EP_TRY(all_gather(&mine, all.data(), sizeof mine));
    *id = all[0].id;
    return nccl_status(nccl_, all[0].result, "making a unique id on rank 0");
}

// Also exchanges a few bytes with each peer: connections are made at the first, which a graph
// could not capture, and for which a dead peer would be waited for on the host.
mep_status_t NcclEngine::create(int rank, const std::vector<bool> &far, const AllGather &all_gather,
                                const Deadline &deadline) {
    const int rank_count = static_cast<int>(far.size());
    constexpr size_t kBytes = 128;
    Nccl::UniqueId id;
    EP_TRY(meet(rank, rank_count, all_gather, &id));
    DeviceMemory trial(nullptr, nullptr);
    EP_TRY(device_->allocate(2 * kBytes * rank_count, &trial));
    EP_TRY(device_->allocate_shared(sizeof(Watch), &watch_memory_));
    EP_TRY(device_->allocate(sizeof(WatchState), &state_memory_));
    std::vector<Exchange> exchanges(rank_count);
    for (int peer = 0; peer < rank_count; ++peer) {
        char *memory = static_cast<char *>(trial.get()) + 2 * kBytes * peer;
        if (far[peer]) exchanges[peer] = {memory, memory + kBytes, kBytes};
    }
    const auto setup = std::make_shared<Setup>();
    const bool in_time = ends_in_time(deadline, [setup, exchanges, rank_count, id, rank,
                                                 device = device_, &nccl = nccl_] {
        const Entered entered(device);
        setup->result = nccl.init_rank(&setup->communicator, rank_count, id, rank);
        if (setup->result != Nccl::kSuccess) return;
        setup->result = queue_all(nccl, setup->communicator, exchanges, device->set_up_stream());
        if (setup->result == Nccl::kSuccess) setup->status = device->wait(device->set_up_stream());
    });
    if (!in_time) {
        static_cast<void>(trial.release());  // it may still be written to
        return fail(MEP_TIMEOUT, "%s: not all ranks came in time", nccl_.name);
    }
    EP_TRY(nccl_status(nccl_, setup->result, "making a communicator"));
    if (setup->status != MEP_OK)
        return fail(setup->status, "%s: trying the communicator failed", nccl_.name);
    communicator_ = setup->communicator;
    watchdog_ = std::make_unique<Watchdog>(nccl_, communicator_, watch(), device_, state());
    return try_own_memory(rank_count, all_gather);
}

// Peers store straight into memory that NCCL has allocated and knows of, if all ranks have some.
mep_status_t NcclEngine::try_own_memory(int rank_count, const AllGather &all_gather) {
    constexpr size_t kBytes = 4096;
    std::shared_ptr<char> memory;
    const char mine = nccl_.has_own_memory() && allocate_own(kBytes, &memory) == MEP_OK;
    std::vector<char> all(rank_count);
    EP_TRY(all_gather(&mine, all.data(), sizeof mine));
    has_own_memory_ = std::count(all.begin(), all.end(), 1) == rank_count;
    return MEP_OK;
}

mep_status_t NcclEngine::allocate_own(size_t bytes, std::shared_ptr<char> *memory) {
    const Entered entered(device_);
    const std::lock_guard<std::mutex> lock(watchdog_->mutex());
    if (watchdog_->gave_up()) return fail(MEP_PEER_FAILED, "%s has given up", nccl_.name);
    void *data = nullptr, *registration = nullptr;
    if (nccl_.allocate(&data, bytes) != Nccl::kSuccess)
        return fail(MEP_OUT_OF_MEMORY, "%s: no memory for %zu bytes", nccl_.name, bytes);
    const int enlisted = nccl_.enlist(communicator_, data, bytes, &registration);
    *memory = std::shared_ptr<char>(static_cast<char *>(data), [this, registration](char *given) {
        const Entered scope(device_);
        const std::lock_guard<std::mutex> hold(watchdog_->mutex());
        if (registration != nullptr && !watchdog_->gave_up())
            nccl_.strike_off(communicator_, registration);
        nccl_.release(given);
    });
    EP_TRY(nccl_status(nccl_, enlisted, "registering memory"));
    return device_->clear(data, bytes);
}

mep_status_t NcclEngine::allocate(size_t bytes, std::shared_ptr<char> *memory) {
    return has_own_memory_ ? allocate_own(bytes, memory) : allocate_boxes(device_, bytes, memory);
}

mep_status_t NcclEngine::exchange(const Round &round, const std::vector<Exchange> &exchanges,
                                  const Queue &queue) {
    const auto tell = [&](bool ends) {
        const WatchArgs args{round, watch(), state(), ends};
        return device_->launch_status(device_->kernels().watch(args, queue));
    };
    const std::lock_guard<std::mutex> lock(watchdog_->mutex());
    if (watchdog_->gave_up()) return tell(true);  // masks them, also in a mask of the caller
    EP_TRY(tell(false));
    EP_TRY(nccl_status(nccl_, queue_all(nccl_, communicator_, exchanges, queue.stream),
                       "queueing an exchange"));
    return tell(true);
}

}  // namespace

mep_status_t device_engine_by_nccl(Device *device, const Nccl &nccl, int rank,
                                   const std::vector<bool> &far, const AllGather &all_gather,
                                   const Deadline &deadline,
                                   std::unique_ptr<DeviceEngine> *engine) {
    auto created = std::make_unique<NcclEngine>(device, nccl);
    EP_TRY(created->create(rank, far, all_gather, deadline));
    *engine = std::move(created);
    return MEP_OK;
}

}  // namespace ep
