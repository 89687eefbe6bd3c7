// Ranks as threads that run the kernels themselves: windows and handles are plain memory of exactly
// the right size, so that a sanitizer sees every step outside.
#pragma once

#include "backend/backend.h"
#include "kernels/kernels.h"
#include "support/model.h"
#include "support/tokens.h"
#include "support/values.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <gtest/gtest.h>
#include <memory>
#include <ostream>
#include <random>
#include <sched.h>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace ep::test {

// What a fleet runs; each file of tests defines it.
Kernels kernels_under_test();

enum class Weights { kNone, kAtDispatch, kAtCombine };

// The rounds of one buffer.
struct Rig {
    int ranks = 2, experts = 8, tokens_max = 6, topk = 4, hidden = 128;
    Element type = Element::kBf16;  // of x
    Quant quant = Quant::kNone;
    Weights weights = Weights::kAtDispatch;
    Element combine_type = Element::kBf16;
    Carriage carriage = Carriage::kFlag;
    bool bulk_copies = true;  // where the device has them
    bool fences = true;       // the same
    bool far = false;         // no rank has another's window mapped
    bool fp32_partials = false;
    int idx_bytes = 8;
    int rounds_in_flight = 2;
    int threads = 1;          // of a CPU rank
    int multiprocessors = 5;  // of a GPU: by line one sends, one counts, and the others receive
    Caching caching = Caching::kKeep;
    uint64_t timeout_ns = 30'000'000'000;  // so that only a deadlock reaches it
    int spare_topk = 1;                    // topk_max - topk

    int local_experts() const { return experts / ranks; }
    int rows() const { return ranks * tokens_max; }  // of an expert's region
    int groups() const { return hidden / kScaleGroup; }
    Element out_type() const { return quant == Quant::kNone ? type : Element::kFp8; }
    size_t row_bytes() const { return size_t(hidden) * element_bytes(type); }
    size_t out_row_bytes() const { return size_t(hidden) * element_bytes(out_type()); }
    size_t combine_row_bytes() const { return size_t(hidden) * element_bytes(combine_type); }
    size_t scale_bytes() const {
        return out_type() == Element::kFp8 ? groups() * sizeof(float) : 0;
    }
    bool wide_partials() const { return fp32_partials || combine_type == Element::kFp32; }

    Layout layout() const {
        return Layout::of({ranks, experts, tokens_max, topk + spare_topk, 2 * rounds_in_flight,
                           out_row_bytes() + scale_bytes(),
                           size_t(hidden) * (wide_partials() ? 4 : 2), carriage});
    }
};

// Three ranks that reach no memory of each other.
inline Rig rig_of_far_ranks(Weights weights) {
    Rig rig;
    rig.far = true;
    rig.ranks = 3;
    rig.experts = 6;
    rig.tokens_max = 5;
    rig.topk = 3;
    rig.weights = weights;
    rig.threads = 2;
    rig.timeout_ns = 50'000'000;
    return rig;
}

inline std::ostream &operator<<(std::ostream &out, const Rig &s) {
    return out << "R" << s.ranks << " E" << s.experts << " M" << s.tokens_max << " K" << s.topk
               << " H" << s.hidden << " type" << int(s.type) << " quant" << int(s.quant)
               << " weights" << int(s.weights) << " combine" << int(s.combine_type)
               << (s.wide_partials() ? " wide" : "")
               << (s.carriage == Carriage::kLine ? " lines"
                   : s.bulk_copies               ? " bulk"
                                                 : "")
               << " idx" << s.idx_bytes * 8 << " F" << s.rounds_in_flight << " threads"
               << s.threads;
}

constexpr unsigned char kPoison = 0xff;  // a NaN in every element type, -1 in every integer

// What one rank gives to a round and gets from it, and the handle's memory.
struct Task {
    int rank;
    Tokens tokens;
    std::vector<char> x;  // rows kGap bytes apart
    std::vector<float> x_scales;
    std::vector<int32_t> narrow_idx;
    std::vector<char> out_x, y, out;
    std::vector<float> out_scales;
    std::vector<int32_t> out_count, out_src_info;
    std::vector<int64_t> out_layout_range;

