#include "core/buffer.h"

#include "base/env.h"
#include "base/late_frees.h"
#include "base/log.h"
#include "base/status.h"

#include <algorithm>
#include <thread>

namespace ep {
namespace {

mep_status_t count_threads(const mep_buffer_config_t &config, int local_rank_count, int *count) {
    constexpr int kThreadsDefaultMax = 4;  // more only helps where memory has more channels
    *count = config.cpu_thread_count;
    if (*count != 0) return MEP_OK;
    const int cores = std::max(1u, std::thread::hardware_concurrency());
    const long otherwise = std::clamp(cores / local_rank_count, 1, kThreadsDefaultMax);
    long threads = 0;
    EP_TRY(
        env_integer("MOONCAKE_EP_CPU_THREADS", 1, MEP_CPU_THREAD_COUNT_MAX, otherwise, &threads));
    *count = static_cast<int>(threads);
    return MEP_OK;
}

// The ranks must have equal windows; `mine` against what `peer` says.
mep_status_t compare(const mep_buffer_config_t &mine, const mep_buffer_config_t &theirs, int rank,
                     int peer) {
    const struct {
        const char *name;
        int64_t mine, theirs;
    } fields[] = {
        {"token_count_max", mine.token_count_max, theirs.token_count_max},
        {"hidden", mine.hidden, theirs.hidden},
        {"expert_count", mine.expert_count, theirs.expert_count},
        {"topk_max", mine.topk_max, theirs.topk_max},
        {"payload_types", mine.payload_types, theirs.payload_types},
        {"rounds_in_flight_max", mine.rounds_in_flight_max, theirs.rounds_in_flight_max},
        {"fp32_partials", mine.fp32_partials, theirs.fp32_partials},
    };
    for (const auto &field : fields)
        if (field.mine != field.theirs)
            return fail(MEP_MISMATCH, "config.%s is %lld on rank %d and %lld on rank %d",
                        field.name, static_cast<long long>(field.mine), rank,
                        static_cast<long long>(field.theirs), peer);
    return MEP_OK;
}

// What a rank brings to the creation of a buffer, or to its renewal. Plain bytes: it travels.
struct Proposal {
    mep_buffer_config_t config;
    int32_t lines;  // would it send by line? If it is not new: does it?
    int32_t is_new;
    uint64_t dispatch_epoch, combine_epoch;  // of its last rounds
};

// For the kernels; 0 is not among them.
uint64_t timeout_in_ns(int64_t timeout_us) {
    return is_never(timeout_us) ? Round::kNever : uint64_t(timeout_us) * 1000;
}

// By line each role has a multiprocessor for itself.
mep_status_t may_go_by_line(const Formation &formation, Device *device, const Shape &shape,
                            int sm_count, bool *lines) {
    long wanted = 0;
    EP_TRY(env_integer("MOONCAKE_EP_LINES", 0, 1, 1, &wanted));
    *lines = wanted != 0 && formation.delivers_lines() && sm_count >= MEP_SM_COUNT_MIN &&
             device->kernels().suits_lines(shape);
    return MEP_OK;
}

// As those decide that are not new, if there are any.
mep_status_t choose_lines(const Formation &formation, const std::vector<Proposal> &all,
                          bool *lines) {
    int settled = -1;
    *lines = true;
    for (int peer = 0; peer < formation.rank_count(); ++peer) {
        if (!formation.is_present(peer)) continue;
        if (all[peer].is_new == 0) settled = all[peer].lines;
        *lines = *lines && all[peer].lines != 0;
    }
    if (settled == 1 && !*lines)
        return fail(MEP_UNSUPPORTED,
                    "the buffer's messages go by line, and not all ranks that come can do that; "
                    "create it again on all ranks");
    *lines = settled >= 0 ? settled == 1 : *lines;
    return MEP_OK;
}

}  // namespace

mep_status_t Buffer::create(std::shared_ptr<Group> group, const mep_buffer_config_t &config,
                            mep_status_t config_status, std::unique_ptr<Buffer> *buffer) {
    const LateFrees late_frees;
    std::unique_ptr<Buffer> created(new Buffer);
    created->group_ = std::move(group);
    Group &g = *created->group_;
    Formation *formation = &g.formation();
    const Formation::Call call(formation);
    // From here on every rank takes every collective step, whatever became of its own.
    mep_status_t status = config_status;
    if (status == MEP_OK) status = formation->all_reachable();
    if (status == MEP_OK) status = BufferShape::of(config, g.rank_count(), &created->shape_);
    bool lines = false;
    if (status == MEP_OK)
        status = may_go_by_line(*formation, g.device(), created->shape_.layout.shape,
                                created->sm_count(), &lines);
    EP_TRY(formation->agree(status));
    Epochs epochs;
    EP_TRY(created->compare_proposals(formation, true, {0, 0}, &lines, &epochs));
    if (lines) created->shape_.go_by_line();
    EP_TRY(Wiring::create(formation, g.device(), created->shape_.layout, created->allocate(),
                          &created->wiring_));
    EP_TRY(created->write_members(*formation, epochs));
    log(MEP_LOG_INFO, "rank %d: window of %zu bytes, %d threads", g.rank(),
        created->shape_.layout.bytes, created->thread_count());
    g.add(created.get());
    *buffer = std::move(created);
    return MEP_OK;
}

mep_status_t Buffer::compare_proposals(Formation *formation, bool is_new, Epochs mine, bool *lines,
                                       Epochs *agreed) {
    const Proposal proposal{shape_.config, *lines, is_new, mine.dispatch, mine.combine};
    std::vector<Proposal> all(formation->rank_count());
    EP_TRY(formation->all_gather(&proposal, all.data(), sizeof proposal));
    *agreed = {0, 0};
    for (int peer = 0; peer < formation->rank_count(); ++peer) {
        if (!formation->is_present(peer)) continue;
        EP_TRY(compare(proposal.config, all[peer].config, formation->rank(), peer));
        agreed->dispatch = std::max(agreed->dispatch, all[peer].dispatch_epoch);
        agreed->combine = std::max(agreed->combine, all[peer].combine_epoch);
    }
    return choose_lines(*formation, all, lines);
}

mep_status_t Buffer::allocate() {
    const Layout &layout = shape_.layout;
    const int ranks = layout.shape.rank_count;
    int threads = 0;
    EP_TRY(count_threads(shape_.config, group_->formation().local_rank_count(), &threads));
    EP_TRY(create_workers(threads, &workers_));
    long bulk = 0;
    EP_TRY(env_integer("MOONCAKE_EP_BULK_COPIES", 0, 1, 1, &bulk));
    may_move_in_bulk_ = bulk != 0;
    EP_TRY(device()->allocate(sizeof(BufferState), &state_));
    EP_TRY(set_timeout(group_->timeout_us()));
    EP_TRY(device()->allocate(sizeof(int32_t) * ranks, &active_));
    EP_TRY(device()->allocate(sizeof(int32_t) * ranks, &members_));
    EP_TRY(device()->allocate(sizeof(Pace) * ranks, &paces_));
    EP_TRY(device()->allocate(
        sizeof(PeerCounts) * ranks + sizeof(uint64_t) * layout.local_expert_count, &counts_));
    // For all of the device: an update may leave this rank more of it.
    Queue whole = queue(nullptr);
    whole.block_count = device()->block_count();
    const int rows = std::max(device()->kernels().chunk_count_max(whole),
                              device()->kernels().chunk_count_max(queue(nullptr)));
    EP_TRY(device()->allocate(sizeof(int32_t) * layout.shape.expert_count * tally_row_count(rows),
                              &tally_));
    EP_TRY(device()->allocate(sizeof(char *) * ranks, &windows_on_device_));
    dispatches().set_limit(shape_.config.rounds_in_flight_max);
    combines().set_limit(shape_.config.rounds_in_flight_max);
    return MEP_OK;
}

// Who there is now, where their windows are, and which epochs were the last.
mep_status_t Buffer::write_members(const Formation &formation, const Epochs &epochs) {
    const std::vector<char *> addresses = wiring_->addresses();
    active_seen_.assign(formation.rank_count(), 0);
    for (int rank = 0; rank < formation.rank_count(); ++rank)
        active_seen_[rank] = formation.is_present(rank);
    const size_t mask_bytes = sizeof(int32_t) * active_seen_.size();
    const uint64_t tickets[] = {epochs.dispatch * BufferState::kTicketsOfRound,
                                epochs.combine * BufferState::kTicketsOfRound};
    EP_TRY(device()->write(windows_on_device_.get(), addresses.data(),
                           sizeof(char *) * addresses.size()));
    EP_TRY(device()->write(members_.get(), active_seen_.data(), mask_bytes));
    EP_TRY(device()->write(active_.get(), active_seen_.data(), mask_bytes));
    const std::vector<Pace> paces(active_seen_.size(), {{epochs.dispatch, epochs.combine}, {}, 0});
    EP_TRY(device()->write(paces_.get(), paces.data(), sizeof(Pace) * paces.size()));
    return device()->write(state_.get(), tickets, sizeof tickets);
}

// ---- When the group is updated ------------------------------------------------------------------

mep_status_t Buffer::read_epochs(Epochs *epochs) const {
    BufferState state;
    EP_TRY(device()->read(&state, state_.get(), sizeof state));
    *epochs = {state.dispatch_tickets / BufferState::kTicketsOfRound,
               state.combine_tickets / BufferState::kTicketsOfRound};
    return MEP_OK;
}

mep_status_t Buffer::may_be_renewed(const Formation &next) const {
    if (pending_->dispatches.any_in_flight() || pending_->combines.any_in_flight())
        return fail(MEP_INVALID_STATE,
                    "a round of one of the group's buffers is in flight; receive it first");
    EP_TRY(next.all_reachable());
    bool lines = false, far = false;
    EP_TRY(may_go_by_line(next, device(), shape_.layout.shape, sm_count(), &lines));
    for (int peer = 0; peer < next.rank_count(); ++peer)
        far = far || next.is_far(peer);
    const bool by_line = shape_.layout.shape.carriage == Carriage::kLine;
    if ((by_line && !lines) || (far && !has_far_peers() && !device()->is_synchronous()))
        return fail(MEP_UNSUPPORTED,
                    "the memory of a rank that comes is not reached as those of the others are, "
                    "for which graphs may have been captured; create the group again");
    return MEP_OK;
}

mep_status_t Buffer::prepare(Formation *next, Renewal *renewal) {
    Epochs mine{};
    mep_status_t status = may_be_renewed(*next);
    if (status == MEP_OK) status = read_epochs(&mine);
    EP_TRY(next->agree(status));
    bool lines = shape_.layout.shape.carriage == Carriage::kLine;
    EP_TRY(compare_proposals(next, false, mine, &lines, &renewal->epochs));
    return Wiring::create(next, device(), shape_.layout, MEP_OK, &renewal->wiring);
}

mep_status_t Buffer::adopt(const Formation &next, Renewal renewal) {
    wiring_.swap(renewal.wiring);
    EP_TRY(write_members(next, renewal.epochs));
    dispatches().forget_abandoned();
    combines().forget_abandoned();
    ++generation_;
    return MEP_OK;
}

mep_status_t Buffer::counters(mep_buffer_counters_t *counters) const {
    BufferState state;
    EP_TRY(device()->read(&state, state_.get(), sizeof state));
    *counters = {sizeof *counters,
                 0,
                 state.dispatch_tickets / BufferState::kTicketsOfRound,
                 state.combine_tickets / BufferState::kTicketsOfRound,
                 state.invalid_expert_ids,
                 state.invalid_messages};
    return MEP_OK;
}

mep_status_t Buffer::peer_counters(int peer, mep_peer_counters_t *counters) const {
    PeerCounts counts;
    EP_TRY(device()->peek(&counts, peer_counts() + peer, sizeof counts));
    *counters = {sizeof *counters, 0, counts.rows_sent, counts.rows_received,
                 counts.waited_ns / 1000};
    return MEP_OK;
}

mep_status_t Buffer::expert_rows(std::vector<uint64_t> *rows) const {
    rows->resize(shape_.layout.local_expert_count);
    return device()->peek(rows->data(), expert_counts(), sizeof(uint64_t) * rows->size());
}

mep_status_t Buffer::events(uint64_t *cursor, int count, std::vector<mep_event_t> *events) const {
    constexpr uint64_t kKept = BufferState::kIncidentsKept;
    BufferState state;
    EP_TRY(device()->peek(&state, state_.get(), sizeof state));
    if (*cursor >= state.incident_count) return MEP_OK;
    uint64_t number = *cursor + 1;
    if (state.incident_count > kKept) number = std::max(number, state.incident_count - kKept + 1);
    for (; number <= state.incident_count && count > 0; ++number, --count) {
        const Incident &one = state.incidents[(number - 1) % kKept];
        if (one.number != number) break;  // it is being written
        events->push_back({one.peer, static_cast<int32_t>(one.awaited),
                           one.broke_limit != 0 ? MEP_EVENT_LIMIT : MEP_EVENT_LATE, 0, one.epoch,
                           static_cast<int64_t>(one.waited_ns / 1000)});
    }
    *cursor = number - 1;
    return MEP_OK;
}

mep_status_t Buffer::read_mask(std::vector<int32_t> *active) const {
    active->resize(active_seen_.size());
    return device()->peek(active->data(), active_.get(), sizeof(int32_t) * active->size());
}

mep_status_t Buffer::write_mask(const std::vector<int32_t> &active) {
    std::vector<int32_t> next = active;
    for (size_t rank = 0; rank < next.size(); ++rank)
        if (!group_->formation().is_present(static_cast<int>(rank))) next[rank] = 0;
    EP_TRY(device()->write(active_.get(), next.data(), sizeof(int32_t) * next.size()));
    active_seen_ = std::move(next);
    return MEP_OK;
}

mep_status_t Buffer::set_timeout(int64_t timeout_us) {
    const uint64_t timeout_ns = timeout_in_ns(timeout_us);
    return device()->write(&static_cast<BufferState *>(state_.get())->timeout_ns, &timeout_ns,
                           sizeof timeout_ns);
}

Round Buffer::round(void *handle_memory, int32_t *active, int64_t timeout_us) const {
    const HandleLayout at = HandleLayout::of(shape_.layout.shape);
    char *memory = static_cast<char *>(handle_memory);
    const auto ints = [memory](size_t offset) {
        return reinterpret_cast<int32_t *>(memory + offset);
    };
    const auto signals = [memory](size_t offset) {
        return reinterpret_cast<uint64_t *>(memory + offset);
    };
    Round round{};
    round.layout = shape_.layout;
    round.rank = group_->rank();
    round.windows = static_cast<char *const *>(windows_on_device_.get());
    round.state = static_cast<BufferState *>(state_.get());
    round.routing = {reinterpret_cast<HandleState *>(memory + at.state),
                     ints(at.choices),
                     ints(at.positions),
                     signals(at.token_counts),
                     signals(at.begins),
                     ints(at.row_counts),
                     ints(at.rows),
                     reinterpret_cast<float *>(memory + at.weights),
                     signals(at.lost)};
    round.members = static_cast<const int32_t *>(members_.get());
    round.active = active == nullptr ? own_active() : active;
    round.paces = static_cast<Pace *>(paces_.get());
    round.peer_counts = peer_counts();
    round.expert_rows = expert_counts();
    round.timeout_ns = timeout_us == 0 ? Round::kOfBuffer : timeout_in_ns(timeout_us);
    round.hidden = shape_.config.hidden;
    round.far = wiring_->collective().far();
    return round;
}

int Buffer::sm_count() const {
    const int all = device()->block_count(), limit = shape_.config.sm_count_max;
    const int share = all == 0 ? 0 : std::max(1, all / group_->formation().device_sharers());
    return limit == 0 || limit > share ? share : limit;
}

Queue Buffer::queue(void *stream) const {
    Queue queue;
    queue.stream = stream;
    queue.block_count = sm_count();
    // With a limit the rest is another's, which a launch that waits for its turn must not take.
    queue.starts_early = sm_count() == device()->block_count();
    queue.may_move_in_bulk = may_move_in_bulk_;
    queue.fences_phases = group_->formation().fences_phases();
    queue.workers = workers_.get();
    return queue;
}

mep_status_t Buffer::find_new_failures(std::vector<int> *ranks) {
    ranks->clear();
    std::vector<int32_t> now;
    EP_TRY(read_mask(&now));
    for (size_t peer = 0; peer < now.size(); ++peer)
        if (active_seen_[peer] != 0 && now[peer] == 0) ranks->push_back(static_cast<int>(peer));
    active_seen_ = std::move(now);
    return MEP_OK;
}

Handle::~Handle() {
    if (dispatch == State::kInFlight) pending_->dispatches.abandon(dispatch_round);
    if (combine_in_flight) pending_->combines.abandon(combine_round);
}

mep_status_t Handle::create(Buffer *buffer, std::unique_ptr<Handle> *handle) {
    std::unique_ptr<Handle> created(new Handle(buffer));
    EP_TRY(buffer->device()->allocate(buffer->shape().handle_bytes(), &created->memory_));
    *handle = std::move(created);
    return MEP_OK;
}

}  // namespace ep
