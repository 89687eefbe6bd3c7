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
// is no error: nobody knows then which are which, as without it.
mep_status_t ask_mx_smi(const Deadline &deadline, Topology *topology, NearPairs *near) {
    std::string printed;
    SmiMatrix matrix;
    // Of a shorter time half, so that the others hear of it.
    const int64_t limit_us = deadline.never() ? kToolUs : deadline.timeout_us() / 2;
    EP_TRY(
        command_output("mx-smi topo -m", deadline.within(std::min(kToolUs, limit_us)), &printed));
    if (!printed.empty()) EP_TRY(parse_mx_smi(printed, &matrix));
    const bool used = !printed.empty() && apply_smi(matrix, topology) == MEP_OK;
    if (!printed.empty() && !used) log(MEP_LOG_WARNING, "mx-smi is not used: %s", last_error());
    *near = used ? NearPairs::kOfTopology : NearPairs::kNeighbours;
    return MEP_OK;
}

// With `pairs` of the environment a tool that fails is no error: there is no guess then.
mep_status_t find_near(const std::string &pairs, const Deadline &deadline, Topology *topology,
                       NearPairs *near) {
    const mep_status_t asked = ask_mx_smi(deadline, topology, near);
    if (asked == MEP_OK || pairs.empty()) return asked;
    log(MEP_LOG_WARNING, "of the near GPUs only MOONCAKE_EP_MACA_P2P_PAIRS=%s are used: %s",
        pairs.c_str(), last_error());
    *near = NearPairs::kNone;
    return MEP_OK;
}

// By place in the topology: the number of each GPU of MetaX, -1 for those of others.
std::vector<int> numbers_of(const Topology &topology) {
    std::vector<int> numbers;
    int count = 0;
    for (const Gpu &gpu : topology.gpus)
        numbers.push_back(gpu.vendor == Vendor::kMetax ? count++ : -1);
    return numbers;
}

std::vector<GpuPair> near_pairs(const Topology &topology, NearPairs near, int gpu_count) {
    std::vector<GpuPair> pairs;
    const std::vector<int> numbers = numbers_of(topology);
    if (near == NearPairs::kOfTopology)
        for (const GpuLink &link : topology.gpu_links)
            if (link.kind == LinkKind::kMetaxlink)
                pairs.emplace_back(numbers[link.one], numbers[link.other]);
    if (near == NearPairs::kNeighbours)
        for (int gpu = 0; gpu + 1 < gpu_count; gpu += 2)
            pairs.emplace_back(gpu, gpu + 1);
    return pairs;
}

}  // namespace

mep_status_t P2pGate::of(std::string_view pairs, bool all, const Topology &topology, NearPairs near,
                         P2pGate *gate) {
    P2pGate made;
    made.all_ = all;
    const std::vector<int> numbers = numbers_of(topology);
    const auto gpu_count =
        static_cast<int>(numbers.size() - std::count(numbers.begin(), numbers.end(), -1));
    const mep_status_t status = parse_gpu_pairs(pairs, gpu_count, &made.pairs_);
    if (status != MEP_OK)
        return fail(status, "MOONCAKE_EP_MACA_P2P_PAIRS: %s", std::string(last_error()).c_str());
    for (const GpuPair &pair : near_pairs(topology, near, gpu_count))
        made.pairs_.push_back(pair);
    *gate = std::move(made);
    return MEP_OK;
}

bool P2pGate::allows(int one, int other) const {
    if (all_ || (one == other && one >= 0)) return true;
    const std::pair<int, int> pair(std::min(one, other), std::max(one, other));
    return std::find(pairs_.begin(), pairs_.end(), pair) != pairs_.end();
}

int physical_number(const Topology &topology, std::string_view address) {
    const std::vector<int> numbers = numbers_of(topology);
    for (size_t gpu = 0; gpu < numbers.size(); ++gpu)
        if (pci_address(topology.gpus[gpu].pci_path) == address) return numbers[gpu];
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
    NearPairs near = NearPairs::kNone;
    mep_status_t known = read_sysfs(root, &found);
    if (known == MEP_OK && all == 0) known = find_near(pairs, deadline, &found, &near);
    if (known != MEP_OK && all == 0)
        return fail(known, "the GPUs of this machine are not known: %s; %s",
                    std::string(last_error()).c_str(), kWithout);
    if (known != MEP_OK) pairs.clear();  // nobody knows their numbers
    EP_TRY(P2pGate::of(pairs, all != 0, found, near, gate));
    *topology = std::move(found);
    return MEP_OK;
}

}  // namespace ep
