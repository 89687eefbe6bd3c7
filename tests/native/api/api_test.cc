// The library as a caller sees it: through the C ABI. Built twice: as api_test with ranks that are
// threads on the CPU, and as api_cuda_test with ranks that are processes on GPUs. Processes on the
// CPU: processes_test.cc; what is refused: errors_test.cc.
#include "support/abi.h"
#include "support/forked.h"
#include "support/tidy.h"

#include <algorithm>
#include <atomic>

namespace ep::test {
namespace {

class Api : public Tidy {
  protected:
    // A process that has asked a GPU's driver cannot fork ranks that use it.
    void ask_drivers() override {
        if (on_cpu()) Tidy::ask_drivers();
    }
};

#define ONLY_ON_THE_CPU(fact) \
    if (!on_cpu()) GTEST_SKIP() << "only on the CPU: " << fact

// A group and a buffer for each rank, then body(group, buffer, rank).
using Body = std::function<void(const Group &, const Buffer &, int)>;
void run_buffers(int rank_count, const mep_buffer_config_t &config, const Body &body) {
    run_groups(rank_count, [&](int rank, const Group &group) {
        const Buffer buffer = make_buffer(group, config);
        body(group, buffer, rank);
    });
}

// ---- Rounds
// ---------------------------------------------------------------------------------------

TEST_F(Api, CarriesTokensThereAndBackBetweenAnyNumberOfRanks) {
    for (const int rank_count : {1, 2, 3, 4, 8})
        for (const int thread_count : {1, 3}) {
            if (IsSkipped() || (!on_cpu() && thread_count > 1)) continue;  // GPUs have none
            SCOPED_TRACE(std::to_string(rank_count) + " ranks of " + std::to_string(thread_count) +
                         " threads");
            mep_buffer_config_t config = buffer_config(rank_count);
            config.cpu_thread_count = thread_count;
            run_buffers(rank_count, config, [&](const Group &, const Buffer &buffer, int rank) {
                for (uint64_t seed = 1; seed <= 4; ++seed)
                    expect_round(buffer, Plan::of(config, rank_count, seed), rank);
            });
        }
}

TEST_F(Api, KeepsItsPromisesForAThousandRounds) {
    mep_buffer_config_t config = buffer_config(2);
    config.hidden = 8;
    run_buffers(2, config, [&](const Group &, const Buffer &buffer, int rank) {
        for (uint64_t seed = 0; seed < 1000 && !::testing::Test::HasFailure(); ++seed) {
            SCOPED_TRACE("seed " + std::to_string(seed));
            expect_round(buffer, Plan::of(config, 2, seed), rank);
        }
        EXPECT_EQ(counters_of(buffer).dispatches_sent, 1000U);
        EXPECT_EQ(counters_of(buffer).combines_sent, 1000U);
        EXPECT_EQ(counters_of(buffer).invalid_messages, 0U);
    });
}

TEST_F(Api, ReceivesHalvesInAnyOrder) {
    const mep_buffer_config_t config = buffer_config(3);
    run_buffers(3, config, [&](const Group &, const Buffer &buffer, int rank) {
        for (uint64_t seed = 10; seed < 20; ++seed) {
            const Plan plans[] = {Plan::of(config, 3, seed), Plan::of(config, 3, seed + 1000)};
            Share one(plans[0], rank), two(plans[1], rank);
            const Handle first = make_handle(buffer), second = make_handle(buffer);
            EXPECT_EQ(one.dispatch(buffer, first, MEP_PHASE_SEND), MEP_OK);
            EXPECT_EQ(two.dispatch(buffer, second, MEP_PHASE_SEND), MEP_OK);
            EXPECT_EQ(two.dispatch(buffer, second, MEP_PHASE_RECEIVE), MEP_OK);
            EXPECT_EQ(two.combine(buffer, second, MEP_PHASE_SEND), MEP_OK);
            EXPECT_EQ(one.dispatch(buffer, first, MEP_PHASE_RECEIVE), MEP_OK);
            EXPECT_EQ(one.combine(buffer, first, MEP_PHASE_SEND), MEP_OK);
            EXPECT_EQ(one.combine(buffer, first, MEP_PHASE_RECEIVE), MEP_OK);
            EXPECT_EQ(two.combine(buffer, second, MEP_PHASE_RECEIVE), MEP_OK);
            for (Share *share : {&one, &two}) {
                EXPECT_TRUE(share->dispatched());
                EXPECT_TRUE(share->combined());
            }
        }
    });
}

TEST_F(Api, HandlesOutliveLaterRoundsAndCombineAgain) {
    const mep_buffer_config_t config = buffer_config(2);
    constexpr int kLayers = 5;
    run_buffers(2, config, [&](const Group &, const Buffer &buffer, int rank) {
        std::vector<Plan> plans;
        for (int layer = 0; layer < kLayers; ++layer)
            plans.push_back(Plan::of(config, 2, 50 + layer));
        std::vector<Share> shares;
        std::vector<Handle> handles;
        for (int layer = 0; layer < kLayers; ++layer) {
            shares.emplace_back(plans[layer], rank);
            handles.push_back(make_handle(buffer));
            EXPECT_EQ(shares[layer].dispatch(buffer, handles[layer]), MEP_OK);
        }
        for (uint64_t seed = 60; seed < 70; ++seed)
            expect_round(buffer, Plan::of(config, 2, seed), rank);
        for (int pass = 0; pass < 3; ++pass)
            for (int layer = kLayers - 1; layer >= 0; --layer) {
                Share &share = shares[layer];
                share.out.poison();
                EXPECT_EQ(share.combine(buffer, handles[layer]), MEP_OK);
                EXPECT_TRUE(share.combined()) << "layer " << layer;
            }
    });
}

TEST_F(Api, TakesWeightsAtCombineInsteadOfDispatch) {
    const mep_buffer_config_t config = buffer_config(3);
    run_buffers(3, config, [&](const Group &, const Buffer &buffer, int rank) {
        const Handle handle = make_handle(buffer);
        for (uint64_t seed = 80; seed < 90; ++seed) {
            const Plan plan = Plan::of(config, 3, seed);
            Share share(plan, rank);
            mep_dispatch_args_t dispatch = share.dispatch_args();
            dispatch.topk_weights = nullptr;
            EXPECT_EQ(test::dispatch(buffer, handle, dispatch), MEP_OK);
            mep_combine_args_t combine = share.combine_args();
            combine.topk_weights = share.topk_weights.view();
            EXPECT_EQ(test::combine(buffer, handle, combine), MEP_OK);
            EXPECT_TRUE(share.combined());
        }
    });
}

TEST_F(Api, CastsToFp8WithScalesOfAnyStrides) {
    const mep_buffer_config_t config = buffer_config(2);
    run_buffers(2, config, [&](const Group &, const Buffer &buffer, int rank) {
        const Plan plan = Plan::of(config, 2, 95);
        Share share(plan, rank);
        const int64_t experts = plan.local_experts(), rows = plan.region(), groups = 1;
        share.out_x = Tensor(kUint8, {experts, rows, config.hidden});
        Tensor scales(kFloat32, {groups, experts, rows});
        scales.shape = {experts, rows, groups};
        scales.strides = {rows, 1, experts * rows};
        mep_dispatch_args_t args = share.dispatch_args();
        args.quant = MEP_QUANT_FP8;
        args.out_scales = scales.view();
        EXPECT_EQ(test::dispatch(buffer, make_handle(buffer), args), MEP_OK) << mep_last_error();
        for (int e = 0; e < experts; ++e)
            for (size_t i = 0; i < plan.rows[rank * experts + e].size(); ++i) {
                const Packed &row = plan.rows[rank * experts + e][i];
                const float scale = scales.data<float>()[e * rows + i];
                const char *codes = share.out_x.data() + (e * rows + i) * config.hidden;
                for (int h = 0; h < config.hidden; ++h)
                    ASSERT_TRUE(near_as_fp8(scale * read_element(Element::kFp8, codes, h),
                                            plan.value(row.source, row.token, h), scale));
            }
    });
}

TEST_F(Api, TakesRowsFurtherApartThanTheirLength) {
    const mep_buffer_config_t config = buffer_config(2);
    run_buffers(2, config, [&](const Group &, const Buffer &buffer, int rank) {
        const Plan plan = Plan::of(config, 2, 97);
        Share share(plan, rank);
        const int64_t count = plan.tokens[rank].count, hidden = config.hidden, stride = hidden + 8;
        const Handle handle = make_handle(buffer);
        Tensor x(kBfloat16, {count + 1, stride}), out(kBfloat16, {count + 1, stride});
        for (int64_t token = 0; token < count; ++token)
            std::memcpy(x.data() + (token * stride + 8) * 2, share.x.data() + token * hidden * 2,
                        hidden * 2);
        for (Tensor *tensor : {&x, &out}) {
            tensor->shape = {count, hidden};
            tensor->strides = {stride, 1};
            tensor->byte_offset = 16;
        }
        mep_dispatch_args_t dispatch = share.dispatch_args();
        dispatch.x = x.view();
        EXPECT_EQ(test::dispatch(buffer, handle, dispatch), MEP_OK);
        EXPECT_TRUE(share.dispatched());
        mep_combine_args_t combine = share.combine_args();
        combine.out = out.view();
        EXPECT_EQ(test::combine(buffer, handle, combine), MEP_OK);
        for (int64_t token = 0; token < count; ++token)
            std::memcpy(share.out.data() + token * hidden * 2,
                        out.data() + (token * stride + 8) * 2, hidden * 2);
        EXPECT_TRUE(share.combined());
    });
}

TEST_F(Api, LeavesOptionalOutputsOut) {
    const mep_buffer_config_t config = buffer_config(1);
    run_buffers(1, config, [&](const Group &, const Buffer &buffer, int rank) {
        const Plan plan = Plan::of(config, 1, 98);
        Share share(plan, rank);
        const Handle handle = make_handle(buffer);
        mep_dispatch_args_t args = share.dispatch_args();
        args.out_src_info = nullptr;
        args.out_layout_range = nullptr;
        EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_OK);
        EXPECT_EQ(share.combine(buffer, handle), MEP_OK);
        EXPECT_TRUE(share.combined());
        EXPECT_EQ(share.out_src_info.data<int32_t>()[0], -1);
    });
}

TEST_F(Api, CountsIdsOutOfRange) {
    const mep_buffer_config_t config = buffer_config(1);
    run_buffers(1, config, [&](const Group &, const Buffer &buffer, int rank) {
        const Plan plan = Plan::of(config, 1, 99);
        uint64_t invalid = 0;
        for (const int64_t id : plan.tokens[0].topk_idx)
            invalid += id < -1 || id >= config.expert_count;
        expect_round(buffer, plan, rank);
        EXPECT_EQ(counters_of(buffer).invalid_expert_ids, invalid);
    });
}

// ---- Masks
// ----------------------------------------------------------------------------------------

// Where threads meet without the library: a rank that is dead to it is absent here too.
class MeetingPoint {
  public:
    explicit MeetingPoint(int count) : count_(count) {}
    void meet() {
        const int round = arrived_++ / count_;
        while (arrived_ < (round + 1) * count_)
            sched_yield();
    }