    HandleState state{};
    std::vector<int32_t> choices, positions, row_counts, rows;
    std::vector<uint64_t> token_counts, begins, lost_rounds;
    std::vector<float> weights;

    static constexpr size_t kGap = 32;
};

// One round of all ranks, and what the oracle says about it.
struct Round {
    uint64_t seed;
    std::vector<Task> tasks;
    std::vector<std::vector<Packed>> rows;  // of each global expert
    std::vector<char> lost;                 // ranks that do not take part
};

// The first of all bytes that differs from poison; `bytes` if none does.
inline size_t first_touched(const void *data, size_t bytes) {
    const auto *at = static_cast<const unsigned char *>(data);
    for (size_t i = 0; i < bytes; ++i)
        if (at[i] != kPoison) return i;
    return bytes;
}

class Fleet {
  public:
    explicit Fleet(const Rig &rig) : rig_(rig), layout_(rig.layout()) {
        for (int rank = 0; rank < rig.ranks; ++rank) {
            Member &member = members_.emplace_back();
            member.window = new_memory(layout_.bytes);
            member.outbox = new_memory(boxes_.bytes());
            member.inbox = new_memory(boxes_.bytes());
            member.active.assign(rig.ranks, 1);
            member.present.assign(rig.ranks, 1);
            member.peer_counts.resize(rig.ranks);
            member.expert_rows.resize(rig.local_experts());
            member.paces.resize(rig.ranks);
            if (create_workers(rig.threads, &member.workers) != MEP_OK) std::abort();
            member.tally.resize(size_t(rig.experts) *
                                tally_row_count(kernels_.chunk_count_max(queue(rank))));
            windows_.push_back(member.window.get());
        }
        for (int rank = 0; rank < rig.ranks; ++rank)
            for (int peer = 0; peer < rig.ranks; ++peer) {
                const bool far = rig.far && peer != rank;
                members_[rank].box_of.push_back(far ? box_at(rank, peer) : Far::kNear);
                members_[rank].mapped.push_back(far ? nullptr : windows_[peer]);
            }
    }

    const Rig &rig() const { return rig_; }
    const Layout &layout() const { return layout_; }
    char *window(int rank) { return windows_[rank]; }
    std::vector<int32_t> &active(int rank) { return members_[rank].active; }
    std::vector<int32_t> &present(int rank) { return members_[rank].present; }
    const PeerCounts &peer_counts(int rank, int peer) { return members_[rank].peer_counts[peer]; }
    const std::vector<uint64_t> &expert_rows(int rank) { return members_[rank].expert_rows; }
    const BufferState &state(int rank) const { return members_[rank].state; }

    // A round with random choices and weights; counts below 0: a random number of tokens.
    ep::test::Round round(uint64_t seed, std::vector<int> counts = {},
                          const std::vector<int> &lost = {});

    // The same, without a rank of which messages were lost: its rows, and what experts make of
    // them.
    ep::test::Round without(const ep::test::Round &round, int lost) const;

    // body(rank) on a thread for each rank that is not in `absent`; joined at the end.
    template <class Body>
    void run(Body body, const std::vector<int> &absent = {}) {
        std::vector<std::thread> threads;
        for (int rank = 0; rank < rig_.ranks; ++rank) {
            bool here = true;
            for (const int one : absent)
                here = here && one != rank;
            if (here) threads.emplace_back([=] { body(rank); });
        }
        for (std::thread &thread : threads)
            thread.join();
    }

    void dispatch_send(Task &task) {
        kernels_.dispatch(dispatch_args(task), Phases::kSend, queue(task.rank));
    }
    void dispatch_receive(Task &task) {
        kernels_.dispatch(dispatch_args(task), Phases::kReceive, queue(task.rank));
    }
    void combine_send(Task &task) {
        kernels_.combine(combine_args(task), Phases::kSend, queue(task.rank));
    }
    void combine_receive(Task &task) {
        kernels_.combine(combine_args(task), Phases::kReceive, queue(task.rank));
    }
    void dispatch(Task &task) {
        kernels_.dispatch(dispatch_args(task), Phases::kBoth, queue(task.rank));
    }
    void combine(Task &task) {
        kernels_.combine(combine_args(task), Phases::kBoth, queue(task.rank));
    }
    // The same once send_weights() has been called, by flag.
    void combine_after_weights(Task &task) {
        CombineArgs args = combine_args(task);
        args.weights_are_sent = true;
        kernels_.combine(args, Phases::kBoth, queue(task.rank));
    }
    void both(Task &task) {
        dispatch(task);
        combine(task);
    }

