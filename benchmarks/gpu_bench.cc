// Times of dispatch and combine inside CUDA graphs, one process per rank:
//   gpu_bench RANKS TOKENS HIDDEN EXPERTS TOPK bf16|fp8|fp8_column [dispatch|combine [SMS]]
// where weights are given to dispatch or to combine, and a launch may fill so many multiprocessors.
// Scales of fp8_column have stride 1 along the rows, as matrix products of FP8 take them.
// Prints, in microseconds per round, the median, the best and the 99th percentile over the replays;
// each replay counts as its slowest rank.
#include "mooncake_ep.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace {

constexpr int kRoundsInGraph = 20, kReplays = 25, kWarmUps = 3;

void check(int status, const char *call) {
    if (status == MEP_OK) return;
    std::fprintf(stderr, "%s: %s: %s\n", call, mep_status_name(status), mep_last_error());
    std::exit(1);
}
void check(cudaError_t error, const char *call) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(error));
    std::exit(1);
}
#define CHECK(call) check((call), #call)

struct Shape {
    int ranks, tokens, hidden, experts, topk;
    bool fp8, scales_by_column, weights_at_combine;
    int sms;  // 0: all
};

struct DeviceArray {
    std::vector<int64_t> shape;
    mep_tensor_t tensor{};
    DeviceArray(int device, int code, int bits, std::vector<int64_t> dimensions,
                const void *from = nullptr)
        : shape(std::move(dimensions)) {
        size_t bytes = bits / 8;
        for (const int64_t extent : shape)
            bytes *= extent;
        CHECK(cudaMalloc(&tensor.data, bytes));
        if (from != nullptr)
            CHECK(cudaMemcpy(tensor.data, from, bytes, cudaMemcpyHostToDevice));
        else
            CHECK(cudaMemset(tensor.data, 0, bytes));
        tensor.device = {MEP_DEVICE_CUDA, device};
        tensor.ndim = static_cast<int32_t>(shape.size());
        tensor.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
        tensor.shape = shape.data();
    }
};

// Times a graph of kRoundsInGraph calls of `round`.
void time_rounds(const char *name, mep_group_t *group, const Shape &s, cudaStream_t stream,
                 const std::function<void()> &round) {
    mep_group_info_t info{};
    info.struct_size = sizeof info;
    CHECK(mep_group_query(group, &info));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kRoundsInGraph; ++i)
        round();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> slowest;
    std::vector<float> all(s.ranks);
    for (int replay = 0; replay < kWarmUps + kReplays; ++replay) {
        float mine = 0;
        CHECK(mep_group_all_gather(group, &mine, all.data(), sizeof mine));
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(executable, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaEventElapsedTime(&mine, begin, end));
        CHECK(mep_group_all_gather(group, &mine, all.data(), sizeof mine));
        if (replay >= kWarmUps)
            slowest.push_back(*std::max_element(all.begin(), all.end()) * 1000 / kRoundsInGraph);
    }
    std::sort(slowest.begin(), slowest.end());
    if (info.rank == 0)
        std::printf("%-18s median %8.2f us  min %8.2f  p99 %8.2f\n", name,
                    slowest[slowest.size() / 2], slowest.front(),
                    slowest[slowest.size() * 99 / 100]);
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(graph));
}

