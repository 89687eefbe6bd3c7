// Ranks that are killed, or stopped and woken, at any step, in schedules that follow from a seed.
// Whatever happens, each call of a survivor ends in time, the right rank is masked, what the living
// send each other is exact, and the group comes together again.
//
//   MEP_FAULTS=COUNT      how many schedules; the test prints the seed of one that fails
//   MEP_FAULTS_SEED=SEED  the first of them; with COUNT 1 that one alone
#include "support/abi.h"
#include "support/actors.h"
#include "support/tidy.h"

#include <cstdlib>
#include <ostream>
#include <random>

namespace ep::test {
namespace {

using Clock = std::chrono::steady_clock;

constexpr unsigned kAlarmSeconds = 60;
constexpr int64_t kTimeoutUs = 200'000;
constexpr int64_t kLimitUs = kTimeoutUs + kTimeoutUs / 10 + 50'000;
constexpr int kRoundsBefore = 10, kRoundsAfter = 5;

// Where a fault strikes.
enum class Step {
    kBeforeJoin,
    kInJoin,  // at some time in it
    kBeforeBuffer,
    kBeforeDispatch,
    kBetweenDispatchHalves,
    kAfterDispatch,
    kBetweenCombineHalves,
    kAfterRound,
    kAnyTime,   // wherever the rank is then
    kInUpdate,  // at some time in it
    kCount
};
constexpr const char *kStepNames[] = {
    "before it joins",      "as it joins",    "before its buffer",   "before dispatch",
    "with a dispatch sent", "after dispatch", "with a combine sent", "after a round",
    "at any time",          "in an update"};

struct Schedule {
    uint64_t seed;
    int ranks, victim, round;
    Step step;
    bool stops;  // and wakes later; or is killed
    int delay_us;
    bool weights_at_combine;

    static Schedule of(uint64_t seed) {
        std::mt19937_64 random(seed);
        Schedule s{};
        s.seed = seed;
        s.ranks = 2 + static_cast<int>(random() % 2);
        s.victim = static_cast<int>(random() % s.ranks);
        s.round = static_cast<int>(random() % (kRoundsBefore - 3));
        s.step = static_cast<Step>(random() % static_cast<int>(Step::kCount));
        s.stops = random() % 2 == 0;
        s.delay_us = static_cast<int>(random() % 3000);
        s.weights_at_combine = random() % 2 == 0;
        return s;
    }
    bool in_set_up() const { return step <= Step::kBeforeBuffer; }
    bool by_time() const {
        return step == Step::kInJoin || step == Step::kAnyTime || step == Step::kInUpdate;
    }
    int signal() const { return stops ? SIGSTOP : SIGKILL; }
};

std::ostream &operator<<(std::ostream &stream, const Schedule &s) {
    return stream << "MEP_FAULTS_SEED=" << s.seed << ": of " << s.ranks << " ranks, rank "
                  << s.victim << (s.stops ? " is stopped " : " is killed ")
                  << kStepNames[static_cast<int>(s.step)] << ", round " << s.round
                  << (s.weights_at_combine ? ", weights at combine" : "");
}

enum Mark { kJoining, kRunning, kUpdating, kSurvived };

// One process of a schedule.
class Player {
  public:
    Player(const Schedule &schedule, Stage *stage, int rank)
        : schedule_(schedule), stage_(*stage), rank_(rank), shape_(buffer_config(schedule.ranks)) {
        shape_.rounds_in_flight_max = 2;
        be_rank(rank);
        if (on_cpu()) mep_log_set_callback([](void *, int32_t, const char *) {}, nullptr, 1);
    }

    // From the beginning, as one of all ranks.
    void play() {
        if (schedule_.in_set_up()) {
            meet_with_a_fault();
            return;
        }
        ASSERT_EQ(create(0, all(), 60'000'000), MEP_OK) << mep_last_error();
        buffer_ = make_buffer(group_, shape_);
        EXPECT_EQ(mep_group_set_timeout(group_.get(), kTimeoutUs), MEP_OK);
        stage_.meet(kRunning, schedule_.ranks);
        for (int i = 0; i < kRoundsBefore; ++i)
            round(i);
        if (schedule_.step == Step::kInUpdate) {
            lose_one_in_an_update();
            return;
        }
        if (!is_victim()) {
            expect_mask();
            stage_.reach(kSurvived);
        }
        ASSERT_EQ(update(1, all(), 60'000'000), MEP_OK) << mep_last_error();
        EXPECT_EQ(mask(), all());
        go_on(all());
    }