    // An exchange of whole boxes between far ranks; where each finds what came.
    void exchange(Cargo cargo);
    void receive_from_inbox(Task &task, bool from_inbox) {
        members_[task.rank].receives_from_inbox = from_inbox;
    }
    void deliver(Cargo cargo, Task &task);
    void watch(Task &task, Watch *watch, WatchState *state, bool ends) {
        kernels_.watch({kernel_round(task), Cargo::kMessages, watch, state, ends},
                       queue(task.rank));
    }

    // What an engine carries between far ranks, [from][to].
    using Parcels = std::vector<std::vector<std::vector<char>>>;
    void send_weights(Task &task) {
        kernels_.combine_weights(combine_args(task), queue(task.rank));
    }
    std::vector<std::vector<char>> pack(Cargo cargo, Task &task);
    void place(Cargo cargo, Task &task, Parcels &parcels);

    void set_timeout_ns(uint64_t timeout_ns) { rig_.timeout_ns = timeout_ns; }

    // Does everything a rank got agree with the oracle, and is everything else as it was? But for
    // rows that were told and did not come.
    ::testing::AssertionResult dispatched(const ep::test::Round &round, int rank) const {
        return dispatched(round, rank, round);
    }
    ::testing::AssertionResult dispatched(const ep::test::Round &round, int rank,
                                          const ep::test::Round &told) const;
    ::testing::AssertionResult combined(const ep::test::Round &round, int rank) const;

    // Is row `row` of `at` what `from` sent of its token?
    ::testing::AssertionResult row_arrived(const Task &from, int token, const Task &at,
                                           size_t row) const;

  private:
    struct Free {
        void operator()(char *memory) const { std::free(memory); }
    };
    using Memory = std::unique_ptr<char, Free>;
    struct Member {
        Memory window, outbox, inbox;
        std::vector<char *> mapped;  // [rank]
        BufferState state{};
        std::vector<int32_t> active, present, tally, box_of;
        std::vector<PeerCounts> peer_counts;
        std::vector<Pace> paces;
        std::vector<uint64_t> expert_rows;
        bool receives_from_inbox = false;
        std::unique_ptr<Workers> workers;
    };

    static Memory new_memory(size_t bytes) {
        void *memory = nullptr;
        if (posix_memalign(&memory, Layout::kLineBytes, bytes) != 0) std::abort();
        std::memset(memory, 0, bytes);
        return Memory(static_cast<char *>(memory));
    }
    static int32_t box_at(int rank, int peer) { return peer - (peer > rank); }
    size_t body_bytes(Cargo cargo) const;

    Queue queue(int rank) const {
        Queue queue;
        queue.workers = members_[rank].workers.get();
        queue.block_count = rig_.multiprocessors;
        queue.may_move_in_bulk = rig_.bulk_copies;
        queue.fences_phases = rig_.fences;
        return queue;
    }

    Tokens tokens(std::mt19937_64 *random, int count) const;
    Task task(const ep::test::Round &round, int rank, Tokens tokens) const;
    void fill_x(uint64_t seed, Task *task) const;
    void fill_y(const ep::test::Round &round, Task *task) const;
    Scales x_scales(Task &task) const;
    Scales out_scales(Task &task) const;
    ep::Round kernel_round(Task &task);
    DispatchArgs dispatch_args(Task &task);
    CombineArgs combine_args(Task &task);
    ParcelArgs parcel_args(Cargo cargo, Task &task);

    float scale_at(const Task &task, size_t row, int group) const {
        const size_t rows = rig_.rows();
        return task.out_scales[row / rows * rows * rig_.groups() + group * rows + row % rows];
    }

