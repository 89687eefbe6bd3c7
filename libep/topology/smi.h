// The matrices that the vendors' tools print: `nvidia-smi topo -m` and `mx-smi topo -m`. They know
// of NVLink and MetaXLink, which sysfs does not.
#pragma once

#include "topology/graph.h"

#include <string>
#include <string_view>
#include <vector>

namespace ep {

struct SmiMatrix {
    Vendor vendor;
    int gpu_count;
    std::vector<std::string> nics;   // by name, in the order of the columns
    std::vector<GpuLink> gpu_links;  // of every pair, but for those that the tool does not know
    std::vector<NicLink> nic_links;  // `nic` is a place in `nics`
};

// Fail with row, column and cell of what is wrong.
mep_status_t parse_nvidia_smi(std::string_view text, SmiMatrix *matrix);
mep_status_t parse_mx_smi(std::string_view text, SmiMatrix *matrix);

// Links the GPUs of the tool's vendor as the tool says, instead of by PCI. The tool counts only
// these GPUs, in the order of their PCI addresses, and must know as many as the topology has. Links
// to NICs stay: sysfs has told.
mep_status_t apply_smi(const SmiMatrix &matrix, Topology *topology);

}  // namespace ep
