// The same round on the CPU and on a GPU. The CPU's kernels are tested against the oracle; a GPU
// must give the same bits, in every array, also where nothing is written.
#pragma once

#include "mooncake_ep.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

// The backend under test: CUDA's, or what the shim of MACA makes of it (tests/maca).
#if !defined(EP_TEST_BACKEND)
#define EP_TEST_BACKEND MEP_BACKEND_CUDA
#endif

namespace gpu {

enum class Weights { kAtDispatch, kAtCombine, kNone };

enum class Order {
    kWhole,
    kHalves,
    kCrossed,  // two dispatches in flight, received in the other order; their combines likewise
};

struct Problem {
    int ranks = 2, tokens_max = 32, hidden = 256, experts = 8, topk = 2;
    int type_code = MEP_TYPE_BFLOAT, type_bits = 16;
    uint32_t quant = MEP_QUANT_NONE;
    Weights weights = Weights::kAtDispatch;
    uint32_t seed = 1;
    Order order = Order::kWhole;
    int rounds = 3;          // even if crossed
    int sms = 0;             // that a launch may fill; 0: all
    int64_t timeout_us = 0;  // of a call; 0: the group's

    int64_t local() const { return experts / ranks; }
    int64_t rows() const { return int64_t(ranks) * tokens_max; }
};

// Who runs, and where: one rank on one backend. Ranks meet in a world or over an id.
struct Seat {
    int rank = 0, backend = MEP_BACKEND_CPU, device = 0;
    mep_world_t *world = nullptr;
    const mep_unique_id_t *id = nullptr;
    // Other threads' ranks are on this GPU: a call has to end before the next is queued.
    bool shares_gpu = false;
    size_t guard_bytes = 0;  // around each array, where nothing may be written

    bool on_gpu() const { return backend != MEP_BACKEND_CPU; }
};

// Memory of one backend.
class Memory {
  public:
    Memory() = default;
    Memory(bool on_gpu, size_t bytes, size_t guard_bytes = 0)
        : on_gpu_(on_gpu), bytes_(bytes), guard_bytes_(guard_bytes) {
        const size_t all = bytes + 2 * guard_bytes;
        if (on_gpu_)
            cudaMalloc(&all_, all + 1);
        else
            all_ = aligned_alloc(kAlignment, (all + kAlignment) / kAlignment * kAlignment);
        const std::vector<char> guard(guard_bytes, kGuard);
        for (char *at : {before(), after()})
            copy(at, guard.data(), guard_bytes, cudaMemcpyHostToDevice);
    }
    Memory(Memory &&other) noexcept { swap(other); }
    Memory &operator=(Memory &&other) noexcept {
        swap(other);
        return *this;
    }
    ~Memory() {
        if (on_gpu_)
            cudaFree(all_);
        else
            free(all_);
    }
    void *data() const { return before() + guard_bytes_; }
    size_t bytes() const { return bytes_; }
    void put(const void *from) const { copy(data(), from, bytes_, cudaMemcpyHostToDevice); }
    std::vector<char> get() const {
        std::vector<char> bytes(bytes_);
        copy(bytes.data(), data(), bytes_, cudaMemcpyDeviceToHost);
        return bytes;
    }
    bool guards_are_whole() const {
        const std::vector<char> whole(guard_bytes_, kGuard);
        std::vector<char> guard(guard_bytes_);
        for (const char *at : {before(), after()}) {
            copy(guard.data(), at, guard_bytes_, cudaMemcpyDeviceToHost);
            if (guard != whole) return false;
        }
        return true;
    }

  private:
    static constexpr size_t kAlignment = 64;
    static constexpr char kGuard = 0x5a;

    char *before() const { return static_cast<char *>(all_); }
    char *after() const { return before() + guard_bytes_ + bytes_; }
    void swap(Memory &other) {
        std::swap(all_, other.all_);
        std::swap(bytes_, other.bytes_);
        std::swap(guard_bytes_, other.guard_bytes_);
        std::swap(on_gpu_, other.on_gpu_);
    }
    void copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) const {
        if (bytes == 0) return;
        if (on_gpu_)
            cudaMemcpy(to, from, bytes, kind);
        else
            std::memcpy(to, from, bytes);
    }
    void *all_ = nullptr;
    bool on_gpu_ = false;
    size_t bytes_ = 0, guard_bytes_ = 0;
};

// An array with its description.
struct Array {
    static constexpr char kPoison = char(0xa5);  // of what nobody has written

    Memory memory;
    std::vector<int64_t> shape;
    mep_tensor_t tensor{};

    Array(const Seat &seat, int code, int bits, std::vector<int64_t> dimensions)
        : shape(std::move(dimensions)) {
        size_t count = 1;
        for (const int64_t extent : shape)
            count *= extent;
        memory = Memory(seat.on_gpu(), count * bits / 8, seat.guard_bytes);
        tensor.data = memory.data();
        tensor.device = {seat.on_gpu() ? MEP_DEVICE_CUDA : MEP_DEVICE_CPU,
                         seat.on_gpu() ? seat.device : 0};
        tensor.ndim = static_cast<int32_t>(shape.size());
        tensor.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
        tensor.shape = shape.data();
        const std::vector<char> poison(memory.bytes(), kPoison);
        memory.put(poison.data());
    }
    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;
};

// What a rank ends with: each array's name and bytes.
using Results = std::vector<std::pair<std::string, std::vector<char>>>;

// One rank's inputs of a round, on the host.
struct Inputs {
    int tokens;
    std::vector<char> x;
    std::vector<int32_t> idx;
    std::vector<float> weights;

    static Inputs of(const Problem &p, int rank, int round);
};

// Does something with a problem as one rank; empty results and a text on failure.
using Run = Results (*)(const Problem &problem, const Seat &seat, std::string *failure);

// The rounds of the problem, each with arrays of its own.
Results run_rounds(const Problem &problem, const Seat &seat, std::string *failure);

// Rounds in the same arrays, whose inputs change: on a GPU as replays of one graph, with a round
// that is called in between now and then, on another handle and other arrays.
Results run_replays(const Problem &problem, const Seat &seat, std::string *failure);

// Rounds in halves on two ranks or more; before and while each is received, what lies in this
// rank's window is spoiled. Fails if something was written that a round does not tell of.
Results run_among_garbage(const Problem &problem, const Seat &seat, std::string *failure);

// A round in which a rank dies between its counts and the last of its rows; it gives no results.
constexpr int kDyingRank = 1;
Results run_losing_rows(const Problem &problem, const Seat &seat, std::string *failure);

// The first array that differs; "" if none does.
std::string difference(const Results &cpu, const Results &gpu);

}  // namespace gpu