  private:
    const int count_;
    std::atomic<int> arrived_{0};
};

// Ranks 0 and 1 of three do a round without rank 2, which has a buffer but never sends, and which
// stays until nobody writes to its window any more. All send before any receives, so that only rank
// 2 can miss a deadline.
void run_without_rank_2(
    const std::function<void(Share &, const Buffer &, const Handle &, MeetingPoint &)> &survivor) {
    const mep_buffer_config_t config = buffer_config(3);
    const Shared<MeetingPoint> point(2);
    run_buffers(3, config, [&](const Group &group, const Buffer &buffer, int rank) {
        if (rank != 2) {
            const Plan plan = Plan::of(config, 3, 110, {2});
            Share share(plan, rank);
            survivor(share, buffer, make_handle(buffer), *point);
        }
        char all[3];
        EXPECT_EQ(mep_group_all_gather(group.get(), "", all, 1), MEP_OK) << mep_last_error();
    });
}

constexpr int64_t kShortUs = 20'000;

void expect_good_combine(Share &share, const Buffer &buffer, const Handle &handle,
                         const mep_tensor_t *active) {
    EXPECT_TRUE(share.dispatched());
    mep_combine_args_t combine = share.combine_args();
    combine.active_ranks = active;
    EXPECT_EQ(test::combine(buffer, handle, combine), MEP_OK) << mep_last_error();
    EXPECT_TRUE(share.combined());
}

TEST_F(Api, DoesNotWaitForRanksThatTheCallerMasks) {
    run_without_rank_2(
        [](Share &share, const Buffer &buffer, const Handle &handle, MeetingPoint &) {
            Tensor active(kInt32, {3});
            active.fill<int32_t>({1, 1, 0});
            mep_dispatch_args_t args = share.dispatch_args();
            args.active_ranks = active.view();
            EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_OK);
            expect_good_combine(share, buffer, handle, active.view());
        });
}

