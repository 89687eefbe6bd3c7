// combine: each rank sums its experts' rows of a token and sends one row back; the token's owner
// sums those. One launch, whose blocks have roles (before it another, if weights come only now:
// owners push them to where their tokens are):
//
//   counter    tells every peer that this rank has begun the round, and at the end waits until
//              all have (see ARCHITECTURE.md, reuse of slots)
//   senders    for each token received: weigh and sum its rows, one row to its owner
//   receivers  for each own token: wait for the rows of its ranks, and sum them in rank order
//
// All sums are in fp32, in an order that depends on nothing but the routing.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/kernels.h"
#include "kernels/lines.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

EP_DEVICE uint64_t combine_epoch_of(const Round &r) {
    return epoch_of(r, r.state->combine_tickets, r.routing.state->combine_epoch);
}

// Before the launch that sends. One warp per own token: a weight for each entry of each of its
// messages.
EP_KERNEL combine_weights(const CombineArgs a) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const uint64_t epoch = combine_epoch_of(r);
    for (int token = grid_index<Warp>(); token < r.token_count; token += grid_count<Warp>()) {
        const int32_t *choices = r.routing.choices + token * r.topk;
        const float *weights = a.topk_weights + token * r.topk;
        for (int peer = next_owner(layout, choices, r.topk, -1); peer < layout.shape.rank_count;
             peer = next_owner(layout, choices, r.topk, peer)) {
            if (peer == r.rank || !Warp::broadcast(int{is_active(r, peer)})) continue;
            const ExpertRange range = ExpertRange::of(layout, peer);
            char *weight = layout.weight(r.window(peer), epoch, peer, r.rank, token);
            each_entry(choices, weights, r.topk, range, [&](int32_t, int, int index, float value) {
                Layout::weight_values(weight)[index] = value;
            });
            before_publish<Warp>();
            if (Warp::rank() == 0) publish(Layout::flag(weight), Signal::pack(epoch, 0));
        }
    }
}

// Rows to be weighed and summed; nullptr: a row that broke a limit. The lanes of a warp share
// them.
struct Terms {
    const char *row[kTopkMax];
    float weight[kTopkMax];
    int count;
};

// The rows of a token's local experts, with their weights. One warp.
template <Element kType>
EP_DEVICE void put_terms(const CombineArgs &a, size_t slot, const float *weights, Terms *terms) {
    const Round &r = a.round;
    const int32_t *rows = r.routing.rows + slot * r.layout.shape.topk_max;
    const int count = r.routing.row_counts[slot];
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kType);
    for (int i = Warp::rank(); i < r.layout.shape.topk_max; i += Warp::size()) {
        const int32_t row = rows[i];  // not only of those below count, which need not wait for it
        const float weight = weights != nullptr ? weights[i] : 0;
        if (i >= count) break;
        terms->row[i] = row < 0 ? nullptr : a.x + row * row_bytes;
        if (weights != nullptr) terms->weight[i] = weight;
    }
    if (Warp::rank() == 0) terms->count = count;
}

// The terms' sums over kPacks packs of channels; channel(i) is where pack i begins, negative for
// none. Several rows are loaded before the first is added.
template <Element kType, class Floats, int kPacks, class Channel>
EP_DEVICE void sum_terms(const Terms &terms, Channel channel, Floats (&sums)[kPacks]) {
    using Type = TypeOf<kType>;
    constexpr int kCount = sizeof(Floats) / sizeof(float);
    // What waits for its sums in a part of four packs leaves room for eight loads.
    constexpr int kLoads = kPacks == 4 && kTermLoads > 8 ? 8 : kTermLoads;
    constexpr int kTermsAtOnce = kLoads < kPacks ? 1 : kLoads / kPacks;
    for (int first = 0; first < terms.count; first += kTermsAtOnce) {
        // As they are in memory, which takes fewer registers.
        decltype(fetch_row<Type, kCount>(nullptr)) values[kTermsAtOnce][kPacks] = {};
        EP_UNROLL
        for (int i = 0; i < kTermsAtOnce; ++i) {
            const char *row = first + i < terms.count ? terms.row[first + i] : nullptr;
            EP_UNROLL
            for (int pack = 0; pack < kPacks; ++pack)
                if (row != nullptr && channel(pack) >= 0)
                    values[i][pack] = fetch_row<Type, kCount>(
                        row + channel(pack) * sizeof(typename Type::Storage));
        }
        EP_UNROLL
        for (int i = 0; i < kTermsAtOnce; ++i) {
            if (first + i >= terms.count || terms.row[first + i] == nullptr) continue;
            EP_UNROLL
            for (int pack = 0; pack < kPacks; ++pack)
                add(&sums[pack],
                    scaled(terms.weight[first + i], widen<Type, kCount>(values[i][pack])));
        }
    }
}

