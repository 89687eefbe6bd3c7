// The kernels for one level of the CPU's instruction set. The build compiles this file once a
// level, with the level's flags, its namespace as EP_CPU_LEVEL, and EP_CPU_KERNELS as the function
// to define.
#include "kernels/table.h"

namespace ep {

Kernels EP_CPU_KERNELS() {
    return EP_DEVICE_NAMESPACE::kernels();
}

}  // namespace ep
