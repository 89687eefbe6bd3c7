// Casts against the definition of each type (support/values.h).
#include "kernels/cast.h"

#include "support/values.h"

#include <gtest/gtest.h>
#include <random>
#include <vector>

namespace ep::EP_DEVICE_NAMESPACE {
namespace {

using test::Format;
using test::kBf16Format;
using test::kFp16Format;
using test::kFp8Format;

// The code of `value`, alone and as each element of a vector, which must agree.
template <class To>
uint32_t encode(float value) {
    const uint32_t code = To::template encode<uint32_t, float>(value);
    Pack<kPackMin> values;
    for (int i = 0; i < kPackMin; ++i)
        values[i] = value;
    typename To::Storage codes[kPackMin];
    narrow<To, kPackMin>(reinterpret_cast<char *>(codes), values);
    for (int i = 0; i < kPackMin; ++i)
        EXPECT_EQ(codes[i], code) << value;
    return code;
}

template <class From>
float decode(uint32_t code) {
    const auto value = From::template decode<float, uint32_t>(code);
    typename From::Storage codes[kPackMin];
    for (int i = 0; i < kPackMin; ++i)
        codes[i] = typename From::Storage(code);
    const Pack<kPackMin> values =
        widen<From, kPackMin>(fetch<From, kPackMin>(reinterpret_cast<const char *>(codes)));
    for (int i = 0; i < kPackMin; ++i)
        EXPECT_EQ(bit_cast<uint32_t>(float(values[i])), bit_cast<uint32_t>(value)) << code;
    return value;
}

float float_of(uint32_t bits) {
    return bit_cast<float>(bits);
}

struct Type {
    const char *name;
    const Format &format;
    uint32_t (*cast)(float value);
};
const Type kTypes[] = {{"bfloat16", kBf16Format, encode<Bf16>},
                       {"float16", kFp16Format, encode<Fp16>},
                       {"float8_e4m3fn", kFp8Format, encode<Fp8>}};

// Numbers of every size that a float has, and twice as many around what the type can say.
std::vector<float> random_floats(const Format &format, int count) {
    std::mt19937 random(1);
    std::vector<float> floats;
    std::uniform_real_distribution<float> exponent(-float(format.bias() + format.fraction_bits + 2),
                                                   float(format.bias() + 2));
    for (int i = 0; i < count; ++i) {
        const float any = float_of(random());
        if (any == any) floats.push_back(any);
        for (const float sign : {-1.0f, 1.0f})
            floats.push_back(sign * std::exp2(std::min(exponent(random), 127.9f)));
    }
    return floats;
}

TEST(Cast, ReadsEveryBfloat16AndFloat16) {
    for (uint32_t code = 0; code < 65536; ++code) {
        const double bf16 = kBf16Format.decode(code), fp16 = kFp16Format.decode(code);
        const float got_bf16 = decode<Bf16>(code), got_fp16 = decode<Fp16>(code);
        ASSERT_TRUE(std::isnan(bf16) ? std::isnan(got_bf16) : got_bf16 == bf16) << code;
        ASSERT_TRUE(std::isnan(fp16) ? std::isnan(got_fp16) : got_fp16 == fp16) << code;
        ASSERT_EQ(std::signbit(got_fp16), code >= 32768) << code;
    }
}

TEST(Cast, GivesEveryCodeBack) {
    for (const Type &type : kTypes)
        for (uint32_t code = 0; code < 2 * type.format.code_count(); ++code) {
            const double value = type.format.decode(code);
            if (std::isnan(value)) continue;
            ASSERT_EQ(type.cast(float(value)), code) << type.name;
        }
}

TEST(Cast, RoundsToTheNearest) {
    for (const Type &type : kTypes)
        for (const float value : random_floats(type.format, 20'000))
            ASSERT_EQ(type.cast(value), type.format.encode(value)) << value << " as " << type.name;
}

TEST(Cast, RoundsHalfwayCasesToEven) {
    for (const Type &type : kTypes)
        for (uint32_t code = 0; code < type.format.last_code(); ++code) {
            const double middle = (type.format.decode(code) + type.format.edge(code + 1)) / 2;
            const auto halfway = float(middle);
            if (halfway != middle || std::isinf(halfway)) continue;
            const uint32_t even = code + code % 2;
            ASSERT_EQ(type.cast(halfway), even) << halfway << " as " << type.name;
            ASSERT_EQ(type.cast(std::nextafter(halfway, 0.0f)), code) << type.name;
            const float above = std::nextafter(halfway, std::numeric_limits<float>::infinity());
            ASSERT_EQ(type.cast(above), code + 1) << type.name;
            ASSERT_EQ(type.cast(-halfway), even | type.format.code_count()) << type.name;
        }
}

// The one that NVIDIA's instructions make.
TEST(Cast, MakesOneNanOfAll) {
    for (const Type &type : kTypes)
        for (const uint32_t bits :
             {0x7fc00000u, 0x7f800001u, 0x7fffffffu, 0xffc00000u, 0xff800001u}) {
            const uint32_t code = type.cast(float_of(bits));
            EXPECT_TRUE(std::isnan(type.format.decode(code))) << std::hex << bits << type.name;
            EXPECT_EQ(code, type.format.code_count() - 1) << std::hex << bits << type.name;
        }
}

TEST(Cast, KeepsInfinityWhereTheTypeHasIt) {
    const float infinity = std::numeric_limits<float>::infinity();
    EXPECT_EQ(encode<Bf16>(infinity), 0x7f80u);
    EXPECT_EQ(encode<Bf16>(-infinity), 0xff80u);
    EXPECT_EQ(encode<Fp16>(infinity), 0x7c00u);
    EXPECT_EQ(encode<Fp16>(-infinity), 0xfc00u);
    EXPECT_EQ(encode<Fp16>(65519.0f), 0x7bffu);
    EXPECT_EQ(encode<Fp16>(65520.0f), 0x7c00u);
}

TEST(Cast, SaturatesToTheLargestFloat8) {
    for (const float value : {448.0f, 448.1f, 464.0f, 1e6f, std::numeric_limits<float>::max(),
                              std::numeric_limits<float>::infinity()}) {
        EXPECT_EQ(encode<Fp8>(value), 0x7eu) << value;
        EXPECT_EQ(encode<Fp8>(-value), 0xfeu) << value;
    }
}

TEST(Fp8Scale, LargestMagnitudeBecomesTheLargestFloat8) {
    for (const float amax : random_floats(kBf16Format, 2'000)) {
        if (!(amax >= 1e-4f) || std::isinf(amax) || amax > 1e36f) continue;
        const Fp8Scale scale = Fp8Scale::of(amax, false);
        ASSERT_EQ(scale.scale, amax / 448.0f);
        ASSERT_EQ(encode<Fp8>(amax * scale.inverse), 0x7eu) << amax;
    }
}

TEST(Fp8Scale, RoundsUpToAPowerOfTwo) {
    for (const float amax : random_floats(kBf16Format, 2'000)) {
        if (!(amax >= 0) || std::isinf(amax)) continue;
        const Fp8Scale scale = Fp8Scale::of(amax, true);
        const float exact = std::max(amax, 1e-4f) / 448.0f;
        int exponent;
        ASSERT_EQ(std::frexp(scale.scale, &exponent), 0.5f) << amax;
        ASSERT_GE(scale.scale, exact) << amax;
        ASSERT_LT(scale.scale / 2, exact) << amax;
        ASSERT_EQ(scale.scale * scale.inverse, 1.0f) << amax;
    }
    for (int power = -5; power < 100; ++power)  // already one: it stays
        ASSERT_EQ(Fp8Scale::of(std::ldexp(448.0f, power), true).scale, std::ldexp(1.0f, power));
}

TEST(Fp8Scale, OfInfinityKeepsSigns) {
    const Fp8Scale scale = Fp8Scale::of(std::numeric_limits<float>::infinity(), true);
    EXPECT_GT(scale.scale, 0);
    EXPECT_GE(scale.inverse, 0);
}

TEST(Fp8Scale, TinyMagnitudesHaveTheLeastScale) {
    for (const float amax : {0.0f, 1e-30f, 1e-5f, 1e-4f})
        EXPECT_EQ(Fp8Scale::of(amax, false).scale, 1e-4f / 448.0f);
}

}  // namespace
}  // namespace ep::EP_DEVICE_NAMESPACE
