#include "transport/facts.h"

#include "backend/backend.h"
#include "base/status.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace ep {

mep_status_t local_facts(const Device &device, int32_t backend, RankFacts *facts) {
    *facts = {};
    facts->backend = backend;
    std::memcpy(facts->device, device.uuid().bytes, sizeof facts->device);
    // Differs between hosts and between two boots of one; the same in all containers of a host.
    constexpr const char *kBootId = "/proc/sys/kernel/random/boot_id";
    std::FILE *file = std::fopen(kBootId, "r");
    if (file == nullptr) return fail(MEP_SYSTEM_ERROR, "%s", system_error(kBootId, errno).c_str());
    const size_t length = std::fread(facts->host, 1, sizeof facts->host - 1, file);
    std::fclose(file);
    if (length == 0) return fail(MEP_SYSTEM_ERROR, "%s is empty", kBootId);
    facts->host[std::strcspn(facts->host, "\n")] = '\0';
    const ProcessIdentity process = process_identity();
    facts->process[0] = process.words[0];
    facts->process[1] = process.words[1];
    return MEP_OK;
}

DeviceUuid device_of(const RankFacts &rank) {
    DeviceUuid device;
    std::memcpy(&device, rank.device, sizeof device);
    return device;
}

bool same_host(const RankFacts &one, const RankFacts &other) {
    return one.absent == 0 && other.absent == 0 &&
           std::strncmp(one.host, other.host, sizeof one.host) == 0;
}

bool same_process(const RankFacts &one, const RankFacts &other) {
    return one.process[0] == other.process[0] && one.process[1] == other.process[1];
}

bool same_device(const RankFacts &one, const RankFacts &other) {
    return std::memcmp(one.device, other.device, sizeof one.device) == 0;
}

bool share_streams(const RankFacts &one, const RankFacts &other) {
    return same_host(one, other) && same_process(one, other) && same_device(one, other);
}

bool any_share_streams(const GroupFacts &facts) {
    for (int one = 0; one < facts.rank_count(); ++one)
        for (int other = 0; other < one; ++other)
            if (share_streams(facts.ranks[one], facts.ranks[other])) return true;
    return false;
}

namespace {

std::string rank_text(int rank) {
    return "rank " + std::to_string(rank);
}

// Two GPUs that their gate keeps apart.
std::string far_pair(int one, int other, const std::string &of_whom) {
    constexpr const char *kAll = "MOONCAKE_EP_MACA_ALLOW_NODE_P2P=1 allows them";
    if (one < 0 || other < 0)
        return "the GPUs" + of_whom +
               " are not both in sysfs, so that nobody knows whether they "
               "are near; " +
               kAll;
    const std::string pair = std::to_string(one) + "-" + std::to_string(other);
    return "GPUs " + pair + of_whom + " are not near; MOONCAKE_EP_MACA_P2P_PAIRS=" + pair + " or " +
           kAll;
}

// Why what `from` stores does not reach `to`; "" if it does, as far as is known.
std::string obstacle(const GroupFacts &facts, int from, int to) {
    if (facts.access_of(from, to) == Access::kRefused)
        return "the device of " + rank_text(from) + " has no peer access to that of " +
               rank_text(to);
    if (facts.access_of(from, to) == Access::kGated)
        return far_pair(facts.ranks[from].physical, facts.ranks[to].physical,
                        " of " + rank_text(from) + " and " + rank_text(to));
    switch (facts.trial_of(from, to)) {
        case Trial::kNotMade:
        case Trial::kArrived:
            return "";
        case Trial::kNotShared:
            return rank_text(to) + " cannot share its memory";
        case Trial::kNotMapped:
            return rank_text(from) + " cannot map the memory of " + rank_text(to);
        case Trial::kLost:
            return "a word that " + rank_text(from) + " stored did not arrive at " + rank_text(to);
    }
    return "";
}

TransportChoice inside_a_host(const GroupFacts &facts, int one, int other) {
    const RankFacts &a = facts.ranks[one], &b = facts.ranks[other];
    const bool gpu = a.backend != MEP_BACKEND_CPU;
    const char *tried = facts.trials.empty() ? "" : "; tried in both directions";
    if (same_process(a, b)) {
        const char *how = !gpu                ? "the same memory"
                          : same_device(a, b) ? "the same GPU"
                                              : "the GPUs reach each other's memory";
        return {MEP_TRANSPORT_THREAD, "thread",
                std::string("threads of one process: ") + how + tried};
    }
    if (!gpu)
        return {MEP_TRANSPORT_SHM, "shm",
                std::string("processes of one host: POSIX shared memory, the fastest between CPU "
                            "ranks") +
                    tried};
    const bool unseen = facts.access_of(one, other) == Access::kUnknown ||
                        facts.access_of(other, one) == Access::kUnknown;
    return {MEP_TRANSPORT_IPC, "ipc",
            std::string("processes of one host: GPU memory mapped by its IPC handle") +
                (unseen ? "; a process does not see the other's GPU, so messages go by flag" : "") +
                tried};
}

}  // namespace

