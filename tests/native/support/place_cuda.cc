// Ranks on GPUs, which are processes, so that any number of them may share a GPU: what one asks of
// its driver never waits for another's kernels. Arrays are pinned memory of the host, which kernels
// reach at the same address. See support/abi.h.
#include "support/abi.h"
#include "support/forked.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

#if !defined(EP_TEST_BACKEND)  // see gpu/gpu.h
#define EP_TEST_BACKEND MEP_BACKEND_CUDA
#endif

namespace ep::test {
namespace {

constexpr unsigned kSecondsMax = 100;

// This process's; -1 before it has one.
int device = -1;
cudaStream_t own_stream = nullptr;

// Ends the process: nothing of the test can go on.
void must(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    std::abort();
}

void fail_on_warning(void *, int32_t, const char *message) {
    ADD_FAILURE() << "logged: " << message;
}

}  // namespace

void be_rank(int rank) {
    mep_backend_info_t info{};
    info.struct_size = sizeof info;
    mep_backend_query(EP_TEST_BACKEND, &info);
    if (info.available == 0) skip_rank(std::string("no device here: ") + info.reason);
    device = rank % info.device_count;
    must(cudaSetDevice(device), "cudaSetDevice");
    must(cudaStreamCreateWithFlags(&own_stream, cudaStreamNonBlocking), "cudaStreamCreate");
    mep_log_set_callback(fail_on_warning, nullptr, MEP_LOG_WARNING);
    // Opens the device and loads the kernels, which takes what time the driver takes for it: tests
    // time calls that come later.
    make_group(group_config(0, 1, nullptr));
}

bool on_cpu() {
    return false;
}

mep_device_t tensor_device() {
    return {MEP_DEVICE_CUDA, device};
}

void choose_device(mep_group_config_t *config) {
    config->backend = EP_TEST_BACKEND;
    config->device_id = device;
}

Memory allocate(size_t bytes) {
    void *memory = nullptr;
    must(cudaMallocHost(&memory, bytes == 0 ? 1 : bytes), "cudaMallocHost");
    return {static_cast<char *>(memory), [](char *pinned) { cudaFreeHost(pinned); }};
}

void *stream() {
    return own_stream;
}

void finish() {
    must(cudaStreamSynchronize(own_stream), "the rank's stream");
}

std::function<void()> captured(const std::function<void()> &body) {
    cudaGraph_t graph = nullptr;
    must(cudaStreamBeginCapture(own_stream, cudaStreamCaptureModeThreadLocal), "begin of capture");
    body();
    must(cudaStreamEndCapture(own_stream, &graph), "end of capture");
    cudaGraphExec_t made = nullptr;
    must(cudaGraphInstantiateWithFlags(&made, graph, 0), "instantiation");
    must(cudaGraphDestroy(graph), "cudaGraphDestroy");
    const std::shared_ptr<CUgraphExec_st> replayed(made, cudaGraphExecDestroy);
    return [replayed] {
        must(cudaGraphLaunch(replayed.get(), own_stream), "launch of a graph");
        finish();
    };
}

void run_groups(int rank_count, const std::function<void(int, const Group &)> &body) {
    const Shared<IdOfGroup> id;
    run_forked(rank_count, kSecondsMax, [&](int rank) {
        be_rank(rank);
        mep_group_config_t config = group_config(rank, rank_count, nullptr);
        config.unique_id = &id->of(rank);
        body(rank, make_group(config));
    });
}

}  // namespace ep::test
