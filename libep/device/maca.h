// The vocabulary on MetaX GPUs. Their compiler takes no assembly, a wave has 64 lanes that advance
// together, and what is not known of the hardware is asked of it as little as can be: no atomics
// between devices, no copies by engines, no blocks that wait for each other's launch.
#pragma once

// The dialect's own words come from there, and ours need them.
// clang-format off
#include <mcr/mc_runtime.h>
// clang-format on

#include "device/queue.h"
#include "wire/message.h"
#include "wire/signal.h"

#include <cstddef>
#include <cstdint>

#define EP_DEVICE_NAMESPACE maca
#define EP_DEVICE __device__ inline __attribute__((always_inline))
#define EP_KERNEL __global__ void __launch_bounds__(::ep::maca::kThreads, 1)
#define EP_WIDE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define EP_UNROLL _Pragma("unroll")
#define EP_ROLLED _Pragma("unroll 1")
#define EP_SHARED(Type, name)                                                          \
    static_assert(sizeof(Type) <= ::ep::maca::kSharedBytesMax, "a block has no more"); \
    __shared__ Type name
#define EP_SHARED_LARGE(Type, name) EP_SHARED(Type, name)

namespace ep::maca {

constexpr int kWarpSize = 64;
constexpr int kThreads = 512;  // of a block at most
constexpr int kWarpsOfBlockMax = kThreads / kWarpSize;
constexpr int kBlocksOfProcessor = 1;
constexpr int kMovingThreads = kThreads, kSummingThreads = kThreads;
constexpr size_t kSharedBytesMax = size_t{64} << 10;

// Each block does its share of every job, and SEND and RECEIVE are launches one after the other: it
// is not known that all blocks of a launch run beside each other, and lanes of a wave that wait for
// each other may do so for ever.
constexpr bool kRolesApart = false;
constexpr bool kFencesPhases = true;
constexpr bool kPacksParcels = false;
constexpr int kSharedExpertCountMax = 1024;
constexpr int kChoicesCountedByAllMax = 4096;
constexpr bool kCastsFp8 = false, kCastsPairs = false;  // integer arithmetic, see kernels/cast.h
template <Element kType>
EP_DEVICE uint32_t cast_pair(float low, float high);

using Mask = unsigned long long;  // a bit for each lane
constexpr Mask kAllLanes = ~Mask{0};
EP_DEVICE Mask lanes_below(int lane) {
    return (Mask{1} << lane) - 1;
}

#include "device/gpu_groups.h"

struct Warp {
    EP_DEVICE static int rank() { return threadIdx.x % kWarpSize; }
    EP_DEVICE static int size() { return kWarpSize; }
    EP_DEVICE static void sync() { __syncwarp(kAllLanes); }
    EP_DEVICE static int index_in_block() { return threadIdx.x / kWarpSize; }
    EP_DEVICE static int count_in_block() { return blockDim.x / kWarpSize; }
    template <class T>
    EP_DEVICE static T broadcast(T value) {
        return from(value, 0);
    }
    // By words: it is not known which other types a shuffle takes. The width is said, as the
    // default is another's.
    template <class T>
    EP_DEVICE static T from(T value, int lane) {
        static_assert(sizeof(T) % sizeof(int) == 0, "whole words");
        int words[sizeof(T) / sizeof(int)];
        __builtin_memcpy(words, &value, sizeof value);
        EP_UNROLL
        for (int &word : words)
            word = __shfl_sync(kAllLanes, word, lane, kWarpSize);
        __builtin_memcpy(&value, words, sizeof value);
        return value;
    }
    EP_DEVICE static bool all(bool value) { return __ballot_sync(kAllLanes, value) == kAllLanes; }
    template <int kLanes>
    EP_DEVICE static float max_over(float value) {
        for (int step = kLanes / 2; step > 0; step /= 2)
            value = __builtin_fmaxf(value, from(value, rank() ^ step));
        return value;
    }
    EP_DEVICE static bool repeats(unsigned key, int bits, int first) {
        Mask same = lanes_below(rank()) & ~lanes_below(first);
        EP_ROLLED
        for (int bit = 0; bit < bits; ++bit) {
            const bool set = (key >> bit & 1) != 0;
            const Mask those = __ballot_sync(kAllLanes, set);
            same &= set ? those : ~those;
        }
        return same != 0;
    }
    EP_DEVICE static Votes count(bool value) {
        const Mask those = __ballot_sync(kAllLanes, value);
        return {__popcll(those), __popcll(those & lanes_below(rank()))};
    }
};

// ---- Memory -------------------------------------------------------------------------------------

template <class T>
EP_DEVICE T load(const T *from) {
    return *const_cast<const volatile T *>(from);
}
EP_DEVICE void store(int32_t *to, int32_t value) {
    *const_cast<volatile int32_t *>(to) = value;
}
EP_DEVICE int32_t fetch_add(int32_t *to, int32_t value) {
    return atomicAdd(to, value);
}
EP_DEVICE int32_t swap(int32_t *to, int32_t value) {
    for (;;) {
        const int32_t old = load(to);
        if (atomicCAS_system(to, old, value) == old) return old;
    }
}
EP_DEVICE uint64_t fetch_add(uint64_t *to, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long *>(to), value);
}

EP_DEVICE void post(uint64_t *word, uint64_t value) {
    *const_cast<volatile uint64_t *>(word) = value;
}
EP_DEVICE uint64_t look(const uint64_t *word) {
    return load(word);
}
// A release and an acquire made of fences: the fence is between the data and the word, on both
// sides.
EP_DEVICE void publish(uint64_t *word, uint64_t value) {
    __threadfence_system();
    post(word, value);
}
// Every lane fences its own stores: it is not known that one lane's fence covers what it has only
// seen of others.
template <class Group>
EP_DEVICE void before_publish() {
    __threadfence_system();
    Group::sync();
}
template <class Group>
EP_DEVICE uint64_t observe(const uint64_t *word) {
    uint64_t value = Group::rank() == 0 ? look(word) : 0;
    value = Group::broadcast(value);
    __threadfence_system();  // by every lane, as each reads what was published
    return value;
}

