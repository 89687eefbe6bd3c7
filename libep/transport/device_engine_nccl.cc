#include "base/log.h"
#include "base/status.h"
#include "transport/device_engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
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

// A function that may wait for ever, in a thread that is left behind if it does. It owns all that
// it touches.
class Errand {
  public:
    template <class Function>
    explicit Errand(Function function) {
        std::packaged_task<void()> task(std::move(function));
        done_ = task.get_future();
        thread_ = std::thread(std::move(task));
    }
    Errand(const Errand &) = delete;
    Errand &operator=(const Errand &) = delete;
    ~Errand() {
        if (thread_.joinable()) thread_.detach();
    }
    bool ends_in_time(const Deadline &deadline) {
        if (deadline.never()) done_.wait();
        if (!deadline.never() && done_.wait_until(deadline.end()) != std::future_status::ready)
            return false;
        thread_.join();
        return true;
    }

  private:
    std::future<void> done_;
    std::thread thread_;
};

// Of NCCL's calls that wait for the graphs which have captured exchanges, and perhaps for the other
// ranks of the host.
constexpr int64_t kFarewellUs = 5'000'000;

// The exchanges of one buffer, which are in an order.
struct Channel {
    DeviceMemory watch{nullptr, nullptr}, state{nullptr, nullptr};
    uint64_t seen = 0;  // exchanges begun, at the last look
    Clock::time_point since;

    Watch *on_host() const { return static_cast<Watch *>(watch.get()); }
    WatchState *on_device() const { return static_cast<WatchState *>(state.get()); }
};

// Ends exchanges that last too long, which NCCL itself waits for without end.
class Watchdog {
  public:
    Watchdog(const Nccl &nccl, std::shared_ptr<Device> device, Nccl::Communicator *communicator)
        : nccl_(nccl), device_(std::move(device)), communicator_(communicator) {
        thread_ = std::thread([this] { run(); });
    }
    Watchdog(const Watchdog &) = delete;
    Watchdog &operator=(const Watchdog &) = delete;
    ~Watchdog() { stop(); }

    void stop() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stops_ = true;
        }
        wake_.notify_all();
        if (thread_.joinable()) thread_.join();
    }

    // For who uses the communicator, which may be gone when gave_up().
    std::mutex &mutex() { return mutex_; }
    bool gave_up() const { return gave_up_; }

    Channel *open(std::unique_ptr<Channel> channel) {
        const std::lock_guard<std::mutex> lock(mutex_);
        channels_.push_back(std::move(channel));
        return channels_.back().get();
    }
    void close(const Channel *channel) {
        const std::lock_guard<std::mutex> lock(mutex_);
        channels_.erase(std::find_if(channels_.begin(), channels_.end(),
                                     [channel](const auto &one) { return one.get() == channel; }));
    }

  private:
    void run() {
        constexpr auto kPeriod = std::chrono::milliseconds(5);
        std::unique_lock<std::mutex> lock(mutex_);
        while (!wake_.wait_for(lock, kPeriod, [this] { return stops_; })) {
            const char *reason = nullptr;
            for (size_t i = 0; i < channels_.size() && reason == nullptr; ++i)
                reason = problem_of(channels_[i].get());
            if (reason == nullptr) continue;
            // First the kernels behind exchanges are told, so that nothing is taken for whole.
            for (const auto &channel : channels_)
                __atomic_store_n(&channel->on_host()->failed, uint64_t{1}, __ATOMIC_SEQ_CST);
            gave_up_ = true;
            lock.unlock();  // whoever has a graph that the abort waits for must be able to go on
            give_up(reason);
            return;
        }
    }

    const char *problem_of(Channel *channel) const {
        const uint64_t done = load(channel->on_host()->done);
        const uint64_t begun = load(channel->on_host()->begun);
        if (begun == done || begun != channel->seen) {
            channel->seen = begun;
            channel->since = Clock::now();
            return nullptr;
        }
        int error = Nccl::kSuccess;
        if (nccl_.get_async_error(communicator_, &error) == Nccl::kSuccess &&
            error != Nccl::kSuccess && error != Nccl::kInProgress)
            return nccl_.error_text(error);
        const uint64_t timeout_ns = load(channel->on_host()->timeout_ns);
        const bool late = timeout_ns != Round::kNever &&
                          Clock::now() - channel->since > std::chrono::nanoseconds(timeout_ns);
        return late ? "the deadline has passed" : nullptr;
    }

    void give_up(const char *reason) const {
        Errand abort([device = device_, abort = nccl_.abort, communicator = communicator_] {
            device->enter();
            abort(communicator);
        });
        log(MEP_LOG_WARNING, "%s: an exchange is given up, and all far ranks are masked: %s",
            nccl_.name, reason);
        abort.ends_in_time(Deadline(kFarewellUs));
    }

    const Nccl &nccl_;
    const std::shared_ptr<Device> device_;
    Nccl::Communicator *const communicator_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stops_ = false;
    std::atomic<bool> gave_up_{false};
    std::vector<std::unique_ptr<Channel>> channels_;
    std::thread thread_;  // last: it uses all the others
};

