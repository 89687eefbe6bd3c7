// Distances by the components of PCI paths.
#include "topology/pci_path.h"

#include <gtest/gtest.h>

namespace ep {
namespace {

constexpr char kSwitch[] = "pci0000:15/0000:15:01.0/0000:16:00.0";

std::string below_switch(const std::string &rest) {
    return std::string(kSwitch) + "/" + rest;
}

TEST(PciPath, IsAHostBridgeAndThenAddressesOrOneAddress) {
    EXPECT_TRUE(is_pci_path("pci0000:15/0000:15:01.0/0000:16:00.0"));
    EXPECT_TRUE(is_pci_path("pci10000:e0/10000:e0:06.0"));
    EXPECT_TRUE(is_pci_path("0000:16:00.0"));
    for (const char *wrong : {"", "pci0000:15", "pci0000:15/", "pci0000:15//0000:15:01.0",
                              "0000:15:01.0/0000:16:00.0", "pci0000:15/0000:15:01", "0000:15:1.0",
                              "0000:1G:01.0", "0000:1A:01.0", "pci15:00/0000:15:01.0"})
        EXPECT_FALSE(is_pci_path(wrong)) << wrong;
}

TEST(PciPath, EndsWithTheAddress) {
    EXPECT_EQ(pci_address("pci0000:15/0000:15:01.0"), "0000:15:01.0");
    EXPECT_EQ(pci_address("0000:16:00.0"), "0000:16:00.0");
}

TEST(PciPath, SharesWholeComponents) {
    EXPECT_EQ(common_component_count("pci0000:15/0000:15:01.0", "pci0000:15/0000:15:01.1"), 1);
    EXPECT_EQ(common_component_count("pci0000:15/0000:15:01.0", "pci0000:16/0000:16:01.0"), 0);
    EXPECT_EQ(common_component_count("pci0000:15/0000:15:01.0", "pci0000:15/0000:15:01.0"), 2);
    EXPECT_EQ(common_component_count("", ""), 0);
}

TEST(PciLink, IsPixAcrossOneSwitch) {
    const std::string one = below_switch("0000:17:00.0/0000:18:00.0");
    EXPECT_EQ(pci_link({one, 0}, {below_switch("0000:17:02.0/0000:1b:00.0"), 0}), LinkKind::kPix);
    EXPECT_EQ(pci_link({one, 0}, {below_switch("0000:17:00.0/0000:18:00.1"), 0}), LinkKind::kPix);
}

TEST(PciLink, IsPxbAcrossSeveralBridges) {
    const std::string one = below_switch("0000:17:00.0/0000:18:00.0");
    const std::string deeper = below_switch("0000:17:02.0/0000:1a:00.0/0000:1b:00.0/0000:1c:00.0");
    EXPECT_EQ(pci_link({one, 0}, {deeper, 0}), LinkKind::kPxb);
    EXPECT_EQ(pci_link({deeper, 0}, {one, 0}), LinkKind::kPxb);
}

TEST(PciLink, IsPhbAcrossTheHostBridge) {
    EXPECT_EQ(pci_link({"pci0000:15/0000:15:01.0/0000:16:00.0", 0},
                       {"pci0000:15/0000:15:02.0/0000:26:00.0", 0}),
              LinkKind::kPhb);
}

TEST(PciLink, IsNodeOnlyIfTheNodeIsKnownToBeTheSame) {
    constexpr char one[] = "pci0000:15/0000:15:01.0", other[] = "pci0000:37/0000:37:01.0";
    EXPECT_EQ(pci_link({one, 1}, {other, 1}), LinkKind::kNode);
    EXPECT_EQ(pci_link({one, 0}, {other, 1}), LinkKind::kSys);
    EXPECT_EQ(pci_link({one, kNumaNodeUnknown}, {other, kNumaNodeUnknown}), LinkKind::kSys);
}

}  // namespace
}  // namespace ep
