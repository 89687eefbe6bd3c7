// What a dispatch message says besides its payload.
//
//   head     flag (Signal: epoch, number of entries), then one Entry per distinct expert of the
//            destination that the token chose, in the order of k
//   payload  the row, of the round's element type
//   scales   FP8 only: one float per kScaleGroup channels, right after the row
#pragma once

#include "wire/host_device.h"

#include <cstddef>
#include <cstdint>

namespace ep {

// Element types of rows. Bytes of an element: element_bytes().
enum class Element : int32_t { kBf16, kFp16, kFp32, kFp8 };

EP_HOST_DEVICE constexpr int element_bytes(Element element) {
    return element == Element::kFp32 ? 4 : element == Element::kFp8 ? 1 : 2;
}

constexpr int kScaleGroup = 128;  // channels that share one FP8 scale

struct alignas(16) Entry {
    int32_t local_expert;
    int32_t position;  // among the tokens of its source for this expert
    float weight;      // of all of the token's choices of this expert together
    int32_t reserved;
};

constexpr size_t kHeadFlagBytes = 16;  // the flag, and room that keeps entries aligned

}  // namespace ep
