// A 64-bit word that says which round it belongs to, so that it is never cleared: a stale round's
// value is simply not the one that a reader waits for.
#pragma once

#include "wire/host_device.h"

#include <cstdint>

namespace ep {

// 40 bits of epoch, so that none comes again while a process lives (a round each microsecond: 12
// days; and a word is misread only if it was left alone for exactly that long), and 24 bits of
// value: the largest is a count of tokens, at most MEP_TOKEN_COUNT_MAX.
struct Signal {
    static constexpr int kValueBits = 24;

    EP_HOST_DEVICE static uint64_t pack(uint64_t epoch, uint32_t value) {
        return epoch << kValueBits | value;
    }
    EP_HOST_DEVICE static bool is_of(uint64_t signal, uint64_t epoch) {
        return signal >> kValueBits == (epoch << kValueBits) >> kValueBits;
    }
    // Of a later round: half of all epochs are later than one. A word that was never stored is of
    // none.
    EP_HOST_DEVICE static bool is_after(uint64_t signal, uint64_t epoch) {
        const uint64_t ahead = ((signal >> kValueBits) - epoch) << kValueBits >> kValueBits;
        return signal != 0 && ahead != 0 && ahead < uint64_t{1} << (63 - kValueBits);
    }
    EP_HOST_DEVICE static int value(uint64_t signal) {
        return static_cast<int>(signal & ((uint64_t{1} << kValueBits) - 1));
    }
};

}  // namespace ep
