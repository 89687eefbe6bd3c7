// Who carries boxes of device memory between ranks that do not reach each other's, in the order of
// a stream. All ranks of a group ask for the same exchanges in the same order.
#pragma once

#include "backend/backend.h"
#include "base/deadline.h"
#include "transport/engine.h"
#include "transport/nccl.h"

#include <memory>
#include <string>
#include <vector>

namespace ep {

// To a peer and from it, as many bytes each; 0: nothing.
struct Exchange {
    const char *send;
    char *receive;
    size_t bytes;
};

// What an exchange is for.
struct Trip {
    const Round &round;
    Cargo cargo;
    Deadline deadline;  // where the host waits; others ask the round, which may be replayed
};

class DeviceEngine {
  public:
    virtual ~DeviceEngine() = default;

    // For the exchanges of a buffer, which are in an order; those of two buffers need not be.
    virtual mep_status_t open(void **channel) {
        *channel = nullptr;
        return MEP_OK;
    }
    virtual void close(void *) {}

    // Zeroed memory of the device for boxes, which is gone before this.
    virtual mep_status_t allocate(size_t bytes, std::shared_ptr<char> *memory) = 0;

    // Queues exchanges [rank] behind what is on the stream, so that what is queued next finds what
    // came. Peers that fail, or miss the deadline, are masked in round.active, if the engine knows
    // deadlines; they are not heard any more.
    virtual mep_status_t exchange(void *channel, const Trip &trip,
                                  const std::vector<Exchange> &exchanges, const Queue &queue) = 0;

    // Why a graph cannot capture its exchanges; "" if it can.
    virtual const char *no_capture_reason() const = 0;

    // Who failed since this was asked last, and why, in words; "" if nobody did.
    virtual std::string take_failure() = 0;
};

// Memory of a device for boxes, as engines allocate it that need nothing else.
mep_status_t allocate_boxes(Device *device, size_t bytes, std::shared_ptr<char> *memory);

// Over an engine of host memory: the host waits for the stream, and copies.
std::unique_ptr<DeviceEngine> device_engine_by_host(Device *device, std::unique_ptr<Engine> engine);

// The caller's callback, which queues on the stream. Deadlines are its own affair, and if it
// fails, all that follows fails.
std::unique_ptr<DeviceEngine> device_engine_by_callback(
    Device *device, int rank_count, mep_all_to_all_on_stream_callback_t callback, void *context);

// By NCCL, or by MCCL, which outlives it, in a communicator of its own. Collective; `present`
// [rank]: who is there, `far` [rank]: with whom this rank will exchange. No two ranks may share a
// GPU.
mep_status_t device_engine_by_nccl(const std::shared_ptr<Device> &device, const Nccl &nccl,
                                   int rank, const std::vector<bool> &present,
                                   const std::vector<bool> &far, const AllGather &all_gather,
                                   const Deadline &deadline, std::unique_ptr<DeviceEngine> *engine);

}  // namespace ep
