#include "transport/gate.h"

#include "base/command.h"
#include "base/env.h"
#include "base/log.h"
#include "base/status.h"
#include "topology/pci_path.h"
#include "topology/select.h"
#include "topology/smi.h"
#include "topology/sysfs.h"

#include <algorithm>

namespace ep {
namespace {

constexpr int64_t kToolUs = 10'000'000;  // of mx-smi, whose driver may hang

// What links the GPUs, where mx-smi is here. That it sees other GPUs than sysfs, as in a container,
// is no error: nobody knows then which are which.
mep_status_t ask_mx_smi(const Deadline &deadline, Topology *topology) {
    std::string printed;
    SmiMatrix matrix;
    // Of a shorter time half, so that the others hear of it.
    const int64_t limit_us = deadline.never() ? kToolUs : deadline.timeout_us() / 2;
    EP_TRY(command_output("mx-smi topo -m 2>/dev/null",
                          deadline.within(std::min(kToolUs, limit_us)), &printed));
    if (printed.empty()) return MEP_OK;
    EP_TRY(parse_mx_smi(printed, &matrix));
    if (apply_smi(matrix, topology) != MEP_OK)
        log(MEP_LOG_WARNING, "mx-smi is not used: %s", last_error());
    return MEP_OK;
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

mep_status_t machine_gate(const std::string &root, const Deadline &deadline, Topology *topology,
                          P2pGate *gate) {
    constexpr const char *kWithout =
        "MOONCAKE_EP_MACA_P2P_PAIRS does without mx-smi, MOONCAKE_EP_MACA_ALLOW_NODE_P2P=1 also "
        "without sysfs";
    long all = 0;
    EP_TRY(env_integer("MOONCAKE_EP_MACA_ALLOW_NODE_P2P", 0, 1, 0, &all));
    std::string pairs = env_text("MOONCAKE_EP_MACA_P2P_PAIRS");
    Topology found;
    mep_status_t known = read_sysfs(root, &found);
    if (known == MEP_OK && all == 0 && pairs.empty()) known = ask_mx_smi(deadline, &found);
    if (known != MEP_OK && all == 0)
        return fail(known, "the GPUs of this machine are not known: %s; %s",
                    std::string(last_error()).c_str(), kWithout);
    if (known != MEP_OK) pairs.clear();  // nobody knows their numbers
    EP_TRY(P2pGate::of(pairs, all != 0, found, gate));
    *topology = std::move(found);
    return MEP_OK;
}

}  // namespace ep