class NcclEngine : public DeviceEngine {
  public:
    NcclEngine(std::shared_ptr<Device> device, const Nccl &nccl, const std::vector<bool> &present)
        : device_(std::move(device)), nccl_(nccl), seats_(present.size(), kNobody) {
        for (size_t rank = 0; rank < present.size(); ++rank)
            if (present[rank]) seats_[rank] = seat_count_++;
    }
    NcclEngine(const NcclEngine &) = delete;
    NcclEngine &operator=(const NcclEngine &) = delete;
    ~NcclEngine() override;

    mep_status_t create(int rank, const std::vector<bool> &far, const AllGather &all_gather,
                        const Deadline &deadline);
    mep_status_t open(void **channel) override;
    void close(void *channel) override { watchdog_->close(static_cast<Channel *>(channel)); }
    mep_status_t allocate(size_t bytes, std::shared_ptr<char> *memory) override;
    mep_status_t exchange(void *channel, const Trip &trip, const std::vector<Exchange> &exchanges,
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
        std::atomic<bool> abandoned{false};
        Nccl::Communicator *communicator = nullptr;
        int result = Nccl::kSuccess;
        mep_status_t status = MEP_OK;
    };
    mep_status_t meet(mep_status_t mine, int rank, int rank_count, const AllGather &all_gather,
                      Nccl::UniqueId *id);
    mep_status_t set_up(int rank, const std::vector<bool> &far, const Nccl::UniqueId &id,
                        DeviceMemory memory, const Deadline &deadline);
    mep_status_t agree_on_memory(mep_status_t mine, int rank_count, const AllGather &all_gather);
    mep_status_t allocate_own(size_t bytes, std::shared_ptr<char> *memory);

    const std::shared_ptr<Device> device_;
    const Nccl &nccl_;
    static constexpr int kNobody = -1;
    std::vector<int> seats_;  // [rank] its place in the communicator
    int seat_count_ = 0;
    Nccl::Communicator *communicator_ = nullptr;
    bool has_own_memory_ = false;  // NCCL's, on all ranks or on none
    std::unique_ptr<Watchdog> watchdog_;
    bool told_ = false;
};

NcclEngine::~NcclEngine() {
    if (watchdog_ == nullptr) return;
    watchdog_->stop();  // and no more is given up
    if (watchdog_->gave_up()) return;
    Errand destroy([device = device_, destroy = nccl_.destroy, communicator = communicator_] {
        device->enter();
        destroy(communicator);
    });
    if (!destroy.ends_in_time(Deadline(kFarewellUs)))
        log(MEP_LOG_WARNING,
            "%s: the communicator is left behind: graphs that captured calls of this group are "
            "still there, or other ranks of this host stay in the group",
            nccl_.name);
}

