#include "topology/graph.h"

#include "base/status.h"
#include "topology/pci_path.h"
#include "topology/text.h"

#include <algorithm>
#include <utility>

namespace ep {
namespace {

constexpr std::string_view kFirstLine = "mooncake_ep topology 1";
constexpr std::string_view kLastLine = "end";
constexpr std::string_view kNothing = "-";  // stands for an empty word

// ---- Names -------------------------------------------------------------------------------------

template <class T>
struct Name {
    T value;
    std::string_view text;
};

constexpr Name<Vendor> kVendors[] = {
    {Vendor::kNone, "none"}, {Vendor::kNvidia, "nvidia"}, {Vendor::kMetax, "metax"}};

constexpr Name<PortState> kPortStates[] = {{PortState::kDown, "down"},
                                           {PortState::kInit, "init"},
                                           {PortState::kArmed, "armed"},
                                           {PortState::kActive, "active"},
                                           {PortState::kActiveDefer, "active_defer"}};

constexpr Name<LinkLayer> kLinkLayers[] = {{LinkLayer::kInfiniband, "infiniband"},
                                           {LinkLayer::kEthernet, "ethernet"},
                                           {LinkLayer::kUnspecified, "unspecified"}};

constexpr Name<LinkKind> kLinkKinds[] = {
    {LinkKind::kProcess, "PROC"}, {LinkKind::kSharedMemory, "SHM"}, {LinkKind::kNvlink, "NV"},
    {LinkKind::kMetaxlink, "MX"}, {LinkKind::kPix, "PIX"},          {LinkKind::kPxb, "PXB"},
    {LinkKind::kPhb, "PHB"},      {LinkKind::kNode, "NODE"},        {LinkKind::kSys, "SYS"}};

template <class T, size_t n>
std::string name_of(const Name<T> (&names)[n], T value) {
    for (const Name<T> &name : names)
        if (name.value == value) return std::string(name.text);
    return "?";
}

template <class T, size_t n>
bool value_of(const Name<T> (&names)[n], std::string_view text, T *value) {
    for (const Name<T> &name : names)
        if (name.text == text) {
            *value = name.value;
            return true;
        }
    return false;
}

// ---- Lines: each reader returns what is wrong, or "" -------------------------------------------

std::string read_numa_node(const Words &words, Topology *topology) {
    int node = 0;
    if (words.size() != 2) return "a NUMA node is \"numa NODE\"";
    if (!parse_number(words[1], kNumaNodeMax, &node))
        return in_quotes(words[1]) + " is not a NUMA node";
    if (!topology->numa_nodes.empty() && node <= topology->numa_nodes.back())
        return "NUMA node " + std::to_string(node) + " follows node " +
               std::to_string(topology->numa_nodes.back()) + ": nodes must ascend";
    topology->numa_nodes.push_back(node);
    return "";
}

// What GPUs and NICs share.
std::string read_place(const Topology &topology, std::string_view path, std::string_view node,
                       PciPlace *place) {
    *place = {"", kNumaNodeUnknown};
    if (path != kNothing) {
        if (!is_pci_path(path)) return in_quotes(path) + " is not a PCI path";
        place->path = path;
    }
    if (node == kNothing) return "";
    const auto &nodes = topology.numa_nodes;
    if (!parse_number(node, kNumaNodeMax, &place->numa_node) ||
        !std::binary_search(nodes.begin(), nodes.end(), place->numa_node))
        return in_quotes(node) + " is not one of the NUMA nodes above";
    return "";
}

std::string read_gpu(const Words &words, Topology *topology) {
    if (words.size() != 8 || words[4] != "numa" || words[6] != "uuid")
        return "a GPU is \"gpu INDEX VENDOR PCI-PATH numa NODE uuid UUID\"";
    const int count = static_cast<int>(topology->gpus.size());
    int index = 0;
    if (!parse_number(words[1], kGpuIndexMax, &index) || index != count)
        return in_quotes(words[1]) + " must be " + std::to_string(count) +
               ": GPUs are counted from 0 on";
    Gpu gpu{};
    if (!value_of(kVendors, words[2], &gpu.vendor))
        return in_quotes(words[2]) + " is not nvidia, metax or none";
    PciPlace place{};
    const std::string wrong = read_place(*topology, words[3], words[5], &place);
    if (!wrong.empty()) return wrong;
    if ((gpu.vendor == Vendor::kNone) != place.path.empty())
        return "a GPU has a PCI path, and what has the vendor none has not";
    for (const Gpu &other : topology->gpus)
        if (!place.path.empty() && pci_address(other.pci_path) == pci_address(place.path))
            return pci_address(place.path) + " is the address of another GPU above";
    gpu.pci_path = place.path;
    gpu.numa_node = place.numa_node;
    if (words[7] != kNothing) gpu.uuid = words[7];
    topology->gpus.push_back(std::move(gpu));
    return "";
}

std::string read_nic(const Words &words, Topology *topology) {
    if (words.size() != 7 || words[5] != "numa")
        return "a NIC is \"nic NAME STATE LINK-LAYER PCI-PATH numa NODE\"";
    Nic nic{};
    nic.name = words[1];
    if (find_nic(*topology, nic.name) >= 0) return "NIC " + in_quotes(nic.name) + " is there twice";
    if (!value_of(kPortStates, words[2], &nic.port_state))
        return in_quotes(words[2]) + " is not down, init, armed, active or active_defer";
    if (!value_of(kLinkLayers, words[3], &nic.link_layer))
        return in_quotes(words[3]) + " is not infiniband, ethernet or unspecified";
    PciPlace place{};
    const std::string wrong = read_place(*topology, words[4], words[6], &place);
    if (!wrong.empty()) return wrong;
    nic.pci_path = place.path;
    nic.numa_node = place.numa_node;
    topology->nics.push_back(std::move(nic));
    return "";
}

std::string read_gpu_index(const Topology &topology, std::string_view word, int *index) {
    if (!parse_number(word, static_cast<int>(topology.gpus.size()) - 1, index))
        return in_quotes(word) + " is not one of the GPUs above";
    return "";
}

std::string read_nic_link(int gpu, const Words &words, Topology *topology) {
    NicLink link{gpu, find_nic(*topology, words[4]), LinkKind::kSys};
    if (link.nic < 0) return in_quotes(words[4]) + " is not one of the NICs above";
    int lane_count = 0;
    if (!parse_link_name(words[5], &link.kind, &lane_count) || link.kind < LinkKind::kPix)
        return in_quotes(words[5]) + " is not PIX, PXB, PHB, NODE or SYS";
    if (find_nic_link(*topology, link.gpu, link.nic) != nullptr)
        return "GPU " + std::to_string(gpu) + " and NIC " + in_quotes(words[4]) +
               " are linked twice";
    topology->nic_links.push_back(link);
    return "";
}

std::string read_gpu_link(int one, const Words &words, Topology *topology) {
    GpuLink link{one, 0, LinkKind::kSys, 0};
    const std::string wrong = read_gpu_index(*topology, words[4], &link.other);
    if (!wrong.empty()) return wrong;
    const std::string pair = std::to_string(link.one) + " and " + std::to_string(link.other);
    if (link.one >= link.other) return "GPUs " + pair + ": the first must be below the second";
    if (!parse_link_name(words[5], &link.kind, &link.lane_count))
        return in_quotes(words[5]) + " is not a kind of link";
    if (!link_suits(link.kind, topology->gpus[link.one].vendor, topology->gpus[link.other].vendor))
        return "GPUs " + pair + " cannot be linked by " + std::string(words[5]);
    if (find_gpu_link(*topology, link.one, link.other) != nullptr)
        return "GPUs " + pair + " are linked twice";
    topology->gpu_links.push_back(link);
    return "";
}

std::string read_link(const Words &words, Topology *topology) {
    if (words.size() != 6 || words[1] != "gpu" || (words[3] != "gpu" && words[3] != "nic"))
        return "a link is \"link gpu INDEX gpu INDEX KIND\" or \"link gpu INDEX nic NAME KIND\"";
    int gpu = 0;
    const std::string wrong = read_gpu_index(*topology, words[2], &gpu);
    if (!wrong.empty()) return wrong;
    return words[3] == "gpu" ? read_gpu_link(gpu, words, topology)
                             : read_nic_link(gpu, words, topology);
}

std::string read_item(std::string_view line, Topology *topology) {
    // Exactly one blank, so that there is one way to write an item.
    const Words words = split(line, ' ');
    if (!std::all_of(words.begin(), words.end(), is_word))
        return "words are printable and parted by one space: " + in_quotes(line);
    if (words[0] == "numa") return read_numa_node(words, topology);
    if (words[0] == "gpu") return read_gpu(words, topology);
    if (words[0] == "nic") return read_nic(words, topology);
    if (words[0] == "link") return read_link(words, topology);
    return in_quotes(words[0]) + " is not numa, gpu, nic or link";
}

mep_status_t fail_at(size_t line, const std::string &wrong) {
    return fail(MEP_INVALID_ARGUMENT, "topology, line %zu: %s", line, wrong.c_str());
}

std::string or_nothing(const std::string &text) {
    return text.empty() ? std::string(kNothing) : text;
}

std::string numa_text(int node) {
    return node == kNumaNodeUnknown ? std::string(kNothing) : std::to_string(node);
}

}  // namespace

const GpuLink *find_gpu_link(const Topology &topology, int one, int other) {
    const auto [low, high] = std::minmax(one, other);
    for (const GpuLink &link : topology.gpu_links)
        if (link.one == low && link.other == high) return &link;
    return nullptr;
}

const NicLink *find_nic_link(const Topology &topology, int gpu, int nic) {
    for (const NicLink &link : topology.nic_links)
        if (link.gpu == gpu && link.nic == nic) return &link;
    return nullptr;
}

int find_nic(const Topology &topology, std::string_view name) {
    for (size_t i = 0; i < topology.nics.size(); ++i)
        if (topology.nics[i].name == name) return static_cast<int>(i);
    return -1;
}

std::string link_name(LinkKind kind, int lane_count) {
    const std::string name = name_of(kLinkKinds, kind);
    return kind == LinkKind::kNvlink ? name + std::to_string(lane_count) : name;
}

bool parse_link_name(std::string_view name, LinkKind *kind, int *lane_count) {
    int lanes = 0;
    LinkKind parsed = LinkKind::kNvlink;
    if (name.substr(0, 2) == "NV") {
        if (!parse_number(name.substr(2), kLaneCountMax, &lanes) || lanes == 0) return false;
    } else if (!value_of(kLinkKinds, name, &parsed)) {
        return false;
    }
    *kind = parsed;
    *lane_count = lanes;
    return true;
}

bool link_suits(LinkKind kind, Vendor one, Vendor other) {
    const auto both = [=](Vendor vendor) { return one == vendor && other == vendor; };
    switch (kind) {
        case LinkKind::kProcess:
        case LinkKind::kSharedMemory:
            return both(Vendor::kNone);
        case LinkKind::kNvlink:
            return both(Vendor::kNvidia);
        case LinkKind::kMetaxlink:
            return both(Vendor::kMetax);
        default:
            return one != Vendor::kNone && other != Vendor::kNone;
    }
}

std::string save_topology(const Topology &topology) {
    std::string text = std::string(kFirstLine) + "\n";
    for (const int node : topology.numa_nodes)
        text += "numa " + std::to_string(node) + "\n";
    for (size_t i = 0; i < topology.gpus.size(); ++i) {
        const Gpu &gpu = topology.gpus[i];
        text += "gpu " + std::to_string(i) + " " + name_of(kVendors, gpu.vendor) + " " +
                or_nothing(gpu.pci_path) + " numa " + numa_text(gpu.numa_node) + " uuid " +
                or_nothing(gpu.uuid) + "\n";
    }
    for (const Nic &nic : topology.nics)
        text += "nic " + nic.name + " " + name_of(kPortStates, nic.port_state) + " " +
                name_of(kLinkLayers, nic.link_layer) + " " + or_nothing(nic.pci_path) + " numa " +
                numa_text(nic.numa_node) + "\n";
    for (const GpuLink &link : topology.gpu_links)
        text += "link gpu " + std::to_string(link.one) + " gpu " + std::to_string(link.other) +
                " " + link_name(link.kind, link.lane_count) + "\n";
    for (const NicLink &link : topology.nic_links)
        text += "link gpu " + std::to_string(link.gpu) + " nic " + topology.nics[link.nic].name +
                " " + link_name(link.kind, 0) + "\n";
    return text + std::string(kLastLine) + "\n";
}

mep_status_t load_topology(std::string_view text, Topology *topology) {
    const Words lines = split(text, '\n');
    if (lines[0] != kFirstLine)
        return fail_at(1, in_quotes(lines[0]) + " must be " + in_quotes(kFirstLine));
    Topology loaded;
    for (size_t i = 1; i < lines.size(); ++i) {
        if (lines[i] == kLastLine) {
            if (i + 2 != lines.size() || !lines[i + 1].empty())
                return fail_at(i + 1, "a newline and nothing else must follow \"end\"");
            *topology = std::move(loaded);
            return MEP_OK;
        }
        if (i + 1 == lines.size() && lines[i].empty()) break;
        const std::string wrong = read_item(lines[i], &loaded);
        if (!wrong.empty()) return fail_at(i + 1, wrong);
    }
    return fail_at(lines.size(), "the text stops before its last line, \"end\"");
}

}  // namespace ep
