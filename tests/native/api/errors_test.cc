// Every call that the header says is refused: with which status, which words, and that nothing has
// happened, so that a good round works right after it.
#include "support/abi.h"
#include "support/tidy.h"

#include <functional>
#include <string>
#include <vector>

namespace ep::test {
namespace {

using Refused = Tidy;
using Words = std::vector<const char *>;

void expect_refused(mep_status_t got, mep_status_t expected, const Words &words) {
    EXPECT_EQ(got, expected) << mep_last_error();
    const std::string message = mep_last_error();
    for (const char *word : words)
        EXPECT_NE(message.find(word), std::string::npos) << "no \"" << word << "\" in: " << message;
}

Plan plan_with_tokens(const mep_buffer_config_t &config, int rank_count) {
    uint64_t seed = 1;
    while (Plan::of(config, rank_count, seed).tokens[0].count < 3)
        ++seed;
    return Plan::of(config, rank_count, seed);
}

// A good call, for a case to spoil one thing of it.
struct Attempt {
    Attempt(const Plan &plan, const Buffer &buffer, const Handle &handle)
        : share(plan, 0), buffer(buffer.get()), handle(handle.get()) {
        const Tokens &mine = plan.tokens[0];
        const int64_t experts = plan.local_experts(), groups = plan.config.hidden / 128;
        active = Tensor(kInt32, {plan.rank_count});
        active.fill(std::vector<int32_t>(plan.rank_count, 1));
        x_scales = Tensor(kFloat32, {mine.count, groups});
        out_scales = Tensor(kFloat32, {experts, plan.region(), groups});
        dispatch = share.dispatch_args();
        combine = share.combine_args();
    }

    // Switches to rows that are float8_e4m3fn already.
    void bring_fp8() {
        share.x.dtype = share.out_x.dtype = kFloat8;
        dispatch.x_scales = x_scales.view();
        dispatch.out_scales = out_scales.view();
    }
    void quantize() {
        dispatch.quant = MEP_QUANT_FP8;
        share.out_x.dtype = kFloat8;
        dispatch.out_scales = out_scales.view();
    }

    // After changes to the arrays.
    void refresh() {
        for (Tensor *tensor : {&share.x, &share.topk_idx, &share.topk_weights, &share.out_x,
                               &share.out_count, &share.out_src_info, &share.out_layout_range,
                               &share.out, &active, &x_scales, &out_scales})
            tensor->view();
    }
    mep_status_t call_dispatch() {
        refresh();
        return mep_dispatch(buffer, handle, &dispatch);
    }
    mep_status_t call_combine() {
        refresh();
        return mep_combine(buffer, handle, &combine);
    }

