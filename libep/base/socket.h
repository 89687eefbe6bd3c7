// Non-blocking IPv4 TCP sockets. Every call does at once what it can; only wait_ready() and
// connect_to() wait, and both take a Deadline. Calls return 0, an errno or kEndOfStream: the caller
// words the error, because only it knows who is at the other end.
#pragma once

#include "base/deadline.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <poll.h>
#include <string>

namespace ep {

constexpr int kEndOfStream = -1;  // the other end closed its connection in good order

// Owns a file descriptor.
class Descriptor {
  public:
    Descriptor() = default;
    explicit Descriptor(int number) : number_(number) {}
    Descriptor(Descriptor &&other) noexcept : number_(other.release()) {}
    Descriptor &operator=(Descriptor &&other) noexcept;
    Descriptor(const Descriptor &) = delete;
    Descriptor &operator=(const Descriptor &) = delete;
    ~Descriptor() { close(); }

    bool is_open() const { return number_ >= 0; }
    int number() const { return number_; }
    int release();
    void close();

  private:
    int number_ = -1;
};

struct Endpoint {
    uint32_t ipv4;  // in network order
    uint16_t port;  // in host order
};

struct Piece {
    const void *data;
    size_t size;
};

// A head and a body that are sent as one.
struct Message {
    Piece head;
    Piece body;
    size_t size() const { return head.size + body.size; }
};

// "127.0.0.1:29501"
std::string endpoint_text(Endpoint endpoint);

// What a value returned by the functions below means.
std::string socket_error_text(int error);

// Did this process or the system run out of descriptors or memory? Then the other end is not to
// blame.
bool is_shortage(int error);

// The first IPv4 address of a host name or dotted address. Returns 0 or a code of gai_strerror(3).
// The system's resolver knows no deadline.
int resolve_ipv4(const std::string &host, uint32_t *ipv4);

// Port 0: the kernel picks one. A given port may still be in use by connections that were accepted
// on it.
int open_listener(Endpoint endpoint, int backlog, Descriptor *listener);

int local_endpoint(int descriptor, Endpoint *endpoint);

// The user at the other end of an established connection, if that end is on this machine too, at
// the same address, and the system tells (proc(5), net/tcp). Asked by the end that was accepted, or
// once it was.
std::optional<uint32_t> user_at_other_end(int descriptor);

// EAGAIN: nobody is waiting.
int accept_one(int listener, Descriptor *accepted);

// ETIMEDOUT: not within the deadline.
int connect_to(Endpoint endpoint, const Deadline &deadline, Descriptor *connected);

// Receives the bytes from *count on up to `size`, as many as are there, and advances *count.
int receive_more(int descriptor, void *data, size_t size, size_t *count);

// Sends the bytes of `message` from *count on, as many as fit, and advances *count. No SIGPIPE.
int send_more(int descriptor, const Message &message, size_t *count);

// Returns when an entry is ready, after `step_ms_max`, at the deadline or on a signal: call it in a
// loop.
void wait_ready(pollfd *entries, size_t entry_count, const Deadline &deadline, int step_ms_max);

}  // namespace ep
