// The window's layout: what two ranks must agree on bit for bit.
#include "wire/layout.h"

#include <algorithm>
#include <gtest/gtest.h>
#include <random>
#include <vector>

namespace ep {
namespace {

// Where the window would be; nothing here touches its memory.
char *const kBase = reinterpret_cast<char *>(uintptr_t{1} << 40);

struct Range {
    size_t begin, end;
};

// Every byte range that some rank may write in the window of `owner`, over all slots.
std::vector<Range> ranges_of(const Layout &l, int owner) {
    std::vector<Range> ranges;
    char *const base = kBase;
    const auto add = [&](const void *at, size_t bytes) {
        const size_t begin = static_cast<const char *>(at) - kBase;
        ranges.push_back({begin, begin + bytes});
    };
    const size_t weight_bytes = kHeadFlagBytes + sizeof(float) * l.shape.topk_max;
    for (uint64_t epoch = 1; epoch <= uint64_t(l.shape.slot_count); ++epoch)
        for (int source = 0; source < l.shape.rank_count; ++source) {
            add(l.count(base, epoch, source, 0), sizeof(uint64_t) * l.local_expert_count);
            add(l.token_count(base, epoch, source), sizeof(uint64_t));
            add(l.arrival(base, epoch, source), sizeof(uint64_t));
            if (source == owner) continue;
            for (int token = 0; token < l.shape.token_count_max; ++token) {
                char *message = l.message(base, epoch, owner, source, token);
                add(Layout::flag(message), kHeadFlagBytes);
                add(Layout::entries(message), sizeof(Entry) * l.shape.topk_max);
                add(l.payload(message), l.shape.row_bytes_max);
                add(l.weight(base, epoch, owner, source, token), weight_bytes);
                char *partial = l.partial(base, epoch, owner, source, token);
                add(Layout::flag(partial), sizeof(uint64_t));
                add(Layout::partial_row(partial), l.shape.partial_bytes_max);
            }
        }
    for (int operation = 0; operation < Layout::kOperations; ++operation)
        for (int source = 0; source < l.shape.rank_count; ++source)
            add(l.fence(base, operation, source), sizeof(uint64_t));
    return ranges;
}

void expect_disjoint(std::vector<Range> ranges, size_t bytes) {
    std::sort(ranges.begin(), ranges.end(),
              [](const Range &a, const Range &b) { return a.begin < b.begin; });
    for (size_t i = 0; i + 1 < ranges.size(); ++i)
        ASSERT_LE(ranges[i].end, ranges[i + 1].begin) << "ranges " << i << " and " << i + 1;
    ASSERT_LE(ranges.back().end, bytes);
}

Shape random_shape(std::mt19937 *random) {
    const auto draw = [random](int low, int high) {
        return std::uniform_int_distribution<int>(low, high)(*random);
    };
    const int ranks = draw(1, 9), hidden = 8 * draw(1, 64);
    return {ranks,
            ranks * draw(1, 20),
            draw(1, 24),
            draw(1, 32),
            2 * draw(1, 4),
            size_t(hidden) * draw(1, 4),
            size_t(hidden) * draw(2, 4)};
}

TEST(Layout, RegionsDoNotOverlap) {
    for (int seed = 0; seed < 60; ++seed) {
        SCOPED_TRACE("seed " + std::to_string(seed));
        std::mt19937 random(seed);
        const Layout layout = Layout::of(random_shape(&random));
        const int owner =
            std::uniform_int_distribution<int>(0, layout.shape.rank_count - 1)(random);
        expect_disjoint(ranges_of(layout, owner), layout.bytes);
    }
}

TEST(Layout, RegionsOfAThousandRanksDoNotOverlap) {
    const Layout layout = Layout::of({1024, 2048, 2, 4, 2, 64, 64});
    for (const int owner : {0, 511, 1023}) {
        SCOPED_TRACE("owner " + std::to_string(owner));
        expect_disjoint(ranges_of(layout, owner), layout.bytes);
    }
}

TEST(Layout, LastByteIsTheEndOfTheLastRegion) {
    const Layout layout = Layout::of({3, 12, 5, 7, 4, 256, 512});
    size_t end = 0;
    for (const Range &range : ranges_of(layout, 0))
        end = std::max(end, range.end);
    EXPECT_EQ(Layout::lines(end), layout.bytes);
}

TEST(Layout, PayloadsStartOnLines) {
    for (int seed = 0; seed < 60; ++seed) {
        SCOPED_TRACE("seed " + std::to_string(seed));
        std::mt19937 random(seed);
        const Layout l = Layout::of(random_shape(&random));
        if (l.shape.rank_count == 1) continue;
        const int token = l.shape.token_count_max - 1, source = l.shape.rank_count - 1;
        char *const base = kBase;
        char *message = l.message(base, seed, 0, source, token);
        const void *const places[] = {l.payload(message), l.weight(base, seed, 0, source, token),
                                      Layout::partial_row(l.partial(base, seed, 0, source, token)),
                                      l.count(base, seed, 0, 0), l.arrival(base, seed, 0)};
        for (const void *place : places)
            EXPECT_EQ(reinterpret_cast<uintptr_t>(place) % Layout::kLineBytes, 0U);
        EXPECT_EQ(reinterpret_cast<uintptr_t>(Layout::entries(message)) % alignof(Entry), 0U);
    }
}

TEST(Layout, OneRankNeedsNoBoxes) {
    const Layout layout = Layout::of({1, 256, 128, 8, 4, 14336, 14336});
    EXPECT_LE(layout.bytes, 4 * 2 * (256 + 2) * sizeof(uint64_t));
}

TEST(Layout, SlotsOfRoundsInFlightAreDistinct) {
    const Layout layout = Layout::of({2, 4, 3, 2, 4, 128, 128});
    for (uint64_t epoch = 1; epoch <= 4; ++epoch)
        for (uint64_t other = epoch + 1; other < epoch + 4; ++other) {
            EXPECT_NE(layout.message(kBase, epoch, 0, 1, 0), layout.message(kBase, other, 0, 1, 0));
            EXPECT_NE(layout.arrival(kBase, epoch, 1), layout.arrival(kBase, other, 1));
        }
    EXPECT_EQ(layout.message(kBase, 1, 0, 1, 0), layout.message(kBase, 5, 0, 1, 0));
}

TEST(Layout, MessagesByLineDoNotOverlap) {
    const Layout l = Layout::of({3, 12, 5, 8, 3, 7168, 14336, Carriage::kLine});
    EXPECT_EQ(l.shape.slot_count, 4);
    EXPECT_EQ(l.head_bytes, 2 * Layout::kLineBytes);  // seven entries a line
    std::vector<Range> ranges;
    const auto add = [&](const void *at, size_t bytes) {
        const size_t begin = static_cast<const char *>(at) - kBase;
        ranges.push_back({begin, begin + bytes});
    };
    for (uint64_t epoch = 1; epoch <= 4; ++epoch)
        for (int source = 0; source < 3; ++source) {
            add(l.count(kBase, epoch, source, 0), sizeof(uint64_t) * (l.local_expert_count + 1));
            add(l.arrival(kBase, epoch, source), sizeof(uint64_t));
            for (int token = 0; source != 1 && token < 5; ++token) {
                add(l.message(kBase, epoch, 1, source, token),
                    l.head_bytes + Layout::signal_lines(7168) * Layout::kLineBytes);
                add(l.weight(kBase, epoch, 1, source, token), l.weight_bytes);
                add(l.partial(kBase, epoch, 1, source, token),
                    Layout::signal_lines(14336) * Layout::kLineBytes);
            }
        }
    expect_disjoint(ranges, l.bytes);
}

TEST(Layout, DecodeWindowFitsIn32MegabytesForTwoRanksAndIn128ForEight) {
    const size_t row = 7168 * 2;
    for (const Carriage carriage : {Carriage::kFlag, Carriage::kLine}) {
        EXPECT_LE(Layout::of({2, 256, 128, 8, 4, row, row, carriage}).bytes, 32'000'000U);
        EXPECT_LE(Layout::of({8, 256, 128, 8, 4, row, row, carriage}).bytes, 128'000'000U);
    }
}

TEST(Signal, GivesBackItsValueInItsEpochOnly) {
    const uint32_t values[] = {0, 1, 65536, (1U << Signal::kValueBits) - 1};
    const uint64_t epochs[] = {1, 2, 3, uint64_t{1} << 32, (uint64_t{1} << 40) - 1};
    for (const uint64_t epoch : epochs)
        for (const uint32_t value : values) {
            const uint64_t signal = Signal::pack(epoch, value);
            EXPECT_EQ(Signal::value(signal), int(value));
            for (const uint64_t other : epochs)
                EXPECT_EQ(Signal::is_of(signal, other), epoch == other);
        }
}

TEST(Signal, EpochsWrapWithoutLosingTheirRound) {
    const uint64_t epoch = (uint64_t{1} << 40) + 7;
    EXPECT_TRUE(Signal::is_of(Signal::pack(epoch, 5), epoch));
    EXPECT_EQ(Signal::value(Signal::pack(epoch, 5)), 5);
    EXPECT_FALSE(Signal::is_of(Signal::pack(epoch, 5), epoch + 1));
}

TEST(Signal, KnowsALaterRound) {
    for (const uint64_t epoch : {uint64_t{1}, uint64_t{77}, (uint64_t{1} << 40) - 1}) {
        EXPECT_FALSE(Signal::is_after(Signal::pack(epoch, 5), epoch));
        EXPECT_TRUE(Signal::is_after(Signal::pack(epoch + 1, 5), epoch));
        EXPECT_TRUE(Signal::is_after(Signal::pack(epoch + (uint64_t{1} << 38), 5), epoch));
        EXPECT_FALSE(Signal::is_after(Signal::pack(epoch, 5), epoch + 4));
        EXPECT_FALSE(Signal::is_after(0, epoch)) << "never stored";
    }
}

TEST(Signal, ZeroedMemoryIsOfNoRound) {
    for (uint64_t epoch = 1; epoch < 100; ++epoch)
        EXPECT_FALSE(Signal::is_of(0, epoch));
}

}  // namespace
}  // namespace ep
