// What a buffer's configuration asks for: checked, its defaults filled in, and where everything is.
#pragma once

#include "mooncake_ep.h"

#include "wire/layout.h"

#include <cstddef>

namespace ep {

// A configuration with its defaults filled in, and what follows from it.
struct BufferShape {
    mep_buffer_config_t config;
    Layout layout;

    // Checks `config` for a group of `rank_count`.
    static mep_status_t of(const mep_buffer_config_t &config, int rank_count, BufferShape *shape);

    // From messages by flag, as of() says, to messages by line.
    void go_by_line();

    size_t handle_bytes() const;
};

// Places of a handle's arrays in its memory, in the order of Routing.
struct HandleLayout {
    size_t state, choices, positions, token_counts, begins, row_counts, rows, weights, lost, bytes;

    static HandleLayout of(const Shape &shape);
};

}  // namespace ep
