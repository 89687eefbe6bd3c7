#include "topology/pci_path.h"

#include "topology/text.h"

#include <algorithm>

namespace ep {
namespace {

// Below the upstream port that two devices share, each has at most its own downstream port of the
// same switch, and itself.
constexpr size_t kComponentsBelowSwitchMax = 2;

bool is_hex(std::string_view text, size_t digits_min, size_t digits_max) {
    return text.size() >= digits_min && text.size() <= digits_max &&
           text.find_first_not_of("0123456789abcdef") == text.npos;
}

// Four digits, or more where a driver invents domains of its own.
bool is_domain(std::string_view text) {
    return is_hex(text, 4, 8);
}

}  // namespace

bool is_pci_host_bridge(std::string_view component) {
    if (component.substr(0, 3) != "pci") return false;
    const Words parts = split(component.substr(3), ':');
    return parts.size() == 2 && is_domain(parts[0]) && is_hex(parts[1], 2, 2);
}

bool is_pci_address(std::string_view component) {
    const Words parts = split(component, ':');
    if (parts.size() != 3 || !is_domain(parts[0]) || !is_hex(parts[1], 2, 2)) return false;
    const Words slot = split(parts[2], '.');
    return slot.size() == 2 && is_hex(slot[0], 2, 2) && is_hex(slot[1], 1, 1);
}

bool is_pci_path(std::string_view path) {
    const Words components = split(path, '/');
    if (components.size() == 1) return is_pci_address(path);
    return is_pci_host_bridge(components[0]) &&
           std::all_of(components.begin() + 1, components.end(), is_pci_address);
}

std::string pci_address(std::string_view path) {
    return std::string(split(path, '/').back());
}

int common_component_count(std::string_view one, std::string_view other) {
    if (one.empty() || other.empty()) return 0;
    const Words a = split(one, '/'), b = split(other, '/');
    const size_t shorter = std::min(a.size(), b.size());
    const auto parted = std::mismatch(a.begin(), a.begin() + shorter, b.begin()).first;
    return static_cast<int>(parted - a.begin());
}

LinkKind pci_link(const PciPlace &one, const PciPlace &other) {
    const size_t common = common_component_count(one.path, other.path);
    if (common == 0) {
        const bool same_node = one.numa_node >= 0 && one.numa_node == other.numa_node;
        return same_node ? LinkKind::kNode : LinkKind::kSys;
    }
    if (common == 1) return LinkKind::kPhb;
    const size_t longer = std::max(split(one.path, '/').size(), split(other.path, '/').size());
    return longer - common <= kComponentsBelowSwitchMax ? LinkKind::kPix : LinkKind::kPxb;
}

}  // namespace ep
