// Conversions between element types, in integer arithmetic that is the same on every device, or by
// an instruction with the same bits. All round to nearest, ties to even, and make one NaN of all.
// Each is written once for a single value and, on the CPU, for a
// vector of them: Bits is uint32_t or a vector of it, Float likewise.
#pragma once

#include "device/device.h"
#include "wire/message.h"

namespace ep::EP_DEVICE_NAMESPACE {

template <class To, class From>
EP_DEVICE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

struct Bf16 {
    using Storage = uint16_t;
    static constexpr Element kElement = Element::kBf16;

    template <class Float, class Bits>
    EP_DEVICE static Float decode(Bits value) {
        return bit_cast<Float>(value << 16);
    }
    template <class Bits, class Float>
    EP_DEVICE static Bits encode(Float value) {
        const Bits bits = bit_cast<Bits>(value);
        const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const Bits nan = bits - bits + 0x7fff;
        return (bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
    }
};

struct Fp16 {
    using Storage = uint16_t;
    static constexpr Element kElement = Element::kFp16;

    template <class Float, class Bits>
    EP_DEVICE static Float decode(Bits value) {
        const Bits magnitude = value & 0x7fff;
        // As if the exponent had the bias of a float, then 2^112 times that: right for subnormals
        // too.
        const Bits finite = bit_cast<Bits>(bit_cast<Float>(magnitude << 13) * 0x1p112f);
        const Bits special = magnitude << 13 | 0x7f800000;
        return bit_cast<Float>((magnitude >= 0x7c00 ? special : finite) | (value & 0x8000) << 16);
    }
    template <class Bits, class Float>
    EP_DEVICE static Bits encode(Float value) {
        const Bits bits = bit_cast<Bits>(value), magnitude = bits & 0x7fffffff;
        const Bits normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
        // Adding 0.5 leaves the subnormal's bits, rounded, at the low end of the sum.
        const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000;
        const Bits finite = magnitude >= 0x38800000 ? normal : subnormal;
        const Bits infinity = magnitude - magnitude + 0x7c00;
        const Bits signed_value =
            (magnitude >= 0x47800000 ? infinity : finite) | (bits >> 16 & 0x8000);
        return magnitude > 0x7f800000 ? infinity | 0x3ff : signed_value;
    }
};

struct Fp32 {
    using Storage = uint32_t;
    static constexpr Element kElement = Element::kFp32;

    template <class Float, class Bits>
    EP_DEVICE static Float decode(Bits value) {
        return bit_cast<Float>(value);
    }
    template <class Bits, class Float>
    EP_DEVICE static Bits encode(Float value) {
        return bit_cast<Bits>(value);
    }
};

constexpr float kFp8Max = 448.0f;  // the largest float8_e4m3fn

// Saturates: what is beyond kFp8Max becomes kFp8Max.
struct Fp8 {
    using Storage = uint8_t;
    static constexpr Element kElement = Element::kFp8;

    template <class Bits, class Float>
    EP_DEVICE static Bits encode(Float value) {
        const Bits bits = bit_cast<Bits>(value), magnitude = bits & 0x7fffffff;
        const Bits normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
        // 2^14 has a unit in the last place of 2^-9, the smallest float8_e4m3fn.
        const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 0x1p14f) - 0x46800000;
        const Bits finite = magnitude >= 0x3c800000 ? normal : subnormal;
        const Bits largest = magnitude - magnitude + 0x7e;
        const Bits clamped = magnitude > 0x43e00000 ? largest : finite;
        return magnitude > 0x7f800000 ? largest | 1 : clamped | (bits >> 24 & 0x80);
    }
};

template <Element kType>
struct TypeOf;
template <>
struct TypeOf<Element::kBf16> : Bf16 {};
template <>
struct TypeOf<Element::kFp16> : Fp16 {};
template <>
struct TypeOf<Element::kFp32> : Fp32 {};

// Channels [first, first + kCount) of a row.
template <Element kType, int kCount>
EP_DEVICE Pack<kCount> load_channels(const char *row, int first) {
    using Type = TypeOf<kType>;
    return widen<Type, kCount>(fetch<Type, kCount>(row + first * sizeof(typename Type::Storage)));
}
template <Element kType, int kCount>
EP_DEVICE void store_channels(char *row, int first, const Pack<kCount> &values) {
    using Type = TypeOf<kType>;
    narrow<Type, kCount>(row + first * sizeof(typename Type::Storage), values);
}

template <Element kType, class Floats>
EP_DEVICE void store_pack(char *row, int first, const Floats &values) {
    store_channels<kType, static_cast<int>(sizeof(Floats) / sizeof(float))>(row, first, values);
}

// The scale of channels whose largest magnitude is `amax`, and its inverse.
struct Fp8Scale {
    float scale, inverse;

