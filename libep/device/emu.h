// A GPU made of host threads, one per lane, for tests: kernels run at any warp width under the
// sanitizers, so that errors of lanes and of memory order show without a GPU.
#pragma once

#include "device/queue.h"
#include "wire/message.h"
#include "wire/signal.h"

#include <barrier>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <deque>
#include <memory>
#include <sched.h>
#include <thread>
#include <utility>
#include <vector>

#define EP_DEVICE_NAMESPACE emu
#define EP_DEVICE inline
#define EP_KERNEL inline void
#define EP_WIDE_KERNEL(threads) EP_KERNEL
#define EP_UNROLL
#define EP_ROLLED
#define EP_SHARED(Type, name) Type &name = place.whole->template shared<Type>()
#define EP_SHARED_LARGE(Type, name) EP_SHARED(Type, name)

#if !defined(EP_EMU_WARP_SIZE)
#define EP_EMU_WARP_SIZE 64
#endif

// A GPU of which little is known, as maca.h has it: no blocks of different roles in a launch, no
// lines, no bulk copies.
#if !defined(EP_EMU_PLAIN)
#define EP_EMU_PLAIN 0
#endif

namespace ep::emu {

constexpr int kWarpSize = EP_EMU_WARP_SIZE;
constexpr int kWarpsPerBlock = 2;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;
constexpr int kManyBlocks = 3;
constexpr int kWarpsOfBlockMax = kWarpsPerBlock;
constexpr int kMovingThreads = kWarpsOfBlockMax * kWarpSize, kSummingThreads = kMovingThreads;

// Lanes that exchange values: each writes its own cell, all meet, each reads.
struct Team {
    explicit Team(int size) : barrier(size), cells(size) {}
    std::barrier<> barrier;
    std::vector<uint64_t> cells;

    template <class T>
    T &shared() {
        static_assert(sizeof(T) <= sizeof memory, "shared memory has room");
        return *reinterpret_cast<T *>(memory);
    }
    alignas(128) char memory[48 << 10];
};

struct Place {
    int thread, block, block_count;
    Team *warp, *whole;
};
inline thread_local Place place;

constexpr bool kRolesApart = EP_EMU_PLAIN == 0;
constexpr bool kFencesPhases = EP_EMU_PLAIN != 0;
constexpr bool kPacksParcels = true;
constexpr bool kCastsFp8 = false, kCastsPairs = false;
template <Element kType>
uint32_t cast_pair(float low, float high);
// Little enough that tests count in all ways.
constexpr int kSharedExpertCountMax = 8;
constexpr int kChoicesCountedByAllMax = 6;
constexpr int kLineTokenCountMax =
    EP_EMU_PLAIN != 0 || kWarpSize < 8 ? 0 : 16;  // a line takes 8 lanes
constexpr int kLineChoiceCountMax = 64;
constexpr int kBlocksOfProcessor = 2;

struct Votes {
    int total;  // lanes where it is true
    int lower;  // of them, those before this lane
};

struct Thread {
    static int rank() { return 0; }
    static int size() { return 1; }
    static void sync() {}
    static int index_in_block() { return place.thread; }
    static int count_in_block() { return kThreads; }
    template <class T>
    static T broadcast(T value) {
        return value;
    }
};

struct Warp {
    static int rank() { return place.thread % kWarpSize; }
    static int size() { return kWarpSize; }
    static void sync() { place.warp->barrier.arrive_and_wait(); }
    static int index_in_block() { return place.thread / kWarpSize; }
    static int count_in_block() { return kWarpsPerBlock; }
    template <class T>
    static T broadcast(T value) {
        static_assert(sizeof(T) <= sizeof(uint64_t), "a cell holds 8 bytes");
        exchange(value);
        __builtin_memcpy(&value, &place.warp->cells[0], sizeof value);
        sync();
        return value;
    }
    template <class T>
    static T from(T value, int lane) {
        static_assert(sizeof(T) <= sizeof(uint64_t), "a cell holds 8 bytes");
        exchange(value);
        __builtin_memcpy(&value, &place.warp->cells[lane], sizeof value);
        sync();
        return value;
    }
    static bool all(bool value) {
        exchange(uint64_t{value});
        bool every = true;
        for (const uint64_t cell : place.warp->cells)
            every = every && cell != 0;
        sync();
        return every;
    }
    template <int kLanes>
    static float max_over(float value) {
        static_assert(kWarpSize % kLanes == 0, "neighbours fill the warp");
        exchange(value);
        const int first = rank() / kLanes * kLanes;
        for (int lane = first; lane < first + kLanes; ++lane) {
            float other;
            __builtin_memcpy(&other, &place.warp->cells[lane], sizeof other);
            if (other > value) value = other;
        }
        sync();
        return value;
    }