int run_rank(const Shape &s, int rank) {
    int devices = 0;
    CHECK(cudaGetDeviceCount(&devices));
    const int device = rank % devices;
    CHECK(cudaSetDevice(device));
    mep_group_t *group;
    mep_buffer_t *buffer;
    mep_handle_t *handle;
    mep_group_config_t group_config{};
    group_config.struct_size = sizeof group_config;
    group_config.backend = MEP_BACKEND_CUDA;
    group_config.device_id = device;
    group_config.timeout_us = 20'000'000;
    CHECK(mep_group_create(&group_config, &group));
    mep_buffer_config_t config{};
    config.struct_size = sizeof config;
    config.token_count_max = s.tokens;
    config.hidden = s.hidden;
    config.expert_count = s.experts;
    config.topk_max = s.topk;
    config.sm_count_max = s.sms;
    CHECK(mep_buffer_create(group, &config, &buffer));
    CHECK(mep_handle_create(buffer, &handle));

    std::mt19937 random(rank + 1);
    std::vector<uint16_t> values(size_t(s.tokens) * s.hidden);
    for (uint16_t &value : values)
        value = static_cast<uint16_t>(0x3f80 | (random() & 0x807f));
    std::vector<int64_t> ids;
    std::vector<float> gates(size_t(s.tokens) * s.topk, 0.25f);
    std::vector<int64_t> experts(s.experts);
    for (int i = 0; i < s.experts; ++i)
        experts[i] = i;
    for (int t = 0; t < s.tokens; ++t)
        for (int k = 0; k < s.topk; ++k) {
            std::swap(experts[k], experts[k + random() % (s.experts - k)]);
            ids.push_back(experts[k]);
        }
    const int64_t local = s.experts / s.ranks, rows = int64_t(s.ranks) * s.tokens;
    DeviceArray x(device, MEP_TYPE_BFLOAT, 16, {s.tokens, s.hidden}, values.data());
    DeviceArray idx(device, MEP_TYPE_INT, 64, {s.tokens, s.topk}, ids.data());
    DeviceArray weights(device, MEP_TYPE_FLOAT, 32, {s.tokens, s.topk}, gates.data());
    DeviceArray out_x(device, s.fp8 ? MEP_TYPE_FLOAT8_E4M3FN : MEP_TYPE_BFLOAT, s.fp8 ? 8 : 16,
                      {local, rows, s.hidden});
    int64_t groups = s.hidden / 128, by_column[] = {rows * groups, 1, rows};
    DeviceArray scales(device, MEP_TYPE_FLOAT, 32, {local, rows, groups});
    if (s.scales_by_column) scales.tensor.strides = by_column;
    DeviceArray count(device, MEP_TYPE_INT, 32, {local});
    DeviceArray info(device, MEP_TYPE_INT, 32, {local, rows});
    DeviceArray range(device, MEP_TYPE_INT, 64, {local, s.ranks});
    DeviceArray y(device, MEP_TYPE_BFLOAT, 16, {local, rows, s.hidden});
    DeviceArray out(device, MEP_TYPE_BFLOAT, 16, {s.tokens, s.hidden});
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    mep_dispatch_args_t d{};
    d.struct_size = sizeof d;
    d.x = &x.tensor;
    d.topk_idx = &idx.tensor;
    d.topk_weights = s.weights_at_combine ? nullptr : &weights.tensor;
    d.out_x = &out_x.tensor;
    d.out_scales = s.fp8 ? &scales.tensor : nullptr;
    d.out_count = &count.tensor;
    d.out_src_info = &info.tensor;
    d.out_layout_range = &range.tensor;
    d.quant = s.fp8 ? MEP_QUANT_FP8 : MEP_QUANT_NONE;
    d.stream = stream;
    mep_combine_args_t c{};
    c.struct_size = sizeof c;
    c.x = &y.tensor;
    c.topk_weights = s.weights_at_combine ? &weights.tensor : nullptr;
    c.out = &out.tensor;
    c.stream = stream;
    CHECK(mep_dispatch(buffer, handle, &d));
    CHECK(mep_combine(buffer, handle, &c));
    CHECK(cudaStreamSynchronize(stream));
    mep_buffer_info_t made{};
    made.struct_size = sizeof made;
    CHECK(mep_buffer_query(buffer, &made));
    if (rank == 0)
        std::printf("%-18s window %.2f MB a rank, handle %.2f MB\n", "memory",
                    static_cast<double>(made.window_bytes) / 1e6,
                    static_cast<double>(made.handle_bytes) / 1e6);
    const auto dispatch = [&] { CHECK(mep_dispatch(buffer, handle, &d)); };
    const auto combine = [&] { CHECK(mep_combine(buffer, handle, &c)); };
    time_rounds("dispatch", group, s, stream, dispatch);
    time_rounds("combine", group, s, stream, combine);
    time_rounds("dispatch+combine", group, s, stream, [&] {
        dispatch();
        combine();
    });
    char mine = 0;
    std::vector<char> all(s.ranks);
    CHECK(mep_group_all_gather(group, &mine, all.data(), 1));
    mep_handle_destroy(handle);
    mep_buffer_destroy(buffer);
    mep_group_destroy(group);
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 7) {
        std::fprintf(
            stderr,
            "usage: %s RANKS TOKENS HIDDEN EXPERTS TOPK bf16|fp8|fp8_column [dispatch|combine "
            "[SMS]]\n",
            argv[0]);
        return 2;
    }
    const Shape shape{std::atoi(argv[1]),
                      std::atoi(argv[2]),
                      std::atoi(argv[3]),
                      std::atoi(argv[4]),
                      std::atoi(argv[5]),
                      std::strncmp(argv[6], "fp8", 3) == 0,
                      std::strcmp(argv[6], "fp8_column") == 0,
                      argc > 7 && std::strcmp(argv[7], "combine") == 0,
                      argc > 8 ? std::atoi(argv[8]) : 0};
    std::printf("ranks=%d tokens=%d hidden=%d experts=%d topk=%d %s weights at %s", shape.ranks,
                shape.tokens, shape.hidden, shape.experts, shape.topk, argv[6],
                shape.weights_at_combine ? "combine" : "dispatch");
    std::printf(shape.sms != 0 ? " on %d multiprocessors\n" : "\n", shape.sms);
    std::fflush(stdout);
    const int port = 20000 + getpid() % 20000;
    for (int rank = 0; rank < shape.ranks; ++rank) {
        if (fork() != 0) continue;
        setenv("RANK", std::to_string(rank).c_str(), 1);
        setenv("WORLD_SIZE", argv[1], 1);
        setenv("MASTER_ADDR", "127.0.0.1", 1);
        setenv("MASTER_PORT", std::to_string(port).c_str(), 1);
        const int result = run_rank(shape, rank);
        std::fflush(stdout);
        _exit(result);
    }
    int failed = 0, status = 0;
    while (wait(&status) > 0)
        failed += !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return failed != 0;
}
