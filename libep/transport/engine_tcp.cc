// A TCP connection between each pair of ranks. No threads: set-up and each exchange are one loop
// over poll(2), in which no connection waits for another one, so that no order of sends and
// receives can block two ranks on each other. What a peer says is checked before it is believed; a
// peer that breaks the rules loses its connection, and a lost connection does not come back.
#include "base/deadline.h"
#include "base/log.h"
#include "base/meeting.h"
#include "base/socket.h"
#include "base/status.h"
#include "transport/engine.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <netinet/in.h>
#include <poll.h>
#include <string>
#include <utility>
#include <vector>

namespace ep {
namespace {

// ---- What travels -------------------------------------------------------------------------------
//
//   set-up    each rank gives to all        Invitation
//             the higher rank of a pair connects, and says Hello; the lower one answers with its
//             own
//   exchange  both ranks of a pair          Header, its bytes
//
// Integers are in the order of the machine; between machines that differ in it, the magic differs.

constexpr uint64_t kHelloMagic = 0x4f4c4c4548544e45U;
constexpr uint64_t kHeaderMagic = 0x4c45435241504e45U;
constexpr uint32_t kProtocol = 1;
constexpr size_t kTextMax = 256;

// Where a rank listens and what one has to say there; or why it does not, in `text`.
struct Invitation {
    int32_t present;  // 0: there is no such rank now
    int32_t status;
    uint32_t ipv4;  // in network order
    uint32_t port;
    Secret secret;
    char text[kTextMax];
};
static_assert(sizeof(Invitation) == 304, "no padding travels");

struct Hello {
    uint64_t magic;
    uint32_t protocol;
    int32_t rank;   // who says it
    Secret secret;  // of whom it is said to
};
static_assert(sizeof(Hello) == 48, "no padding travels");

struct Header {
    uint64_t magic;
    uint64_t sequence;  // the first exchange is number 1
    uint64_t bytes;     // that follow
};
static_assert(sizeof(Header) == 24, "no padding travels");

// ---- Limits -------------------------------------------------------------------------------------

constexpr int kListenBacklog = MEP_RANK_COUNT_MAX;
constexpr size_t kStrangerCountMax = 64;        // connections that have not said Hello yet
constexpr int64_t kHelloTimeoutUs = 3'000'000;  // of each of them
constexpr int kMeetingStepMs = 100;             // how often strangers' time is looked at
constexpr int kWaitStepMs = 1000;

// Of one peer before it is the turn of the next one, and the deadline's.
constexpr size_t kTurnBytes = 1 << 20;

// "within 2.5 s"
std::string within_text(const Deadline &deadline) {
    char text[64];
    std::snprintf(text, sizeof text, "within %.1f s",
                  static_cast<double>(deadline.timeout_us()) * 1e-6);
    return text;
}

// ---- Invitations --------------------------------------------------------------------------------

// Starts to listen, and says so in `invitation`.
mep_status_t invite(const std::string &address, Descriptor *listener, Invitation *invitation) {
    Endpoint endpoint = {};
    Descriptor opened;
    EP_TRY(listen_at(address, kListenBacklog, &endpoint, &opened));
    Secret secret = {};
    if (!fill_random(&secret, sizeof secret))
        return fail(MEP_SYSTEM_ERROR, "%s", system_error("getrandom", errno).c_str());
    invitation->ipv4 = endpoint.ipv4;
    invitation->port = endpoint.port;
    invitation->secret = secret;
    *listener = std::move(opened);
    return MEP_OK;
}

// Fails if a rank could not invite the others, in its words.
mep_status_t check_invitations(const std::vector<Invitation> &invitations) {
    for (size_t rank = 0; rank < invitations.size(); ++rank) {
        const Invitation &invitation = invitations[rank];
        if (invitation.status == MEP_OK) continue;
        std::string text(invitation.text, ::strnlen(invitation.text, kTextMax));
        // It came from another process, and will be printed.
        for (char &c : text)
            if (c < ' ' || c > '~') c = '?';
        const mep_status_t status =
            invitation.status == MEP_INVALID_ARGUMENT ? MEP_INVALID_ARGUMENT : MEP_SYSTEM_ERROR;
        return fail(status, "rank %zu of %zu: %s", rank, invitations.size(), text.c_str());
    }
    return MEP_OK;
}

// A rank that cannot listen says so to the others, instead of leaving them to wait for it.
mep_status_t gather_invitations(const char *address, const AllGather &all_gather,
                                Descriptor *listener, std::vector<Invitation> *invitations) {
    Invitation own = {};
    own.present = 1;
    own.status = invite(address == nullptr ? "" : address, listener, &own);
    const std::string text = own.status == MEP_OK ? "" : last_error();
    text.copy(own.text, kTextMax - 1);
    const mep_status_t status = all_gather(&own, invitations->data(), sizeof own);
    if (own.status != MEP_OK) return fail(own.status, "%s", text.c_str());
    EP_TRY(status);
    return check_invitations(*invitations);
}

// ---- Set-up -------------------------------------------------------------------------------------

// A connection at whose other end nobody has said Hello yet.
struct Stranger {
    static constexpr int kUnknown = -1;

