// The vocabulary on NVIDIA GPUs.
#pragma once

#include "device/queue.h"
#include "wire/message.h"
#include "wire/signal.h"

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#define EP_DEVICE_NAMESPACE cuda
#define EP_DEVICE __device__ __forceinline__
#define EP_KERNEL \
    __global__ void __launch_bounds__(::ep::cuda::kThreads, ::ep::cuda::kBlocksOfProcessor)
#define EP_WIDE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define EP_UNROLL _Pragma("unroll")
#define EP_ROLLED _Pragma("unroll 1")
#define EP_SHARED(Type, name) __shared__ Type name
#define EP_SHARED_LARGE(Type, name)                          \
    extern __shared__ __align__(128) char ep_shared_large[]; \
    Type &name = *reinterpret_cast<Type *>(ep_shared_large)

namespace ep::cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;  // of a block at most
constexpr int kBlocksOfProcessor =
    2;  // of kThreads that fit beside each other, whatever the kernel
constexpr unsigned kAllLanes = 0xffffffffu;

// Of a block that has a multiprocessor for itself: as many as its registers allow.
constexpr int kMovingThreads = 768, kSummingThreads = 512;

constexpr int kWarpsOfBlockMax = kThreads / kWarpSize;

constexpr bool kRolesApart = true;
constexpr bool kFencesPhases = false;
constexpr bool kPacksParcels = false;
constexpr int kSharedExpertCountMax = 1024;
constexpr int kChoicesCountedByAllMax = 4096;
constexpr int kLineTokenCountMax = 512;
constexpr int kLineChoiceCountMax = 4096;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr bool kCastsFp8 = false;
#else
constexpr bool kCastsFp8 = true;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kCastsPairs = false;
#else
constexpr bool kCastsPairs = true;
#endif

#include "device/gpu_groups.h"

struct Warp {
    EP_DEVICE static int rank() { return threadIdx.x % kWarpSize; }
    EP_DEVICE static int size() { return kWarpSize; }
    EP_DEVICE static void sync() { __syncwarp(); }
    EP_DEVICE static int index_in_block() { return threadIdx.x / kWarpSize; }
    EP_DEVICE static int count_in_block() { return blockDim.x / kWarpSize; }
    template <class T>
    EP_DEVICE static T broadcast(T value) {
        return __shfl_sync(kAllLanes, value, 0);
    }
    template <class T>
    EP_DEVICE static T from(T value, int lane) {
        return __shfl_sync(kAllLanes, value, lane);
    }
    EP_DEVICE static bool all(bool value) { return __all_sync(kAllLanes, value) != 0; }
    template <int kLanes>
    EP_DEVICE static float max_over(float value) {
        for (int step = kLanes / 2; step > 0; step /= 2)
            value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
        return value;
    }
    EP_DEVICE static bool repeats(unsigned key, int bits, int first) {
        unsigned same = ((1u << rank()) - 1) & ~((1u << first) - 1);
        EP_ROLLED
        for (int bit = 0; bit < bits; ++bit) {
            const bool set = (key >> bit & 1) != 0;
            const unsigned those = __ballot_sync(kAllLanes, set);
            same &= set ? those : ~those;
        }
        return same != 0;
    }
    EP_DEVICE static Votes count(bool value) {
        const unsigned those = __ballot_sync(kAllLanes, value);
        return {__popc(those), __popc(those & ((1u << rank()) - 1))};
    }
};