TEST_F(Api, ARankCannotMaskItself) {
    const mep_buffer_config_t config = buffer_config(1);
    run_buffers(1, config, [&](const Group &, const Buffer &buffer, int rank) {
        const Plan plan = Plan::of(config, 1, 115);
        const Handle handle = make_handle(buffer);
        Share share(plan, rank);
        Tensor active(kInt32, {1});
        active.fill<int32_t>({0});
        mep_dispatch_args_t args = share.dispatch_args();
        args.active_ranks = active.view();
        EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_OK);
        expect_good_combine(share, buffer, handle, active.view());
    });
}

TEST_F(Api, MasksALateRankInTheCallersArray) {
    run_without_rank_2(
        [](Share &share, const Buffer &buffer, const Handle &handle, MeetingPoint &point) {
            Tensor active(kInt32, {4});  // more than there are ranks: the rest is not ours
            active.fill<int32_t>({1, 1, 1, 7});
            mep_dispatch_args_t args = share.dispatch_args(MEP_PHASE_SEND);
            args.timeout_us = kShortUs;
            args.active_ranks = active.view();
            EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_OK);
            point.meet();
            args.phases = MEP_PHASE_RECEIVE;
            EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_OK);
            EXPECT_EQ(std::vector<int32_t>(active.data<int32_t>(), active.data<int32_t>() + 4),
                      (std::vector<int32_t>{1, 1, 0, 7}));
            expect_good_combine(share, buffer, handle, active.view());
        });
}