    Rig rig_;
    Layout layout_;
    Boxes boxes_ = Boxes::of(layout_, rig_.far ? rig_.ranks - 1 : 0);
    Kernels kernels_ = kernels_under_test();
    std::vector<Member> members_;
    std::vector<char *> windows_;
};

// ---- Making a round
// -------------------------------------------------------------------------------

inline Tokens Fleet::tokens(std::mt19937_64 *random, int count) const {
    Tokens tokens = random_tokens(random, count, rig_.topk, rig_.experts, rig_.idx_bytes * 8);
    if (rig_.weights == Weights::kNone) tokens.weights.assign(tokens.weights.size(), 1.0f);
    return tokens;
}

inline ep::test::Round Fleet::round(uint64_t seed, std::vector<int> counts,
                                    const std::vector<int> &lost) {
    std::mt19937_64 random(seed);
    ep::test::Round round{seed, {}, {}, std::vector<char>(rig_.ranks)};
    std::vector<Tokens> all;
    counts.resize(rig_.ranks, -1);
    for (const int rank : lost) {
        round.lost[rank] = 1;
        counts[rank] = 0;
    }
    for (int rank = 0; rank < rig_.ranks; ++rank) {
        const int any = int(random() % (rig_.tokens_max + 1));
        all.push_back(tokens(&random, counts[rank] < 0 ? any : counts[rank]));
    }
    round.rows = model_dispatch(all, rig_.experts);
    for (int rank = 0; rank < rig_.ranks; ++rank)
        round.tasks.push_back(task(round, rank, all[rank]));
    return round;
}

inline ep::test::Round Fleet::without(const ep::test::Round &round, int lost) const {
    ep::test::Round left = round;
    left.lost[lost] = 1;
    for (std::vector<Packed> &rows : left.rows)
        rows.erase(std::remove_if(rows.begin(), rows.end(),
                                  [lost](const Packed &row) { return row.source == lost; }),
                   rows.end());
    for (Task &task : left.tasks)
        fill_y(left, &task);
    return left;
}

inline Task Fleet::task(const ep::test::Round &round, int rank, Tokens tokens) const {
    const Shape &s = layout_.shape;
    const size_t rows = size_t(rig_.local_experts()) * rig_.rows();
    const size_t slots = size_t(s.rank_count) * s.token_count_max;
    Task task{};
    task.rank = rank;
    task.tokens = std::move(tokens);
    for (const int64_t id : task.tokens.topk_idx)
        task.narrow_idx.push_back(int32_t(id));
    task.out_x.assign(rows * rig_.out_row_bytes(), char(kPoison));
    task.out_scales.resize(rig_.out_type() == Element::kFp8 ? rows * rig_.groups() : 0);
    if (!task.out_scales.empty())
        std::memset(task.out_scales.data(), kPoison, task.out_scales.size() * sizeof(float));
    task.out_count.assign(rig_.local_experts(), -1);
    task.out_src_info.assign(rows, -1);
    task.out_layout_range.assign(size_t(rig_.local_experts()) * s.rank_count, -1);
    task.choices.resize(size_t(s.token_count_max) * s.topk_max);
    task.positions.resize(task.choices.size());
    task.token_counts.resize(s.rank_count);
    task.begins.resize(size_t(rig_.local_experts()) * (s.rank_count + 1));
    task.lost_rounds.resize(s.rank_count);
    task.row_counts.resize(slots);
    task.rows.resize(slots * s.topk_max);
    task.weights.resize(slots * s.topk_max);
    fill_x(round.seed, &task);
    fill_y(round, &task);
    task.out.assign(task.tokens.count * (rig_.combine_row_bytes() + Task::kGap), char(kPoison));
    return task;
}

inline void Fleet::fill_x(uint64_t seed, Task *task) const {
    const size_t stride = rig_.row_bytes() + Task::kGap;
    task->x.assign(task->tokens.count * stride, char(kPoison));
    for (int token = 0; token < task->tokens.count; ++token) {
        for (int h = 0; h < rig_.hidden; ++h)
            write_element(rig_.type, &task->x[token * stride], h,
                          real_value({seed, uint64_t(task->rank), uint64_t(token), uint64_t(h)}));
        if (rig_.type != Element::kFp8) continue;
        for (int g = 0; g < rig_.groups(); ++g) {  // every other one is a gap
            task->x_scales.push_back(real_value({seed, uint64_t(token), uint64_t(g)}));
            task->x_scales.push_back(-1);
        }
    }
}

