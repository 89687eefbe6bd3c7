// A topology as text: what is saved can be loaded, and what is wrong is said.
#include "topology/graph.h"

#include "base/status.h"
#include "topology/texts.h"

#include <gtest/gtest.h>

namespace ep {
namespace {

using namespace test;

constexpr char kValid[] =
    "mooncake_ep topology 1\n"
    "numa 0\n"
    "numa 1\n"
    "gpu 0 nvidia pci0000:15/0000:15:01.0 numa 0 uuid GPU-5d2f\n"
    "gpu 1 nvidia 0000:97:01.0 numa 1 uuid -\n"
    "gpu 2 metax pci0000:b7/0000:b7:01.0 numa - uuid -\n"
    "gpu 3 none - numa 0 uuid -\n"
    "gpu 4 none - numa 1 uuid -\n"
    "nic mlx5_0 active infiniband pci0000:15/0000:15:02.0 numa 0\n"
    "nic mlx5_1 down ethernet 0000:97:02.0 numa -\n"
    "nic rxe0 active_defer unspecified - numa -\n"
    "link gpu 0 gpu 1 NV18\n"
    "link gpu 0 gpu 2 SYS\n"
    "link gpu 3 gpu 4 SHM\n"
    "link gpu 0 nic mlx5_0 PHB\n"
    "link gpu 1 nic mlx5_0 SYS\n"
    "end\n";

TEST(TopologyText, ReadsEveryItem) {
    Topology t;
    ASSERT_EQ(load_topology(kValid, &t), MEP_OK) << last_error();
    EXPECT_EQ(t.numa_nodes, (std::vector<int>{0, 1}));
    ASSERT_EQ(t.gpus.size(), 5u);
    EXPECT_EQ(t.gpus[0].vendor, Vendor::kNvidia);
    EXPECT_EQ(t.gpus[0].uuid, "GPU-5d2f");
    EXPECT_EQ(t.gpus[0].pci_path, "pci0000:15/0000:15:01.0");
    EXPECT_EQ(t.gpus[1].uuid, "");
    EXPECT_EQ(t.gpus[1].numa_node, 1);
    EXPECT_EQ(t.gpus[2].vendor, Vendor::kMetax);
    EXPECT_EQ(t.gpus[2].numa_node, kNumaNodeUnknown);
    EXPECT_EQ(t.gpus[3].pci_path, "");
    ASSERT_EQ(t.nics.size(), 3u);
    EXPECT_EQ(t.nics[1].name, "mlx5_1");
    EXPECT_EQ(t.nics[1].port_state, PortState::kDown);
    EXPECT_EQ(t.nics[1].link_layer, LinkLayer::kEthernet);
    ASSERT_NE(find_gpu_link(t, 1, 0), nullptr);
    EXPECT_EQ(find_gpu_link(t, 1, 0)->kind, LinkKind::kNvlink);
    EXPECT_EQ(find_gpu_link(t, 1, 0)->lane_count, 18);
    EXPECT_EQ(find_gpu_link(t, 1, 2), nullptr);
    ASSERT_NE(find_nic_link(t, 1, 0), nullptr);
    EXPECT_EQ(find_nic_link(t, 1, 0)->kind, LinkKind::kSys);
}

TEST(TopologyText, IsTheSameWhenSavedAgain) {
    Topology topology;
    ASSERT_EQ(load_topology(kValid, &topology), MEP_OK) << last_error();
    EXPECT_EQ(save_topology(topology), kValid);
}

TEST(TopologyText, OfNothingIsTwoLines) {
    EXPECT_EQ(save_topology({}), "mooncake_ep topology 1\nend\n");
    expect_round_trip({});
}

TEST(LinkName, IsReadAsItIsWritten) {
    for (const char *name :
         {"PROC", "SHM", "NV1", "NV18", "MX", "PIX", "PXB", "PHB", "NODE", "SYS"}) {
        LinkKind kind{};
        int lane_count = -1;
        ASSERT_TRUE(parse_link_name(name, &kind, &lane_count)) << name;
        EXPECT_EQ(link_name(kind, lane_count), name);
    }
    for (const char *name :
         {"", "NV", "NV0", "NV01", "NV-1", "NV1000", "NVx", "pix", "PIX1", "X"}) {
        LinkKind kind{};
        int lane_count = 0;
        EXPECT_FALSE(parse_link_name(name, &kind, &lane_count)) << name;
    }
}

struct Malformed {
    const char *part;  // of the valid text
    const char *by;    // what stands in its place
    const char *message;
};

class MalformedTopology : public ::testing::TestWithParam<Malformed> {};

TEST_P(MalformedTopology, IsRefusedWithTheLineAndTheReason) {
    Topology topology;
    topology.numa_nodes = {7};
    const std::string text = replaced(kValid, GetParam().part, GetParam().by);
    EXPECT_EQ(load_topology(text, &topology), MEP_INVALID_ARGUMENT);
    EXPECT_STREQ(last_error(), (std::string("topology, line ") + GetParam().message).c_str());
    EXPECT_EQ(topology.numa_nodes, std::vector<int>{7}) << "the output was touched";
}

INSTANTIATE_TEST_SUITE_P(
    All, MalformedTopology,
    ::testing::Values(
        Malformed{"topology 1", "topology 2",
                  "1: \"mooncake_ep topology 2\" must be \"mooncake_ep topology 1\""},
        Malformed{"numa 1\n", "numa 0\n", "3: NUMA node 0 follows node 0: nodes must ascend"},
        Malformed{"numa 1\n", "numa one\n", "3: \"one\" is not a NUMA node"},
        Malformed{"numa 1\n", "numa\n", "3: a NUMA node is \"numa NODE\""},
        Malformed{"numa 1\n", "numa  1\n",
                  "3: words are printable and parted by one space: \"numa  1\""},
        Malformed{"numa 1\n", "numa 1\r\n",
                  "3: words are printable and parted by one space: \"numa 1?\""},
        Malformed{"numa 1\n", "\n", "3: words are printable and parted by one space: \"\""},
        Malformed{"numa 1\n", "cpu 1\n", "3: \"cpu\" is not numa, gpu, nic or link"},
        Malformed{"gpu 1 ", "gpu 2 ", "5: \"2\" must be 1: GPUs are counted from 0 on"},
        Malformed{"gpu 1 nvidia", "gpu 1 amd", "5: \"amd\" is not nvidia, metax or none"},
        Malformed{"numa 0 uuid GPU-5d2f", "numa 0",
                  "4: a GPU is \"gpu INDEX VENDOR PCI-PATH numa NODE uuid UUID\""},
        Malformed{"pci0000:15/0000:15:01.0", "pci0000:15/15:01.0",
                  "4: \"pci0000:15/15:01.0\" is not a PCI path"},
        Malformed{"0000:97:01.0", "0000:15:01.0",
                  "5: 0000:15:01.0 is the address of another GPU above"},
        Malformed{"0000:97:01.0 numa 1", "0000:97:01.0 numa 2",
                  "5: \"2\" is not one of the NUMA nodes above"},
        Malformed{"gpu 3 none -", "gpu 3 none 0000:01:00.0",
                  "7: a GPU has a PCI path, and what has the vendor none has not"},
        Malformed{"gpu 1 nvidia 0000:97:01.0", "gpu 1 nvidia -",
                  "5: a GPU has a PCI path, and what has the vendor none has not"},
        Malformed{"nic mlx5_1", "nic mlx5_0", "10: NIC \"mlx5_0\" is there twice"},
        Malformed{"mlx5_0 active ", "mlx5_0 up ",
                  "9: \"up\" is not down, init, armed, active or active_defer"},
        Malformed{"active infiniband", "active token_ring",
                  "9: \"token_ring\" is not infiniband, ethernet or unspecified"},
        Malformed{"down ethernet 0000:97:02.0 numa -", "down ethernet 0000:97:02.0",
                  "10: a NIC is \"nic NAME STATE LINK-LAYER PCI-PATH numa NODE\""},
        Malformed{"gpu 0 gpu 1 NV18", "gpu 0 gpu 5 NV18", "12: \"5\" is not one of the GPUs above"},
        Malformed{"gpu 0 gpu 1 NV18", "gpu 1 gpu 0 NV18",
                  "12: GPUs 1 and 0: the first must be below the second"},
        Malformed{"gpu 0 gpu 1 NV18", "gpu 0 gpu 1 NVX", "12: \"NVX\" is not a kind of link"},
        Malformed{"gpu 0 gpu 2 SYS", "gpu 0 gpu 1 SYS", "13: GPUs 0 and 1 are linked twice"},
        Malformed{"gpu 0 gpu 2 SYS", "gpu 0 gpu 2 NV4", "13: GPUs 0 and 2 cannot be linked by NV4"},
        Malformed{"gpu 0 gpu 2 SYS", "gpu 0 gpu 2 MX", "13: GPUs 0 and 2 cannot be linked by MX"},
        Malformed{"gpu 3 gpu 4 SHM", "gpu 3 gpu 4 PIX", "14: GPUs 3 and 4 cannot be linked by PIX"},
        Malformed{"gpu 0 nic mlx5_0 PHB", "gpu 0 nic mlx5_7 PHB",
                  "15: \"mlx5_7\" is not one of the NICs above"},
        Malformed{"gpu 0 nic mlx5_0 PHB", "gpu 0 nic mlx5_0 NV18",
                  "15: \"NV18\" is not PIX, PXB, PHB, NODE or SYS"},
        Malformed{"gpu 1 nic mlx5_0", "gpu 0 nic mlx5_0",
                  "16: GPU 0 and NIC \"mlx5_0\" are linked twice"},
        Malformed{"link gpu 1 nic", "link nic mlx5_0 gpu 1",
                  "16: a link is \"link gpu INDEX gpu INDEX KIND\" or \"link gpu INDEX nic NAME "
                  "KIND\""},
        Malformed{"link gpu 1 nic mlx5_0 SYS\nend\n", "link gpu 1 nic mlx5_0 SYS\n",
                  "17: the text stops before its last line, \"end\""},
        Malformed{"link gpu 1 nic mlx5_0 SYS\nend\n", "link gpu 1 nic mlx5_0 SYS",
                  "16: the text stops before its last line, \"end\""},
        Malformed{"end\n", "end", "17: a newline and nothing else must follow \"end\""},
        Malformed{"end\n", "end\nnuma 2\n", "17: a newline and nothing else must follow \"end\""}));

TEST(TopologyText, ThatIsEmptyIsRefused) {
    Topology topology;
    EXPECT_EQ(load_topology("", &topology), MEP_INVALID_ARGUMENT);
    EXPECT_STREQ(last_error(), "topology, line 1: \"\" must be \"mooncake_ep topology 1\"");
}

}  // namespace
}  // namespace ep
