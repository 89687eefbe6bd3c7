#include "base/meeting.h"

#include "base/status.h"

#include <arpa/inet.h>
#include <cerrno>
#include <netdb.h>
#include <sys/random.h>
#include <utility>

namespace ep {

// Its time says nothing about where they differ.
bool equal_secrets(const Secret &a, const Secret &b) {
    volatile uint8_t difference = 0;
    for (size_t i = 0; i < sizeof a.bytes; ++i)
        difference = static_cast<uint8_t>(difference | (a.bytes[i] ^ b.bytes[i]));
    return difference == 0;
}

bool fill_random(void *data, size_t size) {
    ssize_t count;
    do {
        count = ::getrandom(data, size, 0);
    } while (count < 0 && errno == EINTR);
    return count == static_cast<ssize_t>(size);
}

mep_status_t listen_at(const std::string &address, int backlog, Endpoint *endpoint,
                       Descriptor *listener) {
    *endpoint = {};
    if (const int error = resolve_ipv4(address, &endpoint->ipv4); error != 0)
        return fail(MEP_INVALID_ARGUMENT, "address \"%s\": %s", address.c_str(),
                    ::gai_strerror(error));
    if (endpoint->ipv4 == htonl(INADDR_ANY))
        return fail(MEP_INVALID_ARGUMENT,
                    "address \"%s\" is none that other ranks could connect to", address.c_str());
    Descriptor opened;
    int error = open_listener(*endpoint, backlog, &opened);
    if (error == EADDRNOTAVAIL)
        return fail(MEP_INVALID_ARGUMENT, "address \"%s\" is not one of this machine",
                    address.c_str());
    if (error == 0) error = local_endpoint(opened.number(), endpoint);
    if (error != 0)
        return fail(MEP_SYSTEM_ERROR, "cannot listen on \"%s\": %s", address.c_str(),
                    socket_error_text(error).c_str());
    *listener = std::move(opened);
    return MEP_OK;
}

std::string ranks_text(const std::vector<int> &ranks, int rank_count) {
    constexpr size_t kListedMax = 16;
    std::string text = ranks.size() == 1 ? "rank" : "ranks";
    for (size_t i = 0; i < ranks.size() && i < kListedMax; ++i)
        text += (i == 0 ? " " : ", ") + std::to_string(ranks[i]);
    if (ranks.size() > kListedMax)
        text += " and " + std::to_string(ranks.size() - kListedMax) + " more";
    return text + " of " + std::to_string(rank_count);
}

}  // namespace ep
