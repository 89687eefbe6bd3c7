// How a group forms, where a rank stops on the way.
#include "core/bootstrap.h"
#include "support/tidy.h"

#include <future>

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

}  // namespace
}  // namespace ep::test
