// Which NIC a GPU gets, and the texts that narrow choices.
#include "topology/select.h"

#include "base/status.h"
#include "topology/machines.h"

#include <gtest/gtest.h>

namespace ep {
namespace {

using namespace test;

// The names of the NICs that the GPUs of a topology get.
Rows selected(const Topology &topology, const std::string &filter = "") {
    std::vector<int> nics;
    EXPECT_EQ(select_nics(topology, filter, &nics), MEP_OK) << last_error();
    Rows names;
    for (const int nic : nics)
        names.push_back(nic == kNicNone ? "none" : topology.nics[nic].name);
    return names;
}

// ---- NICs --------------------------------------------------------------------------------------

class SelectMachine : public ::testing::TestWithParam<Machine> {};

TEST_P(SelectMachine, GivesEachGpuItsNearest) {
    EXPECT_EQ(selected(topology_of(GetParam())), GetParam().nics);
}

TEST_P(SelectMachine, GivesTheSameAfterALoad) {
    Topology loaded;
    ASSERT_EQ(load_topology(save_topology(topology_of(GetParam())), &loaded), MEP_OK);
    EXPECT_EQ(selected(loaded), GetParam().nics);
}

INSTANTIATE_TEST_SUITE_P(All, SelectMachine, ::testing::ValuesIn(kMachines),
                         [](const auto &info) { return info.param.name; });

TEST(SelectNics, TakesActivePortsOnly) {
    Topology topology = topology_of_tree("pcie_4");
    for (const PortState state :
         {PortState::kDown, PortState::kInit, PortState::kArmed, PortState::kActiveDefer}) {
        topology.nics[0].port_state = state;
        EXPECT_EQ(selected(topology), (Rows{"mlx5_1", "mlx5_1", "mlx5_1", "mlx5_1"}));
    }
    topology.nics[1].port_state = PortState::kDown;
    EXPECT_EQ(selected(topology), (Rows{"none", "none", "none", "none"}));
}

TEST(SelectNics, SpreadsGpusThatLostTheirs) {
    Topology topology = topology_of_tree("nvlink_8");
    topology.nics[0].port_state = PortState::kDown;
    topology.nics[1].port_state = PortState::kDown;
    EXPECT_EQ(selected(topology), (Rows{"mlx5_4", "mlx5_5", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9",
                                        "mlx5_10", "mlx5_11"}));
}

// Both are PXB, but the second one shares a bridge more.
TEST(SelectNics, CountsComponentsWhereTheLinksAreOfOneKind) {
    const std::string gpu =
        "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.0/"
        "0000:19:00.0/0000:1a:00.0/0000:1b:00.0/0000:1c:00.0";
    Topology topology;
    topology.gpus = {{Vendor::kNvidia, "", gpu, 0}};
    topology.nics = {{"far", PortState::kActive, LinkLayer::kInfiniband,
                      "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:02.0/0000:2a:00.0", 0},
                     {"near", PortState::kActive, LinkLayer::kInfiniband,
                      "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.0/"
                      "0000:19:02.0/0000:2c:00.0",
                      0}};
    topology.nic_links = {{0, 0, LinkKind::kPxb}, {0, 1, LinkKind::kPxb}};
    EXPECT_EQ(selected(topology), Rows{"near"});
}

TEST(SelectNics, SpreadsRanksOnTheCpu) {
    Topology topology = topology_of_tree("metax_pairs");
    topology.gpus.assign(3, {Vendor::kNone, "", "", 0});
    topology.gpu_links.clear();
    topology.nic_links.clear();
    EXPECT_EQ(selected(topology), (Rows{"mlx5_0", "mlx5_1", "mlx5_0"}));
}

// ---- The filter --------------------------------------------------------------------------------

TEST(NicFilter, LeavesTheNicsThatItNames) {
    const Topology topology = topology_of_tree("nvlink_8");
    EXPECT_EQ(
        selected(topology, "mlx5_3, mlx5_10"),
        (Rows{"mlx5_3", "mlx5_3", "mlx5_3", "mlx5_3", "mlx5_10", "mlx5_10", "mlx5_10", "mlx5_10"}));
}

TEST(NicFilter, DoesNotWakeAPort) {
    EXPECT_EQ(selected(topology_of_tree("metax_quads"), "mlx5_1"), Rows(8, "none"));
}

TEST(NicFilter, WithAnUnknownNameIsRefused) {
    const Topology topology = topology_of_tree("pcie_4");
    std::vector<int> nics = {77};
    for (const auto &[filter, piece] :
         {std::make_pair("mlx5_0,mlx5_2", "\"mlx5_2\""), std::make_pair("mlx5", "\"mlx5\""),
          std::make_pair("mlx5_0,", "\"\""), std::make_pair("mlx5_0 mlx5_1", "\"mlx5_0 mlx5_1\""),
          std::make_pair(" ", "\" \"")}) {
        EXPECT_EQ(select_nics(topology, filter, &nics), MEP_INVALID_ARGUMENT) << filter;
        EXPECT_EQ(std::string(last_error()), std::string("the NIC filter \"") + filter +
                                                 "\" names " + piece +
                                                 ", but the NICs are: mlx5_0, mlx5_1");
    }
    EXPECT_EQ(select_nics(topology_of_tree("no_gpu"), "mlx5_0", &nics), MEP_INVALID_ARGUMENT);
    EXPECT_STREQ(last_error(),
                 "the NIC filter \"mlx5_0\" names \"mlx5_0\", but the NICs are: none");
    EXPECT_EQ(nics, std::vector<int>{77}) << "the output was touched";
}

// ---- Pairs of GPUs -----------------------------------------------------------------------------

TEST(GpuPairs, AreReadFromAList) {
    std::vector<GpuPair> pairs;
    ASSERT_EQ(parse_gpu_pairs("0-1, 3-2", 4, &pairs), MEP_OK) << last_error();
    EXPECT_EQ(pairs, (std::vector<GpuPair>{{0, 1}, {2, 3}}));
    ASSERT_EQ(parse_gpu_pairs("", 4, &pairs), MEP_OK) << last_error();
    EXPECT_TRUE(pairs.empty());
}

TEST(GpuPairs, WithATypoAreRefused) {
    struct Typo {
        const char *text, *message;
    };
    std::vector<GpuPair> pairs = {{7, 8}};
    for (const auto &[text, message] :
         {Typo{"0-1,2_3", "\"2_3\" is not a pair like 0-1"},
          Typo{"0-1,", "\"\" is not a pair like 0-1"},
          Typo{"0-1;2-3", "\"0-1;2-3\" is not a pair like 0-1"},
          Typo{"0-1-2", "\"0-1-2\" is not a pair like 0-1"},
          Typo{"0--1", "\"0--1\" is not a pair like 0-1"},
          Typo{"0 - 1", "\"0 - 1\" is not a pair like 0-1"},
          Typo{"0-99999999999", "\"0-99999999999\" is not a pair like 0-1"},
          Typo{"0-1,2-2", "\"2-2\" pairs a GPU with itself"},
          Typo{"0-1,2-4", "\"2-4\" names a GPU that is not in [0, 4)"},
          Typo{"0-1,1-0", "\"1-0\" is there twice"}}) {
        EXPECT_EQ(parse_gpu_pairs(text, 4, &pairs), MEP_INVALID_ARGUMENT) << text;
        EXPECT_EQ(std::string(last_error()),
                  std::string("the list of GPU pairs \"") + text + "\": " + message);
    }
    EXPECT_EQ(pairs, (std::vector<GpuPair>{{7, 8}})) << "the output was touched";
}

}  // namespace
}  // namespace ep
