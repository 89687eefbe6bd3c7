// The library with the MACA backend's host half, over a runtime that does nothing but take note.
#include "mooncake_ep.h"

#include "backend/backend.h"
#include "base/host_turn.h"
#include "base/late_frees.h"
#include "runtime.h"
#include "transport/gate.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <gtest/gtest.h>
#include <mcr/mc_runtime.h>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

using mc_shim::Launch;
using mc_shim::runtime;

// One rank on the backend, if it can be had.
class Rank {
  public:
    Rank() {
        EXPECT_EQ(mep_world_create(1, &world_), MEP_OK);
        mep_group_config_t config{};
        config.struct_size = sizeof config;
        config.rank_count = 1;
        config.backend = MEP_BACKEND_MACA;
        config.world = world_;
        status = mep_group_create(&config, &group_);
        if (status != MEP_OK) return;
        mep_buffer_config_t shape{};
        shape.struct_size = sizeof shape;
        shape.token_count_max = kTokens;
        shape.hidden = kHidden;
        shape.expert_count = kExperts;
        shape.topk_max = 1;
        shape.payload_types = MEP_PAYLOAD_BF16 | MEP_PAYLOAD_FP8;
        EXPECT_EQ(mep_buffer_create(group_, &shape, &buffer), MEP_OK) << mep_last_error();
        EXPECT_EQ(mep_handle_create(buffer, &handle), MEP_OK) << mep_last_error();
    }
    Rank(const Rank &) = delete;
    Rank &operator=(const Rank &) = delete;
    ~Rank() {
        mep_handle_destroy(handle);
        mep_buffer_destroy(buffer);
        mep_group_destroy(group_);
        mep_world_destroy(world_);
    }
    mep_status_t dispatch(uint32_t quant) const;

    mep_status_t status = MEP_OK;
    mep_buffer_t *buffer = nullptr;
    mep_handle_t *handle = nullptr;

  private:
    static constexpr int64_t kTokens = 4, kHidden = 128, kExperts = 2;
    mep_world_t *world_ = nullptr;
    mep_group_t *group_ = nullptr;
};

// Arrays that no kernel touches.
struct Array {
    alignas(64) static inline char data[1 << 16];
    std::vector<int64_t> shape;
    mep_tensor_t tensor{};

    Array(int code, int bits, std::vector<int64_t> extents) : shape(std::move(extents)) {
        tensor.data = data;
        tensor.device = {MEP_DEVICE_CUDA, 0};
        tensor.ndim = static_cast<int32_t>(shape.size());
        tensor.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
        tensor.shape = shape.data();
    }
};

mep_status_t Rank::dispatch(uint32_t quant) const {
    const bool cast = quant != MEP_QUANT_NONE;
    const Array x(MEP_TYPE_BFLOAT, 16, {kTokens, kHidden}), idx(MEP_TYPE_INT, 32, {kTokens, 1}),
        out(cast ? MEP_TYPE_FLOAT8_E4M3FN : MEP_TYPE_BFLOAT, cast ? 8 : 16,
            {kExperts, kTokens, kHidden}),
        scales(MEP_TYPE_FLOAT, 32, {kExperts, kTokens, 1}), count(MEP_TYPE_INT, 32, {kExperts});
    mep_dispatch_args_t args{};
    args.struct_size = sizeof args;
    args.x = &x.tensor;
    args.topk_idx = &idx.tensor;
    args.out_x = &out.tensor;
    args.out_scales = cast ? &scales.tensor : nullptr;
    args.out_count = &count.tensor;
    args.quant = quant;
    return mep_dispatch(buffer, handle, &args);
}

class MacaHost : public testing::Test {
  protected:
    void SetUp() override { runtime() = {}; }
};

TEST_F(MacaHost, SaysThatItIsAShim) {
    mep_backend_info_t info{};
    info.struct_size = sizeof info;
    ASSERT_EQ(mep_backend_query(MEP_BACKEND_MACA, &info), MEP_OK);
    EXPECT_STREQ(info.name, "maca (shim without a runtime)");
    EXPECT_EQ(info.available, 0);
    EXPECT_STREQ(info.reason, "the shim has no devices");
}

TEST_F(MacaHost, RefusesAGroupWithoutADevice) {
    const Rank rank;
    EXPECT_EQ(rank.status, MEP_UNSUPPORTED);
    EXPECT_NE(std::string(mep_last_error()).find("the shim has no devices"), std::string::npos);
}

// The clock is set once in a process. ctest gives each test one; else this test has to come before
// those with a clock that goes, and the next is the first of them.
TEST_F(MacaHost, RefusesADeviceWhoseClockStands) {
    runtime().device_count = 1;
    runtime().clock_goes = false;
    const Rank rank;
    EXPECT_EQ(rank.status, MEP_DEVICE_ERROR);
    EXPECT_NE(std::string(mep_last_error()).find("clock"), std::string::npos) << mep_last_error();
}

