// Who meets whom, and where: the caller's callback, one rank alone, threads of one process, and the
// two ways to find rank 0 over TCP. The connections themselves are in bootstrap_tcp.cc.
#include "core/bootstrap.h"

#include "base/deadline.h"
#include "base/env.h"
#include "base/socket.h"
#include "base/status.h"
#include "core/bootstrap_tcp.h"

#include <cerrno>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <mutex>
#include <netdb.h>
#include <netinet/in.h>
#include <new>
#include <string>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>

namespace ep {

mep_status_t check_membership(Membership membership) {
    if (membership.rank_count < 1 || membership.rank_count > MEP_RANK_COUNT_MAX)
        return fail(MEP_INVALID_ARGUMENT, "rank_count %d is not in [1, %d]", membership.rank_count,
                    MEP_RANK_COUNT_MAX);
    if (membership.rank < 0 || membership.rank >= membership.rank_count)
        return fail(MEP_INVALID_ARGUMENT, "rank %d is not in [0, %d)", membership.rank,
                    membership.rank_count);
    return MEP_OK;
}

mep_status_t check_all_gather_bytes(size_t bytes) {
    if (bytes > MEP_ALL_GATHER_BYTES_MAX)
        return fail(MEP_INVALID_ARGUMENT, "bytes %zu of the all-gather is not in [0, %d]", bytes,
                    MEP_ALL_GATHER_BYTES_MAX);
    return MEP_OK;
}

mep_status_t allocate(size_t size, Bytes *bytes) {
    bytes->reset(new (std::nothrow) unsigned char[size]);
    if (*bytes == nullptr)
        return fail(MEP_OUT_OF_MEMORY, "no memory for the %zu bytes of an all-gather", size);
    return MEP_OK;
}

namespace {

// ---- The caller's callback, and one rank alone --------------------------------------------------

class CallbackBootstrap : public Bootstrap {
  public:
    CallbackBootstrap(mep_all_gather_callback_t callback, void *context)
        : callback_(callback), context_(context) {}

    mep_status_t all_gather(const void *send, void *receive, size_t bytes,
                            const Deadline &) override {
        EP_TRY(check_all_gather_bytes(bytes));
        if (failure_.any()) return failure_.report();
        const int32_t result = callback_(context_, send, receive, bytes);
        if (result == 0) return MEP_OK;
        return failure_.keep(fail(MEP_BOOTSTRAP_FAILED,
                                  "the all_gather callback returned %d for %zu bytes", result,
                                  bytes));
    }

  private:
    mep_all_gather_callback_t callback_;
    void *context_;
    Failure failure_;
};

class AloneBootstrap : public Bootstrap {
  public:
    mep_status_t all_gather(const void *send, void *receive, size_t bytes,
                            const Deadline &) override {
        EP_TRY(check_all_gather_bytes(bytes));
        if (bytes > 0) std::memmove(receive, send, bytes);
        return MEP_OK;
    }
};

// ---- Threads of one process ---------------------------------------------------------------------

// One all-gather. Each rank that takes part holds it until it has read the result, so the next one
// can begin, with an Exchange of its own, while slow ranks still read this one.
struct Exchange {
    explicit Exchange(int rank_count) : arrived(rank_count) {}

    size_t bytes = 0;
    int first_rank = 0;  // it said how many bytes
    std::vector<char> arrived;
    int arrived_count = 0;
    Bytes data;  // final once all have arrived
};

// The ranks of one group.
struct Meeting {
    explicit Meeting(int rank_count) : joined(rank_count) {}

    std::vector<char> joined;
    int joined_count = 0;
    Failure failure;
    std::shared_ptr<Exchange> exchange;  // the one that not all have reached yet
};

struct World {
    explicit World(int count) : rank_count(count), present(count) {}

    const int rank_count;
    std::mutex mutex;  // guards everything below, and all meetings
    std::condition_variable changed;
    std::vector<char> present;  // ranks that belong to a meeting now
    std::shared_ptr<Meeting> newest;
};

class WorldBootstrap : public Bootstrap {
  public:
    WorldBootstrap(int rank, std::shared_ptr<World> world, std::shared_ptr<Meeting> meeting)
        : rank_(rank), world_(std::move(world)), meeting_(std::move(meeting)) {}

    ~WorldBootstrap() override;

    mep_status_t all_gather(const void *send, void *receive, size_t bytes,
                            const Deadline &deadline) override;

