// The library with the MACA backend's host half, over a runtime without devices.
#include "mooncake_ep.h"

#include <gtest/gtest.h>
#include <string>

namespace {

TEST(MacaHost, SaysThatItIsAShim) {
    mep_backend_info_t info{};
    info.struct_size = sizeof info;
    ASSERT_EQ(mep_backend_query(MEP_BACKEND_MACA, &info), MEP_OK);
    EXPECT_STREQ(info.name, "maca (shim without a runtime)");
    EXPECT_EQ(info.available, 0);
    EXPECT_EQ(info.device_count, 0);
    EXPECT_STREQ(info.reason, "the shim has no devices");
}

TEST(MacaHost, RefusesAGroupWithoutADevice) {
    mep_world_t *world = nullptr;
    ASSERT_EQ(mep_world_create(1, &world), MEP_OK);
    mep_group_config_t config{};
    config.struct_size = sizeof config;
    config.rank_count = 1;
    config.backend = MEP_BACKEND_MACA;
    config.world = world;
    mep_group_t *group = nullptr;
    EXPECT_EQ(mep_group_create(&config, &group), MEP_UNSUPPORTED);
    EXPECT_EQ(group, nullptr);
    EXPECT_NE(std::string(mep_last_error()).find("the shim has no devices"), std::string::npos)
        << mep_last_error();
    mep_world_destroy(world);
}

}  // namespace
