// One log sink for the process; see mep_log_set_callback.
#pragma once

#include "mooncake_ep.h"

namespace ep {

void set_log_callback(mep_log_callback_t callback, void *context, int32_t level);

[[gnu::format(printf, 2, 3)]] void log(int32_t level, const char *format, ...);

}  // namespace ep
