// What Linux tells about GPUs, NICs and how PCI joins them. No driver or library of a vendor is
// asked, so UUIDs and the links that are not PCI are unknown.
#pragma once

#include "topology/graph.h"

#include <string>

namespace ep {

// Reads the sysfs below `root`, "/" for this machine. GPUs are in the order of their PCI addresses,
// NICs in that of their names; every pair of GPUs and every pair of GPU and NIC on PCI is linked by
// its distance. A machine without GPUs and NICs is no error.
mep_status_t read_sysfs(const std::string &root, Topology *topology);

}  // namespace ep
