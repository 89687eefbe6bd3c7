// Random choices of experts for the tests of both operations.
#pragma once

#include "support/model.h"

#include <random>

namespace ep::test {

// Mostly good choices; some none, some out of range, some twice.
inline Tokens random_tokens(std::mt19937_64 *random, int count, int topk, int expert_count,
                            int idx_bits) {
    const int64_t wide = idx_bits == 64 ? int64_t{1} << 32 : -3;  // 0 if it were cut to 32 bits
    const int64_t strange[] = {-1, -1, -1, expert_count, -2, INT32_MAX, INT32_MIN, wide};
    Tokens tokens{count, topk, {}, {}};
    for (int i = 0; i < count * topk; ++i) {
        const uint64_t draw = (*random)();
        int64_t expert = int64_t(draw >> 32) % expert_count;
        if (draw % 8 == 0) expert = strange[(draw >> 8) % 8];
        if (draw % 8 == 1 && i % topk > 0) expert = tokens.topk_idx.back();
        tokens.topk_idx.push_back(expert);
        tokens.weights.push_back(float(1 + draw % 1000) / 1000);
    }
    return tokens;
}

}  // namespace ep::test
