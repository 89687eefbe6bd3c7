// The machines of tests/data/topology and what is to be found out about them.
#pragma once

#include "base/status.h"
#include "support/tree.h"
#include "topology/graph.h"
#include "topology/smi.h"
#include "topology/sysfs.h"
#include "topology/texts.h"

#include <gtest/gtest.h>
#include <ostream>
#include <string>
#include <vector>

namespace ep::test {

using Rows = std::vector<std::string>;

struct Machine {
    std::string name;
    Vendor vendor;  // kNone: there is no tool to ask
    Rows by_pci;    // kinds of links between GPUs, as sysfs has them
    Rows by_tool;   // and as the vendor's tool has them
    Rows to_nics;   // kinds of links from a GPU to each NIC
    Rows nics;      // the NIC that each GPU is to have
};

inline std::ostream &operator<<(std::ostream &stream, const Machine &machine) {
    return stream << machine.name;
}

inline const std::vector<Machine> kMachines = {
    {"no_gpu", Vendor::kNone, {}, {}, {}, {}},
    {"one_gpu", Vendor::kNvidia, {"X"}, {"X"}, {""}, {"none"}},
    {"nvlink_2",
     Vendor::kNvidia,
     {"X PHB", "PHB X"},
     {"X NV18", "NV18 X"},
     {"", ""},
     {"none", "none"}},
    {"nvlink_8",
     Vendor::kNvidia,
     {"X NODE NODE NODE SYS SYS SYS SYS", "NODE X NODE NODE SYS SYS SYS SYS",
      "NODE NODE X NODE SYS SYS SYS SYS", "NODE NODE NODE X SYS SYS SYS SYS",
      "SYS SYS SYS SYS X NODE NODE NODE", "SYS SYS SYS SYS NODE X NODE NODE",
      "SYS SYS SYS SYS NODE NODE X NODE", "SYS SYS SYS SYS NODE NODE NODE X"},
     {"X NV18 NV18 NV18 NV18 NV18 NV18 NV18", "NV18 X NV18 NV18 NV18 NV18 NV18 NV18",
      "NV18 NV18 X NV18 NV18 NV18 NV18 NV18", "NV18 NV18 NV18 X NV18 NV18 NV18 NV18",
      "NV18 NV18 NV18 NV18 X NV18 NV18 NV18", "NV18 NV18 NV18 NV18 NV18 X NV18 NV18",
      "NV18 NV18 NV18 NV18 NV18 NV18 X NV18", "NV18 NV18 NV18 NV18 NV18 NV18 NV18 X"},
     {"PIX NODE NODE NODE SYS SYS SYS SYS", "NODE PIX NODE NODE SYS SYS SYS SYS",
      "NODE NODE PIX NODE SYS SYS SYS SYS", "NODE NODE NODE PIX SYS SYS SYS SYS",
      "SYS SYS SYS SYS PIX NODE NODE NODE", "SYS SYS SYS SYS NODE PIX NODE NODE",
      "SYS SYS SYS SYS NODE NODE PIX NODE", "SYS SYS SYS SYS NODE NODE NODE PIX"},
     {"mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11"}},
    {"pcie_4",
     Vendor::kNvidia,
     {"X PIX PHB SYS", "PIX X PHB SYS", "PHB PHB X SYS", "SYS SYS SYS X"},
     {"X PIX PHB SYS", "PIX X PHB SYS", "PHB PHB X SYS", "SYS SYS SYS X"},
     {"PIX SYS", "PIX SYS", "PHB SYS", "SYS PXB"},
     {"mlx5_0", "mlx5_0", "mlx5_0", "mlx5_1"}},
    {"metax_pairs",
     Vendor::kMetax,
     {"X PIX NODE NODE", "PIX X NODE NODE", "NODE NODE X PIX", "NODE NODE PIX X"},
     {"X MX NODE NODE", "MX X NODE NODE", "NODE NODE X MX", "NODE NODE MX X"},
     {"NODE NODE", "NODE NODE", "NODE NODE", "NODE NODE"},
     {"mlx5_0", "mlx5_1", "mlx5_0", "mlx5_1"}},
    // mlx5_1 is down.
    {"metax_quads",
     Vendor::kMetax,
     {"X PIX PXB PXB SYS SYS SYS SYS", "PIX X PXB PXB SYS SYS SYS SYS",
      "PXB PXB X PIX SYS SYS SYS SYS", "PXB PXB PIX X SYS SYS SYS SYS",
      "SYS SYS SYS SYS X PIX PXB PXB", "SYS SYS SYS SYS PIX X PXB PXB",
      "SYS SYS SYS SYS PXB PXB X PIX", "SYS SYS SYS SYS PXB PXB PIX X"},
     {"X MX MX MX SYS SYS SYS SYS", "MX X MX MX SYS SYS SYS SYS", "MX MX X MX SYS SYS SYS SYS",
      "MX MX MX X SYS SYS SYS SYS", "SYS SYS SYS SYS X MX MX MX", "SYS SYS SYS SYS MX X MX MX",
      "SYS SYS SYS SYS MX MX X MX", "SYS SYS SYS SYS MX MX MX X"},
     {"PIX PXB SYS SYS", "PIX PXB SYS SYS", "PXB PIX SYS SYS", "PXB PIX SYS SYS", "SYS SYS PIX PXB",
      "SYS SYS PIX PXB", "SYS SYS PXB PIX", "SYS SYS PXB PIX"},
     {"mlx5_0", "mlx5_0", "mlx5_0", "mlx5_0", "mlx5_2", "mlx5_2", "mlx5_3", "mlx5_3"}},
};

inline std::vector<Machine> machines_with_tool() {
    std::vector<Machine> machines;
    for (const Machine &machine : kMachines)
        if (machine.vendor != Vendor::kNone) machines.push_back(machine);
    return machines;
}

inline std::string tree_text(const std::string &name) {
    return read_data("topology/" + name + ".tree");
}

inline std::string smi_text(const std::string &name) {
    return read_data("topology/" + name + ".smi.txt");
}

inline Topology topology_of_tree(const std::string &name) {
    const Tree tree(tree_text(name));
    Topology topology;
    EXPECT_EQ(read_sysfs(tree.root(), &topology), MEP_OK) << last_error();
    return topology;
}

inline mep_status_t parse_smi(Vendor vendor, const std::string &text, SmiMatrix *matrix) {
    return vendor == Vendor::kMetax ? parse_mx_smi(text, matrix) : parse_nvidia_smi(text, matrix);
}

// With the links that the vendor's tool adds.
inline Topology topology_of(const Machine &machine) {
    Topology topology = topology_of_tree(machine.name);
    if (machine.vendor == Vendor::kNone) return topology;
    SmiMatrix matrix;
    EXPECT_EQ(parse_smi(machine.vendor, smi_text(machine.name), &matrix), MEP_OK) << last_error();
    EXPECT_EQ(apply_smi(matrix, &topology), MEP_OK) << last_error();
    return topology;
}

inline Rows gpu_link_rows(const Topology &topology) {
    Rows rows;
    const int count = static_cast<int>(topology.gpus.size());
    for (int one = 0; one < count; ++one) {
        std::string row;
        for (int other = 0; other < count; ++other) {
            const GpuLink *link = find_gpu_link(topology, one, other);
            row += other == 0 ? "" : " ";
            row += one == other      ? "X"
                   : link == nullptr ? "?"
                                     : link_name(link->kind, link->lane_count);
        }
        rows.push_back(row);
    }
    return rows;
}

inline Rows nic_link_rows(const Topology &topology) {
    Rows rows;
    for (int gpu = 0; gpu < static_cast<int>(topology.gpus.size()); ++gpu) {
        std::string row;
        for (int nic = 0; nic < static_cast<int>(topology.nics.size()); ++nic) {
            const NicLink *link = find_nic_link(topology, gpu, nic);
            row += nic == 0 ? "" : " ";
            row += link == nullptr ? "?" : link_name(link->kind, 0);
        }
        rows.push_back(row);
    }
    return rows;
}

}  // namespace ep::test
