// Texts with a few random edits: each is refused with a message, or gives a topology that is whole.
#include "base/status.h"
#include "topology/machines.h"
#include "topology/select.h"

#include <gtest/gtest.h>
#include <random>

namespace ep {
namespace {

using namespace test;

constexpr int kSeedCount = 1500;  // for each text
constexpr int kEditCountMax = 4;

class Mutator {
  public:
    explicit Mutator(int seed) : random_(seed) {}

    std::string mutated(std::string text) {
        for (int left = draw(1, kEditCountMax); left > 0 && !text.empty(); --left)
            edit(&text);
        return text;
    }

  private:
    int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

    // Any byte, or one that the text has already: the latter more often gives another valid text.
    char byte(const std::string &text) {
        return draw(0, 3) == 0 ? static_cast<char>(draw(0, 255))
                               : text[draw(0, static_cast<int>(text.size()) - 1)];
    }

    void edit(std::string *text) {
        const int size = static_cast<int>(text->size()), at = draw(0, size - 1);
        switch (draw(0, 4)) {
            case 0:
                (*text)[at] = byte(*text);
                break;
            case 1:
                text->insert(at, 1, byte(*text));
                break;
            case 2:
                text->erase(at, draw(1, 8));
                break;
            case 3:
                text->resize(at);
                break;
            default:  // a piece again, elsewhere
                text->insert(draw(0, size - 1), text->substr(at, draw(1, 60)));
        }
    }

    std::mt19937 random_;
};

class Mutations : public ::testing::TestWithParam<Machine> {};

TEST_P(Mutations, OfASavedTopologyAreRefusedOrRoundTrip) {
    const std::string valid = save_topology(topology_of(GetParam()));
    int accepted_count = 0;
    for (int seed = 0; seed < kSeedCount && !HasFailure(); ++seed) {
        SCOPED_TRACE("seed " + std::to_string(seed));
        Topology topology;
        const mep_status_t status = load_topology(Mutator(seed).mutated(valid), &topology);
        if (status != MEP_OK) {
            EXPECT_EQ(std::string(last_error()).rfind("topology, line ", 0), 0u) << last_error();
            continue;
        }
        ++accepted_count;
        expect_round_trip(topology);
    }
    EXPECT_GT(accepted_count, 0) << "no edit left the text valid: this tests nothing";
}

class MatrixMutations : public ::testing::TestWithParam<Machine> {};

TEST_P(MatrixMutations, AreRefusedOrRoundTrip) {
    const Topology machine = topology_of_tree(GetParam().name);
    const std::string valid = smi_text(GetParam().name);
    int accepted_count = 0;
    for (int seed = 0; seed < kSeedCount && !HasFailure(); ++seed) {
        SCOPED_TRACE("seed " + std::to_string(seed));
        Topology topology = machine;
        SmiMatrix matrix;
        if (parse_smi(GetParam().vendor, Mutator(seed).mutated(valid), &matrix) != MEP_OK ||
            apply_smi(matrix, &topology) != MEP_OK)
            continue;
        ++accepted_count;
        expect_round_trip(topology);
    }
    EXPECT_GT(accepted_count, 0) << "no edit left the text valid: this tests nothing";
}

const auto machine_name = [](const auto &info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(All, Mutations, ::testing::ValuesIn(kMachines), machine_name);
INSTANTIATE_TEST_SUITE_P(All, MatrixMutations, ::testing::ValuesIn(machines_with_tool()),
                         machine_name);

TEST(ListMutations, AreRefusedOrKeepTheirPromises) {
    const Topology topology = topology_of_tree("nvlink_8");
    for (int seed = 0; seed < kSeedCount; ++seed) {
        SCOPED_TRACE("seed " + std::to_string(seed));
        std::vector<GpuPair> pairs;
        if (parse_gpu_pairs(Mutator(seed).mutated("0-1,2-3,4-5,6-7"), 8, &pairs) == MEP_OK) {
            for (const auto &[low, high] : pairs)
                EXPECT_TRUE(0 <= low && low < high && high < 8) << low << " " << high;
        }
        std::vector<int> nics;
        if (select_nics(topology, Mutator(seed).mutated("mlx5_0,mlx5_3,mlx5_10"), &nics) ==
            MEP_OK) {
            EXPECT_EQ(nics.size(), topology.gpus.size());
        }
    }
}

}  // namespace
}  // namespace ep
