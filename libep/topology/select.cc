#include "topology/select.h"

#include "base/status.h"
#include "topology/pci_path.h"
#include "topology/text.h"

#include <algorithm>
#include <tuple>

namespace ep {
namespace {

std::string_view trimmed(std::string_view text) {
    const Words words = split_words(text);
    return words.size() == 1 ? words[0] : text;
}

// Whether each NIC may be chosen.
mep_status_t parse_filter(const Topology &topology, std::string_view filter,
                          std::vector<bool> *allowed) {
    allowed->assign(topology.nics.size(), filter.empty());
    if (filter.empty()) return MEP_OK;
    for (const std::string_view piece : split(filter, ',')) {
        const int nic = find_nic(topology, trimmed(piece));
        if (nic < 0) {
            std::string names;
            for (const Nic &known : topology.nics)
                names += (names.empty() ? "" : ", ") + known.name;
            return fail(MEP_INVALID_ARGUMENT, "the NIC filter %s names %s, but the NICs are: %s",
                        in_quotes(filter).c_str(), in_quotes(piece).c_str(),
                        names.empty() ? "none" : names.c_str());
        }
        (*allowed)[nic] = true;
    }
    return MEP_OK;
}

// Less is nearer. A NIC without a link is as far as can be.
std::pair<LinkKind, int> distance(const Topology &topology, int gpu, int nic) {
    const NicLink *link = find_nic_link(topology, gpu, nic);
    const int common =
        common_component_count(topology.gpus[gpu].pci_path, topology.nics[nic].pci_path);
    return {link == nullptr ? LinkKind::kSys : link->kind, -common};
}

// What is wrong with a piece, or "".
std::string read_pair(std::string_view piece, int gpu_count, GpuPair *pair) {
    const Words ends = split(trimmed(piece), '-');
    int one = 0, other = 0;
    if (ends.size() != 2 || !parse_number(ends[0], kGpuIndexMax, &one) ||
        !parse_number(ends[1], kGpuIndexMax, &other))
        return "is not a pair like 0-1";
    if (one == other) return "pairs a GPU with itself";
    if (std::max(one, other) >= gpu_count)
        return "names a GPU that is not in [0, " + std::to_string(gpu_count) + ")";
    *pair = std::minmax(one, other);
    return "";
}

}  // namespace

mep_status_t select_nics(const Topology &topology, std::string_view filter,
                         std::vector<int> *nics) {
    std::vector<bool> allowed;
    EP_TRY(parse_filter(topology, filter, &allowed));
    const int gpu_count = static_cast<int>(topology.gpus.size());
    const int nic_count = static_cast<int>(topology.nics.size());
    std::vector<int> chosen(gpu_count, kNicNone), users(nic_count, 0);
    for (int gpu = 0; gpu < gpu_count; ++gpu) {
        const auto cost = [&](int nic) {
            return std::make_tuple(distance(topology, gpu, nic), users[nic]);
        };
        int &best = chosen[gpu];
        for (int nic = 0; nic < nic_count; ++nic) {
            if (!allowed[nic] || topology.nics[nic].port_state != PortState::kActive) continue;
            if (best == kNicNone || cost(nic) < cost(best)) best = nic;
        }
        if (best != kNicNone) ++users[best];
    }
    *nics = chosen;
    return MEP_OK;
}

mep_status_t parse_gpu_pairs(std::string_view text, int gpu_count, std::vector<GpuPair> *pairs) {
    std::vector<GpuPair> parsed;
    if (!text.empty())
        for (const std::string_view piece : split(text, ',')) {
            GpuPair pair;
            std::string wrong = read_pair(piece, gpu_count, &pair);
            if (wrong.empty() && std::count(parsed.begin(), parsed.end(), pair) > 0)
                wrong = "is there twice";
            if (!wrong.empty())
                return fail(MEP_INVALID_ARGUMENT, "the list of GPU pairs %s: %s %s",
                            in_quotes(text).c_str(), in_quotes(piece).c_str(), wrong.c_str());
            parsed.push_back(pair);
        }
    *pairs = parsed;
    return MEP_OK;
}

}  // namespace ep