// Calls visit(sums, channel) for all channels of a row, after sum(&sums, channel) for packs of
// them; see sum_terms for `channel`. One warp.
template <class Sum, class Visit>
EP_DEVICE void each_pack(int hidden, Sum sum, Visit visit) {
    constexpr int kPacks = kPacksAtOnce;
    int first = Warp::rank() * kPack;
    for (; first + kPack <= hidden; first += kPacks * Warp::size() * kPack) {
        const auto channel = [&](int i) {
            const int at = first + i * Warp::size() * kPack;
            return at + kPack <= hidden ? at : -1;
        };
        Pack<kPack> sums[kPacks] = {};
        sum(sums, channel);
        EP_UNROLL
        for (int i = 0; i < kPacks; ++i)
            if (channel(i) >= 0) visit(sums[i], channel(i));
    }
    if constexpr (kPackMin < kPack)
        for (first = hidden / kPack * kPack; first < hidden; first += kPackMin) {
            Pack<kPackMin> sums[1] = {};
            sum(sums, [&](int) { return first; });
            visit(sums[0], first);
        }
}

// The sum of a whole row's terms, to `row`. One warp.
template <Element kType, Element kPartial>
EP_DEVICE void reduce_terms(const Terms &terms, int hidden, char *row) {
    each_pack(
        hidden, [&](auto &sums, auto channel) { sum_terms<kType>(terms, channel, sums); },
        [&](const auto &sum, int channel) { store_pack<kPartial>(row, channel, sum); });
}

// What is summed for one own token: the parts in rank order, where nullptr stands for this rank's
// own.
struct Parts {
    const char *row[kTopkMax];
    int count;
    Terms own;
};

// What the threads of a block share: each warp's own.
struct CombineShared {
    Parts parts[kWarpsOfBlockMax];
};

// ---- Sending ------------------------------------------------------------------------------------

// A token that dispatch received, whose rows a warp sums.
struct Outgoing {
    uint64_t epoch;
    int source, token;
};

// The weights that the owner of a token has given to this combine; nullptr if it failed. One warp.
EP_DEVICE const float *await_weights(const Wait &wait, const Outgoing &out) {
    const Round &r = wait.round;
    char *weight = r.layout.weight(r.window(r.rank), out.epoch, r.rank, out.source, out.token);
    uint64_t signal;
    if (!wait.until<Warp>(Layout::flag(weight), out.epoch, out.source, &signal)) return nullptr;
    return Layout::weight_values(weight);
}

// The token's terms; false if nothing is to be sent. One warp.
template <Element kType>
EP_DEVICE bool find_terms(const CombineArgs &a, const Wait &wait, const Outgoing &out,
                          Terms *terms) {
    const Round &r = a.round;
    const size_t slot = size_t(out.source) * r.layout.shape.token_count_max + out.token;
    const int active = is_active(r, out.source), count = r.routing.row_counts[slot];
    if (!Warp::broadcast(active) || count == 0) return false;
    const float *weights = a.topk_weights == nullptr
                               ? r.routing.weights + slot * r.layout.shape.topk_max
                               : await_weights(wait, out);
    if (weights == nullptr) return false;
    Warp::sync();  // before these terms take the place of the last ones
    put_terms<kType>(a, slot, weights, terms);
    Warp::sync();
    return true;
}

template <Element kType, Element kPartial>
EP_DEVICE void send_partial(const CombineArgs &a, const Outgoing &out, const Terms &terms) {
    const Round &r = a.round;
    char *partial =
        r.layout.partial(r.window(out.source), out.epoch, out.source, r.rank, out.token);
    reduce_terms<kType, kPartial>(terms, r.hidden, Layout::partial_row(partial));
    before_publish<Warp>();
    if (Warp::rank() == 0) publish(Layout::flag(partial), Signal::pack(out.epoch, 0));
}

// How many channels a piece of a partial row holds.
template <Element kPartial>
constexpr int kPieceChannels = static_cast<int>(Layout::kPieceBytes) / element_bytes(kPartial);

