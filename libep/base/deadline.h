// A point in time that a wait may not pass. Every host wait in libep/ takes one.
#pragma once

#include <chrono>
#include <cstdint>

namespace ep {

constexpr int64_t kTimeoutDefaultUs = 100'000'000;
constexpr int64_t kTimeoutNever = -1;

// A timeout of more than thirty years is none; its nanoseconds might not fit 64 bits.
constexpr int64_t kTimeoutMaxUs = 1'000'000'000'000'000;
constexpr bool is_never(int64_t timeout_us) {
    return timeout_us < 0 || timeout_us > kTimeoutMaxUs;
}

class Deadline {
  public:
    using Clock = std::chrono::steady_clock;

    // `timeout_us` from now; kTimeoutNever: no deadline.
    explicit Deadline(int64_t timeout_us)
        : never_(is_never(timeout_us)),
          timeout_us_(timeout_us),
          end_(never_ ? Clock::time_point::max()
                      : Clock::now() + std::chrono::microseconds(timeout_us)) {}

    // This one, but no later than `timeout_us` from now.
    Deadline within(int64_t timeout_us) const {
        const Deadline other(timeout_us);
        return never_ || (!other.never_ && other.end_ < end_) ? other : *this;
    }

    // This one, but so much earlier.
    Deadline earlier_by(int64_t microseconds) const {
        Deadline other = *this;
        if (!never_) other.end_ -= std::chrono::microseconds(microseconds);
        return other;
    }

    bool passed() const { return !never_ && Clock::now() >= end_; }

    // For poll(2) and the like: [0, step_ms_max].
    int remaining_ms(int step_ms_max) const {
        if (never_) return step_ms_max;
        const auto left =
            std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count();
        return left < 0 ? 0 : left > step_ms_max ? step_ms_max : static_cast<int>(left) + 1;
    }

    bool never() const { return never_; }
    int64_t timeout_us() const { return timeout_us_; }
    Clock::time_point end() const { return end_; }  // only if !never()

  private:
    bool never_;
    int64_t timeout_us_;
    Clock::time_point end_;
};

class Stopwatch {
  public:
    uint64_t elapsed_ns() const {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(Deadline::Clock::now() - began_)
            .count();
    }

  private:
    const Deadline::Clock::time_point began_ = Deadline::Clock::now();
};

}  // namespace ep