    Share share;
    Tensor active, x_scales, out_scales;
    mep_dispatch_args_t dispatch;
    mep_combine_args_t combine;
    mep_buffer_t *buffer;
    mep_handle_t *handle;
};

struct Case {
    const char *name;
    void (*spoil)(Attempt &);
    Words words;
    mep_status_t status = MEP_INVALID_ARGUMENT;
};

// ---- What an array may not be
// ---------------------------------------------------------------------

const Case kBadDispatches[] = {
    {"no buffer", [](Attempt &a) { a.buffer = nullptr; }, {"buffer is NULL"}},
    {"no handle", [](Attempt &a) { a.handle = nullptr; }, {"handle is NULL"}},
    {"no size", [](Attempt &a) { a.dispatch.struct_size = 0; }, {"args.struct_size is 0"}},
    {"phases", [](Attempt &a) { a.dispatch.phases = 5; }, {"args.phases is 0x5"}},
    {"quant", [](Attempt &a) { a.dispatch.quant = 3; }, {"args.quant is 3"}},
    {"timeout", [](Attempt &a) { a.dispatch.timeout_us = -2; }, {"args.timeout_us is -2"}},

    {"no x", [](Attempt &a) { a.dispatch.x = nullptr; }, {"x is NULL"}},
    {"x of 1 dimension", [](Attempt &a) { a.share.x.shape = {128}; }, {"x has 1 dim"}},
    {"x of 3 dimensions", [](Attempt &a) { a.share.x.shape = {1, 1, 128}; }, {"x has 3 dim"}},
    {"x of no shape", [](Attempt &a) { a.share.x.without_shape = true; }, {"x.shape is NULL"}},
    {"x of no data", [](Attempt &a) { a.share.x.without_data = true; }, {"x.data is NULL"}},
    {"x on a GPU", [](Attempt &a) { a.share.x.device = {MEP_DEVICE_CUDA, 3}; }, {"x is on", "2:3"}},
    {"x of integers", [](Attempt &a) { a.share.x.dtype = kInt32; }, {"x is int32"}},
    {"x of doubles", [](Attempt &a) { a.share.x.dtype.bits = 64; }, {"x is bfloat64"}},
    {"x of lanes", [](Attempt &a) { a.share.x.dtype.lanes = 2; }, {"x is bfloat16 x 2"}},
    {"x of a type not asked for",
     [](Attempt &a) { a.share.x.dtype = kFloat16; },
     {"x", "MEP_PAYLOAD_FP16"}},
    {"x too narrow", [](Attempt &a) { a.share.x.shape[1] = 120; }, {"x has shape", "120]"}},
    {"x too long", [](Attempt &a) { a.share.x.shape[0] = 7; }, {"x has 7 tokens", "6"}},
    {"x below zero", [](Attempt &a) { a.share.x.shape[0] = -1; }, {"x has shape [-1, 128]"}},
    {"x beyond all memory",
     [](Attempt &a) { a.share.x.shape = {int64_t{1} << 40, int64_t{1} << 40}; },
     {"x has shape"}},
    {"x with gaps", [](Attempt &a) { a.share.x.strides = {256, 2}; }, {"x has strides [256, 2]"}},
    {"x backwards", [](Attempt &a) { a.share.x.strides = {-128, 1}; }, {"x has stride -128"}},
    {"x of rows that overlap", [](Attempt &a) { a.share.x.strides = {120, 1}; }, {"x", "120"}},
    {"x of crooked rows", [](Attempt &a) { a.share.x.strides = {132, 1}; }, {"x", "264"}},
    {"x at an odd place", [](Attempt &a) { a.share.x.byte_offset = 8; }, {"x.data is at", "16"}},

    {"scales of bfloat16",
     [](Attempt &a) { a.dispatch.x_scales = a.x_scales.view(); },
     {"x_scales is given"}},
    {"float8 without scales",
     [](Attempt &a) {
         a.bring_fp8();
         a.dispatch.x_scales = nullptr;
     },
     {"x_scales is NULL"}},
    {"float8 again",
     [](Attempt &a) {
         a.bring_fp8();
         a.dispatch.quant = MEP_QUANT_FP8;
     },
     {"args.quant is 1", "float8_e4m3fn already"}},
    {"scales of another shape",
     [](Attempt &a) {
         a.bring_fp8();
         a.x_scales.shape[1] = 2;
     },
     {"x_scales has shape"}},
    {"scales of another type",
     [](Attempt &a) {
         a.bring_fp8();
         a.x_scales.dtype = kInt32;
     },
     {"x_scales is int32", "float32"}},
    {"scales at an odd place",
     [](Attempt &a) {
         a.bring_fp8();
         a.x_scales.byte_offset = 1;
     },
     {"x_scales"}},

    {"no choices", [](Attempt &a) { a.dispatch.topk_idx = nullptr; }, {"topk_idx is NULL"}},
    {"choices of 1 dimension",
     [](Attempt &a) { a.share.topk_idx.shape = {4}; },
     {"topk_idx has 1 dim"}},
    {"choices of floats",
     [](Attempt &a) { a.share.topk_idx.dtype = kFloat32; },
     {"topk_idx is float32"}},
    {"choices of shorts",
     [](Attempt &a) { a.share.topk_idx.dtype.bits = 16; },
     {"topk_idx is int16"}},
    {"choices of other tokens",
     [](Attempt &a) { a.share.topk_idx.shape[0] -= 1; },
     {"topk_idx has shape"}},
    {"no choice a token", [](Attempt &a) { a.share.topk_idx.shape[1] = 0; }, {"topk_idx has 0"}},
    {"too many choices",
     [](Attempt &a) { a.share.topk_idx.shape[1] = 5; },
     {"topk_idx has 5", "[1, 4]"}},
    {"choices with gaps",
     [](Attempt &a) { a.share.topk_idx.strides = {8, 1}; },
     {"topk_idx has strides [8, 1]"}},
    {"choices on a GPU",
     [](Attempt &a) { a.share.topk_idx.device.device_type = MEP_DEVICE_CUDA; },
     {"topk_idx is on"}},
    {"choices at an odd place", [](Attempt &a) { a.share.topk_idx.byte_offset = 4; }, {"topk_idx"}},
    {"weights of halves",
     [](Attempt &a) { a.share.topk_weights.dtype = kFloat16; },
     {"topk_weights is float16", "float32"}},
    {"weights of another K",
     [](Attempt &a) { a.share.topk_weights.shape[1] = 3; },
     {"topk_weights has shape"}},
    {"weights with gaps",
     [](Attempt &a) { a.share.topk_weights.strides = {1, 4}; },
     {"topk_weights has strides [1, 4]"}},
    {"weights of 1 dimension",
     [](Attempt &a) { a.share.topk_weights.shape = {4}; },
     {"topk_weights has 1 dim"}},
    {"weights at an odd place",
     [](Attempt &a) { a.share.topk_weights.byte_offset = 2; },
     {"topk_weights"}},

    {"no out_x", [](Attempt &a) { a.dispatch.out_x = nullptr; }, {"out_x is NULL"}},
    {"out_x of another type",
     [](Attempt &a) { a.share.out_x.dtype = kFloat16; },
     {"out_x is float16"}},
    {"out_x of fewer experts",
     [](Attempt &a) { a.share.out_x.shape[0] -= 1; },
     {"out_x has shape [3,"}},
    {"out_x of fewer rows", [](Attempt &a) { a.share.out_x.shape[1] -= 1; }, {"out_x has shape"}},
    {"out_x of 2 dimensions",
     [](Attempt &a) { a.share.out_x.shape = {48, 128}; },
     {"out_x has 2 dim"}},
    {"out_x with gaps",
     [](Attempt &a) { a.share.out_x.strides = {12 * 256, 256, 1}; },
     {"out_x has strides"}},
    {"out_x at an odd place",
     [](Attempt &a) { a.share.out_x.byte_offset = 4; },
     {"out_x.data is at"}},
    {"out_x on a GPU",
     [](Attempt &a) { a.share.out_x.device.device_type = MEP_DEVICE_CUDA; },
     {"out_x is on"}},
    {"out_x of bfloat16 for quant",
     [](Attempt &a) {
         a.quantize();
         a.share.out_x.dtype = kBfloat16;
     },
     {"out_x is bfloat16", "args.quant"}},
    {"quant without scales",
     [](Attempt &a) {
         a.quantize();
         a.dispatch.out_scales = nullptr;
     },
     {"out_scales is NULL"}},
    {"out_scales of bfloat16",
     [](Attempt &a) { a.dispatch.out_scales = a.out_scales.view(); },
     {"out_scales is given"}},
    {"out_scales of another shape",
     [](Attempt &a) {
         a.quantize();
         a.out_scales.shape[1] += 1;
     },
     {"out_scales has shape"}},
    {"out_scales of another type",
     [](Attempt &a) {
         a.quantize();
         a.out_scales.dtype = kFloat16;
     },
     {"out_scales is float16"}},
    {"no out_count", [](Attempt &a) { a.dispatch.out_count = nullptr; }, {"out_count is NULL"}},
    {"out_count of longs",
     [](Attempt &a) { a.share.out_count.dtype = kInt64; },
     {"out_count is int64", "int32"}},
    {"out_count of fewer experts",
     [](Attempt &a) { a.share.out_count.shape = {3}; },
     {"out_count has shape [3]", "[4]"}},
    {"out_count with gaps",
     [](Attempt &a) { a.share.out_count.strides = {2}; },
     {"out_count has strides"}},
    {"out_count at an odd place",
     [](Attempt &a) { a.share.out_count.byte_offset = 2; },
     {"out_count"}},
    {"out_src_info of longs",
     [](Attempt &a) { a.share.out_src_info.dtype = kInt64; },
     {"out_src_info is int64"}},
    {"out_src_info of fewer rows",
     [](Attempt &a) { a.share.out_src_info.shape[1] -= 1; },
     {"out_src_info has shape"}},
    {"out_layout_range of ints",
     [](Attempt &a) { a.share.out_layout_range.dtype = kInt32; },
     {"out_layout_range is int32"}},
    {"out_layout_range of more ranks",
     [](Attempt &a) { a.share.out_layout_range.shape[1] += 1; },
     {"out_layout_range has shape"}},

    {"active_ranks of longs",
     [](Attempt &a) {
         a.dispatch.active_ranks = a.active.view();
         a.active.dtype = kInt64;
     },
     {"active_ranks is int64"}},
    {"too few active_ranks",
     [](Attempt &a) {
         a.dispatch.active_ranks = a.active.view();
         a.active.shape = {1};
     },
     {"active_ranks has 1"}},
    {"active_ranks of 2 dimensions",
     [](Attempt &a) {
         a.dispatch.active_ranks = a.active.view();
         a.active.shape = {1, 2};
     },
     {"active_ranks has 2 dim"}},
    {"active_ranks with gaps",
     [](Attempt &a) {
         a.dispatch.active_ranks = a.active.view();
         a.active.strides = {0};
     },
     {"active_ranks has strides [0]"}},
};

const Case kBadCombines[] = {
    {"no buffer", [](Attempt &a) { a.buffer = nullptr; }, {"buffer is NULL"}},
    {"no handle", [](Attempt &a) { a.handle = nullptr; }, {"handle is NULL"}},
    {"no size", [](Attempt &a) { a.combine.struct_size = 3; }, {"args.struct_size is 3"}},
    {"phases", [](Attempt &a) { a.combine.phases = 8; }, {"args.phases is 0x8"}},
    {"timeout", [](Attempt &a) { a.combine.timeout_us = -9; }, {"args.timeout_us is -9"}},
    {"no x", [](Attempt &a) { a.combine.x = nullptr; }, {"x is NULL"}},
    {"x of 2 dimensions", [](Attempt &a) { a.share.out_x.shape = {48, 128}; }, {"x has 2 dim"}},
    {"x of no data", [](Attempt &a) { a.share.out_x.without_data = true; }, {"x.data is NULL"}},
    {"x on a GPU",
     [](Attempt &a) { a.share.out_x.device.device_type = MEP_DEVICE_CUDA; },
     {"x is on"}},
    {"x of float8",
     [](Attempt &a) { a.share.out_x.dtype = kFloat8; },
     {"x is float8_e4m3fn", "bfloat16, float16 or float32"}},
    {"x of bytes", [](Attempt &a) { a.share.out_x.dtype = kUint8; }, {"x is uint8"}},
    {"x of integers", [](Attempt &a) { a.share.out_x.dtype = kInt32; }, {"x is int32"}},
    {"x of float32",
     [](Attempt &a) { a.share.out_x.dtype = kFloat32; },
     {"x is float32", "fp32_partials"}},
    {"x of more rows", [](Attempt &a) { a.share.out_x.shape[1] += 1; }, {"x has shape"}},
    {"x too narrow", [](Attempt &a) { a.share.out_x.shape[2] = 64; }, {"x has shape"}},
    {"x with gaps",
     [](Attempt &a) { a.share.out_x.strides = {12 * 256, 256, 1}; },
     {"x has strides"}},
    {"x at an odd place", [](Attempt &a) { a.share.out_x.byte_offset = 2; }, {"x.data is at"}},
    {"weights of ints",
     [](Attempt &a) {
         a.combine.topk_weights = a.share.topk_weights.view();
         a.share.topk_weights.dtype = kInt32;
     },
     {"topk_weights is int32"}},
    {"weights of another K",
     [](Attempt &a) {
         a.combine.topk_weights = a.share.topk_weights.view();
         a.share.topk_weights.shape[1] = 2;
     },
     {"topk_weights has shape"}},
    {"no out", [](Attempt &a) { a.combine.out = nullptr; }, {"out is NULL"}},
    {"out of another type",
     [](Attempt &a) { a.share.out.dtype = kFloat16; },
     {"out is float16", "type of x"}},
    {"out of other tokens", [](Attempt &a) { a.share.out.shape[0] -= 1; }, {"out has shape"}},
    {"out too narrow", [](Attempt &a) { a.share.out.shape[1] = 64; }, {"out has shape"}},
    {"out with gaps", [](Attempt &a) { a.share.out.strides = {256, 2}; }, {"out has strides"}},
    {"out of rows that overlap", [](Attempt &a) { a.share.out.strides = {0, 1}; }, {"out", "0"}},
    {"out at an odd place", [](Attempt &a) { a.share.out.byte_offset = 2; }, {"out.data is at"}},
    {"out on a GPU",
     [](Attempt &a) { a.share.out.device.device_type = MEP_DEVICE_CUDA; },
     {"out is on"}},
    {"too few active_ranks",
     [](Attempt &a) {
         a.combine.active_ranks = a.active.view();
         a.active.shape = {1};
     },
     {"active_ranks has 1"}},
};

// Two ranks, of which rank 0 also tries what each case says. Had a refused call sent anything, the
// next round would mix them up.
template <size_t kCount>
void expect_all_refused(const Case (&cases)[kCount], mep_status_t (Attempt::*call)()) {
    const mep_buffer_config_t config = buffer_config(2);
    const Plan plan = plan_with_tokens(config, 2);
    const World world = make_world(2);
    run_ranks(2, [&](int rank) {
        const Group group = make_group(group_config(rank, 2, world.get()));
        const Buffer buffer = make_buffer(group, config);
        const Handle handle = make_handle(buffer);
        Share good(plan, rank);
        EXPECT_EQ(good.dispatch(buffer, handle), MEP_OK);  // for combine to have one
        for (const Case &one : cases) {
            SCOPED_TRACE(one.name);
            if (rank == 0) {
                const mep_buffer_counters_t before = counters_of(buffer);
                Attempt attempt(plan, buffer, handle);
                one.spoil(attempt);
                expect_refused((attempt.*call)(), one.status, one.words);
                const mep_buffer_counters_t after = counters_of(buffer);
                EXPECT_EQ(std::memcmp(&before, &after, sizeof before), 0);
            }
            EXPECT_EQ(good.combine(buffer, handle), MEP_OK) << mep_last_error();
            EXPECT_TRUE(good.combined());
            expect_round(buffer, plan, rank);
        }
    });
}

TEST_F(Refused, DispatchOfBadArguments) {
    expect_all_refused(kBadDispatches, &Attempt::call_dispatch);
}

TEST_F(Refused, CombineOfBadArguments) {
    expect_all_refused(kBadCombines, &Attempt::call_combine);
}

// ---- What may not be done now
// ---------------------------------------------------------------------

// One rank with F rounds in flight, and what the tests of states need.
struct Alone {
    explicit Alone(int rounds_in_flight)
        : config(with(rounds_in_flight)),
          plan(plan_with_tokens(config, 1)),
          group(make_group(group_config(0, 1, nullptr))),
          buffer(make_buffer(group, config)) {}

