// What an engine carries from host memory to peers whose windows are not mapped here: SEND leaves
// it in the outbox (kernels/ways.h), one launch packs it into a parcel for each such peer, and when
// the parcels have been exchanged, one launch puts what came into this rank's window, as the peer
// would have stored it. RECEIVE then knows no difference. A parcel is
//
//   head     ParcelHead
//   counts   of messages only: this many tokens for each of the receiver's experts
//   records  for each token that has one, in their order: RecordHead, then its body
#pragma once

#include "device/device.h"
#include "kernels/count.h"
#include "kernels/kernels.h"
#include "kernels/routing.h"
#include "kernels/ways.h"

namespace ep::EP_DEVICE_NAMESPACE {

struct RecordHead {
    int32_t token, value;  // of its Signal
    int32_t reserved[2];
};
static_assert(sizeof(RecordHead) == ParcelArgs::kRecordHeadBytes);

EP_DEVICE bool is_far(const Round &r, int peer) {
    return r.far.box_of[peer] != Far::kNear && is_active(r, peer);
}

EP_DEVICE uint64_t epoch_of(const ParcelArgs &a) {
    const Round &r = a.round;
    const HandleState &state = *r.routing.state;
    if (a.cargo == Cargo::kMessages) return state.dispatch_epoch;
    if (a.cargo == Cargo::kPartials) return state.combine_epoch;
    return load(&r.state->combine_tickets) / BufferState::kTicketsOfRound + 1;  // before SEND
}

// Of how many tokens there may be records from `rank` to `peer`.
EP_DEVICE int token_limit(const ParcelArgs &a, int rank, int peer) {
    const Round &r = a.round;
    const int owner = a.cargo == Cargo::kPartials ? peer : rank;
    return owner == r.rank ? r.token_count : Signal::value(r.routing.token_counts[owner]);
}

// ---- Packing ------------------------------------------------------------------------------------

EP_DEVICE bool has_record(const ParcelArgs &a, uint64_t epoch, uint64_t signal) {
    return Signal::is_of(signal, epoch) &&
           (a.cargo != Cargo::kMessages || Signal::value(signal) > 0);
}

// How many of the tokens below `end` have one. A warp.
EP_DEVICE int count_records(const ParcelArgs &a, uint64_t epoch, const Slots &from, int end) {
    int count = 0;
    for (int first = 0; first < end; first += Warp::size()) {
        const int token = first + Warp::rank();
        const bool has = token < end && has_record(a, epoch, load(Layout::flag(from.of(token))));
        count += Warp::count(has).total;
    }
    return count;
}

EP_DEVICE void pack_record(const ParcelArgs &a, char *slot, int token, int value, char *to) {
    if (Warp::rank() == 0) *reinterpret_cast<RecordHead *>(to) = {token, value, {0, 0}};
    fan_out<Warp, kTermLoads>(
        1, [&](int) { return to + sizeof(RecordHead); }, body_of(a.cargo, slot), a.body_bytes,
        a.round.caching);
}

EP_DEVICE void pack_head(const ParcelArgs &a, uint64_t epoch, int peer, int tokens, int records) {
    char *parcel = a.parcels[peer];
    const Layout &layout = a.round.layout;
    auto *counts = reinterpret_cast<int32_t *>(parcel + sizeof(ParcelHead));
    for (int e = Warp::rank(); a.cargo == Cargo::kMessages && e < layout.local_expert_count;
         e += Warp::size())
        counts[e] = Signal::value(load(words_to(a.round, Cargo::kMessages, epoch, peer) + e));
    if (Warp::rank() != 0) return;
    *reinterpret_cast<ParcelHead *>(parcel) = {epoch, a.cargo, tokens, records, {0, 0, 0}};
    a.sizes[peer] = a.bytes(records);
}

// A range of tokens for each warp; the last one knows how many records there are.
EP_DEVICE void pack_parcel(const ParcelArgs &a, uint64_t epoch, int peer) {
    const Slots from = slots_to(a.round, a.cargo, epoch, peer);
    const int tokens = token_limit(a, a.round.rank, peer);
    const int warp = grid_index<Warp>(), warps = grid_count<Warp>();
    const Chunk chunk = Chunk::of(warp, warps, tokens);
    int records = count_records(a, epoch, from, chunk.begin);
    for (int token = chunk.begin; token < chunk.end; ++token) {
        char *slot = from.of(token);
        const uint64_t signal = load(Layout::flag(slot));
        if (!has_record(a, epoch, signal)) continue;
        pack_record(a, slot, token, Signal::value(signal), a.record(a.parcels[peer], records));
        ++records;
    }
    if (warp == warps - 1) pack_head(a, epoch, peer, tokens, records);
}

template <class Args>  // so that devices without far peers have no such kernel
EP_KERNEL pack_parcels(const Args a) {
    after_launches_before();
    const uint64_t epoch = epoch_of(a);
    for (int peer = 0; peer < a.round.layout.shape.rank_count; ++peer)
        if (is_far(a.round, peer)) pack_parcel(a, epoch, peer);
}

// ---- Unpacking ----------------------------------------------------------------------------------

// Whether a parcel is of this round and of the size that it says.
EP_DEVICE bool is_sound(const ParcelArgs &a, uint64_t epoch, int peer) {
    const uint64_t size = a.sizes[peer];
    if (size < a.bytes(0)) return false;
    const auto &head = *reinterpret_cast<const ParcelHead *>(a.parcels[peer]);
    const int limit = a.cargo == Cargo::kMessages ? a.round.layout.shape.token_count_max
                                                  : token_limit(a, peer, a.round.rank);
    return head.epoch == epoch && head.cargo == a.cargo && head.token_count >= 0 &&
           head.token_count <= limit && head.record_count >= 0 &&
           head.record_count <= head.token_count && size == a.bytes(head.record_count);
}

// Tells what there is no record of: tokens from `begin` on, of which nothing comes here.
EP_DEVICE void place_nothing(const ParcelArgs &a, uint64_t epoch, const Slots &to, int begin,
                             int end) {
    if (a.cargo != Cargo::kMessages) return;
    for (int token = begin + Warp::rank(); token < end; token += Warp::size())
        publish(Layout::flag(to.of(token)), Signal::pack(epoch, 0));
}

EP_DEVICE void place_record(const ParcelArgs &a, uint64_t epoch, const Slots &to,
                            const char *record) {
    const auto &head = *reinterpret_cast<const RecordHead *>(record);
    char *slot = to.of(head.token);
    fan_out<Warp, kTermLoads>(
        1, [&](int) { return body_of(a.cargo, slot); }, record + sizeof(RecordHead), a.body_bytes,
        a.round.caching);
    before_publish<Warp>();
    if (Warp::rank() == 0)
        publish(Layout::flag(slot), Signal::pack(epoch, static_cast<uint32_t>(head.value)));
}

EP_DEVICE void place_counts(const ParcelArgs &a, uint64_t epoch, int peer) {
    const Layout &layout = a.round.layout;
    char *parcel = a.parcels[peer];
    const auto &head = *reinterpret_cast<const ParcelHead *>(parcel);
    if (a.cargo == Cargo::kPartials && Warp::rank() == 0)
        post(words_from(a.round, Cargo::kPartials, epoch, peer), Signal::pack(epoch, 0));
    if (a.cargo != Cargo::kMessages) return;
    const auto *counts = reinterpret_cast<const int32_t *>(parcel + sizeof(ParcelHead));
    uint64_t *words = words_from(a.round, Cargo::kMessages, epoch, peer);
    for (int e = Warp::rank(); e < layout.local_expert_count; e += Warp::size())
        post(words + e, Signal::pack(epoch, counts[e]));
    if (Warp::rank() == 0)
        post(words + layout.local_expert_count, Signal::pack(epoch, head.token_count));
}

// A range of records for each warp, and the tokens between them.
EP_DEVICE void place_parcel(const ParcelArgs &a, uint64_t epoch, int peer) {
    const Slots to = slots_from(a.round, a.cargo, epoch, peer);
    const auto &head = *reinterpret_cast<const ParcelHead *>(a.parcels[peer]);
    const auto token_of = [&](int record) {
        if (record < 0) return -1;
        if (record == head.record_count) return head.token_count;
        return reinterpret_cast<const RecordHead *>(a.record(a.parcels[peer], record))->token;
    };
    const int warp = grid_index<Warp>(), warps = grid_count<Warp>();
    const Chunk chunk = Chunk::of(warp, warps, head.record_count + 1);  // the last is the end
    for (int record = chunk.begin; record < chunk.end; ++record) {
        const int before = token_of(record - 1), token = token_of(record);
        if (before < -1 || before >= head.token_count || token < 0) continue;  // a peer's nonsense
        place_nothing(a, epoch, to, before + 1,
                      token < head.token_count ? token : head.token_count);
        if (token < head.token_count) place_record(a, epoch, to, a.record(a.parcels[peer], record));
    }
    if (warp == 0) place_counts(a, epoch, peer);
}

template <class Args>
EP_KERNEL place_parcels(const Args a) {
    after_launches_before();
    const Round &r = a.round;
    const uint64_t epoch = epoch_of(a);
    for (int peer = 0; peer < r.layout.shape.rank_count; ++peer) {
        if (!is_far(r, peer)) continue;
        if (is_sound(a, epoch, peer)) {
            place_parcel(a, epoch, peer);
        } else if (grid_index<Thread>() == 0) {
            fetch_add(&r.state->invalid_messages, uint64_t{1});
            mask_for_limit(r, epoch, peer, Awaited::kExchange);
        }
    }
}

// ---- Launching ----------------------------------------------------------------------------------

template <class Args>
int launch_pack(const Args &args, const Queue &queue) {
    if constexpr (kPacksParcels)
        launch(pack_parcels<Args>, args, queue, sender_block_count_max(queue));
    return launch_error();
}

template <class Args>
int launch_place(const Args &args, const Queue &queue) {
    if constexpr (kPacksParcels)
        launch(place_parcels<Args>, args, queue, sender_block_count_max(queue));
    return launch_error();
}

}  // namespace ep::EP_DEVICE_NAMESPACE