    static bool repeats(unsigned key, int bits, int first) {
        exchange(key & ((uint64_t{1} << bits) - 1));
        bool found = false;
        for (int lane = first; lane < rank(); ++lane)
            found = found || place.warp->cells[lane] == place.warp->cells[rank()];
        sync();
        return found;
    }
    static Votes count(bool value) {
        exchange(uint64_t{value});
        Votes found{0, 0};
        for (int lane = 0; lane < kWarpSize; ++lane) {
            found.total += place.warp->cells[lane] != 0;
            found.lower += place.warp->cells[lane] != 0 && lane < rank();
        }
        sync();
        return found;
    }

  private:
    template <class T>
    static void exchange(T value) {
        __builtin_memcpy(&place.warp->cells[rank()], &value, sizeof value);
        sync();
    }
};

struct Block {
    static int rank() { return place.thread; }
    static int size() { return kThreads; }
    static void sync() { place.whole->barrier.arrive_and_wait(); }
    static int index_in_block() { return 0; }
    static int count_in_block() { return 1; }
    static bool any(bool value) {
        place.whole->cells[place.thread] = value;
        sync();
        bool found = false;
        for (const uint64_t cell : place.whole->cells)
            found = found || cell != 0;
        sync();
        return found;
    }
};

template <class Group>
int grid_index() {
    return place.block * Group::count_in_block() + Group::index_in_block();
}
template <class Group>
int grid_count() {
    return place.block_count * Group::count_in_block();
}

#include "device/host_atomics.h"

// Of rows that this device does not use itself.
inline Vector pass_load(const Vector *from) {
    return *from;
}
inline Vector pass_load_constant(const Vector *from) {
    return *from;
}
inline void pass_store(Vector *to, Vector value) {
    *to = value;
}
inline void keep_store(float *to, float value) {
    *to = value;
}

// Bulk copies.
constexpr bool kHasBulkCopies = EP_EMU_PLAIN == 0;
constexpr int kBulkSlotBytes = 512,
              kBulkSlots = 4;  // little enough that rows of tests take several

// A lane's puts. Each reads, and writes, as late as it may: so a slot that is filled too early
// shows, and a row that is published too early.
class BulkPuts {
  public:
    ~BulkPuts() { write(); }  // when its launch ends
    void add(char *to, const char *from, int bytes) { group_.push_back({to, from, bytes}); }
    void commit() { groups_.push_back(std::move(group_)), group_.clear(); }
    void read(size_t newest) {
        for (; groups_.size() > newest; groups_.pop_front())
            for (const Put &put : groups_.front())
                read_.push_back({put.to, {put.from, put.from + put.bytes}});
    }
    void write() {
        for (const Row &row : read_)
            __builtin_memcpy(row.to, row.bytes.data(), row.bytes.size());
        read_.clear();
    }

