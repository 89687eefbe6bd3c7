// A machine as plain data: its NUMA nodes, GPUs and NICs, and how they are linked. Others fill it
// in (sysfs.h, smi.h); it can be saved as text, looked at, and loaded again, here or elsewhere.
#pragma once

#include "mooncake_ep.h"

#include <string>
#include <string_view>
#include <vector>

namespace ep {

constexpr int kNumaNodeUnknown = -1;
constexpr int kNumaNodeMax = 9999;
constexpr int kGpuIndexMax = 9999;
constexpr int kLaneCountMax = 999;

// kNone: no GPU at all, a rank that computes on the CPU. It has neither UUID nor PCI path.
enum class Vendor { kNone, kNvidia, kMetax };

struct Gpu {
    Vendor vendor;
    std::string uuid;      // "" if unknown
    std::string pci_path;  // see pci_path.h
    int numa_node;
};

enum class PortState { kDown, kInit, kArmed, kActive, kActiveDefer };
enum class LinkLayer { kInfiniband, kEthernet, kUnspecified };

struct Nic {
    std::string name;      // of the InfiniBand device, for example mlx5_0
    PortState port_state;  // of its port 1, as the link layer
    LinkLayer link_layer;
    std::string pci_path;  // "" if it is made of software
    int numa_node;
};

// From near to far. PIX to SYS: across one PCIe switch, several bridges, the host bridge, host
// bridges of one NUMA node, NUMA nodes. The first two are for ranks on the CPU.
enum class LinkKind { kProcess, kSharedMemory, kNvlink, kMetaxlink, kPix, kPxb, kPhb, kNode, kSys };

struct GpuLink {
    int one, other;  // one < other
    LinkKind kind;
    int lane_count;  // of NVLink; otherwise 0
};

struct NicLink {
    int gpu;
    int nic;        // its place in Topology::nics
    LinkKind kind;  // PIX to SYS
};

struct Topology {
    std::vector<int> numa_nodes;  // ascending
    std::vector<Gpu> gpus;        // by index
    std::vector<Nic> nics;
    std::vector<GpuLink> gpu_links;  // at most one for a pair; none: nobody knows
    std::vector<NicLink> nic_links;
};

const GpuLink *find_gpu_link(const Topology &topology, int one, int other);
const NicLink *find_nic_link(const Topology &topology, int gpu, int nic);
int find_nic(const Topology &topology, std::string_view name);  // -1: there is none

// "NV18", "MX", "PIX", "PXB", "PHB", "NODE", "SYS", "PROC" or "SHM".
std::string link_name(LinkKind kind, int lane_count);
bool parse_link_name(std::string_view name, LinkKind *kind, int *lane_count);

// Whether two GPUs can be linked so: NVLink joins NVIDIA's, and ranks on the CPU have no PCI.
bool link_suits(LinkKind kind, Vendor one, Vendor other);

// One item a line, between a first line with the version and a last line that shows that nothing
// was cut off.
std::string save_topology(const Topology &topology);

// Fails with the number of the first line that is wrong and what is wrong with it. What refers to a
// GPU, a NIC or a NUMA node comes after it.
mep_status_t load_topology(std::string_view text, Topology *topology);

}  // namespace ep
