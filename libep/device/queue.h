// Where a launch goes, and how: plain types that the host hands to the kernels' launchers.
#pragma once

#include <atomic>
#include <cstdint>

namespace ep {

// Whether rows that are written will be read while they are still in a cache. A hint: results are
// the same.
enum class Caching { kKeep, kBypass };

// What a lane moves at once.
struct alignas(16) Vector {
    uint64_t words[2];
};

// Host threads that run the blocks of a CPU launch.
class Workers {
  public:
    using Block = void (*)(void *context, int block_index);

    virtual ~Workers() = default;
    virtual int count() const = 0;

    // Calls block(context, i) once for each i in [0, count()), on as many threads; returns when all
    // are done.
    virtual void run(Block block, void *context) = 0;
};

// Whether devices that fence the phases (kernels/fence.h) do so. For tests, which turn it off to
// see whether a device needs it.
inline std::atomic<bool> phase_fence{true};

struct Queue {
    void *stream = nullptr;      // native stream of a GPU
    int block_count = 1;         // multiprocessors of the GPU that a launch may fill
    Workers *workers = nullptr;  // of the CPU

    // A launch may begin to occupy multiprocessors before the one before it has ended. Not where
    // that one waits for another rank's launch, which needs them.
    bool starts_early = false;

    bool may_move_in_bulk = true;  // rows by bulk copies, where the device has them

    // SEND and RECEIVE, where the device needs it (kernels/fence.h). All ranks of a group or none:
    // none where streams of two may share a hardware queue, as there the launch that waits for a
    // rank could hold that rank up.
    bool fences_phases = true;

    // Load the kernels onto the device instead of launching them. What is loaded at its first
    // launch may wait for kernels that wait for this one.
    bool load_only = false;
};

}  // namespace ep
