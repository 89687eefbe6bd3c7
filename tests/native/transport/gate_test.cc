// Which MetaX GPUs may reach each other, on the machines of tests/data/topology.
#include "transport/gate.h"

#include "base/status.h"
#include "support/tree.h"
#include "topology/smi.h"
#include "topology/sysfs.h"

#include <gtest/gtest.h>

namespace ep::test {
namespace {

Topology machine(const std::string &name, bool with_tool) {
    Topology topology;
    const Tree tree(read_data("topology/" + name + ".tree"));
    EXPECT_EQ(read_sysfs(tree.root(), &topology), MEP_OK) << last_error();
    SmiMatrix matrix;
    if (with_tool) {
        EXPECT_EQ(parse_mx_smi(read_data("topology/" + name + ".smi.txt"), &matrix), MEP_OK)
            << last_error();
        EXPECT_EQ(apply_smi(matrix, &topology), MEP_OK) << last_error();
    }
    return topology;
}

// The pairs that a gate lets through, "0-1 2-3".
std::string pairs_of(const P2pGate &gate, int gpus) {
    std::string pairs;
    for (int one = 0; one < gpus; ++one)
        for (int other = one + 1; other < gpus; ++other) {
            EXPECT_EQ(gate.allows(one, other), gate.allows(other, one));
            if (gate.allows(one, other))
                pairs +=
                    (pairs.empty() ? "" : " ") + std::to_string(one) + "-" + std::to_string(other);
        }
    return pairs;
}

std::string allowed(std::string_view pairs, bool all, const Topology &topology) {
    P2pGate gate;
    EXPECT_EQ(P2pGate::of(pairs, all, topology, &gate), MEP_OK) << last_error();
    return pairs_of(gate, static_cast<int>(topology.gpus.size()));
}

TEST(Gate, LetsThroughWhatMetaxlinkJoins) {
    EXPECT_EQ(allowed("", false, machine("metax_pairs", true)), "0-1 2-3");
    EXPECT_EQ(allowed("", false, machine("metax_quads", true)),
              "0-1 0-2 0-3 1-2 1-3 2-3 4-5 4-6 4-7 5-6 5-7 6-7");
}

TEST(Gate, LetsThroughNeighboursWhereNobodyKnowsOfMetaxlink) {
    EXPECT_EQ(allowed("", false, machine("metax_pairs", false)), "0-1 2-3");
    EXPECT_EQ(allowed("", false, machine("metax_quads", false)), "0-1 2-3 4-5 6-7");
    EXPECT_EQ(allowed("", false, {}), "");
}

TEST(Gate, IsWidenedByTheEnvironment) {
    const Topology topology = machine("metax_pairs", true);
    EXPECT_EQ(allowed("1-2,0-3", false, topology), "0-3 1-2");
    EXPECT_EQ(allowed("", true, topology), "0-1 0-2 0-3 1-2 1-3 2-3");
    setenv("MOONCAKE_EP_MACA_P2P_PAIRS", "3-0", 1);
    P2pGate gate;
    EXPECT_EQ(machine_gate(topology, &gate), MEP_OK) << last_error();
    EXPECT_EQ(pairs_of(gate, 4), "0-3");
    setenv("MOONCAKE_EP_MACA_ALLOW_NODE_P2P", "yes", 1);
    EXPECT_EQ(machine_gate(topology, &gate), MEP_INVALID_ARGUMENT);
    EXPECT_NE(std::string(last_error()).find("MOONCAKE_EP_MACA_ALLOW_NODE_P2P"), std::string::npos);
    unsetenv("MOONCAKE_EP_MACA_ALLOW_NODE_P2P");
    unsetenv("MOONCAKE_EP_MACA_P2P_PAIRS");
}

TEST(Gate, NamesATypoInThePairs) {
    const Topology topology = machine("metax_pairs", true);
    P2pGate gate;
    for (const char *pairs : {"0-4", "0_1", "0-1,", "1-1"}) {
        EXPECT_EQ(P2pGate::of(pairs, false, topology, &gate), MEP_INVALID_ARGUMENT) << pairs;
        EXPECT_NE(std::string(last_error()).find("MOONCAKE_EP_MACA_P2P_PAIRS: "), std::string::npos)
            << last_error();
    }
}

TEST(Gate, KeepsOutAGpuOfUnknownNumber) {
    P2pGate gate;
    ASSERT_EQ(P2pGate::of("", false, machine("metax_pairs", true), &gate), MEP_OK);
    EXPECT_FALSE(gate.allows(-1, 0));
    EXPECT_FALSE(gate.allows(-1, -1));
    EXPECT_TRUE(gate.allows(2, 2));
    ASSERT_EQ(P2pGate::of("", true, machine("metax_pairs", true), &gate), MEP_OK);
    EXPECT_TRUE(gate.allows(-1, 0));
}

TEST(Gate, NumbersGpusByTheirPciAddress) {
    const Topology topology = machine("metax_pairs", false);
    for (size_t gpu = 0; gpu < topology.gpus.size(); ++gpu) {
        const std::string &path = topology.gpus[gpu].pci_path;
        EXPECT_EQ(physical_number(topology, path.substr(path.rfind('/') + 1)), int(gpu));
    }
    EXPECT_EQ(physical_number(topology, "0000:ff:1f.7"), -1);
}

// The tool is asked where it is found, and what it prints has to fit the machine.
TEST(Gate, DoesNotTrustAToolThatSeesOtherGpus) {
    const Tree tools("mx-smi = #!/bin/sh\n");
    std::ofstream(tools.root() + "/mx-smi")
        << "#!/bin/sh\ncat " << MEP_TEST_DATA_DIR << "/topology/metax_pairs.smi.txt\n";
    std::filesystem::permissions(tools.root() + "/mx-smi", std::filesystem::perms::owner_all);
    const std::string path = getenv("PATH");
    setenv("PATH", (tools.root() + ":" + path).c_str(), 1);
    const Topology topology = machine_topology();
    setenv("PATH", path.c_str(), 1);
    for (const GpuLink &link : topology.gpu_links)
        EXPECT_NE(link.kind, LinkKind::kMetaxlink);
}

TEST(Gate, KnowsThisMachineOrSaysNothing) {
    const Topology topology = machine_topology();
    P2pGate gate;
    EXPECT_EQ(machine_gate(topology, &gate), MEP_OK) << last_error();
}

}  // namespace
}  // namespace ep::test