// Others use the device too.
TEST_F(MacaHost, MeasuresTheClockBetweenTheTurnsOfOthers) {
    runtime().device_count = 1;
    runtime().turns_ms = {40, 8, 4, 0, 0};
    const Rank rank;
    ASSERT_EQ(rank.status, MEP_OK) << mep_last_error();
    const double ns = static_cast<double>(runtime().tick) / (1 << 20);
    EXPECT_NEAR(ns, mc_shim::kTickNs, mc_shim::kTickNs / 2.0);
}

TEST_F(MacaHost, MeasuresTheClockOnce) {
    runtime().device_count = 1;
    const Rank rank, again;
    ASSERT_EQ(rank.status, MEP_OK) << mep_last_error();
    ASSERT_EQ(again.status, MEP_OK) << mep_last_error();
    EXPECT_EQ(runtime().set_ticks, 1);
    const double ns = static_cast<double>(runtime().tick) / (1 << 20);
    EXPECT_NEAR(ns, mc_shim::kTickNs, mc_shim::kTickNs / 2.0);
}

TEST_F(MacaHost, SendsAndReceivesInTwoLaunchesFromFineGrainedMemory) {
    runtime().device_count = 1;
    const Rank rank;
    ASSERT_EQ(rank.status, MEP_OK) << mep_last_error();
    constexpr unsigned kFinegrained = 1;
    EXPECT_EQ(runtime().flags, std::vector<unsigned>{kFinegrained});
    runtime().launches.clear();
    ASSERT_EQ(rank.dispatch(MEP_QUANT_NONE), MEP_OK) << mep_last_error();
    ASSERT_EQ(runtime().launches.size(), 2u);
    for (const Launch &launch : runtime().launches) {
        EXPECT_NE(launch.kernel.find("dispatch_kernel"), std::string::npos) << launch.kernel;
        EXPECT_EQ(launch.blocks, unsigned{mc_shim::kBlocks});
        EXPECT_EQ(launch.threads % 64, 0u) << "whole waves";
    }
}

// A mapping of another process's window.
std::shared_ptr<ep::Mapping> map_a_peer() {
    runtime().device_count = 1;
    runtime().opens = true;
    std::shared_ptr<ep::Device> device;
    EXPECT_EQ(ep::kMacaBackend.create_device(0, &device), MEP_OK) << mep_last_error();
    std::shared_ptr<ep::Mapping> mapping;
    EXPECT_EQ(device->open_window(ep::WindowHandle{}, &mapping), MEP_OK) << mep_last_error();
    return mapping;
}

TEST_F(MacaHost, ClosesMappingsInTurn) {
    std::shared_ptr<ep::Mapping> mapping = map_a_peer();
    std::thread other;
    {
        const ep::HostTurn turn{ep::Deadline(ep::kTimeoutNever)};
        other = std::thread([&] { mapping.reset(); });
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        EXPECT_EQ(runtime().closed, 0);
    }
    other.join();
    EXPECT_EQ(runtime().closed, 1);
}

TEST_F(MacaHost, LeavesAMappingToTheEndIfNoTurnComes) {
    std::shared_ptr<ep::Mapping> mapping = map_a_peer();
    const ep::HostTurn turn{ep::Deadline(ep::kTimeoutNever)};
    mapping.reset();
    EXPECT_EQ(runtime().closed, 0);
}

// Four MetaX GPUs, of which 0-1 and 2-3 are near.
ep::Topology four_gpus() {
    ep::Topology topology;
    for (int bus = 0; bus < 4; ++bus)
        topology.gpus.push_back({ep::Vendor::kMetax, "",
                                 "pci0000:00/0000:0" + std::to_string(bus) + ":00.0",
                                 ep::kNumaNodeUnknown});
    return topology;
}

// The process's only GPU, as the gate counts it.
int number_of_first_device(const ep::Topology &topology) {
    std::shared_ptr<ep::Device> device;
    EXPECT_EQ(ep::kMacaBackend.create_device(0, &device), MEP_OK) << mep_last_error();
    return device == nullptr ? -1 : ep::physical_number(topology, device->pci_address());
}