// What an expert makes of a token, before it is rounded to the type of combine.
inline float expert_value(uint64_t seed, int expert, const Packed &of, int channel) {
    return real_value({seed ^ 0xc0ffee, uint64_t(expert), uint64_t(of.source) << 32 | of.token,
                       uint64_t(channel)});
}

inline void Fleet::fill_y(const ep::test::Round &round, Task *task) const {
    const int experts = rig_.local_experts();
    task->y.assign(size_t(experts) * rig_.rows() * rig_.combine_row_bytes(), char(kPoison));
    for (int e = 0; e < experts; ++e) {
        const int expert = task->rank * experts + e;
        for (size_t i = 0; i < round.rows[expert].size(); ++i) {
            char *row = &task->y[(size_t(e) * rig_.rows() + i) * rig_.combine_row_bytes()];
            for (int h = 0; h < rig_.hidden; ++h)
                write_element(rig_.combine_type, row, h,
                              expert_value(round.seed, expert, round.rows[expert][i], h));
        }
    }
}

// ---- Arguments
// ------------------------------------------------------------------------------------

inline ep::Round Fleet::kernel_round(Task &task) {
    Member &member = members_[task.rank];
    ep::Round round{};
    round.layout = layout_;
    round.rank = task.rank;
    round.windows = member.mapped.data();
    round.state = &member.state;
    round.routing = {&task.state,
                     task.choices.data(),
                     task.positions.data(),
                     task.token_counts.data(),
                     task.begins.data(),
                     task.row_counts.data(),
                     task.rows.data(),
                     task.weights.data(),
                     task.lost_rounds.data()};
    round.members = member.present.data();
    round.active = member.active.data();
    round.peer_counts = member.peer_counts.data();
    round.paces = member.paces.data();
    round.expert_rows = member.expert_rows.data();
    round.timeout_ns = rig_.timeout_ns;
    round.token_count = task.tokens.count;
    round.topk = rig_.topk;
    round.hidden = rig_.hidden;
    round.caching = rig_.caching;
    if (rig_.far)
        round.far = {member.box_of.data(), member.outbox.get(),
                     member.receives_from_inbox ? member.inbox.get() : nullptr, boxes_};
    return round;
}

inline DispatchArgs Fleet::dispatch_args(Task &task) {
    const int64_t rows = rig_.rows(), groups = rig_.groups();
    DispatchArgs args{};
    args.round = kernel_round(task);
    args.tally = members_[task.rank].tally.data();
    args.topk_idx_bytes = rig_.idx_bytes;
    args.topk_idx = rig_.idx_bytes == 8 ? static_cast<const void *>(task.tokens.topk_idx.data())
                                        : task.narrow_idx.data();
    args.topk_weights = rig_.weights == Weights::kAtDispatch ? task.tokens.weights.data() : nullptr;
    args.x = task.x.data();
    args.x_stride = rig_.row_bytes() + Task::kGap;
    args.x_type = rig_.type;
    args.x_scales = {task.x_scales.data(), 0, 2 * groups, 2};
    args.quant = rig_.quant;
    args.out_x = task.out_x.data();
    args.out_scales = {task.out_scales.data(), rows * groups, 1, rows};  // channels before rows
    args.out_count = task.out_count.data();
    args.out_src_info = task.out_src_info.data();
    args.out_layout_range = task.out_layout_range.data();
    return args;
}

inline CombineArgs Fleet::combine_args(Task &task) {
    static const float none = 0;  // a rank without tokens still says that weights come now
    CombineArgs args{};
    args.round = kernel_round(task);
    args.x_type = rig_.combine_type;
    args.fp32_partials = rig_.wide_partials();
    args.x = task.y.data();
    if (rig_.weights == Weights::kAtCombine)
        args.topk_weights = task.tokens.count == 0 ? &none : task.tokens.weights.data();
    args.out = task.out.data();
    args.out_stride = rig_.combine_row_bytes() + Task::kGap;
    return args;
}