bool are_ones(Tensor *active) {
    const int32_t *words = active->data<int32_t>();
    return std::all_of(words, words + 3, [](int32_t word) { return word == 1; });
}

// A round of a caller that names all ranks anew in each call; true if all were there and all is
// right.
bool is_whole_round(Share *share, const Buffer &buffer, const Handle &handle, int64_t timeout_us) {
    Tensor active(kInt32, {3}), again(kInt32, {3});
    active.fill<int32_t>({1, 1, 1});
    again.fill<int32_t>({1, 1, 1});
    mep_dispatch_args_t dispatched = share->dispatch_args();
    dispatched.timeout_us = timeout_us;
    dispatched.active_ranks = active.view();
    EXPECT_EQ(test::dispatch(buffer, handle, dispatched), MEP_OK) << mep_last_error();
    const bool is_right = are_ones(&active) && share->dispatched();
    mep_combine_args_t combined = share->combine_args();
    combined.timeout_us = timeout_us;
    combined.active_ranks = again.view();
    EXPECT_EQ(test::combine(buffer, handle, combined), MEP_OK) << mep_last_error();
    return is_right && are_ones(&again) && share->combined();
}

// As engines name them: one that was late once shall not be late for ever.
TEST_F(Api, IsInStepAgainAfterARankHasStalled) {
    if (getenv("MOONCAKE_EP_DISABLE_P2P") != nullptr ||
        getenv("MOONCAKE_EP_ISLAND_RANKS") != nullptr)
        GTEST_SKIP() << "over an engine a rank that was masked is not heard any more";
    constexpr int64_t kTimeoutUs = 150'000;
    constexpr int kRounds = 24, kStalledRound = 2, kLastRounds = 6;
    const mep_buffer_config_t config = buffer_config(3);
    for (const bool weights_at_combine : {false, true})
        for (const int stall_ms : {250, 1200}) {  // less than the rest take for a round, and more
            SCOPED_TRACE("weights " + std::to_string(weights_at_combine) + ", stall of " +
                         std::to_string(stall_ms) + " ms");
            run_buffers(3, config, [&](const Group &, const Buffer &buffer, int rank) {
                const Plan plan = Plan::of(config, 3, 180);
                Share share(plan, rank);
                share.weights_at_combine = weights_at_combine;
                const Handle handle = make_handle(buffer);
                int whole_rounds = 0;  // without one between that is not
                for (int round = 0; round < kRounds; ++round) {
                    if (rank == 1 && round == kStalledRound)
                        std::this_thread::sleep_for(std::chrono::milliseconds(stall_ms));
                    const bool whole = is_whole_round(&share, buffer, handle, kTimeoutUs);
                    whole_rounds = whole ? whole_rounds + 1 : 0;
                }
                EXPECT_GE(whole_rounds, kLastRounds) << "rank " << rank;
            });
        }
}

