#include "base/status.h"
#include "core/operations.h"

namespace ep {

mep_status_t may_combine(const Call &call) {
    const Handle &handle = *call.handle;
    if (call.buffer->group().left())
        return fail(MEP_INVALID_STATE, "buffer: its group was destroyed");
    if (handle.dispatch != Handle::State::kReceived)
        return fail(MEP_INVALID_STATE, "handle: %s",
                    handle.dispatch == Handle::State::kEmpty
                        ? "it holds no dispatch; dispatch with it first"
                        : "its dispatch is still in flight; receive it first");
    if (!call.sends() && !handle.combine_in_flight)
        return fail(MEP_INVALID_STATE, "handle: it has no combine to receive; send one first");
    if (!call.sends()) return MEP_OK;
    if (handle.combine_in_flight)
        return fail(MEP_INVALID_STATE,
                    "handle: its last combine is still in flight; receive it first");
    return call.buffer->combines.may_send("combine");
}

mep_status_t combine(const Call &call, CombineArgs args) {
    Buffer &buffer = *call.buffer;
    Handle &handle = *call.handle;
    args.round = buffer.round(handle.memory(), call.active, call.timeout_us);
    args.round.token_count = handle.token_count;
    args.round.topk = handle.topk;
    args.fp32_partials = buffer.shape().config.fp32_partials != 0;
    if (call.sends()) {
        handle.combine_in_flight = true;
        handle.combine_round = buffer.combines.send();
    }
    const Entered entered(buffer.device());
    EP_TRY(buffer.device()->launch_status(
        buffer.device()->kernels().combine(args, call.kernel_phases(), buffer.queue(call.stream))));
    if (call.receives()) {
        buffer.combines.receive(handle.combine_round);
        handle.combine_in_flight = false;
    }
    return report_failed_peers(call, "combine");
}

}  // namespace ep
