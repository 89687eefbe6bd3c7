// Where a PCI device hangs: the components of its sysfs path from the host bridge down, for example
// "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.0". The last one is its address; a
// path of one address says only who the device is, not where. Empty: no PCI device.
#pragma once

#include "topology/graph.h"

#include <string>
#include <string_view>

namespace ep {

bool is_pci_host_bridge(std::string_view component);  // "pci0000:15"
bool is_pci_address(std::string_view component);      // "0000:18:00.0"
bool is_pci_path(std::string_view path);

std::string pci_address(std::string_view path);

// How many leading components two paths share. More of them is nearer.
int common_component_count(std::string_view one, std::string_view other);

// The place of a device, as far as distances go.
struct PciPlace {
    std::string_view path;
    int numa_node;
};

// PIX, PXB, PHB, NODE or SYS. Takes paths from the host bridge down.
LinkKind pci_link(const PciPlace &one, const PciPlace &other);

}  // namespace ep
