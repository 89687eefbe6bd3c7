// What the exported functions have in common: they check the arguments and call the core.
#pragma once

#include "base/status.h"

#include <new>
#include <utility>

namespace ep::api {

inline mep_status_t not_null(const void *pointer, const char *name) {
    return pointer != nullptr ? MEP_OK : fail(MEP_INVALID_ARGUMENT, "%s is NULL", name);
}

// Makes the C object around a C++ one.
template <class C, class Inner>
mep_status_t wrap(Inner inner, C **object) {
    auto *created = new (std::nothrow) C{std::move(inner)};
    if (created == nullptr) return fail(MEP_OUT_OF_MEMORY, "no memory for an object");
    *object = created;
    return MEP_OK;
}

inline mep_status_t check_timeout(int64_t timeout_us, const char *name) {
    if (timeout_us >= -1) return MEP_OK;
    return fail(MEP_INVALID_ARGUMENT, "%s is %lld; it must be -1 (never), 0 (default) or more",
                name, static_cast<long long>(timeout_us));
}

}  // namespace ep::api