    Descriptor socket;
    int rank = kUnknown;  // that this rank has called there; kUnknown: they have called this rank
    Hello hello = {};
    size_t hello_count = 0;
    Deadline deadline{kHelloTimeoutUs};  // only of those that have called this rank

    bool has_called() const { return rank == kUnknown; }
};

// Each rank calls all lower ones and then answers all higher ones. Calling does not wait for the
// called: its kernel completes the connection while it is busy itself.
class Meeting {
  public:
    Meeting(int rank, std::vector<Invitation> invitations, Descriptor listener)
        : rank_(rank),
          rank_count_(static_cast<int>(invitations.size())),
          invitations_(std::move(invitations)),
          listener_(std::move(listener)),
          sockets_(rank_count_) {}

    // Returns when the other end of each connection has said Hello; `sockets` are by rank.
    mep_status_t hold(const Deadline &deadline, std::vector<Descriptor> *sockets);

  private:
    bool is_there(int rank) const { return invitations_[rank].present != 0; }
    mep_status_t call(int peer, const Deadline &deadline);
    mep_status_t answer_calls();
    mep_status_t serve_strangers();
    mep_status_t serve(Stranger *stranger, bool *is_done);
    std::string objection(const Stranger &stranger) const;
    int say_hello(int peer, const Descriptor &socket) const;

    size_t calls_waited_for() const;
    std::vector<int> missing_ranks() const;
    mep_status_t call_failed(int peer, const std::string &reason) const;