// In nanoseconds it would be 0 in 64 bits.
TEST_F(Api, ATimeoutOfManyThousandYearsIsNone) {
    const mep_buffer_config_t config = buffer_config(2);
    run_buffers(2, config, [&](const Group &, const Buffer &buffer, int rank) {
        const Handle handle = make_handle(buffer);
        const Plan plan = Plan::of(config, 2, 170);
        Share share(plan, rank);
        mep_dispatch_args_t args = share.dispatch_args(0);
        args.timeout_us = int64_t{1} << 61;
        if (rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(50));
        EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_OK) << mep_last_error();
    });
}

TEST_F(Api, ReportsALateRankOnceAndGoesOnWithoutIt) {
    ONLY_ON_THE_CPU("a call on a GPU returns before anybody can be late");
    expect_warnings();
    run_without_rank_2(
        [](Share &share, const Buffer &buffer, const Handle &handle, MeetingPoint &point) {
            mep_dispatch_args_t args = share.dispatch_args(MEP_PHASE_SEND);
            args.timeout_us = kShortUs;
            EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_OK);
            point.meet();
            args.phases = MEP_PHASE_RECEIVE;
            EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_PEER_FAILED);
            EXPECT_NE(std::string(mep_last_error()).find("rank 2"), std::string::npos)
                << mep_last_error();
            expect_good_combine(share, buffer, handle, nullptr);
            expect_round(buffer, share.plan, share.rank);
        });
}