int queue_all(const Nccl &nccl, Nccl::Communicator *communicator, const std::vector<int> &seats,
              const std::vector<Exchange> &exchanges, void *stream) {
    int result = nccl.group_start();
    for (size_t peer = 0; peer < exchanges.size(); ++peer) {
        const Exchange &one = exchanges[peer];
        const int number = seats[peer];
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

// The id, if all ranks are ready; otherwise all fail.
mep_status_t NcclEngine::meet(mep_status_t mine, int rank, int rank_count,
                              const AllGather &all_gather, Nccl::UniqueId *id) {
    struct Word {
        Nccl::UniqueId id;
        int32_t status;
    } word{};
    word.status = mine;
    const auto first =
        static_cast<int>(std::find(seats_.begin(), seats_.end(), 0) - seats_.begin());
    if (mine == MEP_OK && rank == first)
        word.status = nccl_status(nccl_, nccl_.get_unique_id(&word.id), "making a unique id");
    std::vector<Word> all(rank_count);
    const mep_status_t gathered = all_gather(&word, all.data(), sizeof word);
    if (word.status != MEP_OK) return fail(word.status, "%s: this rank is not ready", nccl_.name);
    EP_TRY(gathered);
    *id = all[first].id;
    for (int peer = 0; peer < rank_count; ++peer)
        if (all[peer].status != MEP_OK)
            return fail(all[peer].status, "%s: rank %d is not ready", nccl_.name, peer);
    return MEP_OK;
}

// So many bytes are exchanged with each peer at first: that makes connections, which a graph could
// not capture, and for which a dead peer would be waited for on the host.
constexpr size_t kTrialBytes = 128;

std::vector<Exchange> trials(const std::vector<bool> &far, char *memory) {
    std::vector<Exchange> exchanges(far.size());
    for (size_t peer = 0; peer < far.size(); ++peer, memory += 2 * kTrialBytes)
        if (far[peer]) exchanges[peer] = {memory, memory + kTrialBytes, kTrialBytes};
    return exchanges;
}

mep_status_t NcclEngine::set_up(int rank, const std::vector<bool> &far, const Nccl::UniqueId &id,
                                DeviceMemory memory, const Deadline &deadline) {
    const auto setup = std::make_shared<Setup>();
    const auto kept = std::make_shared<DeviceMemory>(std::move(memory));
    Errand errand([setup, kept, far, id, rank, seats = seats_, count = seat_count_,
                   device = device_, &nccl = nccl_] {
        device->enter();
        setup->result = nccl.init_rank(&setup->communicator, count, id, seats[rank]);
        if (setup->result != Nccl::kSuccess) return;
        if (setup->abandoned) {
            nccl.abort(setup->communicator);
            return;
        }
        setup->result =
            queue_all(nccl, setup->communicator, seats,
                      trials(far, static_cast<char *>(kept->get())), device->set_up_stream());
        if (setup->result == Nccl::kSuccess) setup->status = device->wait(device->set_up_stream());
    });
    if (!errand.ends_in_time(deadline)) {
        setup->abandoned = true;
        return fail(MEP_TIMEOUT, "%s: not all ranks came in time", nccl_.name);
    }
    EP_TRY(nccl_status(nccl_, setup->result, "making a communicator"));
    if (setup->status != MEP_OK)
        return fail(setup->status, "%s: trying the communicator failed", nccl_.name);
    communicator_ = setup->communicator;
    return MEP_OK;
}

mep_status_t NcclEngine::create(int rank, const std::vector<bool> &far, const AllGather &all_gather,
                                const Deadline &deadline) {
    const int rank_count = static_cast<int>(far.size());
    DeviceMemory memory(nullptr, nullptr);
    mep_status_t status = device_->allocate(2 * kTrialBytes * far.size(), &memory);
    Nccl::UniqueId id;
    EP_TRY(meet(status, rank, rank_count, all_gather, &id));
    status = set_up(rank, far, id, std::move(memory), deadline);
    if (status == MEP_OK) watchdog_ = std::make_unique<Watchdog>(nccl_, device_, communicator_);
    return agree_on_memory(status, rank_count, all_gather);
}

// Peers store straight into memory that NCCL has allocated and knows of, if all ranks have some.
mep_status_t NcclEngine::agree_on_memory(mep_status_t mine, int rank_count,
                                         const AllGather &all_gather) {
    enum Word : char { kNone, kOwn, kFailed };
    constexpr size_t kBytes = 4096;
    std::shared_ptr<char> memory;
    const std::string why = last_error();
    const bool own =
        mine == MEP_OK && nccl_.has_own_memory() && allocate_own(kBytes, &memory) == MEP_OK;
    const char word = mine != MEP_OK ? kFailed : own ? kOwn : kNone;
    std::vector<char> all(rank_count);
    const mep_status_t gathered = all_gather(&word, all.data(), sizeof word);
    if (mine != MEP_OK) return fail(mine, "%s", why.c_str());
    EP_TRY(gathered);
    has_own_memory_ = std::count(all.begin(), all.end(), kOwn) == seat_count_;
    const auto failed = std::find(all.begin(), all.end(), kFailed);
    if (failed == all.end()) return MEP_OK;
    return fail(MEP_SYSTEM_ERROR, "%s: rank %d has no communicator", nccl_.name,
                static_cast<int>(failed - all.begin()));
}

mep_status_t NcclEngine::allocate_own(size_t bytes, std::shared_ptr<char> *memory) {
    const Entered entered(device_.get());
    const std::lock_guard<std::mutex> lock(watchdog_->mutex());
    if (watchdog_->gave_up()) return fail(MEP_PEER_FAILED, "%s has given up", nccl_.name);
    void *data = nullptr, *registration = nullptr;
    if (nccl_.allocate(&data, bytes) != Nccl::kSuccess)
        return fail(MEP_OUT_OF_MEMORY, "%s: no memory for %zu bytes", nccl_.name, bytes);
    const int enlisted = nccl_.enlist(communicator_, data, bytes, &registration);
    *memory = std::shared_ptr<char>(static_cast<char *>(data), [this, registration](char *given) {
        const Entered scope(device_.get());
        const std::lock_guard<std::mutex> hold(watchdog_->mutex());
        if (registration != nullptr && !watchdog_->gave_up())
            nccl_.strike_off(communicator_, registration);
        nccl_.release(given);
    });
    EP_TRY(nccl_status(nccl_, enlisted, "registering memory"));
    return device_->clear(data, bytes);
}

mep_status_t NcclEngine::allocate(size_t bytes, std::shared_ptr<char> *memory) {
    return has_own_memory_ ? allocate_own(bytes, memory)
                           : allocate_boxes(device_.get(), bytes, memory);
}

mep_status_t NcclEngine::open(void **channel) {
    auto created = std::make_unique<Channel>();
    EP_TRY(device_->allocate_shared(sizeof(Watch), &created->watch));
    EP_TRY(device_->allocate(sizeof(WatchState), &created->state));
    *channel = watchdog_->open(std::move(created));
    return MEP_OK;
}

mep_status_t NcclEngine::exchange(void *channel, const Trip &trip,
                                  const std::vector<Exchange> &exchanges, const Queue &queue) {
    const Channel &own = *static_cast<Channel *>(channel);
    const auto tell = [&](bool ends) {
        const WatchArgs args{trip.round, trip.cargo, own.on_host(), own.on_device(), ends};
        return device_->launch_status(device_->kernels().watch(args, queue));
    };
    const std::lock_guard<std::mutex> lock(watchdog_->mutex());
    if (watchdog_->gave_up()) {  // masks them, also in a mask of the caller
        __atomic_store_n(&own.on_host()->failed, uint64_t{1}, __ATOMIC_SEQ_CST);
        return tell(true);
    }
    EP_TRY(tell(false));
    const mep_status_t queued =
        nccl_status(nccl_, queue_all(nccl_, communicator_, seats_, exchanges, queue.stream),
                    "queueing an exchange");
    const mep_status_t told = tell(true);  // in any case, or the watchdog would bark
    return queued != MEP_OK ? queued : told;
}

}  // namespace

mep_status_t device_engine_by_nccl(const std::shared_ptr<Device> &device, const Nccl &nccl,
                                   int rank, const std::vector<bool> &present,
                                   const std::vector<bool> &far, const AllGather &all_gather,
                                   const Deadline &deadline,
                                   std::unique_ptr<DeviceEngine> *engine) {
    auto created = std::make_unique<NcclEngine>(device, nccl, present);
    EP_TRY(created->create(rank, far, all_gather, deadline));
    *engine = std::move(created);
    return MEP_OK;
}

}  // namespace ep
