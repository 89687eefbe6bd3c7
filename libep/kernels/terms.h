// What combine sums: the rows of a token's experts, weighted. Both its ways, by flag and by line,
// ask this.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/kernels.h"
#include "kernels/routing.h"
#include "kernels/ways.h"

namespace ep::EP_DEVICE_NAMESPACE {

EP_DEVICE uint64_t combine_epoch_of(const Round &r) {
    return epoch_of(r, r.state->combine_tickets, r.routing.state->combine_epoch);
}

// Rows to be weighed and summed; nullptr: a row that broke a limit. The lanes of a warp share
// them.
struct Terms {
    const char *row[kTopkMax];
    float weight[kTopkMax];
    int count;
};

// What is summed for one own token: the parts in rank order, where nullptr stands for this rank's
// own.
struct Parts {
    const char *row[kTopkMax];
    int count;
    Terms own;
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
    constexpr int kTermsAtOnce = kTermLoads < kPacks ? 1 : kTermLoads / kPacks;
    EP_ROLLED
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

// A token that dispatch received, whose rows a warp sums.
struct Outgoing {
    uint64_t epoch;
    int source, token;
};

// The weights that the owner of a token has given to this combine; nullptr if it failed. One warp.
EP_DEVICE const float *await_weights(const Wait &wait, const Outgoing &out) {
    const Round &r = wait.round;
    char *weight = slots_from(r, Cargo::kWeights, out.epoch, out.source).of(out.token);
    uint64_t signal;
    if (!wait.until<Warp>(Layout::flag(weight), out.epoch, out.source, Awaited::kWeights, &signal))
        return nullptr;
    return Layout::weight_values(weight);
}

// That this rank has begun the round, and whether it has anything for the peer.
EP_DEVICE void tell_peers(const Round &r, uint64_t epoch) {
    if (Block::rank() == 0) {
        r.routing.state->combine_epoch = epoch;
        keep_progress(r, Cargo::kPartials, epoch);
    }
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size()) {
        const Standing standing = decide_standing(r, Cargo::kPartials, epoch, peer);
        if (peer == r.rank || standing == Standing::kMasked) continue;
        const bool has_tokens = Signal::value(r.routing.token_counts[peer]) != 0;
        post(words_to(r, Cargo::kPartials, epoch, peer),
             Signal::pack(epoch, standing == Standing::kBehind ? kHeldBack
                                 : has_tokens                  ? 0
                                                               : kNoSums));
    }
}

// Until every peer has begun the round.
EP_DEVICE void await_arrivals(const Round &r, uint64_t epoch) {
    const Wait wait(r);
    drop_absent(r);
    for (int peer = Block::rank(); peer < r.layout.shape.rank_count; peer += Block::size()) {
        uint64_t signal;
        if (peer != r.rank)
            wait.until_posted(words_from(r, Cargo::kPartials, epoch, peer), epoch, peer,
                              Awaited::kBegin, true, &signal);
    }
}

}  // namespace ep::EP_DEVICE_NAMESPACE