TEST_F(Api, TellsWhoWasLateAndForHowLong) {
    ONLY_ON_THE_CPU("a call on a GPU returns before anybody can be late");
    expect_warnings();
    run_without_rank_2(
        [](Share &share, const Buffer &buffer, const Handle &handle, MeetingPoint &point) {
            mep_dispatch_args_t args = share.dispatch_args(MEP_PHASE_SEND);
            args.timeout_us = kShortUs;
            EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_OK);
            point.meet();
            mep_event_t events[3];
            int32_t count = -1;
            uint64_t cursor = 0;
            args.phases = MEP_PHASE_RECEIVE;
            EXPECT_EQ(test::dispatch(buffer, handle, args), MEP_PEER_FAILED);
            EXPECT_EQ(mep_buffer_read_events(buffer.get(), &cursor, events, 3, &count), MEP_OK);
            ASSERT_EQ(count, 1);
            EXPECT_EQ(events[0].peer, 2);
            EXPECT_EQ(events[0].reason, MEP_EVENT_LATE);
            const bool far = getenv("MOONCAKE_EP_DISABLE_P2P") != nullptr ||
                             getenv("MOONCAKE_EP_ISLAND_RANKS") != nullptr;
            EXPECT_EQ(events[0].phase, far ? MEP_WAIT_EXCHANGE : MEP_WAIT_COUNTS);
            EXPECT_EQ(events[0].round, 1U);
            // What an engine waits is a part of its call, whose deadline begins with it.
            EXPECT_GE(events[0].waited_us, far ? kShortUs / 2 : kShortUs);
            mep_peer_counters_t counters{};
            counters.struct_size = sizeof counters;
            EXPECT_EQ(mep_buffer_query_peer(buffer.get(), 2, &counters), MEP_OK);
            EXPECT_GE(counters.waited_us, far ? 0 : uint64_t(kShortUs));
            EXPECT_EQ(counters.rows_received, 0U);
            EXPECT_EQ(mep_buffer_read_events(buffer.get(), &cursor, events, 3, &count), MEP_OK);
            EXPECT_EQ(count, 0);  // it was told
            cursor = UINT64_MAX;
            EXPECT_EQ(mep_buffer_read_events(buffer.get(), &cursor, events, 3, &count), MEP_OK);
            EXPECT_EQ(count, 0);
            expect_good_combine(share, buffer, handle, nullptr);
            expect_round(buffer, share.plan, share.rank);
        });
}

TEST_F(Api, CallsThatWaitFollowAChangedTimeout) {
    ONLY_ON_THE_CPU("a call on a GPU returns before anybody can be late");
    expect_warnings();
    const mep_buffer_config_t config = buffer_config(2);
    const Plan plan = Plan::of(config, 2, 90);
    MeetingPoint sent(2);
    run_groups(2, [&](int rank, const Group &group) {
        const Buffer buffer = make_buffer(group, config);
        const Handle handle = make_handle(buffer);
        Share share(plan, rank);
        sent.meet();
        mep_transport_info_t way{};
        way.struct_size = sizeof way;
        EXPECT_EQ(mep_group_query_transport(group.get(), 1 - rank, &way), MEP_OK);
        if (rank == 1 || way.kind == MEP_TRANSPORT_COLLECTIVE)
            return;  // an exchange keeps the deadline that it began with
        // 30 s otherwise, which the test would show.
        std::thread shortens([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            EXPECT_EQ(mep_group_set_timeout(group.get(), kShortUs), MEP_OK);
        });
        const auto began = std::chrono::steady_clock::now();
        EXPECT_EQ(share.dispatch(buffer, handle), MEP_PEER_FAILED);
        EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(10));
        shortens.join();
        mep_group_info_t info{};
        info.struct_size = sizeof info;
        EXPECT_EQ(mep_group_query(group.get(), &info), MEP_OK);
        EXPECT_EQ(info.timeout_us, kShortUs);
        EXPECT_EQ(mep_group_set_timeout(group.get(), -2), MEP_INVALID_ARGUMENT);
    });
}

TEST_F(Api, CountsRowsOfPeersAndExperts) {
    constexpr int kRounds = 3;
    const mep_buffer_config_t config = buffer_config(3);
    run_buffers(3, config, [&](const Group &, const Buffer &buffer, int rank) {
        const int experts = config.expert_count / 3;
        std::vector<uint64_t> expected(experts), rows(experts);
        for (int round = 0; round < kRounds; ++round) {
            const Plan plan = Plan::of(config, 3, 95 + round);
            expect_round(buffer, plan, rank);
            for (int e = 0; e < experts; ++e)
                expected[e] += plan.rows[rank * experts + e].size();
        }
        EXPECT_EQ(mep_buffer_query_expert_rows(buffer.get(), rows.data(), experts), MEP_OK);
        EXPECT_EQ(rows, expected);
        uint64_t all = 0, received = 0;
        for (int e = 0; e < experts; ++e)
            all += expected[e];
        for (int peer = 0; peer < 3; ++peer) {
            mep_peer_counters_t counters{};
            counters.struct_size = sizeof counters;
            EXPECT_EQ(mep_buffer_query_peer(buffer.get(), peer, &counters), MEP_OK);
            received += counters.rows_received;
        }
        EXPECT_EQ(received, all);
        EXPECT_EQ(mep_buffer_query_expert_rows(buffer.get(), rows.data(), experts + 1),
                  MEP_INVALID_ARGUMENT);
        mep_peer_counters_t counters{};
        counters.struct_size = sizeof counters;
        EXPECT_EQ(mep_buffer_query_peer(buffer.get(), 3, &counters), MEP_INVALID_ARGUMENT);
    });
}

