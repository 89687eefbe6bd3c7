// Every environment variable that the library reads. Nothing else calls getenv.
//
//   RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT  the rendezvous, as torchrun sets them
//   MOONCAKE_EP_PORT_OFFSET  added to MASTER_PORT; default 1
//   MOONCAKE_EP_SECRET       must be the same on all ranks of a rendezvous by environment
//   MOONCAKE_EP_CPU_THREADS  threads of a CPU rank
//   MOONCAKE_EP_DEVICE_FILTER  the NICs to choose from, with commas in between; default: all.
//                            A piece that names none, also a blank one, is an error
//   MOONCAKE_EP_LINES        0: no messages by line, whatever the link; default 1
//   MOONCAKE_EP_BULK_COPIES  0: no rows by bulk copies, whatever the device; default 1
//   MOONCAKE_EP_DISABLE_P2P  1: reach no peer's memory; default 0
//   MOONCAKE_EP_TCP_ADDRESS  host name or IPv4 address of this machine, by which ranks on others
//                            reach it where rows go by TCP
//   MOONCAKE_EP_ISLAND_RANKS  n: ranks [0, n), [n, 2n), ... reach memory of their own only, as if
//                            each such island were another machine; default: no islands
//   MOONCAKE_EP_NCCL_LIBRARY  NCCL's file, or MCCL's on MACA; none: do without; default
//                            libnccl.so.2 (libmccl.so), as the process has it or finds it
//   MOONCAKE_EP_MACA_P2P_PAIRS  pairs of MetaX GPUs that may reach each other besides the near
//                            ones, like 0-3,1-2
//   MOONCAKE_EP_MACA_ALLOW_NODE_P2P  1: all of the host; default 0
//   MOONCAKE_EP_LOG          error, warning, info or debug; default warning
#pragma once

#include "mooncake_ep.h"

#include <string>

namespace ep {

// The text of a variable; "" if it is not set.
std::string env_text(const char *name);

// The variable as an integer in [low, high]; `otherwise` if it is not set. Any other text is an
// error that names the variable, its value and the range.
mep_status_t env_integer(const char *name, long low, long high, long otherwise, long *value);

int32_t env_log_level();

}  // namespace ep
