// What bootstrap.cc (who meets whom, and where) and bootstrap_tcp.cc (the star of connections)
// share.
#pragma once

#include "base/deadline.h"
#include "base/meeting.h"
#include "base/socket.h"
#include "base/status.h"
#include "core/bootstrap.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ep {

// The first failure of a bootstrap. It stays, so that later calls fail at once and with the same
// words.
class Failure {
  public:
    bool any() const { return status_ != MEP_OK; }
    const std::string &text() const { return text_; }
    // Takes over what fail() has just returned and worded.
    mep_status_t keep(mep_status_t status) {
        set(status, last_error());
        return status;
    }
    // For a destructor: it must not replace the caller's last error.
    void set(mep_status_t status, std::string text) {
        status_ = status;
        text_ = std::move(text);
    }
    mep_status_t report() const { return fail(status_, "%s", text_.c_str()); }

  private:
    mep_status_t status_ = MEP_OK;
    std::string text_;
};

// Of an all-gather: up to a GiB, so a lack of memory is an answer and not an exception.
using Bytes = std::unique_ptr<unsigned char[]>;
mep_status_t allocate(size_t size, Bytes *bytes);

mep_status_t check_membership(Membership membership);
mep_status_t check_all_gather_bytes(size_t bytes);

inline double seconds(int64_t microseconds) {
    return static_cast<double>(microseconds) * 1e-6;
}

// ---- What travels -------------------------------------------------------------------------------
//
// A star: rank 0 is the hub, every other rank holds one connection to it for the group's life.
//
//   join        spoke: Hello                hub: Reply "accepted", and when all are there, one more
//   all-gather  spoke: Request, its bytes   hub: Reply, the bytes of all ranks
//
// A Reply that carries an error ends it for that rank, at any point; its body is the text. A spoke
// at its deadline sends a Request "giving up": the hub, if it is in the call, then fails all ranks
// with the names of those that are missing, which only the hub knows. Integers are in the order of
// the machine; between machines that differ in it, the magic differs.

constexpr uint64_t kHelloMagic = 0x48454c4c4f50454dU;
constexpr uint64_t kRequestMagic = 0x474154484552504dU;
constexpr uint64_t kGiveUpMagic = 0x474956455550504dU;
constexpr uint64_t kReplyMagic = 0x5245504c5950454dU;
constexpr uint32_t kProtocol = 1;
constexpr int32_t kVersion =
    MEP_VERSION_MAJOR * 10000 + MEP_VERSION_MINOR * 100 + MEP_VERSION_PATCH;
constexpr size_t kErrorTextMax = 1024;

// Magic and protocol, and all of Reply, stay as they are in every later protocol, so that two
// versions can tell each other so.
struct Hello {
    uint64_t magic;
    uint32_t protocol;
    int32_t version;
    int32_t rank;
    int32_t rank_count;
    Secret secret;
};
static_assert(sizeof(Hello) == 56, "no padding travels");

constexpr uint64_t kJoinSequence = 0;  // the first all-gather is number 1

struct Request {
    uint64_t magic;
    uint64_t sequence;
    uint64_t bytes;  // that follow; giving up: the timeout in microseconds, and none follow
};
static_assert(sizeof(Request) == 24, "no padding travels");

struct Reply {
    uint64_t magic;
    uint64_t sequence;
    uint64_t bytes;  // that follow: of all ranks, or of the error's text
    int32_t status;
    int32_t reserved;
};
static_assert(sizeof(Reply) == 32, "no padding travels");

// ---- The two ends -------------------------------------------------------------------------------

// Connections that may wait on a listener before rank 0 takes them.
constexpr int kListenBacklog = MEP_RANK_COUNT_MAX;

// Who may join: whoever knows the secret. With `own_user`, for a secret that everybody knows,
// others on this machine than this process's user may not.
struct Admission {
    Secret secret;
    bool own_user;
};

// Rank 0: returns when all other ranks have joined over `listener`, which is closed then.
mep_status_t tcp_host(Descriptor listener, int rank_count, const Admission &admission,
                      const Deadline &deadline, std::unique_ptr<Bootstrap> *bootstrap);

// Any other rank: returns when all ranks have joined rank 0, which listens at `hub` or soon will.
mep_status_t tcp_join(Endpoint hub, Membership membership, const Admission &admission,
                      const Deadline &deadline, std::unique_ptr<Bootstrap> *bootstrap);

}  // namespace ep