    const int rank_;
    const int rank_count_;
    const std::vector<Invitation> invitations_;
    const Descriptor listener_;
    std::vector<Descriptor> sockets_;  // by rank
    std::vector<Stranger> strangers_;
};

// poll() sees, in this order: the listener, the strangers.
mep_status_t Meeting::hold(const Deadline &deadline, std::vector<Descriptor> *sockets) {
    for (int peer = 0; peer < rank_; ++peer)
        if (is_there(peer)) EP_TRY(call(peer, deadline));
    for (;;) {
        EP_TRY(serve_strangers());
        EP_TRY(answer_calls());
        const std::vector<int> missing = missing_ranks();
        if (missing.empty()) break;
        if (deadline.passed())
            return fail(MEP_TIMEOUT, "%s did not meet rank %d %s",
                        ranks_text(missing, rank_count_).c_str(), rank_,
                        within_text(deadline).c_str());
        // With too many strangers, or with all ranks there, no more calls are answered.
        const bool is_open = calls_waited_for() > 0;
        std::vector<pollfd> entries = {{is_open ? listener_.number() : -1, POLLIN, 0}};
        for (const Stranger &stranger : strangers_)
            entries.push_back({stranger.socket.number(), POLLIN, 0});
        wait_ready(entries.data(), entries.size(), deadline, kMeetingStepMs);
    }
    *sockets = std::move(sockets_);
    return MEP_OK;
}

mep_status_t Meeting::call(int peer, const Deadline &deadline) {
    const Invitation &invitation = invitations_[peer];
    const Endpoint endpoint = {invitation.ipv4, static_cast<uint16_t>(invitation.port)};
    Stranger called;
    called.rank = peer;
    int error = connect_to(endpoint, deadline, &called.socket);
    if (error == ETIMEDOUT && deadline.passed())
        return fail(MEP_TIMEOUT, "rank %d of %d, at %s, did not let rank %d connect %s", peer,
                    rank_count_, endpoint_text(endpoint).c_str(), rank_,
                    within_text(deadline).c_str());
    if (is_shortage(error))
        return fail(MEP_SYSTEM_ERROR, "rank %d of %d, at %s: %s", peer, rank_count_,
                    endpoint_text(endpoint).c_str(), system_error("connect", error).c_str());
    if (error == 0) error = say_hello(peer, called.socket);
    if (error != 0) return call_failed(peer, socket_error_text(error));
    strangers_.push_back(std::move(called));
    return MEP_OK;
}

// Mostly the Hello is already there, and the connection never counts as a stranger.
mep_status_t Meeting::answer_calls() {
    for (size_t left = calls_waited_for(); left > 0; --left) {
        Stranger stranger;
        const int error = accept_one(listener_.number(), &stranger.socket);
        if (error == EAGAIN || error == EWOULDBLOCK) break;
        if (error != 0) return fail(MEP_SYSTEM_ERROR, "%s", system_error("accept", error).c_str());
        bool is_done = false;
        EP_TRY(serve(&stranger, &is_done));
        if (!is_done) strangers_.push_back(std::move(stranger));
    }
    return MEP_OK;
}

mep_status_t Meeting::serve_strangers() {
    std::vector<Stranger> remaining;
    for (Stranger &stranger : strangers_) {
        bool is_done = false;
        EP_TRY(serve(&stranger, &is_done));
        if (!is_done) remaining.push_back(std::move(stranger));
    }
    strangers_ = std::move(remaining);
    return MEP_OK;
}

// Done: it has become a peer, or is to be forgotten. Fails only if it is a rank that was called.
mep_status_t Meeting::serve(Stranger *stranger, bool *is_done) {
    const bool has_called = stranger->has_called();
    const int error = receive_more(stranger->socket.number(), &stranger->hello,
                                   sizeof stranger->hello, &stranger->hello_count);
    std::string reason = objection(*stranger);
    const bool is_complete = stranger->hello_count == sizeof stranger->hello;
    if (!is_complete && reason.empty()) {
        if (error != 0)
            reason = socket_error_text(error);
        else if (has_called && stranger->deadline.passed())
            reason = "it says nothing";
        else
            return MEP_OK;
    }
    *is_done = true;
    if (!reason.empty()) {
        if (!has_called) return call_failed(stranger->rank, reason);
        log(MEP_LOG_WARNING, "rank %d turned a connection away: %s", rank_, reason.c_str());
        return MEP_OK;
    }
    const int peer = stranger->hello.rank;
    // If this fails, the other end is not there any more, and will be missed at the deadline.
    if (has_called && say_hello(peer, stranger->socket) != 0) return MEP_OK;
    sockets_[peer] = std::move(stranger->socket);
    return MEP_OK;
}

// Why what the other end has said so far is wrong; empty if it is not.
std::string Meeting::objection(const Stranger &stranger) const {
    const Hello &hello = stranger.hello;
    if (stranger.hello_count >= sizeof hello.magic && hello.magic != kHelloMagic)
        return "it is no rank of a group";
    if (stranger.hello_count < sizeof hello) return "";
    if (hello.protocol != kProtocol)
        return "its protocol is " + std::to_string(hello.protocol) + ", not " +
               std::to_string(kProtocol);
    if (!equal_secrets(hello.secret, invitations_[rank_].secret)) return "its secret is wrong";
    const std::string name = "it says that it is rank " + std::to_string(hello.rank);
    if (!stranger.has_called()) return hello.rank == stranger.rank ? "" : name;
    if (hello.rank <= rank_ || hello.rank >= rank_count_ || !is_there(hello.rank))
        return name + ", which is not in (" + std::to_string(rank_) + ", " +
               std::to_string(rank_count_) + ")";
    if (sockets_[hello.rank].is_open()) return name + ", which is already there";
    return "";
}

int Meeting::say_hello(int peer, const Descriptor &socket) const {
    const Hello hello = {kHelloMagic, kProtocol, rank_, invitations_[peer].secret};
    size_t count = 0;
    const int error = send_more(socket.number(), {{&hello, sizeof hello}, {nullptr, 0}}, &count);
    if (error != 0) return error;
    // A new connection takes this much at once.
    return count == sizeof hello ? 0 : EAGAIN;
}

// How many more calls may be answered now.
size_t Meeting::calls_waited_for() const {
    size_t stranger_count = 0;
    for (const Stranger &stranger : strangers_)
        if (stranger.has_called()) ++stranger_count;
    for (int peer = rank_ + 1; peer < rank_count_; ++peer)
        if (is_there(peer) && !sockets_[peer].is_open()) return kStrangerCountMax - stranger_count;
    return 0;
}

std::vector<int> Meeting::missing_ranks() const {
    std::vector<int> missing;
    for (int peer = 0; peer < rank_count_; ++peer)
        if (peer != rank_ && is_there(peer) && !sockets_[peer].is_open()) missing.push_back(peer);
    return missing;
}

mep_status_t Meeting::call_failed(int peer, const std::string &reason) const {
    const Invitation &invitation = invitations_[peer];
    const Endpoint endpoint = {invitation.ipv4, static_cast<uint16_t>(invitation.port)};
    return fail(MEP_BOOTSTRAP_FAILED, "rank %d of %d, at %s, called by rank %d: %s", peer,
                rank_count_, endpoint_text(endpoint).c_str(), rank_, reason.c_str());
}

// ---- Exchanges ----------------------------------------------------------------------------------

// The vector reports a lack of memory only by exception.
bool resize(Parcel *parcel, size_t size) {
    try {
        parcel->resize(size);
        return true;
    } catch (const std::exception &) {
        return false;
    }
}

// What one pair of ranks does in one exchange.
struct Transfer {
    int socket = -1;
    Header header_out = {};
    const Parcel *send = nullptr;
    size_t sent_count = 0;  // of header and bytes
    Header header_in = {};
    size_t header_count = 0;
    Parcel *receive = nullptr;  // of its final size once the header is there
    size_t body_count = 0;