namespace {

const char *nccl_name(const RankFacts &rank) {
    return rank.backend == MEP_BACKEND_MACA ? "MCCL" : "NCCL";
}

int first_present(const GroupFacts &facts) {
    int first = 0;
    while (first + 1 < facts.rank_count() && facts.ranks[first].absent != 0)
        ++first;
    return first;
}

// "" if it carries rows of the group, or "why not; ".
std::string why_not_nccl(const GroupFacts &facts) {
    const int first_rank = first_present(facts);
    const RankFacts &first = facts.ranks[first_rank];
    const std::string name = nccl_name(first);
    for (int rank = 0; rank < facts.rank_count(); ++rank) {
        const RankFacts &other = facts.ranks[rank];
        if (other.absent != 0 || (other.nccl == first.nccl && first.nccl != 0)) continue;
        return first.nccl == 0 || other.nccl == 0
                   ? "not all ranks can load " + name + "; "
                   : rank_text(rank) + " has another version of " + name + " than " +
                         rank_text(first_rank) + "; ";
    }
    for (int one = 0; one < facts.rank_count(); ++one)
        for (int other = 0; other < one; ++other)
            if (same_host(facts.ranks[one], facts.ranks[other]) &&
                same_device(facts.ranks[one], facts.ranks[other]))
                return "ranks " + std::to_string(other) + " and " + std::to_string(one) +
                       " share a GPU, which " + name + " refuses; ";
    return "";
}

}  // namespace

void choose_engine(GroupFacts *facts) {
    const RankFacts &first = facts->ranks[first_present(*facts)];
    bool one_host = true, addresses = true;
    for (const RankFacts &rank : facts->ranks) {
        if (rank.absent != 0) continue;
        one_host = one_host && same_host(rank, first);
        addresses = addresses && rank.tcp_address[0] != '\0';
    }
    facts->engine = static_cast<EngineKind>(first.engine);
    if (facts->engine != kEngineTcp) return;
    facts->no_nccl = first.backend == MEP_BACKEND_CPU ? "" : why_not_nccl(*facts);
    if (first.backend != MEP_BACKEND_CPU && facts->no_nccl.empty()) {
        facts->engine = kEngineNccl;
    } else if (!one_host && !addresses) {
        facts->engine = kEngineNone;
        facts->no_engine =
            facts->no_nccl + "TCP carries rows if MOONCAKE_EP_TCP_ADDRESS is set on every rank";
    }
}

std::vector<bool> far_peers(const GroupFacts &facts, int rank) {
    std::vector<bool> far(facts.rank_count());
    for (int peer = 0; peer < facts.rank_count(); ++peer)
        far[peer] = choose_transport(facts, rank, peer).kind == MEP_TRANSPORT_COLLECTIVE;
    return far;
}

namespace {

std::string engine_name(const GroupFacts &facts) {
    switch (facts.engine) {
        case kEngineTcp:
            return "by TCP: " + facts.no_nccl;
        case kEngineNccl:
            return std::string("by ") + nccl_name(facts.ranks[first_present(facts)]) + ": ";
        case kEngineCallerOnStream:
            return "by the caller's all_to_all_on_stream: ";
        case kEngineCaller:
        case kEngineNone:
            break;
    }
    return "by the caller's all_to_all: ";
}

}  // namespace

TransportChoice choose_transport(const GroupFacts &facts, int one, int other) {
    if (one == other) return {MEP_TRANSPORT_SELF, "self", "the rank itself"};
    const int low = one < other ? one : other, high = one < other ? other : one;
    for (const int rank : {low, high})
        if (facts.ranks[rank].absent != 0)
            return {MEP_TRANSPORT_NONE, "none", rank_text(rank) + " is not in the group"};
    std::string why;
    if (!same_host(facts.ranks[low], facts.ranks[high])) why = "they are on different hosts";
    for (const int rank : {low, high})
        if (const int ranks = facts.ranks[rank].island_ranks;
            why.empty() && ranks > 0 && low / ranks != high / ranks)
            why = "they are on different islands: MOONCAKE_EP_ISLAND_RANKS is " +
                  std::to_string(ranks) + " on " + rank_text(rank);
    for (const int rank : {low, high})
        if (why.empty() && facts.ranks[rank].p2p_disabled != 0)
            why = "MOONCAKE_EP_DISABLE_P2P or disable_p2p is set on " + rank_text(rank);
    if (why.empty()) why = obstacle(facts, low, high);
    if (why.empty()) why = obstacle(facts, high, low);
    if (why.empty()) return inside_a_host(facts, low, high);
    if (facts.engine == kEngineNone)
        return {MEP_TRANSPORT_NONE, "none", why + "; " + facts.no_engine};
    return {MEP_TRANSPORT_COLLECTIVE, "collective", engine_name(facts) + why};
}

int count_unreachable(const GroupFacts &facts, std::string *text) {
    int count = 0;
    for (int one = 0; one < facts.rank_count(); ++one)
        for (int other = one + 1; other < facts.rank_count(); ++other) {
            if (facts.ranks[one].absent != 0 || facts.ranks[other].absent != 0) continue;
            const TransportChoice choice = choose_transport(facts, one, other);
            if (choice.kind != MEP_TRANSPORT_NONE || count++ > 0) continue;
            *text = "ranks " + std::to_string(one) + " and " + std::to_string(other) +
                    " cannot reach each other: " + choice.reason;
        }
    if (count > 1)
        *text += "; nor can " + std::to_string(count - 1) + " more pair" + (count == 2 ? "" : "s");
    return count;
}

}  // namespace ep
