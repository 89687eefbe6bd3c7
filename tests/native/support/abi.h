// The C ABI for tests: owners for its objects, arrays that it can borrow, and one rank's share of a
// round, checked against the oracle. Experts are identities: combine gets dispatch's rows back.
// Where ranks compute is a file chosen by CMake: support/place_cpu.cc or support/place_cuda.cc.
#pragma once

#include "mooncake_ep.h"

#include "support/model.h"
#include "support/tokens.h"
#include "support/values.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <gtest/gtest.h>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace ep::test {

// ---- Place
// ----------------------------------------------------------------------------------------

// Where the ranks of this program compute.
bool on_cpu();

// Makes this process a rank, which takes a device; ends it if there is none. For ranks that a test
// forks itself.
void be_rank(int rank);

// This rank's device, in its thread: as tensors name it, and for the config of its group.
mep_device_t tensor_device();
void choose_device(mep_group_config_t *config);

// Memory that the kernels of this rank and the test reach at the same address.
using Memory = std::unique_ptr<char, void (*)(char *)>;
Memory allocate(size_t bytes);

// The stream of this rank's calls, and the end of what is queued on it.
void *stream();
void finish();

// What does again, whenever it is called, what `body` queues on that stream, to the end; on a GPU
// as replays of one graph.
std::function<void()> captured(const std::function<void()> &body);

// ---- Objects
// --------------------------------------------------------------------------------------

template <auto destroy>
struct Destroy {
    template <class T>
    void operator()(T *object) const {
        destroy(object);
    }
};
using World = std::unique_ptr<mep_world_t, Destroy<mep_world_destroy>>;
using Group = std::unique_ptr<mep_group_t, Destroy<mep_group_destroy>>;
using Buffer = std::unique_ptr<mep_buffer_t, Destroy<mep_buffer_destroy>>;
using Handle = std::unique_ptr<mep_handle_t, Destroy<mep_handle_destroy>>;

inline World make_world(int rank_count) {
    mep_world_t *world = nullptr;
    EXPECT_EQ(mep_world_create(rank_count, &world), MEP_OK) << mep_last_error();
    return World(world);
}

constexpr int64_t kTestTimeoutUs = 60'000'000;  // so that only a hang reaches it

inline mep_group_config_t group_config(int rank, int rank_count, mep_world_t *world) {
    mep_group_config_t config{};
    config.struct_size = sizeof config;
    config.rank = rank;
    config.rank_count = rank_count;
    config.timeout_us = kTestTimeoutUs;
    config.world = world;
    choose_device(&config);
    return config;
}

inline Group make_group(const mep_group_config_t &config) {
    mep_group_t *group = nullptr;
    EXPECT_EQ(mep_group_create(&config, &group), MEP_OK) << mep_last_error();
    return Group(group);
}

inline Buffer make_buffer(const Group &group, const mep_buffer_config_t &config) {
    mep_buffer_t *buffer = nullptr;
    EXPECT_EQ(mep_buffer_create(group.get(), &config, &buffer), MEP_OK) << mep_last_error();
    return Buffer(buffer);
}

inline Handle make_handle(const Buffer &buffer) {
    mep_handle_t *handle = nullptr;
    EXPECT_EQ(mep_handle_create(buffer.get(), &handle), MEP_OK) << mep_last_error();
    return Handle(handle);
}

inline mep_buffer_config_t buffer_config(int rank_count) {
    mep_buffer_config_t config{};
    config.struct_size = sizeof config;
    config.token_count_max = 6;
    config.hidden = 128;
    config.expert_count = 4 * rank_count;
    config.topk_max = 4;
    config.cpu_thread_count = 1;
    return config;
}

inline mep_buffer_counters_t counters_of(const Buffer &buffer) {
    mep_buffer_counters_t counters{};
    counters.struct_size = sizeof counters;
    EXPECT_EQ(mep_buffer_query_counters(buffer.get(), &counters), MEP_OK);
    return counters;
}

// body(rank, group) for each rank of a group, all at the same time; on a GPU each in a process.
void run_groups(int rank_count, const std::function<void(int, const Group &)> &body);

// body(rank) on a thread for each rank.
inline void run_ranks(int rank_count, const std::function<void(int)> &body) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < rank_count; ++rank)
        threads.emplace_back(body, rank);
    for (std::thread &thread : threads)
        thread.join();
}

// ---- Arrays
// ---------------------------------------------------------------------------------------

constexpr mep_dtype_t kBfloat16{MEP_TYPE_BFLOAT, 16, 1}, kFloat16{MEP_TYPE_FLOAT, 16, 1},
    kFloat32{MEP_TYPE_FLOAT, 32, 1}, kFloat8{MEP_TYPE_FLOAT8_E4M3FN, 8, 1},
    kInt32{MEP_TYPE_INT, 32, 1}, kInt64{MEP_TYPE_INT, 64, 1}, kUint8{MEP_TYPE_UINT, 8, 1};