EP_DEVICE bool block_any(bool value) {
    __shared__ int32_t any;
    if (Block::rank() == 0) any = 0;
    Block::sync();
    if (value) any = 1;
    Block::sync();
    const bool found = any != 0;
    Block::sync();  // before the next one
    return found;
}
EP_DEVICE uint64_t leave(uint64_t *word, uint64_t value) {
    return fetch_add(word, value);
}
EP_DEVICE void after_leavers(const uint64_t *) {
    __threadfence_system();
}

EP_DEVICE void after_launches_before() {}  // a launch begins when those before it have ended

// Plain loads, never through `const __restrict__` pointers: those may become loads of constant
// memory, which do not see what peers write.
EP_DEVICE Vector pass_load(const Vector *from) {
    return *from;
}
EP_DEVICE Vector pass_load_constant(const Vector *from) {
    return *from;
}
EP_DEVICE void pass_store(Vector *to, Vector value) {
    *to = value;
}
EP_DEVICE void keep_store(float *to, float value) {
    *to = value;
}

// ---- Time ---------------------------------------------------------------------------------------

// Nanoseconds that a tick of clock64 takes, times 2^kTickBits. How fast the clock goes is not
// documented, so the host measures it (see backend/maca.cc) before the first kernel waits.
constexpr int kTickBits = 20;
static __device__ uint64_t tick_ns;

static __global__ void set_tick(uint64_t ns) {
    tick_ns = ns;
}
// Ticks that so many looks at the clock take.
static __global__ void measure_clock(int looks, uint64_t *ticks) {
    const uint64_t first = clock64();
    uint64_t last = first;
    EP_ROLLED
    for (int i = 0; i < looks; ++i)
        last = clock64();
    *ticks = last - first;
}

// Since when differs between multiprocessors; a thread compares only with itself. In two parts, as
// the product of all bits would overflow.
EP_DEVICE uint64_t now_ns() {
    const uint64_t ticks = clock64(), low = ticks & ((uint64_t{1} << kTickBits) - 1);
    return (ticks >> kTickBits) * tick_ns + (low * tick_ns >> kTickBits);
}
EP_DEVICE bool clock_is_due(uint32_t attempt) {
    constexpr uint32_t kLooksPerClock = 32;
    return attempt % kLooksPerClock == kLooksPerClock - 1;
}
EP_DEVICE void pause(uint32_t) {}  // the only known sleep has no known unit

// ---- What there is not --------------------------------------------------------------------------

// Kernels with these words are not made for this device, only parsed.
constexpr int kLineTokenCountMax = 0, kLineChoiceCountMax = 0;
__device__ void push(char *at, bool here, bool signal, Vector piece);
template <int kCount>
__device__ bool pull(const char *const (&at)[kCount], const bool (&here)[kCount], bool signal,
                     uint64_t epoch, Vector *pieces);

constexpr bool kHasBulkCopies = false;
constexpr int kBulkSlotBytes = 512, kBulkSlots = 1;
__device__ void bulk_open(uint64_t *arrival);
__device__ void bulk_expect(int bytes, uint64_t *arrival);
__device__ void bulk_fetch(char *to, const char *from, int bytes, uint64_t *arrival);
__device__ void bulk_await(uint64_t *arrival, uint32_t parity);
__device__ void bulk_before_put();
__device__ void bulk_put(char *to, const char *from, int bytes, Caching caching);
__device__ void bulk_commit();
template <int kNewest>
__device__ void bulk_await_read();
__device__ void bulk_await_written();
__device__ void bulk_after_observe();

#include "device/lanes.h"

// ---- Launches -----------------------------------------------------------------------------------

template <class Args>
void launch_blocks(void (*kernel)(Args), const Args &args, const Queue &queue, int blocks,
                   int threads) {
    if (queue.load_only) {
        mcFuncAttributes attributes;
        mcFuncGetAttributes(&attributes, reinterpret_cast<const void *>(kernel));
        return;
    }
    kernel<<<blocks, threads, 0, static_cast<mcStream_t>(queue.stream)>>>(args);
}

// A block for each multiprocessor, so that launches of ranks that share a device fit beside each
// other.
inline int sender_block_count_max(const Queue &queue) {
    return queue.block_count;
}
inline int receiver_block_count_max(const Queue &queue) {
    return queue.block_count;
}
inline int chunk_count_max(const Queue &queue) {
    return queue.block_count;
}
template <class Args>
void launch(void (*kernel)(Args), const Args &args, const Queue &queue, int block_count) {
    launch_blocks(kernel, args, queue, block_count, kThreads);
}
template <class Args>
void launch_large(void (*kernel)(Args), const Args &args, const Queue &queue, int block_count,
                  size_t) {
    launch(kernel, args, queue, block_count);
}
inline bool moves_in_bulk(const Queue &) {
    return false;
}
template <class Args>
void launch_wide(void (*kernel)(Args), const Args &args, const Queue &queue, int block_count,
                 int threads) {
    launch_blocks(kernel, args, queue, block_count, threads);
}
template <class Args>
void launch_all(void (*kernel)(Args), const Args &args, const Queue &queue, int item_count) {
    if (item_count == 0 && !queue.load_only) return;
    launch(kernel, args, queue, item_count < queue.block_count ? item_count : queue.block_count);
}
inline int launch_error() {
    return mcGetLastError();
}

}  // namespace ep::maca
