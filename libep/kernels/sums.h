// How a warp sums rows by flag: by loads of its lanes here, by bulk copies in sm90/bulk_sums.h,
// which has the same functions and gives the same bits.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/terms.h"

namespace ep::EP_DEVICE_NAMESPACE {

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

class LaneSums {
  public:
    struct Shared {};  // by the lanes of a warp
    EP_DEVICE explicit LaneSums(Shared *) {}

    // What the warp has observed may be read.
    EP_DEVICE void after_observe() {}

    // The weighted sum of terms, to `row`.
    template <Element kType, Element kPartial>
    EP_DEVICE void of_terms(const Terms &terms, int hidden, char *row) {
        each_pack(
            hidden, [&](auto &sums, auto channel) { sum_terms<kType>(terms, channel, sums); },
            [&](const auto &sum, int channel) { store_pack<kPartial>(row, channel, sum); });
    }

    // The sum of parts, to `row`.
    template <Element kType, Element kPartial>
    EP_DEVICE void of_parts(const Parts &parts, int hidden, char *row) {
        each_pack(
            hidden,
            [&](auto &sums, auto channel) { sum_parts<kType, kPartial>(parts, channel, sums); },
            [&](const auto &sum, int channel) { store_pack<kType>(row, channel, sum); });
    }
};

}  // namespace ep::EP_DEVICE_NAMESPACE