// An array of its own memory, at first all ones: NaN or -1. Any part of what the library sees of it
// may be changed.
class Tensor {
  public:
    Tensor() = default;
    Tensor(mep_dtype_t type, std::vector<int64_t> shape) : dtype(type), shape(std::move(shape)) {
        bytes_ = dtype.bits / 8;
        for (const int64_t extent : this->shape)
            bytes_ *= extent;
        memory_ = allocate(bytes_);
        poison();
    }

    mep_dtype_t dtype{};
    std::vector<int64_t> shape, strides;  // no strides: NULL
    mep_device_t device = tensor_device();
    uint64_t byte_offset = 0;
    bool without_data = false, without_shape = false;

    template <class T = char>
    T *data() {
        return reinterpret_cast<T *>(memory_.get());
    }
    void poison() { std::fill_n(memory_.get(), bytes_, char(0xff)); }
    template <class T>
    void fill(const std::vector<T> &values) {
        ASSERT_EQ(values.size() * sizeof(T), bytes_);
        if (!values.empty()) std::memcpy(memory_.get(), values.data(), bytes_);
    }

    // Valid until this object changes.
    const mep_tensor_t *view() {
        view_ = {without_data ? nullptr : memory_.get(),
                 device,
                 int32_t(shape.size()),
                 dtype,
                 without_shape ? nullptr : shape.data(),
                 strides.empty() ? nullptr : strides.data(),
                 byte_offset};
        return &view_;
    }

  private:
    size_t bytes_ = 0;
    Memory memory_{nullptr, [](char *) {}};
    mep_tensor_t view_{};
};

// ---- Calls
// ----------------------------------------------------------------------------------------

// On the rank's stream; what is queued there is done when these return.
inline mep_status_t dispatch(const Buffer &buffer, const Handle &handle, mep_dispatch_args_t args) {
    args.stream = stream();
    const mep_status_t status = mep_dispatch(buffer.get(), handle.get(), &args);
    finish();
    return status;
}
inline mep_status_t combine(const Buffer &buffer, const Handle &handle, mep_combine_args_t args) {
    args.stream = stream();
    const mep_status_t status = mep_combine(buffer.get(), handle.get(), &args);
    finish();
    return status;
}

// ---- A round
// --------------------------------------------------------------------------------------

// What all ranks know of a round, so that each can check its own share alone.
struct Plan {
    mep_buffer_config_t config;
    int rank_count;
    uint64_t seed;
    std::vector<Tokens> tokens;             // [rank]
    std::vector<std::vector<Packed>> rows;  // [global expert]
    std::vector<char> lost;                 // [rank] takes no part

    // Of any number of tokens, or `full`: as many as a rank may have.
    static Plan of(const mep_buffer_config_t &config, int rank_count, uint64_t seed,
                   const std::vector<int> &lost = {}, bool full = false) {
        Plan plan{config, rank_count, seed, {}, {}, std::vector<char>(rank_count)};
        std::mt19937_64 random(seed);
        for (const int rank : lost)
            plan.lost[rank] = 1;
        for (int rank = 0; rank < rank_count; ++rank) {
            const int any = int(random() % (config.token_count_max + 1));
            const int count = full ? config.token_count_max : any;
            plan.tokens.push_back(random_tokens(&random, plan.lost[rank] ? 0 : count,
                                                config.topk_max, config.expert_count, 64));
        }
        plan.rows = model_dispatch(plan.tokens, config.expert_count);
        return plan;
    }

    int local_experts() const { return config.expert_count / rank_count; }
    int64_t region() const { return int64_t{rank_count} * config.token_count_max; }
    float value(int rank, int token, int channel) const {
        return rounded(Element::kBf16,
                       real_value({seed, uint64_t(rank), uint64_t(token), uint64_t(channel)}));
    }
};

// One rank's arrays: bfloat16 rows, int64 choices.
struct Share {
    Share(const Plan &plan, int rank) : plan(plan), rank(rank) {
        const Tokens &mine = plan.tokens[rank];
        const int64_t experts = plan.local_experts(), hidden = plan.config.hidden;
        x = Tensor(kBfloat16, {mine.count, hidden});
        topk_idx = Tensor(kInt64, {mine.count, mine.topk});
        topk_weights = Tensor(kFloat32, {mine.count, mine.topk});
        out_x = Tensor(kBfloat16, {experts, plan.region(), hidden});
        out_count = Tensor(kInt32, {experts});
        out_src_info = Tensor(kInt32, {experts, plan.region()});
        out_layout_range = Tensor(kInt64, {experts, plan.rank_count});
        out = Tensor(kBfloat16, {mine.count, hidden});
        fill();
    }

    // The inputs as the plan has them now, if it is another with as many tokens.
    void fill() {
        const Tokens &mine = plan.tokens[rank];
        const int hidden = plan.config.hidden;
        for (int token = 0; token < mine.count; ++token)
            for (int h = 0; h < hidden; ++h)
                write_element(Element::kBf16, x.data(), token * hidden + h,
                              plan.value(rank, token, h));
        topk_idx.fill(mine.topk_idx);
        topk_weights.fill(mine.weights);
    }