    // As the process that takes the victim's place.
    void replace() {
        ASSERT_EQ(create(1, all(), 60'000'000), MEP_OK) << mep_last_error();
        buffer_ = make_buffer(group_, shape_);
        go_on(all());
    }

  private:
    std::vector<int32_t> all() const { return std::vector<int32_t>(schedule_.ranks, 1); }
    std::vector<int32_t> survivors() const {
        std::vector<int32_t> left = all();
        left[schedule_.victim] = 0;
        return left;
    }
    bool is_victim() const { return rank_ == schedule_.victim; }
    static int first_of(const std::vector<int32_t> &members) {
        return static_cast<int>(std::find(members.begin(), members.end(), 1) - members.begin());
    }

    void strike(Step step, int round) const {
        if (is_victim() && step == schedule_.step && round == schedule_.round)
            raise(schedule_.signal());
    }

    // A call of a survivor has its time, if it has a name.
    template <class Call>
    mep_status_t timed(const char *what, Call call) const {
        const auto began = Clock::now();
        const mep_status_t status = call();
        const auto took =
            std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - began).count();
        if (!is_victim() && *what != '\0') {
            EXPECT_LE(took, kLimitUs) << what << ", rank " << rank_;
        }
        return status;
    }

    mep_status_t create(int id, const std::vector<int32_t> &members, int64_t timeout_us) {
        mep_group_config_t config = group_config(rank_, schedule_.ranks, nullptr);
        config.unique_id = &stage_.id(id, rank_ == first_of(members));
        config.active_ranks = members.data();
        config.timeout_us = timeout_us;
        mep_group_t *group = nullptr;
        const mep_status_t status = mep_group_create(&config, &group);
        group_.reset(group);
        return status;
    }

    // Set-up ends in time for all that are left, who then do without.
    void meet_with_a_fault() {
        stage_.id(0, rank_ == first_of(all()));
        stage_.meet(kJoining, schedule_.ranks);
        strike(Step::kBeforeJoin, schedule_.round);
        mep_status_t status = timed("join", [&] { return create_with(0); });
        if (status == MEP_OK) {
            strike(Step::kBeforeBuffer, schedule_.round);
            mep_buffer_t *buffer = nullptr;
            status =
                timed("buffer", [&] { return mep_buffer_create(group_.get(), &shape_, &buffer); });
            buffer_.reset(buffer);
        }
        if (is_victim()) return;
        // A fault that came too late is none.
        EXPECT_TRUE(status == MEP_TIMEOUT || status == MEP_BOOTSTRAP_FAILED ||
                    status == MEP_SYSTEM_ERROR ||
                    (status == MEP_OK && schedule_.step == Step::kInJoin))
            << mep_status_name(status) << ": " << mep_last_error();
        buffer_.reset();
        group_.reset();
        ASSERT_EQ(create(1, survivors(), 60'000'000), MEP_OK) << mep_last_error();
        buffer_ = make_buffer(group_, shape_);
        go_on(survivors());
    }
    mep_status_t create_with(int id) {
        mep_group_config_t config = group_config(rank_, schedule_.ranks, nullptr);
        config.unique_id = &stage_.id(id, false);
        config.timeout_us = kTimeoutUs;
        mep_group_t *group = nullptr;
        const mep_status_t status = mep_group_create(&config, &group);
        group_.reset(group);
        return status;
    }

    // Rounds that are exact, between these.
    void go_on(const std::vector<int32_t> &members) {
        std::vector<int> lost;
        for (int rank = 0; rank < schedule_.ranks; ++rank)
            if (members[rank] == 0) lost.push_back(rank);
        EXPECT_EQ(mep_group_set_timeout(group_.get(), 60'000'000), MEP_OK);
        for (int i = 0; i < kRoundsAfter; ++i)
            expect_round(buffer_,
                         Plan::of(shape_, schedule_.ranks, schedule_.seed * 1000 + i, lost), rank_);
    }

    std::vector<int32_t> mask() const {
        std::vector<int32_t> active(schedule_.ranks);
        EXPECT_EQ(mep_buffer_query_mask(buffer_.get(), active.data(), schedule_.ranks), MEP_OK);
        return active;
    }
    void expect_mask() const { EXPECT_EQ(mask(), survivors()); }

