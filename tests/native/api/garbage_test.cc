// Rounds while one rank writes into the live windows of the others, before, during and after calls:
// random words, and words that look right but are not. Whatever it writes, calls end in time,
// nothing is written but the rows that they tell of (support/place_guarded.cc), and what comes
// through slots that it leaves alone is exact. Ranks are threads or processes.
//
// MEP_TEST_SEED=N runs that seed alone, MEP_TEST_SEEDS=N so many.
#include "core/buffer.h"
#include "support/abi.h"
#include "support/forked.h"
#include "support/pen.h"
#include "support/tidy.h"

#include <atomic>
#include <chrono>
#include <csignal>
#include <random>
#include <sched.h>
#include <unistd.h>

namespace ep::test {
namespace {

using Random = std::mt19937_64;

constexpr int kRanks = 3, kVictim = 0, kHostile = 1, kBystander = 2;
constexpr unsigned kSecondsMax = 60;  // of a seed

// ---- Seeds --------------------------------------------------------------------------------------

uint64_t from_environment(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text == nullptr ? otherwise : strtoull(text, nullptr, 10);
}

// Ends the process if a call does not end, and says of which seed it is.
class Watchdog {
  public:
    explicit Watchdog(uint64_t seed) {
        std::snprintf(text_, sizeof text_, "seed %llu: a call has not ended\n",
                      static_cast<unsigned long long>(seed));
        signal(SIGALRM, [](int) {
            const ssize_t written = write(STDERR_FILENO, text_, std::strlen(text_));
            _exit(written > 0 ? 1 : 2);
        });
        alarm(kSecondsMax);
    }
    Watchdog(const Watchdog &) = delete;
    Watchdog &operator=(const Watchdog &) = delete;
    ~Watchdog() { alarm(0); }

  private:
    static inline char text_[64];
};

// body(seed) for seeds 1 to `count`, until one fails.
void each_seed(uint64_t count, const std::function<void(uint64_t)> &body) {
    const bool one = getenv("MEP_TEST_SEED") != nullptr;
    const uint64_t first = from_environment("MEP_TEST_SEED", 1);
    const uint64_t end = first + (one ? 1 : from_environment("MEP_TEST_SEEDS", count));
    for (uint64_t seed = first; seed < end && !::testing::Test::HasFailure(); ++seed) {
        const Watchdog watchdog(seed);
        body(seed);
    }
}

// What writes into the window of `victim`, as it is mapped by `buffer`.
Pen pen_for(const Buffer &buffer, int victim, uint64_t seed) {
    const ep::Round round = buffer->buffer->round(nullptr, nullptr, 0);
    return {round.layout, round.window(victim), {victim, kHostile}, seed};
}

// ---- Calls --------------------------------------------------------------------------------------

// What the ranks know of the rounds of a seed.
struct Match {
    uint64_t seed;
    mep_buffer_config_t config;
    int64_t timeout_us;
    bool quant, weights_at_combine;
    bool brings_masks;  // or the buffer keeps one, and who failed once is out for ever

    static Match of(uint64_t seed) {
        Random random(seed);
        Match match{seed, buffer_config(kRanks), 0, false, false, true};
        match.config.expert_count = 2 * kRanks;
        match.config.cpu_thread_count = 1 + int(random() % 2);
        match.weights_at_combine = random() % 3 == 0;
        return match;
    }
    Plan plan(int round) const { return Plan::of(config, kRanks, seed * 100 + round); }
};

// What the threads or processes of a seed share. Its waits have the watchdog's deadline.
struct Board {
    std::atomic<uint64_t> epochs[kRanks];  // of each rank's round
    std::atomic<int> writable;             // ranks that may be written to
    std::atomic<uint64_t> strokes;         // of garbage
    std::atomic<uint64_t> refused;         // messages and counts that broke a limit

    void begin_round(int rank, uint64_t epoch) {
        constexpr uint64_t kStrokesBetween = 4;
        epochs[rank] = epoch;
        for (const uint64_t goal = strokes + kStrokesBetween; writable > 0 && strokes < goal;)
            sched_yield();
    }
};

// One rank's arrays of a round, and its calls: they end in time, and write only what they tell of.
class Turn {
  public:
    Share share;
    Tensor active;