EP_DEVICE uint64_t load(const uint64_t *from) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
}
EP_DEVICE int32_t load(const int32_t *from) {
    int32_t value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
EP_DEVICE void store(int32_t *to, int32_t value) {
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
EP_DEVICE int32_t fetch_add(int32_t *to, int32_t value) {
    return atomicAdd(to, value);
}
EP_DEVICE int32_t swap(int32_t *to, int32_t value) {
    return atomicExch(to, value);
}
EP_DEVICE uint64_t fetch_add(uint64_t *to, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long *>(to), value);
}

EP_DEVICE void post(uint64_t *word, uint64_t value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
EP_DEVICE uint64_t look(const uint64_t *word) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}
EP_DEVICE void publish(uint64_t *word, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
EP_DEVICE bool block_any(bool value) {
    return __syncthreads_or(value) != 0;
}
template <class Group>
EP_DEVICE void before_publish() {
    Group::sync();  // a release covers what it follows, other lanes' stores too
}
template <class Group>
EP_DEVICE uint64_t observe(const uint64_t *word) {
    uint64_t value = 0;
    if (Group::rank() == 0)
        asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    value = Group::broadcast(value);
    Group::sync();
    return value;
}

// A launch is queued as one that may come before the one before it has ended (see launch_blocks),
// and lets the next one do so: only the way to the first instruction is saved.
EP_DEVICE void after_launches_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

EP_DEVICE uint64_t now_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
EP_DEVICE bool clock_is_due(uint32_t attempt) {
    constexpr uint32_t kLooksPerClock = 32;
    return attempt % kLooksPerClock == kLooksPerClock - 1;
}
EP_DEVICE void pause(uint32_t attempt) {
    if (attempt > 16) __nanosleep(64);
}

// Of rows that this multiprocessor does not use itself: they stay out of its cache.
EP_DEVICE Vector pass_load(const Vector *from) {
    Vector value;
    asm volatile("ld.global.L1::no_allocate.v2.u64 {%0, %1}, [%2];"
                 : "=l"(value.words[0]), "=l"(value.words[1])
                 : "l"(from)
                 : "memory");
    return value;
}
// For arrays that nobody writes during the launch: the compiler may move it.
EP_DEVICE Vector pass_load_constant(const Vector *from) {
    Vector value;
    asm("ld.global.nc.L1::no_allocate.v2.u64 {%0, %1}, [%2];"
        : "=l"(value.words[0]), "=l"(value.words[1])
        : "l"(from));
    return value;
}
EP_DEVICE void pass_store(Vector *to, Vector value) {
    asm volatile("st.global.L1::no_allocate.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(value.words[0]),
                 "l"(value.words[1])
                 : "memory");
}

EP_DEVICE void keep_store(float *to, float value) {
    asm volatile(
        "{ .reg .b64 last; createpolicy.fractional.L2::evict_last.b64 last, 1.0; "
        "st.global.L2::cache_hint.f32 [%0], %1, last; }" ::"l"(to),
        "f"(value)
        : "memory");
}

// Bulk copies, which a multiprocessor has an engine for from sm_90 on. What they read and write is
// ordered with other accesses only by the words here.
constexpr bool kHasBulkCopies = true;
constexpr int kBulkSlotBytes = 2048, kBulkSlots = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define EP_SM90(...) asm volatile(__VA_ARGS__)
#else
#define EP_SM90(...) static_cast<void>(0)  // such code is not launched; see moves_in_bulk
#endif
EP_DEVICE unsigned shared_address(const void *at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
EP_DEVICE void bulk_open(uint64_t *arrival) {
    EP_SM90("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrival)) : "memory");
    EP_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}
EP_DEVICE void bulk_expect(int bytes, uint64_t *arrival) {
    EP_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)),
            "r"(bytes) : "memory");
}
EP_DEVICE void bulk_fetch(char *to, const char *from, int bytes, uint64_t *arrival) {
    EP_SM90(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(arrival)) : "memory");
}
EP_DEVICE void bulk_await(uint64_t *arrival, uint32_t parity) {
    uint32_t came = 1;
    do {
        EP_SM90(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, "
            "0, p; }" : "=r"(came) : "r"(shared_address(arrival)),
            "r"(parity) : "memory");
    } while (came == 0);
}
EP_DEVICE void bulk_before_put() {
    EP_SM90("fence.proxy.async.shared::cta;" :: : "memory");
}
EP_DEVICE void bulk_put(char *to, const char *from, int bytes, Caching caching) {
    if (caching == Caching::kKeep)
        EP_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                "r"(shared_address(from)), "r"(bytes) : "memory");
    else
        EP_SM90(
            "{ .reg .b64 first; createpolicy.fractional.L2::evict_first.b64 first, 1.0; "
            "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, first; }" ::
                "l"(to),
            "r"(shared_address(from)), "r"(bytes) : "memory");
}
EP_DEVICE void bulk_commit() {
    EP_SM90("cp.async.bulk.commit_group;" :: : "memory");
}
template <int kNewest>
EP_DEVICE void bulk_await_read() {
    EP_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(kNewest) : "memory");
}
EP_DEVICE void bulk_await_written() {
    EP_SM90("cp.async.bulk.wait_group 0;" :: : "memory");
}
EP_DEVICE void bulk_after_observe() {
    EP_SM90("fence.proxy.async.global;" :: : "memory");
}

// A release here would make every launch longer by the time that its last stores take, half a
// microsecond, for the sake of those in which a rank is lost (ARCHITECTURE.md, Failures).
// What a block has stored that is over takes no millisecond to get to its own device.
constexpr uint64_t kStoresLandNs = 1'000'000;
EP_DEVICE uint64_t leave(uint64_t *word, uint64_t value) {
    return fetch_add(word, value);
}
EP_DEVICE void after_leavers(const uint64_t *word) {
    const uint64_t began_ns = now_ns();
    while (now_ns() - began_ns < kStoresLandNs)
        __nanosleep(1000);
    bulk_await_written();   // what this thread has put itself
    observe<Thread>(word);  // nothing that this multiprocessor has cached of it is used
}

