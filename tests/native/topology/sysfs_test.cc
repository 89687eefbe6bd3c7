// What is read from the trees of machines, and what is said where one is broken.
#include "topology/sysfs.h"

#include "base/status.h"
#include "topology/machines.h"
#include "topology/pci_path.h"

#include <gtest/gtest.h>
#include <unistd.h>

namespace ep {
namespace {

using namespace test;

// ---- Whole machines ----------------------------------------------------------------------------

class SysfsMachine : public ::testing::TestWithParam<Machine> {};

TEST_P(SysfsMachine, LinksGpusByPci) {
    EXPECT_EQ(gpu_link_rows(topology_of_tree(GetParam().name)), GetParam().by_pci);
}

TEST_P(SysfsMachine, LinksGpusToNicsByPci) {
    EXPECT_EQ(nic_link_rows(topology_of_tree(GetParam().name)), GetParam().to_nics);
}

TEST_P(SysfsMachine, RoundTrips) {
    expect_round_trip(topology_of_tree(GetParam().name));
}

TEST_P(SysfsMachine, HasGpusOfOneVendor) {
    for (const Gpu &gpu : topology_of_tree(GetParam().name).gpus)
        EXPECT_EQ(gpu.vendor, GetParam().vendor);
}

INSTANTIATE_TEST_SUITE_P(All, SysfsMachine, ::testing::ValuesIn(kMachines),
                         [](const auto &info) { return info.param.name; });

TEST(Sysfs, OrdersGpusByAddress) {
    const Topology topology = topology_of_tree("nvlink_8");
    std::vector<std::string> addresses;
    for (const Gpu &gpu : topology.gpus)
        addresses.push_back(pci_address(gpu.pci_path));
    EXPECT_EQ(addresses, (std::vector<std::string>{"0000:1b:00.0", "0000:3d:00.0", "0000:4e:00.0",
                                                   "0000:5f:00.0", "0000:9d:00.0", "0000:bd:00.0",
                                                   "0000:cd:00.0", "0000:dd:00.0"}));
    EXPECT_EQ(topology.gpus[0].pci_path,
              "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:02.0/0000:1b:00.0");
    EXPECT_EQ(topology.gpus[3].numa_node, 0);
    EXPECT_EQ(topology.gpus[4].numa_node, 1);
    EXPECT_EQ(topology.gpus[0].uuid, "");
}

TEST(Sysfs, OrdersNicsByTheirNumbers) {
    std::vector<std::string> names;
    for (const Nic &nic : topology_of_tree("nvlink_8").nics)
        names.push_back(nic.name);
    EXPECT_EQ(names, (std::vector<std::string>{"mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6",
                                               "mlx5_9", "mlx5_10", "mlx5_11"}));
}

TEST(Sysfs, ReadsPorts) {
    const Topology ethernet = topology_of_tree("pcie_4"), quads = topology_of_tree("metax_quads");
    EXPECT_EQ(ethernet.nics[0].link_layer, LinkLayer::kEthernet);
    EXPECT_EQ(ethernet.nics[0].port_state, PortState::kActive);
    EXPECT_EQ(ethernet.nics[1].numa_node, 1);
    EXPECT_EQ(quads.nics[0].link_layer, LinkLayer::kInfiniband);
    EXPECT_EQ(quads.nics[1].port_state, PortState::kDown);
}

TEST(Sysfs, ReadsNumaNodes) {
    EXPECT_EQ(topology_of_tree("nvlink_8").numa_nodes, (std::vector<int>{0, 1}));
    EXPECT_EQ(topology_of_tree("no_gpu").numa_nodes, std::vector<int>{0});
}

TEST(Sysfs, TakesTheOnlyNumaNodeIfTheFirmwareTellsNone) {
    EXPECT_EQ(topology_of_tree("one_gpu").gpus[0].numa_node, 0);
}

TEST(Sysfs, OfThisMachineCanBeRead) {
    if (access("/sys/bus/pci", R_OK) != 0) GTEST_SKIP() << "this machine shows no PCI";
    Topology topology;
    ASSERT_EQ(read_sysfs("/", &topology), MEP_OK) << last_error();
    expect_round_trip(topology);
}

// ---- Machines that differ in one respect -------------------------------------------------------

constexpr char kPcieGpu0[] =
    "sys/devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:00.0/0000:3d:00.0";

// What reading a tree comes to, after a few lines were added.
mep_status_t read_changed(const std::string &name, const std::vector<std::string> &lines,
                          Topology *topology) {
    Tree tree(tree_text(name));
    for (const std::string &line : lines)
        tree.add(line);
    return read_sysfs(tree.root(), topology);
}

TEST(Sysfs, WithoutPciAndInfinibandIsEmpty) {
    Topology topology;
    ASSERT_EQ(read_changed("no_gpu", {}, &topology), MEP_OK);
    const Tree bare("sys/kernel/notes = none\n");
    ASSERT_EQ(read_sysfs(bare.root(), &topology), MEP_OK) << last_error();
    EXPECT_EQ(save_topology(topology), save_topology({}));
}

TEST(Sysfs, WithoutNumaHasNoNodes) {
    Tree tree(tree_text("one_gpu"));
    tree.remove("sys/devices/system");
    tree.remove("sys/devices/pci0000:00/0000:00:05.0/0000:06:00.0/numa_node");
    Topology topology;
    ASSERT_EQ(read_sysfs(tree.root(), &topology), MEP_OK) << last_error();
    EXPECT_EQ(topology.gpus[0].numa_node, kNumaNodeUnknown);
}

TEST(Sysfs, IgnoresDevicesOfAGpuVendorThatAreNoGpus) {
    Topology topology;
    ASSERT_EQ(read_changed("pcie_4", {std::string(kPcieGpu0) + "/class = 0x068000"}, &topology),
              MEP_OK)
        << last_error();
    EXPECT_EQ(topology.gpus.size(), 3u);
}

TEST(Sysfs, KnowsANicThatIsMadeOfSoftware) {
    const std::string device = "sys/devices/virtual/infiniband/rxe0";
    Topology topology;
    ASSERT_EQ(read_changed(
                  "pcie_4",
                  {device + "/ports/1/state = 4: ACTIVE", device + "/ports/1/link_layer = Ethernet",
                   "sys/class/infiniband/rxe0 -> ../../devices/virtual/infiniband/rxe0"},
                  &topology),
              MEP_OK)
        << last_error();
    const int nic = find_nic(topology, "rxe0");
    ASSERT_EQ(nic, 2);
    EXPECT_EQ(topology.nics[nic].pci_path, "");
    EXPECT_EQ(find_nic_link(topology, 0, nic), nullptr);
    expect_round_trip(topology);
}

TEST(Sysfs, PutsAHigherDomainLast) {
    const std::string device = "sys/devices/pci10000:00/10000:00:01.0";
    Topology topology;
    ASSERT_EQ(read_changed("pcie_4",
                           {device + "/class = 0x030200", device + "/vendor = 0x10de",
                            device + "/numa_node = 1",
                            "sys/bus/pci/devices/10000:00:01.0 -> "
                            "../../../devices/pci10000:00/10000:00:01.0"},
                           &topology),
              MEP_OK)
        << last_error();
    ASSERT_EQ(topology.gpus.size(), 5u);
    EXPECT_EQ(pci_address(topology.gpus[4].pci_path), "10000:00:01.0");
    EXPECT_EQ(find_gpu_link(topology, 3, 4)->kind, LinkKind::kNode);
}

// ---- Broken machines ---------------------------------------------------------------------------

struct Broken {
    const char *removed;  // a path, before a line is added; "": none
    std::string added;
    const char *message;  // a part of it
};

class BrokenSysfs : public ::testing::TestWithParam<Broken> {};

TEST_P(BrokenSysfs, IsRefusedWithTheFileAndTheReason) {
    Tree tree(tree_text("pcie_4"));
    if (*GetParam().removed != '\0') tree.remove(GetParam().removed);
    tree.add(GetParam().added);
    Topology topology;
    topology.numa_nodes = {7};
    EXPECT_EQ(read_sysfs(tree.root(), &topology), MEP_SYSTEM_ERROR);
    EXPECT_NE(std::string(last_error()).find(GetParam().message), std::string::npos)
        << last_error();
    EXPECT_EQ(topology.numa_nodes, std::vector<int>{7}) << "the output was touched";
}

constexpr char kNic0[] =
    "sys/devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:08.0/0000:3f:00.0/infiniband/mlx5_0";
constexpr char kNic0State[] =
    "sys/devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:08.0/0000:3f:00.0/infiniband/mlx5_0/"
    "ports/1/state";
constexpr char kNic0Ports[] =
    "sys/devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:08.0/0000:3f:00.0/infiniband/mlx5_0/"
    "ports";
constexpr char kGpu0Vendor[] =
    "sys/devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:00.0/0000:3d:00.0/vendor";

const std::string kGpu0 = kPcieGpu0;

INSTANTIATE_TEST_SUITE_P(
    All, BrokenSysfs,
    ::testing::Values(
        Broken{"sys", "", "/sys: No such file or directory"},
        Broken{"sys", "sys = a file", "/sys: Not a directory"},
        Broken{"sys/bus", "sys/bus/pci/devices = a file", "/bus/pci/devices: Not a directory"},
        Broken{"sys/class", "sys/class/infiniband -> infiniband",
               "/class/infiniband: Too many levels of symbolic links"},
        Broken{kGpu0Vendor, "", "0000:3d:00.0/vendor: No such file or directory"},
        Broken{kGpu0Vendor, kGpu0 + "/vendor/x = a folder", "0000:3d:00.0/vendor: Is a directory"},
        Broken{"", "sys/bus/pci/devices/0000:3d:00.0 -> ../../../devices/nowhere",
               "/bus/pci/devices/0000:3d:00.0/class: No such file or directory"},
        Broken{"",
               "sys/bus/pci/devices/0000:3d:00.0 -> ../../../devices/pci0000:3a/0000:3a:00.0/"
               "0000:3b:00.0/0000:3c:04.0/0000:3e:00.0",
               "0000:3d:00.0 does not lead to the device of that address"},
        Broken{"", kGpu0 + "/numa_node = 2", "numa_node: \"2\" is not a NUMA node of this machine"},
        Broken{"", kGpu0 + "/numa_node = zero",
               "numa_node: \"zero\" is not a NUMA node of this machine"},
        Broken{kNic0Ports, "", "NIC mlx5_0 has no port 1: there is no "},
        Broken{"", "sys/class/infiniband/mlx5 2 -> mlx5_0",
               "NIC \"mlx5 2\": a name is printable and without blanks"},
        Broken{kNic0State, "", "mlx5_0/ports/1/state: No such file or directory"},
        Broken{"", std::string(kNic0) + "/ports/1/state = 4: up",
               "mlx5_0/ports/1/state: \"4: up\" is not a port's state"},
        Broken{"", std::string(kNic0) + "/ports/1/link_layer = Fibre",
               "mlx5_0/ports/1/link_layer: \"Fibre\" is not a link layer"},
        Broken{"", std::string(kNic0) + "/device -> ../../../nowhere",
               "mlx5_0/device: No such file or directory"}));

}  // namespace
}  // namespace ep