    Turn(const Match &match, const Plan &plan, int rank) : share(plan, rank), match_(match) {
        const int64_t experts = plan.local_experts(), hidden = plan.config.hidden;
        active = Tensor(kInt32, {kRanks});
        active.fill(std::vector<int32_t>(kRanks, 1));
        share.weights_at_combine = match.weights_at_combine;
        if (!match.quant) return;
        outputs_ = std::move(share.out_x);  // any bits will do
        share.out_x = Tensor(kFloat8, {experts, plan.region(), hidden});
        out_scales_ = Tensor(kFloat32, {experts, plan.region(), hidden / MEP_SCALE_GROUP});
    }

    mep_status_t dispatch(const Buffer &buffer, const Handle &handle, uint32_t phases = 0) {
        mep_dispatch_args_t args = share.dispatch_args(phases);
        if (match_.quant) args.out_scales = out_scales_.view();
        args.quant = match_.quant ? MEP_QUANT_FP8 : MEP_QUANT_NONE;
        if (match_.brings_masks) args.active_ranks = active.view();
        args.timeout_us = match_.timeout_us;
        constexpr int kWaits = 2;  // for counts, for messages
        const mep_status_t status =
            timed(kWaits, [&] { return test::dispatch(buffer, handle, args); });
        if (phases != MEP_PHASE_SEND) {
            EXPECT_TRUE(told_all(has_lost_rows(buffer)));
        }
        return status;
    }
    mep_status_t combine(const Buffer &buffer, const Handle &handle, uint32_t phases = 0) {
        mep_combine_args_t args = share.combine_args(phases);
        if (match_.quant) args.x = outputs_.view();
        if (match_.brings_masks) args.active_ranks = active.view();
        args.timeout_us = match_.timeout_us;
        constexpr int kWaits = 3;  // for weights, for sums, for arrivals
        return timed(kWaits, [&] { return test::combine(buffer, handle, args); });
    }

  private:
    template <class Call>
    mep_status_t timed(int waits, Call call) {
        constexpr double kBusyUs = 2e6;  // of a machine that has other things to do
        using Clock = std::chrono::steady_clock;
        const auto start = Clock::now();
        const mep_status_t status = call();
        const std::chrono::duration<double, std::micro> took = Clock::now() - start;
        EXPECT_TRUE(status == MEP_OK || status == MEP_PEER_FAILED) << mep_last_error();
        EXPECT_LE(took.count(), waits * double(match_.timeout_us) * 1.1 + kBusyUs);
        return status;
    }

    // Has a rank been masked since the last call because its rows did not come? Those that came are
    // left out, but they were written.
    bool has_lost_rows(const Buffer &buffer) {
        mep_event_t events[kRanks];
        int32_t count = kRanks;
        bool any = false;
        while (count == kRanks) {
            EXPECT_EQ(mep_buffer_read_events(buffer.get(), &cursor_, events, kRanks, &count),
                      MEP_OK);
            for (int32_t i = 0; i < count; ++i)
                any = any || events[i].phase == MEP_WAIT_ROWS;
        }
        return any;
    }

    // Are the counts possible, and is all as it was behind the rows that they tell of?
    ::testing::AssertionResult told_all(bool has_lost_rows) {
        const int64_t region = share.plan.region();
        for (int64_t e = 0; e < share.plan.local_experts(); ++e) {
            const int64_t count = share.out_count.data<int32_t>()[e];
            const auto wrong = [&] {
                return ::testing::AssertionFailure() << "rank " << share.rank << ", local expert "
                                                     << e << ", of " << count << " rows: ";
            };
            if (count < 0 || count > region) return wrong() << "count";
            int64_t end = 0;
            for (int source = 0; source < kRanks; ++source) {
                const int64_t range = share.out_layout_range.data<int64_t>()[e * kRanks + source];
                if (range >> 32 != end) return wrong() << "layout range of source " << source;
                end += int32_t(range);
            }
            if (end != count) return wrong() << "the layout ranges end at " << end;
            for (int64_t row = 0; row < region; ++row) {
                const int32_t token = share.out_src_info.data<int32_t>()[e * region + row];
                if (token < -1 || token >= share.plan.config.token_count_max)
                    return wrong() << "src_info of row " << row << " is " << token;
                if (row >= count && !has_lost_rows && !is_untouched(e * region + row))
                    return wrong() << "row " << row << " was written";
            }
        }
        return ::testing::AssertionSuccess();
    }
    bool is_untouched(int64_t row) {
        for (Tensor *tensor : {&share.out_src_info, &share.out_x, &out_scales_}) {
            if (tensor->shape.empty()) continue;
            const size_t elements = tensor->shape.size() < 3 ? 1 : tensor->shape[2];
            const size_t bytes = elements * tensor->dtype.bits / 8;
            const char *from = tensor->data() + row * bytes;
            if (!std::all_of(from, from + bytes, [](char byte) { return byte == char(0xff); }))
                return false;
        }
        return true;
    }

