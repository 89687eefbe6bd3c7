// A shim for tests: not the MetaX SDK; names from public sources.
//
// What the host half of the MACA backend has asked of runtime.cc, which does nothing but take note:
// memory is the host's, and no kernel does anything, but for those of the clock.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace mc_shim {

struct Launch {
    std::string kernel;  // mangled
    unsigned blocks, threads;
};

struct Runtime {
    int device_count = 0;
    bool clock_goes = true;
    std::vector<Launch> launches;
    std::vector<unsigned> flags;  // of each mcExtMallocWithFlags
    int set_ticks = 0;            // how often the clock was set
    uint64_t tick = 0;            // as it was set last
    std::vector<int> turns_ms;    // that others take before measurements of the clock, in order
    bool opens = false;           // other processes' memory
    int closed = 0;               // mappings of it
};
Runtime &runtime();

// How much of mcMalloc was not freed yet.
std::atomic<int> &allocation_count();

// While it is true each mcFree waits, for kFreeSeconds at most.
std::atomic<bool> &frees_wait();

constexpr int kBlocks = 104, kTickNs = 10, kFreeSeconds = 5;

}  // namespace mc_shim
