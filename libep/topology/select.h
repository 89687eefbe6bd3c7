// Choices that follow from a topology alone, and the texts by which a user narrows them. Every rank
// that has the same topology chooses the same.
#pragma once

#include "topology/graph.h"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ep {

constexpr int kNicNone = -1;

// The NIC of each GPU, as its place in Topology::nics: the nearest one whose port is active, by
// NIC links and then by how many components the PCI paths share. GPUs choose in their order; one
// that has several to choose from takes the NIC that the fewest took before, then the first.
// kNicNone: none is active. `filter` is a list like "mlx5_0,mlx5_1" of those to choose from; empty:
// all. A name that no NIC has is an error.
mep_status_t select_nics(const Topology &topology, std::string_view filter, std::vector<int> *nics);

using GpuPair = std::pair<int, int>;

// Reads a list of pairs like "0-1,2-3" of GPUs below gpu_count. Each pair is given with its lower
// GPU first. Empty: no pairs.
mep_status_t parse_gpu_pairs(std::string_view text, int gpu_count, std::vector<GpuPair> *pairs);

}  // namespace ep
