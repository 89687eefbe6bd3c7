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
    if (handle.generation != call.buffer->generation())
        return fail(MEP_INVALID_STATE,
                    "handle: its dispatch was before the group was updated; dispatch again");
    if (!call.sends() && !handle.combine_in_flight)
        return fail(MEP_INVALID_STATE, "handle: it has no combine to receive; send one first");
    if (!call.sends()) return MEP_OK;
    EP_TRY(may_carry(call));
    if (handle.combine_in_flight)
        return fail(MEP_INVALID_STATE,
                    "handle: its last combine is still in flight; receive it first");
    return call.buffer->combines().may_send("combine");
}

namespace {

// With far peers: weights, if they come only now, have to be there before rows are summed.
mep_status_t send_far(const Call &call, CombineArgs args) {
    Device &device = *call.buffer->device();
    Collective &collective = call.buffer->collective();
    const Queue queue = call.buffer->queue(call.stream);
    const Deadline deadline = call.deadline();
    if (args.topk_weights != nullptr) {
        EP_TRY(device.launch_status(device.kernels().combine_weights(args, queue)));
        const size_t bytes = args.round.layout.weight_bytes - kHeadFlagBytes;
        EP_TRY(collective.carry(args.round, Cargo::kWeights, bytes, queue, deadline, true));
        args.weights_are_sent = true;
        args.round.far.inbox = collective.inbox();
    }
    EP_TRY(device.launch_status(device.kernels().combine(args, Phases::kSend, queue)));
    const Element partial = args.fp32_partials ? Element::kFp32 : args.x_type;
    const size_t bytes = carried_bytes(size_t(args.round.hidden) * element_bytes(partial));
    return collective.carry(args.round, Cargo::kPartials, bytes, queue, deadline, call.receives());
}

mep_status_t launch(const Call &call, CombineArgs args) {
    Buffer &buffer = *call.buffer;
    const Entered entered(buffer.device());
    const bool far = buffer.has_far_peers();
    if (far && call.sends()) EP_TRY(send_far(call, args));
    if (far && !call.receives()) return MEP_OK;
    if (far && call.sends()) args.round.far.inbox = buffer.collective().inbox();
    return buffer.device()->launch_status(buffer.device()->kernels().combine(
        args, far ? Phases::kReceive : call.kernel_phases(), buffer.queue(call.stream)));
}

}  // namespace

mep_status_t combine(const Call &call, CombineArgs args) {
    Buffer &buffer = *call.buffer;
    Handle &handle = *call.handle;
    args.round = buffer.round(handle.memory(), call.active, call.timeout_us);
    args.round.token_count = handle.token_count;
    args.round.topk = handle.topk;
    args.fp32_partials = buffer.shape().config.fp32_partials != 0;
    if (call.sends()) {
        handle.combine_in_flight = true;
        handle.combine_round = buffer.combines().send();
    }
    const mep_status_t launched = launch(call, args);
    if (launched != MEP_OK && call.sends()) {  // nobody can receive it
        buffer.combines().receive(handle.combine_round);
        handle.combine_in_flight = false;
    }
    EP_TRY(launched);
    if (call.receives()) {
        buffer.combines().receive(handle.combine_round);
        handle.combine_in_flight = false;
    }
    // Who was found dead by an engine in the half that sends is told by the half that receives, as
    // where memory is reached.
    if (buffer.has_far_peers() && !call.receives()) return MEP_OK;
    return report_failed_peers(call, "combine");
}

}  // namespace ep
