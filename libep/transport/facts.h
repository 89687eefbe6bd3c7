// What a rank says about itself when a group forms, and the transport of a pair that follows from
// it. Every rank computes the choice from the same gathered facts, so none can decide differently.
#pragma once

#include "mooncake_ep.h"

namespace ep {

// Plain bytes: it travels.
struct RankFacts {
    char host[40];        // boot id
    uint64_t process[2];  // see process_identity()
};

mep_status_t local_facts(RankFacts *facts);

struct TransportChoice {
    int32_t kind;  // MEP_TRANSPORT_*; 0: these ranks cannot reach each other
    const char *name;
    const char *reason;
};

TransportChoice choose_transport(const RankFacts &one, const RankFacts &other, bool same_rank);

}  // namespace ep
