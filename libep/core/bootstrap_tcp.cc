// Rank 0 is the hub of the star; it has no thread of its own and serves the others while it is in a
// call. Every other rank is a spoke. What they say to each other is in bootstrap_tcp.h.
#include "core/bootstrap_tcp.h"

#include "base/deadline.h"
#include "base/log.h"
#include "base/socket.h"
#include "base/status.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <poll.h>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

namespace ep {
namespace {

// ---- Limits -------------------------------------------------------------------------------------

constexpr size_t kStrangerCountMax = 64;        // connections that have not said Hello yet
constexpr int64_t kHelloTimeoutUs = 3'000'000;  // of each of them
constexpr int kJoinStepMs = 100;                // how often strangers' time is looked at
constexpr int kWaitStepMs = 1000;
constexpr int64_t kConnectTimeoutUs = 5'000'000;  // of one attempt
constexpr int kRetryMsMin = 10;
constexpr int kRetryMsMax = 250;

// What a spoke waits beyond its deadline, so that the hub's better words arrive first; and what the
// hub spends at most to send them.
constexpr int64_t kGraceUs = 500'000;

int64_t remaining_us(const Deadline &deadline) {
    const auto left = std::chrono::duration_cast<std::chrono::microseconds>(deadline.end() -
                                                                            Deadline::Clock::now());
    return std::max<int64_t>(left.count(), 0);
}

// Of short timeouts a small part.
Deadline with_grace(const Deadline &deadline) {
    constexpr int64_t kShare = 20, kAlwaysUs = 20'000;
    if (deadline.never()) return deadline;
    const int64_t grace_us = std::min(kGraceUs, deadline.timeout_us() / kShare + kAlwaysUs);
    return Deadline(remaining_us(deadline) + grace_us);
}

std::string step_text(uint64_t sequence) {
    if (sequence == kJoinSequence) return "join";
    return "take part in all-gather " + std::to_string(sequence);
}

// Is the rank at the other end of a connection of this process's user, if it is on this machine?
mep_status_t check_user(int socket, int rank, const Admission &admission) {
    if (!admission.own_user) return MEP_OK;
    const std::optional<uint32_t> user = user_at_other_end(socket);
    if (!user.has_value() || *user == ::geteuid()) return MEP_OK;
    return fail(MEP_BOOTSTRAP_FAILED,
                "rank %d is of user %u of this machine, and this rank of user %u; if they belong "
                "together, set MOONCAKE_EP_SECRET to the same text for both",
                rank, *user, ::geteuid());
}

// ---- The hub ------------------------------------------------------------------------------------

// What rank 0 knows of another rank.
struct Peer {
    Descriptor socket;
    Request request = {};  // being received
    size_t request_count = 0;
    bool in_body = false;  // the request is complete, its bytes are being received
    size_t body_count = 0;
    bool arrived = false;  // joined, or its part of this all-gather is complete
    size_t sent_count = 0;
};

// A connection that has not said who it is.
struct Stranger {
    Descriptor socket;
    Hello hello = {};
    size_t hello_count = 0;
    Deadline deadline{kHelloTimeoutUs};
};

class Hub : public Bootstrap {
  public:
    Hub(int rank_count, const Admission &admission)
        : rank_count_(rank_count), admission_(admission), peers_(rank_count) {
        peers_[0].arrived = true;
    }

    mep_status_t join(Descriptor listener, const Deadline &deadline);

    mep_status_t all_gather(const void *send, void *receive, size_t bytes,
                            const Deadline &deadline) override;

  private:
    // Joining
    mep_status_t meet(int listener, const Deadline &deadline);
    mep_status_t take_strangers(int listener);
    void serve_strangers();
    bool is_done(Stranger *stranger);
    mep_status_t judge(const Hello &hello) const;
    void refuse(const Stranger &stranger, mep_status_t status);
    void accept(Stranger *stranger);

    // Gathering
    mep_status_t collect(size_t bytes, unsigned char *gathered, const Deadline &deadline);
    mep_status_t serve(int rank, size_t bytes, unsigned char *gathered);
    mep_status_t check_request(int rank, size_t bytes) const;
    mep_status_t give_up(const Peer &peer) const;
    mep_status_t answer(const void *gathered, size_t bytes, const Deadline &deadline);

