#include "core/group.h"

#include "base/late_frees.h"
#include "base/log.h"
#include "base/status.h"
#include "core/buffer.h"

#include <algorithm>
#include <utility>

namespace ep {

mep_status_t Group::create(const mep_group_config_t &config, std::shared_ptr<Group> *group) {
    const LateFrees late_frees;
    std::shared_ptr<Group> created(new Group);
    const int32_t backend = config.backend == 0 ? MEP_BACKEND_CPU : config.backend;
    created->backend_ = find_backend(backend);
    if (created->backend_ == nullptr)
        return fail(MEP_INVALID_ARGUMENT, "config.backend is %d; it must be one of MEP_BACKEND_*",
                    backend);
    created->device_id_ = config.device_id;
    created->timeout_us_ = config.timeout_us == 0 ? kTimeoutDefaultUs : config.timeout_us;
    // That an argument is wrong is the caller's to hear, at once; that there is no such device, in
    // this build or on this machine, also the others', who would wait for this rank.
    const mep_status_t opened =
        created->backend_->create_device(config.device_id, &created->device_);
    if (opened == MEP_INVALID_ARGUMENT) return opened;
    const Trouble trouble = Trouble::of(opened);
    if (opened != MEP_OK && config.rank_count != 1)
        log(MEP_LOG_ERROR, "%s; other ranks are told when they have come", trouble.message);
    EP_TRY(Formation::create(
        config, {*created->backend_, created->device_, trouble, created->timeout_us_, {0, 0}},
        &created->formation_));
    created->formation_->settle(created->timeout_us_);
    if (backend != MEP_BACKEND_CPU)
        log(MEP_LOG_INFO, "IBGDA unavailable, using P2P-only path: %s", rdma().reason.c_str());
    log(MEP_LOG_INFO, "rank %d of %d joined on %s", created->rank(), created->rank_count(),
        created->backend_->name);
    *group = std::move(created);
    return MEP_OK;
}

namespace {

// As the caller gave it, but for what cannot change.
mep_status_t fill_in(const Group &group, mep_group_config_t *config) {
    const struct {
        const char *name;
        int32_t *given;
        int32_t own;
    } fields[] = {{"rank", &config->rank, group.rank()},
                  {"rank_count", &config->rank_count, group.rank_count()},
                  {"backend", &config->backend, group.backend().id},
                  {"device_id", &config->device_id, group.device_id()}};
    for (const auto &field : fields) {
        if (*field.given != 0 && *field.given != field.own)
            return fail(MEP_INVALID_ARGUMENT, "config.%s is %d; it must be 0, or %d as it was",
                        field.name, *field.given, field.own);
        *field.given = field.own;
    }
    if (config->all_gather == nullptr && config->unique_id == nullptr && config->world == nullptr &&
        config->rank_count != 1)
        return fail(MEP_INVALID_ARGUMENT,
                    "config has no all_gather, unique_id or world; an update needs one, as a rank "
                    "that is lost may take the old meeting point with it");
    return MEP_OK;
}

}  // namespace

mep_status_t Group::update(const mep_group_config_t &given) {
    if (left_) return fail(MEP_INVALID_STATE, "group: this rank has left it");
    mep_group_config_t config = given;
    EP_TRY(fill_in(*this, &config));
    const int64_t timeout_us = config.timeout_us == 0 ? timeout_us_.load() : config.timeout_us;
    const LateFrees late_frees;
    std::unique_ptr<Formation> next;
    EP_TRY(Formation::create(config,
                             {*backend_,
                              device_,
                              {},
                              timeout_us,
                              {formation_->generation(), static_cast<int32_t>(buffers_.size())}},
                             &next));
    std::vector<Buffer::Renewal> renewals(buffers_.size());
    for (size_t i = 0; i < buffers_.size(); ++i)
        EP_TRY(buffers_[i]->prepare(next.get(), &renewals[i]));
    {
        // All have said of the last step that it went well: nobody goes back from here on. Nor does
        // anyone change the timeout of what goes.
        const std::lock_guard<std::mutex> lock(mutex_);
        for (size_t i = 0; i < buffers_.size(); ++i)
            EP_TRY(buffers_[i]->adopt(*next, std::move(renewals[i])));
        next->settle(timeout_us_);
        formation_.swap(next);  // after the buffers let go of the old one's engines
    }
    next.reset();
    log(MEP_LOG_INFO, "rank %d of %d: update %llu of the group", rank(), rank_count(),
        static_cast<unsigned long long>(formation_->generation()));
    return MEP_OK;
}

mep_status_t Group::all_gather(const void *send, void *receive, size_t bytes) {
    if (left_) return fail(MEP_INVALID_STATE, "group: this rank has left it");
    return formation_->all_gather(send, receive, bytes);
}

mep_status_t Group::set_timeout(int64_t timeout_us) {
    const int64_t chosen = timeout_us == 0 ? kTimeoutDefaultUs : timeout_us;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Buffer *buffer : buffers_)
        EP_TRY(buffer->set_timeout(chosen));
    timeout_us_ = chosen;
    formation_->set_timeout(chosen);
    return MEP_OK;
}

void Group::add(Buffer *buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    buffers_.push_back(buffer);
}

void Group::remove(Buffer *buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    buffers_.erase(std::remove(buffers_.begin(), buffers_.end(), buffer), buffers_.end());
}

void Group::leave() {
    left_ = true;
    formation_->leave();
}

}  // namespace ep