// Two floats to bf16 or fp16, the first in the low half.
template <Element kType>
EP_DEVICE uint32_t cast_pair(float low, float high) {
    uint32_t pair;
    if constexpr (kType == Element::kBf16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

#include "device/lanes.h"

// Two floats to float8_e4m3fn, rounded to nearest even, saturating.
template <int kCount>
EP_DEVICE void cast_fp8(char *to, const Pack<kCount> &values) {
    Words<kCount> raw = {};
    EP_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
        uint16_t two;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
            : "=h"(two)
            : "f"(values.lane[2 * i + 1]), "f"(values.lane[2 * i]));
        raw.word[i / 2] |= uint32_t{two} << i % 2 * 16;
    }
    *reinterpret_cast<decltype(raw) *>(to) = raw;
}

// A store of 8 lanes to a line arrives whole at a GPU of this one's NVLink, and is seen whole.
EP_DEVICE void push(char *at, bool here, bool, Vector piece) {
    if (here)
        asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};" ::"l"(at), "l"(piece.words[0]),
                     "l"(piece.words[1])
                     : "memory");
}
template <int kCount>
EP_DEVICE bool pull(const char *const (&at)[kCount], const bool (&here)[kCount], bool signal,
                    uint64_t epoch, Vector *pieces) {
    EP_UNROLL
    for (int i = 0; i < kCount; ++i)
        if (here[i])
            asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];"
                         : "=l"(pieces[i].words[0]), "=l"(pieces[i].words[1])
                         : "l"(at[i])
                         : "memory");
    bool whole = true;
    EP_UNROLL
    for (int i = 0; i < kCount; ++i)
        whole = whole && (!here[i] || !signal || Signal::is_of(pieces[i].words[0], epoch));
    return Warp::all(whole);
}

// A thread of this kernel has more memory of its own than one of any other here. When it has run,
// the device has set that much aside, and need not do so, which waits for all that runs on it, when
// the first launch comes that needs some.
constexpr int kStackBytes = 1024;
static __global__ void use_stack(int index, volatile char *out) {
    char stack[kStackBytes];
    for (int i = 0; i < kStackBytes; ++i)
        stack[i] = static_cast<char>(i * index);
    if (out != nullptr) *out = stack[index % kStackBytes];
}

// Whether the kernels that were loaded are code for sm_90 or later. Code for older devices,
// compiled for this one by the driver, neither waits for the launch before nor copies in bulk.
inline std::atomic<bool> all_code_is_sm90{true};

// Every launch: `blocks` of `threads`, or only the loading. They share so many bytes beside those
// of EP_SHARED.
template <class Args>
void launch_blocks(void (*kernel)(Args), const Args &args, const Queue &queue, int blocks,
                   int threads, size_t shared_bytes = 0) {
    if (queue.load_only) {
        // The same split of the multiprocessors' memory for all: where it differs, a kernel waits
        // for a multiprocessor to be empty, and so, perhaps, for a kernel that waits for it.
        constexpr int kSharedPercent = 70;
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             kSharedPercent);
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)) != cudaSuccess) {
            cudaGetLastError();  // more than an older device has: it will not be launched
            all_code_is_sm90 = false;
        }
        cudaFuncAttributes attributes;
        constexpr int kSm90 = 90;
        if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
            attributes.ptxVersion < kSm90)
            all_code_is_sm90 = false;
        return;
    }
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(queue.stream);
    config.attrs = &early;
    config.numAttrs = queue.starts_early && all_code_is_sm90 ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, args);
}

// As many senders as multiprocessors; with the receivers and the counter, all blocks fit beside
// each other.
inline int sender_block_count_max(const Queue &queue) {
    return queue.block_count;
}
inline int receiver_block_count_max(const Queue &queue) {
    const int rest = (kBlocksOfProcessor - 1) * queue.block_count - 1;
    return rest < 1 ? 1 : rest;
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
                  size_t shared_bytes) {
    launch_blocks(kernel, args, queue, block_count, kThreads, shared_bytes);
}
inline bool moves_in_bulk(const Queue &queue) {
    return queue.may_move_in_bulk && all_code_is_sm90;
}
template <class Args>
void launch_wide(void (*kernel)(Args), const Args &args, const Queue &queue, int block_count,
                 int threads) {
    launch_blocks(kernel, args, queue, block_count, threads);
}

// A block per item, of as many warps as fill the device; with more items than that, small blocks
// that take several. Never more threads than fit beside each other, whatever the kernel: ranks that
// share a device must not keep each other out.
template <class Args>
void launch_all(void (*kernel)(Args), const Args &args, const Queue &queue, int item_count) {
    if (item_count == 0 && !queue.load_only) return;
    const int warps = kBlocksOfProcessor * kThreads / kWarpSize * queue.block_count;
    int block_warps = kThreads / kWarpSize;
    while (block_warps > 1 && block_warps * item_count > warps)
        block_warps /= 2;
    const int blocks = item_count < warps / block_warps ? item_count : warps / block_warps;
    launch_blocks(kernel, args, queue, blocks, block_warps * kWarpSize);
}
inline int launch_error() {
    return cudaGetLastError();
}

}  // namespace ep::cuda