    std::vector<int> send_to_all(const Reply &reply, const void *body, const Deadline &deadline);
    std::vector<int> missing_ranks() const;
    mep_status_t timed_out(int64_t timeout_us) const;
    mep_status_t lost(int rank, int error) const;
    mep_status_t break_off(mep_status_t status);

    const int rank_count_;
    const Admission admission_;
    uint64_t sequence_ = kJoinSequence;
    std::vector<Peer> peers_;          // by rank; [0] has no socket
    std::vector<Stranger> strangers_;  // oldest first
    std::string refusal_;              // the last one, to explain why a rank is missing
    Failure failure_;
};

mep_status_t Hub::join(Descriptor listener, const Deadline &deadline) {
    const mep_status_t status = meet(listener.number(), deadline);
    // Before anybody hears that all are there: a rank that then creates its next group must not
    // reach this listener again.
    strangers_.clear();
    listener.close();
    refusal_.clear();
    if (status != MEP_OK) return break_off(status);
    return answer(nullptr, 0, deadline);
}

// Returns when all ranks have joined. poll() sees, in this order: the listener, the ranks, the
// strangers.
mep_status_t Hub::meet(int listener, const Deadline &deadline) {
    while (!missing_ranks().empty()) {
        std::vector<pollfd> entries = {{listener, POLLIN, 0}};
        for (int rank = 1; rank < rank_count_; ++rank)
            entries.push_back({peers_[rank].socket.number(), POLLIN, 0});  // -1 is skipped
        for (const Stranger &stranger : strangers_)
            entries.push_back({stranger.socket.number(), POLLIN, 0});
        wait_ready(entries.data(), entries.size(), deadline, kJoinStepMs);
        for (int rank = 1; rank < rank_count_; ++rank)
            if (entries[rank].revents != 0) EP_TRY(serve(rank, 0, nullptr));
        serve_strangers();
        if (entries[0].revents != 0) EP_TRY(take_strangers(listener));
        if (deadline.passed() && !missing_ranks().empty()) return timed_out(deadline.timeout_us());
    }
    return MEP_OK;
}

// Mostly the Hello is already there, and the connection never counts as a stranger.
mep_status_t Hub::take_strangers(int listener) {
    for (size_t taken_count = 0; taken_count < kStrangerCountMax; ++taken_count) {
        Stranger stranger;
        const int error = accept_one(listener, &stranger.socket);
        if (error == EAGAIN || error == EWOULDBLOCK) return MEP_OK;
        if (error != 0) {
            // Out of descriptors or memory, perhaps because of strangers.
            if (strangers_.empty())
                return fail(MEP_SYSTEM_ERROR, "%s", system_error("accept", error).c_str());
            strangers_.erase(strangers_.begin());
            continue;
        }
        if (is_done(&stranger)) continue;
        // A rank that is pushed out here tries again; a flood of strangers cannot keep it out.
        if (strangers_.size() == kStrangerCountMax) strangers_.erase(strangers_.begin());
        strangers_.push_back(std::move(stranger));
    }
    return MEP_OK;
}

void Hub::serve_strangers() {
    strangers_.erase(std::remove_if(strangers_.begin(), strangers_.end(),
                                    [this](Stranger &stranger) { return is_done(&stranger); }),
                     strangers_.end());
}

// True if it has become a peer, or is to be forgotten.
bool Hub::is_done(Stranger *stranger) {
    const Hello &hello = stranger->hello;
    const int error = receive_more(stranger->socket.number(), &stranger->hello, sizeof hello,
                                   &stranger->hello_count);
    const size_t count = stranger->hello_count;
    if (count >= sizeof hello.magic && hello.magic != kHelloMagic) return true;  // not one of ours
    if (count >= offsetof(Hello, version) && hello.protocol != kProtocol) {
        refuse(*stranger, fail(MEP_MISMATCH, "protocol %u differs from rank 0's, %u",
                               hello.protocol, kProtocol));
        return true;
    }
    if (count < sizeof hello) return error != 0 || stranger->deadline.passed();
    mep_status_t status = judge(hello);
    if (status == MEP_OK) status = check_user(stranger->socket.number(), hello.rank, admission_);
    if (status != MEP_OK)
        refuse(*stranger, status);
    else
        accept(stranger);
    return true;
}

mep_status_t Hub::judge(const Hello &hello) const {
    if (hello.version != kVersion)
        return fail(MEP_MISMATCH, "library version %d of rank %d differs from rank 0's, %d",
                    hello.version, hello.rank, kVersion);
    if (!equal_secrets(hello.secret, admission_.secret))
        return fail(MEP_BOOTSTRAP_FAILED, "the secret of rank %d differs from rank 0's",
                    hello.rank);
    if (hello.rank_count != rank_count_)
        return fail(MEP_MISMATCH, "rank_count %d of rank %d differs from rank 0's, %d",
                    hello.rank_count, hello.rank, rank_count_);
    if (hello.rank < 0 || hello.rank >= rank_count_)
        return fail(MEP_BOOTSTRAP_FAILED, "rank %d is not in [0, %d)", hello.rank, rank_count_);
    if (peers_[hello.rank].arrived)
        return fail(MEP_BOOTSTRAP_FAILED, "rank %d of %d is taken", hello.rank, rank_count_);
    return MEP_OK;
}

void Hub::refuse(const Stranger &stranger, mep_status_t status) {
    refusal_ = last_error();
    log(MEP_LOG_WARNING, "rank 0 refused a connection: %s", refusal_.c_str());
    const Reply reply = {kReplyMagic, kJoinSequence, refusal_.size(), status, 0};
    // To a new connection this much can be sent at once; if not, it will just see the end of it.
    size_t sent_count = 0;
    send_more(stranger.socket.number(),
              {{&reply, sizeof reply}, {refusal_.data(), refusal_.size()}}, &sent_count);
}

void Hub::accept(Stranger *stranger) {
    Peer &peer = peers_[stranger->hello.rank];
    peer.socket = std::move(stranger->socket);
    peer.arrived = true;
    // If this fails, the connection is lost, and the next poll() says so.
    const Reply reply = {kReplyMagic, kJoinSequence, 0, MEP_OK, 0};
    size_t sent_count = 0;
    send_more(peer.socket.number(), {{&reply, sizeof reply}, {nullptr, 0}}, &sent_count);
}

mep_status_t Hub::all_gather(const void *send, void *receive, size_t bytes,
                             const Deadline &deadline) {
    EP_TRY(check_all_gather_bytes(bytes));
    if (failure_.any()) return failure_.report();
    ++sequence_;
    Bytes gathered;
    if (const mep_status_t status = allocate(rank_count_ * bytes, &gathered); status != MEP_OK)
        return break_off(status);
    if (bytes > 0) std::memcpy(gathered.get(), send, bytes);
    if (const mep_status_t status = collect(bytes, gathered.get(), deadline); status != MEP_OK)
        return break_off(status);
    EP_TRY(answer(gathered.get(), rank_count_ * bytes, deadline));
    if (bytes > 0) std::memcpy(receive, gathered.get(), rank_count_ * bytes);
    return MEP_OK;
}

mep_status_t Hub::collect(size_t bytes, unsigned char *gathered, const Deadline &deadline) {
    std::vector<pollfd> entries(rank_count_);
    for (int rank = 0; rank < rank_count_; ++rank) {
        peers_[rank].arrived = rank == 0;
        entries[rank] = {peers_[rank].socket.number(), POLLIN, 0};
    }
    while (!missing_ranks().empty()) {
        wait_ready(entries.data(), entries.size(), deadline, kWaitStepMs);
        // Those that have arrived, too: one that is lost now will not get its answer.
        for (int rank = 1; rank < rank_count_; ++rank)
            if (entries[rank].revents != 0) EP_TRY(serve(rank, bytes, gathered));
        if (deadline.passed() && !missing_ranks().empty()) return timed_out(deadline.timeout_us());
    }
    return MEP_OK;
}

// Takes what `rank` has sent. `gathered` is where the all-gather's `bytes` go.
mep_status_t Hub::serve(int rank, size_t bytes, unsigned char *gathered) {
    Peer &peer = peers_[rank];
    const int socket = peer.socket.number();
    if (!peer.in_body) {
        const int error =
            receive_more(socket, &peer.request, sizeof peer.request, &peer.request_count);
        if (error != 0) return lost(rank, error);
        if (peer.request_count < sizeof peer.request) return MEP_OK;
        peer.request_count = 0;
        if (peer.request.magic == kGiveUpMagic) return give_up(peer);
        EP_TRY(check_request(rank, bytes));
        peer.in_body = true;
        peer.body_count = 0;
    }
    const int error = receive_more(socket, gathered + rank * bytes, bytes, &peer.body_count);
    if (error != 0) return lost(rank, error);
    if (peer.body_count == bytes) {
        peer.in_body = false;
        peer.arrived = true;
    }
    return MEP_OK;
}

mep_status_t Hub::check_request(int rank, size_t bytes) const {
    const Peer &peer = peers_[rank];
    const Request &request = peer.request;
    // Having arrived, it has to wait for its answer.
    if (request.magic != kRequestMagic || request.sequence != sequence_ || peer.arrived ||
        request.bytes > MEP_ALL_GATHER_BYTES_MAX)
        return fail(MEP_BOOTSTRAP_FAILED, "rank %d of %d sent a message that makes no sense", rank,
                    rank_count_);
    if (request.bytes != bytes)
        return fail(MEP_MISMATCH, "rank %d gathers %zu bytes, but rank 0 gathers %zu", rank,
                    static_cast<size_t>(request.bytes), bytes);
    return MEP_OK;
}

mep_status_t Hub::give_up(const Peer &peer) const {
    // Of an earlier all-gather: its answer crossed this on the way.
    if (peer.request.sequence < sequence_) return MEP_OK;
    return timed_out(static_cast<int64_t>(peer.request.bytes));
}

// It counts here as it does for the ranks that were answered already; the next step fails for all.
mep_status_t Hub::answer(const void *gathered, size_t bytes, const Deadline &deadline) {
    const Reply reply = {kReplyMagic, sequence_, bytes, MEP_OK, 0};
    const std::vector<int> unreached = send_to_all(reply, gathered, with_grace(deadline));
    if (!unreached.empty())
        break_off(fail(MEP_BOOTSTRAP_FAILED,
                       "%s: the connection was lost before the answer was sent",
                       ranks_text(unreached, rank_count_).c_str()));
    return MEP_OK;
}

// Returns the ranks that did not get all of it. Their connections are closed, because nothing that
// could be sent after a part of a message would be understood.
std::vector<int> Hub::send_to_all(const Reply &reply, const void *body, const Deadline &deadline) {
    const Message message = {{&reply, sizeof reply}, {body, static_cast<size_t>(reply.bytes)}};
    std::vector<int> unreached;
    std::vector<pollfd> entries(rank_count_, {-1, POLLOUT, 0});
    int open_count = 0;
    for (int rank = 1; rank < rank_count_; ++rank) {
        peers_[rank].sent_count = 0;
        entries[rank].fd = peers_[rank].socket.number();
        entries[rank].revents = POLLOUT;  // mostly it fits at once
        if (peers_[rank].socket.is_open()) ++open_count;
    }
    while (open_count > 0) {
        const bool is_last_try = deadline.passed();
        for (int rank = 1; rank < rank_count_; ++rank) {
            Peer &peer = peers_[rank];
            if (entries[rank].fd < 0 || (entries[rank].revents == 0 && !is_last_try)) continue;
            const int error = send_more(peer.socket.number(), message, &peer.sent_count);
            const bool is_sent = peer.sent_count == message.size();
            if (!is_sent && error == 0 && !is_last_try) continue;
            if (!is_sent) {
                unreached.push_back(rank);
                peer.socket.close();
            }
            entries[rank].fd = -1;
            --open_count;
        }
        if (open_count > 0) wait_ready(entries.data(), entries.size(), deadline, kWaitStepMs);
    }
    return unreached;
}

std::vector<int> Hub::missing_ranks() const {
    std::vector<int> missing;
    for (int rank = 1; rank < rank_count_; ++rank)
        if (!peers_[rank].arrived) missing.push_back(rank);
    return missing;
}

mep_status_t Hub::timed_out(int64_t timeout_us) const {
    return fail(MEP_TIMEOUT, "%s did not %s within %.1f s%s%s",
                ranks_text(missing_ranks(), rank_count_).c_str(), step_text(sequence_).c_str(),
                seconds(timeout_us), refusal_.empty() ? "" : "; last refused: ", refusal_.c_str());
}

mep_status_t Hub::lost(int rank, int error) const {
    return fail(MEP_BOOTSTRAP_FAILED, "rank %d of %d left or was lost: %s", rank, rank_count_,
                socket_error_text(error).c_str());
}

// Fails the group on every rank that can still hear it.
mep_status_t Hub::break_off(mep_status_t status) {
    failure_.keep(status);
    const std::string &text = failure_.text();
    const Reply reply = {kReplyMagic, sequence_, text.size(), status, 0};
    send_to_all(reply, text.data(), Deadline(kGraceUs));
    return status;
}

// ---- A spoke ------------------------------------------------------------------------------------

// An answer of the hub, as far as it has come.
struct Answer {
    Reply reply = {};
    size_t reply_count = 0;
    char text[kErrorTextMax + 1] = "";
    size_t body_count = 0;
    bool is_complete = false;
};

class Spoke : public Bootstrap {
  public:
    Spoke(Descriptor socket, Membership membership)
        : membership_(membership), socket_(std::move(socket)) {}

