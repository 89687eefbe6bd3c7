#include "gpu/gpu.h"

#include <algorithm>

namespace gpu {
namespace {

constexpr int64_t kTimeoutUs = 30'000'000;

bool ok(mep_status_t status, const char *call, std::string *failure) {
    if (status == MEP_OK) return true;
    *failure = std::string(call) + ": " + mep_status_name(status) + ": " + mep_last_error();
    return false;
}

struct Objects {
    mep_group_t *group = nullptr;
    mep_buffer_t *buffer = nullptr;
    mep_handle_t *handle = nullptr;
    cudaStream_t stream = nullptr;

    Objects() = default;
    Objects(const Objects &) = delete;
    Objects &operator=(const Objects &) = delete;
    ~Objects() {
        if (stream != nullptr) cudaStreamDestroy(stream);
        mep_handle_destroy(handle);
        mep_buffer_destroy(buffer);
        mep_group_destroy(group);
    }
    bool create(const Problem &p, int rank, int backend, int device, mep_world_t *world,
                std::string *failure);
    bool barrier(std::string *failure) const;
};

bool Objects::create(const Problem &p, int rank, int backend, int device, mep_world_t *world,
                     std::string *failure) {
    const bool on_gpu = backend != MEP_BACKEND_CPU;
    mep_group_config_t group_config{};
    group_config.struct_size = sizeof group_config;
    group_config.rank = rank;
    group_config.rank_count = p.ranks;
    group_config.backend = backend;
    group_config.device_id = on_gpu ? device : 0;
    group_config.timeout_us = kTimeoutUs;
    group_config.world = world;
    mep_buffer_config_t config{};
    config.struct_size = sizeof config;
    config.token_count_max = p.tokens_max;
    config.hidden = p.hidden;
    config.expert_count = p.experts;
    config.topk_max = p.topk;
    config.payload_types = MEP_PAYLOAD_BF16 | MEP_PAYLOAD_FP16;
    if (p.type_bits == 32) config.payload_types |= MEP_PAYLOAD_FP32;
    if (p.quant != MEP_QUANT_NONE) config.payload_types |= MEP_PAYLOAD_FP8;
    config.cpu_thread_count = 1;
    // A stream that does not wait for the default one, on which other ranks of this GPU copy.
    if (on_gpu) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    return ok(mep_group_create(&group_config, &group), "mep_group_create", failure) &&
           ok(mep_buffer_create(group, &config, &buffer), "mep_buffer_create", failure) &&
           ok(mep_handle_create(buffer, &handle), "mep_handle_create", failure);
}

bool Objects::barrier(std::string *failure) const {
    mep_group_info_t info{};
    info.struct_size = sizeof info;
    mep_group_query(group, &info);
    const char mine = 0;
    std::vector<char> all(info.rank_count);
    return ok(mep_group_all_gather(group, &mine, all.data(), 1), "mep_group_all_gather", failure);
}

// The bytes of a random finite value of the problem's type, small enough for sums in fp16.
void put_random(const Problem &p, std::mt19937 &random, char *to) {
    const float value = static_cast<float>(int(random() % 4001) - 2000) / 1000.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (p.type_bits == 32) {
        std::memcpy(to, &bits, 4);
    } else if (p.type_code == MEP_TYPE_BFLOAT) {
        const auto half = static_cast<uint16_t>(bits >> 16);
        std::memcpy(to, &half, 2);
    } else {  // fp16 of 1.0 to 2.0, either sign
        const auto half = static_cast<uint16_t>(0x3c00 | (random() & 0x83ff));
        std::memcpy(to, &half, 2);
    }
}

}  // namespace

Inputs Inputs::of(const Problem &p, int rank, int round) {
    std::mt19937 random(p.seed * 1000003 + rank * 1009 + round);
    Inputs in;
    in.tokens = round % 3 == 2 ? int(random() % (p.tokens_max + 1)) : p.tokens_max;
    in.x.resize(size_t(in.tokens) * p.hidden * p.type_bits / 8);
    for (size_t i = 0; i < in.x.size(); i += p.type_bits / 8)
        put_random(p, random, &in.x[i]);
    for (int i = 0; i < in.tokens * p.topk; ++i) {
        in.idx.push_back(int32_t(random() % (p.experts + 2)) - 1);  // -1, and one out of range
        in.weights.push_back(static_cast<float>(random() % 1000) / 1000.0f);
    }
    return in;
}

namespace {

// The arrays of one round.
struct Round {
    Inputs in;
    Array x, idx, weights, out_x, scales, count, info, range, y, out;