    bool is_sent() const { return sent_count == sizeof header_out + send->size(); }
    bool has_header() const { return header_count == sizeof header_in; }
    bool is_received() const { return has_header() && body_count == receive->size(); }
    // What it waits for; 0: it is done.
    short events() const {
        return static_cast<short>((is_sent() ? 0 : POLLOUT) | (is_received() ? 0 : POLLIN));
    }

    int receive_header() {
        return receive_more(socket, &header_in, sizeof header_in, &header_count);
    }
    int receive_body() {
        const size_t end = std::min(receive->size(), body_count + kTurnBytes);
        return receive_more(socket, receive->data(), end, &body_count);
    }
    int send_some() {
        const size_t end = std::min(send->size(), sent_count + kTurnBytes);
        return send_more(socket, {{&header_out, sizeof header_out}, {send->data(), end}},
                         &sent_count);
    }
};

class TcpEngine : public Engine {
  public:
    TcpEngine(int rank, std::vector<Descriptor> sockets)
        : rank_(rank),
          rank_count_(static_cast<int>(sockets.size())),
          sockets_(std::move(sockets)) {}

    mep_status_t exchange(const std::vector<Parcel> &send, size_t bytes_max,
                          const Deadline &deadline, std::vector<bool> *with,
                          std::vector<Parcel> *receive) override;

  private:
    int begin(const std::vector<Parcel> &send, std::vector<bool> *with,
              std::vector<Parcel> *receive);
    std::string advance(Transfer *transfer, size_t bytes_max) const;
    std::string read_header(Transfer *transfer, size_t bytes_max) const;
    void take_out(int peer, const std::string &reason, std::vector<bool> *with);

