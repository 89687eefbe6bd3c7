// The way to peers whose windows are not mapped here: what a launch of SEND left for them in the
// outbox goes in parcels, by an engine, to the places where the peers wait for it.
#pragma once

#include "backend/backend.h"
#include "transport/engine.h"

#include <memory>
#include <vector>

namespace ep {

class Collective {
  public:
    // `far` [rank]: those peers, which the kernels find in `state`. The engine outlives this.
    mep_status_t create(Device *device, Engine *engine, const Layout &layout,
                        const std::vector<bool> &far, BufferState *state);

    bool serves_any() const { return engine_ != nullptr; }

    // Carries one kind of thing, of so many bytes a record beside its head. Every rank of the group
    // carries the same in the same order. Peers that fail are masked in round.active.
    mep_status_t carry(const Round &round, Cargo cargo, size_t body_bytes, const Queue &queue,
                       const Deadline &deadline);

  private:
    std::vector<bool> partners(const Round &round) const;
    mep_status_t pack(ParcelArgs args, const Queue &queue);
    mep_status_t place(ParcelArgs args, const Queue &queue);

    Device *device_ = nullptr;
    Engine *engine_ = nullptr;
    std::vector<bool> far_;
    DeviceMemory far_on_device_{nullptr, nullptr}, outbox_{nullptr, nullptr};
    std::vector<Parcel> sent_, received_;  // [rank]
};

}  // namespace ep
