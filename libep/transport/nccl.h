// The parts of NCCL that carry boxes, from the library that is there at run time; MetaX's MCCL has
// the same by other names. Declared here: its header is no dependency.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ep {

struct Nccl {
    struct Communicator;
    struct UniqueId {
        char bytes[128];
    };
    static constexpr int kSuccess = 0, kInProgress = 7, kBytes = 0;  // of its enumerations

    int (*get_version)(int *version) = nullptr;
    int (*get_unique_id)(UniqueId *id) = nullptr;
    int (*init_rank)(Communicator **communicator, int rank_count, UniqueId id, int rank) = nullptr;
    int (*destroy)(Communicator *communicator) = nullptr;
    int (*abort)(Communicator *communicator) = nullptr;
    int (*get_async_error)(Communicator *communicator, int *error) = nullptr;
    int (*group_start)() = nullptr;
    int (*group_end)() = nullptr;
    int (*send)(const void *data, size_t count, int type, int peer, Communicator *communicator,
                void *stream) = nullptr;
    int (*receive)(void *data, size_t count, int type, int peer, Communicator *communicator,
                   void *stream) = nullptr;
    const char *(*error_text)(int error) = nullptr;

    // Memory that peers' GPUs reach, and what says so; nullptr: this version has none of it.
    int (*allocate)(void **memory, size_t bytes) = nullptr;
    int (*release)(void *memory) = nullptr;
    int (*enlist)(Communicator *communicator, void *memory, size_t bytes,
                  void **registration) = nullptr;
    int (*strike_off)(Communicator *communicator, void *registration) = nullptr;
    bool has_own_memory() const {
        return allocate != nullptr && release != nullptr && enlist != nullptr &&
               strike_off != nullptr;
    }

    const char *name = "NCCL";
    std::string problem;  // why it cannot be used; "" if it can

    int version() const;  // 0 if it cannot be used

    // Of MEP_BACKEND_CUDA or MEP_BACKEND_MACA; loaded once.
    static const Nccl &of(int32_t backend);

    // `prefix`: of its functions.
    static Nccl load(const char *name, const char *library, const std::string &prefix);
};

}  // namespace ep
