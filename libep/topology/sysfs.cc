#include "topology/sysfs.h"

#include "base/status.h"
#include "topology/pci_path.h"
#include "topology/text.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>

namespace ep {
namespace {

namespace fs = std::filesystem;

constexpr size_t kAttributeBytesMax = 4096;  // a sysfs attribute is at most a page

// ---- Files -------------------------------------------------------------------------------------

mep_status_t fail_to_read(const fs::path &path, const std::error_code &error) {
    return fail(MEP_SYSTEM_ERROR, "cannot read %s: %s", path.c_str(), error.message().c_str());
}

// What is there but cannot be read is not missing: reading it gives the reason.
bool is_missing(const fs::path &path) {
    std::error_code error;
    return fs::status(path, error).type() == fs::file_type::not_found;
}

// The entries of a folder in the natural order of their names, mlx5_2 before mlx5_10.
mep_status_t list_folder(const fs::path &folder, std::vector<std::string> *names) {
    std::vector<std::string> found;
    std::error_code error;
    fs::directory_iterator entry(folder, error);
    for (; !error && entry != fs::directory_iterator(); entry.increment(error))
        found.push_back(entry->path().filename());
    if (error) return fail_to_read(folder, error);
    std::sort(found.begin(), found.end(), [](const std::string &one, const std::string &other) {
        return strverscmp(one.c_str(), other.c_str()) < 0;
    });
    *names = std::move(found);
    return MEP_OK;
}

// The same, but a folder that is not there is empty: a kernel makes only those that it needs.
mep_status_t list_folder_if_any(const fs::path &folder, std::vector<std::string> *names) {
    if (!is_missing(folder)) return list_folder(folder, names);
    names->clear();
    return MEP_OK;
}

// The text of an attribute, without its newline.
mep_status_t read_attribute(const fs::path &path, std::string *text) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "re"),
                                                                &std::fclose);
    if (file == nullptr) return fail_to_read(path, {errno, std::generic_category()});
    char bytes[kAttributeBytesMax];
    errno = 0;
    const size_t count = std::fread(bytes, 1, sizeof bytes, file.get());
    if (std::ferror(file.get())) return fail_to_read(path, {errno, std::generic_category()});
    const std::string_view all(bytes, count);
    *text = all.substr(0, all.find('\n'));
    return MEP_OK;
}

// ---- NUMA nodes --------------------------------------------------------------------------------

mep_status_t read_numa_nodes(const fs::path &sys, std::vector<int> *nodes) {
    constexpr std::string_view prefix = "node";
    std::vector<std::string> names;
    EP_TRY(list_folder_if_any(sys / "devices/system/node", &names));
    for (const std::string &name : names) {
        int node = 0;
        if (std::string_view(name).substr(0, prefix.size()) == prefix &&
            parse_number(std::string_view(name).substr(prefix.size()), kNumaNodeMax, &node))
            nodes->push_back(node);
    }
    std::sort(nodes->begin(), nodes->end());
    return MEP_OK;
}

// The node of a PCI device. A kernel built without NUMA has no such attribute, and -1 says that the
// firmware did not tell, which leaves no doubt where there is only one node.
mep_status_t read_numa_node(const fs::path &device, const std::vector<int> &nodes, int *node) {
    const fs::path path = device / "numa_node";
    std::string text = "-1";
    if (!is_missing(path)) EP_TRY(read_attribute(path, &text));
    int parsed = nodes.size() == 1 ? nodes[0] : kNumaNodeUnknown;
    if (text != "-1" && (!parse_number(text, kNumaNodeMax, &parsed) ||
                         !std::binary_search(nodes.begin(), nodes.end(), parsed)))
        return fail(MEP_SYSTEM_ERROR, "%s: %s is not a NUMA node of this machine", path.c_str(),
                    in_quotes(text).c_str());
    *node = parsed;
    return MEP_OK;
}

// ---- PCI ---------------------------------------------------------------------------------------

// The PCI part of a device's path, from the host bridge on; "" if the device is not on PCI.
mep_status_t read_pci_path(const fs::path &device, std::string *pci_path) {
    std::error_code error;
    const fs::path resolved = fs::canonical(device, error);
    if (error) return fail_to_read(device, error);
    std::string path;
    for (const fs::path &component : resolved) {
        const std::string &name = component.native();
        if (is_pci_host_bridge(name)) {
            path = name;
        } else if (!path.empty()) {
            if (!is_pci_address(name)) break;
            path += "/" + name;
        }
    }
    *pci_path = is_pci_path(path) ? path : "";
    return MEP_OK;
}

// kNone if the device is no GPU. Vendors sell other devices too, and a GPU brings some with it.
mep_status_t read_gpu_vendor(const fs::path &device, Vendor *vendor) {
    constexpr std::string_view display = "0x03", accelerator = "0x12";
    std::string device_class, id;
    EP_TRY(read_attribute(device / "class", &device_class));
    EP_TRY(read_attribute(device / "vendor", &id));
    const std::string_view base_class = std::string_view(device_class).substr(0, display.size());
    const bool is_gpu = base_class == display || base_class == accelerator;
    *vendor = is_gpu && id == "0x10de"   ? Vendor::kNvidia
              : is_gpu && id == "0x9999" ? Vendor::kMetax
                                         : Vendor::kNone;
    return MEP_OK;
}

// By domain, bus, device and function; a longer domain is a higher one.
bool address_less(const std::string &one, const std::string &other) {
    return std::make_pair(one.size(), one) < std::make_pair(other.size(), other);
}

