#include "core/formation.h"

#include "base/env.h"
#include "base/late_frees.h"
#include "base/log.h"
#include "base/status.h"
#include "transport/gate.h"
#include "transport/trial.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

namespace ep {

Trouble Trouble::of(mep_status_t status) {
    Trouble trouble{status, {}};
    if (status != MEP_OK)
        std::snprintf(trouble.message, sizeof trouble.message, "%s", last_error());
    return trouble;
}

mep_status_t Trouble::report() const {
    return status == MEP_OK ? MEP_OK : fail(status, "%s", text().c_str());
}

std::string Trouble::text() const {
    return printable(std::string(message, strnlen(message, sizeof message)).c_str());
}

namespace {

// What all come to: this rank's own trouble, which says more than that the others went away because
// of it; then that they could not be asked; then the first of theirs, `trouble_of(peer)`.
template <class TroubleOf>
mep_status_t first_trouble(const Trouble &mine, mep_status_t gathered, int rank_count,
                           TroubleOf trouble_of) {
    EP_TRY(mine.report());
    EP_TRY(gathered);
    for (int peer = 0; peer < rank_count; ++peer) {
        const Trouble &theirs = trouble_of(peer);
        if (theirs.status != MEP_OK)
            return fail(known_failure(theirs.status), "rank %d: %s", peer, theirs.text().c_str());
    }
    return MEP_OK;
}

}  // namespace

mep_status_t Formation::create(const mep_group_config_t &config, const Start &start,
                               std::unique_ptr<Formation> *formation) {
    std::unique_ptr<Formation> created(new Formation);
    created->backend_ = &start.backend;
    created->device_ = start.device;
    created->timeout_us_ = start.timeout_us;
    created->call_ = Deadline(start.timeout_us);
    const mep_status_t met = created->meet(config);
    if (met != MEP_OK) return start.trouble.status != MEP_OK ? start.trouble.report() : met;
    GroupFacts facts;
    EP_TRY(created->gather_facts(config, start, &facts));
    if (created->members_.size() > 1) EP_TRY(created->try_transports(&facts));
    EP_TRY(created->look_for_nccl(&facts));
    created->adopt(facts);
    EP_TRY(created->create_engine(config, facts));
    *formation = std::move(created);
    return MEP_OK;
}

// Who is to be there; the rank's own place must be.
mep_status_t Formation::read_present(const mep_group_config_t &config) {
    if (config.rank_count < 1 || config.rank_count > MEP_RANK_COUNT_MAX)
        return fail(MEP_INVALID_ARGUMENT, "config.rank_count is %d; it must be in [1, %d]",
                    config.rank_count, MEP_RANK_COUNT_MAX);
    if (config.rank < 0 || config.rank >= config.rank_count)
        return fail(MEP_INVALID_ARGUMENT, "config.rank is %d; it must be in [0, %d)", config.rank,
                    config.rank_count);
    rank_ = config.rank;
    present_.assign(config.rank_count, true);
    for (int rank = 0; config.active_ranks != nullptr && rank < config.rank_count; ++rank) {
        const int32_t word = config.active_ranks[rank];
        if (word != 0 && word != 1)
            return fail(MEP_INVALID_ARGUMENT, "config.active_ranks[%d] is %d; it must be 0 or 1",
                        rank, word);
        present_[rank] = word != 0;
    }
    if (!present_[rank_])
        return fail(MEP_INVALID_ARGUMENT, "config.active_ranks[%d] is 0; it is this rank's own",
                    rank_);
    for (int rank = 0; rank < config.rank_count; ++rank)
        if (present_[rank]) members_.push_back(rank);
    return MEP_OK;
}

mep_status_t Formation::meet(const mep_group_config_t &config) {
    const bool by_environment = config.all_gather == nullptr && config.unique_id == nullptr &&
                                config.world == nullptr && config.rank_count != 1;
    if (by_environment) {
        if (config.active_ranks != nullptr)
            return fail(MEP_INVALID_ARGUMENT,
                        "config.active_ranks needs config.all_gather, config.unique_id or "
                        "config.world, as the environment is of all ranks");
        Membership membership{config.rank, config.rank_count};
        EP_TRY(bootstrap_from_environment(&membership, deadline(), &bootstrap_));
        mep_group_config_t found = config;
        found.rank = membership.rank;
        found.rank_count = membership.rank_count;
        return read_present(found);
    }
    EP_TRY(read_present(config));
    const int count = static_cast<int>(members_.size());
    const int place =
        static_cast<int>(std::find(members_.begin(), members_.end(), rank_) - members_.begin());
    if (config.all_gather != nullptr)
        return bootstrap_from_callback({place, count}, config.all_gather, config.all_gather_context,
                                       &bootstrap_);
    if (config.unique_id != nullptr)
        return bootstrap_from_unique_id({place, count}, *config.unique_id, deadline(), &bootstrap_);
    if (config.world != nullptr)
        return bootstrap_from_world({place, count}, config.world, &bootstrap_);
    bootstrap_ = bootstrap_alone();
    return MEP_OK;
}

namespace {

// What the caller and the environment say about ways between ranks.
mep_status_t read_wishes(const mep_group_config_t &config, bool on_gpu, RankFacts *facts) {
    if (config.disable_p2p < 0 || config.disable_p2p > 1)
        return fail(MEP_INVALID_ARGUMENT, "config.disable_p2p is %d; it must be 0 or 1",
                    config.disable_p2p);
    long disabled = 0;
    EP_TRY(env_integer("MOONCAKE_EP_DISABLE_P2P", 0, 1, config.disable_p2p, &disabled));
    facts->p2p_disabled = disabled != 0 || config.disable_p2p != 0;
    if (config.all_to_all_on_stream != nullptr && (!on_gpu || config.all_to_all != nullptr))
        return fail(MEP_INVALID_ARGUMENT,
                    "config.all_to_all_on_stream is given %s; it is for GPUs, instead of "
                    "config.all_to_all",
                    on_gpu ? "beside config.all_to_all" : "on the CPU");
    facts->engine = config.all_to_all_on_stream != nullptr ? kEngineCallerOnStream
                    : config.all_to_all != nullptr         ? kEngineCaller
                                                           : kEngineTcp;
    long island_ranks = 0;
    EP_TRY(env_integer("MOONCAKE_EP_ISLAND_RANKS", 1, MEP_RANK_COUNT_MAX, 0, &island_ranks));
    facts->island_ranks = static_cast<int32_t>(island_ranks);
    const std::string address = env_text("MOONCAKE_EP_TCP_ADDRESS");
    if (address.size() >= sizeof facts->tcp_address)
        return fail(MEP_INVALID_ARGUMENT, "MOONCAKE_EP_TCP_ADDRESS has %zu characters; at most %zu",
                    address.size(), sizeof facts->tcp_address - 1);
    std::memcpy(facts->tcp_address, address.c_str(), address.size() + 1);
    return MEP_OK;
}

bool is_on_stream(const RankFacts &one, const RankFacts &other) {
    return one.engine == kEngineCallerOnStream || other.engine == kEngineCallerOnStream;
}

}  // namespace

// What all must have the same, but for those that are not there.
mep_status_t Formation::compare(const Greeting &mine, int peer, const Greeting &theirs) const {
    if (theirs.version != mine.version)
        return fail(MEP_MISMATCH, "rank %d runs version %d of the library, rank %d version %d",
                    peer, theirs.version, rank_, mine.version);
    if (theirs.rank_count != mine.rank_count)
        return fail(MEP_MISMATCH, "config.rank_count is %d on rank %d and %d on rank %d",
                    theirs.rank_count, peer, mine.rank_count, rank_);
    if (theirs.rank != peer || std::memcmp(theirs.present, mine.present, sizeof mine.present) != 0)
        return fail(MEP_MISMATCH, "config.active_ranks differs between rank %d and rank %d",
                    theirs.rank, rank_);
    if (theirs.backend != mine.backend)
        return fail(MEP_MISMATCH, "config.backend is %d on rank %d and %d on rank %d",
                    theirs.backend, peer, mine.backend, rank_);
    if (theirs.generation != 0 && mine.generation != 0 && theirs.buffer_count != mine.buffer_count)
        return fail(MEP_MISMATCH, "rank %d has %d buffers of the group and rank %d has %d", peer,
                    theirs.buffer_count, rank_, mine.buffer_count);
    if (theirs.facts.engine != mine.facts.engine)
        return fail(MEP_MISMATCH, "config.%s is given on rank %d and not on rank %d",
                    is_on_stream(theirs.facts, mine.facts) ? "all_to_all_on_stream" : "all_to_all",
                    theirs.facts.engine > mine.facts.engine ? peer : rank_,
                    theirs.facts.engine > mine.facts.engine ? rank_ : peer);
    return MEP_OK;
}

// What this rank can say of itself; the gate is of its machine.
mep_status_t Formation::describe(const mep_group_config_t &config, RankFacts *facts,
                                 P2pGate *gate) const {
    EP_TRY(local_facts(*device_, backend_->id, facts));
    EP_TRY(read_wishes(config, !device_->is_synchronous(), facts));
    Topology machine;
    if (gated()) EP_TRY(machine_gate("/", deadline(), &machine, gate));
    facts->physical = physical_number(machine, device_->pci_address());
    return MEP_OK;
}

mep_status_t Formation::gather_facts(const mep_group_config_t &config, const Start &start,
                                     GroupFacts *facts) {
    Greeting mine{mep_version(),
                  rank_,
                  rank_count(),
                  backend_->id,
                  start.history.buffer_count,
                  0,
                  start.history.generation,
                  {},
                  {},
                  start.trouble};
    for (const int rank : members_)
        mine.present[rank / 64] |= uint64_t{1} << rank % 64;
    P2pGate gate;
    if (mine.trouble.status == MEP_OK)
        mine.trouble = Trouble::of(describe(config, &mine.facts, &gate));
    std::vector<Greeting> all(rank_count());
    const mep_status_t gathered = all_gather(&mine, all.data(), sizeof mine);
    EP_TRY(first_trouble(mine.trouble, gathered, rank_count(),
                         [&](int peer) -> const Trouble & { return all[peer].trouble; }));
    for (int peer = 0; peer < rank_count(); ++peer) {
        const Greeting &theirs = all[peer];
        if (is_present(peer)) EP_TRY(compare(mine, peer, theirs));
        generation_ = std::max(generation_, theirs.generation);
        facts->ranks.push_back(theirs.facts);
        RankFacts &kept = facts->ranks.back();
        kept.absent = !is_present(peer);
        for (char *end : {kept.host + sizeof kept.host, kept.tcp_address + sizeof kept.tcp_address})
            end[-1] = '\0';  // whoever sent them
    }
    ++generation_;
    choose_engine(facts);
    std::vector<Access> access(rank_count(), Access::kRefused);
    find_access(facts->ranks, gate, &access);
    return gather_rows(access, &facts->access);
}

void Formation::find_access(const std::vector<RankFacts> &ranks, const P2pGate &gate,
                            std::vector<Access> *row) const {
    const RankFacts &mine = ranks[rank_];
    for (int peer = 0; peer < rank_count(); ++peer) {
        const RankFacts &theirs = ranks[peer];
        if (!same_host(theirs, mine)) continue;
        Access &access = (*row)[peer];
        access = device_->access(device_of(theirs));
        const bool far = gated() && !gate.allows(mine.physical, theirs.physical);
        if (far && access != Access::kSame && access != Access::kRefused) access = Access::kGated;
    }
}

mep_status_t Formation::try_transports(GroupFacts *facts) {
    constexpr int64_t kWaitUs = 10'000'000;
    const int ranks = rank_count();
    PeerTrial trial(device_.get(), rank_, ranks);
    const WindowHandle mine = trial.handle();
    std::vector<WindowHandle> handles(ranks);
    EP_TRY(all_gather(&mine, handles.data(), sizeof mine));
    std::vector<bool> peers(ranks);
    for (int peer = 0; peer < ranks; ++peer)
        peers[peer] = peer != rank_ && is_by_memory(choose_transport(*facts, rank_, peer));
    EP_TRY(agree(trial.knock(handles, peers)));
    std::vector<Trial> sent;
    EP_TRY(gather_rows(trial.sent(), &sent));
    trial.seal();
    for (int peer = 0; peer < ranks; ++peer)
        peers[peer] = sent[size_t(peer) * ranks + rank_] == Trial::kArrived;
    std::vector<uint8_t> heard, heard_by_all;
    EP_TRY(agree(trial.listen(peers, deadline().within(kWaitUs), &heard)));
    trial.unmap();  // before any owner frees its window, which it does after this:
    EP_TRY(gather_rows(heard, &heard_by_all));
    for (int from = 0; from < ranks; ++from)
        for (int to = 0; to < ranks; ++to) {
            Trial &became = sent[size_t(from) * ranks + to];
            if (became == Trial::kArrived && heard_by_all[size_t(to) * ranks + from] == 0)
                became = Trial::kLost;
        }
    facts->trials = std::move(sent);
    return MEP_OK;
}

// Only if it is needed: a library that is loaded is the one that other users of the process get.
mep_status_t Formation::look_for_nccl(GroupFacts *facts) {
    bool far = false;
    for (const int one : members_)
        for (const int other : members_)
            far = far || (one != other && !is_by_memory(choose_transport(*facts, one, other)));
    const bool by_caller = facts->ranks[rank_].engine != kEngineTcp;
    if (!far || device_->is_synchronous() || by_caller) return MEP_OK;
    const Nccl &nccl = Nccl::of(backend_->id);
    const int32_t mine = nccl.version();
    if (mine == 0)
        log(MEP_LOG_WARNING,
            "rows between ranks that reach no memory of each other go without %s: "
            "%s",
            nccl.name, nccl.problem.c_str());
    std::vector<int32_t> versions(rank_count());
    EP_TRY(all_gather(&mine, versions.data(), sizeof mine));
    for (int peer = 0; peer < rank_count(); ++peer)
        facts->ranks[peer].nccl = versions[peer];
    choose_engine(facts);
    return MEP_OK;
}

void Formation::adopt(const GroupFacts &facts) {
    const RankFacts &mine = facts.ranks[rank_];
    local_rank_count_ = device_sharers_ = 0;
    int first_sharer = rank_;
    for (int peer = 0; peer < rank_count(); ++peer) {
        const RankFacts &theirs = facts.ranks[peer];
        transports_.push_back(choose_transport(facts, rank_, peer));
        if (!is_present(peer)) continue;
        local_rank_count_ += same_host(theirs, mine);
        const bool shares = share_streams(theirs, mine);
        device_sharers_ += shares;
        if (shares && peer < first_sharer) first_sharer = peer;
        delivers_lines_ =
            delivers_lines_ && is_near(peer) && device_->delivers_lines(device_of(theirs));
    }
    count_unreachable(facts, &unreachable_);
    fences_phases_ = !any_share_streams(facts);
    warn_of_threads(first_sharer);
}

void Formation::warn_of_threads(int first_sharer) const {
    if (device_->is_synchronous() || device_sharers_ == 1 || rank_ != first_sharer) return;
    log(MEP_LOG_WARNING,
        "%d ranks are threads of one process and share a GPU: let each call end before the next "
        "is queued, or make them processes; a process's streams may share a queue, in which a "
        "call would wait behind one that waits for it",
        device_sharers_);
}

mep_status_t Formation::create_engine(const mep_group_config_t &config, const GroupFacts &facts) {
    bool wanted = false;
    for (int one = 0; one < rank_count(); ++one)
        for (const bool far : far_peers(facts, one))
            wanted = wanted || far;
    if (!wanted) return MEP_OK;
    engine_wants_all_ = facts.engine == kEngineCaller || facts.engine == kEngineCallerOnStream;
    const auto gather = [this](const void *send, void *receive, size_t bytes) {
        return all_gather(send, receive, bytes);
    };
    if (facts.engine == kEngineNccl)
        return agree(device_engine_by_nccl(device_, Nccl::of(backend_->id), rank_, present_,
                                           far_peers(facts, rank_), gather, deadline(),
                                           &device_engine_));
    if (facts.engine == kEngineCallerOnStream) {
        device_engine_ = device_engine_by_callback(
            device_.get(), rank_count(), config.all_to_all_on_stream, config.all_to_all_context);
        return MEP_OK;
    }
    if (facts.engine == kEngineCaller) {
        engine_ = engine_by_callback(rank_, present_, config.all_to_all, config.all_to_all_context);
    } else {
        constexpr const char *kLoopback = "127.0.0.1";
        const char *address = facts.ranks[rank_].tcp_address;
        EP_TRY(engine_by_tcp(rank_, rank_count(), *address == '\0' ? kLoopback : address, gather,
                             deadline(), &engine_));
    }
    if (!device_->is_synchronous())
        device_engine_ = device_engine_by_host(device_.get(), std::move(engine_));
    return MEP_OK;
}

mep_status_t Formation::all_reachable() const {
    return unreachable_.empty() ? MEP_OK : fail(MEP_UNSUPPORTED, "%s", unreachable_.c_str());
}

template <class Byte>
mep_status_t Formation::gather_rows(const std::vector<Byte> &row, std::vector<Byte> *matrix) {
    static_assert(sizeof(Byte) == 1, "a byte for each peer");
    matrix->resize(row.size() * rank_count());
    return all_gather(row.data(), matrix->data(), row.size());
}

mep_status_t Formation::all_gather(const void *send, void *receive, size_t bytes) {
    const mep_status_t status = gather(send, receive, bytes);
    if (status != MEP_OK) LateFrees::begin();
    return status;
}

mep_status_t Formation::gather(const void *send, void *receive, size_t bytes) {
    if (members_.size() == present_.size())
        return bootstrap_->all_gather(send, receive, bytes, deadline());
    std::vector<char> gathered(members_.size() * bytes);
    EP_TRY(bootstrap_->all_gather(send, gathered.data(), bytes, deadline()));
    std::memset(receive, 0, present_.size() * bytes);
    for (size_t place = 0; place < members_.size(); ++place)
        std::memcpy(static_cast<char *>(receive) + members_[place] * bytes,
                    gathered.data() + place * bytes, bytes);
    return MEP_OK;
}

mep_status_t Formation::agree(mep_status_t mine) {
    const Trouble trouble = Trouble::of(mine);
    std::vector<Trouble> all(rank_count());
    const mep_status_t gathered = all_gather(&trouble, all.data(), sizeof trouble);
    return first_trouble(trouble, gathered, rank_count(),
                         [&](int peer) -> const Trouble & { return all[peer]; });
}

}  // namespace ep
