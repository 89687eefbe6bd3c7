// How this library reports failure: return fail(...), pass it up with EP_TRY.
// The first function to see an error words it; callers only pass it on.
#pragma once

#include "mooncake_ep.h"

#include <cstring>
#include <string>

namespace ep {

// Stores the message for mep_last_error() and returns `status`.
[[gnu::format(printf, 2, 3)]] mep_status_t fail(mep_status_t status, const char *format, ...);

// The message of this thread's last failure; for passing it to another rank.
const char *last_error();

// Of what another rank says that it failed with: a status that there is, and a text that may be
// printed and is not empty.
mep_status_t known_failure(mep_status_t told);
std::string printable(const char *told);

// "text: strerror(error)" for a failed system call.
std::string system_error(const char *text, int error);

#define EP_TRY(call)                                                                \
    do {                                                                            \
        if (const mep_status_t status_ = (call); status_ != MEP_OK) return status_; \
    } while (0)

// Copies a struct that crossed the C boundary. A caller built against an older
// header gives fewer bytes: the rest read as zero, which means "default". A
// newer caller gives more: accepted unless it set something we do not know.
template <class T>
mep_status_t read_struct(T *ours, const T *theirs, const char *name) {
    if (theirs == nullptr) return fail(MEP_INVALID_ARGUMENT, "%s is NULL", name);
    uint32_t size = 0;
    std::memcpy(&size, theirs, sizeof size);
    // No version ends in the middle of a field: half of a pointer is not taken for one.
    if (size < sizeof size || size % alignof(T) != 0)
        return fail(MEP_INVALID_ARGUMENT, "%s.struct_size is %u; set it to sizeof the struct", name,
                    size);
    const auto *bytes = reinterpret_cast<const unsigned char *>(theirs);
    for (size_t i = sizeof(T); i < size; ++i)
        if (bytes[i] != 0)
            return fail(MEP_UNSUPPORTED,
                        "%s: byte %zu is set, but this version knows only %zu bytes", name, i,
                        sizeof(T));
    std::memset(static_cast<void *>(ours), 0, sizeof(T));
    std::memcpy(static_cast<void *>(ours), theirs, size < sizeof(T) ? size : sizeof(T));
    return MEP_OK;
}

// Hands a struct to the caller, as much of it as the caller's header knows.
template <class T>
mep_status_t write_struct(T *theirs, const T &ours, const char *name) {
    if (theirs == nullptr) return fail(MEP_INVALID_ARGUMENT, "%s is NULL", name);
    uint32_t size = 0;
    std::memcpy(&size, theirs, sizeof size);
    if (size < sizeof size)
        return fail(MEP_INVALID_ARGUMENT, "%s.struct_size is %u; set it to sizeof the struct", name,
                    size);
    const size_t known = size < sizeof(T) ? size : sizeof(T);
    std::memcpy(reinterpret_cast<unsigned char *>(theirs) + sizeof size,
                reinterpret_cast<const unsigned char *>(&ours) + sizeof size, known - sizeof size);
    return MEP_OK;
}

}  // namespace ep
