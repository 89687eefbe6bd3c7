// Looks for what GPU-initiated RDMA would need. No transport uses it yet; the point is to say why.
#pragma once

#include <string>
#include <vector>

namespace ep {

struct RdmaProbe {
    std::vector<std::string> devices;  // RDMA devices, as libibverbs names them
    std::string reason;                // why RDMA is not used
};

// With libibverbs loaded from `library`, a path or a name for dlopen(3).
RdmaProbe probe_rdma(const char *library);

// Of this machine; looked for once.
const RdmaProbe &machine_rdma();

}  // namespace ep
