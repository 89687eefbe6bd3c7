// One rank's membership: who it is, what it runs on, and how it and its peers came together last.
#pragma once

#include "mooncake_ep.h"

#include "backend/backend.h"
#include "core/formation.h"
#include "transport/rdma.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace ep {

class Buffer;

class Group {
  public:
    // `config` as the caller gave it, already read. Collective.
    static mep_status_t create(const mep_group_config_t &config, std::shared_ptr<Group> *group);

    // Comes together anew, and every buffer with it, or changes nothing. Collective among the ranks
    // that `config` names; see mep_group_update.
    mep_status_t update(const mep_group_config_t &config);

    int rank() const { return formation_->rank(); }
    int rank_count() const { return formation_->rank_count(); }
    int64_t timeout_us() const { return timeout_us_; }
    const Backend &backend() const { return *backend_; }
    int device_id() const { return device_id_; }
    Device *device() const { return device_.get(); }
    const TransportChoice &transport(int peer) const { return formation_->transport(peer); }
    Formation &formation() const { return *formation_; }

    // 0: the default. Also of the buffers that are made from it. From any thread.
    mep_status_t set_timeout(int64_t timeout_us);

    // What this machine has for RDMA, by which no pair of ranks goes yet.
    static const RdmaProbe &rdma() { return machine_rdma(); }

    mep_status_t all_gather(const void *send, void *receive, size_t bytes);

    // The buffers that exist, in the order of their creation, tell so themselves.
    void add(Buffer *buffer);
    void remove(Buffer *buffer);

    // True the first time.
    bool has_news_of_masks() { return !std::exchange(told_of_masks_, true); }

    // After leave() every collective call fails.
    void leave();
    bool left() const { return left_; }

  private:
    Group() = default;

    std::atomic<int64_t> timeout_us_{0};
    int device_id_ = 0;
    bool left_ = false, told_of_masks_ = false;
    const Backend *backend_ = nullptr;
    std::shared_ptr<Device> device_;
    std::mutex mutex_;  // of what another thread than the caller's may use: set_timeout() does
    std::unique_ptr<Formation> formation_;
    std::vector<Buffer *> buffers_;
};

}  // namespace ep
