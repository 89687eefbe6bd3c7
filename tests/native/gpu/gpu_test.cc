// CUDA against the CPU, bit for bit: ranks as threads and as processes, also several on one GPU.
#include "gpu/gpu.h"

#include <cstdlib>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

using gpu::Problem;
using gpu::Results;
using gpu::Weights;

namespace {

std::string unavailable() {
    mep_backend_info_t info{};
    info.struct_size = sizeof info;
    mep_backend_query(MEP_BACKEND_CUDA, &info);
    return info.available != 0 ? "" : info.reason;
}

#define NEEDS_GPU()                                                    \
    do {                                                               \
        if (const std::string reason = unavailable(); !reason.empty()) \
            GTEST_SKIP() << "no CUDA device here: " << reason;         \
    } while (0)

int device_count() {
    int count = 0;
    cudaGetDeviceCount(&count);
    return count;
}

std::vector<Results> run_threads(const Problem &p, int backend) {
    mep_world_t *world = nullptr;
    EXPECT_EQ(mep_world_create(p.ranks, &world), MEP_OK);
    std::vector<Results> results(p.ranks);
    std::vector<std::string> failures(p.ranks);
    std::vector<std::thread> threads;
    const int devices = backend == MEP_BACKEND_CPU ? 1 : device_count();
    for (int rank = 0; rank < p.ranks; ++rank)
        threads.emplace_back([&, rank] {
            results[rank] = gpu::run_rank(p, rank, backend, rank % devices, world, &failures[rank]);
        });
    for (std::thread &thread : threads)
        thread.join();
    mep_world_destroy(world);
    for (int rank = 0; rank < p.ranks; ++rank)
        EXPECT_EQ(failures[rank], "") << "rank " << rank;
    return results;
}

void expect_same_bits(const Problem &p) {
    const std::vector<Results> cpu = run_threads(p, MEP_BACKEND_CPU);
    const std::vector<Results> cuda = run_threads(p, MEP_BACKEND_CUDA);
    for (int rank = 0; rank < p.ranks; ++rank)
        EXPECT_EQ(gpu::difference(cpu[rank], cuda[rank]), "") << "rank " << rank;
}

// In a child process: both backends as this rank, by the environment. 0: the same bits.
int child(const Problem &p, int rank, int port) {
    alarm(100);
    setenv("RANK", std::to_string(rank).c_str(), 1);
    setenv("WORLD_SIZE", std::to_string(p.ranks).c_str(), 1);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("MASTER_PORT", std::to_string(port).c_str(), 1);
    std::string failure, found;
    const Results cpu = gpu::run_rank(p, rank, MEP_BACKEND_CPU, 0, nullptr, &failure);
    const Results cuda =
        gpu::run_rank(p, rank, MEP_BACKEND_CUDA, rank % device_count(), nullptr, &failure);
    found = gpu::difference(cpu, cuda);
    if (failure.empty() && found.empty()) return 0;
    std::fprintf(stderr, "rank %d: %s %s\n", rank, failure.c_str(), found.c_str());
    return 1;
}

}  // namespace

// First, because a child must not inherit a CUDA context.
TEST(CudaProcesses, GiveTheBitsOfTheCpu) {
    for (const int ranks : {2, 4}) {
        Problem p;
        p.ranks = ranks;
        p.tokens_max = 16;
        std::vector<pid_t> children;
        const int port = 20000 + getpid() % 20000;
        for (int rank = 0; rank < ranks; ++rank) {
            const pid_t pid = fork();
            if (pid == 0) {
                const std::string reason = unavailable();
                _exit(reason.empty() ? child(p, rank, port) : 77);
            }
            children.push_back(pid);
        }
        bool skipped = false;
        for (const pid_t pid : children) {
            int status = 0;
            waitpid(pid, &status, 0);
            skipped = skipped || (WIFEXITED(status) && WEXITSTATUS(status) == 77);
            if (!skipped) {
                EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << ranks << " ranks";
            }
        }
        if (skipped) GTEST_SKIP() << "no CUDA device here";
    }
}

TEST(Cuda, GivesTheBitsOfTheCpuForEveryType) {
    NEEDS_GPU();
    struct Type {
        int code, bits;
        uint32_t quant;
    };
    for (const Type &type :
         {Type{MEP_TYPE_BFLOAT, 16, 0}, Type{MEP_TYPE_FLOAT, 16, 0}, Type{MEP_TYPE_FLOAT, 32, 0},
          Type{MEP_TYPE_BFLOAT, 16, 1}, Type{MEP_TYPE_FLOAT, 16, 1}, Type{MEP_TYPE_FLOAT, 32, 2}}) {
        Problem p;
        p.type_code = type.code;
        p.type_bits = type.bits;
        p.quant = type.quant;
        SCOPED_TRACE(std::to_string(type.code) + "/" + std::to_string(type.bits) + " quant " +
                     std::to_string(type.quant));
        expect_same_bits(p);
    }
}

TEST(Cuda, GivesTheBitsOfTheCpuForEveryWayOfWeights) {
    NEEDS_GPU();
    for (const Weights weights : {Weights::kAtDispatch, Weights::kAtCombine, Weights::kNone}) {
        Problem p;
        p.weights = weights;
        p.in_halves = true;
        expect_same_bits(p);
    }
}

TEST(Cuda, GivesTheBitsOfTheCpuForOneRankAndForMoreRanksThanGpus) {
    NEEDS_GPU();
    for (const int ranks : {1, 4, 8}) {
        Problem p;
        p.ranks = ranks;
        p.experts = 16;
        SCOPED_TRACE(std::to_string(ranks) + " ranks");
        expect_same_bits(p);
    }
}

TEST(Cuda, GivesTheBitsOfTheCpuForManyShapes) {
    NEEDS_GPU();
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

TEST(Cuda, GivesTheBitsOfTheCpuAtDecodeAndPrefillSizes) {
    NEEDS_GPU();
    Problem p;
    p.hidden = 7168;
    p.tokens_max = 128;
    p.experts = 32;
    p.topk = 8;
    p.rounds = 2;
    expect_same_bits(p);
}
