// What a command prints, within a deadline.
#pragma once

#include "mooncake_ep.h"

#include "base/deadline.h"

#include <string>

namespace ep {

// Runs `command` by the shell and takes what it prints, a MiB at most; "" if it cannot be run or
// ends with another status than 0. MEP_TIMEOUT if it has not ended at the deadline: it is killed
// then, and what it has started with it.
mep_status_t command_output(const char *command, const Deadline &deadline, std::string *output);

}  // namespace ep
