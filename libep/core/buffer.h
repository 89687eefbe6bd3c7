// A buffer: windows of one shape, and the rounds that go through them. A handle: the routing that
// one dispatch leaves for its combines.
#pragma once

#include "mooncake_ep.h"

#include "backend/backend.h"
#include "core/buffer_shape.h"
#include "core/group.h"
#include "core/rounds.h"
#include "core/wiring.h"

#include <memory>
#include <vector>

namespace ep {

class Buffer {
  public:
    static mep_status_t create(std::shared_ptr<Group> group, const mep_buffer_config_t &config,
                               mep_status_t config_status, std::unique_ptr<Buffer> *buffer);
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { group_->remove(this); }

    Group &group() const { return *group_; }
    Device *device() const { return group_->device(); }
    const BufferShape &shape() const { return shape_; }
    int thread_count() const { return workers_->count(); }
    int sm_count() const;  // multiprocessors that a launch may fill; 0 on the CPU
    mep_status_t counters(mep_buffer_counters_t *counters) const;

    // Of one peer, and of the local experts [L]. These, and events(), do not wait for the device.
    mep_status_t peer_counters(int peer, mep_peer_counters_t *counters) const;
    mep_status_t expert_rows(std::vector<uint64_t> *rows) const;

    // The masked peers that are noted after the first `*cursor`, at most `count`; advances it.
    mep_status_t events(uint64_t *cursor, int count, std::vector<mep_event_t> *events) const;

    // own_active(), on the host.
    mep_status_t read_mask(std::vector<int32_t> *active) const;
    mep_status_t write_mask(const std::vector<int32_t> &active);

    // Of rounds that bring no timeout, also those that are in graphs.
    mep_status_t set_timeout(int64_t timeout_us);

    // What it takes over when its group is updated.
    struct Epochs {
        uint64_t dispatch, combine;
    };
    struct Renewal {
        std::unique_ptr<Wiring> wiring;
        Epochs epochs;
    };
    // Collective in `next`, which may have ranks that make the buffer meanwhile; changes nothing.
    mep_status_t prepare(Formation *next, Renewal *renewal);
    // Local: switches over.
    mep_status_t adopt(const Formation &next, Renewal renewal);
    // How often it has been adopted; what a handle remembers of an earlier time is void.
    uint64_t generation() const { return generation_; }

    // What every round of this buffer knows; `handle_memory` holds the routing.
    Round round(void *handle_memory, int32_t *active, int64_t timeout_us) const;
    Queue queue(void *stream) const;
    int32_t *tally() const { return static_cast<int32_t *>(tally_.get()); }

    // The way to far peers, of whom there may be none.
    Collective &collective() { return wiring_->collective(); }
    bool has_far_peers() const { return wiring_->collective().serves_any(); }

    // The mask for calls that bring none.
    int32_t *own_active() const { return static_cast<int32_t *>(active_.get()); }

    // The ranks that were masked in own_active() since the last call of this function.
    mep_status_t find_new_failures(std::vector<int> *ranks);

    Rounds &dispatches() { return pending_->dispatches; }
    Rounds &combines() { return pending_->combines; }
    const std::shared_ptr<Pending> &pending() const { return pending_; }

  private:
    Buffer()
        : state_(nullptr, nullptr),
          active_(nullptr, nullptr),
          members_(nullptr, nullptr),
          paces_(nullptr, nullptr),
          counts_(nullptr, nullptr),
          tally_(nullptr, nullptr),
          windows_on_device_(nullptr, nullptr) {}
    PeerCounts *peer_counts() const { return static_cast<PeerCounts *>(counts_.get()); }
    uint64_t *expert_counts() const {
        return reinterpret_cast<uint64_t *>(peer_counts() + group_->rank_count());
    }
    mep_status_t allocate();
    // What all say about the buffer, and must say alike. Collective.
    mep_status_t compare_proposals(Formation *formation, bool is_new, Epochs mine, bool *lines,
                                   Epochs *agreed);
    mep_status_t may_be_renewed(const Formation &next) const;
    mep_status_t read_epochs(Epochs *epochs) const;
    mep_status_t write_members(const Formation &formation, const Epochs &epochs);

    std::shared_ptr<Group> group_;
    BufferShape shape_{};
    std::unique_ptr<Wiring> wiring_;
    uint64_t generation_ = 0;
    std::shared_ptr<Pending> pending_ = std::make_shared<Pending>();
    std::unique_ptr<Workers> workers_;
    bool may_move_in_bulk_ = true;
    // counts_: a PeerCounts for each rank, then the rows of each local expert.
    DeviceMemory state_, active_, members_, paces_, counts_, tally_, windows_on_device_;
    std::vector<int32_t> active_seen_;  // own_active() as of the last call
};

class Handle {
  public:
    static mep_status_t create(Buffer *buffer, std::unique_ptr<Handle> *handle);

    Handle(const Handle &) = delete;
    Handle &operator=(const Handle &) = delete;
    ~Handle();

    Buffer *buffer() const { return buffer_; }
    void *memory() const { return memory_.get(); }

    enum class State { kEmpty, kInFlight, kReceived };
    State dispatch = State::kEmpty;
    bool combine_in_flight = false;
    uint64_t dispatch_round = 0, combine_round = 0;  // in Rounds
    uint64_t generation = 0;                         // of the buffer, at the dispatch

    // Of the dispatch.
    int token_count = 0, topk = 0;

  private:
    explicit Handle(Buffer *buffer)
        : buffer_(buffer), pending_(buffer->pending()), memory_(nullptr, nullptr) {}
    Buffer *buffer_;
    std::shared_ptr<Pending> pending_;
    DeviceMemory memory_;
};

}  // namespace ep

struct mep_buffer {
    std::unique_ptr<ep::Buffer> buffer;
};

struct mep_handle {
    std::unique_ptr<ep::Handle> handle;
};

struct mep_group {
    std::shared_ptr<ep::Group> group;
};