mep_status_t read_gpus(const fs::path &sys, Topology *topology) {
    const fs::path folder = sys / "bus/pci/devices";
    std::vector<std::string> addresses;
    EP_TRY(list_folder_if_any(folder, &addresses));
    std::sort(addresses.begin(), addresses.end(), address_less);
    for (const std::string &address : addresses) {
        const fs::path device = folder / address;
        Gpu gpu{};
        EP_TRY(read_gpu_vendor(device, &gpu.vendor));
        if (gpu.vendor == Vendor::kNone) continue;
        EP_TRY(read_pci_path(device, &gpu.pci_path));
        if (gpu.pci_path.empty() || pci_address(gpu.pci_path) != address)
            return fail(MEP_SYSTEM_ERROR,
                        "%s does not lead to the device of that address below a "
                        "PCI host bridge",
                        device.c_str());
        EP_TRY(read_numa_node(device, topology->numa_nodes, &gpu.numa_node));
        topology->gpus.push_back(std::move(gpu));
    }
    return MEP_OK;
}

// ---- NICs --------------------------------------------------------------------------------------

mep_status_t read_port_state(const fs::path &port, PortState *state) {
    constexpr std::pair<std::string_view, PortState> states[] = {
        {"0: NOP", PortState::kDown},      {"1: DOWN", PortState::kDown},
        {"2: INIT", PortState::kInit},     {"3: ARMED", PortState::kArmed},
        {"4: ACTIVE", PortState::kActive}, {"5: ACTIVE_DEFER", PortState::kActiveDefer}};
    std::string text;
    EP_TRY(read_attribute(port / "state", &text));
    for (const auto &[name, value] : states)
        if (text == name) {
            *state = value;
            return MEP_OK;
        }
    return fail(MEP_SYSTEM_ERROR, "%s: %s is not a port's state", (port / "state").c_str(),
                in_quotes(text).c_str());
}

mep_status_t read_link_layer(const fs::path &port, LinkLayer *layer) {
    constexpr std::pair<std::string_view, LinkLayer> layers[] = {
        {"InfiniBand", LinkLayer::kInfiniband},
        {"Ethernet", LinkLayer::kEthernet},
        {"Unspecified", LinkLayer::kUnspecified}};
    std::string text;
    EP_TRY(read_attribute(port / "link_layer", &text));
    for (const auto &[name, value] : layers)
        if (text == name) {
            *layer = value;
            return MEP_OK;
        }
    return fail(MEP_SYSTEM_ERROR, "%s: %s is not a link layer", (port / "link_layer").c_str(),
                in_quotes(text).c_str());
}

mep_status_t read_nic(const fs::path &folder, const std::string &name, Topology *topology) {
    const fs::path port = folder / name / "ports/1", device = folder / name / "device";
    Nic nic{};
    nic.name = name;
    nic.numa_node = kNumaNodeUnknown;
    if (!is_word(name))
        return fail(MEP_SYSTEM_ERROR, "NIC %s: a name is printable and without blanks",
                    in_quotes(name).c_str());
    if (is_missing(port))
        return fail(MEP_SYSTEM_ERROR, "NIC %s has no port 1: there is no %s", name.c_str(),
                    port.c_str());
    EP_TRY(read_port_state(port, &nic.port_state));
    EP_TRY(read_link_layer(port, &nic.link_layer));
    // A NIC made of software has no device; a link to nowhere is an error.
    std::error_code error;
    if (fs::symlink_status(device, error).type() != fs::file_type::not_found) {
        EP_TRY(read_pci_path(device, &nic.pci_path));
        EP_TRY(read_numa_node(device, topology->numa_nodes, &nic.numa_node));
    }
    topology->nics.push_back(std::move(nic));
    return MEP_OK;
}

mep_status_t read_nics(const fs::path &sys, Topology *topology) {
    const fs::path folder = sys / "class/infiniband";
    std::vector<std::string> names;
    EP_TRY(list_folder_if_any(folder, &names));
    for (const std::string &name : names)
        EP_TRY(read_nic(folder, name, topology));
    return MEP_OK;
}

// ---- Links -------------------------------------------------------------------------------------

void link_by_pci(Topology *topology) {
    const int gpu_count = static_cast<int>(topology->gpus.size());
    const int nic_count = static_cast<int>(topology->nics.size());
    for (int one = 0; one < gpu_count; ++one) {
        const Gpu &gpu = topology->gpus[one];
        const PciPlace place{gpu.pci_path, gpu.numa_node};
        for (int other = one + 1; other < gpu_count; ++other) {
            const Gpu &peer = topology->gpus[other];
            const LinkKind kind = pci_link(place, {peer.pci_path, peer.numa_node});
            topology->gpu_links.push_back({one, other, kind, 0});
        }
        for (int nic = 0; nic < nic_count; ++nic) {
            const Nic &peer = topology->nics[nic];
            if (peer.pci_path.empty()) continue;
            const LinkKind kind = pci_link(place, {peer.pci_path, peer.numa_node});
            topology->nic_links.push_back({one, nic, kind});
        }
    }
}

}  // namespace

mep_status_t read_sysfs(const std::string &root, Topology *topology) {
    const fs::path sys = fs::path(root) / "sys";
    std::vector<std::string> folders;
    EP_TRY(list_folder(sys, &folders));  // for its error, if there is no sysfs at all
    Topology read;
    EP_TRY(read_numa_nodes(sys, &read.numa_nodes));
    EP_TRY(read_gpus(sys, &read));
    EP_TRY(read_nics(sys, &read));
    link_by_pci(&read);
    *topology = std::move(read);
    return MEP_OK;
}

}  // namespace ep
