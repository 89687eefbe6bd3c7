// One rank's membership: how it reaches its peers, and the facts that all have agreed on.
#pragma once

#include "mooncake_ep.h"

#include "backend/backend.h"
#include "base/deadline.h"
#include "core/bootstrap.h"
#include "topology/graph.h"
#include "transport/device_engine.h"
#include "transport/engine.h"
#include "transport/facts.h"
#include "transport/rdma.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace ep {

class Buffer;

class Group {
  public:
    // `config` as the caller gave it, already read. Collective.
    static mep_status_t create(const mep_group_config_t &config, std::shared_ptr<Group> *group);

    int rank() const { return membership_.rank; }
    int rank_count() const { return membership_.rank_count; }
    int64_t timeout_us() const { return timeout_us_; }

    // 0: the default. Also of the buffers that are made from it. From any thread.
    mep_status_t set_timeout(int64_t timeout_us);
    const Backend &backend() const { return *backend_; }
    int device_id() const { return device_id_; }
    Device *device() const { return device_.get(); }
    const TransportChoice &transport(int peer) const { return transports_[peer]; }

    // Is the peer's memory reached?
    bool is_near(int peer) const {
        return peer == rank() || transports_[peer].kind != MEP_TRANSPORT_COLLECTIVE;
    }

    // Carries what goes to peers that are not near, of host memory or of a GPU's; nullptr if all of
    // the group's pairs are, and for the other kind of memory.
    Engine *engine() const { return engine_.get(); }
    DeviceEngine *device_engine() const { return device_engine_.get(); }

    // Does it have to be called by every rank, also by one whose peers are all near? The caller's
    // collectives may want that.
    bool engine_wants_all() const { return engine_wants_all_; }

    // May there be buffers? Else who cannot reach whom; the same on every rank.
    mep_status_t all_reachable() const;

    // How many ranks share this rank's host.
    int local_rank_count() const { return local_rank_count_; }

    // How many ranks of this process use this rank's device: their launches have to fit side by
    // side.
    int device_sharers() const { return device_sharers_; }

    // Queue::fences_phases, the same on every rank: one that fences waits until all others tell.
    bool fences_phases() const { return fences_phases_; }

    // Do lines arrive whole at every peer? This rank's view.
    bool delivers_lines() const { return delivers_lines_; }

    // What this machine has for RDMA, by which no pair of ranks goes yet.
    static const RdmaProbe &rdma() { return machine_rdma(); }

    mep_status_t all_gather(const void *send, void *receive, size_t bytes);

    // The same answer on every rank: `mine` if it failed, else the first failure of another rank,
    // worded with that rank. Collective: every rank comes here, whatever its own status is.
    mep_status_t agree(mep_status_t mine);

    // The buffers that exist, in the order of their creation, tell so themselves.
    void add(Buffer *buffer);
    void remove(Buffer *buffer);

    // After leave() every collective call fails.
    void leave();
    bool left() const { return left_; }

  private:
    Group() = default;
    mep_status_t meet(const mep_group_config_t &config, const Deadline &deadline);
    mep_status_t gather_facts(const mep_group_config_t &config, GroupFacts *facts,
                              const Deadline &deadline);
    mep_status_t access_to(const std::vector<RankFacts> &ranks, const Topology &machine,
                           std::vector<Access> *row) const;
    mep_status_t try_transports(GroupFacts *facts);
    mep_status_t look_for_nccl(GroupFacts *facts);
    mep_status_t create_engine(const mep_group_config_t &config, const GroupFacts &facts,
                               const Deadline &deadline);
    void adopt(const GroupFacts &facts);
    // Whether P2pGate says who may reach whom.
    bool gated() const { return backend_->id == MEP_BACKEND_MACA; }
    // Gathers rank_count() bytes of each rank: [rank][peer].
    template <class Byte>
    mep_status_t gather_rows(const std::vector<Byte> &row, std::vector<Byte> *matrix);

    Membership membership_{};
    std::atomic<int64_t> timeout_us_{0};
    int device_id_ = 0;
    int local_rank_count_ = 1;
    bool delivers_lines_ = true;
    int device_sharers_ = 1;
    bool fences_phases_ = true;
    bool left_ = false;
    const Backend *backend_ = nullptr;
    std::shared_ptr<Device> device_;
    std::unique_ptr<Bootstrap> bootstrap_;
    std::unique_ptr<Engine> engine_;
    std::unique_ptr<DeviceEngine> device_engine_;
    bool engine_wants_all_ = false;
    std::mutex buffers_mutex_;
    std::vector<Buffer *> buffers_;
    std::vector<TransportChoice> transports_;
    std::string unreachable_;  // a first pair, and why; "" if there is none
};

}  // namespace ep