TEST_F(MacaHost, KnowsItsGpuByTheNumberOfTheHostWhateverIsVisible) {
    const ep::Topology topology = four_gpus();
    ep::P2pGate gate;
    ASSERT_EQ(ep::P2pGate::of("", false, topology, ep::NearPairs::kNeighbours, &gate), MEP_OK);
    runtime().device_count = 4;
    EXPECT_EQ(number_of_first_device(topology), 0);
    for (const char *variable : {"CUDA_VISIBLE_DEVICES", "MACA_VISIBLE_DEVICES"})
        for (const std::string &list : {std::string("2"), mc_shim::uuid_of(2)}) {
            setenv(variable, list.c_str(), 1);
            int count = 0;
            EXPECT_EQ(mcGetDeviceCount(&count), mcSuccess);
            EXPECT_EQ(count, 1) << variable << "=" << list;
            const int number = number_of_first_device(topology);
            unsetenv(variable);
            EXPECT_EQ(number, 2) << variable << "=" << list;
            EXPECT_TRUE(gate.allows(number, 3));
            EXPECT_FALSE(gate.allows(number, 1));
        }
}

// Ranks that say what rank 0 says, but for who they are, until one is lost.
struct Echo {
    int rank_count = 1;
    int left = 1'000'000;  // all-gathers
    int made = 0;

    static int32_t gather(void *context, const void *send, void *receive, size_t bytes) {
        Echo &self = *static_cast<Echo *>(context);
        if (self.left-- == 0) return 1;
        constexpr size_t kRankOffset = 4;  // in the first
        for (int rank = 0; rank < self.rank_count; ++rank) {
            char *said = static_cast<char *>(receive) + rank * bytes;
            std::memcpy(said, send, bytes);
            if (self.made == 0) std::memcpy(said + kRankOffset, &rank, sizeof rank);
        }
        ++self.made;
        return 0;
    }
    mep_group_config_t config() {
        mep_group_config_t config{};
        config.struct_size = sizeof config;
        config.backend = MEP_BACKEND_MACA;
        config.all_gather = gather;
        config.all_gather_context = this;
        return config;
    }
};

// Calls of which each free takes long, as it does where other processes keep the driver busy.
class MacaHostFreesLate : public MacaHost {
  protected:
    void SetUp() override {
        MacaHost::SetUp();
        runtime().device_count = 1;
        const Rank first;  // sets the clock, for which it allocates
    }
    // It fails, before one free is done; a while later nothing is left of it.
    template <class Call>
    void expect_failure_before_frees(Call call) {
        const int allocated_before = mc_shim::allocation_count();
        mc_shim::frees_wait() = true;
        const auto began = std::chrono::steady_clock::now();
        EXPECT_EQ(call(), MEP_BOOTSTRAP_FAILED) << mep_last_error();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        EXPECT_LT(took.count(), mc_shim::kFreeSeconds);
        EXPECT_GT(mc_shim::allocation_count(), allocated_before) << "it had allocated nothing";
        mc_shim::frees_wait() = false;
        EXPECT_TRUE(ep::LateFrees::finish());
        EXPECT_EQ(mc_shim::allocation_count(), allocated_before);
    }
};

TEST_F(MacaHostFreesLate, WhatABufferOrAnUpdateHad) {
    constexpr int kOfABuffer = 5, kOfAnUpdate = 7;  // all-gathers; the last is of what was mapped
    Echo echo, fails_in_update;
    mep_group_config_t config = echo.config();
    config.rank_count = 1;
    mep_buffer_config_t shape{};
    shape.struct_size = sizeof shape;
    shape.token_count_max = 4;
    shape.hidden = 128;
    shape.expert_count = 2;
    shape.topk_max = 1;
    shape.payload_types = MEP_PAYLOAD_BF16;
    for (const bool in_update : {false, true}) {
        mep_group_t *group = nullptr;
        mep_buffer_t *buffer = nullptr;
        echo = {};
        ASSERT_EQ(mep_group_create(&config, &group), MEP_OK) << mep_last_error();
        if (in_update) {
            ASSERT_EQ(mep_buffer_create(group, &shape, &buffer), MEP_OK) << mep_last_error();
            const mep_group_config_t update = fails_in_update.config();
            fails_in_update.left = kOfAnUpdate - 1;
            expect_failure_before_frees([&] { return mep_group_update(group, &update); });
        } else {
            echo.left = kOfABuffer - 1;
            expect_failure_before_frees([&] { return mep_buffer_create(group, &shape, &buffer); });
        }
        mep_buffer_destroy(buffer);
        mep_group_destroy(group);
    }
}

TEST_F(MacaHostFreesLate, WhatATrialOfWaysHad) {
    Echo echo;
    echo.rank_count = 2;
    mep_group_config_t config = echo.config();
    config.rank_count = 2;
    mep_group_t *group = nullptr;
    for (const int gathers : {2, 3}) {
        echo.left = gathers;
        echo.made = 0;
        expect_failure_before_frees([&] { return mep_group_create(&config, &group); });
    }
}

