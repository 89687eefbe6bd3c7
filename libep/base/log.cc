#include "base/log.h"

#include "base/env.h"

#include <cstdarg>
#include <cstdio>
#include <mutex>

namespace ep {
namespace {

struct Sink {
    mep_log_callback_t callback = nullptr;
    void *context = nullptr;
    int32_t level = env_log_level();
    std::mutex mutex;
};

Sink &sink() {
    static Sink the_sink;
    return the_sink;
}

}  // namespace

void set_log_callback(mep_log_callback_t callback, void *context, int32_t level) {
    Sink &s = sink();
    const std::lock_guard<std::mutex> lock(s.mutex);
    s.callback = callback;
    s.context = context;
    s.level = level;
}

void log(int32_t level, const char *format, ...) {
    mep_log_callback_t callback = nullptr;
    void *context = nullptr;
    {
        Sink &s = sink();
        const std::lock_guard<std::mutex> lock(s.mutex);
        if (level > s.level) return;
        callback = s.callback;
        context = s.context;
    }
    char message[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    // Outside the lock: the callback may call the library.
    if (callback != nullptr)
        callback(context, level, message);
    else
        std::fprintf(stderr, "mooncake_ep: %s\n", message);
}

}  // namespace ep