    // Says who we are; returns when the hub has accepted it.
    mep_status_t greet(const Secret &secret, const Deadline &deadline);
    // The connection ended before the hub had said anything: it may be worth another try.
    bool is_unheard() const { return is_unheard_; }
    // Once it has, as only then it is known whose it is.
    mep_status_t check_hub(const Admission &admission);
    // Returns when all ranks have joined.
    mep_status_t await_all(const Deadline &deadline);

    mep_status_t all_gather(const void *send, void *receive, size_t bytes,
                            const Deadline &deadline) override;

  private:
    mep_status_t converse(const Message &message, unsigned char *body, const Deadline &deadline);
    int receive_answer(Answer *answer, unsigned char *body) const;
    bool is_expected(const Reply &reply) const;
    mep_status_t conclude(Answer *answer);
    mep_status_t lost(int error);
    mep_status_t timed_out(const Deadline &deadline);
    void give_up(const Deadline &deadline) const;
    mep_status_t end(mep_status_t status);

    const Membership membership_;
    Descriptor socket_;
    uint64_t sequence_ = kJoinSequence;
    size_t answer_bytes_ = 0;  // that the hub is to answer with
    bool is_unheard_ = false;
    Failure failure_;
};

mep_status_t Spoke::greet(const Secret &secret, const Deadline &deadline) {
    const Hello hello = {kHelloMagic, kProtocol, kVersion, membership_.rank, membership_.rank_count,
                         secret};
    return converse({{&hello, sizeof hello}, {nullptr, 0}}, nullptr, deadline);
}

mep_status_t Spoke::check_hub(const Admission &admission) {
    const mep_status_t status = check_user(socket_.number(), 0, admission);
    return status == MEP_OK ? MEP_OK : end(status);
}

mep_status_t Spoke::await_all(const Deadline &deadline) {
    return converse({{nullptr, 0}, {nullptr, 0}}, nullptr, deadline);
}

mep_status_t Spoke::all_gather(const void *send, void *receive, size_t bytes,
                               const Deadline &deadline) {
    EP_TRY(check_all_gather_bytes(bytes));
    if (failure_.any()) return failure_.report();
    ++sequence_;
    answer_bytes_ = membership_.rank_count * bytes;
    Bytes gathered;
    if (const mep_status_t status = allocate(answer_bytes_, &gathered); status != MEP_OK)
        return end(status);
    const Request request = {kRequestMagic, sequence_, bytes};
    EP_TRY(converse({{&request, sizeof request}, {send, bytes}}, gathered.get(), deadline));
    if (bytes > 0) std::memcpy(receive, gathered.get(), answer_bytes_);
    return MEP_OK;
}

// Sends `message` and waits for its answer, whose bytes go to `body`.
mep_status_t Spoke::converse(const Message &message, unsigned char *body,
                             const Deadline &deadline) {
    const Deadline last = with_grace(deadline);
    Answer answer;
    size_t sent_count = 0;
    bool has_given_up = false;
    bool can_send = true;
    for (;;) {
        const bool is_sent = sent_count == message.size();
        const int events = POLLIN | (is_sent || !can_send ? 0 : POLLOUT);
        pollfd entry = {socket_.number(), static_cast<short>(events), 0};
        wait_ready(&entry, 1, has_given_up ? last : deadline, kWaitStepMs);
        // A hub that has gone may have said why before, so go on to read.
        if (!is_sent && can_send) can_send = send_more(socket_.number(), message, &sent_count) == 0;
        if (const int error = receive_answer(&answer, body); error != 0) {
            is_unheard_ = answer.reply_count == 0;
            return lost(error);
        }
        if (answer.is_complete) return conclude(&answer);
        if (last.passed() || (deadline.passed() && sent_count < message.size()))
            return timed_out(deadline);
        if (deadline.passed() && !has_given_up) {
            give_up(deadline);
            has_given_up = true;
        }
    }
}

int Spoke::receive_answer(Answer *answer, unsigned char *body) const {
    const int socket = socket_.number();
    Reply &reply = answer->reply;
    if (const int error = receive_more(socket, &reply, sizeof reply, &answer->reply_count);
        error != 0)
        return error;
    if (answer->reply_count < sizeof reply) return 0;
    if (!is_expected(reply)) return EBADMSG;
    void *to = reply.status == MEP_OK ? static_cast<void *>(body) : answer->text;
    if (const int error = receive_more(socket, to, reply.bytes, &answer->body_count); error != 0)
        return error;
    answer->is_complete = answer->body_count == reply.bytes;
    return 0;
}

bool Spoke::is_expected(const Reply &reply) const {
    if (reply.magic != kReplyMagic) return false;
    // An error may be one of an earlier step, that we did not wait for.
    if (reply.status != MEP_OK) return reply.status < 0 && reply.bytes <= kErrorTextMax;
    return reply.sequence == sequence_ && reply.bytes == answer_bytes_;
}

mep_status_t Spoke::conclude(Answer *answer) {
    if (answer->reply.status == MEP_OK) return MEP_OK;
    return end(fail(known_failure(answer->reply.status), "%s", printable(answer->text).c_str()));
}

mep_status_t Spoke::lost(int error) {
    return end(fail(MEP_BOOTSTRAP_FAILED, "rank 0 of %d left or was lost: %s",
                    membership_.rank_count, socket_error_text(error).c_str()));
}

mep_status_t Spoke::timed_out(const Deadline &deadline) {
    return end(fail(MEP_TIMEOUT, "rank 0 of %d did not %s within %.1f s", membership_.rank_count,
                    step_text(sequence_).c_str(), seconds(deadline.timeout_us())));
}

// Asks the hub to name the ranks that we wait for in vain.
void Spoke::give_up(const Deadline &deadline) const {
    const Request request = {kGiveUpMagic, sequence_, static_cast<uint64_t>(deadline.timeout_us())};
    size_t sent_count = 0;
    send_more(socket_.number(), {{&request, sizeof request}, {nullptr, 0}}, &sent_count);
}

// Closing the connection tells the hub, and so the others, that this rank takes part no more.
mep_status_t Spoke::end(mep_status_t status) {
    failure_.keep(status);
    socket_.close();
    return status;
}

}  // namespace

mep_status_t tcp_host(Descriptor listener, int rank_count, const Admission &admission,
                      const Deadline &deadline, std::unique_ptr<Bootstrap> *bootstrap) {
    auto hub = std::make_unique<Hub>(rank_count, admission);
    EP_TRY(hub->join(std::move(listener), deadline));
    *bootstrap = std::move(hub);
    return MEP_OK;
}

mep_status_t tcp_join(Endpoint hub, Membership membership, const Admission &admission,
                      const Deadline &deadline, std::unique_ptr<Bootstrap> *bootstrap) {
    int pause_ms = kRetryMsMin;
    for (;;) {
        Descriptor socket;
        const int error = connect_to(hub, deadline.within(kConnectTimeoutUs), &socket);
        if (error == 0) {
            auto spoke = std::make_unique<Spoke>(std::move(socket), membership);
            const mep_status_t status = spoke->greet(admission.secret, deadline);
            if (status == MEP_OK) {
                EP_TRY(spoke->check_hub(admission));
                EP_TRY(spoke->await_all(deadline));
                *bootstrap = std::move(spoke);
                return MEP_OK;
            }
            if (!spoke->is_unheard()) return status;
        }
        if (is_shortage(error))
            return fail(MEP_SYSTEM_ERROR, "%s", system_error("connect", error).c_str());
        // Rank 0 may start late.
        if (deadline.passed())
            return fail(MEP_TIMEOUT,
                        "rank 0 of %d, at %s, did not accept rank %d within %.1f s: %s",
                        membership.rank_count, endpoint_text(hub).c_str(), membership.rank,
                        seconds(deadline.timeout_us()),
                        socket_error_text(error == 0 ? kEndOfStream : error).c_str());
        wait_ready(nullptr, 0, deadline, pause_ms);
        pause_ms = std::min(2 * pause_ms, kRetryMsMax);
    }
}

}  // namespace ep
