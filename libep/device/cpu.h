// The CPU as a device: one lane is one warp is one block. A launch is a call on each worker.
#pragma once

#include "device/queue.h"

#include <cstddef>
#include <cstdint>
#include <ctime>
#include <sched.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// One library holds the kernels for several levels of the instruction set, each in a namespace of
// its own; EP_CPU_LEVEL names the level that a translation unit is compiled for.
#if !defined(EP_CPU_LEVEL)
#define EP_CPU_LEVEL cpu
#endif
#define EP_DEVICE_NAMESPACE EP_CPU_LEVEL
#define EP_DEVICE inline __attribute__((always_inline))
#define EP_KERNEL inline void
#define EP_WIDE_KERNEL(threads) EP_KERNEL
#define EP_UNROLL
#define EP_ROLLED
#define EP_SHARED(Type, name) Type name
#define EP_SHARED_LARGE(Type, name) EP_SHARED(Type, name)

namespace ep::EP_DEVICE_NAMESPACE {

constexpr int kWarpSize = 1;

struct Place {
    int block = 0;
    int block_count = 1;
};
inline thread_local Place place;

constexpr int kWarpsOfBlockMax = 1;
constexpr int kMovingThreads = kWarpsOfBlockMax * kWarpSize, kSummingThreads = kMovingThreads;
constexpr bool kRolesApart = false;
constexpr bool kFencesPhases = false;
constexpr bool kPacksParcels = true;
constexpr int kSharedExpertCountMax = 1024;
constexpr int kChoicesCountedByAllMax = 4096;
constexpr int kLineTokenCountMax = 0;
constexpr int kLineChoiceCountMax = 0;
constexpr int kBlocksOfProcessor = 1;
constexpr bool kCastsFp8 = false;

struct Votes {
    int total;  // lanes where it is true
    int lower;  // of them, those before this lane
};

struct Lane {
    static int rank() { return 0; }
    static int size() { return 1; }
    static void sync() {}
    static int index_in_block() { return 0; }
    static int count_in_block() { return 1; }
    template <class T>
    static T broadcast(T value) {
        return value;
    }
    template <class T>
    static T from(T value, int) {
        return value;
    }
    static bool all(bool value) { return value; }
    template <int kLanes>
    static float max_over(float value) {
        static_assert(kLanes == 1, "a CPU warp has one lane");
        return value;
    }
    static bool repeats(unsigned, int, int) { return false; }  // no lane is below
    static Votes count(bool value) { return {value, 0}; }
};
struct Thread : Lane {};
struct Warp : Lane {};
struct Block : Lane {};

template <class Group>
int grid_index() {
    return place.block;
}
template <class Group>
int grid_count() {
    return place.block_count;
}

#include "device/host_atomics.h"

EP_DEVICE bool block_any(bool value) {
    return value;
}

// Lines take 8 lanes; kernels that move them are not made for this device, only compiled.
void push(char *at, bool here, bool signal, Vector piece);
template <int kCount>
bool pull(const char *const (&at)[kCount], const bool (&here)[kCount], bool signal, uint64_t epoch,
          Vector *pieces);

// There is no engine for bulk copies; kernels with them are not made for this device, only
// compiled.
constexpr bool kHasBulkCopies = false;
constexpr int kBulkSlotBytes = 512, kBulkSlots = 1;
void bulk_open(uint64_t *arrival);
void bulk_expect(int bytes, uint64_t *arrival);
void bulk_fetch(char *to, const char *from, int bytes, uint64_t *arrival);
void bulk_await(uint64_t *arrival, uint32_t parity);
void bulk_before_put();
void bulk_put(char *to, const char *from, int bytes, Caching caching);
void bulk_commit();
template <int kNewest>
void bulk_await_read();
void bulk_await_written();
void bulk_after_observe();

// As wide as a vector register of the level.
#if defined(__AVX512F__)
constexpr int kPack = 16;
#elif defined(__AVX2__)
constexpr int kPack = 8;
#else
constexpr int kPack = 4;
#endif
constexpr int kPackMin = kPack < 8 ? kPack : 8;

template <class T, int kCount>
struct VectorOf {
    typedef T Type __attribute__((vector_size(sizeof(T) * kCount)));
};
template <int kCount>
using Pack = typename VectorOf<float, kCount>::Type;

template <class Type, int kCount>
EP_DEVICE auto fetch(const char *from) {
    typename VectorOf<typename Type::Storage, kCount>::Type raw;
    __builtin_memcpy(&raw, from, sizeof raw);
    return raw;
}
template <class Type, int kCount>
EP_DEVICE auto fetch_row(const char *from) {
    return fetch<Type, kCount>(from);
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
template <class Type, int kCount, class Raw>
EP_DEVICE Pack<kCount> widen(const Raw &raw) {
    using Bits = typename VectorOf<uint32_t, kCount>::Type;
    return Type::template decode<Pack<kCount>, Bits>(__builtin_convertvector(raw, Bits));
}
template <class Type, int kCount>
EP_DEVICE void narrow(char *to, const Pack<kCount> &values) {
    using Bits = typename VectorOf<uint32_t, kCount>::Type;
    using Raw = typename VectorOf<typename Type::Storage, kCount>::Type;
    const Raw raw =
        __builtin_convertvector((Type::template encode<Bits, Pack<kCount>>(values)), Raw);
    __builtin_memcpy(to, &raw, sizeof raw);
}
template <class Floats>
EP_DEVICE void add(Floats *sum, const Floats &values) {
    *sum += values;
}
template <class Floats>
EP_DEVICE Floats scaled(float factor, const Floats &values) {
    return factor * values;
}
template <class Floats, int kPacks>
EP_DEVICE float max_magnitude(const Floats (&packs)[kPacks]) {
    Floats largest = {};
    for (const Floats &values : packs) {
        const Floats magnitude = values < 0 ? -values : values;
        largest = magnitude > largest ? magnitude : largest;
    }
    float result = 0;
    for (size_t i = 0; i < sizeof largest / sizeof(float); ++i)
        result = largest[i] > result ? largest[i] : result;
    return result;
}

// The sanitizers do not see streaming stores, so they get ordinary ones.
#if defined(__SSE2__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
EP_DEVICE void copy_row(char *to, const char *from, size_t bytes, Caching caching) {
    if (caching == Caching::kKeep) {
        __builtin_memcpy(to, from, bytes);
        return;
    }
    // Without reading the lines that are overwritten, which is a third of a copy's traffic.
    for (size_t i = 0; i < bytes; i += sizeof(__m128i))
        _mm_stream_si128(reinterpret_cast<__m128i *>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i)));
    _mm_sfence();  // such stores would pass the release of the row's flag
}
#else
EP_DEVICE void copy_row(char *to, const char *from, size_t bytes, Caching) {
    __builtin_memcpy(to, from, bytes);
}
#endif

