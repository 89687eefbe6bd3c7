// The kernels of the device that this translation unit is compiled for, as a table.
#pragma once

#include "kernels/combine.h"
#include "kernels/dispatch.h"

namespace ep::EP_DEVICE_NAMESPACE {

inline Kernels kernels(int tally_warps) {
    return {tally_warps, launch_dispatch_send, launch_dispatch_receive, launch_combine_send,
            launch_combine_receive};
}

}  // namespace ep::EP_DEVICE_NAMESPACE