    Round(const Problem &p, int rank, int number, bool on_gpu, int device)
        : in(Inputs::of(p, rank, number)),
          x(on_gpu, device, p.type_code, p.type_bits, {in.tokens, p.hidden}),
          idx(on_gpu, device, MEP_TYPE_INT, 32, {in.tokens, p.topk}),
          weights(on_gpu, device, MEP_TYPE_FLOAT, 32, {in.tokens, p.topk}),
          out_x(on_gpu, device, p.quant != 0 ? MEP_TYPE_FLOAT8_E4M3FN : p.type_code,
                p.quant != 0 ? 8 : p.type_bits, {p.local(), p.rows(), p.hidden}),
          scales(on_gpu, device, MEP_TYPE_FLOAT, 32, {p.local(), p.rows(), p.hidden / 128}),
          count(on_gpu, device, MEP_TYPE_INT, 32, {p.local()}),
          info(on_gpu, device, MEP_TYPE_INT, 32, {p.local(), p.rows()}),
          range(on_gpu, device, MEP_TYPE_INT, 64, {p.local(), p.ranks}),
          y(on_gpu, device, p.type_code, p.type_bits, {p.local(), p.rows(), p.hidden}),
          out(on_gpu, device, p.type_code, p.type_bits, {in.tokens, p.hidden}) {
        x.memory.put(in.x.data());
        idx.memory.put(in.idx.data());
        weights.memory.put(in.weights.data());
        // The experts' outputs: any rows will do, the same on both backends.
        std::mt19937 random(p.seed + rank);
        std::vector<char> outputs(y.memory.bytes());
        for (size_t i = 0; i < outputs.size(); i += p.type_bits / 8)
            put_random(p, random, &outputs[i]);
        y.memory.put(outputs.data());
    }

    bool launch(const Problem &p, const Objects &o, std::string *failure);
    void collect(int number, bool fp8, Results *results) const;
};

bool Round::launch(const Problem &p, const Objects &o, std::string *failure) {
    mep_dispatch_args_t d{};
    d.struct_size = sizeof d;
    d.x = &x.tensor;
    d.topk_idx = &idx.tensor;
    d.topk_weights = p.weights == Weights::kAtDispatch ? &weights.tensor : nullptr;
    d.out_x = &out_x.tensor;
    d.out_scales = p.quant != MEP_QUANT_NONE ? &scales.tensor : nullptr;
    d.out_count = &count.tensor;
    d.out_src_info = &info.tensor;
    d.out_layout_range = &range.tensor;
    d.quant = p.quant;
    d.stream = o.stream;
    mep_combine_args_t c{};
    c.struct_size = sizeof c;
    c.x = &y.tensor;
    c.topk_weights = p.weights == Weights::kAtCombine ? &weights.tensor : nullptr;
    c.out = &out.tensor;
    c.stream = o.stream;
    const std::vector<uint32_t> phases =
        p.in_halves ? std::vector<uint32_t>{MEP_PHASE_SEND, MEP_PHASE_RECEIVE}
                    : std::vector<uint32_t>{0};
    for (const uint32_t phase : phases) {
        d.phases = phase;
        if (!ok(mep_dispatch(o.buffer, o.handle, &d), "mep_dispatch", failure)) return false;
    }
    for (const uint32_t phase : phases) {
        c.phases = phase;
        if (!ok(mep_combine(o.buffer, o.handle, &c), "mep_combine", failure)) return false;
    }
    return true;
}

void Round::collect(int number, bool fp8, Results *results) const {
    const std::string text = " of round " + std::to_string(number);
    results->emplace_back("out_x" + text, out_x.memory.get());
    if (fp8) results->emplace_back("out_scales" + text, scales.memory.get());
    results->emplace_back("out_count" + text, count.memory.get());
    results->emplace_back("out_src_info" + text, info.memory.get());
    results->emplace_back("out_layout_range" + text, range.memory.get());
    results->emplace_back("out" + text, out.memory.get());
}

bool await(cudaStream_t stream, std::string *failure) {
    const cudaError_t error = stream == nullptr ? cudaSuccess : cudaStreamSynchronize(stream);
    if (error != cudaSuccess) *failure = std::string("stream: ") + cudaGetErrorString(error);
    return error == cudaSuccess;
}

}  // namespace

Results run_rank(const Problem &p, int rank, int backend, int device, mep_world_t *world,
                 std::string *failure) {
    const bool on_gpu = backend != MEP_BACKEND_CPU;
    if (on_gpu) cudaSetDevice(device);
    Objects o;
    if (!o.create(p, rank, backend, device, world, failure)) return {};
    std::vector<std::unique_ptr<Round>> rounds;
    for (int number = 0; number < p.rounds; ++number)
        rounds.push_back(std::make_unique<Round>(p, rank, number, on_gpu, device));
    if (on_gpu) cudaDeviceSynchronize();
    // Between these barriers nobody allocates or copies: that would wait for other ranks' kernels.
    if (!o.barrier(failure)) return {};
    for (const auto &round : rounds)
        if (!round->launch(p, o, failure)) return {};
    if (!await(o.stream, failure) || !o.barrier(failure)) return {};
    Results results;
    for (int number = 0; number < p.rounds; ++number)
        rounds[number]->collect(number, p.quant != MEP_QUANT_NONE, &results);
    mep_buffer_counters_t counters{};
    counters.struct_size = sizeof counters;
    if (!ok(mep_buffer_query_counters(o.buffer, &counters), "counters", failure)) return {};
    const auto *bytes = reinterpret_cast<const char *>(&counters);
    results.emplace_back("counters", std::vector<char>(bytes, bytes + sizeof counters));
    return o.barrier(failure) ? std::move(results) : Results{};  // nobody leaves early
}

std::string difference(const Results &cpu, const Results &gpu) {
    if (cpu.size() != gpu.size()) return "the number of arrays";
    for (size_t i = 0; i < cpu.size(); ++i) {
        if (cpu[i].second == gpu[i].second) continue;
        size_t at = 0;
        while (at < cpu[i].second.size() && cpu[i].second[at] == gpu[i].second[at])
            ++at;
        return cpu[i].first + " at byte " + std::to_string(at) + " of " +
               std::to_string(cpu[i].second.size());
    }
    return "";
}

}  // namespace gpu
