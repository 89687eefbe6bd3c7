// The host halves of dispatch and combine. The arguments have been checked by api/rounds.cc.
#pragma once

#include "core/buffer.h"

namespace ep {

// What both operations have besides their kernels' arguments.
struct Call {
    Buffer *buffer;
    Handle *handle;
    uint32_t phases;  // MEP_PHASE_* bits, not 0
    int32_t *active;  // or nullptr: the buffer's own mask
    int64_t timeout_us;
    void *stream;

    // Of what it waits for on the host, from now on.
    Deadline deadline() const {
        return Deadline(timeout_us == 0 ? buffer->group().timeout_us() : timeout_us);
    }
    bool sends() const { return (phases & MEP_PHASE_SEND) != 0; }
    Phases kernel_phases() const {
        return sends() && receives() ? Phases::kBoth : sends() ? Phases::kSend : Phases::kReceive;
    }
    bool receives() const { return (phases & MEP_PHASE_RECEIVE) != 0; }
};

// Rows travel in whole vectors.
constexpr size_t carried_bytes(size_t row_bytes) {
    return (row_bytes + sizeof(Vector) - 1) / sizeof(Vector) * sizeof(Vector);
}

// Whether the call may be made now; changes nothing. The first is a part of the others.
mep_status_t may_carry(const Call &call);
mep_status_t may_dispatch(const Call &call);
mep_status_t may_combine(const Call &call);

// `args.round` is filled in here, but for its token_count and topk.
mep_status_t dispatch(const Call &call, DispatchArgs args);
mep_status_t combine(const Call &call, CombineArgs args);

// After a phase on a device that has finished it: a peer that this call found dead is an error,
// unless the caller brought a mask to read it from.
mep_status_t report_failed_peers(const Call &call, const char *operation);

}  // namespace ep
