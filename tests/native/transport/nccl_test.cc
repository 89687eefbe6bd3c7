// The engine of device memory by NCCL, over a fake one and streams that are threads.
#include "backend/backend.h"
#include "support/forwarding_device.h"
#include "transport/device_engine.h"
#include "transport/nccl/fake_stream.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <thread>

namespace ep::test {
namespace {

using Clock = std::chrono::steady_clock;

// The CPU's device, whose kernels run when their turn comes on a stream.
class StreamedDevice : public ForwardingDevice {
  public:
    StreamedDevice() : kernels_(device_->kernels()) {
        kernels_.watch = [](const WatchArgs &args, const Queue &queue) {
            static_cast<FakeStream *>(queue.stream)->push([args] {
                std::shared_ptr<Device> cpu;
                std::unique_ptr<Workers> workers;
                ASSERT_EQ(kCpuBackend.create_device(0, &cpu), MEP_OK);
                ASSERT_EQ(create_workers(1, &workers), MEP_OK);
                Queue here;
                here.workers = workers.get();
                cpu->kernels().watch(args, here);
            });
            return 0;
        };
    }
    const Kernels &kernels() const override { return kernels_; }
    mep_status_t wait(void *stream) override {
        static_cast<FakeStream *>(stream)->wait();
        return MEP_OK;
    }
    void *set_up_stream() const override { return &set_up_; }
    bool is_synchronous() const override { return false; }

  private:
    Kernels kernels_;
    mutable FakeStream set_up_;
};

constexpr int kNobody = -1;

// How ranks that are threads gather, all but one that may be absent.
class Meeting {
  public:
    Meeting(int ranks, int absent) : present_(ranks, 1) {
        if (absent != kNobody) present_[absent] = 0;
        EXPECT_EQ(mep_world_create(absent == kNobody ? ranks : ranks - 1, &world_), MEP_OK);
    }
    Meeting(const Meeting &) = delete;
    Meeting &operator=(const Meeting &) = delete;
    ~Meeting() { mep_world_destroy(world_); }

    mep_group_t *join(int rank) {
        mep_group_config_t config{};
        config.struct_size = sizeof config;
        config.rank = rank;
        config.rank_count = static_cast<int>(present_.size());
        config.active_ranks = present_.data();
        config.world = world_;
        mep_group_t *group = nullptr;
        EXPECT_EQ(mep_group_create(&config, &group), MEP_OK) << mep_last_error();
        return group;
    }

    bool has(int rank) const { return present_[rank] != 0; }

  private:
    std::vector<int32_t> present_;
    mep_world_t *world_ = nullptr;
};

constexpr size_t kBytes = 1000;
constexpr int64_t kTimeoutUs = 300'000;

// One rank: a device with a stream, an engine, boxes for each peer, and what a round knows.
class Member {
  public:
    Member(Meeting *meeting, const Nccl &nccl, int rank, int ranks, int64_t timeout_us)
        : rank_(rank), ranks_(ranks), active_(ranks, 1), group_(meeting->join(rank)) {
        std::vector<bool> present(ranks);
        for (int peer = 0; peer < ranks; ++peer)
            present[peer] = meeting->has(peer);
        far_ = present;
        far_[rank] = false;
        const auto gather = [this](const void *send, void *receive, size_t bytes) {
            return mep_group_all_gather(group_, send, receive, bytes);
        };
        status = device_engine_by_nccl(device_, nccl, rank, present, far_, gather,
                                       Deadline(timeout_us), &engine_);
        if (status != MEP_OK) return;
        EXPECT_EQ(engine_->open(&channel_), MEP_OK);
        EXPECT_EQ(engine_->allocate(kBytes * ranks, &outbox_), MEP_OK);
        EXPECT_EQ(engine_->allocate(kBytes * ranks, &inbox_), MEP_OK);
        for (int peer = 0; peer < ranks; ++peer)
            box_of_.push_back(far_[peer] ? peer : Far::kNear);
    }
    Member(const Member &) = delete;
    Member &operator=(const Member &) = delete;
    ~Member() {
        stream_.wait();
        outbox_.reset();
        inbox_.reset();
        if (engine_ != nullptr) engine_->close(channel_);
        engine_.reset();
        mep_group_destroy(group_);
    }

    static char content(int from, int to, int number) {
        return char(1 + from * 16 + to * 4 + number);
    }