// The terms' sums over this lane's pieces.
template <Element kType, Element kPartial, int kLines>
EP_DEVICE void sum_part(const Part<kLines> &part, const Terms &terms, size_t row_bytes,
                        Pack<kPieceChannels<kPartial>> (&sums)[Part<kLines>::kSteps]) {
    constexpr int kChannels = kPieceChannels<kPartial>;
    EP_UNROLL
    for (int step = 0; step < Part<kLines>::kSteps; ++step)
        sums[step] = {};
    sum_terms<kType>(
        terms,
        [&](int step) {
            return part.has_piece(step, row_bytes) ? part.piece(step) * kChannels : -1;
        },
        sums);
}

template <Element kType, Element kPartial, int kLines>
EP_DEVICE void push_partial(const CombineArgs &a, const Outgoing &out, const Part<kLines> &part,
                            const Terms &terms) {
    const Round &r = a.round;
    constexpr int kChannels = kPieceChannels<kPartial>;
    Pack<kChannels> sums[Part<kLines>::kSteps];
    sum_part<kType, kPartial>(part, terms, size_t(r.hidden) * element_bytes(kPartial), sums);
    Pieces<kLines> pieces;
    EP_UNROLL
    for (int step = 0; step < Part<kLines>::kSteps; ++step) {
        alignas(16) char bytes[sizeof(Vector)];
        store_channels<kPartial, kChannels>(bytes, 0, sums[step]);
        __builtin_memcpy(&pieces.step[step], bytes, sizeof bytes);
    }
    push_part(part,
              r.layout.partial(r.window(out.source), out.epoch, out.source, r.rank, out.token),
              pieces, Signal::pack(out.epoch, 0));
}

// A warp per token that dispatch received, or by line per part of one.
template <int kLines, Element kType, Element kPartial>
EP_DEVICE void send_partials(const CombineArgs &a, uint64_t epoch, const Role &role, Terms *terms) {
    const Round &r = a.round;
    const Wait wait(r);
    const int ranks = r.layout.shape.rank_count, warps = Warp::count_in_block();
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kPartial);
    const int parts = part_count_of<kLines>(row_bytes);
    for (int step = 1; step < ranks; ++step) {
        const int source = (r.rank + step) % ranks;
        const int items = Signal::value(r.routing.token_counts[source]) * parts;
        for (int i = role.sender * warps + Warp::index_in_block(); i < items;
             i += role.sender_count * warps) {
            const Outgoing out{epoch, source, i / parts};
            if (!find_terms<kType>(a, wait, out, terms)) continue;
            if constexpr (kLines > 0)
                push_partial<kType, kPartial>(a, out, Part<kLines>(i % parts, row_bytes), *terms);
            else
                send_partial<kType, kPartial>(a, out, *terms);
        }
    }
}

// ---- Receiving ----------------------------------------------------------------------------------

// The weighted rows of an own token's local experts. One warp.
template <Element kType>
EP_DEVICE void put_own_terms(const CombineArgs &a, int token, Terms *terms) {
    const Round &r = a.round;
    const size_t slot = size_t(r.rank) * r.layout.shape.token_count_max + token;
    const bool given = a.topk_weights != nullptr;
    put_terms<kType>(a, slot, given ? nullptr : r.routing.weights + slot * r.layout.shape.topk_max,
                     terms);
    if (!given) return;
    Warp::sync();
    const ExpertRange range = ExpertRange::of(r.layout, r.rank);
    each_entry(r.routing.choices + token * r.topk, a.topk_weights + token * r.topk, r.topk, range,
               [&](int32_t, int, int index, float weight) { terms->weight[index] = weight; });
}

// Waits for the rows of a token's ranks. One warp.
EP_DEVICE void await_parts(const CombineArgs &a, const Wait &wait, uint64_t epoch, int token,
                           Parts *parts) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    const int32_t *choices = r.routing.choices + token * r.topk;
    int count = 0;
    for (int peer = next_owner(layout, choices, r.topk, -1); peer < layout.shape.rank_count;
         peer = next_owner(layout, choices, r.topk, peer)) {
        const char *row = nullptr;
        if (peer != r.rank) {
            char *partial = layout.partial(r.window(r.rank), epoch, r.rank, peer, token);
            uint64_t signal;
            if (!wait.until<Warp>(Layout::flag(partial), epoch, peer, &signal)) continue;
            row = Layout::partial_row(partial);
        }
        if (Warp::rank() == 0) parts->row[count] = row;
        ++count;
    }
    if (Warp::rank() == 0) parts->count = count;
}

