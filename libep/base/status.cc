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

mep_status_t known_failure(mep_status_t told) {
    switch (told) {
        case MEP_INVALID_ARGUMENT:
        case MEP_UNSUPPORTED:
        case MEP_INVALID_STATE:
        case MEP_OUT_OF_MEMORY:
        case MEP_DEVICE_ERROR:
        case MEP_SYSTEM_ERROR:
        case MEP_PEER_FAILED:
        case MEP_TIMEOUT:
        case MEP_MISMATCH:
            return told;
        default:
            return MEP_BOOTSTRAP_FAILED;
    }
}

std::string printable(const char *told) {
    std::string text = *told == '\0' ? "it gave no reason" : told;
    for (char &c : text)
        if (c < ' ' || c > '~') c = '?';
    return text;
}

std::string system_error(const char *text, int error) {
    char buffer[128];
    return std::string(text) + ": " + strerror_r(error, buffer, sizeof buffer);
}

}  // namespace ep
