// A GPU against the CPU, bit for bit: ranks as threads and as processes, also several on one GPU.
#include "gpu/gpu.h"

#include "device/queue.h"
#include "support/forked.h"
#include "support/settings.h"

#include <functional>
#include <gtest/gtest.h>
#include <thread>

using ep::test::IdOfGroup;
using ep::test::run_forked;
using ep::test::Setting;
using ep::test::Shared;
using ep::test::skip_rank;
using ep::test::with_all_kernels;
using gpu::Problem;
using gpu::Results;
using gpu::Run;
using gpu::Seat;
using gpu::Weights;

namespace {

std::string unavailable() {
    mep_backend_info_t info{};
    info.struct_size = sizeof info;
    mep_backend_query(EP_TEST_BACKEND, &info);
    return info.available != 0 ? "" : info.reason;
}

#define NEEDS_GPU()                                                    \
    do {                                                               \
        if (const std::string reason = unavailable(); !reason.empty()) \
            GTEST_SKIP() << "no device here: " << reason;              \
    } while (0)

int device_count() {
    int count = 0;
    cudaGetDeviceCount(&count);
    return count;
}

// ---- Ranks as threads or as processes -----------------------------------------------------------

std::vector<Results> run_threads(const Problem &p, Run run, int backend) {
    mep_world_t *world = nullptr;
    EXPECT_EQ(mep_world_create(p.ranks, &world), MEP_OK);
    std::vector<Results> results(p.ranks);
    std::vector<std::string> failures(p.ranks);
    std::vector<std::thread> threads;
    const int devices = backend == MEP_BACKEND_CPU ? 1 : device_count();
    for (int rank = 0; rank < p.ranks; ++rank)
        threads.emplace_back([&, rank] {
            const bool shares = backend != MEP_BACKEND_CPU && p.ranks > devices;
            const Seat seat{rank, backend, rank % devices, world, nullptr, shares};
            results[rank] = run(p, seat, &failures[rank]);
        });
    for (std::thread &thread : threads)
        thread.join();
    mep_world_destroy(world);
    for (int rank = 0; rank < p.ranks; ++rank)
        EXPECT_EQ(failures[rank], "") << "rank " << rank;
    return results;
}

void expect_same_bits(const Problem &p, Run run = gpu::run_rounds) {
    const std::vector<Results> cpu = run_threads(p, run, MEP_BACKEND_CPU);
    const std::vector<Results> cuda = run_threads(p, run, EP_TEST_BACKEND);
    for (int rank = 0; rank < p.ranks; ++rank)
        EXPECT_EQ(gpu::difference(cpu[rank], cuda[rank]), "") << "rank " << rank;
}

// The same in a process for each rank, which asks for its device itself.
void expect_same_bits_in_processes(const Problem &p, Run run = gpu::run_rounds) {
    constexpr unsigned kSecondsMax = 100;
    const Shared<IdOfGroup> cpu_group, cuda_group;
    run_forked(p.ranks, kSecondsMax, [&](int rank) {
        if (const std::string reason = unavailable(); !reason.empty())
            skip_rank("no device here: " + reason);
        std::string failure;
        Seat seat{rank, MEP_BACKEND_CPU, 0, nullptr, &cpu_group->of(rank)};
        const Results cpu = run(p, seat, &failure);
        EXPECT_EQ(failure, "") << "rank " << rank << " on the CPU";
        seat = {rank, EP_TEST_BACKEND, rank % device_count(), nullptr, &cuda_group->of(rank)};
        const Results cuda = run(p, seat, &failure);
        EXPECT_EQ(failure, "") << "rank " << rank << " on a GPU";
        EXPECT_EQ(gpu::difference(cpu, cuda), "") << "rank " << rank;
    });
}

void with_replays(const std::function<void(const Problem &, Run)> &expect) {
    with_all_kernels([&] {
        for (const uint32_t quant : {MEP_QUANT_NONE, MEP_QUANT_FP8}) {
            if (::testing::Test::IsSkipped()) return;
            Problem p;
            p.tokens_max = 16;
            p.topk = 3;
            p.quant = quant;
            SCOPED_TRACE("quant " + std::to_string(quant));
            expect(p, gpu::run_replays);
        }
    });
}

Problem two_in_flight() {
    Problem p;
    p.order = gpu::Order::kCrossed;
    p.rounds = 8;
    return p;
}

// Threads that share a GPU are other threads' hostages in too many calls of the runtime.
#define NEEDS_GPU_EACH(ranks)                                                               \
    do {                                                                                    \
        NEEDS_GPU();                                                                        \
        if (device_count() < (ranks))                                                       \
            GTEST_SKIP() << "threads need a GPU each, and here are " << device_count()      \
                         << "; CudaProcesses does the same with processes that share them"; \
    } while (0)

}  // namespace