    EP_DEVICE static Fp8Scale of(float amax, bool power_of_two) {
        constexpr float kAmaxMin = 1e-4f;
        amax = amax < kAmaxMin ? kAmaxMin : amax;
        if (!power_of_two) return {amax / kFp8Max, kFp8Max / amax};
        const auto bits = bit_cast<uint32_t>(amax / kFp8Max);
        const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffff) != 0);
        constexpr uint32_t kInfinity = 255;
        const uint32_t inverse = exponent == kInfinity ? 0 : 254 - exponent;
        return {bit_cast<float>(exponent << 23), bit_cast<float>(inverse << 23)};
    }
};

// A pack to float8_e4m3fn: the hardware's way where there is one, with the same bits.
template <class Floats>
EP_DEVICE void narrow_fp8(char *to, const Floats &values) {
    if constexpr (kCastsFp8)
        cast_fp8(to, values);
    else
        narrow<Fp8, sizeof(Floats) / sizeof(float)>(to, values);
}

// Where a row goes, and its scales.
struct Target {
    char *row;  // nullptr: nowhere
    float *scales;
    int64_t scale_stride;  // from group to group
};

// Where one row goes, to the first `kept` as messages, which are read at once.
struct Targets {
    const Target *to;
    int count, kept;
    Caching caching;  // of the row at the others

    EP_DEVICE Caching caching_of(int i) const { return i < kept ? Caching::kKeep : caching; }
};

// The scale of a group of a row. By column, those of several rows share what memory reads and
// writes at once, so they stay in the cache until all have come, where rows do not.
EP_DEVICE void put_scale(float *to, float scale, Caching of_row) {
    if (of_row == Caching::kKeep)
        *to = scale;
    else
        keep_store(to, scale);
}

// 16 * kPieces channels of a row as float8_e4m3fn.
template <int kPieces>
struct Cast {
    Vector pieces[kPieces];
    float scale;
};

constexpr int kGroupsInFlight = kWarpSize == 1 ? 1 : 4;  // of a lane

// 16 * kPieces channels of a row as they are in memory; zeros outside the row. Fetched apart from
// their use, so that a lane has many on their way.
template <Element kType, int kPieces>
struct Channels {
    static constexpr int kPacks = kPieces * static_cast<int>(sizeof(Vector)) / kPack;
    decltype(fetch_row<TypeOf<kType>, kPack>(nullptr)) packs[kPacks];

    EP_DEVICE static Channels of(const char *row, int channel, bool inside) {
        return from(channel, inside, [&](size_t at) { return fetch_row<Type, kPack>(row + at); });
    }
    // Of a row in shared memory.
    EP_DEVICE static Channels near(const char *row, int channel, bool inside) {
        return from(channel, inside, [&](size_t at) { return fetch<Type, kPack>(row + at); });
    }

  private:
    using Type = TypeOf<kType>;

