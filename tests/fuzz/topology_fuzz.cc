// Texts that come from files, tools and the environment: whatever is in them, an error or a graph
// that can be saved and is then the same.
#include "topology/graph.h"
#include "topology/select.h"
#include "topology/smi.h"

#include <cstdlib>
#include <fuzzer/FuzzedDataProvider.h>

namespace {

void check(bool holds) {
    if (!holds) std::abort();
}

void load(std::string_view text) {
    ep::Topology topology, again;
    if (ep::load_topology(text, &topology) != MEP_OK) return;
    const std::string saved = ep::save_topology(topology);
    check(ep::load_topology(saved, &again) == MEP_OK);
    check(ep::save_topology(again) == saved);
    std::vector<int> nics;
    if (ep::select_nics(topology, "", &nics) == MEP_OK) check(nics.size() == topology.gpus.size());
}

// What a tool printed, laid over a machine of as many GPUs.
void apply(mep_status_t (*parse)(std::string_view, ep::SmiMatrix *), std::string_view text) {
    ep::SmiMatrix matrix{};
    if (parse(text, &matrix) != MEP_OK) return;
    ep::Topology topology;
    for (int gpu = 0; gpu < matrix.gpu_count; ++gpu)
        topology.gpus.push_back({matrix.vendor, "",
                                 "pci0000:00/0000:00:0" + std::to_string(gpu % 8) + ".0",
                                 ep::kNumaNodeUnknown});
    if (ep::apply_smi(matrix, &topology) == MEP_OK) load(ep::save_topology(topology));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    FuzzedDataProvider input(data, size);
    const int kind = input.ConsumeIntegralInRange(0, 4);
    const std::string text = input.ConsumeRemainingBytesAsString();
    switch (kind) {
        case 0:
            load(text);
            break;
        case 1:
            apply(ep::parse_nvidia_smi, text);
            break;
        case 2:
            apply(ep::parse_mx_smi, text);
            break;
        case 3: {
            std::vector<ep::GpuPair> pairs;
            if (ep::parse_gpu_pairs(text, 8, &pairs) == MEP_OK)
                for (const auto &[low, high] : pairs)
                    check(0 <= low && low < high && high < 8);
            break;
        }
        default: {
            ep::Topology topology;
            std::vector<int> nics;
            topology.nics.push_back({"mlx5_0", ep::PortState::kActive, ep::LinkLayer::kInfiniband,
                                     "", ep::kNumaNodeUnknown});
            ep::select_nics(topology, text, &nics);
        }
    }
    return 0;
}
