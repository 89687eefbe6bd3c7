#include "base/socket.h"

#include <arpa/inet.h>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>
#include <utility>

namespace ep {
namespace {

constexpr int kSocketFlags = SOCK_NONBLOCK | SOCK_CLOEXEC;
constexpr int kWaitStepMs = 1000;

sockaddr_in to_sockaddr(Endpoint endpoint) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = endpoint.ipv4;
    address.sin_port = htons(endpoint.port);
    return address;
}

int open_socket(Descriptor *opened) {
    Descriptor descriptor(::socket(AF_INET, SOCK_STREAM | kSocketFlags, 0));
    if (!descriptor.is_open()) return errno;
    *opened = std::move(descriptor);
    return 0;
}

// Messages are small and answered at once: waiting to fill a packet only delays them.
void send_without_delay(int descriptor) {
    const int on = 1;
    ::setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// A connection that failed before it was accepted says nothing about the listener; see accept(2).
bool concerns_only_the_caller(int error) {
    switch (error) {
        case EINTR:
        case ECONNABORTED:
        case EPROTO:
        case ENETDOWN:
        case ENOPROTOOPT:
        case EHOSTDOWN:
        case ENONET:
        case EHOSTUNREACH:
        case EOPNOTSUPP:
        case ENETUNREACH:
            return true;
        default:
            return false;
    }
}

// A port that nobody listens on may be given to the very socket that connects to it, which then is
// connected to itself.
bool is_connected_to_itself(int descriptor, Endpoint target) {
    Endpoint local = {};
    return local_endpoint(descriptor, &local) == 0 && local.ipv4 == target.ipv4 &&
           local.port == target.port;
}

}  // namespace

Descriptor &Descriptor::operator=(Descriptor &&other) noexcept {
    if (this != &other) {
        close();
        number_ = other.release();
    }
    return *this;
}

int Descriptor::release() {
    const int number = number_;
    number_ = -1;
    return number;
}

void Descriptor::close() {
    // Not repeated on EINTR: Linux has closed it all the same.
    if (is_open()) ::close(release());
}

std::string endpoint_text(Endpoint endpoint) {
    char text[INET_ADDRSTRLEN] = "";
    ::inet_ntop(AF_INET, &endpoint.ipv4, text, sizeof text);
    return std::string(text) + ":" + std::to_string(endpoint.port);
}

std::string socket_error_text(int error) {
    if (error == kEndOfStream) return "connection closed by the other end";
    char buffer[128];
    return strerror_r(error, buffer, sizeof buffer);
}

bool is_shortage(int error) {
    return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

int resolve_ipv4(const std::string &host, uint32_t *ipv4) {
    addrinfo hints = {};
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    addrinfo *found = nullptr;
    if (const int error = ::getaddrinfo(host.c_str(), nullptr, &hints, &found); error != 0)
        return error;
    sockaddr_in address;
    std::memcpy(&address, found->ai_addr, sizeof address);
    ::freeaddrinfo(found);
    *ipv4 = address.sin_addr.s_addr;
    return 0;
}

int open_listener(Endpoint endpoint, int backlog, Descriptor *listener) {
    Descriptor opened;
    if (const int error = open_socket(&opened); error != 0) return error;
    // Not with port 0: then the kernel could pick a port that another socket is about to listen on.
    const int on = 1;
    if (endpoint.port != 0) ::setsockopt(opened.number(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    const sockaddr_in address = to_sockaddr(endpoint);
    if (::bind(opened.number(), reinterpret_cast<const sockaddr *>(&address), sizeof address) != 0)
        return errno;
    if (::listen(opened.number(), backlog) != 0) return errno;
    *listener = std::move(opened);
    return 0;
}

namespace {

// Of one end, as `ask`, getsockname or getpeername, tells it.
int endpoint_by(int (*ask)(int, sockaddr *, socklen_t *), int descriptor, Endpoint *endpoint) {
    sockaddr_in address = {};
    socklen_t size = sizeof address;
    if (ask(descriptor, reinterpret_cast<sockaddr *>(&address), &size) != 0) return errno;
    if (size != sizeof address || address.sin_family != AF_INET) return EAFNOSUPPORT;
    *endpoint = {address.sin_addr.s_addr, ntohs(address.sin_port)};
    return 0;
}

int remote_endpoint(int descriptor, Endpoint *endpoint) {
    return endpoint_by([](int number, sockaddr *address,
                          socklen_t *size) { return ::getpeername(number, address, size); },
                       descriptor, endpoint);
}

}  // namespace

int local_endpoint(int descriptor, Endpoint *endpoint) {
    return endpoint_by([](int number, sockaddr *address,
                          socklen_t *size) { return ::getsockname(number, address, size); },
                       descriptor, endpoint);
}

std::optional<uint32_t> user_at_other_end(int descriptor) {
    Endpoint here = {}, there = {};
    if (local_endpoint(descriptor, &here) != 0 || remote_endpoint(descriptor, &there) != 0)
        return std::nullopt;
    if (here.ipv4 != there.ipv4) return std::nullopt;
    std::ifstream sockets("/proc/net/tcp");
    std::string line;
    while (std::getline(sockets, line)) {
        // number: local address, remote address, state, queues, timers, retries, user, ...
        Endpoint local = {}, remote = {};
        unsigned local_port = 0, remote_port = 0, state = 0, user = 0;
        if (std::sscanf(line.c_str(), " %*d: %x:%x %x:%x %x %*x:%*x %*x:%*x %*x %u", &local.ipv4,
                        &local_port, &remote.ipv4, &remote_port, &state, &user) != 6)
            continue;
        constexpr unsigned kEstablished = 1;
        if (state == kEstablished && local.ipv4 == there.ipv4 && local_port == there.port &&
            remote.ipv4 == here.ipv4 && remote_port == here.port)
            return user;
    }
    return std::nullopt;
}

int accept_one(int listener, Descriptor *accepted) {
    for (;;) {
        Descriptor descriptor(::accept4(listener, nullptr, nullptr, kSocketFlags));
        if (descriptor.is_open()) {
            send_without_delay(descriptor.number());
            *accepted = std::move(descriptor);
            return 0;
        }
        if (!concerns_only_the_caller(errno)) return errno;
    }
}

int connect_to(Endpoint endpoint, const Deadline &deadline, Descriptor *connected) {
    Descriptor descriptor;
    if (const int error = open_socket(&descriptor); error != 0) return error;
    send_without_delay(descriptor.number());
    const sockaddr_in address = to_sockaddr(endpoint);
    const int result = ::connect(descriptor.number(), reinterpret_cast<const sockaddr *>(&address),
                                 sizeof address);
    // Interrupted, it goes on in the background like one that would block.
    if (result != 0 && errno != EINPROGRESS && errno != EINTR) return errno;
    if (result != 0) {
        pollfd entry = {descriptor.number(), POLLOUT, 0};
        do {
            wait_ready(&entry, 1, deadline, kWaitStepMs);
        } while (entry.revents == 0 && !deadline.passed());
        if (entry.revents == 0) return ETIMEDOUT;
    }
    int error = 0;
    socklen_t size = sizeof error;
    if (::getsockopt(descriptor.number(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) return errno;
    if (error != 0) return error;
    if (is_connected_to_itself(descriptor.number(), endpoint)) return ECONNREFUSED;
    *connected = std::move(descriptor);
    return 0;
}

int receive_more(int descriptor, void *data, size_t size, size_t *count) {
    while (*count < size) {
        const ssize_t received = ::recv(descriptor, static_cast<unsigned char *>(data) + *count,
                                        size - *count, MSG_DONTWAIT);
        if (received == 0) return kEndOfStream;
        if (received > 0)
            *count += static_cast<size_t>(received);
        else if (errno == EAGAIN || errno == EWOULDBLOCK)
            return 0;
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

int send_more(int descriptor, const Message &message, size_t *count) {
    while (*count < message.size()) {
        iovec pieces[2];
        size_t piece_count = 0;
        size_t skip = *count;
        for (const Piece &piece : {message.head, message.body}) {
            const size_t skip_here = skip < piece.size ? skip : piece.size;
            skip -= skip_here;
            if (skip_here == piece.size) continue;
            const auto *begin = static_cast<const unsigned char *>(piece.data) + skip_here;
            pieces[piece_count++] = {const_cast<unsigned char *>(begin), piece.size - skip_here};
        }
        msghdr header = {};
        header.msg_iov = pieces;
        header.msg_iovlen = piece_count;
        const ssize_t sent = ::sendmsg(descriptor, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0)
            *count += static_cast<size_t>(sent);
        else if (errno == EAGAIN || errno == EWOULDBLOCK)
            return 0;
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

void wait_ready(pollfd *entries, size_t entry_count, const Deadline &deadline, int step_ms_max) {
    // After an error, a signal for instance, poll leaves the old events in place.
    if (::poll(entries, entry_count, deadline.remaining_ms(step_ms_max)) < 0)
        for (size_t i = 0; i < entry_count; ++i)
            entries[i].revents = 0;
}

}  // namespace ep