// The parts' sums; see sum_terms.
template <Element kType, Element kPartial, class Floats, int kPacks, class Channel>
EP_DEVICE void sum_parts(const Parts &parts, Channel channel, Floats (&sums)[kPacks]) {
    constexpr int kCount = sizeof(Floats) / sizeof(float);
    for (int i = 0; i < parts.count; ++i) {
        Floats values[kPacks] = {};
        if (parts.row[i] == nullptr) {
            sum_terms<kType>(parts.own, channel, values);
        } else {
            EP_UNROLL
            for (int pack = 0; pack < kPacks; ++pack)
                if (channel(pack) >= 0)
                    values[pack] = load_channels<kPartial, kCount>(parts.row[i], channel(pack));
        }
        EP_UNROLL
        for (int pack = 0; pack < kPacks; ++pack)
            add(&sums[pack], values[pack]);
    }
}

// One warp.
template <Element kType, Element kPartial>
EP_DEVICE void receive_token(const CombineArgs &a, const Wait &wait, uint64_t epoch, int token,
                             Parts *parts) {
    const Round &r = a.round;
    put_own_terms<kType>(a, token, &parts->own);
    await_parts(a, wait, epoch, token, parts);
    Warp::sync();
    char *row = a.out + token * a.out_stride;
    each_pack(
        r.hidden,
        [&](auto &sums, auto channel) { sum_parts<kType, kPartial>(*parts, channel, sums); },
        [&](const auto &sum, int channel) { store_pack<kType>(row, channel, sum); });
    Warp::sync();  // before the next token's parts take the place of this one's
}

// Waits for a part of a peer's row by line. False if the peer has failed. One warp.
template <int kLines>
EP_DEVICE bool await_line_part(const Wait &wait, uint64_t epoch, int peer, const Part<kLines> &part,
                               char *lines, PartArrival<kLines> *arrival) {
    for (uint32_t attempt = 0;; ++attempt) {
        const bool whole = arrival->pull_rest(part, lines, epoch);
        if (!Warp::broadcast(int{is_active(wait.round, peer)})) return false;
        if (whole) return true;
        wait.lapse<Warp>(peer, attempt);
    }
}

// One part of an own token by line. One warp.
template <Element kType, Element kPartial, int kLines>
EP_DEVICE void receive_token_part(const CombineArgs &a, const Wait &wait, uint64_t epoch, int token,
                                  const Part<kLines> &part, Terms *terms) {
    const Round &r = a.round;
    const Layout &layout = r.layout;
    constexpr int kChannels = kPieceChannels<kPartial>;
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kPartial);
    put_own_terms<kType>(a, token, terms);
    Warp::sync();
    Pack<kChannels> own[Part<kLines>::kSteps], sums[Part<kLines>::kSteps] = {};
    sum_part<kType, kPartial>(part, *terms, row_bytes, own);
    const int32_t *choices = r.routing.choices + token * r.topk;
    for (int peer = next_owner(layout, choices, r.topk, -1); peer < layout.shape.rank_count;
         peer = next_owner(layout, choices, r.topk, peer)) {
        PartArrival<kLines> arrival;
        char *lines = layout.partial(r.window(r.rank), epoch, r.rank, peer, token);
        if (peer != r.rank && !await_line_part(wait, epoch, peer, part, lines, &arrival)) continue;
        EP_UNROLL
        for (int step = 0; step < Part<kLines>::kSteps; ++step) {
            alignas(16) char bytes[sizeof(Vector)];
            __builtin_memcpy(bytes, &arrival.pieces.step[step], sizeof bytes);
            add(&sums[step],
                peer == r.rank ? own[step] : load_channels<kPartial, kChannels>(bytes, 0));
        }
    }
    EP_UNROLL
    for (int step = 0; step < Part<kLines>::kSteps; ++step)
        if (part.has_piece(step, row_bytes))
            store_channels<kType, kChannels>(a.out + token * a.out_stride,
                                             part.piece(step) * kChannels, sums[step]);
    Warp::sync();  // before the next token's terms take the place of this one's
}