// ---- Life and death
// -------------------------------------------------------------------------------

TEST_F(Api, RanksLeaveInAnyOrder) {
    const mep_buffer_config_t config = buffer_config(3);
    for (int first = 0; first < 3; ++first)
        run_buffers(3, config, [&](const Group &, const Buffer &buffer, int rank) {
            const Plan plan = Plan::of(config, 3, 120 + first);
            // The others may still be reading what the first one to leave has sent.
            if (rank != first)
                for (int i = 0; i < 200; ++i)
                    sched_yield();
            expect_round(buffer, plan, rank);
        });
}

TEST_F(Api, BufferOutlivesItsGroupOnlyToBeDestroyed) {
    const mep_buffer_config_t config = buffer_config(1);
    run_groups(1, [&](int, const Group &) {
        Group group = make_group(group_config(0, 1, nullptr));
        const Buffer buffer = make_buffer(group, config);
        const Handle handle = make_handle(buffer);
        const Plan plan = Plan::of(config, 1, 130);
        Share share(plan, 0);
        group.reset();
        EXPECT_EQ(share.dispatch(buffer, handle), MEP_INVALID_STATE);
        mep_handle_t *another = nullptr;
        EXPECT_EQ(mep_handle_create(buffer.get(), &another), MEP_INVALID_STATE);
        EXPECT_EQ(another, nullptr);
    });
}

// Each rank creates with a config of its own; all fail with `status`, and then a good round works.
void expect_create_fails_everywhere(const std::function<void(int, mep_buffer_config_t *)> &spoil,
                                    mep_status_t status, const std::string &elsewhere) {
    const mep_buffer_config_t good = buffer_config(3);
    run_groups(3, [&](int rank, const Group &group) {
        mep_buffer_config_t config = good;
        spoil(rank, &config);
        mep_buffer_t *buffer = nullptr;
        EXPECT_EQ(mep_buffer_create(group.get(), &config, &buffer), status) << mep_last_error();
        EXPECT_EQ(buffer, nullptr);
        const bool told = std::string(mep_last_error()).find(elsewhere) != std::string::npos;
        EXPECT_TRUE(rank == 1 || told) << mep_last_error();
        expect_round(make_buffer(group, good), Plan::of(good, 3, 140), rank);
    });
}

TEST_F(Api, BadConfigOfOneRankFailsAll) {
    expect_create_fails_everywhere(
        [](int rank, mep_buffer_config_t *config) {
            if (rank == 1) config->hidden = 7;
        },
        MEP_INVALID_ARGUMENT, "rank 1: config.hidden is 7");
}

TEST_F(Api, UnknownFieldOfOneRankFailsAll) {
    expect_create_fails_everywhere(
        [](int rank, mep_buffer_config_t *config) {
            if (rank == 1) config->struct_size = 0;
        },
        MEP_INVALID_ARGUMENT, "rank 1: config.struct_size is 0");
}

TEST_F(Api, ConfigsThatDifferFailAll) {
    expect_create_fails_everywhere(
        [](int rank, mep_buffer_config_t *config) {
            if (rank == 1) config->token_count_max = 7;
        },
        MEP_MISMATCH, "config.token_count_max");
}

