// What tests of texts share.
#pragma once

#include "base/status.h"
#include "topology/graph.h"

#include <gtest/gtest.h>
#include <string>

namespace ep::test {

// A topology that is equal in every respect has an equal text.
inline void expect_round_trip(const Topology &topology) {
    const std::string saved = save_topology(topology);
    Topology loaded;
    ASSERT_EQ(load_topology(saved, &loaded), MEP_OK) << last_error() << "\n" << saved;
    EXPECT_EQ(save_topology(loaded), saved);
}

// `text` with the first `part` in it replaced.
inline std::string replaced(std::string text, const std::string &part, const std::string &by) {
    const size_t at = text.find(part);
    if (at == text.npos) {
        ADD_FAILURE() << "there is no \"" << part << "\"";
        return text;
    }
    return text.replace(at, part.size(), by);
}

}  // namespace ep::test
