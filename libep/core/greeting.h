// What a rank says of itself to those that it comes together with, before anything is made.
#pragma once

#include "mooncake_ep.h"

#include "transport/facts.h"

#include <cstdint>
#include <string>

namespace ep {

// A failure of one rank that the others have to hear of. Plain bytes: it travels.
struct Trouble {
    int32_t status;  // MEP_OK: none
    char message[252];

    // Of what has just ended so.
    static Trouble of(mep_status_t status);
    // Worded anew, as of this rank.
    mep_status_t report() const;
    // Whoever sent it.
    std::string text() const;
};

// Plain bytes: it travels.
struct Greeting {
    int32_t version;  // of the library; ranks of one group run the same
    int32_t rank, rank_count;
    int32_t backend;
    int32_t buffer_count;
    int32_t reserved;
    uint64_t generation;
    RankFacts facts;
    uint64_t present[MEP_RANK_COUNT_MAX / 64];  // who this rank thinks comes
    Trouble trouble;                            // with it the facts are not known
};

}  // namespace ep
