// The way to peers whose windows are not mapped here. What a launch of SEND left for them in the
// outbox goes to them by an engine: on the CPU in parcels, packed and placed in the window; on GPUs
// as whole boxes, in the order of the stream.
#pragma once

#include "backend/backend.h"
#include "transport/device_engine.h"
#include "transport/engine.h"

#include <memory>
#include <string>
#include <vector>

namespace ep {

class Collective {
  public:
    Collective() = default;
    Collective(const Collective &) = delete;
    Collective &operator=(const Collective &) = delete;
    ~Collective() {
        if (device_engine_ != nullptr) device_engine_->close(channel_);
    }

    // `far` [rank]: those peers. One of the engines, which outlive this. `takes_part`: also if
    // there are none, as the engine wants all ranks.
    mep_status_t create(Device *device, Engine *engine, DeviceEngine *device_engine,
                        const Layout &layout, const std::vector<bool> &far, bool takes_part);

    bool serves_any() const { return !far_.empty(); }

    // What rounds know of them; see Round.
    const Far &far() const { return kernel_far_; }

    // Carries one kind of cargo, of so many bytes behind a Signal. Every rank of the group carries
    // the same in the same order. Peers that fail are masked in round.active. With `stays_in_inbox`
    // the next launch on the stream finds it there, if `inbox` is its round's; otherwise it is in
    // the window, where any later launch does.
    mep_status_t carry(const Round &round, Cargo cargo, size_t body_bytes, const Queue &queue,
                       const Deadline &deadline, bool stays_in_inbox);
    char *inbox() const { return inbox_.get(); }

    // Why a graph cannot capture what is carried; "" if it can.
    const char *no_capture_reason() const {
        return device_engine_ == nullptr ? "" : device_engine_->no_capture_reason();
    }

    // Who has failed since this was asked last, in words; "" if nobody has, or if masks tell.
    std::string take_failure() {
        return device_engine_ == nullptr ? std::string() : device_engine_->take_failure();
    }

  private:
    mep_status_t carry_parcels(const Round &round, Cargo cargo, size_t body_bytes,
                               const Queue &queue, const Deadline &deadline);
    mep_status_t carry_boxes(const Round &round, Cargo cargo, const Queue &queue,
                             const Deadline &deadline);
    std::vector<bool> partners(const Round &round) const;
    mep_status_t pack(ParcelArgs args, const Queue &queue);
    mep_status_t place(ParcelArgs args, const Queue &queue);

    Device *device_ = nullptr;
    Engine *engine_ = nullptr;
    DeviceEngine *device_engine_ = nullptr;
    void *channel_ = nullptr;      // of the device engine
    std::vector<bool> far_;        // empty: none
    std::vector<int32_t> box_of_;  // see Far
    Far kernel_far_{};
    DeviceMemory box_of_on_device_{nullptr, nullptr};
    std::shared_ptr<char> outbox_, inbox_;
    std::vector<Parcel> sent_, received_;  // [rank]
};

}  // namespace ep
