#include "core/wiring.h"

#include "base/status.h"

#include <utility>

namespace ep {

mep_status_t Wiring::create(Formation *formation, Device *device, const Layout &layout,
                            mep_status_t mine, std::unique_ptr<Wiring> *wiring) {
    std::unique_ptr<Wiring> created(new Wiring);
    bool shared = false;
    for (int peer = 0; peer < formation->rank_count(); ++peer)
        shared = shared || (peer != formation->rank() && formation->is_near(peer));
    if (mine == MEP_OK)
        mine = created->windows_.create(device, layout.bytes,
                                        shared ? Sharing::kPeers : Sharing::kNobody);
    EP_TRY(formation->agree(mine));
    const WindowHandle own = created->windows_.handle();
    std::vector<WindowHandle> handles(formation->rank_count());
    EP_TRY(formation->all_gather(&own, handles.data(), sizeof own));
    EP_TRY(formation->agree(created->connect(formation, device, layout, handles)));
    created->windows_.seal();
    *wiring = std::move(created);
    return MEP_OK;
}

mep_status_t Wiring::connect(Formation *formation, Device *device, const Layout &layout,
                             const std::vector<WindowHandle> &handles) {
    std::vector<bool> near(handles.size()), far(handles.size());
    for (int peer = 0; peer < formation->rank_count(); ++peer) {
        near[peer] = formation->is_near(peer);
        far[peer] = formation->is_far(peer);
    }
    EP_TRY(windows_.connect(device, handles, formation->rank(), near));
    return collective_.create(device, formation->engine(), formation->device_engine(), layout, far,
                              formation->engine_wants_all());
}

}  // namespace ep
