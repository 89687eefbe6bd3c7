#include "transport/incident.h"

#include "base/status.h"

namespace ep {

mep_status_t mask_lost(Device *device, const Round &round, Cargo cargo, int peer,
                       uint64_t waited_ns) {
    constexpr int32_t kMasked = 0;
    EP_TRY(device->write(round.active + peer, &kMasked, sizeof kMasked));
    HandleState sent;
    uint64_t number;
    EP_TRY(device->peek(&sent, round.routing.state, sizeof sent));
    EP_TRY(device->peek(&number, &round.state->incident_count, sizeof number));
    ++number;
    const uint64_t epoch = cargo == Cargo::kMessages ? sent.dispatch_epoch : sent.combine_epoch;
    const Incident incident{number, epoch, waited_ns, peer, Awaited::kExchange, 0, 0};
    EP_TRY(device->write(&round.state->incidents[(number - 1) % BufferState::kIncidentsKept],
                         &incident, sizeof incident));
    return device->write(&round.state->incident_count, &number, sizeof number);
}

}  // namespace ep