// ---- Processes, first, because a child must not inherit a CUDA context --------------------------

TEST(CudaProcesses, GiveTheBitsOfTheCpu) {
    with_all_kernels([] {
        for (const int ranks : {1, 2, 4, 8}) {
            if (IsSkipped()) return;
            Problem p;
            p.ranks = ranks;
            p.experts = 16;
            p.tokens_max = 16;
            SCOPED_TRACE(std::to_string(ranks) + " ranks");
            expect_same_bits_in_processes(p);
        }
    });
}

// Fails on a device that needs it (kernels/fence.h).
TEST(CudaProcesses, GiveTheBitsOfTheCpuWithoutAFenceBetweenThePhases) {
    if (EP_TEST_BACKEND != MEP_BACKEND_MACA) GTEST_SKIP() << "there is none on CUDA";
    ep::phase_fence = false;
    for (const int ranks : {2, 4}) {
        if (IsSkipped()) break;
        Problem p;
        p.ranks = ranks;
        p.rounds = 12;
        SCOPED_TRACE(std::to_string(ranks) + " ranks");
        expect_same_bits_in_processes(p);
    }
    ep::phase_fence = true;
}

TEST(CudaProcesses, HaveTwoDispatchesInFlight) {
    with_all_kernels([] { expect_same_bits_in_processes(two_in_flight()); });
}

TEST(CudaProcesses, ReplaysOfOneGraphFollowTheirInputs) {
    with_replays(expect_same_bits_in_processes);
}

// ---- Processes that reach no memory of each other, or only some
// -----------------------------------

namespace {

// How this rank reaches its last peer, of a group made for the answer.
std::string way_to_last(int rank, int ranks, const mep_unique_id_t &id) {
    mep_group_config_t config{};
    config.struct_size = sizeof config;
    config.rank = rank;
    config.rank_count = ranks;
    config.backend = EP_TEST_BACKEND;
    config.device_id = rank % device_count();
    config.unique_id = &id;
    mep_group_t *group = nullptr;
    EXPECT_EQ(mep_group_create(&config, &group), MEP_OK) << mep_last_error();
    mep_transport_info_t info{};
    info.struct_size = sizeof info;
    EXPECT_EQ(mep_group_query_transport(group, ranks - 1 - rank, &info), MEP_OK);
    const std::string reason = info.reason;
    mep_group_destroy(group);
    return reason;
}

// By NCCL, which wants a GPU for each, or through host memory. Whatever the buffer's other choices
// are, its messages go by flag.
class Engine {
  public:
    explicit Engine(bool nccl)
        : nccl_(nccl),
          disable_p2p_("MOONCAKE_EP_DISABLE_P2P", "1"),
          library_("MOONCAKE_EP_NCCL_LIBRARY", nccl ? "" : "none") {}

    // Skips if it is not there.
    void expect(int ranks) const {
        constexpr unsigned kSecondsMax = 60;
        const Shared<IdOfGroup> id;
        run_forked(ranks, kSecondsMax, [&](int rank) {
            if (const std::string reason = unavailable(); !reason.empty())
                skip_rank("no device here: " + reason);
            if (nccl_ && device_count() < ranks) skip_rank("NCCL wants a GPU for each rank");
            const std::string way = way_to_last(rank, ranks, id->of(rank));
            if (nccl_ && way.find("by TCP") == 0) skip_rank("NCCL cannot be loaded here: " + way);
            EXPECT_EQ(way.find(nccl_ ? "by NCCL: " : "by TCP: "), 0U) << way;
            EXPECT_NE(way.find("MOONCAKE_EP_DISABLE_P2P"), std::string::npos) << way;
        });
    }