  private:
    struct Put {
        char *to;
        const char *from;
        int bytes;
    };
    struct Row {
        char *to;
        std::vector<char> bytes;
    };
    std::vector<Put> group_;
    std::deque<std::vector<Put>> groups_;
    std::vector<Row> read_;
};
inline thread_local BulkPuts bulk_puts;

// An arrival: how often all that was expected has come, whether something is expected, and how many
// bytes of it have not come.
struct BulkArrival {
    uint16_t laps, expects;
    int32_t missing;
};
inline void bulk_arrive(uint64_t *arrival, bool expects, int bytes) {
    uint64_t before = __atomic_load_n(arrival, __ATOMIC_RELAXED), after;
    do {
        BulkArrival state;
        __builtin_memcpy(&state, &before, sizeof state);
        state.missing += bytes;
        state.expects |= expects;
        if (state.expects != 0 && state.missing == 0)
            state = {static_cast<uint16_t>(state.laps + 1), 0, 0};
        __builtin_memcpy(&after, &state, sizeof after);
    } while (!__atomic_compare_exchange_n(arrival, &before, after, false, __ATOMIC_ACQ_REL,
                                          __ATOMIC_RELAXED));
}
inline void bulk_open(uint64_t *arrival) {
    __atomic_store_n(arrival, 0, __ATOMIC_RELEASE);
}
inline void bulk_expect(int bytes, uint64_t *arrival) {
    bulk_arrive(arrival, true, bytes);
}
inline void bulk_fetch(char *to, const char *from, int bytes, uint64_t *arrival) {
    __builtin_memcpy(to, from, bytes);
    bulk_arrive(arrival, false, -bytes);
}
inline void bulk_await(uint64_t *arrival, uint32_t parity) {
    for (BulkArrival state;; sched_yield()) {
        const uint64_t word = __atomic_load_n(arrival, __ATOMIC_ACQUIRE);
        __builtin_memcpy(&state, &word, sizeof state);
        if (state.laps % 2 != parity) return;
    }
}
inline void bulk_before_put() {}
inline void bulk_put(char *to, const char *from, int bytes, Caching) {
    bulk_puts.add(to, from, bytes);
}
inline void bulk_commit() {
    bulk_puts.commit();
}
template <int kNewest>
void bulk_await_read() {
    bulk_puts.read(kNewest);
}
inline void bulk_await_written() {
    bulk_puts.read(0);
    bulk_puts.write();
}
inline void bulk_after_observe() {}

inline bool block_any(bool value) {
    bulk_await_written();  // what a block that leaves has put lands
    return Block::any(value);
}

#include "device/lanes.h"

// The lane with the signal releases what the others of its warp have stored.
inline void push(char *at, bool here, bool signal, Vector piece) {
    if (here && !signal) __builtin_memcpy(at, &piece, sizeof piece);
    Warp::sync();
    if (!here || !signal) return;
    __builtin_memcpy(at + sizeof(uint64_t), &piece.words[1], sizeof(uint64_t));
    publish(reinterpret_cast<uint64_t *>(at), piece.words[0]);
}
template <int kCount>
bool pull(const char *const (&at)[kCount], const bool (&here)[kCount], bool signal, uint64_t epoch,
          Vector *pieces) {
    bool whole = true;
    for (int i = 0; i < kCount; ++i) {
        if (!here[i] || !signal) continue;
        pieces[i].words[0] = look(reinterpret_cast<const uint64_t *>(at[i]));
        whole = whole && Signal::is_of(pieces[i].words[0], epoch);
    }
    if (!Warp::all(whole)) return false;
    for (int i = 0; i < kCount; ++i) {
        if (here[i] && signal)
            __builtin_memcpy(&pieces[i].words[1], at[i] + sizeof(uint64_t), sizeof(uint64_t));
        else if (here[i])
            __builtin_memcpy(&pieces[i], at[i], sizeof pieces[i]);
    }
    return true;
}

template <class Args>
void launch_blocks(int block_count, void (*kernel)(Args), const Args &args) {
    std::vector<std::unique_ptr<Team>> teams;
    std::vector<std::thread> threads;
    for (int block = 0; block < block_count; ++block) {
        Team *whole = teams.emplace_back(std::make_unique<Team>(kThreads)).get();
        Team *warp = nullptr;
        for (int thread = 0; thread < kThreads; ++thread) {
            if (thread % kWarpSize == 0)
                warp = teams.emplace_back(std::make_unique<Team>(kWarpSize)).get();
            threads.emplace_back([=, &args] {
                place = {thread, block, block_count, warp, whole};
                kernel(args);
            });
        }
    }
    for (std::thread &thread : threads)
        thread.join();
}

inline int sender_block_count_max(const Queue &) {
    return 2;
}
inline int receiver_block_count_max(const Queue &) {
    return 1;
}
inline int chunk_count_max(const Queue &queue) {
    return sender_block_count_max(queue);
}
template <class Args>
void launch(void (*kernel)(Args), const Args &args, const Queue &, int block_count) {
    launch_blocks(block_count, kernel, args);
}
template <class Args>
void launch_large(void (*kernel)(Args), const Args &args, const Queue &queue, int block_count,
                  size_t) {
    launch(kernel, args, queue, block_count);
}
inline bool moves_in_bulk(const Queue &queue) {
    return kHasBulkCopies && queue.may_move_in_bulk;
}
template <class Args>
void launch_wide(void (*kernel)(Args), const Args &args, const Queue &queue, int block_count, int) {
    launch(kernel, args, queue, block_count);
}
template <class Args>
void launch_all(void (*kernel)(Args), const Args &args, const Queue &, int item_count) {
    if (item_count == 0) return;
    launch_blocks(kManyBlocks, kernel, args);
}
inline int launch_error() {
    return 0;
}

}  // namespace ep::emu
