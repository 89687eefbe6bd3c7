// What a command prints, within a deadline.
#pragma once

#include "mooncake_ep.h"

#include "base/deadline.h"

#include <string>

namespace ep {

// Runs `command`, words with a blank in between, of which the first is a program on the path, and
// takes what it prints, a MiB at most; "" if there is no such program that may be run. A program
// that ends badly, or that prints nothing, is MEP_SYSTEM_ERROR with its status and the first line
// of what it said. MEP_TIMEOUT if it has not ended at the deadline: it is killed then, and what it
// has started with it.
mep_status_t command_output(const char *command, const Deadline &deadline, std::string *output);

}  // namespace ep