  private:
    bool nccl_;
    Setting disable_p2p_, library_;
};

void expect_same_bits_by(bool nccl, int ranks) {
    const Engine engine(nccl);
    engine.expect(ranks);
    for (const char *bulk : {"1", "0"})
        for (const Weights weights : {Weights::kAtDispatch, Weights::kAtCombine, Weights::kNone})
            for (const gpu::Order order :
                 {gpu::Order::kWhole, gpu::Order::kHalves, gpu::Order::kCrossed}) {
                if (::testing::Test::IsSkipped()) return;
                // Rows by the lanes differ in nothing that an engine sees.
                if (*bulk == '0' && order != gpu::Order::kCrossed) continue;
                const Setting bulk_copies("MOONCAKE_EP_BULK_COPIES", bulk);
                Problem p;
                p.ranks = ranks;
                p.experts = 16;
                p.topk = 3;
                p.hidden = 1408;
                p.weights = weights;
                p.order = order;
                p.quant = weights == Weights::kAtDispatch ? MEP_QUANT_FP8 : MEP_QUANT_NONE;
                p.rounds = order == gpu::Order::kCrossed ? 6 : 3;
                SCOPED_TRACE(std::string("bulk ") + bulk + " weights " +
                             std::to_string(int(weights)) + " order " + std::to_string(int(order)));
                expect_same_bits_in_processes(p);
            }
}

}  // namespace

TEST(CudaProcesses, GiveTheBitsOfTheCpuByNccl) {
    expect_same_bits_by(true, 2);
}

TEST(CudaProcesses, GiveTheBitsOfTheCpuThroughHostMemory) {
    expect_same_bits_by(false, 4);
}

TEST(CudaProcesses, GiveTheBitsOfTheCpuOnTwoIslands) {
    const Setting islands("MOONCAKE_EP_ISLAND_RANKS", "2");
    for (const gpu::Order order : {gpu::Order::kWhole, gpu::Order::kHalves, gpu::Order::kCrossed})
        for (const Weights weights : {Weights::kAtDispatch, Weights::kAtCombine}) {
            if (IsSkipped()) return;
            Problem p;
            p.ranks = 4;
            p.experts = 16;
            p.topk = 6;
            p.order = order;
            p.weights = weights;
            p.rounds = 6;
            SCOPED_TRACE("order " + std::to_string(int(order)) + " weights " +
                         std::to_string(int(weights)));
            expect_same_bits_in_processes(p);
        }
}

TEST(CudaProcesses, ReplaysOfOneGraphFollowTheirInputsByNccl) {
    const Engine engine(true);
    engine.expect(2);
    for (const uint32_t quant : {MEP_QUANT_NONE, MEP_QUANT_FP8}) {
        if (IsSkipped()) return;
        Problem p;
        p.tokens_max = 16;
        p.topk = 3;
        p.quant = quant;
        expect_same_bits_in_processes(p, gpu::run_replays);
    }
}

// ---- Threads ------------------------------------------------------------------------------------

TEST(Cuda, ReplaysOfOneGraphFollowTheirInputs) {
    NEEDS_GPU_EACH(2);
    with_replays(expect_same_bits);
}

TEST(Cuda, TwoDispatchesMayBeInFlight) {
    NEEDS_GPU_EACH(2);
    with_all_kernels([] { expect_same_bits(two_in_flight()); });
}

TEST(Cuda, GivesTheBitsOfTheCpuForEveryType) {
    NEEDS_GPU();
    struct Type {
        int code, bits;
        uint32_t quant;
    };
    with_all_kernels([] {
        for (const Type &type : {Type{MEP_TYPE_BFLOAT, 16, 0}, Type{MEP_TYPE_FLOAT, 16, 0},
                                 Type{MEP_TYPE_FLOAT, 32, 0}, Type{MEP_TYPE_BFLOAT, 16, 1},
                                 Type{MEP_TYPE_FLOAT, 16, 1}, Type{MEP_TYPE_FLOAT, 32, 2}}) {
            Problem p;
            p.type_code = type.code;
            p.type_bits = type.bits;
            p.quant = type.quant;
            p.hidden = 1408;  // the last piece of a bulk copy is not full
            SCOPED_TRACE(std::to_string(type.code) + "/" + std::to_string(type.bits) + " quant " +
                         std::to_string(type.quant));
            expect_same_bits(p);
        }
    });
}

