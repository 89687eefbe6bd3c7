// What a call of set-up that a peer has failed had of a device is freed by a thread of its own: the
// call's time may be over, and a driver that other processes keep busy frees when it gets to it.
#pragma once

#include <functional>
#include <vector>

namespace ep {

// Lives as long as such a call, on its thread.
class LateFrees {
  public:
    LateFrees();
    LateFrees(const LateFrees &) = delete;
    LateFrees &operator=(const LateFrees &) = delete;
    ~LateFrees();

    // A peer has failed the call of this thread, if there is one.
    static void begin();

    // Calls `free`: at once, or, where begin() was called, after the call.
    static void run(std::function<void()> free);

    // Is this thread one that does nothing else?
    static bool beside();

    // Waits for what is under way; false if nothing was.
    static bool finish();

  private:
    LateFrees *const outer_;
    bool begun_ = false;
    std::vector<std::function<void()>> frees_;
};

}  // namespace ep
