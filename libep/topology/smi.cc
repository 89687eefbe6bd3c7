#include "topology/smi.h"

#include "base/status.h"
#include "topology/text.h"

#include <algorithm>
#include <utility>

namespace ep {
namespace {

constexpr std::string_view kGpu = "GPU", kNic = "NIC";
constexpr std::string_view kSelf = "X", kUnknown = "NA";
constexpr std::string_view kNicLegend = "NIC Legend:";

struct Tool {
    const char *name;
    Vendor vendor;
    LinkKind own_link;  // what this vendor's GPUs have besides PCI
};

constexpr Tool kNvidiaSmi = {"nvidia-smi", Vendor::kNvidia, LinkKind::kNvlink};
constexpr Tool kMxSmi = {"mx-smi", Vendor::kMetax, LinkKind::kMetaxlink};

// Without the escape sequences that underline a terminal's header.
std::string plain(std::string_view text) {
    std::string kept;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text.substr(i, 2) != "\x1b[") {
            kept += text[i];
            continue;
        }
        i += 2;
        while (i < text.size() && (text[i] == ';' || (text[i] >= '0' && text[i] <= '9')))
            ++i;
    }
    return kept;
}

// "GPU3" is number 3 of "GPU".
bool is_numbered(std::string_view word, std::string_view prefix, int *number) {
    return word.substr(0, prefix.size()) == prefix &&
           parse_number(word.substr(prefix.size()), kGpuIndexMax, number);
}

bool is_cell(std::string_view word) {
    LinkKind kind{};
    int lane_count = 0;
    return word == kSelf || word == kUnknown || parse_link_name(word, &kind, &lane_count);
}

// The text as words, by line.
struct Table {
    Tool tool;
    std::vector<Words> lines;
    Words columns;  // the devices
    size_t header;  // its line

    const char *name() const { return tool.name; }
    std::string column(size_t i) const { return std::string(columns[i]); }
    std::string_view cell(size_t row, size_t column) const {
        return lines[header + 1 + row][1 + column];
    }
    std::string at(size_t row, size_t at_column) const {
        return "row " + column(row) + ", column " + column(at_column);
    }
};

mep_status_t read_header(Table *table, SmiMatrix *matrix) {
    const auto header = std::find_if(table->lines.begin(), table->lines.end(),
                                     [](const Words &w) { return !w.empty() && w[0] == "GPU0"; });
    if (header == table->lines.end())
        return fail(MEP_INVALID_ARGUMENT, "%s: no header, a line that begins with GPU0",
                    table->name());
    table->header = header - table->lines.begin();
    matrix->gpu_count = 0;
    for (const std::string_view word : *header) {
        int number = 0;
        if (word == "CPU" || word == "NUMA" || word == "Node") break;  // ... Affinity
        if (is_cell(word) || !is_word(word))
            return fail(MEP_INVALID_ARGUMENT, "%s: header: %s is not a device", table->name(),
                        in_quotes(word).c_str());
        if (std::count(table->columns.begin(), table->columns.end(), word) > 0)
            return fail(MEP_INVALID_ARGUMENT, "%s: header: column %s is there twice", table->name(),
                        in_quotes(word).c_str());
        if (is_numbered(word, kGpu, &number)) {
            if (number != matrix->gpu_count || matrix->gpu_count != int(table->columns.size()))
                return fail(MEP_INVALID_ARGUMENT, "%s: header: column %s is where GPU%d belongs",
                            table->name(), in_quotes(word).c_str(), matrix->gpu_count);
            ++matrix->gpu_count;
        }
        table->columns.push_back(word);
    }
    return MEP_OK;
}

// Each device has a row, in the order of the columns, with a cell for each device.
mep_status_t check_rows(const Table &table) {
    const size_t count = table.columns.size();
    for (size_t row = 0; row < count; ++row) {
        const size_t line = table.header + 1 + row;
        if (line >= table.lines.size() || table.lines[line].empty() ||
            table.lines[line][0] != table.columns[row])
            return fail(MEP_INVALID_ARGUMENT, "%s: row %s is missing", table.name(),
                        table.column(row).c_str());
        const Words &words = table.lines[line];
        if (words.size() < count + 1)
            return fail(MEP_INVALID_ARGUMENT, "%s: row %s has no cell in column %s", table.name(),
                        table.column(row).c_str(), table.column(words.size() - 1).c_str());
        if (words.size() > count + 1 && is_cell(words[count + 1]))
            return fail(MEP_INVALID_ARGUMENT,
                        "%s: row %s has the cell %s after its last column, %s", table.name(),
                        table.column(row).c_str(), in_quotes(words[count + 1]).c_str(),
                        table.column(count - 1).c_str());
    }
    int number = 0;
    const size_t next = table.header + 1 + count;
    if (next < table.lines.size() && !table.lines[next].empty() &&
        is_numbered(table.lines[next][0], kGpu, &number))
        return fail(MEP_INVALID_ARGUMENT, "%s: row GPU%d has no column", table.name(), number);
    return MEP_OK;
}

// Whether the tool prints this cell for two different devices.
bool is_link(const Table &table, std::string_view cell, LinkKind *kind, int *lane_count) {
    if (!parse_link_name(cell, kind, lane_count)) return false;
    return *kind >= LinkKind::kPix || *kind == table.tool.own_link;
}

