// The exported functions that make, describe and destroy objects.
#include "mooncake_ep.h"

#include "api/checks.h"
#include "base/env.h"
#include "base/log.h"
#include "base/status.h"
#include "core/buffer.h"
#include "core/machine.h"

#include <algorithm>
#include <vector>

using ep::Backend;
using ep::Buffer;
using ep::BufferShape;
using ep::fail;
using ep::Group;
using ep::Handle;
using ep::Layout;
using ep::read_struct;
using ep::TransportChoice;
using ep::write_struct;
using ep::api::check_timeout;
using ep::api::not_null;
using ep::api::wrap;

namespace {

mep_status_t check_rank(const Group &group, int32_t rank, const char *name) {
    if (rank >= 0 && rank < group.rank_count()) return MEP_OK;
    return fail(MEP_INVALID_ARGUMENT, "%s is %d; it must be in [0, %d)", name, rank,
                group.rank_count());
}

mep_status_t check_mask_count(const Group &group, int32_t count) {
    if (count == group.rank_count()) return MEP_OK;
    return fail(MEP_INVALID_ARGUMENT, "count is %d; it must be the %d ranks of the group", count,
                group.rank_count());
}

}  // namespace

int32_t mep_version(void) {
    return 10000 * MEP_VERSION_MAJOR + 100 * MEP_VERSION_MINOR + MEP_VERSION_PATCH;
}

const char *mep_status_name(mep_status_t status) {
    switch (status) {
#define EP_NAME(name) \
    case name:        \
        return #name;
        EP_NAME(MEP_OK)
        EP_NAME(MEP_INVALID_ARGUMENT)
        EP_NAME(MEP_UNSUPPORTED)
        EP_NAME(MEP_INVALID_STATE)
        EP_NAME(MEP_OUT_OF_MEMORY)
        EP_NAME(MEP_DEVICE_ERROR)
        EP_NAME(MEP_SYSTEM_ERROR)
        EP_NAME(MEP_PEER_FAILED)
        EP_NAME(MEP_TIMEOUT)
        EP_NAME(MEP_MISMATCH)
        EP_NAME(MEP_BOOTSTRAP_FAILED)
#undef EP_NAME
        default:
            return "MEP_UNKNOWN_STATUS";
    }
}

const char *mep_last_error(void) {
    return ep::last_error();
}

mep_status_t mep_log_set_callback(mep_log_callback_t callback, void *context, int32_t level) {
    if (level < MEP_LOG_ERROR || level > MEP_LOG_DEBUG)
        return fail(MEP_INVALID_ARGUMENT, "level is %d; it must be one of MEP_LOG_*", level);
    ep::set_log_callback(callback, context, level);
    return MEP_OK;
}

mep_status_t mep_backend_query(int32_t backend, mep_backend_info_t *info) {
    const Backend *found = ep::find_backend(backend);
    if (found == nullptr)
        return fail(MEP_INVALID_ARGUMENT, "backend is %d; it must be one of MEP_BACKEND_*",
                    backend);
    const char *reason = found->unavailable_reason();
    const mep_backend_info_t answer{sizeof answer, *reason == '\0', found->device_count(), 0,
                                    found->name,   reason};
    return write_struct(info, answer, "info");
}

mep_status_t mep_rdma_query(mep_rdma_info_t *info) {
    const ep::RdmaProbe &probe = ep::Group::rdma();
    const mep_rdma_info_t answer{sizeof answer, 0, static_cast<int32_t>(probe.devices.size()), 0,
                                 probe.reason.c_str()};
    return write_struct(info, answer, "info");
}

mep_status_t mep_topology_read(const char *root, mep_topology_t **topology) {
    EP_TRY(not_null(topology, "topology"));
    ep::Machine machine;
    EP_TRY(machine.read(root == nullptr ? "/" : root));
    if (root == nullptr) machine.ask_drivers();
    return wrap(std::move(machine), topology);
}

mep_status_t mep_topology_load(const char *text, mep_topology_t **topology) {
    EP_TRY(not_null(text, "text"));
    EP_TRY(not_null(topology, "topology"));
    ep::Machine machine;
    EP_TRY(machine.load(text));
    return wrap(std::move(machine), topology);
}

mep_status_t mep_topology_apply_smi(mep_topology_t *topology, const char *tool, const char *text) {
    EP_TRY(not_null(topology, "topology"));
    EP_TRY(not_null(tool, "tool"));
    EP_TRY(not_null(text, "text"));
    return topology->machine.apply_smi(tool, text);
}

mep_status_t mep_topology_text(const mep_topology_t *topology, const char **text) {
    EP_TRY(not_null(topology, "topology"));
    EP_TRY(not_null(text, "text"));
    *text = topology->machine.text();
    return MEP_OK;
}