inline size_t Fleet::body_bytes(Cargo cargo) const {
    const auto whole = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
    return cargo == Cargo::kMessages ? layout_.head_bytes - kHeadFlagBytes +
                                           whole(rig_.out_row_bytes() + rig_.scale_bytes())
           : cargo == Cargo::kWeights ? layout_.weight_bytes - kHeadFlagBytes
                                      : whole(size_t(rig_.hidden) * (rig_.wide_partials() ? 4 : 2));
}

inline ParcelArgs Fleet::parcel_args(Cargo cargo, Task &task) {
    ParcelArgs args{};
    args.round = kernel_round(task);
    args.cargo = cargo;
    args.body_bytes = body_bytes(cargo);
    return args;
}

inline void Fleet::exchange(Cargo cargo) {
    for (int from = 0; from < rig_.ranks; ++from)
        for (int to = 0; to < rig_.ranks; ++to)
            if (from != to)
                std::memcpy(boxes_.box(members_[to].inbox.get(), cargo, box_at(to, from)),
                            boxes_.box(members_[from].outbox.get(), cargo, box_at(from, to)),
                            boxes_.bytes_of(cargo));
}

inline void Fleet::deliver(Cargo cargo, Task &task) {
    DeliverArgs args{kernel_round(task), cargo, body_bytes(cargo)};
    args.round.far.inbox = members_[task.rank].inbox.get();
    kernels_.deliver(args, queue(task.rank));
}

inline std::vector<std::vector<char>> Fleet::pack(Cargo cargo, Task &task) {
    ParcelArgs args = parcel_args(cargo, task);
    std::vector<std::vector<char>> parcels(rig_.ranks);
    std::vector<char *> places;
    std::vector<uint64_t> sizes(rig_.ranks);
    for (std::vector<char> &parcel : parcels) {
        parcel.resize(args.bytes(rig_.tokens_max));
        places.push_back(parcel.data());
    }
    args.parcels = places.data();
    args.sizes = sizes.data();
    kernels_.pack(args, queue(task.rank));
    for (int peer = 0; peer < rig_.ranks; ++peer)
        parcels[peer].resize(sizes[peer]);
    return parcels;
}

inline void Fleet::place(Cargo cargo, Task &task, Parcels &parcels) {
    ParcelArgs args = parcel_args(cargo, task);
    std::vector<char *> places;
    std::vector<uint64_t> sizes;
    for (std::vector<std::vector<char>> &from : parcels) {
        from[task.rank].shrink_to_fit();  // so that a sanitizer sees its end
        places.push_back(from[task.rank].data());
        sizes.push_back(from[task.rank].size());
    }
    args.parcels = places.data();
    args.sizes = sizes.data();
    kernels_.place(args, queue(task.rank));
}

// ---- Checks
// ---------------------------------------------------------------------------------------

inline ::testing::AssertionResult Fleet::row_arrived(const Task &from, int token, const Task &at,
                                                     size_t row) const {
    const char *sent = &from.x[token * (rig_.row_bytes() + Task::kGap)];
    const char *got = &at.out_x[row * rig_.out_row_bytes()];
    if (rig_.quant == Quant::kNone && std::memcmp(sent, got, rig_.row_bytes()) != 0)
        return ::testing::AssertionFailure() << "another row";
    for (int g = 0; rig_.out_type() == Element::kFp8 && g < rig_.groups(); ++g) {
        const float scale = scale_at(at, row, g);
        if (rig_.quant == Quant::kNone) {
            const float given = from.x_scales[(size_t(token) * rig_.groups() + g) * 2];
            if (scale != given)
                return ::testing::AssertionFailure() << "scale " << scale << ", not " << given;
            continue;
        }
        float group[kScaleGroup];
        for (int i = 0; i < kScaleGroup; ++i)
            group[i] = read_element(rig_.type, sent, g * kScaleGroup + i);
        if (!scale_is_right(group, scale, rig_.quant))
            return ::testing::AssertionFailure() << "group " << g << " has scale " << scale;
        for (int i = 0; i < kScaleGroup; ++i) {
            const float value = scale * read_element(Element::kFp8, got, g * kScaleGroup + i);
            if (!near_as_fp8(value, group[i], scale))
                return ::testing::AssertionFailure() << value << " stands for " << group[i];
        }
    }
    return ::testing::AssertionSuccess();
}

