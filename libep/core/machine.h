// The topology of a machine as the C ABI hands it out.
#pragma once

#include "mooncake_ep.h"

#include "topology/graph.h"

#include <string>
#include <vector>

namespace ep {

class Machine {
  public:
    // What Linux tells below `root`.
    mep_status_t read(const std::string &root);
    mep_status_t load(const char *text);

    // Adds what drivers of this machine know: UUIDs.
    void ask_drivers();

    // `tool` is "nvidia-smi" or "mx-smi", `text` what `TOOL topo -m` printed.
    mep_status_t apply_smi(const char *tool, const char *text);

    // The name of the NIC of each GPU, "" for none; see select_nics().
    mep_status_t select_nics(const char *filter);

    int gpu_count() const { return static_cast<int>(topology_.gpus.size()); }
    const char *text() const { return text_.c_str(); }
    const char *nic(int gpu) const { return nics_[gpu].c_str(); }

  private:
    void adopt(Topology topology);

    Topology topology_;
    std::string text_;               // its saved form
    std::vector<std::string> nics_;  // of each GPU, as last selected
};

}  // namespace ep

struct mep_topology {
    ep::Machine machine;
};
