// How a group forms, where a rank stops on the way or is not as the others are.
#include "base/status.h"
#include "core/bootstrap.h"
#include "core/greeting.h"
#include "support/tidy.h"

#include <array>
#include <functional>
#include <future>
#include <memory>
#include <string>

namespace ep::test {
namespace {

using Clock = std::chrono::steady_clock;

class FormationSteps : public Tidy {};

// A rank that comes late, and then never takes the next step.
TEST_F(FormationSteps, ShareTheTimeOfTheCall) {
    constexpr int64_t kTimeoutUs = 600'000, kLateUs = 400'000;
    constexpr int64_t kLimitUs = kTimeoutUs + kTimeoutUs / 10 + 50'000;
    mep_unique_id_t id{};
    ASSERT_EQ(mep_unique_id_create(nullptr, &id), MEP_OK) << mep_last_error();
    std::unique_ptr<Bootstrap> late;
    auto joined = std::async(std::launch::async, [&] {
        std::this_thread::sleep_for(std::chrono::microseconds(kLateUs));
        return bootstrap_from_unique_id({1, 2}, id, Deadline(30'000'000), &late);
    });
    mep_group_config_t config{};
    config.struct_size = sizeof config;
    config.rank_count = 2;
    config.unique_id = &id;
    config.timeout_us = kTimeoutUs;
    const Clock::time_point began = Clock::now();
    mep_group_t *group = nullptr;
    EXPECT_EQ(mep_group_create(&config, &group), MEP_TIMEOUT);
    const auto took = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - began);
    EXPECT_NE(std::string(mep_last_error()).find("all-gather"), std::string::npos)
        << mep_last_error();
    EXPECT_LE(took.count(), kLimitUs);
    EXPECT_EQ(joined.get(), MEP_OK) << mep_last_error();
}

using World = std::unique_ptr<mep_world_t, decltype(&mep_world_destroy)>;

World world_of_two() {
    mep_world_t *world = nullptr;
    EXPECT_EQ(mep_world_create(2, &world), MEP_OK) << mep_last_error();
    return {world, &mep_world_destroy};
}

mep_group_config_t config_in(const World &world, int rank) {
    mep_group_config_t config{};
    config.struct_size = sizeof config;
    config.rank = rank;
    config.rank_count = 2;
    config.world = world.get();
    config.timeout_us = 20'000'000;
    return config;
}

struct Refusal {
    mep_status_t status;
    std::string message;
};

Refusal create_and_destroy(const mep_group_config_t &config) {
    mep_group_t *group = nullptr;
    const mep_status_t status = mep_group_create(&config, &group);
    Refusal refusal{status, status == MEP_OK ? "" : mep_last_error()};
    mep_group_destroy(group);
    return refusal;
}

int32_t never_called(void *, const void *const *, void *const *, const size_t *, void *) {
    return 1;
}

TEST_F(FormationSteps, TellEveryRankWhatOneCannotDo) {
    expect_warnings();  // an error is logged before the others have come
    const struct {
        const char *named;
        std::function<void(mep_group_config_t *)> spoil;
    } cases[] = {
        {"config.disable_p2p is 7", [](mep_group_config_t *c) { c->disable_p2p = 7; }},
        {"config.all_to_all_on_stream",
         [](mep_group_config_t *c) { c->all_to_all_on_stream = &never_called; }},
        // Not there, or not the others'.
        {"", [](mep_group_config_t *c) { c->backend = MEP_BACKEND_MACA; }},
    };
    for (const auto &one : cases) {
        const World world = world_of_two();
        mep_group_config_t spoilt = config_in(world, 1);
        one.spoil(&spoilt);
        auto other = std::async(std::launch::async, [&] { return create_and_destroy(spoilt); });
        const Refusal here = create_and_destroy(config_in(world, 0)), there = other.get();
        EXPECT_NE(there.status, MEP_OK);
        EXPECT_NE(there.status, MEP_TIMEOUT);
        EXPECT_NE(there.message.find(one.named), std::string::npos) << there.message;
        EXPECT_EQ(here.status, there.status) << here.message;
        EXPECT_NE(here.message.find("rank 1"), std::string::npos) << here.message;
        EXPECT_NE(here.message.find(one.named), std::string::npos) << here.message;
    }
}

Greeting greeting_of_rank_1() {
    Greeting greeting{};
    greeting.version = mep_version();
    greeting.rank = 1;
    greeting.rank_count = 2;
    greeting.backend = MEP_BACKEND_CPU;
    greeting.facts.engine = kEngineTcp;
    greeting.present[0] = 3;
    return greeting;
}

// What rank 0 gets if rank 1 greets it so.
Refusal refusal_beside(const Greeting &greeting) {
    const World world = world_of_two();
    auto peer = std::async(std::launch::async, [&] {
        std::unique_ptr<Bootstrap> bootstrap;
        std::array<Greeting, 2> all{};
        EXPECT_EQ(bootstrap_from_world({1, 2}, world.get(), &bootstrap), MEP_OK);
        EXPECT_EQ(bootstrap->all_gather(&greeting, &all, sizeof greeting, Deadline(20'000'000)),
                  MEP_OK)
            << last_error();
    });
    const Refusal refusal = create_and_destroy(config_in(world, 0));
    peer.get();
    return refusal;
}

// What a peer says of itself, however it says it, is answered with a status and a text.
TEST_F(FormationSteps, TakeNoPeersWordForAStatus) {
    const struct {
        int32_t status;
        const char *message;
        mep_status_t expected;
        const char *named;
    } cases[] = {{MEP_DEVICE_ERROR, "no\x1b[31m GPU", MEP_DEVICE_ERROR, "rank 1: no?[31m GPU"},
                 {21, "odd", MEP_BOOTSTRAP_FAILED, "rank 1: odd"},
                 {-7, "", MEP_BOOTSTRAP_FAILED, "rank 1: it gave no reason"}};
    for (const auto &one : cases) {
        Greeting greeting = greeting_of_rank_1();
        greeting.trouble.status = one.status;
        std::strncpy(greeting.trouble.message, one.message, sizeof greeting.trouble.message);
        const Refusal refusal = refusal_beside(greeting);
        EXPECT_EQ(refusal.status, one.expected);
        EXPECT_NE(refusal.message.find(one.named), std::string::npos) << refusal.message;
    }
}

TEST_F(FormationSteps, NameWhatDiffersFromAPeer) {
    const struct {
        const char *named;
        std::function<void(Greeting *)> change;
    } cases[] = {
        {"rank 1 runs version", [](Greeting *g) { ++g->version; }},
        {"config.rank_count is 3 on rank 1", [](Greeting *g) { g->rank_count = 3; }},
        {"config.backend is 2 on rank 1", [](Greeting *g) { g->backend = MEP_BACKEND_CUDA; }},
        {"config.active_ranks differs", [](Greeting *g) { g->present[0] = 2; }},
        {"config.all_to_all is given on rank 1",
         [](Greeting *g) { g->facts.engine = kEngineCaller; }},
    };
    for (const auto &one : cases) {
        Greeting greeting = greeting_of_rank_1();
        one.change(&greeting);
        const Refusal refusal = refusal_beside(greeting);
        EXPECT_EQ(refusal.status, MEP_MISMATCH);
        EXPECT_NE(refusal.message.find(one.named), std::string::npos) << refusal.message;
    }
}

}  // namespace
}  // namespace ep::test
