// Which MetaX GPUs of a host may store into each other's memory. That the runtime says they can is
// not enough: a kernel that stores across a node's far pairs may wait for ever.
#pragma once

#include "mooncake_ep.h"

#include "base/deadline.h"
#include "topology/graph.h"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ep {

// Whom the near pairs are from: the topology, which mx-smi has told of MetaXLink; a guess, 0-1, 2-3
// and so on, where that tool is not there; or nobody, as it has failed.
enum class NearPairs { kOfTopology, kNeighbours, kNone };

// GPUs by their physical number: their place among all of MetaX's of the host by PCI address.
class P2pGate {
  public:
    // Lets the near pairs through, and besides them `pairs`, as in MOONCAKE_EP_MACA_P2P_PAIRS;
    // everything if `all`, as MOONCAKE_EP_MACA_ALLOW_NODE_P2P=1 says.
    static mep_status_t of(std::string_view pairs, bool all, const Topology &topology,
                           NearPairs near, P2pGate *gate);

    // A GPU of unknown number, -1, may reach all only if all may.
    bool allows(int one, int other) const;

  private:
    bool all_ = false;
    std::vector<std::pair<int, int>> pairs_;  // the lower first
};

// The number of a MetaX GPU by its PCI address, "0000:18:00.0"; -1 if the topology does not have
// it.
int physical_number(const Topology &topology, std::string_view pci_address);

// This machine, whose sysfs is below `root`, with MetaXLink if mx-smi is here and has to be asked;
// and its gate, from the environment. An unreadable sysfs, an mx-smi that fails, a malformed matrix
// of it and one that does not come are errors, unless the environment does without.
mep_status_t machine_gate(const std::string &root, const Deadline &deadline, Topology *topology,
                          P2pGate *gate);

}  // namespace ep
