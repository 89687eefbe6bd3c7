#include "topology/text.h"

#include <algorithm>
#include <charconv>

namespace ep {
namespace {
constexpr size_t kQuotedCharsMax = 60;
constexpr std::string_view kBlanks = " \t\r\v\f";
}  // namespace

Words split(std::string_view text, char separator) {
    Words pieces;
    for (size_t begin = 0;;) {
        const size_t end = text.find(separator, begin);
        pieces.push_back(text.substr(begin, end - begin));
        if (end == std::string_view::npos) return pieces;
        begin = end + 1;
    }
}

Words split_words(std::string_view text) {
    Words words;
    for (size_t begin = 0; (begin = text.find_first_not_of(kBlanks, begin)) != text.npos;) {
        const size_t end = std::min(text.find_first_of(kBlanks, begin), text.size());
        words.push_back(text.substr(begin, end - begin));
        begin = end;
    }
    return words;
}

bool is_word(std::string_view text) {
    return !text.empty() &&
           std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c <= '~'; });
}

bool parse_number(std::string_view text, int max, int *value) {
    if (text.empty() || text[0] == '-' || (text[0] == '0' && text.size() > 1)) return false;
    int parsed = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), parsed);
    if (error != std::errc() || end != text.data() + text.size() || parsed > max) return false;
    *value = parsed;
    return true;
}

std::string in_quotes(std::string_view text) {
    std::string quote = "\"";
    for (const char c : text.substr(0, kQuotedCharsMax))
        quote += c >= ' ' && c <= '~' ? c : '?';
    return quote + (text.size() > kQuotedCharsMax ? "...\"" : "\"");
}

}  // namespace ep
