// What the management library is asked, with one that stands for it.
#include "backend/nvml.h"

#include <gtest/gtest.h>

namespace ep::test {
namespace {

DeviceUuid counting_from(int first) {
    DeviceUuid uuid;
    for (int i = 0; i < int{sizeof uuid.bytes}; ++i)
        uuid.bytes[i] = static_cast<char>(first + i);
    return uuid;
}

const DeviceUuid kFirst = counting_from(0), kSecond = counting_from(0xf0);
const DeviceUuid kThird = [] {
    DeviceUuid uuid;
    for (char &byte : uuid.bytes)
        byte = 0x11;
    return uuid;
}();

TEST(Nvml, WritesUuidsAsItsToolsDo) {
    EXPECT_EQ(nvidia_uuid_text(kFirst), "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f");
}

TEST(Nvml, KnowsAGpuByItsPciAddress) {
    const Nvml nvml(FAKE_NVML);
    EXPECT_EQ(nvml.uuid("0000:2a:00.0"), nvidia_uuid_text(kSecond));
    EXPECT_EQ(nvml.uuid("0000:2b:00.0"), "");
}

TEST(Nvml, KnowsWhichGpusNvlinkJoins) {
    const Nvml nvml(FAKE_NVML);
    EXPECT_TRUE(nvml.are_nvlinked(kFirst, kSecond));
    EXPECT_TRUE(nvml.are_nvlinked(kSecond, kFirst));
    EXPECT_FALSE(nvml.are_nvlinked(kFirst, kThird));
    EXPECT_FALSE(nvml.are_nvlinked(kFirst, counting_from(1))) << "there is no such GPU";
}

TEST(Nvml, KnowsNothingWithoutTheLibrary) {
    for (const char *library : {"libnvidia-ml-that-is-not-there.so.1", "libm.so.6"}) {
        const Nvml nvml(library);
        EXPECT_EQ(nvml.uuid("0000:18:00.0"), "");
        EXPECT_FALSE(nvml.are_nvlinked(kFirst, kSecond));
    }
}

}  // namespace
}  // namespace ep::test
