#include "base/status.h"

#include <cstdarg>
#include <cstdio>

namespace ep {
namespace {
thread_local char last_message[1024];
}

mep_status_t fail(mep_status_t status, const char *format, ...) {
    // Formatted aside first: an argument may be the last message itself.
    char message[sizeof last_message];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    std::memcpy(last_message, message, sizeof message);
    return status;
}

const char *last_error() {
    return last_message;
}

std::string system_error(const char *text, int error) {
    char buffer[128];
    return std::string(text) + ": " + strerror_r(error, buffer, sizeof buffer);
}

}  // namespace ep