    // In halves, with a fault between any two steps.
    void round(int number) {
        const Plan plan = Plan::of(shape_, schedule_.ranks, schedule_.seed * 100 + number);
        Share share(plan, rank_);
        share.weights_at_combine = schedule_.weights_at_combine;
        const Handle handle = make_handle(buffer_);
        const bool missed_before = mask() != all();
        strike(Step::kBeforeDispatch, number);
        call("dispatch, send", [&] { return share.dispatch(buffer_, handle, MEP_PHASE_SEND); });
        strike(Step::kBetweenDispatchHalves, number);
        call("dispatch", [&] { return share.dispatch(buffer_, handle, MEP_PHASE_RECEIVE); });
        if (!is_victim()) expect_rows(share);
        strike(Step::kAfterDispatch, number);
        call("combine, send", [&] { return share.combine(buffer_, handle, MEP_PHASE_SEND); });
        strike(Step::kBetweenCombineHalves, number);
        call("combine", [&] { return share.combine(buffer_, handle, MEP_PHASE_RECEIVE); });
        if (!is_victim()) expect_sums(share, missed_before);
        strike(Step::kAfterRound, number);
    }
    template <class Call>
    void call(const char *what, Call make) const {
        const mep_status_t status = timed(what, make);
        EXPECT_TRUE(status == MEP_OK || status == MEP_PEER_FAILED) << mep_last_error();
    }

    // What counts and layout_range say came is all that each rank sent, in its order; of the victim
    // all or nothing.
    void expect_rows(Share &share) const {
        const Plan &plan = share.plan;
        for (int e = 0; e < plan.local_experts(); ++e) {
            int64_t end = 0;
            for (int source = 0; source < schedule_.ranks; ++source) {
                std::vector<int> tokens;
                for (const Packed &one : plan.rows[rank_ * plan.local_experts() + e])
                    if (one.source == source) tokens.push_back(one.token);
                const int64_t range =
                    share.out_layout_range.data<int64_t>()[e * schedule_.ranks + source];
                const int64_t count = range & 0xffffffff;
                ASSERT_EQ(range >> 32, end) << "rank " << source;
                if (source != schedule_.victim || count != 0) {
                    ASSERT_EQ(count, int64_t(tokens.size())) << "of rank " << source;
                    expect_rows_of(share, source, tokens, e * plan.region() + end);
                }
                end += count;
            }
            ASSERT_EQ(share.out_count.data<int32_t>()[e], end);
        }
    }
    void expect_rows_of(Share &share, int source, const std::vector<int> &tokens,
                        int64_t first) const {
        const int hidden = shape_.hidden;
        for (size_t i = 0; i < tokens.size(); ++i) {
            ASSERT_EQ(share.out_src_info.data<int32_t>()[first + i], tokens[i]);
            for (int h = 0; h < hidden; ++h)
                ASSERT_EQ(
                    read_element(Element::kBf16, share.out_x.data() + (first + i) * hidden * 2, h),
                    share.plan.value(source, tokens[i], h))
                    << "row " << i << " of rank " << source;
        }
    }

    // Each token's sum is of all its experts; without those of the victim if that was missed
    // before, and either way while it is being lost.
    void expect_sums(Share &share, bool missed_before) const {
        Plan with = share.plan, without = share.plan;
        without.lost[schedule_.victim] = 1;
        if (missed_before) with = without;
        const Tokens &mine = share.plan.tokens[rank_];
        for (int token = 0; token < mine.count; ++token)
            ASSERT_TRUE(is_sum(share, with, token) || is_sum(share, without, token))
                << "token " << token;
    }
    bool is_sum(Share &share, const Plan &plan, int token) const {
        const Tokens &mine = plan.tokens[rank_];
        for (int h = 0; h < shape_.hidden; ++h) {
            double magnitude = 0;
            const auto value = [&](int expert) {
                const bool there = plan.lost[expert / plan.local_experts()] == 0;
                const double exact = there ? plan.value(rank_, token, h) : 0;
                magnitude += std::abs(exact);
                return exact;
            };
            const double expected = model_combine(mine, shape_.expert_count, token, value);
            const double got =
                read_element(Element::kBf16, share.out.data(), token * shape_.hidden + h);
            if (!(std::abs(got - expected) <= 2 * magnitude * 0x1p-8 + 1e-6)) return false;
        }
        return true;
    }