    void queue(int number) {
        // As kernels before it on the stream would.
        stream_.push([this, number] {
            for (int peer = 0; peer < ranks_; ++peer)
                std::memset(outbox_.get() + kBytes * peer, content(rank_, peer, number), kBytes);
        });
        Round round{};
        round.layout.shape.rank_count = ranks_;
        round.rank = rank_;
        round.active = active_.data();
        round.state = &state_;
        round.routing.state = &sent_;
        round.timeout_ns = uint64_t(kTimeoutUs) * 1000;
        round.far.box_of = box_of_.data();
        Queue queue;
        queue.stream = &stream_;
        std::vector<Exchange> exchanges(ranks_);
        for (int peer = 0; peer < ranks_; ++peer)
            if (far_[peer])
                exchanges[peer] = {outbox_.get() + kBytes * peer, inbox_.get() + kBytes * peer,
                                   kBytes};
        EXPECT_EQ(engine_->exchange(channel_, {round, Cargo::kMessages, Deadline(kTimeoutUs)},
                                    exchanges, queue),
                  MEP_OK)
            << mep_last_error();
    }
    // What came, as kernels behind it would find it.
    void expect_received(int number) {
        stream_.push([this, number] {
            for (int peer = 0; peer < ranks_; ++peer)
                for (size_t at = 0; far_[peer] && at < kBytes; ++at)
                    ASSERT_EQ(inbox_.get()[kBytes * peer + at], content(peer, rank_, number));
        });
    }
    void wait() { stream_.wait(); }
    const std::vector<int32_t> &active() const { return active_; }
    void unmask() { active_.assign(ranks_, 1); }
    std::string failure() { return engine_->take_failure(); }
    void barrier() {
        const char mine = 0;
        std::vector<char> all(ranks_);
        EXPECT_EQ(mep_group_all_gather(group_, &mine, all.data(), 1), MEP_OK);
    }

    mep_status_t status = MEP_OK;