mep_status_t mep_topology_nic(mep_topology_t *topology, int32_t gpu, const char *filter,
                              const char **name) {
    EP_TRY(not_null(topology, "topology"));
    EP_TRY(not_null(name, "name"));
    if (gpu < 0 || gpu >= topology->machine.gpu_count())
        return fail(MEP_INVALID_ARGUMENT, "gpu is %d; it must be in [0, %d)", gpu,
                    topology->machine.gpu_count());
    const std::string set = ep::env_text("MOONCAKE_EP_DEVICE_FILTER");
    EP_TRY(topology->machine.select_nics(filter == nullptr ? set.c_str() : filter));
    *name = topology->machine.nic(gpu);
    return MEP_OK;
}

void mep_topology_destroy(mep_topology_t *topology) {
    delete topology;
}

mep_status_t mep_unique_id_create(const char *address, mep_unique_id_t *id) {
    EP_TRY(not_null(id, "id"));
    return ep::unique_id_create(address, id);
}

void mep_unique_id_destroy(const mep_unique_id_t *id) {
    if (id != nullptr) ep::unique_id_destroy(*id);
}

mep_status_t mep_world_create(int32_t rank_count, mep_world_t **world) {
    EP_TRY(not_null(world, "world"));
    if (rank_count < 1 || rank_count > MEP_RANK_COUNT_MAX)
        return fail(MEP_INVALID_ARGUMENT, "rank_count is %d; it must be in [1, %d]", rank_count,
                    MEP_RANK_COUNT_MAX);
    return ep::world_create(rank_count, world);
}

void mep_world_destroy(mep_world_t *world) {
    if (world != nullptr) ep::world_destroy(world);
}

mep_status_t mep_group_create(const mep_group_config_t *config, mep_group_t **group) {
    EP_TRY(not_null(group, "group"));
    mep_group_config_t c;
    EP_TRY(read_struct(&c, config, "config"));
    EP_TRY(check_timeout(c.timeout_us, "config.timeout_us"));
    std::shared_ptr<Group> created;
    EP_TRY(Group::create(c, &created));
    return wrap(std::move(created), group);
}

void mep_group_destroy(mep_group_t *group) {
    if (group != nullptr) group->group->leave();
    delete group;
}

mep_status_t mep_group_query(const mep_group_t *group, mep_group_info_t *info) {
    EP_TRY(not_null(group, "group"));
    const Group &g = *group->group;
    const mep_group_info_t answer{sizeof answer, g.rank(), g.rank_count(), g.backend().id,
                                  g.device_id(), 0,        g.timeout_us()};
    return write_struct(info, answer, "info");
}

mep_status_t mep_group_update(mep_group_t *group, const mep_group_config_t *config) {
    EP_TRY(not_null(group, "group"));
    mep_group_config_t c;
    EP_TRY(read_struct(&c, config, "config"));
    EP_TRY(check_timeout(c.timeout_us, "config.timeout_us"));
    return group->group->update(c);
}

mep_status_t mep_group_set_timeout(mep_group_t *group, int64_t timeout_us) {
    EP_TRY(not_null(group, "group"));
    EP_TRY(check_timeout(timeout_us, "timeout_us"));
    return group->group->set_timeout(timeout_us);
}

mep_status_t mep_group_query_transport(const mep_group_t *group, int32_t peer,
                                       mep_transport_info_t *info) {
    EP_TRY(not_null(group, "group"));
    const Group &g = *group->group;
    EP_TRY(check_rank(g, peer, "peer"));
    const TransportChoice &choice = g.transport(peer);
    const mep_transport_info_t answer{sizeof answer, choice.kind, choice.name,
                                      choice.reason.c_str()};
    return write_struct(info, answer, "info");
}

mep_status_t mep_group_all_gather(mep_group_t *group, const void *send, void *receive,
                                  size_t bytes) {
    EP_TRY(not_null(group, "group"));
    EP_TRY(not_null(send, "send"));
    EP_TRY(not_null(receive, "receive"));
    if (bytes == 0 || bytes > MEP_ALL_GATHER_BYTES_MAX)
        return fail(MEP_INVALID_ARGUMENT, "bytes is %zu; it must be in [1, %d]", bytes,
                    MEP_ALL_GATHER_BYTES_MAX);
    return group->group->all_gather(send, receive, bytes);
}

mep_status_t mep_buffer_query_sizes(const mep_buffer_config_t *config, int32_t rank_count,
                                    mep_buffer_sizes_t *sizes) {
    mep_buffer_config_t c;
    EP_TRY(read_struct(&c, config, "config"));
    BufferShape shape;
    EP_TRY(BufferShape::of(c, rank_count, &shape));
    const mep_buffer_sizes_t answer{sizeof answer, 0, shape.layout.bytes, shape.handle_bytes()};
    return write_struct(sizes, answer, "sizes");
}

mep_status_t mep_buffer_create(mep_group_t *group, const mep_buffer_config_t *config,
                               mep_buffer_t **buffer) {
    EP_TRY(not_null(group, "group"));
    EP_TRY(not_null(buffer, "buffer"));
    mep_buffer_config_t c{};
    const mep_status_t status = read_struct(&c, config, "config");
    std::unique_ptr<Buffer> created;
    EP_TRY(Buffer::create(group->group, c, status, &created));
    return wrap(std::move(created), buffer);
}