    mep_status_t update(int id, const std::vector<int32_t> &members, int64_t timeout_us) {
        mep_group_config_t config{};
        config.struct_size = sizeof config;
        config.active_ranks = members.data();
        config.unique_id = &stage_.id(id, rank_ == first_of(members));
        config.timeout_us = timeout_us;
        return timed(timeout_us == kTimeoutUs ? "update" : "",
                     [&] { return mep_group_update(group_.get(), &config); });
    }

    // Some may have come through it and others not. In the next one they meet again.
    void lose_one_in_an_update() {
        stage_.id(1, rank_ == first_of(all()));  // there before whoever makes it may be killed
        stage_.meet(kUpdating, schedule_.ranks);
        const mep_status_t status = update(1, all(), kTimeoutUs);
        EXPECT_TRUE(is_victim() || status == MEP_OK || status == MEP_TIMEOUT ||
                    status == MEP_BOOTSTRAP_FAILED || status == MEP_SYSTEM_ERROR)
            << mep_status_name(status) << ": " << mep_last_error();
        if (is_victim()) {
            for (;;)
                pause();
        }
        ASSERT_EQ(update(2, survivors(), 60'000'000), MEP_OK) << mep_last_error();
        expect_mask();
        go_on(survivors());
    }

    const Schedule &schedule_;
    Stage &stage_;
    const int rank_;
    mep_buffer_config_t shape_;
    Group group_{nullptr};
    Buffer buffer_{nullptr};
};

void sleep_us(int microseconds) {
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

class Faults : public Tidy {
  protected:
    void SetUp() override {
        Tidy::SetUp();
        if (!can_run(kAlarmSeconds, [] { be_rank(0); })) GTEST_SKIP() << "no device; see above";
    }
    // A process that has asked cannot be forked.
    void ask_drivers() override {}
};

void expect_survived(const Schedule &schedule) {
    const Shared<Stage> stage;
    Actors actors(kAlarmSeconds);
    std::vector<pid_t> ranks;
    for (int rank = 0; rank < schedule.ranks; ++rank)
        ranks.push_back(actors.start([&, rank] { Player(schedule, &*stage, rank).play(); }));
    const pid_t victim = ranks[schedule.victim];
    if (schedule.by_time()) {
        stage->await(schedule.step == Step::kInJoin     ? kJoining
                     : schedule.step == Step::kInUpdate ? kUpdating
                                                        : kRunning,
                     schedule.ranks);
        sleep_us(schedule.delay_us);
        kill(victim, schedule.signal());
    }
    if (schedule.in_set_up() || schedule.step == Step::kInUpdate) {
        for (int rank = 0; rank < schedule.ranks; ++rank)
            if (rank != schedule.victim) actors.expect_end(ranks[rank]);
        kill(victim, SIGKILL);
        actors.expect_end(victim, schedule.step == Step::kInJoin ? Actors::kAnyEnd : SIGKILL);
        return;  // the others did without it
    }
    if (schedule.stops) {
        stage->await(kSurvived, schedule.ranks - 1);
        kill(victim, SIGCONT);
    } else {
        actors.expect_end(victim, SIGKILL);
        ranks[schedule.victim] =
            actors.start([&] { Player(schedule, &*stage, schedule.victim).replace(); });
    }
    for (const pid_t rank : ranks)
        actors.expect_end(rank);
}

// Those who wait for its weights wait alike, and are not late for each other.
TEST_F(Faults, OfOneBeforeItsWeightsAreNotThoseOfOthers) {
    Schedule schedule{};
    schedule.seed = 65;
    schedule.ranks = 3;
    schedule.victim = 1;
    schedule.round = 5;
    schedule.step = Step::kBetweenDispatchHalves;
    schedule.stops = true;
    schedule.weights_at_combine = true;
    expect_survived(schedule);
}

TEST_F(Faults, EndInTimeAndAreGotOver) {
    const char *seed = getenv("MEP_FAULTS_SEED"), *count = getenv("MEP_FAULTS");
    const uint64_t first = seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10);
    const int schedules = count == nullptr ? 30 : std::atoi(count);
    for (int i = 0; i < schedules && !HasFailure(); ++i) {
        const Schedule schedule = Schedule::of(first + i);
        std::ostringstream text;
        text << schedule;
        SCOPED_TRACE(text.str());
        expect_survived(schedule);
    }
}

}  // namespace
}  // namespace ep::test
