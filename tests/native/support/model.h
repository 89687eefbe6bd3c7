// What dispatch and combine mean, for all ranks at once: the oracle of the tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ep::test {

// What one rank brings: `topk` choices and weights for each of `count` tokens.
struct Tokens {
    int count, topk;
    std::vector<int64_t> topk_idx;
    std::vector<float> weights;
};

struct Packed {
    int source, token;
};

// The rows of each global expert.
inline std::vector<std::vector<Packed>> model_dispatch(const std::vector<Tokens> &ranks,
                                                       int expert_count) {
    std::vector<std::vector<Packed>> rows(expert_count);
    for (int source = 0; source < int(ranks.size()); ++source)
        for (int i = 0; i < ranks[source].count * ranks[source].topk; ++i) {
            const int64_t expert = ranks[source].topk_idx[i];
            if (expert < 0 || expert >= expert_count) continue;
            const Packed row{source, i / ranks[source].topk};
            const bool again = !rows[expert].empty() && rows[expert].back().source == row.source &&
                               rows[expert].back().token == row.token;
            if (!again) rows[expert].push_back(row);
        }
    return rows;
}

// One channel of one token's sum, where `value(expert)` is what that expert made of the token.
template <class Value>
double model_combine(const Tokens &rank, int expert_count, int token, Value value) {
    double sum = 0;
    for (int i = token * rank.topk; i < (token + 1) * rank.topk; ++i)
        if (rank.topk_idx[i] >= 0 && rank.topk_idx[i] < expert_count)
            sum += double(rank.weights[i]) * value(int(rank.topk_idx[i]));
    return sum;
}

}  // namespace ep::test
