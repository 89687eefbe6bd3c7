// Bytes that a stranger sends to the port where ranks meet: the rank that waits there ends with an
// error in time, and nothing else happens. Each run waits for its deadline, so there are only
// hundreds a second.
#include "mooncake_ep.h"

#include <arpa/inet.h>
#include <cstdlib>
#include <cstring>
#include <netinet/in.h>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

// The port that rank 0 listens on: the first descriptor that is a listening socket.
uint16_t listening_port() {
    constexpr int kDescriptorsMax = 256;
    for (int descriptor = 3; descriptor < kDescriptorsMax; ++descriptor) {
        int listens = 0;
        socklen_t size = sizeof listens;
        if (getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) != 0 || !listens)
            continue;
        sockaddr_in address{};
        size = sizeof address;
        if (getsockname(descriptor, reinterpret_cast<sockaddr *>(&address), &size) == 0)
            return ntohs(address.sin_port);
    }
    return 0;
}

void send_as_stranger(uint16_t port, const uint8_t *data, size_t size) {
    const int descriptor = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(descriptor, reinterpret_cast<sockaddr *>(&address), sizeof address) == 0)
        send(descriptor, data, size, MSG_NOSIGNAL);
    close(descriptor);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    mep_log_set_callback([](void *, int32_t, const char *) {}, nullptr, MEP_LOG_ERROR);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    constexpr int64_t kTimeoutUs = 3000;
    mep_unique_id_t id{};
    if (mep_unique_id_create(nullptr, &id) != MEP_OK) std::abort();
    std::thread stranger(
        [port = listening_port(), data, size] { send_as_stranger(port, data, size); });
    mep_group_config_t config{};
    config.struct_size = sizeof config;
    config.rank_count = 2;
    config.unique_id = &id;
    config.timeout_us = kTimeoutUs;
    mep_group_t *group = nullptr;
    const mep_status_t status = mep_group_create(&config, &group);
    if (status == MEP_OK || *mep_last_error() == '\0') std::abort();
    stranger.join();
    return 0;
}
