// What ranks say of themselves when a group forms: whatever it is, every rank gets one answer for a
// pair, in either order.
#include "transport/facts.h"

#include <cstdlib>
#include <cstring>
#include <fuzzer/FuzzedDataProvider.h>

namespace {

void check(bool holds) {
    if (!holds) std::abort();
}

ep::RankFacts rank_of(FuzzedDataProvider *input) {
    ep::RankFacts rank{};
    // Few values, so that ranks share hosts, processes and devices; or any bytes at all.
    if (input->ConsumeBool()) {
        rank.host[0] = char(input->ConsumeIntegralInRange(0, 2));
        rank.process[0] = input->ConsumeIntegralInRange(0, 3);
        rank.device[0] = char(input->ConsumeIntegralInRange(0, 3));
        rank.backend = input->ConsumeIntegralInRange(0, 4);
        rank.engine = input->ConsumeIntegralInRange(0, 5);
        rank.nccl = input->ConsumeIntegralInRange(0, 1);
        rank.island_ranks = input->ConsumeIntegralInRange(-1, 3);
        rank.p2p_disabled = input->ConsumeBool();
        rank.tcp_address[0] = input->ConsumeBool() ? 'a' : '\0';
    } else {
        const std::vector<uint8_t> bytes = input->ConsumeBytes<uint8_t>(sizeof rank);
        if (!bytes.empty()) std::memcpy(&rank, bytes.data(), bytes.size());
    }
    // As Formation::gather_facts does.
    rank.absent = input->ConsumeIntegralInRange(0, 7) == 1;
    rank.host[sizeof rank.host - 1] = rank.tcp_address[sizeof rank.tcp_address - 1] = '\0';
    return rank;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    constexpr int kRanksMax = 6;
    FuzzedDataProvider input(data, size);
    ep::GroupFacts facts;
    const int ranks = input.ConsumeIntegralInRange(1, kRanksMax);
    const bool tried = input.ConsumeBool();
    for (int rank = 0; rank < ranks; ++rank)
        facts.ranks.push_back(rank_of(&input));
    for (int pair = 0; pair < ranks * ranks; ++pair) {
        facts.access.push_back(static_cast<ep::Access>(input.ConsumeIntegral<uint8_t>()));
        if (tried) facts.trials.push_back(static_cast<ep::Trial>(input.ConsumeIntegral<uint8_t>()));
    }
    ep::choose_engine(&facts);
    int unreachable = 0;
    for (int one = 0; one < ranks; ++one) {
        const std::vector<bool> far = ep::far_peers(facts, one);
        for (int other = 0; other < ranks; ++other) {
            const ep::TransportChoice there = ep::choose_transport(facts, one, other);
            const ep::TransportChoice back = ep::choose_transport(facts, other, one);
            check(there.kind == back.kind && there.reason == back.reason && !there.reason.empty());
            check(far[other] == (there.kind == MEP_TRANSPORT_COLLECTIVE));
            const bool both = facts.ranks[one].absent == 0 && facts.ranks[other].absent == 0;
            unreachable += one < other && both && there.kind == MEP_TRANSPORT_NONE;
            check(both || one == other || there.kind == MEP_TRANSPORT_NONE);
        }
    }
    std::string text;
    check(ep::count_unreachable(facts, &text) == unreachable && text.empty() == (unreachable == 0));
    ep::any_share_streams(facts);
    return 0;
}
