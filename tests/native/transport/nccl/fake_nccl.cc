// NCCL for the ranks of one process, on FakeStreams: what libep asks of it, with faults on demand.
#include "fake_stream.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

namespace {

constexpr int kSuccess = 0, kRemoteError = 6;

struct World;

struct Communicator {
    World *world;
    int rank;
    bool aborted = false;
};

// The communicators of one id; they live as long as the program, as they may be asked after abort.
struct World {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::unique_ptr<Communicator>> communicators;
    std::map<std::pair<int, int>, const void *> out;  // [from, to] what is being sent
};

struct Transfer {
    bool sends;
    void *data;
    size_t count;
    int peer;
};

struct Group {
    std::vector<Transfer> transfers;
    Communicator *communicator = nullptr;
    ep::test::FakeStream *stream = nullptr;
};
thread_local Group group;

std::mutex worlds_mutex;
// Never gone: whoever waits in one when the program ends still does.
std::map<uint64_t, World> &worlds = *new std::map<uint64_t, World>;
uint64_t ids;
std::atomic<int> failing_rank{-1}, registered{0};

// A kernel: all sends are offered, then everything is received, then all sends are taken.
void carry(const Communicator *own, const std::vector<Transfer> &transfers) {
    World *const world = own->world;
    const int rank = own->rank;
    std::unique_lock<std::mutex> lock(world->mutex);
    const auto until = [&](auto condition) {
        world->changed.wait(lock, [&] { return own->aborted || condition(); });
        return !own->aborted;
    };
    for (const Transfer &one : transfers)
        if (one.sends) world->out[{rank, one.peer}] = one.data;
    world->changed.notify_all();
    for (const Transfer &one : transfers) {
        const std::pair<int, int> way =
            one.sends ? std::pair(rank, one.peer) : std::pair(one.peer, rank);
        if (one.sends) continue;
        if (!until([&] { return world->out.count(way) != 0; })) return;
        std::memcpy(one.data, world->out[way], one.count);
        world->out.erase(way);
        world->changed.notify_all();
    }
    for (const Transfer &one : transfers)
        if (one.sends && !until([&] { return world->out.count({rank, one.peer}) == 0; })) return;
}

}  // namespace

extern "C" {

int ncclGetVersion(int *version) {
    *version = 22809;
    return kSuccess;
}

struct UniqueId {
    char bytes[128];
};

int ncclGetUniqueId(UniqueId *id) {
    const std::lock_guard<std::mutex> lock(worlds_mutex);
    ++ids;
    std::memcpy(id->bytes, &ids, sizeof ids);
    return kSuccess;
}

int ncclCommInitRank(Communicator **communicator, int rank_count, UniqueId id, int rank) {
    uint64_t number = 0;
    std::memcpy(&number, id.bytes, sizeof number);
    World *world = nullptr;
    {
        const std::lock_guard<std::mutex> lock(worlds_mutex);
        world = &worlds[number];
    }
    std::unique_lock<std::mutex> lock(world->mutex);
    world->communicators.push_back(std::make_unique<Communicator>(Communicator{world, rank}));
    *communicator = world->communicators.back().get();
    world->changed.notify_all();
    const auto all = static_cast<size_t>(rank_count);
    world->changed.wait(lock, [&] { return world->communicators.size() == all; });
    return kSuccess;
}

int ncclCommDestroy(Communicator *) {
    return kSuccess;
}

int ncclCommAbort(Communicator *communicator) {
    const std::lock_guard<std::mutex> lock(communicator->world->mutex);
    communicator->aborted = true;
    communicator->world->changed.notify_all();
    return kSuccess;
}

int ncclCommGetAsyncError(Communicator *communicator, int *error) {
    *error = communicator->rank == failing_rank ? kRemoteError : kSuccess;
    return kSuccess;
}

int ncclGroupStart() {
    group = {};
    return kSuccess;
}

int ncclSend(const void *data, size_t count, int, int peer, Communicator *communicator,
             void *stream) {
    group.transfers.push_back({true, const_cast<void *>(data), count, peer});
    group.communicator = communicator;
    group.stream = static_cast<ep::test::FakeStream *>(stream);
    return kSuccess;
}

int ncclRecv(void *data, size_t count, int, int peer, Communicator *communicator, void *stream) {
    group.transfers.push_back({false, data, count, peer});
    group.communicator = communicator;
    group.stream = static_cast<ep::test::FakeStream *>(stream);
    return kSuccess;
}

int ncclGroupEnd() {
    if (group.transfers.empty()) return kSuccess;
    group.stream->push(
        [own = group.communicator, transfers = group.transfers] { carry(own, transfers); });
    return kSuccess;
}

const char *ncclGetErrorString(int) {
    return "an error of the fake";
}

#if !defined(FAKE_WITHOUT_MEMORY)
int ncclMemAlloc(void **memory, size_t bytes) {
    *memory = std::malloc(bytes);
    return *memory == nullptr ? 1 : kSuccess;
}
int ncclMemFree(void *memory) {
    std::free(memory);
    return kSuccess;
}
int ncclCommRegister(Communicator *, void *memory, size_t, void **registration) {
    ++registered;
    *registration = memory;
    return kSuccess;
}
int ncclCommDeregister(Communicator *, void *) {
    --registered;
    return kSuccess;
}
#endif

// What tests ask of it.
void fake_nccl_fail(int rank) {
    failing_rank = rank;
}
int fake_nccl_registered() {
    return registered;
}

}  // extern "C"