    const int rank_;
    const int rank_count_;
    uint64_t sequence_ = 0;
    std::vector<Descriptor> sockets_;  // by rank; closed: that rank is not heard any more
    std::vector<Transfer> transfers_;  // by rank, of this exchange
    std::vector<pollfd> entries_;      // by rank; -1: done
};

mep_status_t TcpEngine::exchange(const std::vector<Parcel> &send, size_t bytes_max,
                                 const Deadline &deadline, std::vector<bool> *with,
                                 std::vector<Parcel> *receive) {
    const auto rank_count = static_cast<size_t>(rank_count_);
    if (send.size() != rank_count || with->size() != rank_count)
        return fail(MEP_INVALID_ARGUMENT, "an exchange of %zu parcels with %zu ranks, not %d",
                    send.size(), with->size(), rank_count_);
    ++sequence_;
    int pending_count = begin(send, with, receive);
    while (pending_count > 0) {
        // Also at the deadline once more: what is there by then counts.
        const bool is_last_turn = deadline.passed();
        wait_ready(entries_.data(), entries_.size(), deadline, kWaitStepMs);
        for (int peer = 0; peer < rank_count_; ++peer) {
            pollfd &entry = entries_[peer];
            if (entry.fd < 0 || (entry.revents == 0 && !is_last_turn)) continue;
            Transfer &transfer = transfers_[peer];
            std::string reason = advance(&transfer, bytes_max);
            entry.events = transfer.events();
            if (reason.empty() && entry.events != 0) {
                if (!is_last_turn) continue;
                reason = std::string("it did not ") + (transfer.is_received() ? "take" : "send") +
                         " all " + within_text(deadline);
            }
            if (!reason.empty()) take_out(peer, reason, with);
            entry.fd = -1;
            --pending_count;
        }
    }
    return MEP_OK;
}

// Says who takes part in `transfers_` and `entries_`, and returns how many these are.
int TcpEngine::begin(const std::vector<Parcel> &send, std::vector<bool> *with,
                     std::vector<Parcel> *receive) {
    receive->resize(rank_count_);
    transfers_.assign(rank_count_, Transfer());
    entries_.assign(rank_count_, {-1, 0, 0});
    int count = 0;
    for (int peer = 0; peer < rank_count_; ++peer) {
        Descriptor &socket = sockets_[peer];
        (*receive)[peer].clear();
        if (peer == rank_) continue;
        // A peer that the caller leaves out once does not come back in this group: what it sends
        // meanwhile would be taken for a part of a later exchange, and it would wait for what it is
        // not sent.
        if (!(*with)[peer]) socket.close();
        (*with)[peer] = socket.is_open();
        if (!socket.is_open()) continue;
        Transfer &transfer = transfers_[peer];
        transfer.socket = socket.number();
        transfer.header_out = {kHeaderMagic, sequence_, send[peer].size()};
        transfer.send = &send[peer];
        transfer.receive = &(*receive)[peer];
        entries_[peer] = {transfer.socket, transfer.events(), 0};
        ++count;
    }
    return count;
}

// Receives and sends what is possible now, up to kTurnBytes each. Returns why the peer is to be
// taken out, or nothing.
std::string TcpEngine::advance(Transfer *transfer, size_t bytes_max) const {
    int error = 0;
    const bool had_header = transfer->has_header();
    if (!had_header) error = transfer->receive_header();
    if (!had_header && transfer->has_header())
        if (std::string reason = read_header(transfer, bytes_max); !reason.empty()) return reason;
    if (error == 0 && transfer->has_header()) error = transfer->receive_body();
    if (error == 0 && !transfer->is_sent()) error = transfer->send_some();
    return error == 0 ? "" : socket_error_text(error);
}

std::string TcpEngine::read_header(Transfer *transfer, size_t bytes_max) const {
    const Header &header = transfer->header_in;
    if (header.magic != kHeaderMagic) return "it sent what makes no sense";
    if (header.sequence != sequence_)
        return "it is in exchange " + std::to_string(header.sequence) + ", this rank in " +
               std::to_string(sequence_);
    if (header.bytes > bytes_max)
        return "it sends " + std::to_string(header.bytes) + " bytes, of at most " +
               std::to_string(bytes_max);
    if (!resize(transfer->receive, header.bytes))
        return "there is no memory for its " + std::to_string(header.bytes) + " bytes";
    return "";
}

void TcpEngine::take_out(int peer, const std::string &reason, std::vector<bool> *with) {
    log(MEP_LOG_INFO, "rank %d takes rank %d of %d out of exchange %llu and all later ones: %s",
        rank_, peer, rank_count_, static_cast<unsigned long long>(sequence_), reason.c_str());
    sockets_[peer].close();
    (*with)[peer] = false;
    *transfers_[peer].receive = Parcel();  // also its memory
}

}  // namespace

mep_status_t engine_by_tcp(int rank, int rank_count, const char *address,
                           const AllGather &all_gather, const Deadline &deadline,
                           std::unique_ptr<Engine> *engine) {
    Descriptor listener;
    std::vector<Invitation> invitations(rank_count);
    EP_TRY(gather_invitations(address, all_gather, &listener, &invitations));
    Meeting meeting(rank, std::move(invitations), std::move(listener));
    std::vector<Descriptor> sockets;
    EP_TRY(meeting.hold(deadline, &sockets));
    *engine = std::make_unique<TcpEngine>(rank, std::move(sockets));
    return MEP_OK;
}

}  // namespace ep
