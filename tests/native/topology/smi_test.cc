// The matrices of nvidia-smi and mx-smi, whole and malformed.
#include "topology/smi.h"

#include "base/status.h"
#include "topology/machines.h"

#include <gtest/gtest.h>

namespace ep {
namespace {

using namespace test;

// ---- Whole machines ----------------------------------------------------------------------------

class SmiMachine : public ::testing::TestWithParam<Machine> {};

TEST_P(SmiMachine, LinksGpusAsTheToolSays) {
    EXPECT_EQ(gpu_link_rows(topology_of(GetParam())), GetParam().by_tool);
}

TEST_P(SmiMachine, LeavesTheLinksToNics) {
    EXPECT_EQ(nic_link_rows(topology_of(GetParam())), GetParam().to_nics);
}

TEST_P(SmiMachine, RoundTrips) {
    expect_round_trip(topology_of(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(All, SmiMachine, ::testing::ValuesIn(kMachines),
                         [](const auto &info) { return info.param.name; });

// nvidia-smi tells distances to NICs that sysfs tells, too.
TEST(NvidiaSmi, AgreesWithSysfsAboutNics) {
    for (const char *name : {"nvlink_8", "pcie_4"}) {
        SCOPED_TRACE(name);
        const Topology topology = topology_of_tree(name);
        SmiMatrix matrix;
        ASSERT_EQ(parse_nvidia_smi(smi_text(name), &matrix), MEP_OK) << last_error();
        ASSERT_EQ(matrix.nics.size(), topology.nics.size());
        for (size_t i = 0; i < matrix.nics.size(); ++i)
            EXPECT_EQ(matrix.nics[i], topology.nics[i].name);
        ASSERT_EQ(matrix.nic_links.size(), topology.nic_links.size());
        for (const NicLink &link : matrix.nic_links)
            EXPECT_EQ(find_nic_link(topology, link.gpu, link.nic)->kind, link.kind);
    }
}

// ---- Forms -------------------------------------------------------------------------------------

TEST(NvidiaSmi, NamesNicsInTheHeaderIfItIsOld) {
    SmiMatrix matrix;
    ASSERT_EQ(parse_nvidia_smi("\tGPU0\tmlx5_0\tCPU Affinity\n"
                               "GPU0\t X \tPHB\t0-9\n"
                               "mlx5_0\tPHB\t X \t\n",
                               &matrix),
              MEP_OK)
        << last_error();
    EXPECT_EQ(matrix.gpu_count, 1);
    EXPECT_EQ(matrix.nics, std::vector<std::string>{"mlx5_0"});
    ASSERT_EQ(matrix.nic_links.size(), 1u);
    EXPECT_EQ(matrix.nic_links[0].kind, LinkKind::kPhb);
}

TEST(MxSmi, MayNotKnowALink) {
    SmiMatrix matrix;
    ASSERT_EQ(
        parse_mx_smi("GPU0 GPU1 GPU2\nGPU0 X NA MX\nGPU1 NA X NODE\nGPU2 MX NODE X\n", &matrix),
        MEP_OK)
        << last_error();
    ASSERT_EQ(matrix.gpu_links.size(), 2u);
    EXPECT_EQ(matrix.gpu_links[0].other, 2);
    EXPECT_EQ(matrix.gpu_links[0].kind, LinkKind::kMetaxlink);
}

TEST(ApplySmi, CountsTheGpusOfOneVendor) {
    Topology topology = topology_of_tree("metax_pairs");
    topology.gpus[1].vendor = Vendor::kNvidia;
    SmiMatrix matrix;
    ASSERT_EQ(
        parse_mx_smi("GPU0 GPU1 GPU2\nGPU0 X NODE NODE\nGPU1 NODE X MX\nGPU2 NODE MX X\n", &matrix),
        MEP_OK)
        << last_error();
    ASSERT_EQ(apply_smi(matrix, &topology), MEP_OK) << last_error();
    EXPECT_EQ(gpu_link_rows(topology),
              (Rows{"X PIX NODE NODE", "PIX X NODE NODE", "NODE NODE X MX", "NODE NODE MX X"}));
    expect_round_trip(topology);
}

TEST(ApplySmi, RefusesAnotherNumberOfGpus) {
    Topology topology = topology_of_tree("metax_quads");
    SmiMatrix matrix;
    ASSERT_EQ(parse_mx_smi(smi_text("metax_pairs"), &matrix), MEP_OK);
    EXPECT_EQ(apply_smi(matrix, &topology), MEP_INVALID_ARGUMENT);
    EXPECT_STREQ(last_error(), "the vendor's tool knows 4 GPUs, but PCI has 8 of that vendor");
}

// ---- Malformed texts ---------------------------------------------------------------------------

struct Malformed {
    const char *part;  // of the text of pcie_4, without its tabs
    const char *by;    // what stands in its place
    const char *message;
};

// One blank between the words, so that a test can name a row.
std::string with_single_blanks(const std::string &text) {
    std::string out;
    for (const char c : text) {
        const char blank = c == '\t' ? ' ' : c;
        if (blank != ' ' || (!out.empty() && out.back() != ' ')) out += blank;
    }
    return out;
}

class MalformedSmi : public ::testing::TestWithParam<Malformed> {};

TEST_P(MalformedSmi, IsRefusedWithRowColumnAndCell) {
    const std::string valid = with_single_blanks(smi_text("pcie_4"));
    SmiMatrix matrix{};
    matrix.gpu_count = 77;
    ASSERT_EQ(parse_nvidia_smi(replaced(valid, GetParam().part, GetParam().by), &matrix),
              MEP_INVALID_ARGUMENT);
    EXPECT_STREQ(last_error(), (std::string("nvidia-smi: ") + GetParam().message).c_str());
    EXPECT_EQ(matrix.gpu_count, 77) << "the output was touched";
}

INSTANTIATE_TEST_SUITE_P(
    All, MalformedSmi,
    ::testing::Values(
        Malformed{"GPU1 PIX X PHB SYS PIX SYS 0-31 0 N/A", "GPU1 PIX X PHB SYS PIX",
                  "row GPU1 has no cell in column NIC1"},
        Malformed{"GPU1 PIX X PHB SYS PIX SYS 0-31", "GPU1 PIX X PHB SYS PIX SYS NODE 0-31",
                  "row GPU1 has the cell \"NODE\" after its last column, NIC1"},
        Malformed{"GPU1 PIX X PHB SYS PIX SYS 0-31", "GPU1 PIX X PHB SYS PIX 0-31",
                  "row GPU1, column NIC1: \"0-31\" must be a kind of link"},
        Malformed{"GPU1 PIX X PHB", "GPU1 PIX X PHX",
                  "row GPU1, column GPU2: \"PHX\" must be a kind of link"},
        Malformed{"GPU1 PIX X PHB", "GPU1 PIX X MX",
                  "row GPU1, column GPU2: \"MX\" must be a kind of link"},
        Malformed{"GPU1 PIX X PHB", "GPU1 PIX X SHM",
                  "row GPU1, column GPU2: \"SHM\" must be a kind of link"},
        Malformed{"GPU1 PIX X PHB", "GPU1 PIX X X",
                  "row GPU1, column GPU2: \"X\" must be a kind of link"},
        Malformed{"GPU1 PIX X PHB", "GPU1 PIX PIX PHB", "row GPU1, column GPU1: \"PIX\" must be X"},
        Malformed{"GPU1 PIX X PHB", "GPU1 NV4 X PHB",
                  "row GPU1, column GPU0 is \"NV4\", but row GPU0, column GPU1 is \"PIX\""},
        Malformed{"NIC1 SYS SYS SYS PXB SYS", "NIC1 SYS SYS SYS PIX SYS",
                  "row NIC1, column GPU3 is \"PIX\", but row GPU3, column NIC1 is \"PXB\""},
        Malformed{"GPU2 PHB PHB X SYS PHB SYS 0-31 0 N/A\n", "", "row GPU2 is missing"},
        Malformed{"NIC1 SYS SYS SYS PXB SYS X\n", "", "row NIC1 is missing"},
        Malformed{"GPU3 NIC0 NIC1", "NIC0 NIC1",
                  "row GPU0 has the cell \"SYS\" after its last "
                  "column, NIC1"},
        Malformed{"GPU2 GPU3 NIC0", "GPU3 NIC0", "header: column \"GPU3\" is where GPU2 belongs"},
        Malformed{"GPU3 NIC0 NIC1", "NIC0 GPU3 NIC1",
                  "header: column \"GPU3\" is where GPU3 belongs"},
        Malformed{"GPU1 GPU2 GPU3", "GPU1 GPU1 GPU3", "header: column \"GPU1\" is there twice"},
        Malformed{"GPU3 NIC0 NIC1", "GPU3 NIC0 SYS", "header: \"SYS\" is not a device"},
        Malformed{"GPU3 NIC0 NIC1", "GPU3 NIC0 N\x01", "header: \"N?\" is not a device"},
        Malformed{" NIC1: mlx5_1\n", "", "column NIC1 has no name in the NIC legend"},
        Malformed{"NIC1: mlx5_1", "NIC1: mlx5_0",
                  "column NIC1: another NIC is called \"mlx5_0\", too"}));

TEST(NvidiaSmi, WithoutAMatrixIsRefused) {
    SmiMatrix matrix;
    EXPECT_EQ(parse_nvidia_smi("nvidia-smi: command not found\n", &matrix), MEP_INVALID_ARGUMENT);
    EXPECT_STREQ(last_error(), "nvidia-smi: no header, a line that begins with GPU0");
}

TEST(MxSmi, HasNoNvlink) {
    SmiMatrix matrix;
    EXPECT_EQ(parse_mx_smi("GPU0 GPU1\nGPU0 X NV4\nGPU1 NV4 X\n", &matrix), MEP_INVALID_ARGUMENT);
    EXPECT_STREQ(last_error(), "mx-smi: row GPU0, column GPU1: \"NV4\" must be a kind of link");
}

TEST(MxSmi, HasARowForNoMoreGpusThanColumns) {
    SmiMatrix matrix;
    EXPECT_EQ(parse_mx_smi("GPU0 GPU1\nGPU0 X MX\nGPU1 MX X\nGPU2 MX MX\n", &matrix),
              MEP_INVALID_ARGUMENT);
    EXPECT_STREQ(last_error(), "mx-smi: row GPU2 has no column");
}

TEST(NvidiaSmi, LinksNoNicByNvlink) {
    SmiMatrix matrix;
    EXPECT_EQ(parse_nvidia_smi("GPU0 mlx5_0\nGPU0 X NV4\nmlx5_0 NV4 X\n", &matrix),
              MEP_INVALID_ARGUMENT);
    EXPECT_STREQ(last_error(), "nvidia-smi: row GPU0, column mlx5_0: a NIC has no NV4");
}

}  // namespace
}  // namespace ep