inline ::testing::AssertionResult Fleet::dispatched(const ep::test::Round &round, int rank,
                                                    const ep::test::Round &told) const {
    const Task &task = round.tasks[rank];
    const auto wrong = [rank](int expert, size_t row) {
        return ::testing::AssertionFailure()
               << "rank " << rank << ", local expert " << expert << ", row " << row << ": ";
    };
    for (int e = 0; e < rig_.local_experts(); ++e) {
        const std::vector<Packed> &rows = round.rows[rank * rig_.local_experts() + e];
        if (task.out_count[e] != int(rows.size()))
            return wrong(e, 0) << "count " << task.out_count[e] << ", not " << rows.size();
        std::vector<int64_t> begin(rig_.ranks + 1);
        for (const Packed &row : rows)
            ++begin[row.source + 1];
        for (int source = 0; source < rig_.ranks; ++source) {
            const int64_t count = begin[source + 1];
            begin[source + 1] += begin[source];
            if (task.out_layout_range[e * rig_.ranks + source] != (begin[source] << 32 | count))
                return wrong(e, begin[source]) << "layout range of source " << source;
        }
        const size_t first = size_t(e) * rig_.rows();
        for (size_t i = 0; i < rows.size(); ++i) {
            if (task.out_src_info[first + i] != rows[i].token)
                return wrong(e, i) << "src_info " << task.out_src_info[first + i];
            const auto arrived =
                row_arrived(round.tasks[rows[i].source], rows[i].token, task, first + i);
            if (!arrived) return wrong(e, i) << arrived.message();
        }
        const size_t end = told.rows[rank * rig_.local_experts() + e].size();
        const size_t rest = (rig_.rows() - end) * rig_.out_row_bytes();
        if (rest > 0 &&
            first_touched(&task.out_x[(first + end) * rig_.out_row_bytes()], rest) < rest)
            return wrong(e, end) << "a row after the last was touched";
        for (size_t i = end; i < size_t(rig_.rows()); ++i) {
            if (task.out_src_info[first + i] != -1) return wrong(e, i) << "src_info was touched";
            for (int g = 0; !task.out_scales.empty() && g < rig_.groups(); ++g)
                if (scale_at(task, first + i, g) == scale_at(task, first + i, g))
                    return wrong(e, i) << "a scale was touched";
        }
    }
    return ::testing::AssertionSuccess();
}

inline ::testing::AssertionResult Fleet::combined(const ep::test::Round &round, int rank) const {
    const Task &task = round.tasks[rank];
    const double unit = unit_in_last_place(rig_.combine_type);
    const double partial_unit = rig_.wide_partials() ? unit_in_last_place(Element::kFp32) : unit;
    for (int token = 0; token < task.tokens.count; ++token) {
        const char *row = &task.out[token * (rig_.combine_row_bytes() + Task::kGap)];
        for (int h = 0; h < rig_.hidden; ++h) {
            double magnitude = 0;
            const auto value = [&](int expert) {
                if (round.lost[expert / rig_.local_experts()]) return 0.0;
                const double exact =
                    rounded(rig_.combine_type, expert_value(round.seed, expert, {rank, token}, h));
                magnitude += exact < 0 ? -exact : exact;
                return exact;
            };
            const double expected = model_combine(task.tokens, rig_.experts, token, value);
            const double got = read_element(rig_.combine_type, row, h);
            const double bound = magnitude * partial_unit + std::abs(expected) * unit +
                                 magnitude * rig_.topk * unit_in_last_place(Element::kFp32);
            if (!(std::abs(got - expected) <= bound + 1e-7))
                return ::testing::AssertionFailure()
                       << "rank " << rank << ", token " << token << ", channel " << h << ": " << got
                       << ", not " << expected << " +- " << bound;
        }
        if (first_touched(row + rig_.combine_row_bytes(), Task::kGap) < Task::kGap)
            return ::testing::AssertionFailure() << "the gap after a row of out was touched";
    }
    return ::testing::AssertionSuccess();
}

}  // namespace ep::test
