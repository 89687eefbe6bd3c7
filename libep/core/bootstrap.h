// How the ranks of a group find each other: one primitive, an all-gather of bytes with a deadline.
// Each maker below gives it over another medium.
#pragma once

#include "mooncake_ep.h"

#include "base/deadline.h"

#include <memory>

namespace ep {

class Bootstrap {
  public:
    // Leaves the group: the others' waits fail with MEP_BOOTSTRAP_FAILED, naming this rank.
    virtual ~Bootstrap() = default;

    // Gathers `bytes` from each rank into `receive` [rank_count][bytes], in rank order. Blocking.
    // When the first of the waiting ranks reaches its deadline, it fails with MEP_TIMEOUT on all of
    // them, naming the missing ranks. After a failure the bootstrap stays failed and further calls
    // fail at once; only MEP_INVALID_ARGUMENT (too many bytes) changes nothing. `receive` is
    // written on success.
    virtual mep_status_t all_gather(const void *send, void *receive, size_t bytes,
                                    const Deadline &deadline) = 0;
};

struct Membership {
    int rank;
    int rank_count;
};

// The caller's all-gather. The deadline is the callback's own affair.
mep_status_t bootstrap_from_callback(Membership membership, mep_all_gather_callback_t callback,
                                     void *context, std::unique_ptr<Bootstrap> *bootstrap);

// TCP to the process that made `id`; rank 0 must be in that process. Here and below, TCP waits
// until all ranks have joined. Rank 0 turns away wrong ranks, which are told why, and goes on
// waiting.
mep_status_t bootstrap_from_unique_id(Membership membership, const mep_unique_id_t &id,
                                      const Deadline &deadline,
                                      std::unique_ptr<Bootstrap> *bootstrap);

// TCP by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `membership` is zero or must agree with
// them; it is filled in.
mep_status_t bootstrap_from_environment(Membership *membership, const Deadline &deadline,
                                        std::unique_ptr<Bootstrap> *bootstrap);

// Threads of this process. Does not wait: the first all_gather finds out whether all have come.
// After a failure the ranks may leave and meet again in the same world.
mep_status_t bootstrap_from_world(Membership membership, mep_world_t *world,
                                  std::unique_ptr<Bootstrap> *bootstrap);

// One rank alone.
std::unique_ptr<Bootstrap> bootstrap_alone();

// What mep_unique_id_* and mep_world_* do.
mep_status_t unique_id_create(const char *address, mep_unique_id_t *id);
void unique_id_destroy(const mep_unique_id_t &id);
mep_status_t world_create(int rank_count, mep_world_t **world);
void world_destroy(mep_world_t *world);

}  // namespace ep
