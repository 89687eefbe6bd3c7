#include "core/group.h"

#include "base/log.h"
#include "base/status.h"

#include <cstdio>

namespace ep {
namespace {

// Plain bytes: it travels.
struct Greeting {
    int32_t version;  // of the library; ranks of one group run the same
    int32_t rank_count;
    int32_t backend;
    int32_t reserved;
    RankFacts facts;
};

struct Verdict {
    int32_t status;
    char message[252];
};

}  // namespace

mep_status_t Group::create(const mep_group_config_t &config, std::shared_ptr<Group> *group) {
    std::shared_ptr<Group> created(new Group);
    const int32_t backend = config.backend == 0 ? MEP_BACKEND_CPU : config.backend;
    created->backend_ = find_backend(backend);
    if (created->backend_ == nullptr)
        return fail(MEP_INVALID_ARGUMENT, "config.backend is %d; it must be one of MEP_BACKEND_*",
                    backend);
    EP_TRY(created->backend_->create_device(config.device_id, &created->device_));
    created->device_id_ = config.device_id;
    created->timeout_us_ = config.timeout_us == 0 ? kTimeoutDefaultUs : config.timeout_us;
    const Deadline deadline(created->timeout_us_);
    EP_TRY(created->meet(config, deadline));
    EP_TRY(created->gather_facts(deadline));
    log(MEP_LOG_INFO, "rank %d of %d joined on %s", created->rank(), created->rank_count(),
        created->backend_->name);
    *group = std::move(created);
    return MEP_OK;
}

mep_status_t Group::meet(const mep_group_config_t &config, const Deadline &deadline) {
    membership_ = {config.rank, config.rank_count};
    const bool by_environment = config.all_gather == nullptr && config.unique_id == nullptr &&
                                config.world == nullptr && config.rank_count != 1;
    if (by_environment) return bootstrap_from_environment(&membership_, deadline, &bootstrap_);
    if (config.rank_count < 1 || config.rank_count > MEP_RANK_COUNT_MAX)
        return fail(MEP_INVALID_ARGUMENT, "config.rank_count is %d; it must be in [1, %d]",
                    config.rank_count, MEP_RANK_COUNT_MAX);
    if (config.rank < 0 || config.rank >= config.rank_count)
        return fail(MEP_INVALID_ARGUMENT, "config.rank is %d; it must be in [0, %d)", config.rank,
                    config.rank_count);
    if (config.all_gather != nullptr)
        return bootstrap_from_callback(membership_, config.all_gather, config.all_gather_context,
                                       &bootstrap_);
    if (config.unique_id != nullptr)
        return bootstrap_from_unique_id(membership_, *config.unique_id, deadline, &bootstrap_);
    if (config.world != nullptr)
        return bootstrap_from_world(membership_, config.world, &bootstrap_);
    bootstrap_ = bootstrap_alone();
    return MEP_OK;
}

mep_status_t Group::gather_facts(const Deadline &deadline) {
    Greeting mine{mep_version(), rank_count(), backend_->id, 0, {}};
    EP_TRY(local_facts(*device_, backend_->id, &mine.facts));
    std::vector<Greeting> all(rank_count());
    EP_TRY(bootstrap_->all_gather(&mine, all.data(), sizeof mine, deadline));
    std::vector<RankFacts> facts;
    for (int peer = 0; peer < rank_count(); ++peer) {
        const Greeting &theirs = all[peer];
        if (theirs.version != mine.version)
            return fail(MEP_MISMATCH, "rank %d runs version %d of the library, rank %d version %d",
                        peer, theirs.version, rank(), mine.version);
        if (theirs.rank_count != mine.rank_count)
            return fail(MEP_MISMATCH, "config.rank_count is %d on rank %d and %d on rank %d",
                        theirs.rank_count, peer, mine.rank_count, rank());
        if (theirs.backend != mine.backend)
            return fail(MEP_MISMATCH, "config.backend is %d on rank %d and %d on rank %d",
                        theirs.backend, peer, mine.backend, rank());
        facts.push_back(theirs.facts);
    }
    return choose_transports(facts.data());
}

mep_status_t Group::choose_transports(const RankFacts *facts) {
    local_rank_count_ = 0;
    for (int peer = 0; peer < rank_count(); ++peer)
        local_rank_count_ +=
            std::strncmp(facts[peer].host, facts[rank()].host, sizeof facts[peer].host) == 0;
    device_sharers_ = 0;
    for (int peer = 0; peer < rank_count(); ++peer)
        device_sharers_ +=
            same_process(facts[peer], facts[rank()]) && same_device(facts[peer], facts[rank()]);
    for (int peer = 0; peer < rank_count(); ++peer) {
        DeviceUuid device;
        std::memcpy(&device, facts[peer].device, sizeof device);
        delivers_lines_ = delivers_lines_ && device_->delivers_lines(device);
    }
    for (int one = 0; one < rank_count(); ++one) {
        for (int other = 0; other < rank_count(); ++other) {
            const TransportChoice choice = choose_transport(facts[one], facts[other], one == other);
            if (choice.kind == 0)
                return fail(MEP_UNSUPPORTED, "ranks %d and %d are %s", one, other, choice.reason);
            if (one == rank()) transports_.push_back(choice);
        }
    }
    return MEP_OK;
}

mep_status_t Group::all_gather(const void *send, void *receive, size_t bytes) {
    if (left_) return fail(MEP_INVALID_STATE, "group: this rank has left it");
    return bootstrap_->all_gather(send, receive, bytes, Deadline(timeout_us_));
}

mep_status_t Group::agree(mep_status_t mine) {
    Verdict verdict{mine, {}};
    if (mine != MEP_OK) std::snprintf(verdict.message, sizeof verdict.message, "%s", last_error());
    std::vector<Verdict> all(rank_count());
    const mep_status_t gathered = all_gather(&verdict, all.data(), sizeof verdict);
    // One's own error says more than that the others went away because of it.
    if (mine != MEP_OK) return fail(mine, "%.*s", int(sizeof verdict.message), verdict.message);
    if (gathered != MEP_OK) return gathered;
    for (int peer = 0; peer < rank_count(); ++peer)
        if (all[peer].status != MEP_OK)
            return fail(all[peer].status, "rank %d: %.*s", peer, int(sizeof verdict.message),
                        all[peer].message);
    return MEP_OK;
}

void Group::leave() {
    left_ = true;
    bootstrap_.reset();
}

}  // namespace ep