// Two ranks, threads on the two GPUs of a machine whose sysfs, this one's, knows of none.
class MacaHostGroup : public MacaHost {
  protected:
    void SetUp() override {
        MacaHost::SetUp();
        runtime().device_count = 2;
        const Rank first;  // sets the clock, for which it launches
    }

    struct Joined {
        mep_status_t status;
        std::string problem, reason;  // of the way to the other
        int32_t kind;
    };
    static Joined join(mep_world_t *world, int rank) {
        mep_group_config_t config{};
        config.struct_size = sizeof config;
        config.rank = config.device_id = rank;
        config.rank_count = 2;
        config.backend = MEP_BACKEND_MACA;
        config.world = world;
        config.timeout_us = 2'000'000;
        mep_group_t *group = nullptr;
        Joined joined{mep_group_create(&config, &group), "", "", 0};
        if (joined.status != MEP_OK) {
            joined.problem = mep_last_error();
            return joined;
        }
        mep_transport_info_t info{};
        info.struct_size = sizeof info;
        EXPECT_EQ(mep_group_query_transport(group, 1 - rank, &info), MEP_OK);
        joined.reason = info.reason;
        joined.kind = info.kind;
        EXPECT_EQ(mep_group_all_gather(group, "", std::string(2, ' ').data(), 1), MEP_OK);
        mep_group_destroy(group);
        return joined;
    }
    static std::vector<Joined> join_both() {
        mep_world_t *world = nullptr;
        EXPECT_EQ(mep_world_create(2, &world), MEP_OK);
        auto other = std::async(std::launch::async, [&] { return join(world, 1); });
        std::vector<Joined> both{join(world, 0)};
        both.push_back(other.get());
        mep_world_destroy(world);
        return both;
    }
    static void expect_refusal(mep_status_t status, const std::string &named) {
        for (const Joined &joined : join_both()) {
            EXPECT_EQ(joined.status, status);
            EXPECT_NE(joined.problem.find(named), std::string::npos) << joined.problem;
        }
    }
};

TEST_F(MacaHostGroup, GoesNoWayThatItsGateDoesNotAllow) {
    for (const Joined &joined : join_both()) {
        ASSERT_EQ(joined.status, MEP_OK) << joined.problem;
        EXPECT_EQ(joined.kind, int{MEP_TRANSPORT_COLLECTIVE});
        EXPECT_NE(joined.reason.find("MOONCAKE_EP_MACA_ALLOW_NODE_P2P=1 allows them"),
                  std::string::npos)
            << joined.reason;
    }
}

TEST_F(MacaHostGroup, NamesATypoInThePairsOnAllRanks) {
    setenv("MOONCAKE_EP_MACA_P2P_PAIRS", "0_1", 1);
    expect_refusal(MEP_INVALID_ARGUMENT, "MOONCAKE_EP_MACA_P2P_PAIRS: ");
    unsetenv("MOONCAKE_EP_MACA_P2P_PAIRS");
}

TEST_F(MacaHostGroup, NamesWhatMxSmiSaysThatMakesNoSenseOnAllRanks) {
    std::string folder = ::testing::TempDir() + "mooncake_ep_tool_XXXXXX";
    ASSERT_NE(mkdtemp(folder.data()), nullptr);
    const std::string tool = folder + "/mx-smi", path = getenv("PATH");
    std::ofstream(tool) << "#!/bin/sh\necho nonsense\n";
    std::filesystem::permissions(tool, std::filesystem::perms::owner_all);
    setenv("PATH", (folder + ":" + path).c_str(), 1);
    expect_refusal(MEP_INVALID_ARGUMENT, "mx-smi: ");
    std::ofstream(tool) << "#!/bin/sh\necho no driver >&2; exit 9\n";
    expect_refusal(MEP_SYSTEM_ERROR, "with status 9 and printed \"no driver\"");
    std::ofstream(tool) << "#!/bin/sh\nsleep 100\n";
    expect_refusal(MEP_TIMEOUT, "mx-smi topo -m did not end");
    setenv("PATH", path.c_str(), 1);
    std::filesystem::remove_all(folder);
}

TEST_F(MacaHost, CastsNothingToFp8UnlessBuiltTo) {
    runtime().device_count = 1;
    const Rank rank;
    ASSERT_EQ(rank.status, MEP_OK) << mep_last_error();
    runtime().launches.clear();
    EXPECT_EQ(rank.dispatch(MEP_QUANT_FP8), MEP_UNSUPPORTED);
    EXPECT_NE(std::string(mep_last_error()).find("MEP_MACA_FP8"), std::string::npos)
        << mep_last_error();
    EXPECT_TRUE(runtime().launches.empty());
}

}  // namespace
