// Ranks on the CPU, which are threads. See support/abi.h.
#include "support/place_host.h"

namespace ep::test {

Memory allocate(size_t bytes) {
    return {new char[bytes], [](char *memory) { delete[] memory; }};
}

}  // namespace ep::test
