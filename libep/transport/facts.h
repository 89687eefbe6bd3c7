// What ranks find out about themselves and each other when a group forms, and the transport of each
// pair that follows from it. Every rank computes the choice from the same gathered facts, so none
// can decide differently.
#pragma once

#include "mooncake_ep.h"

#include "backend/backend.h"

#include <string>
#include <vector>

namespace ep {

// What a rank says about itself. Plain bytes: it travels.
struct RankFacts {
    char host[40];        // boot id
    uint64_t process[2];  // see process_identity()
    int32_t backend;      // MEP_BACKEND_*
    int32_t physical;     // number of a MetaX GPU on its host, see gate.h; otherwise -1
    char device[16];      // UUID of a GPU; zero for the CPU
    int32_t engine;       // EngineKind: the caller's, or kEngineTcp
    int32_t p2p_disabled;
    int32_t nccl;           // its version, or MCCL's; 0: it has none
    int32_t island_ranks;   // so many neighbours reach no memory of others; 0: no such limit
    int32_t absent;         // 1: no such rank is in the group now, and nothing else here counts
    char tcp_address[128];  // of this machine, for ranks elsewhere; "" if nobody has said
};

// What carries rows where memory is not reached.
enum EngineKind : int32_t {
    kEngineNone,
    kEngineTcp,
    kEngineCaller,
    kEngineCallerOnStream,
    kEngineNccl
};

mep_status_t local_facts(const Device &device, int32_t backend, RankFacts *facts);

DeviceUuid device_of(const RankFacts &rank);
bool same_host(const RankFacts &one, const RankFacts &other);
bool same_process(const RankFacts &one, const RankFacts &other);
bool same_device(const RankFacts &one, const RankFacts &other);
// Two ranks whose streams may share a hardware queue.
bool share_streams(const RankFacts &one, const RankFacts &other);

// What became of the word that a rank stored in a peer's window to try the way there.
enum class Trial : uint8_t {
    kNotMade,
    kArrived,
    kNotShared,  // the peer could not offer a window
    kNotMapped,  // the rank could not map it
    kLost,       // it did not arrive in time
};

// All of it, the same on every rank.
struct GroupFacts {
    std::vector<RankFacts> ranks;
    std::vector<Access> access;       // [from][to] from the rank's device to the peer's memory
    std::vector<Trial> trials;        // [from][to]; empty until they were made
    EngineKind engine = kEngineNone;  // as choose_engine() says
    std::string no_nccl;              // why it is not NCCL, if it could be; with "; "
    std::string no_engine;            // why, if it is kEngineNone

    int rank_count() const { return static_cast<int>(ranks.size()); }
    Access access_of(int from, int to) const { return access[size_t(from) * rank_count() + to]; }
    Trial trial_of(int from, int to) const {
        return trials.empty() ? Trial::kNotMade : trials[size_t(from) * rank_count() + to];
    }
};

// Do any two ranks share_streams()?
bool any_share_streams(const GroupFacts &facts);

// What carries rows between ranks that do not reach each other's memory, the same for the group.
void choose_engine(GroupFacts *facts);

// Between whom does it?
std::vector<bool> far_peers(const GroupFacts &facts, int rank);

struct TransportChoice {
    int32_t kind;  // MEP_TRANSPORT_*
    const char *name;
    std::string reason;  // why this one, and why not something faster
};

inline bool is_by_memory(const TransportChoice &choice) {
    return choice.kind != MEP_TRANSPORT_NONE && choice.kind != MEP_TRANSPORT_COLLECTIVE;
}

// Of the pair, in either order.
TransportChoice choose_transport(const GroupFacts &facts, int one, int other);

// How many pairs of ranks that are there have no transport; says about the first in `text` which
// and why.
int count_unreachable(const GroupFacts &facts, std::string *text);

}  // namespace ep