    const Match &match_;
    Tensor out_scales_, outputs_;
    uint64_t cursor_ = 0;  // behind the buffer's events so far
};

// ---- Anything, anywhere -------------------------------------------------------------------------

constexpr int kRounds = 8;

// Two rounds, one after the other or both in flight.
void play(const Match &match, const Buffer &buffer, const Handle (&handles)[2], Turn *first,
          Turn *second) {
    if (match.seed % 4 < 2) {
        for (Turn *turn : {first, second}) {
            turn->dispatch(buffer, handles[0]);
            turn->combine(buffer, handles[0]);
        }
        return;
    }
    first->dispatch(buffer, handles[0], MEP_PHASE_SEND);
    second->dispatch(buffer, handles[1], MEP_PHASE_SEND);
    second->dispatch(buffer, handles[1], MEP_PHASE_RECEIVE);
    first->dispatch(buffer, handles[0], MEP_PHASE_RECEIVE);
    second->combine(buffer, handles[1], MEP_PHASE_SEND);
    first->combine(buffer, handles[0], MEP_PHASE_SEND);
    first->combine(buffer, handles[0], MEP_PHASE_RECEIVE);
    second->combine(buffer, handles[1], MEP_PHASE_RECEIVE);
}

// What the buffer has noted is of a peer, and for a reason.
void expect_sound_events(const Buffer &buffer, int rank) {
    constexpr int32_t kCapacity = 64;
    mep_event_t events[kCapacity];
    uint64_t cursor = 0;
    int32_t count = 0;
    EXPECT_EQ(mep_buffer_read_events(buffer.get(), &cursor, events, kCapacity, &count), MEP_OK);
    for (int32_t i = 0; i < count; ++i) {
        const mep_event_t &event = events[i];
        EXPECT_TRUE(event.peer >= 0 && event.peer < kRanks && event.peer != rank) << event.peer;
        EXPECT_TRUE(event.phase >= MEP_WAIT_COUNTS && event.phase <= MEP_WAIT_BEGIN) << event.phase;
        EXPECT_TRUE(event.reason == MEP_EVENT_LATE || event.reason == MEP_EVENT_LIMIT);
        EXPECT_LE(event.round, uint64_t{kRounds});
    }
}

void play_all(const Match &match, Board *board, const Buffer &buffer, int rank) {
    const Handle handles[] = {make_handle(buffer), make_handle(buffer)};
    for (int round = 0; round < kRounds; round += 2) {
        const Plan plans[] = {match.plan(round), match.plan(round + 1)};
        Turn first(match, plans[0], rank), second(match, plans[1], rank);
        board->begin_round(rank, round + 1);
        play(match, buffer, handles, &first, &second);
    }
    expect_sound_events(buffer, rank);
}

// Until nobody may be written to any more.
void write_anything(const Match &match, Board *board, const Buffer &buffer) {
    Random random(match.seed);
    Pen pens[] = {pen_for(buffer, kVictim, random()), pen_for(buffer, kBystander, random())};
    const int victims[] = {kVictim, kBystander};
    while (board->writable > 0) {
        const int which = int(random() % 2);
        const uint64_t epoch = board->epochs[victims[which]] + random() % 2;
        if (random() % 4 == 0)
            pens[which].pretend(epoch);
        else
            pens[which].scribble(epoch);
        ++board->strokes;
        if (random() % 4 == 0) sched_yield();
    }
}

// The hostile rank also takes part in every second seed.
void meet_anything(uint64_t seed, Board *board, int rank, const Group &group) {
    Match match = Match::of(seed);
    match.quant = seed % 2 == 0;
    match.brings_masks = seed % 3 != 0;
    match.timeout_us = 30'000 + int64_t(seed % 4) * 10'000;
    Buffer buffer = make_buffer(group, match.config);
    if (rank == kHostile) {
        std::thread writer([&] { write_anything(match, board, buffer); });
        if (seed / 2 % 2 == 0) play_all(match, board, buffer, rank);
        writer.join();
    } else {
        play_all(match, board, buffer, rank);
        board->refused += counters_of(buffer).invalid_messages;
        buffer.reset();
        --board->writable;
    }
    expect_round(make_buffer(group, match.config), match.plan(kRounds), rank);
}

// ---- In the slots of one rank alone -------------------------------------------------------------

// The rows that others than the hostile rank sent, wherever layout_range says that they are.
::testing::AssertionResult others_rows_are_exact(Share *share) {
    const Plan &plan = share->plan;
    const int experts = plan.local_experts(), hidden = plan.config.hidden;
    for (int e = 0; e < experts; ++e) {
        const int64_t *ranges = share->out_layout_range.data<int64_t>() + e * kRanks;
        int64_t next[kRanks];
        for (int source = 0; source < kRanks; ++source)
            next[source] = e * plan.region() + (ranges[source] >> 32);
        for (const Packed &row : plan.rows[share->rank * experts + e]) {
            if (row.source == kHostile) continue;
            const int64_t at = next[row.source]++;
            bool exact = share->out_src_info.data<int32_t>()[at] == row.token;
            for (int h = 0; h < hidden; ++h)
                exact = exact &&
                        read_element(Element::kBf16, share->out_x.data(), int(at * hidden) + h) ==
                            plan.value(row.source, row.token, h);
            if (!exact)
                return ::testing::AssertionFailure()
                       << "local expert " << e << ", token " << row.token << " of rank "
                       << row.source << " is not as it was sent";
        }
    }
    return ::testing::AssertionSuccess();
}

// The hostile rank sends nothing to its victim but what it makes up.
void pretend_all(const Match &match, Board *board, const Buffer &buffer) {
    Pen pen = pen_for(buffer, kVictim, match.seed);
    while (board->writable > 0) {
        pen.pretend(board->epochs[kVictim]);
        ++board->strokes;
        sched_yield();
    }
}

void expect_exact_round(const Match &match, Board *board, const Buffer &buffer, int rank,
                        int round) {
    const Plan plan = match.plan(round);
    Turn turn(match, plan, rank);
    const Handle handle = make_handle(buffer);
    int32_t *active = turn.active.data<int32_t>();
    if (rank == kHostile) active[kVictim] = 0;
    board->begin_round(rank, round + 1);
    EXPECT_EQ(turn.dispatch(buffer, handle), MEP_OK) << mep_last_error();
    if (rank == kVictim) {
        EXPECT_TRUE(others_rows_are_exact(&turn.share));
    }
    if (rank == kBystander) {
        EXPECT_TRUE(turn.share.dispatched());
    }
    EXPECT_EQ(turn.combine(buffer, handle), MEP_OK) << mep_last_error();
    if (rank == kHostile) return;
    EXPECT_TRUE(turn.share.combined(rank == kVictim ? kHostile : -1));
    EXPECT_EQ(active[rank == kVictim ? kBystander : kVictim], 1);
}

void meet_one_rank(uint64_t seed, Board *board, int rank, const Group &group) {
    Match match = Match::of(seed);
    match.timeout_us = 10'000'000;  // nobody is waited for in vain
    Buffer buffer = make_buffer(group, match.config);
    std::thread writer;
    if (rank == kHostile) writer = std::thread([&] { pretend_all(match, board, buffer); });
    for (int round = 0; round < kRounds; ++round)
        expect_exact_round(match, board, buffer, rank, round);
    if (rank == kVictim) {
        board->refused += counters_of(buffer).invalid_messages;
        --board->writable;
    }
    if (rank == kHostile) writer.join();
}

// ---- Ranks as threads and as processes ----------------------------------------------------------

using Meet = void (*)(uint64_t seed, Board *board, int rank, const Group &group);

class Garbage : public Tidy {
  protected:
    void SetUp() override {
        Tidy::SetUp();
        expect_warnings();
    }

