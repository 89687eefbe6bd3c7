#include "core/machine.h"

#include "backend/nvml.h"
#include "base/status.h"
#include "topology/pci_path.h"
#include "topology/select.h"
#include "topology/smi.h"
#include "topology/sysfs.h"

#include <cstring>
#include <utility>

namespace ep {

mep_status_t Machine::read(const std::string &root) {
    Topology topology;
    EP_TRY(read_sysfs(root, &topology));
    adopt(std::move(topology));
    return MEP_OK;
}

mep_status_t Machine::load(const char *text) {
    Topology topology;
    EP_TRY(load_topology(text, &topology));
    adopt(std::move(topology));
    return MEP_OK;
}

void Machine::ask_drivers() {
    Topology topology = topology_;
    for (Gpu &gpu : topology.gpus)
        if (gpu.vendor == Vendor::kNvidia)
            gpu.uuid = Nvml::of_machine().uuid(std::string(pci_address(gpu.pci_path)));
    adopt(std::move(topology));
}

mep_status_t Machine::apply_smi(const char *tool, const char *text) {
    const bool nvidia = std::strcmp(tool, "nvidia-smi") == 0;
    if (!nvidia && std::strcmp(tool, "mx-smi") != 0)
        return fail(MEP_INVALID_ARGUMENT, "tool is \"%s\"; it must be \"nvidia-smi\" or \"mx-smi\"",
                    tool);
    SmiMatrix matrix;
    EP_TRY(nvidia ? parse_nvidia_smi(text, &matrix) : parse_mx_smi(text, &matrix));
    Topology topology = topology_;
    EP_TRY(ep::apply_smi(matrix, &topology));
    adopt(std::move(topology));
    return MEP_OK;
}

mep_status_t Machine::select_nics(const char *filter) {
    std::vector<int> chosen;
    EP_TRY(ep::select_nics(topology_, filter == nullptr ? "" : filter, &chosen));
    for (int gpu = 0; gpu < gpu_count(); ++gpu)
        nics_[gpu] = chosen[gpu] == kNicNone ? "" : topology_.nics[chosen[gpu]].name;
    return MEP_OK;
}

void Machine::adopt(Topology topology) {
    topology_ = std::move(topology);
    text_ = save_topology(topology_);
    nics_.assign(topology_.gpus.size(), "");
}

}  // namespace ep
