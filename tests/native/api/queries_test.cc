// What the library says about itself, and how its structs grow.
#include "support/abi.h"
#include "support/tidy.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace ep::test {
namespace {

using Queries = Tidy;
using Structs = Tidy;
using Log = Tidy;

// A group and buffer of one rank.
struct Alone {
    explicit Alone(const mep_buffer_config_t &config)
        : group(make_group(group_config(0, 1, nullptr))), buffer(make_buffer(group, config)) {}
    Group group;
    Buffer buffer;
};

mep_buffer_info_t info_of(const Buffer &buffer) {
    mep_buffer_info_t info{};
    info.struct_size = sizeof info;
    EXPECT_EQ(mep_buffer_query(buffer.get(), &info), MEP_OK);
    return info;
}

// ---- Queries
// --------------------------------------------------------------------------------------

TEST_F(Queries, DescribeTheGroup) {
    const World world = make_world(2);
    run_ranks(2, [&](int rank) {
        const Group group = make_group(group_config(rank, 2, world.get()));
        mep_group_info_t info{};
        info.struct_size = sizeof info;
        EXPECT_EQ(mep_group_query(group.get(), &info), MEP_OK);
        EXPECT_EQ(info.rank, rank);
        EXPECT_EQ(info.rank_count, 2);
        EXPECT_EQ(info.backend, MEP_BACKEND_CPU);
        EXPECT_EQ(info.device_id, 0);
        EXPECT_EQ(info.timeout_us, kTestTimeoutUs);
    });
}

TEST_F(Queries, GiveTheDefaultTimeout) {
    mep_group_config_t config = group_config(0, 1, nullptr);
    config.timeout_us = 0;
    const Group group = make_group(config);
    mep_group_info_t info{};
    info.struct_size = sizeof info;
    EXPECT_EQ(mep_group_query(group.get(), &info), MEP_OK);
    EXPECT_EQ(info.timeout_us, 100'000'000);
}

TEST_F(Queries, NameTheTransportToEachPeer) {
    const World world = make_world(2);
    run_ranks(2, [&](int rank) {
        const Group group = make_group(group_config(rank, 2, world.get()));
        for (int peer = 0; peer < 2; ++peer) {
            mep_transport_info_t info{};
            info.struct_size = sizeof info;
            EXPECT_EQ(mep_group_query_transport(group.get(), peer, &info), MEP_OK);
            EXPECT_EQ(info.kind, peer == rank ? MEP_TRANSPORT_SELF : MEP_TRANSPORT_THREAD);
            EXPECT_STREQ(info.name, peer == rank ? "self" : "thread");
            EXPECT_STRNE(info.reason, "");
        }
    });
}

TEST_F(Queries, SayWhichBackendsThereAre) {
    const struct {
        int32_t backend;
        const char *name;
    } backends[] = {
        {MEP_BACKEND_CPU, "cpu"}, {MEP_BACKEND_CUDA, "cuda"}, {MEP_BACKEND_MACA, "maca"}};
    for (const auto &[backend, name] : backends) {
        mep_backend_info_t info{};
        info.struct_size = sizeof info;
        EXPECT_EQ(mep_backend_query(backend, &info), MEP_OK);
        EXPECT_STREQ(info.name, name);
        EXPECT_EQ(info.available == 1, std::string(info.reason).empty()) << name;
        EXPECT_TRUE(backend != MEP_BACKEND_CPU || info.device_count == 1);
    }
}

TEST_F(Queries, GiveTheConfigurationWithItsDefaults) {
    mep_buffer_config_t config = buffer_config(1);
    config.cpu_thread_count = 0;
    ASSERT_EQ(setenv("MOONCAKE_EP_CPU_THREADS", "2", 1), 0);
    const Alone alone(config);
    unsetenv("MOONCAKE_EP_CPU_THREADS");
    const mep_buffer_info_t info = info_of(alone.buffer);
    EXPECT_EQ(info.rank, 0);
    EXPECT_EQ(info.rank_count, 1);
    EXPECT_EQ(info.token_count_max, config.token_count_max);
    EXPECT_EQ(info.hidden, config.hidden);
    EXPECT_EQ(info.expert_count, config.expert_count);
    EXPECT_EQ(info.local_expert_count, config.expert_count);
    EXPECT_EQ(info.topk_max, config.topk_max);
    EXPECT_EQ(info.payload_types, uint32_t{MEP_PAYLOAD_BF16 | MEP_PAYLOAD_FP8});
    EXPECT_EQ(info.rounds_in_flight_max, 2);
    EXPECT_EQ(info.fp32_partials, 0);
    EXPECT_EQ(info.cpu_thread_count, 2);
    EXPECT_EQ(info.sm_count, 0);
}

TEST_F(Queries, NoMultiprocessorsAreCountedOnTheCpu) {
    mep_buffer_config_t config = buffer_config(1);
    config.sm_count_max = 8;
    EXPECT_EQ(info_of(Alone(config).buffer).sm_count, 0);
}

TEST_F(Queries, PredictTheSizesOfABuffer) {
    for (const int rank_count : {1, 2, 4}) {
        const mep_buffer_config_t config = buffer_config(rank_count);
        mep_buffer_sizes_t sizes{};
        sizes.struct_size = sizeof sizes;
        EXPECT_EQ(mep_buffer_query_sizes(&config, rank_count, &sizes), MEP_OK);
        const World world = make_world(rank_count);
        run_ranks(rank_count, [&](int rank) {
            const Group group = make_group(group_config(rank, rank_count, world.get()));
            const mep_buffer_info_t info = info_of(make_buffer(group, config));
            EXPECT_EQ(info.window_bytes, sizes.window_bytes);
            EXPECT_EQ(info.handle_bytes, sizes.handle_bytes);
        });
    }
}

TEST_F(Queries, WindowOfADecodeBufferFitsIn32Megabytes) {
    mep_buffer_config_t config = buffer_config(2);
    config.token_count_max = 128;
    config.hidden = 7168;
    config.expert_count = 256;
    config.topk_max = 8;
    mep_buffer_sizes_t sizes{};
    sizes.struct_size = sizeof sizes;
    EXPECT_EQ(mep_buffer_query_sizes(&config, 2, &sizes), MEP_OK);
    EXPECT_LE(sizes.window_bytes, 32'000'000U);
}

// ThreadSanitizer sees what they share.
TEST_F(Queries, ATimeoutIsSetByOneThreadWhileAnotherUpdatesTheGroup) {
    const Alone alone(buffer_config(1));
    std::atomic<bool> updated{false};
    std::thread setter([&] {
        for (int64_t i = 0; !updated; ++i)
            EXPECT_EQ(mep_group_set_timeout(alone.group.get(), 10'000'000 + i % 7), MEP_OK);
    });
    mep_group_config_t config{};
    config.struct_size = sizeof config;
    for (int i = 0; i < 50; ++i)
        EXPECT_EQ(mep_group_update(alone.group.get(), &config), MEP_OK) << mep_last_error();
    updated = true;
    setter.join();
}

TEST_F(Queries, NameEveryStatus) {
    EXPECT_STREQ(mep_status_name(MEP_OK), "MEP_OK");
    EXPECT_STREQ(mep_status_name(MEP_PEER_FAILED), "MEP_PEER_FAILED");
    EXPECT_STREQ(mep_status_name(MEP_BOOTSTRAP_FAILED), "MEP_BOOTSTRAP_FAILED");
    for (const int unknown : {1, -1, -100, -104, -404, INT32_MIN})
        EXPECT_STREQ(mep_status_name(unknown), "MEP_UNKNOWN_STATUS");
}

TEST_F(Queries, LastErrorBelongsToItsThread) {
    std::thread([] {
        EXPECT_STREQ(mep_last_error(), "");
        EXPECT_EQ(mep_world_create(0, nullptr), MEP_INVALID_ARGUMENT);
        EXPECT_STRNE(mep_last_error(), "");
    }).join();
    std::thread([] { EXPECT_STREQ(mep_last_error(), ""); }).join();
}

TEST_F(Queries, DestroyingNothingIsAllowed) {
    mep_group_destroy(nullptr);
    mep_buffer_destroy(nullptr);
    mep_handle_destroy(nullptr);
    mep_world_destroy(nullptr);
    mep_unique_id_destroy(nullptr);
}

// ---- Growth of structs
// ----------------------------------------------------------------------------

// A struct of a newer header: ours, and eight bytes that we do not know.
template <class T>
struct Newer {
    T known;
    uint64_t unknown;
};

TEST_F(Structs, ShorterConfigMeansDefaults) {
    mep_buffer_config_t config = buffer_config(1);
    config.struct_size = offsetof(mep_buffer_config_t, payload_types);
    config.payload_types = 0xffffffff;  // beyond what struct_size covers
    config.rounds_in_flight_max = -5;
    const Alone alone(config);
    EXPECT_EQ(info_of(alone.buffer).rounds_in_flight_max, 2);
}

TEST_F(Structs, ShorterAnswerLeavesTheRestAlone) {
    const Alone alone(buffer_config(1));
    mep_buffer_info_t info{};
    info.struct_size = offsetof(mep_buffer_info_t, hidden);
    info.hidden = -7;
    info.handle_bytes = 77;
    EXPECT_EQ(mep_buffer_query(alone.buffer.get(), &info), MEP_OK);
    EXPECT_EQ(info.struct_size, offsetof(mep_buffer_info_t, hidden));
    EXPECT_EQ(info.token_count_max, 6);
    EXPECT_EQ(info.hidden, -7);
    EXPECT_EQ(info.handle_bytes, 77U);
}

TEST_F(Structs, ShorterDispatchArgsMeanDefaults) {
    const mep_buffer_config_t config = buffer_config(1);
    const Alone alone(config);
    const Plan plan = Plan::of(config, 1, 1);
    Share share(plan, 0);
    mep_dispatch_args_t args = share.dispatch_args();
    args.struct_size = offsetof(mep_dispatch_args_t, quant);
    args.quant = 1000;
    args.timeout_us = -1000;
    const Handle handle = make_handle(alone.buffer);
    EXPECT_EQ(mep_dispatch(alone.buffer.get(), handle.get(), &args), MEP_OK) << mep_last_error();
    EXPECT_TRUE(share.dispatched());
}

TEST_F(Structs, NewerCallerIsServedUnlessItSetsWhatWeDoNotKnow) {
    const Alone alone(buffer_config(1));
    Newer<mep_buffer_config_t> config{buffer_config(1), 0};
    config.known.struct_size = sizeof config;
    mep_buffer_t *buffer = nullptr;
    EXPECT_EQ(mep_buffer_create(alone.group.get(), &config.known, &buffer), MEP_OK);
    mep_buffer_destroy(buffer);
    buffer = nullptr;
    config.unknown = uint64_t{1} << 63;
    EXPECT_EQ(mep_buffer_create(alone.group.get(), &config.known, &buffer), MEP_UNSUPPORTED);
    EXPECT_EQ(buffer, nullptr);

    Newer<mep_group_config_t> group_of_newer{group_config(0, 1, nullptr), 1};
    group_of_newer.known.struct_size = sizeof group_of_newer;
    mep_group_t *group = nullptr;
    EXPECT_EQ(mep_group_create(&group_of_newer.known, &group), MEP_UNSUPPORTED);
    EXPECT_EQ(group, nullptr);
}

TEST_F(Structs, NewerCallersArgsAreServedUnlessTheySetWhatWeDoNotKnow) {
    const mep_buffer_config_t config = buffer_config(1);
    const Alone alone(config);
    const Handle handle = make_handle(alone.buffer);
    const Plan plan = Plan::of(config, 1, 2);
    Share share(plan, 0);
    Newer<mep_dispatch_args_t> dispatch{share.dispatch_args(), 1};
    dispatch.known.struct_size = sizeof dispatch;
    EXPECT_EQ(mep_dispatch(alone.buffer.get(), handle.get(), &dispatch.known), MEP_UNSUPPORTED);
    dispatch.unknown = 0;
    EXPECT_EQ(mep_dispatch(alone.buffer.get(), handle.get(), &dispatch.known), MEP_OK);
    Newer<mep_combine_args_t> combine{share.combine_args(), 1};
    combine.known.struct_size = sizeof combine;
    EXPECT_EQ(mep_combine(alone.buffer.get(), handle.get(), &combine.known), MEP_UNSUPPORTED);
    combine.unknown = 0;
    EXPECT_EQ(mep_combine(alone.buffer.get(), handle.get(), &combine.known), MEP_OK);
    EXPECT_TRUE(share.combined());
}

TEST_F(Structs, NewerAnswerKeepsItsTail) {
    const Alone alone(buffer_config(1));
    Newer<mep_buffer_counters_t> counters{{}, 77};
    counters.known.struct_size = sizeof counters;
    EXPECT_EQ(mep_buffer_query_counters(alone.buffer.get(), &counters.known), MEP_OK);
    EXPECT_EQ(counters.known.struct_size, sizeof counters);
    EXPECT_EQ(counters.unknown, 77U);
}

// ---- Log
// ------------------------------------------------------------------------------------------

struct Lines {
    std::mutex mutex;
    std::vector<std::pair<int32_t, std::string>> all;
};

void keep(void *context, int32_t level, const char *message) {
    Lines &lines = *static_cast<Lines *>(context);
    const std::lock_guard<std::mutex> lock(lines.mutex);
    lines.all.emplace_back(level, message);
}

TEST_F(Log, CallbackGetsLinesUpToItsLevel) {
    Lines lines;
    EXPECT_EQ(mep_log_set_callback(keep, &lines, MEP_LOG_INFO), MEP_OK);
    {
        const Alone alone(buffer_config(1));
    }
    EXPECT_FALSE(lines.all.empty());
    for (const auto &[level, line] : lines.all) {
        EXPECT_LE(level, MEP_LOG_INFO);
        EXPECT_NE(line, "");
        EXPECT_EQ(line.find('\n'), std::string::npos) << line;
    }
    lines.all.clear();
    EXPECT_EQ(mep_log_set_callback(keep, &lines, MEP_LOG_ERROR), MEP_OK);
    {
        const Alone alone(buffer_config(1));
    }
    EXPECT_TRUE(lines.all.empty());
}

// Takes itself off at the first line.
void keep_first(void *context, int32_t level, const char *message) {
    keep(context, level, message);
    EXPECT_EQ(mep_log_set_callback(keep, context, MEP_LOG_ERROR), MEP_OK);
}

TEST_F(Log, CallbackMayCallTheLibrary) {
    Lines lines;
    EXPECT_EQ(mep_log_set_callback(keep_first, &lines, MEP_LOG_INFO), MEP_OK);
    {
        const Alone alone(buffer_config(1));
    }
    EXPECT_EQ(lines.all.size(), 1U);
}

TEST_F(Log, UnknownLevelIsRefusedAndChangesNothing) {
    Lines lines;
    EXPECT_EQ(mep_log_set_callback(keep, &lines, MEP_LOG_INFO), MEP_OK);
    for (const int level : {0, -1, 5})
        EXPECT_EQ(mep_log_set_callback(nullptr, nullptr, level), MEP_INVALID_ARGUMENT);
    {
        const Alone alone(buffer_config(1));
    }
    EXPECT_FALSE(lines.all.empty());
}

}  // namespace
}  // namespace ep::test
