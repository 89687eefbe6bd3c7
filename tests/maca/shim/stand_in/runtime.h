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
    int device_count = 0;  // of the host; MACA_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES hides some
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

// By which a GPU of the host can be named in those variables, as well as by its number, which is
// its PCI bus here. The spelling is made up.
std::string uuid_of(int gpu);

// How much of mcMalloc was not freed yet.
std::atomic<int> &allocation_count();

// While it is true each mcFree waits, for kFreeSeconds at most.
std::atomic<bool> &frees_wait();

constexpr int kBlocks = 104, kTickNs = 10, kFreeSeconds = 5;

}  // namespace mc_shim