constexpr int kTermLoads = 1, kPacksAtOnce = 1;  // the hardware looks ahead by itself

template <class Group, int kLoadsInFlight, class To>
EP_DEVICE void fan_out(int count, To to, const char *from, size_t bytes, Caching caching) {
    for (int i = 0; i < count; ++i)
        if (char *row = to(i)) copy_row(row, from, bytes, caching);
}

// A block per worker.
inline int sender_block_count_max(const Queue &queue) {
    return queue.workers == nullptr ? 1 : queue.workers->count();
}
inline int receiver_block_count_max(const Queue &queue) {
    return sender_block_count_max(queue);
}

inline int chunk_count_max(const Queue &queue) {
    return sender_block_count_max(queue);
}
template <class Args>
void launch(void (*kernel)(Args), const Args &args, const Queue &queue, int block_count) {
    if (block_count == 1) {
        place = {};
        kernel(args);
        return;
    }
    struct Call {
        void (*kernel)(Args);
        const Args *args;
        int block_count;
    } call{kernel, &args, queue.workers->count()};
    queue.workers->run(
        [](void *context, int block) {
            const Call &c = *static_cast<Call *>(context);
            place = {block, c.block_count};
            c.kernel(*c.args);
        },
        &call);
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
void launch_wide(void (*kernel)(Args), const Args &args, const Queue &queue, int block_count, int) {
    launch(kernel, args, queue, block_count);
}
template <class Args>
void launch_all(void (*kernel)(Args), const Args &args, const Queue &queue, int item_count) {
    if (item_count > 0) launch(kernel, args, queue, sender_block_count_max(queue));
}

inline int launch_error() {
    return 0;
}

}  // namespace ep::EP_DEVICE_NAMESPACE