    // `writable`: how many ranks are written to.
    void in_threads(uint64_t seeds, int writable, Meet meet) {
        uint64_t refused = 0;
        each_seed(seeds, [&](uint64_t seed) {
            Board board{};
            board.writable = writable;
            run_groups(kRanks, [&](int rank, const Group &group) {
                SCOPED_TRACE("seed " + std::to_string(seed) + ", rank " + std::to_string(rank));
                meet(seed, &board, rank, group);
            });
            refused += board.refused;
        });
        EXPECT_GT(refused, 0U) << "no garbage was found";
    }
    void in_processes(uint64_t seeds, int writable, Meet meet) {
        uint64_t refused = 0;
        each_seed(seeds, [&](uint64_t seed) {
            const Shared<Board> board;
            const Shared<IdOfGroup> id;
            board->writable = writable;
            run_forked(kRanks, kSecondsMax, [&](int rank) {
                SCOPED_TRACE("seed " + std::to_string(seed) + ", rank " + std::to_string(rank));
                mep_group_config_t config = group_config(rank, kRanks, nullptr);
                config.unique_id = &id->of(rank);
                meet(seed, &*board, rank, make_group(config));
            });
            refused += board->refused;
        });
        EXPECT_GT(refused, 0U) << "no garbage was found";
    }
};

TEST_F(Garbage, AnywhereDoesNoHarmToThreads) {
    in_threads(12, 2, meet_anything);
}
TEST_F(Garbage, AnywhereDoesNoHarmToProcesses) {
    in_processes(6, 2, meet_anything);
}
TEST_F(Garbage, OfOneRankSpoilsOnlyWhatItSendsToThreads) {
    in_threads(24, 1, meet_one_rank);
}
TEST_F(Garbage, OfOneRankSpoilsOnlyWhatItSendsToProcesses) {
    in_processes(8, 1, meet_one_rank);
}

TEST_F(Garbage, InWhatARankCountsOfItsOwnTokensDoesNoHarm) {
    const Watchdog watchdog(0);
    for (const uint64_t word : {Signal::pack(1, 1000), Signal::pack(9, 1)})
        run_groups(1, [&](int rank, const Group &group) {  // whose own words are in its window, too
            const mep_buffer_config_t config = buffer_config(1);
            const Buffer buffer = make_buffer(group, config);
            const Handle handle = make_handle(buffer);
            const Plan plan = Plan::of(config, 1, 1);
            Share share(plan, rank);
            EXPECT_EQ(share.dispatch(buffer, handle, MEP_PHASE_SEND), MEP_OK);
            const ep::Round round = buffer->buffer->round(nullptr, nullptr, 0);
            *round.layout.count(round.window(rank), 1, rank, 0) = word;
            mep_dispatch_args_t args = share.dispatch_args(MEP_PHASE_RECEIVE);
            args.timeout_us = 50'000;
            test::dispatch(buffer, handle, args);
            EXPECT_GE(share.out_count.data<int32_t>()[0], 0);
        });
}

TEST_F(Garbage, PeersThatPromiseTokensAreWaitedForSideBySide) {
    constexpr int kMany = 8;
    constexpr int64_t kTimeoutUs = 200'000;
    std::atomic<int> promised{0};
    run_groups(kMany, [&](int rank, const Group &group) {
        const mep_buffer_config_t config = buffer_config(kMany);
        const Buffer buffer = make_buffer(group, config);
        const ep::Round round = buffer->buffer->round(nullptr, nullptr, 0);
        for (int index = 0; index <= round.layout.local_expert_count && rank != 0; ++index)
            *round.layout.count(round.window(0), 1, rank, index) = Signal::pack(1, 1);
        if (++promised, rank != 0) return;
        while (promised < kMany)
            sched_yield();
        const Plan plan = Plan::of(config, kMany, 1);
        Share share(plan, rank);
        mep_dispatch_args_t args = share.dispatch_args();
        args.timeout_us = kTimeoutUs;
        const auto start = std::chrono::steady_clock::now();
        EXPECT_EQ(test::dispatch(buffer, make_handle(buffer), args), MEP_PEER_FAILED);
        EXPECT_LE((std::chrono::steady_clock::now() - start) / std::chrono::microseconds(1),
                  2 * kTimeoutUs);
    });
}

}  // namespace
}  // namespace ep::test