// A warp per own token, or by line per part of one.
template <int kLines, Element kType, Element kPartial>
EP_DEVICE void receive_tokens(const CombineArgs &a, uint64_t epoch, const Role &role,
                              Parts *warp_parts) {
    const Round &r = a.round;
    const Wait wait(r);
    const int warps = Warp::count_in_block();
    const size_t row_bytes = size_t(r.hidden) * element_bytes(kPartial);
    const int parts = part_count_of<kLines>(row_bytes);
    for (int i = role.receiver * warps + Warp::index_in_block(); i < r.token_count * parts;
         i += role.receiver_count * warps) {
        if constexpr (kLines > 0)
            receive_token_part<kType, kPartial>(
                a, wait, epoch, i / parts, Part<kLines>(i % parts, row_bytes), &warp_parts->own);
        else
            receive_token<kType, kPartial>(a, wait, epoch, i, warp_parts);
    }
}

// ---- Roles --------------------------------------------------------------------------------------

EP_DEVICE void tell_peers(const Round &r, uint64_t epoch) {
    if (Block::rank() == 0) r.routing.state->combine_epoch = epoch;
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size())
        if (peer != r.rank && is_active(r, peer))
            post(r.layout.arrival(r.window(peer), epoch, r.rank), Signal::pack(epoch, 0));
}

// Until every peer has begun the round.
EP_DEVICE void await_arrivals(const Round &r, uint64_t epoch) {
    const Wait wait(r);
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size()) {
        uint64_t signal;
        if (peer != r.rank)
            wait.until_posted(r.layout.arrival(r.window(r.rank), epoch, peer), epoch, peer,
                              &signal);
    }
}

template <int kLines, Element kType, Element kPartial>
EP_KERNEL combine_kernel(const CombineArgs a) {
    EP_SHARED(CombineShared, shared);
    const Round &r = a.round;
    const Role role = Role::of(r);
    const uint64_t epoch = combine_epoch_of(r);
    Parts *parts = &shared.parts[Warp::index_in_block()];
    if (role.counts && r.sends()) tell_peers(r, epoch);
    if (role.sender >= 0 && r.sends())
        send_partials<kLines, kType, kPartial>(a, epoch, role, &parts->own);
    if (role.receiver >= 0 && r.receives())
        receive_tokens<kLines, kType, kPartial>(a, epoch, role, parts);
    if (role.counts && r.receives()) await_arrivals(r, epoch);
    if (r.sends()) hand_in(&r.state->combine_tickets);
}

// ---- Launching ----------------------------------------------------------------------------------

template <int kLines, Element kType, Element kPartial>
int launch_combine(CombineArgs args, Phases phases, const Queue &queue) {
    Round &r = args.round;
    const Shape &shape = r.layout.shape;
    const int parts = part_count_of<kLines>(size_t(r.hidden) * element_bytes(kPartial));
    set_roles(&r, queue, (shape.rank_count - 1) * shape.token_count_max * parts,
              r.token_count * parts);
    r.phases = Phases::kSend;
    if (has_phase(phases, Phases::kSend) && args.topk_weights != nullptr)
        launch_all(combine_weights, args, queue, r.token_count);
    launch_phases(combine_kernel<kLines, kType, kPartial>, args, phases, queue);
    return launch_error();
}

template <Element kType, Element kPartial>
int launch_combine(const CombineArgs &args, Phases phases, const Queue &queue) {
    if constexpr (kLineTokenCountMax > 0)
        if (args.round.layout.shape.carriage == Carriage::kLine) {
            const size_t row_bytes = size_t(args.round.hidden) * element_bytes(kPartial);
            if (args.round.token_count * part_count_of<kPartLinesMin>(row_bytes) <=
                warp_count_max(queue))
                return launch_combine<kPartLinesMin, kType, kPartial>(args, phases, queue);
            return launch_combine<kPartLinesMax, kType, kPartial>(args, phases, queue);
        }
    return launch_combine<0, kType, kPartial>(args, phases, queue);
}

inline int launch_combine(CombineArgs args, Phases phases, const Queue &queue) {
    const bool wide = args.fp32_partials;
    switch (args.x_type) {
        case Element::kBf16:
            return wide ? launch_combine<Element::kBf16, Element::kFp32>(args, phases, queue)
                        : launch_combine<Element::kBf16, Element::kBf16>(args, phases, queue);
        case Element::kFp16:
            return wide ? launch_combine<Element::kFp16, Element::kFp32>(args, phases, queue)
                        : launch_combine<Element::kFp16, Element::kFp16>(args, phases, queue);
        default:
            return launch_combine<Element::kFp32, Element::kFp32>(args, phases, queue);
    }
}

}  // namespace ep::EP_DEVICE_NAMESPACE
