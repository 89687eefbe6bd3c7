// The CPU's kernels, compiled once for each level of the instruction set that is worth it. All
// levels give the same bits.
#pragma once

#include "kernels/kernels.h"

#include <vector>

namespace ep {

struct CpuLevel {
    const char *name;
    bool supported;  // by this machine
    Kernels kernels;
};

// From the plainest to the widest of this build.
std::vector<CpuLevel> cpu_levels();

}  // namespace ep