TEST_F(Api, MemoryThatNobodyHasFailsAll) {
    expect_create_fails_everywhere(
        [](int, mep_buffer_config_t *config) {  // a window of more than a terabyte
            config->token_count_max = MEP_TOKEN_COUNT_MAX;
            config->hidden = MEP_HIDDEN_MAX;
            config->expert_count = 3;
            config->payload_types = MEP_PAYLOAD_FP32;
            config->rounds_in_flight_max = MEP_ROUNDS_IN_FLIGHT_MAX;
        },
        MEP_OUT_OF_MEMORY, on_cpu() ? "window" : "out of memory");
}

TEST_F(Api, ThreadCountsMayDiffer) {
    ONLY_ON_THE_CPU("nothing else has threads of ours");
    run_groups(2, [&](int rank, const Group &group) {
        mep_buffer_config_t config = buffer_config(2);
        config.cpu_thread_count = 1 + rank;
        expect_round(make_buffer(group, config), Plan::of(config, 2, 150), rank);
    });
}

TEST_F(Api, TwoBuffersOfAGroupDoNotDisturbEachOther) {
    const mep_buffer_config_t one = buffer_config(2);
    mep_buffer_config_t other = one;
    other.hidden = 256;
    other.rounds_in_flight_max = 1;
    run_buffers(2, one, [&](const Group &group, const Buffer &buffer, int rank) {
        const Buffer second = make_buffer(group, other);
        for (uint64_t seed = 160; seed < 170; ++seed) {
            expect_round(buffer, Plan::of(one, 2, seed), rank);
            expect_round(second, Plan::of(other, 2, seed), rank);
        }
    });
}

// ---- Other ways to meet
// ---------------------------------------------------------------------------

// An all-gather of the caller's own.
struct Gatherer {
    explicit Gatherer(int rank_count) : point(rank_count), sent(rank_count) {}
    MeetingPoint point;
    std::vector<const void *> sent;
};
struct GathererOfRank {
    Gatherer *all;
    int rank;
};

int32_t gather(void *context, const void *send, void *receive, size_t bytes) {
    const GathererOfRank &self = *static_cast<GathererOfRank *>(context);
    self.all->sent[self.rank] = send;
    self.all->point.meet();
    for (size_t rank = 0; rank < self.all->sent.size(); ++rank)
        std::memcpy(static_cast<char *>(receive) + rank * bytes, self.all->sent[rank], bytes);
    self.all->point.meet();
    return 0;
}

TEST_F(Api, MeetsOverTheCallersAllGather) {
    ONLY_ON_THE_CPU("the ranks meet in memory, as threads");
    Gatherer gatherer(3);
    run_ranks(3, [&](int rank) {
        GathererOfRank self{&gatherer, rank};
        mep_group_config_t config = group_config(rank, 3, nullptr);
        config.all_gather = gather;
        config.all_gather_context = &self;
        const Group group = make_group(config);
        const mep_buffer_config_t shape = buffer_config(3);
        expect_round(make_buffer(group, shape), Plan::of(shape, 3, 180), rank);
    });
}

TEST_F(Api, MeetsOverAUniqueIdInOneProcess) {
    ONLY_ON_THE_CPU("on GPUs all ranks of these tests meet over one, in processes");
    mep_unique_id_t id;
    ASSERT_EQ(mep_unique_id_create(nullptr, &id), MEP_OK) << mep_last_error();
    run_ranks(2, [&](int rank) {
        mep_group_config_t config = group_config(rank, 2, nullptr);
        config.unique_id = &id;
        const Group group = make_group(config);
        const mep_buffer_config_t shape = buffer_config(2);
        expect_round(make_buffer(group, shape), Plan::of(shape, 2, 190), rank);
    });
}

TEST_F(Api, GathersTheCallersBytes) {
    run_buffers(3, buffer_config(3), [](const Group &group, const Buffer &, int rank) {
        const int64_t mine = 100 + rank;
        int64_t all[3] = {};
        EXPECT_EQ(mep_group_all_gather(group.get(), &mine, all, sizeof mine), MEP_OK);
        for (int peer = 0; peer < 3; ++peer)
            EXPECT_EQ(all[peer], 100 + peer);
    });
}

}  // namespace
}  // namespace ep::test
