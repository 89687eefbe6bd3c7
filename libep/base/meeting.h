// What ranks need to meet over TCP, whoever they meet for: a place to listen, a secret that keeps
// others out, and words for who is missing.
#pragma once

#include "mooncake_ep.h"

#include "base/socket.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ep {

// Keeps strangers and the ranks of other jobs out. It travels in the clear: it is no defence
// against somebody who can read the network.
struct Secret {
    uint8_t bytes[32];
};

// Its time says nothing about where they differ.
bool equal_secrets(const Secret &a, const Secret &b);

// False, and errno says why, if the system has no random bytes.
bool fill_random(void *data, size_t size);

// Listens on a free port of this machine's `address`, a host name or IPv4 address by which others
// reach it. Fails with MEP_INVALID_ARGUMENT if it is none.
mep_status_t listen_at(const std::string &address, int backlog, Endpoint *endpoint,
                       Descriptor *listener);

// "rank 2 of 8" or "ranks 2, 5 of 8"; of many, the first 16.
std::string ranks_text(const std::vector<int> &ranks, int rank_count);

}  // namespace ep
