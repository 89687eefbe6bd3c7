#include "base/log.h"
#include "base/status.h"
#include "core/operations.h"

namespace ep {

mep_status_t may_carry(const Call &call) {
    const char *reason = call.buffer->collective().no_capture_reason();
    if (*reason == '\0' || !call.buffer->device()->is_capturing(call.stream)) return MEP_OK;
    return fail(MEP_UNSUPPORTED,
                "stream: it is captured in a graph, but this buffer's rows do not all go through "
                "memory that ranks reach: %s (mep_group_query_transport says whose)",
                reason);
}

mep_status_t may_dispatch(const Call &call) {
    const Handle &handle = *call.handle;
    const bool in_flight = handle.dispatch == Handle::State::kInFlight;
    if (call.buffer->group().left())
        return fail(MEP_INVALID_STATE, "buffer: its group was destroyed");
    if (!call.sends() && !in_flight)
        return fail(MEP_INVALID_STATE, "handle: it has no dispatch to receive; send one first");
    if (!call.sends()) return MEP_OK;
    EP_TRY(may_carry(call));
    if (in_flight || handle.combine_in_flight)
        return fail(MEP_INVALID_STATE, "handle: its last %s is still in flight; receive it first",
                    in_flight ? "dispatch" : "combine");
    return call.buffer->dispatches().may_send("dispatch");
}

namespace {

// A message's bytes behind its Signal.
size_t body_bytes(const DispatchArgs &args) {
    const size_t hidden = args.round.hidden;
    const size_t row = hidden * element_bytes(args.out_type());
    const size_t scales =
        args.out_type() == Element::kFp8 ? hidden / kScaleGroup * sizeof(float) : 0;
    return args.round.layout.head_bytes - kHeadFlagBytes + carried_bytes(row + scales);
}

mep_status_t launch(const Call &call, DispatchArgs args) {
    Buffer &buffer = *call.buffer;
    const Entered entered(buffer.device());
    const auto phase = [&](Phases phases) {
        return buffer.device()->launch_status(
            buffer.device()->kernels().dispatch(args, phases, buffer.queue(call.stream)));
    };
    if (!buffer.has_far_peers()) return phase(call.kernel_phases());
    if (call.sends()) {
        EP_TRY(phase(Phases::kSend));
        EP_TRY(buffer.collective().carry(args.round, Cargo::kMessages, body_bytes(args),
                                         buffer.queue(call.stream), call.deadline(),
                                         call.receives()));
        if (call.receives()) args.round.far.inbox = buffer.collective().inbox();
    }
    return call.receives() ? phase(Phases::kReceive) : MEP_OK;
}

}  // namespace

mep_status_t dispatch(const Call &call, DispatchArgs args) {
    Buffer &buffer = *call.buffer;
    Handle &handle = *call.handle;
    const int token_count = args.round.token_count, topk = args.round.topk;
    args.round = buffer.round(handle.memory(), call.active, call.timeout_us);
    args.round.token_count = token_count;
    args.round.topk = topk;
    // Rows of a round that fits a cache are read from it next: by the receiver, by the experts.
    constexpr size_t kCachedBytesMax = size_t{4} << 20;
    args.round.caching =
        token_count * args.x_stride <= kCachedBytesMax ? Caching::kKeep : Caching::kBypass;
    args.tally = buffer.tally();
    if (call.sends()) {
        handle.token_count = token_count;
        handle.topk = topk;
        handle.dispatch = Handle::State::kInFlight;
        handle.generation = buffer.generation();
        handle.dispatch_round = buffer.dispatches().send();
    }
    const mep_status_t launched = launch(call, args);
    if (launched != MEP_OK && call.sends()) {  // nobody can receive it
        buffer.dispatches().receive(handle.dispatch_round);
        handle.dispatch = Handle::State::kEmpty;
    }
    EP_TRY(launched);
    if (call.receives()) {
        buffer.dispatches().receive(handle.dispatch_round);
        handle.dispatch = Handle::State::kReceived;
    }
    // Who was found dead by an engine in the half that sends is told by the half that receives, as
    // where memory is reached.
    if (buffer.has_far_peers() && !call.receives()) return MEP_OK;
    return report_failed_peers(call, "dispatch");
}

mep_status_t report_failed_peers(const Call &call, const char *operation) {
    if (call.active != nullptr) return MEP_OK;
    if (const std::string failed = call.buffer->collective().take_failure(); !failed.empty())
        return fail(MEP_PEER_FAILED, "%s, and is masked from now on (found by %s)", failed.c_str(),
                    operation);
    if (!call.buffer->device()->is_synchronous()) return MEP_OK;
    std::vector<int> ranks;
    EP_TRY(call.buffer->find_new_failures(&ranks));
    if (ranks.empty()) return MEP_OK;
    std::string names;
    for (const int rank : ranks)
        names += (names.empty() ? "" : ", ") + std::to_string(rank);
    const int64_t timeout_us =
        call.timeout_us == 0 ? call.buffer->group().timeout_us() : call.timeout_us;
    const mep_status_t status =
        fail(MEP_PEER_FAILED,
             "%s %s missed the deadline of %s (%.3f s), went away, or sent counts that break a "
             "limit, and %s masked from now on",
             ranks.size() == 1 ? "rank" : "ranks", names.c_str(), operation,
             static_cast<double>(timeout_us) / 1e6, ranks.size() == 1 ? "is" : "are");
    log(MEP_LOG_WARNING, "%s", last_error());
    if (call.buffer->group().has_news_of_masks())
        log(MEP_LOG_WARNING,
            "masks are local, as this group has no health service: each rank finds out by itself "
            "who is lost, and mep_group_update brings those together that are left");
    return status;
}

}  // namespace ep
