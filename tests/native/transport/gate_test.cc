// Which MetaX GPUs may reach each other, on the machines of tests/data/topology.
#include "transport/gate.h"

#include "base/status.h"
#include "support/tree.h"
#include "topology/smi.h"
#include "topology/sysfs.h"

#include <gtest/gtest.h>

namespace ep::test {
namespace {

// As machine_gate() knows it; where the tool is, that prints `tool`, if it is not empty.
struct Machine {
    Topology topology;
    NearPairs near = NearPairs::kNeighbours;
};

std::string smi_of(const std::string &name) {
    return read_data("topology/" + name + ".smi.txt");
}

Machine machine(const std::string &tree_text, const std::string &tool) {
    Machine made;
    const Tree tree(tree_text);
    EXPECT_EQ(read_sysfs(tree.root(), &made.topology), MEP_OK) << last_error();
    SmiMatrix matrix;
    if (tool.empty()) return made;
    EXPECT_EQ(parse_mx_smi(tool, &matrix), MEP_OK) << last_error();
    EXPECT_EQ(apply_smi(matrix, &made.topology), MEP_OK) << last_error();
    made.near = NearPairs::kOfTopology;
    return made;
}

Machine recorded(const std::string &name, bool with_tool) {
    return machine(read_data("topology/" + name + ".tree"), with_tool ? smi_of(name) : "");
}

std::string replaced(std::string text, const std::string &part, const std::string &by) {
    for (size_t at = 0; (at = text.find(part, at)) != text.npos; at += by.size())
        text.replace(at, part.size(), by);
    return text;
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

std::string allowed(std::string_view pairs, bool all, const Machine &machine) {
    P2pGate gate;
    EXPECT_EQ(P2pGate::of(pairs, all, machine.topology, machine.near, &gate), MEP_OK)
        << last_error();
    return pairs_of(gate, static_cast<int>(machine.topology.gpus.size()));
}

// What the gate of the machine in `tree` lets through, or why there is none.
struct Found {
    mep_status_t status;
    std::string pairs, problem;
};
Found gate_of(const Tree &tree, int64_t timeout_us = 20'000'000) {
    Topology topology;
    P2pGate gate;
    const mep_status_t status = machine_gate(tree.root(), Deadline(timeout_us), &topology, &gate);
    if (status != MEP_OK) return {status, "", last_error()};
    return {status, pairs_of(gate, static_cast<int>(topology.gpus.size())), ""};
}

// While it lives, a program of this name comes first on the path.
class Tool {
  public:
    explicit Tool(const std::string &script) : folder_("mx-smi = \n"), path_(getenv("PATH")) {
        std::ofstream(folder_.root() + "/mx-smi") << "#!/bin/sh\n" << script << "\n";
        std::filesystem::permissions(folder_.root() + "/mx-smi", std::filesystem::perms::owner_all);
        setenv("PATH", (folder_.root() + ":" + path_).c_str(), 1);
    }
    Tool(const Tool &) = delete;
    Tool &operator=(const Tool &) = delete;
    ~Tool() { setenv("PATH", path_.c_str(), 1); }

    static std::string print(const std::string &name) {
        return std::string("cat ") + MEP_TEST_DATA_DIR + "/topology/" + name;
    }

  private:
    const Tree folder_;
    const std::string path_;
};

TEST(Gate, LetsThroughWhatMetaxlinkJoins) {
    EXPECT_EQ(allowed("", false, recorded("metax_pairs", true)), "0-1 2-3");
    EXPECT_EQ(allowed("", false, recorded("metax_quads", true)),
              "0-1 0-2 0-3 1-2 1-3 2-3 4-5 4-6 4-7 5-6 5-7 6-7");
}

TEST(Gate, LetsThroughNeighboursWhereNobodyKnowsOfMetaxlink) {
    EXPECT_EQ(allowed("", false, recorded("metax_pairs", false)), "0-1 2-3");
    EXPECT_EQ(allowed("", false, recorded("metax_quads", false)), "0-1 2-3 4-5 6-7");
    EXPECT_EQ(allowed("", false, {}), "");
}

TEST(Gate, LetsNothingThroughWhereTheToolSaysThatNoneAreNear) {
    const std::string tree = read_data("topology/metax_pairs.tree");
    const std::string far = replaced(smi_of("metax_pairs"), " MX ", " NODE ");
    EXPECT_EQ(allowed("", false, machine(tree, far)), "");
    const Tool tool(Tool::print("metax_pairs.smi.txt") + " | sed '/^GPU/s/MX/NODE/g'");
    EXPECT_EQ(gate_of(Tree(tree)).pairs, "");
}

TEST(Gate, IsWidenedByTheEnvironment) {
    const Machine four = recorded("metax_pairs", true);
    EXPECT_EQ(allowed("1-2,0-3", false, four), "0-1 0-3 1-2 2-3");
    EXPECT_EQ(allowed("0-1", false, four), "0-1 2-3");
    EXPECT_EQ(allowed("", true, four), "0-1 0-2 0-3 1-2 1-3 2-3");
    const Tree tree(read_data("topology/metax_pairs.tree"));
    setenv("MOONCAKE_EP_MACA_P2P_PAIRS", "3-0", 1);
    EXPECT_EQ(gate_of(tree).pairs, "0-1 0-3 2-3");
    {
        const Tool tool(Tool::print("metax_pairs.smi.txt") + " | sed '/^GPU/s/MX/NODE/g'");
        EXPECT_EQ(gate_of(tree).pairs, "0-3");
    }
    setenv("MOONCAKE_EP_MACA_ALLOW_NODE_P2P", "yes", 1);
    EXPECT_NE(gate_of(tree).problem.find("MOONCAKE_EP_MACA_ALLOW_NODE_P2P"), std::string::npos);
    unsetenv("MOONCAKE_EP_MACA_ALLOW_NODE_P2P");
    unsetenv("MOONCAKE_EP_MACA_P2P_PAIRS");
}

TEST(Gate, NamesATypoInThePairs) {
    const Machine four = recorded("metax_pairs", true);
    P2pGate gate;
    for (const char *pairs : {"0-4", "0_1", "0-1,", "1-1"}) {
        EXPECT_EQ(P2pGate::of(pairs, false, four.topology, four.near, &gate), MEP_INVALID_ARGUMENT)
            << pairs;
        EXPECT_NE(std::string(last_error()).find("MOONCAKE_EP_MACA_P2P_PAIRS: "), std::string::npos)
            << last_error();
    }
}

TEST(Gate, KeepsOutAGpuOfUnknownNumber) {
    const Machine four = recorded("metax_pairs", true);
    P2pGate gate;
    ASSERT_EQ(P2pGate::of("", false, four.topology, four.near, &gate), MEP_OK);
    EXPECT_FALSE(gate.allows(-1, 0));
    EXPECT_FALSE(gate.allows(-1, -1));
    EXPECT_TRUE(gate.allows(2, 2));
    ASSERT_EQ(P2pGate::of("", true, four.topology, four.near, &gate), MEP_OK);
    EXPECT_TRUE(gate.allows(-1, 0));
}

TEST(Gate, NumbersGpusByTheirPciAddress) {
    const Topology topology = recorded("metax_pairs", false).topology;
    for (size_t gpu = 0; gpu < topology.gpus.size(); ++gpu) {
        const std::string &path = topology.gpus[gpu].pci_path;
        EXPECT_EQ(physical_number(topology, path.substr(path.rfind('/') + 1)), int(gpu));
    }
    EXPECT_EQ(physical_number(topology, "0000:ff:1f.7"), -1);
}

// The first becomes one of NVIDIA's.
TEST(Gate, NumbersGpusOfMetaxOnly) {
    constexpr const char *kFirst =
        "sys/devices/pci0000:0e/0000:0e:01.0/0000:0f:00.0/0000:10:00.0/0000:11:00.0";
    const std::string tree = read_data("topology/metax_pairs.tree") + kFirst +
                             "/vendor = 0x10de\n" + kFirst + "/class = 0x030200\n";
    const std::string tool = "GPU0 GPU1 GPU2\nGPU0 X NODE NODE\nGPU1 NODE X MX\nGPU2 NODE MX X\n";
    const Machine guessed = machine(tree, ""), told = machine(tree, tool);
    ASSERT_EQ(guessed.topology.gpus[0].vendor, Vendor::kNvidia);
    EXPECT_EQ(physical_number(guessed.topology, "0000:11:00.0"), -1);
    EXPECT_EQ(physical_number(guessed.topology, "0000:12:00.0"), 0);
    EXPECT_EQ(physical_number(guessed.topology, "0000:52:00.0"), 2);
    EXPECT_EQ(allowed("", false, guessed), "0-1");
    EXPECT_EQ(allowed("", false, told), "1-2");
    P2pGate gate;
    EXPECT_EQ(P2pGate::of("2-3", false, told.topology, told.near, &gate), MEP_INVALID_ARGUMENT);
}

TEST(Gate, AsksTheToolWhereItIs) {
    const Tree quads(read_data("topology/metax_quads.tree"));
    EXPECT_EQ(gate_of(quads).pairs, "0-1 2-3 4-5 6-7");
    const Tool tool(Tool::print("metax_quads.smi.txt"));
    EXPECT_EQ(gate_of(quads).pairs, "0-1 0-2 0-3 1-2 1-3 2-3 4-5 4-6 4-7 5-6 5-7 6-7");
}

// As in a container.
TEST(Gate, DoesNotUseAToolThatSeesOtherGpus) {
    const Tool tool(Tool::print("metax_pairs.smi.txt"));
    EXPECT_EQ(gate_of(Tree(read_data("topology/metax_quads.tree"))).pairs, "0-1 2-3 4-5 6-7");
}

TEST(Gate, RefusesAMalformedMatrixUnlessItIsNotNeeded) {
    const Tree pairs(read_data("topology/metax_pairs.tree"));
    const Tool tool(Tool::print("metax_pairs.smi.txt") + " | sed s/MX/QX/g");
    const Found found = gate_of(pairs);
    EXPECT_EQ(found.status, MEP_INVALID_ARGUMENT);
    EXPECT_NE(found.problem.find("mx-smi: row"), std::string::npos) << found.problem;
    EXPECT_NE(found.problem.find("QX"), std::string::npos) << found.problem;
    setenv("MOONCAKE_EP_MACA_P2P_PAIRS", "1-2", 1);
    EXPECT_EQ(gate_of(pairs).pairs, "1-2");
    unsetenv("MOONCAKE_EP_MACA_P2P_PAIRS");
}

TEST(Gate, NamesHowAToolHasFailedUnlessItIsNotNeeded) {
    const Tree pairs(read_data("topology/metax_pairs.tree"));
    const struct {
        std::string script, named;
    } cases[] = {
        {"echo 'no driver' >&2; exit 9", "with status 9 and printed \"no driver\""},
        {Tool::print("metax_pairs.smi.txt") + "; exit 1", "with status 1 and printed \"====="},
        {"exit 127", "with status 127 and printed nothing"},  // as without a library that it needs
        {"printf '\\n\\001bad\\nmore\\n'; kill -9 $$", "by signal 9 and printed \"?bad\""},
        {"exit 0", "with status 0 and printed nothing"},
        {"printf '%0999d' 7; exit 2", "00...\""},
    };
    for (const auto &[script, named] : cases) {
        const Tool tool(script);
        const Found found = gate_of(pairs);
        EXPECT_EQ(found.status, MEP_SYSTEM_ERROR) << script;
        for (const std::string &part : {std::string("mx-smi topo -m ended "), named,
                                        std::string("MOONCAKE_EP_MACA_P2P_PAIRS does without")})
            EXPECT_NE(found.problem.find(part), std::string::npos) << found.problem;
        EXPECT_LT(found.problem.size(), 500U);
        setenv("MOONCAKE_EP_MACA_P2P_PAIRS", "1-2", 1);
        EXPECT_EQ(gate_of(pairs).pairs, "1-2");
        unsetenv("MOONCAKE_EP_MACA_P2P_PAIRS");
    }
}

// Folders of the path that are not there, or hold a file of the name that is no program.
TEST(Gate, GuessesWhereTheToolIsNotThere) {
    const Tree folder("mx-smi = not a program\n");
    const std::string path = getenv("PATH");
    setenv("PATH", ("/nowhere:" + folder.root() + ":" + path).c_str(), 1);
    EXPECT_EQ(gate_of(Tree(read_data("topology/metax_pairs.tree"))).pairs, "0-1 2-3");
    setenv("PATH", path.c_str(), 1);
}

TEST(Gate, DoesNotWaitForAToolThatNeverStopsPrinting) {
    const Tool tool("yes");
    EXPECT_EQ(gate_of(Tree(read_data("topology/metax_pairs.tree")), 200'000).status, MEP_TIMEOUT);
}

TEST(Gate, DoesNotWaitForAToolThatHangs) {
    const Tree pairs(read_data("topology/metax_pairs.tree"));
    const Tool tool("sleep 100 & sleep 100");
    const auto began = Deadline::Clock::now();
    const Found found = gate_of(pairs, 200'000);
    EXPECT_EQ(found.status, MEP_TIMEOUT);
    EXPECT_NE(found.problem.find("mx-smi topo -m"), std::string::npos) << found.problem;
    EXPECT_LT(Deadline::Clock::now() - began, std::chrono::seconds(5));
}

TEST(Gate, RefusesASysfsThatCannotBeReadUnlessItIsNotNeeded) {
    const Tree no_port(read_data("topology/metax_pairs.tree"));
    constexpr const char *kNic = "/sys/class/infiniband/mlx5_0";
    ASSERT_NE(std::filesystem::remove_all(no_port.root() + kNic + "/ports"), 0U);
    const Found found = gate_of(no_port);
    EXPECT_NE(found.status, MEP_OK);
    EXPECT_NE(found.problem.find("NIC mlx5_0 has no port"), std::string::npos) << found.problem;
    EXPECT_NE(found.problem.find("MOONCAKE_EP_MACA_ALLOW_NODE_P2P=1"), std::string::npos);
    setenv("MOONCAKE_EP_MACA_ALLOW_NODE_P2P", "1", 1);
    EXPECT_EQ(gate_of(no_port).status, MEP_OK);
    unsetenv("MOONCAKE_EP_MACA_ALLOW_NODE_P2P");
}

}  // namespace
}  // namespace ep::test