    mep_dispatch_args_t dispatch_args(uint32_t phases = 0) {
        mep_dispatch_args_t args{};
        args.struct_size = sizeof args;
        args.phases = phases;
        args.x = x.view();
        args.topk_idx = topk_idx.view();
        args.topk_weights = weights_at_combine ? nullptr : topk_weights.view();
        args.out_x = out_x.view();
        args.out_count = out_count.view();
        args.out_src_info = out_src_info.view();
        args.out_layout_range = out_layout_range.view();
        return args;
    }
    mep_combine_args_t combine_args(uint32_t phases = 0) {
        mep_combine_args_t args{};
        args.struct_size = sizeof args;
        args.phases = phases;
        args.x = out_x.view();
        args.topk_weights = weights_at_combine ? topk_weights.view() : nullptr;
        args.out = out.view();
        return args;
    }

    mep_status_t dispatch(const Buffer &buffer, const Handle &handle, uint32_t phases = 0) {
        return test::dispatch(buffer, handle, dispatch_args(phases));
    }
    mep_status_t combine(const Buffer &buffer, const Handle &handle, uint32_t phases = 0) {
        return test::combine(buffer, handle, combine_args(phases));
    }

    // Do the outputs of dispatch agree with the oracle?
    ::testing::AssertionResult dispatched();
    // Tokens that chose an expert of the spoiled rank are not looked at.
    ::testing::AssertionResult combined(int spoiled = -1);

    const Plan &plan;
    int rank;
    bool weights_at_combine = false;
    Tensor x, topk_idx, topk_weights, out_x, out_count, out_src_info, out_layout_range, out;
};

inline ::testing::AssertionResult Share::dispatched() {
    const int hidden = plan.config.hidden;
    for (int e = 0; e < plan.local_experts(); ++e) {
        const std::vector<Packed> &rows = plan.rows[rank * plan.local_experts() + e];
        const auto wrong = [&] {
            return ::testing::AssertionFailure()
                   << "rank " << rank << ", local expert " << e << ": ";
        };
        if (out_count.data<int32_t>()[e] != int(rows.size()))
            return wrong() << "count " << out_count.data<int32_t>()[e] << ", not " << rows.size();
        std::vector<int64_t> counts(plan.rank_count);
        for (size_t i = 0; i < rows.size(); ++i) {
            const size_t at = e * plan.region() + i;
            ++counts[rows[i].source];
            if (out_src_info.data<int32_t>()[at] != rows[i].token)
                return wrong() << "src_info of row " << i;
            for (int h = 0; h < hidden; ++h)
                if (read_element(Element::kBf16, out_x.data() + at * hidden * 2, h) !=
                    plan.value(rows[i].source, rows[i].token, h))
                    return wrong() << "row " << i << ", channel " << h;
        }
        int64_t begin = 0;
        for (int source = 0; source < plan.rank_count; begin += counts[source++])
            if (out_layout_range.data<int64_t>()[e * plan.rank_count + source] !=
                (begin << 32 | counts[source]))
                return wrong() << "layout range of source " << source;
    }
    return ::testing::AssertionSuccess();
}

inline ::testing::AssertionResult Share::combined(int spoiled) {
    const Tokens &mine = plan.tokens[rank];
    const int hidden = plan.config.hidden, experts = plan.local_experts();
    for (int token = 0; token < mine.count; ++token) {
        const int64_t *chosen = &mine.topk_idx[size_t(token) * mine.topk];
        const auto is_spoiled = [&](int64_t expert) {
            return expert >= 0 && expert / experts == spoiled;
        };
        if (std::any_of(chosen, chosen + mine.topk, is_spoiled)) continue;
        for (int h = 0; h < hidden; ++h) {
            double magnitude = 0;
            const auto value = [&](int expert) {
                const bool there = plan.lost[expert / plan.local_experts()] == 0;
                const double exact = there ? plan.value(rank, token, h) : 0;
                magnitude += std::abs(exact);
                return exact;
            };
            const double expected = model_combine(mine, plan.config.expert_count, token, value);
            const double got = read_element(Element::kBf16, out.data(), token * hidden + h);
            if (!(std::abs(got - expected) <= 2 * magnitude * 0x1p-8 + 1e-6))
                return ::testing::AssertionFailure() << "rank " << rank << ", token " << token
                                                     << ": " << got << ", not " << expected;
        }
    }
    return ::testing::AssertionSuccess();
}

// One whole round of one rank, on a handle of its own.
inline void expect_round(const Buffer &buffer, const Plan &plan, int rank) {
    SCOPED_TRACE("seed " + std::to_string(plan.seed));
    Share share(plan, rank);
    const Handle handle = make_handle(buffer);
    EXPECT_EQ(share.dispatch(buffer, handle), MEP_OK) << mep_last_error();
    EXPECT_TRUE(share.dispatched());
    EXPECT_EQ(share.combine(buffer, handle), MEP_OK) << mep_last_error();
    EXPECT_TRUE(share.combined());
}

}  // namespace ep::test