    template <class Fetch>
    EP_DEVICE static Channels from(int channel, bool inside, Fetch fetch_at) {
        Channels channels = {};
        EP_UNROLL
        for (int i = 0; inside && i < kPacks; ++i)
            channels.packs[i] = fetch_at((channel + i * kPack) * sizeof(typename Type::Storage));
        return channels;
    }
};

// Casts channels with the scale that they share with the kLanesOfGroup lanes beside this one. All
// lanes of the warp come here.
template <int kLanesOfGroup, Element kType, int kPieces>
EP_DEVICE Cast<kPieces> cast_channels(const Channels<kType, kPieces> &channels, bool power_of_two) {
    constexpr int kPacks = Channels<kType, kPieces>::kPacks;
    Pack<kPack> values[kPacks];
    EP_UNROLL
    for (int i = 0; i < kPacks; ++i)
        values[i] = widen<TypeOf<kType>, kPack>(channels.packs[i]);
    const float amax = Warp::max_over<kLanesOfGroup>(max_magnitude(values));
    const Fp8Scale by = Fp8Scale::of(amax, power_of_two);
    alignas(16) char bytes[kPacks * kPack];
    EP_UNROLL
    for (int i = 0; i < kPacks; ++i)
        narrow_fp8(bytes + i * kPack, scaled(by.inverse, values[i]));
    Cast<kPieces> cast;
    __builtin_memcpy(&cast.pieces, bytes, sizeof cast.pieces);
    cast.scale = by.scale;
    return cast;
}

// A lane's share of groups that a warp casts beside each other. A group belongs to as many lanes as
// have 16 channels of it each, or to the whole of a narrower warp.
struct CastLane {
    static constexpr int kChannels = kScaleGroup / kWarpSize > 16 ? kScaleGroup / kWarpSize : 16;
    static constexpr int kLanes = kScaleGroup / kChannels, kPieces = kChannels / 16;

    int rank, group, groups_at_once;  // in the group; which of them; how many there are

    EP_DEVICE static CastLane of_warp() {
        return {Warp::rank() % kLanes, Warp::rank() / kLanes, Warp::size() / kLanes};
    }
    EP_DEVICE int channel(int of_group) const { return of_group * kScaleGroup + rank * kChannels; }
};

// Casts one row to float8_e4m3fn with a scale per kScaleGroup channels, into each of its targets.
template <Element kType>
EP_DEVICE void cast_fan_out(const Targets &targets, const char *from, int hidden,
                            bool power_of_two) {
    constexpr int kPieces = CastLane::kPieces;
    const CastLane lane = CastLane::of_warp();
    const int group_end = hidden / kScaleGroup;
    for (int first = 0; first < group_end; first += kGroupsInFlight * lane.groups_at_once) {
        Channels<kType, kPieces> channels[kGroupsInFlight];
        EP_UNROLL
        for (int i = 0; i < kGroupsInFlight; ++i) {
            const int group = first + i * lane.groups_at_once + lane.group;
            channels[i] =
                Channels<kType, kPieces>::of(from, lane.channel(group), group < group_end);
        }
        Cast<kPieces> casts[kGroupsInFlight];
        EP_UNROLL
        for (int i = 0; i < kGroupsInFlight; ++i)
            casts[i] = cast_channels<CastLane::kLanes>(channels[i], power_of_two);
        for (int target = 0; target < targets.count; ++target) {
            const Target at = targets.to[target];
            if (at.row == nullptr) continue;
            EP_UNROLL
            for (int i = 0; i < kGroupsInFlight; ++i) {
                const int group = first + i * lane.groups_at_once + lane.group;
                if (group >= group_end) continue;
                EP_UNROLL
                for (int piece = 0; piece < kPieces; ++piece)
                    pass_store(reinterpret_cast<Vector *>(at.row + lane.channel(group)) + piece,
                               casts[i].pieces[piece]);
                if (lane.rank == 0) at.scales[group * at.scale_stride] = casts[i].scale;
            }
        }
    }
}

}  // namespace ep::EP_DEVICE_NAMESPACE
