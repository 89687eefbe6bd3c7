// Words and numbers of the texts that this folder reads.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace ep {

using Words = std::vector<std::string_view>;

// The pieces between separators, empty ones too: n separators give n + 1 pieces.
Words split(std::string_view text, char separator);

// The pieces between blanks, none of them empty.
Words split_words(std::string_view text);

// Printable, without blanks, not empty: what stays one word when it is written and read.
bool is_word(std::string_view text);

// A decimal number in [0, max], as a program writes it: digits only, no leading zero.
bool parse_number(std::string_view text, int max, int *value);

// In quotes for a message: what cannot be printed becomes "?", and a long text is cut.
std::string in_quotes(std::string_view text);

}  // namespace ep
