// What the kernels write down when they mask a peer, written by the host, which has waited instead.
#pragma once

#include "backend/backend.h"

namespace ep {

// Masks a peer that an engine has lost, and takes note of it. Nothing of the round's buffer may be
// under way on the device.
mep_status_t mask_lost(Device *device, const Round &round, Cargo cargo, int peer,
                       uint64_t waited_ns);

}  // namespace ep
