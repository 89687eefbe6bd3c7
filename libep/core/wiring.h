// What a buffer has of a formation: every rank's window as mapped here, and the way to far peers.
#pragma once

#include "core/formation.h"
#include "transport/collective.h"
#include "transport/p2p.h"

#include <memory>
#include <vector>

namespace ep {

class Wiring {
  public:
    // Windows of `layout`, new ones. Collective in `formation`; all come here with `mine`.
    static mep_status_t create(Formation *formation, Device *device, const Layout &layout,
                               mep_status_t mine, std::unique_ptr<Wiring> *wiring);

    // Of each rank's window; nullptr where it is not mapped.
    std::vector<char *> addresses() const { return windows_.addresses(); }
    Collective &collective() { return collective_; }
    const Collective &collective() const { return collective_; }

  private:
    Wiring() = default;
    mep_status_t connect(Formation *formation, Device *device, const Layout &layout,
                         const std::vector<WindowHandle> &handles);

    PeerWindows windows_;
    Collective collective_;
};

}  // namespace ep
