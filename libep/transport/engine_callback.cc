#include "base/status.h"
#include "transport/engine.h"

#include <cstdint>
#include <cstring>

namespace ep {
namespace {

class CallbackEngine : public Engine {
  public:
    CallbackEngine(int rank, const std::vector<bool> &present, mep_all_to_all_callback_t callback,
                   void *context)
        : rank_(rank),
          rank_count_(static_cast<int>(present.size())),
          present_(present),
          callback_(callback),
          context_(context) {}

    // First how many bytes, as both sides of a pair have to know.
    mep_status_t exchange(const std::vector<Parcel> &send, size_t bytes_max, const Deadline &,
                          std::vector<bool> *with, std::vector<Parcel> *receive) override {
        if (failed_) return report();
        std::vector<const Parcel *> parcels(rank_count_), lengths(rank_count_);
        std::vector<Parcel> sizes(rank_count_);
        for (int peer = 0; peer < rank_count_; ++peer) {
            if (!is_peer(peer)) continue;
            if ((*with)[peer]) parcels[peer] = &send[peer];
            const uint64_t bytes = (*with)[peer] ? send[peer].size() : 0;
            sizes[peer].resize(sizeof bytes);
            std::memcpy(sizes[peer].data(), &bytes, sizeof bytes);
            lengths[peer] = &sizes[peer];
        }
        *receive = sizes;
        EP_TRY(call(lengths, receive));
        EP_TRY(make_room(bytes_max, receive));
        EP_TRY(call(parcels, receive));
        for (int peer = 0; peer < rank_count_; ++peer) {
            if (!is_peer(peer)) continue;
            if ((*receive)[peer].empty()) (*with)[peer] = false;  // it has left this rank out
            if (!(*with)[peer]) (*receive)[peer].clear();
        }
        return MEP_OK;
    }

  private:
    bool is_peer(int rank) const { return rank != rank_ && present_[rank]; }

    // From each peer as much as it has said. This rank has to take it also from one that it wants
    // nothing of, or the call would not match.
    mep_status_t make_room(size_t bytes_max, std::vector<Parcel> *receive) {
        for (int peer = 0; peer < rank_count_; ++peer) {
            if (!is_peer(peer)) continue;
            uint64_t bytes = 0;
            std::memcpy(&bytes, (*receive)[peer].data(), sizeof bytes);
            failed_ = bytes > bytes_max;
            if (failed_)
                return fail(
                    MEP_MISMATCH,
                    "all_to_all: rank %d has %llu bytes for rank %d, more than the %zu that "
                    "there can be",
                    peer, static_cast<unsigned long long>(bytes), rank_, bytes_max);
            (*receive)[peer].resize(bytes);
        }
        return MEP_OK;
    }
    mep_status_t call(const std::vector<const Parcel *> &send, std::vector<Parcel> *receive) {
        std::vector<const void *> from(rank_count_);
        std::vector<void *> to(rank_count_);
        std::vector<size_t> from_bytes(rank_count_), to_bytes(rank_count_);
        for (int peer = 0; peer < rank_count_; ++peer) {
            if (send[peer] != nullptr) {
                from[peer] = send[peer]->data();
                from_bytes[peer] = send[peer]->size();
            }
            to[peer] = (*receive)[peer].data();
            to_bytes[peer] = (*receive)[peer].size();
        }
        result_ = callback_(context_, from.data(), from_bytes.data(), to.data(), to_bytes.data());
        failed_ = result_ != 0;
        return failed_ ? report() : MEP_OK;
    }
    mep_status_t report() const {
        return fail(MEP_SYSTEM_ERROR, "the caller's all_to_all has failed (it returned %d)",
                    result_);
    }

    const int rank_, rank_count_;
    const std::vector<bool> present_;
    const mep_all_to_all_callback_t callback_;
    void *const context_;
    bool failed_ = false;
    int32_t result_ = 0;
};

}  // namespace

std::unique_ptr<Engine> engine_by_callback(int rank, const std::vector<bool> &present,
                                           mep_all_to_all_callback_t callback, void *context) {
    return std::make_unique<CallbackEngine>(rank, present, callback, context);
}

}  // namespace ep