    static mep_buffer_config_t with(int rounds_in_flight) {
        mep_buffer_config_t config = buffer_config(1);
        config.rounds_in_flight_max = rounds_in_flight;
        return config;
    }

    mep_buffer_config_t config;
    Plan plan;
    Group group;
    Buffer buffer;
};

TEST_F(Refused, NoArgsAtAll) {
    const Alone alone(1);
    const Handle handle = make_handle(alone.buffer);
    expect_refused(mep_dispatch(alone.buffer.get(), handle.get(), nullptr), MEP_INVALID_ARGUMENT,
                   {"args is NULL"});
    expect_refused(mep_combine(alone.buffer.get(), handle.get(), nullptr), MEP_INVALID_ARGUMENT,
                   {"args is NULL"});
}

// Half of the pointer at the end would be taken for one.
TEST_F(Refused, ArgsThatEndInsideAField) {
    const Alone alone(1);
    const Handle handle = make_handle(alone.buffer);
    Share share(alone.plan, 0);
    mep_dispatch_args_t args = share.dispatch_args(0);
    args.struct_size = offsetof(mep_dispatch_args_t, out_src_info) + 4;
    expect_refused(mep_dispatch(alone.buffer.get(), handle.get(), &args), MEP_INVALID_ARGUMENT,
                   {"args.struct_size is"});
}

TEST_F(Refused, HandleOfAnotherBuffer) {
    const Alone alone(1), other(1);
    const Handle handle = make_handle(alone.buffer), foreign = make_handle(other.buffer);
    Share share(alone.plan, 0);
    expect_refused(share.dispatch(alone.buffer, foreign), MEP_INVALID_ARGUMENT, {"another buffer"});
    EXPECT_EQ(share.dispatch(alone.buffer, handle), MEP_OK);
    expect_refused(share.combine(other.buffer, handle), MEP_INVALID_ARGUMENT, {"another buffer"});
    EXPECT_EQ(share.combine(alone.buffer, handle), MEP_OK);
    EXPECT_EQ(counters_of(other.buffer).dispatches_sent, 0U);
}

TEST_F(Refused, ReceiveWithoutSend) {
    const Alone alone(2);
    const Handle handle = make_handle(alone.buffer);
    Share share(alone.plan, 0);
    expect_refused(share.dispatch(alone.buffer, handle, MEP_PHASE_RECEIVE), MEP_INVALID_STATE,
                   {"no dispatch to receive"});
    EXPECT_EQ(share.dispatch(alone.buffer, handle), MEP_OK);
    expect_refused(share.dispatch(alone.buffer, handle, MEP_PHASE_RECEIVE), MEP_INVALID_STATE,
                   {"no dispatch to receive"});
    expect_refused(share.combine(alone.buffer, handle, MEP_PHASE_RECEIVE), MEP_INVALID_STATE,
                   {"no combine to receive"});
    EXPECT_EQ(share.combine(alone.buffer, handle), MEP_OK);
    EXPECT_TRUE(share.combined());
}

TEST_F(Refused, HandleThatIsInFlight) {
    const Alone alone(2);
    const Handle handle = make_handle(alone.buffer);
    Share share(alone.plan, 0);
    expect_refused(share.combine(alone.buffer, handle), MEP_INVALID_STATE, {"holds no dispatch"});
    EXPECT_EQ(share.dispatch(alone.buffer, handle, MEP_PHASE_SEND), MEP_OK);
    expect_refused(share.dispatch(alone.buffer, handle), MEP_INVALID_STATE,
                   {"dispatch is still in flight"});
    expect_refused(share.combine(alone.buffer, handle), MEP_INVALID_STATE,
                   {"dispatch is still in flight"});
    EXPECT_EQ(share.dispatch(alone.buffer, handle, MEP_PHASE_RECEIVE), MEP_OK);
    EXPECT_EQ(share.combine(alone.buffer, handle, MEP_PHASE_SEND), MEP_OK);
    expect_refused(share.combine(alone.buffer, handle), MEP_INVALID_STATE,
                   {"combine is still in flight"});
    expect_refused(share.dispatch(alone.buffer, handle), MEP_INVALID_STATE,
                   {"combine is still in flight"});
    EXPECT_EQ(share.combine(alone.buffer, handle, MEP_PHASE_RECEIVE), MEP_OK);
    EXPECT_TRUE(share.combined());
    EXPECT_EQ(counters_of(alone.buffer).dispatches_sent, 1U);
    EXPECT_EQ(counters_of(alone.buffer).combines_sent, 1U);
}

TEST_F(Refused, MoreRoundsInFlightThanTheBufferHas) {
    for (const int flight : {1, 2, 8}) {
        SCOPED_TRACE("rounds in flight: " + std::to_string(flight));
        const Alone alone(flight);
        std::vector<Share> shares;
        std::vector<Handle> handles;
        for (int i = 0; i <= flight; ++i) {
            shares.emplace_back(alone.plan, 0);
            handles.push_back(make_handle(alone.buffer));
        }
        for (int i = 0; i < flight; ++i)
            EXPECT_EQ(shares[i].dispatch(alone.buffer, handles[i], MEP_PHASE_SEND), MEP_OK);
        expect_refused(shares.back().dispatch(alone.buffer, handles.back(), MEP_PHASE_SEND),
                       MEP_INVALID_STATE, {"in flight", "rounds_in_flight_max"});
        EXPECT_EQ(counters_of(alone.buffer).dispatches_sent, uint64_t(flight));
        for (int i = 0; i < flight; ++i) {
            EXPECT_EQ(shares[i].dispatch(alone.buffer, handles[i], MEP_PHASE_RECEIVE), MEP_OK);
            EXPECT_EQ(shares[i].combine(alone.buffer, handles[i], MEP_PHASE_SEND), MEP_OK);
        }
        EXPECT_EQ(shares.back().dispatch(alone.buffer, handles.back()), MEP_OK);
        expect_refused(shares.back().combine(alone.buffer, handles.back(), MEP_PHASE_SEND),
                       MEP_INVALID_STATE, {"in flight", "rounds_in_flight_max"});
        for (int i = 0; i < flight; ++i)
            EXPECT_EQ(shares[i].combine(alone.buffer, handles[i], MEP_PHASE_RECEIVE), MEP_OK);
        EXPECT_EQ(shares.back().combine(alone.buffer, handles.back()), MEP_OK);
        EXPECT_TRUE(shares.back().combined());
    }
}

TEST_F(Refused, RoundsThatWouldOvertakeTheOldestInFlight) {
    const Alone alone(2);
    const Handle oldest = make_handle(alone.buffer), other = make_handle(alone.buffer);
    Share share(alone.plan, 0), late(alone.plan, 0);
    EXPECT_EQ(late.dispatch(alone.buffer, oldest, MEP_PHASE_SEND), MEP_OK);
    EXPECT_EQ(share.dispatch(alone.buffer, other), MEP_OK);
    expect_refused(share.dispatch(alone.buffer, other), MEP_INVALID_STATE, {"round 1", "round 3"});
    EXPECT_EQ(late.dispatch(alone.buffer, oldest, MEP_PHASE_RECEIVE), MEP_OK);
    EXPECT_EQ(share.dispatch(alone.buffer, other), MEP_OK);
}

TEST_F(Refused, HandleDestroyedInFlightHoldsItsSlot) {
    const Alone alone(1);
    Share share(alone.plan, 0);
    EXPECT_EQ(share.dispatch(alone.buffer, make_handle(alone.buffer), MEP_PHASE_SEND), MEP_OK);
    const Handle handle = make_handle(alone.buffer);
    expect_refused(share.dispatch(alone.buffer, handle), MEP_INVALID_STATE, {"in flight"});
}

TEST_F(Refused, ReceiveOfOtherArrays) {
    const Alone alone(1);
    const Handle handle = make_handle(alone.buffer);
    Share share(alone.plan, 0);
    EXPECT_EQ(share.dispatch(alone.buffer, handle, MEP_PHASE_SEND), MEP_OK);
    share.topk_idx.shape[1] = 3;
    share.topk_weights.shape[1] = 3;
    expect_refused(share.dispatch(alone.buffer, handle, MEP_PHASE_RECEIVE), MEP_INVALID_ARGUMENT,
                   {"topk_idx is [", "3]", "4]"});
    share.topk_idx.shape[1] = 4;
    share.topk_weights.shape[1] = 4;
    EXPECT_EQ(share.dispatch(alone.buffer, handle, MEP_PHASE_RECEIVE), MEP_OK);
    EXPECT_TRUE(share.dispatched());
}

TEST_F(Refused, AnythingAfterTheGroupWasLeft) {
    Alone alone(1);
    const Handle handle = make_handle(alone.buffer);
    Share share(alone.plan, 0);
    EXPECT_EQ(share.dispatch(alone.buffer, handle), MEP_OK);
    alone.group.reset();
    expect_refused(share.dispatch(alone.buffer, handle), MEP_INVALID_STATE, {"group"});
    expect_refused(share.combine(alone.buffer, handle), MEP_INVALID_STATE, {"group"});
    mep_handle_t *another = nullptr;
    expect_refused(mep_handle_create(alone.buffer.get(), &another), MEP_INVALID_STATE, {"group"});
    EXPECT_EQ(another, nullptr);
}

// ---- Configurations
// -------------------------------------------------------------------------------

TEST_F(Refused, BadConfigurationsOfABuffer) {
    const struct {
        int32_t mep_buffer_config_t::*field;
        int32_t value;
        Words words;
    } cases[] = {
        {&mep_buffer_config_t::token_count_max, 0, {"token_count_max is 0", "[1, 65536]"}},
        {&mep_buffer_config_t::token_count_max, 65537, {"token_count_max is 65537"}},
        {&mep_buffer_config_t::hidden, 0, {"hidden is 0"}},
        {&mep_buffer_config_t::hidden, 100, {"hidden is 100", "multiple of 8"}},
        {&mep_buffer_config_t::hidden, 65544, {"hidden is 65544"}},
        {&mep_buffer_config_t::expert_count, 0, {"expert_count is 0"}},
        {&mep_buffer_config_t::expert_count, 7, {"expert_count is 7", "2 ranks"}},
        {&mep_buffer_config_t::expert_count, 65538, {"expert_count is 65538"}},
        {&mep_buffer_config_t::topk_max, 0, {"topk_max is 0"}},
        {&mep_buffer_config_t::topk_max, 33, {"topk_max is 33", "32"}},
        {&mep_buffer_config_t::rounds_in_flight_max, -1, {"rounds_in_flight_max is -1"}},
        {&mep_buffer_config_t::rounds_in_flight_max, 9, {"rounds_in_flight_max is 9", "8"}},
        {&mep_buffer_config_t::fp32_partials, 2, {"fp32_partials is 2"}},
        {&mep_buffer_config_t::cpu_thread_count, -1, {"cpu_thread_count is -1"}},
        {&mep_buffer_config_t::cpu_thread_count, 257, {"cpu_thread_count is 257", "256"}},
        {&mep_buffer_config_t::sm_count_max, -1, {"sm_count_max is -1"}},
        {&mep_buffer_config_t::sm_count_max, 2, {"sm_count_max is 2", "[3, "}},
    };
    for (const auto &one : cases) {
        mep_buffer_config_t config = buffer_config(2);
        config.*one.field = one.value;
        mep_buffer_sizes_t sizes{sizeof sizes, 0, 77, 77};
        expect_refused(mep_buffer_query_sizes(&config, 2, &sizes), MEP_INVALID_ARGUMENT, one.words);
        EXPECT_EQ(sizes.window_bytes, 77U);
    }
}

TEST_F(Refused, ConfigurationsWhoseFieldsContradict) {
    mep_buffer_sizes_t sizes{sizeof sizes, 0, 0, 0};
    mep_buffer_config_t config = buffer_config(1);
    config.payload_types = 16;
    expect_refused(mep_buffer_query_sizes(&config, 1, &sizes), MEP_INVALID_ARGUMENT,
                   {"payload_types is 0x10"});
    config.payload_types = MEP_PAYLOAD_FP8;
    config.hidden = 136;
    expect_refused(mep_buffer_query_sizes(&config, 1, &sizes), MEP_INVALID_ARGUMENT,
                   {"hidden is 136", "128"});
    config = buffer_config(1);
    config.expert_count = config.token_count_max = 65536;
    expect_refused(mep_buffer_query_sizes(&config, 1, &sizes), MEP_INVALID_ARGUMENT,
                   {"expert_count 65536", "token_count_max 65536", "2^31"});
    config.expert_count = 512;
    expect_refused(mep_buffer_query_sizes(&config, 256, &sizes), MEP_INVALID_ARGUMENT,
                   {"token_count_max is 65536", "256 ranks", "2^24"});
    config = buffer_config(1);
    for (const int rank_count : {0, -1, 1025})
        expect_refused(mep_buffer_query_sizes(&config, rank_count, &sizes), MEP_INVALID_ARGUMENT,
                       {"rank_count is"});
    expect_refused(mep_buffer_query_sizes(nullptr, 1, &sizes), MEP_INVALID_ARGUMENT,
                   {"config is NULL"});
    expect_refused(mep_buffer_query_sizes(&config, 1, nullptr), MEP_INVALID_ARGUMENT,
                   {"sizes is NULL"});
}

TEST_F(Refused, BadConfigurationsOfAGroup) {
    const World world = make_world(2);
    const struct {
        void (*spoil)(mep_group_config_t &);
        Words words;
    } cases[] = {
        {[](mep_group_config_t &c) { c.struct_size = 0; }, {"config.struct_size is 0"}},
        {[](mep_group_config_t &c) { c.rank = 2; }, {"rank is 2", "[0, 2)"}},
        {[](mep_group_config_t &c) { c.rank = -1; }, {"rank is -1"}},
        {[](mep_group_config_t &c) { c.rank_count = 1025; }, {"rank_count is 1025"}},
        {[](mep_group_config_t &c) { c.rank_count = 0; }, {"rank_count is 0"}},
        {[](mep_group_config_t &c) { c.rank_count = 3; }, {"rank_count is 3", "2 ranks"}},
        {[](mep_group_config_t &c) { c.backend = 9; }, {"backend is 9"}},
        {[](mep_group_config_t &c) { c.device_id = 1; }, {"device_id is 1"}},
        {[](mep_group_config_t &c) { c.timeout_us = -2; }, {"timeout_us is -2"}},
    };
    for (const auto &one : cases) {
        mep_group_config_t config = group_config(0, 2, world.get());
        one.spoil(config);
        mep_group_t *group = nullptr;
        expect_refused(mep_group_create(&config, &group), MEP_INVALID_ARGUMENT, one.words);
        EXPECT_EQ(group, nullptr);
    }
    mep_group_t *group = nullptr;
    expect_refused(mep_group_create(nullptr, &group), MEP_INVALID_ARGUMENT, {"config is NULL"});
    const mep_group_config_t config = group_config(0, 1, nullptr);
    expect_refused(mep_group_create(&config, nullptr), MEP_INVALID_ARGUMENT, {"group is NULL"});
}

TEST_F(Refused, BackendsThatAreNotHere) {
    for (const int backend : {MEP_BACKEND_CUDA, MEP_BACKEND_MACA}) {
        mep_backend_info_t info{};
        info.struct_size = sizeof info;
        ASSERT_EQ(mep_backend_query(backend, &info), MEP_OK);
        if (info.available == 1) continue;
        mep_group_config_t config = group_config(0, 1, nullptr);
        config.backend = backend;
        mep_group_t *group = nullptr;
        expect_refused(mep_group_create(&config, &group), MEP_UNSUPPORTED,
                       {info.name, info.reason});
    }
}

// ---- Everything else
// ------------------------------------------------------------------------------

TEST_F(Refused, NullWhereSomethingIsNeeded) {
    const Alone alone(1);
    mep_handle_t *handle = nullptr;
    mep_group_info_t group_info{sizeof group_info, 0, 0, 0, 0, 0, 0};
    mep_buffer_info_t buffer_info{};
    buffer_info.struct_size = sizeof buffer_info;
    const mep_status_t statuses[] = {
        mep_world_create(1, nullptr),
        mep_unique_id_create(nullptr, nullptr),
        mep_backend_query(MEP_BACKEND_CPU, nullptr),
        mep_rdma_query(nullptr),
        mep_group_query(nullptr, &group_info),
        mep_group_query(alone.group.get(), nullptr),
        mep_group_query_transport(alone.group.get(), 0, nullptr),
        mep_buffer_create(nullptr, &alone.config, nullptr),
        mep_buffer_create(alone.group.get(), &alone.config, nullptr),
        mep_buffer_query(nullptr, &buffer_info),
        mep_buffer_query(alone.buffer.get(), nullptr),
        mep_buffer_query_counters(alone.buffer.get(), nullptr),
        mep_handle_create(nullptr, &handle),
        mep_handle_create(alone.buffer.get(), nullptr),
    };
    for (const mep_status_t &status : statuses)
        EXPECT_EQ(status, MEP_INVALID_ARGUMENT) << "call " << &status - statuses;
}

TEST_F(Refused, NumbersOutOfRange) {
    const Alone alone(1);
    mep_world_t *world = nullptr;
    for (const int rank_count : {0, -3, 1025})
        expect_refused(mep_world_create(rank_count, &world), MEP_INVALID_ARGUMENT,
                       {"rank_count is", std::to_string(rank_count).c_str()});
    EXPECT_EQ(world, nullptr);
    mep_backend_info_t backend{};
    backend.struct_size = sizeof backend;
    expect_refused(mep_backend_query(4, &backend), MEP_INVALID_ARGUMENT, {"backend is 4"});
    mep_transport_info_t transport{};
    transport.struct_size = sizeof transport;
    for (const int peer : {-1, 1})
        expect_refused(mep_group_query_transport(alone.group.get(), peer, &transport),
                       MEP_INVALID_ARGUMENT, {"peer is"});
    expect_refused(mep_log_set_callback(nullptr, nullptr, 5), MEP_INVALID_ARGUMENT, {"level is 5"});
}

TEST_F(Refused, BadAllGathers) {
    const Alone alone(1);
    char byte = 1, got = 0;
    mep_group_t *group = alone.group.get();
    expect_refused(mep_group_all_gather(nullptr, &byte, &got, 1), MEP_INVALID_ARGUMENT, {"group"});
    expect_refused(mep_group_all_gather(group, nullptr, &got, 1), MEP_INVALID_ARGUMENT, {"send"});
    expect_refused(mep_group_all_gather(group, &byte, nullptr, 1), MEP_INVALID_ARGUMENT,
                   {"receive"});
    expect_refused(mep_group_all_gather(group, &byte, &got, MEP_ALL_GATHER_BYTES_MAX + 1),
                   MEP_INVALID_ARGUMENT, {"bytes", "1048577"});
    EXPECT_EQ(mep_group_all_gather(group, &byte, &got, 1), MEP_OK);
    EXPECT_EQ(got, 1);
}

TEST_F(Refused, AddressesThatAreNotOfThisMachine) {
    mep_unique_id_t id;
    for (const char *address : {"not an address", "192.0.2.1", "0.0.0.0"})
        expect_refused(mep_unique_id_create(address, &id), MEP_INVALID_ARGUMENT, {address});
}

}  // namespace
}  // namespace ep::test
