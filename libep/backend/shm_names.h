// Names of shared memory, for as short as it has one. A process that is killed meanwhile leaves its
// name behind, so a name says whose it is, and whoever makes the next one takes such names away.
#pragma once

#include "mooncake_ep.h"

#include <string>

namespace ep {

// One that nobody can guess, "/mooncake_ep-..." of at most 63 characters.
mep_status_t new_shm_name(std::string *name);

// Unlinks those of processes of this user that are gone, as far as this process can tell.
void sweep_shm_names();

}  // namespace ep