  private:
    mep_status_t arrive(const void *send, size_t bytes, std::shared_ptr<Exchange> *exchange);
    mep_status_t await_all(const Exchange &exchange, const Deadline &deadline,
                           std::unique_lock<std::mutex> *lock);
    mep_status_t break_off(mep_status_t status);

    const int rank_;
    const std::shared_ptr<World> world_;
    const std::shared_ptr<Meeting> meeting_;
};

WorldBootstrap::~WorldBootstrap() {
    const std::lock_guard<std::mutex> lock(world_->mutex);
    world_->present[rank_] = 0;
    if (meeting_->failure.any()) return;
    meeting_->failure.set(MEP_BOOTSTRAP_FAILED,
                          ranks_text({rank_}, world_->rank_count) + " left the group");
    world_->changed.notify_all();
}

// Fails the meeting for all its ranks. The mutex is held.
mep_status_t WorldBootstrap::break_off(mep_status_t status) {
    meeting_->failure.keep(status);
    world_->changed.notify_all();
    return status;
}

mep_status_t WorldBootstrap::all_gather(const void *send, void *receive, size_t bytes,
                                        const Deadline &deadline) {
    EP_TRY(check_all_gather_bytes(bytes));
    std::shared_ptr<Exchange> exchange;
    {
        std::unique_lock<std::mutex> lock(world_->mutex);
        EP_TRY(arrive(send, bytes, &exchange));
        EP_TRY(await_all(*exchange, deadline, &lock));
    }
    if (bytes > 0) std::memcpy(receive, exchange->data.get(), world_->rank_count * bytes);
    return MEP_OK;
}

// Puts this rank's bytes into the exchange that is under way, or begins one. The mutex is held.
mep_status_t WorldBootstrap::arrive(const void *send, size_t bytes,
                                    std::shared_ptr<Exchange> *exchange) {
    Meeting &meeting = *meeting_;
    if (meeting.failure.any()) return meeting.failure.report();
    if (meeting.exchange == nullptr) {
        auto begun = std::make_shared<Exchange>(world_->rank_count);
        begun->bytes = bytes;
        begun->first_rank = rank_;
        if (const mep_status_t status = allocate(world_->rank_count * bytes, &begun->data);
            status != MEP_OK)
            return break_off(status);
        meeting.exchange = std::move(begun);
    }
    *exchange = meeting.exchange;
    Exchange &ours = **exchange;
    if (ours.bytes != bytes)
        return break_off(fail(MEP_MISMATCH, "rank %d gathers %zu bytes, but rank %d gathers %zu",
                              rank_, bytes, ours.first_rank, ours.bytes));
    if (bytes > 0) std::memcpy(ours.data.get() + rank_ * bytes, send, bytes);
    ours.arrived[rank_] = 1;
    if (++ours.arrived_count == world_->rank_count) {
        meeting.exchange = nullptr;
        world_->changed.notify_all();
    }
    return MEP_OK;
}

mep_status_t WorldBootstrap::await_all(const Exchange &exchange, const Deadline &deadline,
                                       std::unique_lock<std::mutex> *lock) {
    // A complete exchange counts even if the group has failed since: a fast rank may have left.
    while (exchange.arrived_count < world_->rank_count) {
        if (meeting_->failure.any()) return meeting_->failure.report();
        if (deadline.passed()) {
            std::vector<int> missing;
            for (int rank = 0; rank < world_->rank_count; ++rank)
                if (!exchange.arrived[rank]) missing.push_back(rank);
            return break_off(fail(
                MEP_TIMEOUT, "%s did not take part in an all-gather within %.1f s",
                ranks_text(missing, world_->rank_count).c_str(), seconds(deadline.timeout_us())));
        }
        if (deadline.never())
            world_->changed.wait(*lock);
        else
            world_->changed.wait_until(*lock, deadline.end());
    }
    return MEP_OK;
}

// The newest meeting, or a new one if that is full or has failed: so after a failure, ranks can
// meet again in the same world.
std::shared_ptr<Meeting> meeting_to_join(World *world) {
    const std::shared_ptr<Meeting> &newest = world->newest;
    if (newest == nullptr || newest->failure.any() || newest->joined_count == world->rank_count)
        world->newest = std::make_shared<Meeting>(world->rank_count);
    return world->newest;
}

// ---- The unique id ------------------------------------------------------------------------------

constexpr uint64_t kIdMagic = 0x44492d50454d0a1aU;
constexpr uint32_t kIdVersion = 1;

// What the 128 bytes hold. The last fields but one let the process that made the id find its
// listener again, without a table of ids, and be sure that it is the same one.
struct IdContent {
    uint64_t magic;
    uint32_t version;
    uint32_t ipv4;  // in network order
    uint16_t port;
    uint16_t reserved;
    int32_t process_id;
    uint64_t process_nonce;
    uint64_t listener_inode;
    int32_t listener;
    uint32_t reserved_too;
    Secret secret;
    uint8_t unused[40];
    uint64_t checksum;  // of all bytes before it
};
static_assert(sizeof(IdContent) == MEP_UNIQUE_ID_BYTES, "an id is the bytes of its content");

constexpr uint64_t kHashStart = 0xcbf29ce484222325U;

// FNV-1a. Against accidents, not against attackers.
uint64_t hash(const void *data, size_t size, uint64_t start) {
    uint64_t value = start;
    for (size_t i = 0; i < size; ++i)
        value = (value ^ static_cast<const unsigned char *>(data)[i]) * 0x100000001b3U;
    return value;
}

uint64_t checksum(const IdContent &content) {
    return hash(&content, offsetof(IdContent, checksum), kHashStart);
}

// Tells this process from a later one that was given the same process id, or one of another
// container.
uint64_t process_nonce() {
    static const uint64_t the_nonce = [] {
        uint64_t value = 0;
        return fill_random(&value, sizeof value) ? value : 0;
    }();
    return the_nonce;
}

// Of a socket: unique among all sockets of this kernel, so it betrays a reused descriptor. 0: none.
uint64_t inode(int descriptor) {
    struct stat facts;
    return ::fstat(descriptor, &facts) == 0 ? static_cast<uint64_t>(facts.st_ino) : 0;
}

bool is_intact(const IdContent &id) {
    return id.magic == kIdMagic && id.checksum == checksum(id);
}

bool is_of_this_process(const IdContent &id) {
    return id.process_id == ::getpid() && id.process_nonce == process_nonce();
}

// False also if the descriptor was closed, or was closed and then given to something else.
bool is_listening(const IdContent &id) {
    Endpoint local = {};
    int listens = 0;
    socklen_t size = sizeof listens;
    return inode(id.listener) == id.listener_inode && local_endpoint(id.listener, &local) == 0 &&
           local.ipv4 == id.ipv4 && local.port == id.port &&
           ::getsockopt(id.listener, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0 &&
           listens != 0;
}

mep_status_t read_id(const mep_unique_id_t &id, IdContent *content) {
    std::memcpy(content, id.bytes, sizeof *content);
    if (!is_intact(*content))
        return fail(MEP_INVALID_ARGUMENT,
                    "the unique id is damaged, or was not made by mep_unique_id_create");
    if (content->version != kIdVersion)
        return fail(MEP_INVALID_ARGUMENT, "the unique id has format %u; this version reads %u",
                    content->version, kIdVersion);
    return MEP_OK;
}

// Moves the listener to a descriptor that the id does not name, so that nobody closes it under us.
mep_status_t adopt_listener(const IdContent &id, Descriptor *listener) {
    if (!is_of_this_process(id))
        return fail(MEP_INVALID_ARGUMENT,
                    "rank 0 must be in the process that called mep_unique_id_create (that is "
                    "process %d, this is %d)",
                    id.process_id, static_cast<int>(::getpid()));
    if (!is_listening(id))
        return fail(MEP_INVALID_ARGUMENT, "this unique id was already used, or destroyed");
    Descriptor original(id.listener);
    Descriptor ours(::fcntl(original.number(), F_DUPFD_CLOEXEC, 0));
    if (!ours.is_open())
        return fail(MEP_SYSTEM_ERROR, "%s", system_error("fcntl(F_DUPFD_CLOEXEC)", errno).c_str());
    *listener = std::move(ours);
    return MEP_OK;
}

// ---- The environment ----------------------------------------------------------------------------

struct Environment {
    Membership membership;
    std::string address;  // empty if WORLD_SIZE is 1
    long port;
};

mep_status_t read_port(long *port) {
    constexpr long kPortMax = 65535;
    long master_port = 0;
    long offset = 0;
    EP_TRY(env_integer("MASTER_PORT", 1, kPortMax, 0, &master_port));
    EP_TRY(env_integer("MOONCAKE_EP_PORT_OFFSET", -kPortMax, kPortMax, 1, &offset));
    *port = master_port + offset;
    if (*port < 1 || *port > kPortMax)
        return fail(MEP_INVALID_ARGUMENT,
                    "MASTER_PORT %ld + MOONCAKE_EP_PORT_OFFSET %ld is not a port in [1, %ld]",
                    master_port, offset, kPortMax);
    return MEP_OK;
}

mep_status_t read_environment(Environment *environment) {
    std::vector<const char *> needed = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"};
    if (env_text("WORLD_SIZE") == "1") needed.resize(2);
    std::string missing;
    for (const char *name : needed)
        if (env_text(name).empty()) missing += (missing.empty() ? "" : ", ") + std::string(name);
    if (!missing.empty())
        return fail(MEP_INVALID_ARGUMENT,
                    "the config names no all_gather, unique_id or world, and of the environment's "
                    "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT these are not set: %s",
                    missing.c_str());
    long rank = 0;
    long rank_count = 0;
    EP_TRY(env_integer("WORLD_SIZE", 1, MEP_RANK_COUNT_MAX, 0, &rank_count));
    EP_TRY(env_integer("RANK", 0, rank_count - 1, 0, &rank));
    environment->membership = {static_cast<int>(rank), static_cast<int>(rank_count)};
    if (rank_count == 1) return MEP_OK;
    environment->address = env_text("MASTER_ADDR");
    return read_port(&environment->port);
}

// A text of any length as 32 bytes; also of none.
Secret secret_from_text(const std::string &text) {
    Secret secret = {};
    for (size_t at = 0; at < sizeof secret.bytes; at += sizeof(uint64_t)) {
        const uint64_t part = hash(text.data(), text.size(), kHashStart + at);
        std::memcpy(secret.bytes + at, &part, sizeof part);
    }
    return secret;
}

constexpr int kRetryMs = 50;

void pause_before_retry(const Deadline &deadline) {
    wait_ready(nullptr, 0, deadline, kRetryMs);
}

mep_status_t resolve_master(const std::string &host, const Deadline &deadline, uint32_t *ipv4) {
    for (;;) {
        const int error = resolve_ipv4(host, ipv4);
        if (error == 0) return MEP_OK;
        // The name service itself may come up late.
        if (error != EAI_AGAIN || deadline.passed())
            return fail(MEP_INVALID_ARGUMENT, "MASTER_ADDR \"%s\": %s", host.c_str(),
                        ::gai_strerror(error));
        pause_before_retry(deadline);
    }
}

mep_status_t listen_for_peers(Endpoint endpoint, const Deadline &deadline, Descriptor *listener) {
    for (;;) {
        const int error = open_listener(endpoint, kListenBacklog, listener);
        if (error == 0) return MEP_OK;
        // An earlier group of this job may be about to stop listening there.
        if (error != EADDRINUSE || deadline.passed())
            return fail(MEP_SYSTEM_ERROR,
                        "rank 0 cannot listen at %s (MASTER_ADDR, and MASTER_PORT + "
                        "MOONCAKE_EP_PORT_OFFSET): %s",
                        endpoint_text(endpoint).c_str(), socket_error_text(error).c_str());
        pause_before_retry(deadline);
    }
}

}  // namespace
}  // namespace ep

// The opaque type of the header. Members share the state, so it may be destroyed before them.
struct mep_world {
    std::shared_ptr<ep::World> shared;
};

namespace ep {

// ---- What bootstrap.h declares ------------------------------------------------------------------

mep_status_t bootstrap_from_callback(Membership membership, mep_all_gather_callback_t callback,
                                     void *context, std::unique_ptr<Bootstrap> *bootstrap) {
    EP_TRY(check_membership(membership));
    if (callback == nullptr) return fail(MEP_INVALID_ARGUMENT, "all_gather is NULL");
    *bootstrap = std::make_unique<CallbackBootstrap>(callback, context);
    return MEP_OK;
}

std::unique_ptr<Bootstrap> bootstrap_alone() {
    return std::make_unique<AloneBootstrap>();
}

mep_status_t world_create(int rank_count, mep_world_t **world) {
    EP_TRY(check_membership({0, rank_count}));
    if (world == nullptr) return fail(MEP_INVALID_ARGUMENT, "world is NULL");
    *world = new mep_world{std::make_shared<World>(rank_count)};
    return MEP_OK;
}

void world_destroy(mep_world_t *world) {
    delete world;
}

mep_status_t bootstrap_from_world(Membership membership, mep_world_t *world,
                                  std::unique_ptr<Bootstrap> *bootstrap) {
    if (world == nullptr) return fail(MEP_INVALID_ARGUMENT, "world is NULL");
    EP_TRY(check_membership(membership));
    const std::shared_ptr<World> shared = world->shared;
    if (membership.rank_count != shared->rank_count)
        return fail(MEP_INVALID_ARGUMENT,
                    "rank_count is %d, but the world was created for %d ranks",
                    membership.rank_count, shared->rank_count);
    std::shared_ptr<Meeting> meeting;
    {
        const std::lock_guard<std::mutex> lock(shared->mutex);
        if (shared->present[membership.rank])
            return fail(MEP_BOOTSTRAP_FAILED,
                        "rank %d of this world is taken: it already is in a group",
                        membership.rank);
        meeting = meeting_to_join(shared.get());
        shared->present[membership.rank] = 1;
        meeting->joined[membership.rank] = 1;
        ++meeting->joined_count;
    }
    *bootstrap = std::make_unique<WorldBootstrap>(membership.rank, shared, std::move(meeting));
    return MEP_OK;
}

mep_status_t unique_id_create(const char *address, mep_unique_id_t *id) {
    if (id == nullptr) return fail(MEP_INVALID_ARGUMENT, "id is NULL");
    const std::string host = address == nullptr ? "127.0.0.1" : address;
    Endpoint endpoint = {};
    Descriptor listener;
    EP_TRY(listen_at(host, kListenBacklog, &endpoint, &listener));

    IdContent content = {};
    content.magic = kIdMagic;
    content.version = kIdVersion;
    content.ipv4 = endpoint.ipv4;
    content.port = endpoint.port;
    content.process_id = ::getpid();
    content.process_nonce = process_nonce();
    content.listener = listener.number();
    content.listener_inode = inode(listener.number());
    if (content.process_nonce == 0 || !fill_random(&content.secret, sizeof content.secret))
        return fail(MEP_SYSTEM_ERROR, "%s", system_error("getrandom", errno).c_str());
    content.checksum = checksum(content);
    std::memcpy(id->bytes, &content, sizeof content);
    listener.release();
    return MEP_OK;
}

void unique_id_destroy(const mep_unique_id_t &id) {
    // In any other process, and after its use, there is nothing to do.
    IdContent content;
    std::memcpy(&content, id.bytes, sizeof content);
    if (is_intact(content) && content.version == kIdVersion && is_of_this_process(content) &&
        is_listening(content))
        Descriptor(content.listener).close();
}

mep_status_t bootstrap_from_unique_id(Membership membership, const mep_unique_id_t &id,
                                      const Deadline &deadline,
                                      std::unique_ptr<Bootstrap> *bootstrap) {
    EP_TRY(check_membership(membership));
    IdContent content;
    EP_TRY(read_id(id, &content));
    if (membership.rank != 0)
        return tcp_join({content.ipv4, content.port}, membership, {content.secret, false}, deadline,
                        bootstrap);
    Descriptor listener;
    EP_TRY(adopt_listener(content, &listener));
    return tcp_host(std::move(listener), membership.rank_count, {content.secret, false}, deadline,
                    bootstrap);
}

mep_status_t bootstrap_from_environment(Membership *membership, const Deadline &deadline,
                                        std::unique_ptr<Bootstrap> *bootstrap) {
    Environment environment = {};
    EP_TRY(read_environment(&environment));
    const Membership found = environment.membership;
    if (membership->rank != 0 && membership->rank != found.rank)
        return fail(MEP_INVALID_ARGUMENT, "rank is %d, but the environment's RANK is %d",
                    membership->rank, found.rank);
    if (membership->rank_count != 0 && membership->rank_count != found.rank_count)
        return fail(MEP_INVALID_ARGUMENT,
                    "rank_count is %d, but the environment's WORLD_SIZE is %d",
                    membership->rank_count, found.rank_count);
    if (found.rank_count == 1) {
        *bootstrap = bootstrap_alone();
    } else {
        Endpoint endpoint = {0, static_cast<uint16_t>(environment.port)};
        EP_TRY(resolve_master(environment.address, deadline, &endpoint.ipv4));
        const std::string text = env_text("MOONCAKE_EP_SECRET");
        const Admission admission{secret_from_text(text), text.empty()};
        Descriptor listener;
        if (found.rank == 0) {
            EP_TRY(listen_for_peers(endpoint, deadline, &listener));
            EP_TRY(tcp_host(std::move(listener), found.rank_count, admission, deadline, bootstrap));
        } else {
            EP_TRY(tcp_join(endpoint, found, admission, deadline, bootstrap));
        }
    }
    *membership = found;
    return MEP_OK;
}

}  // namespace ep
