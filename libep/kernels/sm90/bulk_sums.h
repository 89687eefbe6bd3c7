// Sums of rows that come by bulk copies, a chunk of each after the other; see kernels/sums.h.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/sm90/belt.h"
#include "kernels/terms.h"

namespace ep::EP_DEVICE_NAMESPACE {

// Rows that a sum adds up: this rank's own are weighted first.
template <Element kOwn>
struct TermAddends {
    static constexpr Element kOther = kOwn;
    const Terms &terms;

    EP_DEVICE int count() const { return terms.count; }
    EP_DEVICE bool is_own(int) const { return true; }
    EP_DEVICE bool ends_own(int i) const { return i == terms.count - 1; }
    EP_DEVICE const char *row(int i) const { return terms.row[i]; }
    EP_DEVICE float weight(int i) const { return terms.weight[i]; }
};

// All rows that a sum of parts reads, in the order in which it adds them: where this rank's own
// part is, its terms.
template <Element kOwn, Element kPartial>
struct PartAddends {
    static constexpr Element kOther = kPartial;
    const Parts &parts;
    int own, own_end;  // own terms are [own, own_end)

    EP_DEVICE explicit PartAddends(const Parts &p) : parts(p), own(0) {
        while (own < p.count && p.row[own] != nullptr)
            ++own;
        own_end = own < p.count ? own + p.own.count : own;
    }
    EP_DEVICE int count() const {
        return own < parts.count ? parts.count - 1 + parts.own.count : parts.count;
    }
    EP_DEVICE bool is_own(int i) const { return i >= own && i < own_end; }
    EP_DEVICE bool ends_own(int i) const { return i == own_end - 1 && i >= own; }
    EP_DEVICE const char *row(int i) const {
        if (is_own(i)) return parts.own.row[i - own];
        return parts.row[i < own ? i : i - (own_end - own) + 1];
    }
    EP_DEVICE float weight(int i) const { return parts.own.weight[i - own]; }
};

class BulkSums {
  public:
    using Shared = Belt;
    EP_DEVICE explicit BulkSums(Belt *belt) : belt_(belt) {}

    EP_DEVICE void after_observe() { bulk_after_observe(); }

    template <Element kType, Element kPartial>
    EP_DEVICE void of_terms(const Terms &terms, int hidden, char *row) {
        sum<kType, kPartial>(TermAddends<kType>{terms}, hidden, row);
    }

    template <Element kType, Element kPartial>
    EP_DEVICE void of_parts(const Parts &parts, int hidden, char *row) {
        sum<kType, kType>(PartAddends<kType, kPartial>(parts), hidden, row);
    }

  private:
    // As many channels as a slot has of the larger of two types.
    template <Element kOne, Element kOther>
    struct ChunkOf {
        static constexpr int kBytes = element_bytes(kOne) > element_bytes(kOther)
                                          ? element_bytes(kOne)
                                          : element_bytes(kOther);
        static constexpr int kChannels = kBulkSlotBytes / kBytes, kLanes = kWarpSize * kPack;
        static constexpr int kPacks = (kChannels + kLanes - 1) / kLanes;
        using Packs = Pack<kPack>[kPacks];

        EP_DEVICE static int channel(int pack) { return (pack * kWarpSize + Warp::rank()) * kPack; }
    };

    // What the belt brings next: chunks of all addends, chunk after chunk.
    template <class Chunk, Element kOwn, class Addends>
    struct Request {
        const Addends &addends;
        int hidden, count;
        int channel = 0, addend = 0;

        EP_DEVICE void ask(WarpBelt *belt) {
            if (channel >= hidden) return;
            const int rest = hidden - channel;
            const int channels = rest < Chunk::kChannels ? rest : Chunk::kChannels;
            const int element = element_bytes(addends.is_own(addend) ? kOwn : Addends::kOther);
            const char *row = addends.row(addend);
            belt->fetch(row == nullptr ? nullptr : row + size_t(channel) * element,
                        channels * element);
            if (++addend < count) return;
            addend = 0;
            channel += Chunk::kChannels;
        }
    };

    // The sum of addends in their order, to `row` of type kTo.
    template <Element kOwn, Element kTo, class Addends>
    EP_DEVICE void sum(const Addends &addends, int hidden, char *row) {
        using Chunk = ChunkOf<kOwn, Addends::kOther>;
        Request<Chunk, kOwn, Addends> request{addends, hidden, addends.count()};
        for (int i = 0; i < kBulkSlots && request.count > 0; ++i)
            request.ask(&belt_);
        int channel = 0;
        EP_ROLLED
        for (; channel + Chunk::kChannels <= hidden; channel += Chunk::kChannels)
            sum_chunk<Chunk, true, kOwn, kTo>(addends, &request, Chunk::kChannels,
                                              row + size_t(channel) * element_bytes(kTo));
        if (channel < hidden)
            sum_chunk<Chunk, false, kOwn, kTo>(addends, &request, hidden - channel,
                                               row + size_t(channel) * element_bytes(kTo));
    }

    // Of a chunk of so many channels; kWhole: of as many as a chunk may have.
    template <class Chunk, bool kWhole, Element kOwn, Element kTo, class Addends, class Asked>
    EP_DEVICE void sum_chunk(const Addends &addends, Asked *request, int channels, char *to) {
        const auto has = [channels](int pack) {
            constexpr bool kAll = kWhole && Chunk::kChannels % Chunk::kLanes == 0;
            return kAll || Chunk::channel(pack) < channels;
        };
        typename Chunk::Packs sums = {}, own = {};
        EP_ROLLED
        for (int i = 0; i < request->count; ++i) {
            const char *slot = belt_.take();
            if (!addends.is_own(i))
                add_row<Addends::kOther, Chunk>(slot, has, sums, [](const auto &x) { return x; });
            else if (addends.row(i) != nullptr)
                add_row<kOwn, Chunk>(slot, has, own, [weight = addends.weight(i)](const auto &x) {
                    return scaled(weight, x);
                });
            Warp::sync();  // all have read what comes next
            request->ask(&belt_);
            if (!addends.ends_own(i)) continue;
            EP_UNROLL
            for (int pack = 0; pack < Chunk::kPacks; ++pack)
                add(&sums[pack], own[pack]);
        }
        EP_UNROLL
        for (int pack = 0; pack < Chunk::kPacks; ++pack)
            if (has(pack)) store_channels<kTo, kPack>(to, Chunk::channel(pack), sums[pack]);
    }

    // Adds what `change` makes of a slot's packs; all are loaded before the first is added.
    template <Element kType, class Chunk, class Has, class Change>
    EP_DEVICE static void add_row(const char *slot, Has has, typename Chunk::Packs &sums,
                                  Change change) {
        using Type = TypeOf<kType>;
        decltype(fetch<Type, kPack>(nullptr)) raw[Chunk::kPacks] = {};
        EP_UNROLL
        for (int i = 0; i < Chunk::kPacks; ++i)
            if (has(i))
                raw[i] =
                    fetch<Type, kPack>(slot + Chunk::channel(i) * sizeof(typename Type::Storage));
        EP_UNROLL
        for (int i = 0; i < Chunk::kPacks; ++i)
            if (has(i)) add(&sums[i], change(widen<Type, kPack>(raw[i])));
    }

    WarpBelt belt_;
};

}  // namespace ep::EP_DEVICE_NAMESPACE
