// Rows by bulk copies: from memory into shared memory once, from there to each place; see
// kernels/rows.h.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/sm90/belt.h"

namespace ep::EP_DEVICE_NAMESPACE {

class BulkRows {
  public:
    struct Shared {
        Belt belt;
        float scales[kBulkSlotBytes / 2 / kScaleGroup];  // of a piece
    };
    EP_DEVICE explicit BulkRows(Shared *shared) : shared_(*shared), belt_(&shared->belt) {}

    EP_DEVICE void after_observe() { bulk_after_observe(); }

    EP_DEVICE void fan_out(const Targets &targets, const char *from, size_t bytes) {
        pass(from, bytes, [&](int piece, char *slot, int piece_bytes) {
            put(targets, size_t(piece) * kBulkSlotBytes, slot, piece_bytes);
        });
    }

    template <Element kType>
    EP_DEVICE void cast_fan_out(const Targets &targets, const char *from, int hidden,
                                bool power_of_two) {
        constexpr int kElement = element_bytes(kType), kChannels = kBulkSlotBytes / kElement;
        constexpr int kGroups = kChannels / kScaleGroup;
        static_assert(kChannels % kScaleGroup == 0, "a piece has whole groups");
        pass(from, size_t(hidden) * kElement, [&](int piece, char *slot, int piece_bytes) {
            const int groups = piece_bytes / kElement / kScaleGroup;
            cast_piece<kType>(slot, groups, power_of_two);
            put(targets, size_t(piece) * kChannels, slot, groups * kScaleGroup);
            for (int i = Warp::rank(); i < targets.count * kGroups; i += Warp::size()) {
                const int group = i % kGroups, target = i / kGroups;
                const Target at = targets.to[target];
                if (group < groups && at.row != nullptr)
                    put_scale(&at.scales[(piece * kGroups + group) * at.scale_stride],
                              shared_.scales[group], targets.caching_of(target));
            }
        });
    }

    EP_DEVICE void before_publish(int count) {
        if (Warp::rank() < count) bulk_await_written();
        ep::EP_DEVICE_NAMESPACE::before_publish<Warp>();
    }

    EP_DEVICE void finish() { bulk_await_read<0>(); }

  private:
    static constexpr int kAhead = kBulkSlots / 2;  // pieces being fetched, while as many are put

    // Calls visit(index, slot, bytes) for each piece of a row when it has arrived; it ends with
    // put().
    template <class Visit>
    EP_DEVICE void pass(const char *from, size_t bytes, Visit visit) {
        const int count = static_cast<int>((bytes + kBulkSlotBytes - 1) / kBulkSlotBytes);
        const auto bytes_of = [&](int piece) {
            const size_t rest = bytes - size_t(piece) * kBulkSlotBytes;
            return static_cast<int>(rest < kBulkSlotBytes ? rest : kBulkSlotBytes);
        };
        EP_ROLLED
        for (int piece = -kAhead; piece < count; ++piece) {
            if (const int next = piece + kAhead; next < count) {
                bulk_await_read<kBulkSlots - kAhead - 1>();
                Warp::sync();
                belt_.fetch(from + size_t(next) * kBulkSlotBytes, bytes_of(next));
            }
            if (piece >= 0) visit(piece, belt_.take(), bytes_of(piece));
        }
    }

    // A lane for each target. Every lane counts every piece, whether it puts one or not.
    EP_DEVICE static void put(const Targets &targets, size_t at, const char *slot, int bytes) {
        for (int i = Warp::rank(); i < targets.count; i += Warp::size())
            if (char *row = targets.to[i].row)
                bulk_put(row + at, slot, bytes, targets.caching_of(i));
        bulk_commit();
    }

    // Casts the groups of a slot to its beginning, and keeps their scales.
    template <Element kType>
    EP_DEVICE void cast_piece(char *slot, int groups, bool power_of_two) {
        const CastLane lane = CastLane::of_warp();
        for (int first = 0; first < groups; first += lane.groups_at_once) {
            const int group = first + lane.group;
            const bool inside = group < groups;
            const auto cast = cast_channels<CastLane::kLanes>(
                Channels<kType, CastLane::kPieces>::near(slot, lane.channel(group), inside),
                power_of_two);
            Warp::sync();  // all have read what is overwritten
            for (int i = 0; inside && i < CastLane::kPieces; ++i)
                reinterpret_cast<Vector *>(slot + lane.channel(group))[i] = cast.pieces[i];
            if (inside && lane.rank == 0) shared_.scales[group] = cast.scale;
        }
        bulk_before_put();
        Warp::sync();
    }

    Shared &shared_;
    WarpBelt belt_;
};

}  // namespace ep::EP_DEVICE_NAMESPACE