void mep_buffer_destroy(mep_buffer_t *buffer) {
    delete buffer;
}

mep_status_t mep_buffer_query(const mep_buffer_t *buffer, mep_buffer_info_t *info) {
    EP_TRY(not_null(buffer, "buffer"));
    const Buffer &b = *buffer->buffer;
    const mep_buffer_config_t &c = b.shape().config;
    const Layout &layout = b.shape().layout;
    const mep_buffer_info_t answer{sizeof answer,
                                   b.group().rank(),
                                   b.group().rank_count(),
                                   c.token_count_max,
                                   c.hidden,
                                   c.expert_count,
                                   layout.local_expert_count,
                                   c.topk_max,
                                   c.payload_types,
                                   c.rounds_in_flight_max,
                                   c.fp32_partials,
                                   b.thread_count(),
                                   layout.bytes,
                                   b.shape().handle_bytes(),
                                   b.sm_count(),
                                   0};
    return write_struct(info, answer, "info");
}

mep_status_t mep_buffer_query_counters(const mep_buffer_t *buffer,
                                       mep_buffer_counters_t *counters) {
    EP_TRY(not_null(buffer, "buffer"));
    mep_buffer_counters_t answer;
    EP_TRY(buffer->buffer->counters(&answer));
    return write_struct(counters, answer, "counters");
}

mep_status_t mep_buffer_query_peer(const mep_buffer_t *buffer, int32_t peer,
                                   mep_peer_counters_t *counters) {
    EP_TRY(not_null(buffer, "buffer"));
    EP_TRY(check_rank(buffer->buffer->group(), peer, "peer"));
    mep_peer_counters_t answer;
    EP_TRY(buffer->buffer->peer_counters(peer, &answer));
    return write_struct(counters, answer, "counters");
}

mep_status_t mep_buffer_query_expert_rows(const mep_buffer_t *buffer, uint64_t *rows,
                                          int32_t count) {
    EP_TRY(not_null(buffer, "buffer"));
    EP_TRY(not_null(rows, "rows"));
    const int experts = buffer->buffer->shape().layout.local_expert_count;
    if (count != experts)
        return fail(MEP_INVALID_ARGUMENT, "count is %d; it must be the %d experts of a rank", count,
                    experts);
    std::vector<uint64_t> answer;
    EP_TRY(buffer->buffer->expert_rows(&answer));
    std::copy(answer.begin(), answer.end(), rows);
    return MEP_OK;
}

mep_status_t mep_buffer_query_mask(const mep_buffer_t *buffer, int32_t *active, int32_t count) {
    EP_TRY(not_null(buffer, "buffer"));
    EP_TRY(not_null(active, "active"));
    EP_TRY(check_mask_count(buffer->buffer->group(), count));
    std::vector<int32_t> answer;
    EP_TRY(buffer->buffer->read_mask(&answer));
    std::copy(answer.begin(), answer.end(), active);
    return MEP_OK;
}

mep_status_t mep_buffer_set_mask(mep_buffer_t *buffer, const int32_t *active, int32_t count) {
    EP_TRY(not_null(buffer, "buffer"));
    EP_TRY(not_null(active, "active"));
    const Group &group = buffer->buffer->group();
    EP_TRY(check_mask_count(group, count));
    for (int rank = 0; rank < count; ++rank) {
        if (active[rank] != 0 && active[rank] != 1)
            return fail(MEP_INVALID_ARGUMENT, "active[%d] is %d; it must be 0 or 1", rank,
                        active[rank]);
        if (active[rank] == 0 && rank == group.rank())
            return fail(MEP_INVALID_ARGUMENT,
                        "active[%d] is 0; it is this rank's own, which always takes part", rank);
    }
    return buffer->buffer->write_mask({active, active + count});
}

mep_status_t mep_buffer_read_events(const mep_buffer_t *buffer, uint64_t *cursor,
                                    mep_event_t *events, int32_t capacity, int32_t *count) {
    EP_TRY(not_null(buffer, "buffer"));
    EP_TRY(not_null(cursor, "cursor"));
    EP_TRY(not_null(events, "events"));
    EP_TRY(not_null(count, "count"));
    if (capacity < 1)
        return fail(MEP_INVALID_ARGUMENT, "capacity is %d; it must be at least 1", capacity);
    std::vector<mep_event_t> answer;
    EP_TRY(buffer->buffer->events(cursor, capacity, &answer));
    std::copy(answer.begin(), answer.end(), events);
    *count = static_cast<int32_t>(answer.size());
    return MEP_OK;
}

mep_status_t mep_handle_create(mep_buffer_t *buffer, mep_handle_t **handle) {
    EP_TRY(not_null(buffer, "buffer"));
    EP_TRY(not_null(handle, "handle"));
    if (buffer->buffer->group().left())
        return fail(MEP_INVALID_STATE, "buffer: its group was destroyed");
    std::unique_ptr<Handle> created;
    EP_TRY(Handle::create(buffer->buffer.get(), &created));
    return wrap(std::move(created), handle);
}

void mep_handle_destroy(mep_handle_t *handle) {
    delete handle;
}
