#include "base/status.h"
#include "transport/device_engine.h"
#include "transport/incident.h"

#include <algorithm>
#include <utility>

namespace ep {
namespace {

class HostedEngine : public DeviceEngine {
  public:
    HostedEngine(Device *device, std::unique_ptr<Engine> engine)
        : device_(device), engine_(std::move(engine)) {}

    mep_status_t allocate(size_t bytes, std::shared_ptr<char> *memory) override {
        return allocate_boxes(device_, bytes, memory);
    }
    mep_status_t exchange(void *, const Trip &trip, const std::vector<Exchange> &exchanges,
                          const Queue &queue) override {
        const Round &round = trip.round;
        EP_TRY(device_->wait(queue.stream));
        std::vector<int32_t> active(exchanges.size()), members(exchanges.size());
        EP_TRY(device_->peek(active.data(), round.active, sizeof active[0] * active.size()));
        EP_TRY(device_->peek(members.data(), round.members, sizeof members[0] * members.size()));
        std::vector<bool> asked(exchanges.size());
        size_t bytes_max = 0;
        sent_.resize(exchanges.size());
        received_.resize(exchanges.size());
        for (size_t peer = 0; peer < exchanges.size(); ++peer) {
            const Exchange &one = exchanges[peer];
            asked[peer] = one.bytes != 0 && active[peer] != 0 && members[peer] != 0;
            sent_[peer].resize(asked[peer] ? one.bytes : 0);
            bytes_max = std::max(bytes_max, one.bytes);
            if (asked[peer]) EP_TRY(device_->peek(sent_[peer].data(), one.send, one.bytes));
        }
        std::vector<bool> with = asked;
        const Stopwatch stopwatch;
        EP_TRY(engine_->exchange(sent_, bytes_max, trip.deadline, &with, &received_));
        for (size_t peer = 0; peer < exchanges.size(); ++peer)
            if (asked[peer])
                EP_TRY(take(trip, peer, exchanges[peer], with[peer], stopwatch.elapsed_ns()));
        return MEP_OK;
    }

    const char *no_capture_reason() const override {
        return "they go through host memory, which no graph can capture";
    }

    std::string take_failure() override {
        return failure_.empty() ? failure_
                                : std::exchange(failure_, {}) + " missed the deadline or went away";
    }

  private:
    mep_status_t take(const Trip &trip, size_t peer, const Exchange &one, bool came,
                      uint64_t waited_ns) {
        if (came && received_[peer].size() == one.bytes)
            return device_->write(one.receive, received_[peer].data(), one.bytes);
        failure_ += (failure_.empty() ? "rank " : ", rank ") + std::to_string(peer);
        return mask_lost(device_, trip.round, trip.cargo, static_cast<int>(peer), waited_ns);
    }

    Device *const device_;
    const std::unique_ptr<Engine> engine_;
    std::vector<Parcel> sent_, received_;  // [rank]
    std::string failure_;
};

}  // namespace

mep_status_t allocate_boxes(Device *device, size_t bytes, std::shared_ptr<char> *memory) {
    DeviceMemory allocated(nullptr, nullptr);
    EP_TRY(device->allocate(bytes, &allocated));
    const auto release = allocated.get_deleter();
    *memory = std::shared_ptr<char>(static_cast<char *>(allocated.release()), release);
    return MEP_OK;
}

std::unique_ptr<DeviceEngine> device_engine_by_host(Device *device,
                                                    std::unique_ptr<Engine> engine) {
    return std::make_unique<HostedEngine>(device, std::move(engine));
}

}  // namespace ep
