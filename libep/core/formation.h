// What the ranks of a group settle when they come together: who is there, what reaches whom, and
// what carries the rest. A group has one, and takes a new one when it is updated.
#pragma once

#include "mooncake_ep.h"

#include "backend/backend.h"
#include "base/deadline.h"
#include "core/bootstrap.h"
#include "core/greeting.h"
#include "transport/device_engine.h"
#include "transport/engine.h"
#include "transport/facts.h"

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace ep {

class P2pGate;

class Formation {
  public:
    // What this rank has been through.
    struct History {
        uint64_t generation;   // of formations; 0: it is new
        int32_t buffer_count;  // that are to be made anew
    };

    // What this rank comes with. Without a device, for a reason, it comes to tell the others so.
    struct Start {
        const Backend &backend;
        std::shared_ptr<Device> device;
        Trouble trouble;
        int64_t timeout_us;
        History history;
    };

    // While this lives, all collective steps share one deadline, that of the call which takes them:
    // it ends in time however many they are and whatever is done between them.
    class Call {
      public:
        explicit Call(Formation *formation) : formation_(*formation) {
            formation_.call_ = Deadline(formation_.timeout_us_);
        }
        Call(const Call &) = delete;
        Call &operator=(const Call &) = delete;
        ~Call() { formation_.call_.reset(); }

      private:
        Formation &formation_;
    };

    // `config` as the caller gave it, already read. Collective, among the ranks that it names. The
    // deadline goes on for the steps that follow, until settle().
    static mep_status_t create(const mep_group_config_t &config, const Start &start,
                               std::unique_ptr<Formation> *formation);

    int rank() const { return rank_; }
    int rank_count() const { return static_cast<int>(present_.size()); }
    bool is_present(int rank) const { return present_[rank]; }
    const TransportChoice &transport(int peer) const { return transports_[peer]; }

    // Is the peer's memory reached?
    bool is_near(int peer) const {
        return peer == rank_ || (present_[peer] && is_by_memory(transports_[peer]));
    }
    // Does an engine carry what goes to it?
    bool is_far(int peer) const { return transports_[peer].kind == MEP_TRANSPORT_COLLECTIVE; }

    // Carries what goes to peers that are far, of host memory or of a GPU's; nullptr if none of the
    // group's pairs are, and for the other kind of memory.
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

    // The next History's; above those of all that came together.
    uint64_t generation() const { return generation_; }

    // After this every collective call fails.
    void leave() { bootstrap_.reset(); }

    // Of calls from now on.
    void set_timeout(int64_t timeout_us) { timeout_us_ = timeout_us; }

    // The call that has created this ends.
    void settle(int64_t timeout_us) {
        set_timeout(timeout_us);
        call_.reset();
    }

    Deadline deadline() const { return call_.has_value() ? *call_ : Deadline(timeout_us_); }

    // `receive` [rank]: zeros of ranks that are not there. If it fails, LateFrees begin.
    mep_status_t all_gather(const void *send, void *receive, size_t bytes);

    // The same answer on every rank: `mine` if it failed, else the first failure of another rank,
    // worded with that rank. Collective: every rank comes here, whatever its own status is.
    mep_status_t agree(mep_status_t mine);

  private:
    Formation() = default;
    mep_status_t read_present(const mep_group_config_t &config);
    mep_status_t meet(const mep_group_config_t &config);
    mep_status_t describe(const mep_group_config_t &config, RankFacts *facts, P2pGate *gate) const;
    mep_status_t gather_facts(const mep_group_config_t &config, const Start &start,
                              GroupFacts *facts);
    mep_status_t compare(const Greeting &mine, int peer, const Greeting &theirs) const;
    void find_access(const std::vector<RankFacts> &ranks, const P2pGate &gate,
                     std::vector<Access> *row) const;
    mep_status_t try_transports(GroupFacts *facts);
    mep_status_t look_for_nccl(GroupFacts *facts);
    mep_status_t create_engine(const mep_group_config_t &config, const GroupFacts &facts);
    void adopt(const GroupFacts &facts);
    void warn_of_threads(int first_sharer) const;
    // Whether P2pGate says who may reach whom.
    bool gated() const { return backend_->id == MEP_BACKEND_MACA; }
    mep_status_t gather(const void *send, void *receive, size_t bytes);
    // Gathers rank_count() bytes of each rank: [rank][peer].
    template <class Byte>
    mep_status_t gather_rows(const std::vector<Byte> &row, std::vector<Byte> *matrix);

    int rank_ = 0;
    std::vector<bool> present_;  // [rank]
    std::vector<int> members_;   // the ranks that are, in order
    std::atomic<int64_t> timeout_us_{0};
    std::optional<Deadline> call_;
    const Backend *backend_ = nullptr;
    std::shared_ptr<Device> device_;
    std::unique_ptr<Bootstrap> bootstrap_;  // among members_, by their place
    std::unique_ptr<Engine> engine_;
    std::unique_ptr<DeviceEngine> device_engine_;
    bool engine_wants_all_ = false;
    uint64_t generation_ = 0;
    int local_rank_count_ = 1;
    int device_sharers_ = 1;
    bool delivers_lines_ = true;
    bool fences_phases_ = true;
    std::vector<TransportChoice> transports_;
    std::string unreachable_;  // a first pair, and why; "" if there is none
};

}  // namespace ep