mep_status_t check_cells(const Table &table) {
    for (size_t row = 0; row < table.columns.size(); ++row)
        for (size_t column = 0; column < table.columns.size(); ++column) {
            const std::string_view cell = table.cell(row, column);
            LinkKind kind{};
            int lane_count = 0;
            if ((row == column) != (cell == kSelf) ||
                (row != column && cell != kUnknown && !is_link(table, cell, &kind, &lane_count)))
                return fail(MEP_INVALID_ARGUMENT, "%s: %s: %s must be %s", table.name(),
                            table.at(row, column).c_str(), in_quotes(cell).c_str(),
                            row == column ? "X" : "a kind of link");
            if (column < row && cell != table.cell(column, row))
                return fail(MEP_INVALID_ARGUMENT, "%s: %s is %s, but %s is %s", table.name(),
                            table.at(row, column).c_str(), in_quotes(cell).c_str(),
                            table.at(column, row).c_str(),
                            in_quotes(table.cell(column, row)).c_str());
        }
    return MEP_OK;
}

// A column that is called NIC3 has its name in a legend below; older tools name it at once.
mep_status_t read_nic_names(const Table &table, std::string_view text, SmiMatrix *matrix) {
    const std::string_view legend = text.substr(std::min(text.find(kNicLegend), text.size()));
    for (size_t i = matrix->gpu_count; i < table.columns.size(); ++i) {
        std::string name = table.column(i);
        int number = 0;
        if (is_numbered(name, kNic, &number)) {
            const std::string label = name + ":";
            name.clear();
            for (const std::string_view line : split(legend, '\n'))
                if (const Words words = split_words(line); words.size() == 2 && words[0] == label)
                    name = words[1];
            if (name.empty())
                return fail(MEP_INVALID_ARGUMENT, "%s: column %s has no name in the NIC legend",
                            table.name(), table.column(i).c_str());
        }
        if (std::count(matrix->nics.begin(), matrix->nics.end(), name) > 0)
            return fail(MEP_INVALID_ARGUMENT, "%s: column %s: another NIC is called %s, too",
                        table.name(), table.column(i).c_str(), in_quotes(name).c_str());
        matrix->nics.push_back(name);
    }
    return MEP_OK;
}

mep_status_t read_links(const Table &table, SmiMatrix *matrix) {
    for (int row = 0; row < matrix->gpu_count; ++row)
        for (size_t column = row + 1; column < table.columns.size(); ++column) {
            LinkKind kind{};
            int lane_count = 0;
            if (!is_link(table, table.cell(row, column), &kind, &lane_count)) continue;  // NA
            const int nic = static_cast<int>(column) - matrix->gpu_count;
            if (nic < 0)
                matrix->gpu_links.push_back({row, static_cast<int>(column), kind, lane_count});
            else if (kind >= LinkKind::kPix)
                matrix->nic_links.push_back({row, nic, kind});
            else
                return fail(MEP_INVALID_ARGUMENT, "%s: %s: a NIC has no %s", table.name(),
                            table.at(row, column).c_str(), link_name(kind, lane_count).c_str());
        }
    return MEP_OK;
}

mep_status_t parse(const Tool &tool, std::string_view text, SmiMatrix *matrix) {
    const std::string kept = plain(text);
    Table table{tool, {}, {}, 0};
    for (const std::string_view line : split(kept, '\n'))
        table.lines.push_back(split_words(line));
    SmiMatrix parsed{};
    parsed.vendor = tool.vendor;
    EP_TRY(read_header(&table, &parsed));
    EP_TRY(check_rows(table));
    EP_TRY(check_cells(table));
    EP_TRY(read_nic_names(table, kept, &parsed));
    EP_TRY(read_links(table, &parsed));
    *matrix = std::move(parsed);
    return MEP_OK;
}

}  // namespace

mep_status_t parse_nvidia_smi(std::string_view text, SmiMatrix *matrix) {
    return parse(kNvidiaSmi, text, matrix);
}

mep_status_t parse_mx_smi(std::string_view text, SmiMatrix *matrix) {
    return parse(kMxSmi, text, matrix);
}

mep_status_t apply_smi(const SmiMatrix &matrix, Topology *topology) {
    const Vendor vendor = matrix.vendor;
    std::vector<int> ours;  // the tool's GPU i is ours[i]
    for (size_t i = 0; i < topology->gpus.size(); ++i)
        if (topology->gpus[i].vendor == vendor) ours.push_back(static_cast<int>(i));
    if (static_cast<int>(ours.size()) != matrix.gpu_count)
        return fail(MEP_INVALID_ARGUMENT,
                    "the vendor's tool knows %d GPUs, but PCI has %zu of that vendor",
                    matrix.gpu_count, ours.size());
    std::vector<GpuLink> links;
    for (const GpuLink &link : topology->gpu_links)
        if (topology->gpus[link.one].vendor != vendor ||
            topology->gpus[link.other].vendor != vendor)
            links.push_back(link);
    for (const GpuLink &link : matrix.gpu_links)
        links.push_back({ours[link.one], ours[link.other], link.kind, link.lane_count});
    std::sort(links.begin(), links.end(), [](const GpuLink &a, const GpuLink &b) {
        return std::make_pair(a.one, a.other) < std::make_pair(b.one, b.other);
    });
    topology->gpu_links = std::move(links);
    return MEP_OK;
}

}  // namespace ep
