#include "base/env.h"

#include "base/status.h"

#include <cerrno>
#include <cstdlib>

namespace ep {

std::string env_text(const char *name) {
    const char *text = std::getenv(name);
    return text == nullptr ? "" : text;
}

mep_status_t env_integer(const char *name, long low, long high, long otherwise, long *value) {
    const std::string text = env_text(name);
    if (text.empty()) {
        *value = otherwise;
        return MEP_OK;
    }
    char *end = nullptr;
    errno = 0;
    const long parsed = std::strtol(text.c_str(), &end, 10);
    if (errno != 0 || *end != '\0' || parsed < low || parsed > high)
        return fail(MEP_INVALID_ARGUMENT, "%s is \"%s\"; it must be an integer in [%ld, %ld]", name,
                    text.c_str(), low, high);
    *value = parsed;
    return MEP_OK;
}

int32_t env_log_level() {
    const std::string text = env_text("MOONCAKE_EP_LOG");
    if (text == "error") return MEP_LOG_ERROR;
    if (text == "info") return MEP_LOG_INFO;
    if (text == "debug") return MEP_LOG_DEBUG;
    return MEP_LOG_WARNING;
}

}  // namespace ep
