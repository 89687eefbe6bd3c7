// What a rank says about itself when a group forms, and the transport of a pair that follows from
// it. Every rank computes the choice from the same gathered facts, so none can decide differently.
#pragma once

#include "mooncake_ep.h"

#include "backend/backend.h"

namespace ep {

// Plain bytes: it travels.
struct RankFacts {
    char host[40];        // boot id
    uint64_t process[2];  // see process_identity()
    int32_t backend;      // MEP_BACKEND_*
    int32_t reserved;
    char device[16];  // UUID of a GPU; zero for the CPU
};

mep_status_t local_facts(const Device &device, int32_t backend, RankFacts *facts);

bool same_host(const RankFacts &one, const RankFacts &other);
bool same_process(const RankFacts &one, const RankFacts &other);
bool same_device(const RankFacts &one, const RankFacts &other);

struct TransportChoice {
    int32_t kind;  // MEP_TRANSPORT_*; 0: these ranks cannot reach each other
    const char *name;
    const char *reason;
};

TransportChoice choose_transport(const RankFacts &one, const RankFacts &other, bool same_rank);

}  // namespace ep
