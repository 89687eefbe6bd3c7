// Where a launch goes: plain types that the host hands to the kernels' launchers.
#pragma once

namespace ep {

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

struct Queue {
    void *stream = nullptr;      // native stream of a GPU
    int block_count = 1;         // of a launch over the whole GPU
    Workers *workers = nullptr;  // of the CPU
};

}  // namespace ep