TEST(Cuda, GivesTheBitsOfTheCpuForEveryWayOfWeights) {
    NEEDS_GPU();
    with_all_kernels([] {
        for (const Weights weights : {Weights::kAtDispatch, Weights::kAtCombine, Weights::kNone}) {
            Problem p;
            p.weights = weights;
            p.order = gpu::Order::kHalves;
            expect_same_bits(p);
        }
    });
}

// What the CPU does is tested against the oracle (kernels_cpu_test).
TEST(Cuda, LeavesOutTheRowsOfARankThatDiesAfterItsCounts) {
    NEEDS_GPU();
    with_all_kernels([] {
        for (const uint32_t quant : {MEP_QUANT_NONE, MEP_QUANT_FP8}) {
            Problem p;
            p.ranks = 3;
            p.experts = 12;
            p.topk = 4;
            p.hidden = 1536;
            p.quant = quant;
            p.timeout_us = 500'000;
            SCOPED_TRACE("quant " + std::to_string(quant));
            expect_same_bits(p, gpu::run_losing_rows);
        }
    });
}

TEST(Cuda, GivesTheBitsOfTheCpuForOneRankAndForMoreRanksThanGpus) {
    NEEDS_GPU();
    with_all_kernels([] {
        for (const int ranks : {1, 4, 8}) {
            Problem p;
            p.ranks = ranks;
            p.experts = 16;
            SCOPED_TRACE(std::to_string(ranks) + " ranks");
            expect_same_bits(p);
        }
    });
}

TEST(Cuda, GivesTheBitsOfTheCpuOnFewMultiprocessors) {
    NEEDS_GPU();
    with_all_kernels([] {
        for (const int sms : {3, 16}) {
            Problem p;
            p.sms = sms;
            p.tokens_max = 100;
            SCOPED_TRACE(std::to_string(sms) + " multiprocessors");
            expect_same_bits(p);
        }
    });
}

TEST(Cuda, GivesTheBitsOfTheCpuForManyShapes) {
    NEEDS_GPU();
    with_all_kernels([] {
        std::mt19937 random(7);
        for (int i = 0; i < 12; ++i) {
            Problem p;
            p.seed = 100 + i;
            p.ranks = 1 + int(random() % 3);
            p.experts = p.ranks * (1 + int(random() % 9));
            p.topk = 1 + int(random() % 32);
            p.tokens_max = 1 + int(random() % 100);
            p.hidden = 128 * (1 + int(random() % 12));
            p.quant = random() % 2;
            p.rounds = 6;
            SCOPED_TRACE("seed " + std::to_string(p.seed) + " ranks " + std::to_string(p.ranks) +
                         " topk " + std::to_string(p.topk) + " hidden " + std::to_string(p.hidden));
            expect_same_bits(p);
        }
    });
}

// Small, and on one rank, for compute-sanitizer, under which every access is slow.
TEST(Cuda, PassesUnderASanitizer) {
    NEEDS_GPU();
    Problem p;
    p.ranks = 1;
    p.tokens_max = 8;
    p.quant = MEP_QUANT_FP8;
    p.weights = Weights::kAtCombine;
    expect_same_bits(p);
}

// Ranks that are threads of one GPU, and none that waits for another, so that a sanitizer may slow
// them down. What is spoiled is each rank's own window.
TEST(Cuda, SurvivesGarbageInALiveWindow) {
    NEEDS_GPU();
    with_all_kernels([] {
        for (const uint32_t quant : {MEP_QUANT_NONE, MEP_QUANT_FP8}) {
            Problem p;
            p.tokens_max = 6;
            p.topk = 3;
            p.quant = quant;
            p.rounds = 6;
            p.timeout_us = 50'000;
            p.seed = 1 + quant;
            SCOPED_TRACE("quant " + std::to_string(quant));
            run_threads(p, gpu::run_among_garbage, EP_TEST_BACKEND);
        }
    });
}

TEST(Cuda, GivesTheBitsOfTheCpuAtDecodeAndPrefillSizes) {
    NEEDS_GPU();
    for (const int tokens_max : {128, 600}) {  // by line; by flag, counted in a launch before
        Problem p;
        p.hidden = 7168;
        p.tokens_max = tokens_max;
        p.experts = 32;
        p.topk = 8;
        p.rounds = 1;
        SCOPED_TRACE(std::to_string(tokens_max) + " tokens");
        expect_same_bits(p);
    }
}
