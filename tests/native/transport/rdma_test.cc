// The RDMA probe, with libraries that stand for libibverbs.
#include "transport/rdma.h"

#include <gtest/gtest.h>

namespace ep::test {
namespace {

using Names = std::vector<std::string>;

TEST(Rdma, FindsDevicesThatGpusCanDrive) {
    for (int again = 0; again < 2; ++again) {  // the list was given back
        const RdmaProbe probe = probe_rdma(FAKE_IBVERBS_MLX5);
        EXPECT_EQ(probe.devices, (Names{"mlx5_0", "mlx5_bond_0", "bnxt_re0"}));
        EXPECT_EQ(probe.reason, "this version has no transport for it (found mlx5_0, mlx5_bond_0)");
    }
}

TEST(Rdma, FindsOtherDevices) {
    const RdmaProbe probe = probe_rdma(FAKE_IBVERBS_OTHER);
    EXPECT_EQ(probe.devices, Names{"rxe0"});
    EXPECT_EQ(probe.reason, "no mlx5 device found, only rxe0");
}

TEST(Rdma, FindsNoDevice) {
    const RdmaProbe probe = probe_rdma(FAKE_IBVERBS_NONE);
    EXPECT_EQ(probe.devices, Names{});
    EXPECT_EQ(probe.reason, "no RDMA device found");
}

TEST(Rdma, DoesWithoutTheLibrary) {
    const RdmaProbe probe = probe_rdma("libibverbs-that-is-not-there.so.1");
    EXPECT_EQ(probe.devices, Names{});
    EXPECT_NE(probe.reason.find("libibverbs-that-is-not-there.so.1"), std::string::npos);
}

TEST(Rdma, TakesNoOtherLibrary) {
    const RdmaProbe probe = probe_rdma("libm.so.6");
    EXPECT_EQ(probe.devices, Names{});
    EXPECT_EQ(probe.reason, "libm.so.6 is not libibverbs");
}

TEST(Rdma, LooksAtThisMachine) {
    EXPECT_FALSE(machine_rdma().reason.empty());
}

}  // namespace
}  // namespace ep::test
