#include "transport/gate.h"

#include "base/env.h"
#include "base/log.h"
#include "base/status.h"
#include "topology/pci_path.h"
#include "topology/select.h"
#include "topology/smi.h"
#include "topology/sysfs.h"

#include <algorithm>
#include <cstdio>

namespace ep {
namespace {

// What a command prints; "" if it fails.
std::string output_of(const char *command) {
    constexpr size_t kBytesMax = 1 << 20;
    std::FILE *pipe = popen(command, "re");
    if (pipe == nullptr) return "";
    std::string text(kBytesMax, '\0');
    text.resize(std::fread(&text[0], 1, text.size(), pipe));
    return pclose(pipe) == 0 ? text : "";
}

}  // namespace

mep_status_t P2pGate::of(std::string_view pairs, bool all, const Topology &topology,
                         P2pGate *gate) {
    P2pGate made;
    made.all_ = all;
    const int gpus = static_cast<int>(topology.gpus.size());
    if (!pairs.empty()) {
        const mep_status_t status = parse_gpu_pairs(pairs, gpus, &made.pairs_);
        if (status != MEP_OK)
            return fail(status, "MOONCAKE_EP_MACA_P2P_PAIRS: %s",
                        std::string(last_error()).c_str());
    } else {
        for (const GpuLink &link : topology.gpu_links)
            if (link.kind == LinkKind::kMetaxlink) made.pairs_.emplace_back(link.one, link.other);
        if (made.pairs_.empty())
            for (int gpu = 0; gpu + 1 < gpus; gpu += 2)
                made.pairs_.emplace_back(gpu, gpu + 1);
    }
    *gate = std::move(made);
    return MEP_OK;
}

bool P2pGate::allows(int one, int other) const {
    if (all_ || (one == other && one >= 0)) return true;
    const std::pair<int, int> pair(std::min(one, other), std::max(one, other));
    return std::find(pairs_.begin(), pairs_.end(), pair) != pairs_.end();
}

int physical_number(const Topology &topology, std::string_view address) {
    for (size_t gpu = 0; gpu < topology.gpus.size(); ++gpu)
        if (pci_address(topology.gpus[gpu].pci_path) == address) return static_cast<int>(gpu);
    return -1;
}

mep_status_t machine_gate(const Topology &topology, P2pGate *gate) {
    long all = 0;
    EP_TRY(env_integer("MOONCAKE_EP_MACA_ALLOW_NODE_P2P", 0, 1, 0, &all));
    return P2pGate::of(env_text("MOONCAKE_EP_MACA_P2P_PAIRS"), all != 0, topology, gate);
}

Topology machine_topology() {
    Topology topology;
    if (read_sysfs("/", &topology) != MEP_OK) {
        log(MEP_LOG_WARNING, "the GPUs of this machine are not known: %s", last_error());
        return {};
    }
    SmiMatrix matrix;
    const std::string printed = output_of("mx-smi topo -m 2>/dev/null");
    if (!printed.empty() &&
        (parse_mx_smi(printed, &matrix) != MEP_OK || apply_smi(matrix, &topology) != MEP_OK))
        log(MEP_LOG_WARNING, "mx-smi is not used: %s", last_error());
    return topology;
}

}  // namespace ep