  private:
    const int rank_, ranks_;
    const std::shared_ptr<Device> device_ = std::make_shared<StreamedDevice>();
    FakeStream stream_;
    std::vector<int32_t> active_, box_of_;
    std::vector<bool> far_;
    BufferState state_{};
    HandleState sent_{};
    mep_group_t *group_;
    std::unique_ptr<DeviceEngine> engine_;
    void *channel_ = nullptr;
    std::shared_ptr<char> outbox_, inbox_;
};

template <class Body>
void run(int ranks, Body body, int absent = kNobody) {
    Meeting meeting(ranks, absent);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank)
        if (rank != absent) threads.emplace_back([&meeting, rank, body] { body(&meeting, rank); });
    for (std::thread &thread : threads)
        thread.join();
}

const Nccl &fake() {
    static const Nccl nccl = Nccl::load("NCCL", FAKE_NCCL, "nccl");
    return nccl;
}

// Asks something of the library itself.
template <class Function>
Function of_fake(const char *name) {
    return reinterpret_cast<Function>(dlsym(dlopen(FAKE_NCCL, RTLD_NOW | RTLD_LOCAL), name));
}

// Pieces of memory; those of a communicator that was aborted stay.
int registered() {
    return of_fake<int (*)()>("fake_nccl_registered")();
}

constexpr int64_t kLongUs = 60'000'000;

void expect_exchanges_are_right(const Nccl &nccl, int absent = kNobody) {
    const auto body = [&](Meeting *meeting, int rank) {
        Member member(meeting, nccl, rank, 3, kLongUs);
        ASSERT_EQ(member.status, MEP_OK) << mep_last_error();
        for (int number = 0; number < 4; ++number) {  // queued, not waited for
            member.queue(number);
            member.expect_received(number);
        }
        member.wait();
        EXPECT_EQ(member.active(), (std::vector<int32_t>{1, 1, 1}));
        EXPECT_EQ(member.failure(), "");
        member.barrier();
    };
    run(3, body, absent);
}

TEST(NcclLibrary, IsFound) {
    EXPECT_EQ(fake().problem, "");
    EXPECT_EQ(fake().version(), 22809);
    EXPECT_TRUE(fake().has_own_memory());
}

TEST(NcclLibrary, SaysWhatIsMissing) {
    const Nccl other = Nccl::load("MCCL", FAKE_NCCL, "mccl");
    EXPECT_NE(other.problem.find("has no mccl"), std::string::npos) << other.problem;
    EXPECT_EQ(other.version(), 0);
    const Nccl none = Nccl::load("NCCL", "/nowhere/libnccl.so.2", "nccl");
    EXPECT_EQ(none.problem.find("NCCL cannot be loaded: "), 0U) << none.problem;
}

TEST(NcclEngine, DoesWithoutARankThatIsNotThere) {
    for (int absent = 0; absent < 3; ++absent)
        expect_exchanges_are_right(fake(), absent);
}

TEST(NcclEngine, CarriesBoxesInTheOrderOfTheStream) {
    const int before = registered();
    expect_exchanges_are_right(fake());
    EXPECT_EQ(registered(), before);
}

TEST(NcclEngine, DoesWithoutMemoryOfItsOwn) {
    const Nccl nccl = Nccl::load("NCCL", FAKE_NCCL_WITHOUT_MEMORY, "nccl");
    EXPECT_EQ(nccl.problem, "");
    EXPECT_FALSE(nccl.has_own_memory());
    expect_exchanges_are_right(nccl);
}

// A registered buffer on one side only would be undefined: one rank without is all without.
TEST(NcclEngine, TakesItsOwnMemoryOnAllRanksOrOnNone) {
    Nccl lacking = fake();
    lacking.allocate = [](void **, size_t) { return 1; };
    const int before = registered();
    run(2, [&](Meeting *meeting, int rank) {
        Member member(meeting, rank == 0 ? fake() : lacking, rank, 2, kLongUs);
        ASSERT_EQ(member.status, MEP_OK);
        member.barrier();  // so that nobody still tries its own
        EXPECT_EQ(registered(), before);
        member.queue(0);
        member.expect_received(0);
        member.wait();
        member.barrier();
    });
}

TEST(NcclEngine, GivesUpAnExchangeAtItsDeadline) {
    run(2, [&](Meeting *meeting, int rank) {
        Member member(meeting, fake(), rank, 2, kLongUs);
        ASSERT_EQ(member.status, MEP_OK);
        member.queue(0);
        member.expect_received(0);
        member.wait();
        member.barrier();
        if (rank == 0) {  // rank 1 comes no more
            const Clock::time_point began = Clock::now();
            member.queue(1);
            member.wait();
            const auto took = Clock::now() - began;
            EXPECT_GE(took, std::chrono::microseconds(kTimeoutUs));
            EXPECT_LE(took, std::chrono::microseconds(kTimeoutUs * 11 / 10 + 50'000));
            EXPECT_EQ(member.active(), (std::vector<int32_t>{1, 0}));
            EXPECT_NE(member.failure().find("given up"), std::string::npos);
            EXPECT_EQ(member.failure(), "") << "once";
            member.unmask();  // another mask, in which nobody has failed yet
            member.queue(2);
            member.wait();
            EXPECT_EQ(member.active(), (std::vector<int32_t>{1, 0}));
        }
        member.barrier();
    });
}

TEST(NcclEngine, DoesNotWaitForWhoIsKnownToHaveFailed) {
    run(2, [&](Meeting *meeting, int rank) {
        Member member(meeting, fake(), rank, 2, kLongUs);
        ASSERT_EQ(member.status, MEP_OK);
        if (rank == 0) {
            of_fake<void (*)(int)>("fake_nccl_fail")(0);
            const Clock::time_point began = Clock::now();
            member.queue(0);
            member.wait();
            EXPECT_LT(Clock::now() - began, std::chrono::microseconds(kTimeoutUs / 2));
            EXPECT_EQ(member.active(), (std::vector<int32_t>{1, 0}));
            of_fake<void (*)(int)>("fake_nccl_fail")(-1);
        }
        member.barrier();
    });
}

TEST(NcclEngine, IsNotMadeWithoutAllRanks) {
    run(2, [&](Meeting *meeting, int rank) {
        Nccl refused = fake();
        if (rank == 1)
            refused.init_rank = [](Nccl::Communicator **, int, Nccl::UniqueId, int) { return 3; };
        const Member member(meeting, refused, rank, 2, kTimeoutUs);
        EXPECT_EQ(member.status, rank == 0 ? MEP_TIMEOUT : MEP_SYSTEM_ERROR);
    });
}

// When all that made it is gone.
std::atomic<bool> may_come{false};
std::atomic<int> came{0};

TEST(NcclEngine, MayComeTooLateToBeMade) {
    static Nccl late = fake();
    late.init_rank = [](Nccl::Communicator **communicator, int ranks, Nccl::UniqueId id, int rank) {
        while (!may_come)
            std::this_thread::yield();
        const int result = fake().init_rank(communicator, ranks, id, rank);
        ++came;
        return result;
    };
    run(2, [&](Meeting *meeting, int rank) {
        const Member member(meeting, late, rank, 2, kTimeoutUs);
        EXPECT_EQ(member.status, MEP_TIMEOUT);
    });
    may_come = true;
    while (came < 2)
        std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));  // what it does then, it does now
}

TEST(NcclEngine, FailsOnAllRanksIfOneIsNotReady) {
    run(2, [&](Meeting *meeting, int rank) {
        Nccl unready = fake();
        if (rank == 0) unready.get_unique_id = [](Nccl::UniqueId *) { return 3; };
        const auto began = Clock::now();
        const Member member(meeting, unready, rank, 2, kLongUs);
        EXPECT_EQ(member.status, MEP_SYSTEM_ERROR);
        EXPECT_LT(Clock::now() - began, std::chrono::seconds(10));
    });
}

}  // namespace
}  // namespace ep::test
