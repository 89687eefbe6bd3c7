// Element types by definition, not by bit tricks: what the tests compare casts and rows with.
#pragma once

#include "kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

namespace ep::test {

// A binary float with this many bits of exponent and fraction.
struct Format {
    int exponent_bits, fraction_bits;
    bool has_infinity;

    int bias() const { return (1 << (exponent_bits - 1)) - 1; }

    // The value of a code, sign bit included.
    double decode(uint32_t code) const {
        const int exponent = int(code >> fraction_bits & ((1U << exponent_bits) - 1));
        const uint32_t fraction = code & ((1U << fraction_bits) - 1);
        const bool last = exponent == (1 << exponent_bits) - 1;
        const double sign = code >> (exponent_bits + fraction_bits) & 1 ? -1.0 : 1.0;
        if (has_infinity && last)
            return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                                 : std::numeric_limits<double>::quiet_NaN();
        if (last && fraction + 1 == 1U << fraction_bits)
            return std::numeric_limits<double>::quiet_NaN();
        const double significand =
            std::ldexp(double(fraction), -fraction_bits) + (exponent > 0 ? 1 : 0);
        return sign * std::ldexp(significand, std::max(exponent, 1) - bias());
    }

    uint32_t code_count() const { return 1U << (exponent_bits + fraction_bits); }  // of one sign

    // The largest code of no NaN, and the value that it has in rounding: infinity is the next
    // number after the largest finite one.
    uint32_t last_code() const {
        return has_infinity ? ((1U << exponent_bits) - 1) << fraction_bits : code_count() - 2;
    }
    double edge(uint32_t code) const {
        return has_infinity && code == last_code() ? std::ldexp(1.0, bias() + 1) : decode(code);
    }

    // The code nearest to a value that is no NaN, by search, ties to even; without infinity the
    // largest stands for all beyond it.
    uint32_t encode(double value) const {
        uint32_t low = 0, high = last_code();
        const double magnitude = std::abs(value);
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            (decode(middle) <= magnitude ? low : high) = middle;
        }
        const double below = magnitude - decode(low), above = edge(high) - magnitude;
        const bool up = above < below || (above == below && high % 2 == 0);
        return (up ? high : low) | (std::signbit(value) ? code_count() : 0);
    }
};

constexpr Format kBf16Format{8, 7, true};
constexpr Format kFp16Format{5, 10, true};
constexpr Format kFp8Format{4, 3, false};

inline const Format &format_of(Element type) {
    return type == Element::kBf16 ? kBf16Format : type == Element::kFp16 ? kFp16Format : kFp8Format;
}

inline float read_element(Element type, const char *row, int index) {
    uint32_t code = 0;
    std::memcpy(&code, row + size_t(index) * element_bytes(type), element_bytes(type));
    float value;
    std::memcpy(&value, &code, sizeof value);
    return type == Element::kFp32 ? value : float(format_of(type).decode(code));
}

inline void write_element(Element type, char *row, int index, float value) {
    uint32_t code;
    std::memcpy(&code, &value, sizeof code);
    if (type != Element::kFp32) code = format_of(type).encode(value);
    std::memcpy(row + size_t(index) * element_bytes(type), &code, element_bytes(type));
}

inline float rounded(Element type, float value) {
    char row[sizeof(float)];
    write_element(type, row, 0, value);
    return read_element(type, row, 0);
}

// Half the distance to the next number, relative to a number.
inline double unit_in_last_place(Element type) {
    return type == Element::kFp32 ? 0x1p-24 : std::ldexp(1.0, -1 - format_of(type).fraction_bits);
}

// The same value in (-4, 4) for the same key, another for any other.
inline float real_value(std::initializer_list<uint64_t> key) {
    uint64_t hash = 0x9e3779b97f4a7c15U;
    for (const uint64_t part : key) {
        hash = (hash ^ part) * 0xbf58476d1ce4e5b9U;
        hash ^= hash >> 29;
    }
    return float(int64_t(hash >> 40) - (1 << 23)) / (1 << 21);
}

// Is `scale` the one that mooncake_ep.h promises for these channels?
inline bool scale_is_right(const float (&group)[kScaleGroup], float scale, Quant quant) {
    float largest = 0;
    for (const float value : group)
        largest = std::max(largest, std::abs(value));
    const float exact = std::max(largest, 1e-4f) / 448.0f;
    if (quant == Quant::kFp8) return scale == exact;
    int exponent;
    return std::frexp(scale, &exponent) == 0.5f && scale >= exact && scale / 2 < exact;
}

// Is `value`, a float8_e4m3fn times `scale`, as near to `exact` as the type allows?
inline bool near_as_fp8(float value, float exact, float scale) {
    const float step = std::max(std::abs(exact) / 16, scale * 0x1p-10f);
    return std::abs(value - exact) <= step * (1 + 1e-5f);
}

}  // namespace ep::test
