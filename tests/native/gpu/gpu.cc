#include "gpu/gpu.h"

#include "core/buffer.h"
#include "support/pen.h"

#include <algorithm>
#include <functional>

namespace gpu {
namespace {

constexpr int64_t kTimeoutUs = 30'000'000;

bool ok(mep_status_t status, const char *call, std::string *failure) {
    if (status == MEP_OK) return true;
    *failure = std::string(call) + ": " + mep_status_name(status) + ": " + mep_last_error();
    return false;
}

struct Objects {
    mep_group_t *group = nullptr;
    mep_buffer_t *buffer = nullptr;
    mep_handle_t *handles[2] = {};
    cudaStream_t stream = nullptr;
    bool waits_after_calls = false;

    Objects() = default;
    Objects(const Objects &) = delete;
    Objects &operator=(const Objects &) = delete;
    ~Objects() {
        if (stream != nullptr) cudaStreamDestroy(stream);
        for (mep_handle_t *handle : handles)
            mep_handle_destroy(handle);
        mep_buffer_destroy(buffer);
        mep_group_destroy(group);
    }
    bool create(const Problem &p, const Seat &seat, std::string *failure);
    bool barrier(std::string *failure) const;
    bool await(std::string *failure) const;
    bool after_call(std::string *failure) const { return !waits_after_calls || await(failure); }
    bool count(Results *results, std::string *failure) const;
};

bool Objects::create(const Problem &p, const Seat &seat, std::string *failure) {
    mep_group_config_t group_config{};
    group_config.struct_size = sizeof group_config;
    group_config.rank = seat.rank;
    group_config.rank_count = p.ranks;
    group_config.backend = seat.backend;
    group_config.device_id = seat.on_gpu() ? seat.device : 0;
    group_config.timeout_us = kTimeoutUs;
    group_config.world = seat.world;
    group_config.unique_id = seat.id;
    mep_buffer_config_t config{};
    config.struct_size = sizeof config;
    config.token_count_max = p.tokens_max;
    config.hidden = p.hidden;
    config.expert_count = p.experts;
    config.topk_max = p.topk;
    config.payload_types = MEP_PAYLOAD_BF16 | MEP_PAYLOAD_FP16;
    if (p.type_bits == 32) config.payload_types |= MEP_PAYLOAD_FP32;
    if (p.quant != MEP_QUANT_NONE) config.payload_types |= MEP_PAYLOAD_FP8;
    config.cpu_thread_count = 1;
    config.sm_count_max = p.sms;
    // A stream that does not wait for the default one, on which other ranks of this GPU copy.
    if (seat.on_gpu()) cudaSetDevice(seat.device);
    if (seat.on_gpu()) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    waits_after_calls = seat.shares_gpu;
    return ok(mep_group_create(&group_config, &group), "mep_group_create", failure) &&
           ok(mep_buffer_create(group, &config, &buffer), "mep_buffer_create", failure) &&
           ok(mep_handle_create(buffer, &handles[0]), "mep_handle_create", failure) &&
           ok(mep_handle_create(buffer, &handles[1]), "mep_handle_create", failure);
}

bool Objects::barrier(std::string *failure) const {
    mep_group_info_t info{};
    info.struct_size = sizeof info;
    mep_group_query(group, &info);
    const char mine = 0;
    std::vector<char> all(info.rank_count);
    return ok(mep_group_all_gather(group, &mine, all.data(), 1), "mep_group_all_gather", failure);
}

bool Objects::await(std::string *failure) const {
    const cudaError_t error = stream == nullptr ? cudaSuccess : cudaStreamSynchronize(stream);
    if (error != cudaSuccess) *failure = std::string("stream: ") + cudaGetErrorString(error);
    return error == cudaSuccess;
}

bool Objects::count(Results *results, std::string *failure) const {
    mep_buffer_counters_t counters{};
    counters.struct_size = sizeof counters;
    if (!ok(mep_buffer_query_counters(buffer, &counters), "counters", failure)) return false;
    const auto *bytes = reinterpret_cast<const char *>(&counters);
    results->emplace_back("counters", std::vector<char>(bytes, bytes + sizeof counters));
    return true;
}

// The bytes of a random finite value of the problem's type, small enough for sums in fp16.
// NaN, infinities, zeros and subnormals too, which both have to round and cast alike; not in fp32,
// where a NaN keeps bits of where it came from.
void put_random(const Problem &p, std::mt19937 &random, char *to) {
    if (p.type_bits == 16 && random() % 1024 == 0) {
        const uint16_t exponent = p.type_code == MEP_TYPE_BFLOAT ? 0x7f80 : 0x7c00;
        const uint16_t strange[] = {exponent,
                                    uint16_t(exponent | 1),
                                    0xffff,
                                    0x8000,
                                    1,
                                    uint16_t(exponent | 0x8000),
                                    uint16_t(exponent - 1)};
        std::memcpy(to, &strange[random() % std::size(strange)], 2);
        return;
    }
    const float value = static_cast<float>(int(random() % 4001) - 2000) / 1000.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (p.type_bits == 32) {
        std::memcpy(to, &bits, 4);
    } else if (p.type_code == MEP_TYPE_BFLOAT) {
        const auto half = static_cast<uint16_t>(bits >> 16);
        std::memcpy(to, &half, 2);
    } else {  // fp16 of 1.0 to 2.0, either sign
        const auto half = static_cast<uint16_t>(0x3c00 | (random() & 0x83ff));
        std::memcpy(to, &half, 2);
    }
}

}  // namespace

Inputs Inputs::of(const Problem &p, int rank, int round) {
    std::mt19937 random(p.seed * 1000003 + rank * 1009 + round);
    Inputs in;
    in.tokens = round % 3 == 2 ? int(random() % (p.tokens_max + 1)) : p.tokens_max;
    in.x.resize(size_t(in.tokens) * p.hidden * p.type_bits / 8);
    for (size_t i = 0; i < in.x.size(); i += p.type_bits / 8)
        put_random(p, random, &in.x[i]);
    for (int i = 0; i < in.tokens * p.topk; ++i) {
        in.idx.push_back(int32_t(random() % (p.experts + 2)) - 1);  // -1, and one out of range
        in.weights.push_back(static_cast<float>(random() % 1000) / 1000.0f);
    }
    return in;
}

namespace {

// The arrays of one round.
struct Round {
    const Problem &p;
    Inputs in;
    Array x, idx, weights, out_x, scales, count, info, range, y, out;
    const Array *active = nullptr;  // or the buffer's own mask

    Round(const Problem &problem, const Seat &seat, int number)
        : Round(problem, seat, Inputs::of(problem, seat.rank, number)) {}
    Round(const Problem &problem, const Seat &seat, Inputs inputs)
        : p(problem),
          in(std::move(inputs)),
          x(seat, p.type_code, p.type_bits, {in.tokens, p.hidden}),
          idx(seat, MEP_TYPE_INT, 32, {in.tokens, p.topk}),
          weights(seat, MEP_TYPE_FLOAT, 32, {in.tokens, p.topk}),
          out_x(seat, p.quant != 0 ? MEP_TYPE_FLOAT8_E4M3FN : p.type_code,
                p.quant != 0 ? 8 : p.type_bits, {p.local(), p.rows(), p.hidden}),
          scales(seat, MEP_TYPE_FLOAT, 32, {p.local(), p.rows(), p.hidden / 128}),
          count(seat, MEP_TYPE_INT, 32, {p.local()}),
          info(seat, MEP_TYPE_INT, 32, {p.local(), p.rows()}),
          range(seat, MEP_TYPE_INT, 64, {p.local(), p.ranks}),
          y(seat, p.type_code, p.type_bits, {p.local(), p.rows(), p.hidden}),
          out(seat, p.type_code, p.type_bits, {in.tokens, p.hidden}) {
        x.memory.put(in.x.data());
        idx.memory.put(in.idx.data());
        weights.memory.put(in.weights.data());
        y.memory.put(expert_outputs(p, p.seed + seat.rank).data());
    }

    // Phases 0: both.
    bool dispatch(const Objects &o, int handle, uint32_t phases, std::string *failure);
    bool combine(const Objects &o, int handle, uint32_t phases, std::string *failure);
    bool launch(const Objects &o, int handle, std::string *failure) {
        return dispatch(o, handle, 0, failure) && combine(o, handle, 0, failure);
    }

    // What the round writes.
    std::vector<std::pair<const char *, const Array *>> outputs() const {
        std::vector<std::pair<const char *, const Array *>> all{{"out_x", &out_x},
                                                                {"out_count", &count},
                                                                {"out_src_info", &info},
                                                                {"out_layout_range", &range},
                                                                {"out", &out}};
        if (p.quant != MEP_QUANT_NONE) all.emplace_back("out_scales", &scales);
        return all;
    }
    void collect(int number, Results *results) const {
        for (const auto &[name, array] : outputs())
            results->emplace_back(name_of(name, number), array->memory.get());
    }
    static std::string name_of(const char *array, int number) {
        return std::string(array) + " of round " + std::to_string(number);
    }

    // The experts' outputs: any rows will do, the same on both backends.
    static std::vector<char> expert_outputs(const Problem &p, uint32_t seed) {
        std::mt19937 random(seed);
        std::vector<char> outputs(size_t(p.local() * p.rows()) * p.hidden * p.type_bits / 8);
        for (size_t i = 0; i < outputs.size(); i += p.type_bits / 8)
            put_random(p, random, &outputs[i]);
        return outputs;
    }
};

bool Round::dispatch(const Objects &o, int handle, uint32_t phases, std::string *failure) {
    mep_dispatch_args_t args{};
    args.struct_size = sizeof args;
    args.phases = phases;
    args.x = &x.tensor;
    args.topk_idx = &idx.tensor;
    args.topk_weights = p.weights == Weights::kAtDispatch ? &weights.tensor : nullptr;
    args.out_x = &out_x.tensor;
    args.out_scales = p.quant != MEP_QUANT_NONE ? &scales.tensor : nullptr;
    args.out_count = &count.tensor;
    args.out_src_info = &info.tensor;
    args.out_layout_range = &range.tensor;
    args.active_ranks = active == nullptr ? nullptr : &active->tensor;
    args.quant = p.quant;
    args.timeout_us = p.timeout_us;
    args.stream = o.stream;
    return ok(mep_dispatch(o.buffer, o.handles[handle], &args), "mep_dispatch", failure) &&
           o.after_call(failure);
}

bool Round::combine(const Objects &o, int handle, uint32_t phases, std::string *failure) {
    mep_combine_args_t args{};
    args.struct_size = sizeof args;
    args.phases = phases;
    args.x = &y.tensor;
    args.topk_weights = p.weights == Weights::kAtCombine ? &weights.tensor : nullptr;
    args.out = &out.tensor;
    args.active_ranks = active == nullptr ? nullptr : &active->tensor;
    args.timeout_us = p.timeout_us;
    args.stream = o.stream;
    return ok(mep_combine(o.buffer, o.handles[handle], &args), "mep_combine", failure) &&
           o.after_call(failure);
}

bool launch_in_halves(Round &round, const Objects &o, std::string *failure) {
    return round.dispatch(o, 0, MEP_PHASE_SEND, failure) &&
           round.dispatch(o, 0, MEP_PHASE_RECEIVE, failure) &&
           round.combine(o, 0, MEP_PHASE_SEND, failure) &&
           round.combine(o, 0, MEP_PHASE_RECEIVE, failure);
}

bool launch_crossed(Round &first, Round &second, const Objects &o, std::string *failure) {
    return first.dispatch(o, 0, MEP_PHASE_SEND, failure) &&
           second.dispatch(o, 1, MEP_PHASE_SEND, failure) &&
           second.dispatch(o, 1, MEP_PHASE_RECEIVE, failure) &&
           first.dispatch(o, 0, MEP_PHASE_RECEIVE, failure) &&
           first.combine(o, 0, MEP_PHASE_SEND, failure) &&
           second.combine(o, 1, MEP_PHASE_SEND, failure) &&
           second.combine(o, 1, MEP_PHASE_RECEIVE, failure) &&
           first.combine(o, 0, MEP_PHASE_RECEIVE, failure);
}

bool launch_all(const std::vector<std::unique_ptr<Round>> &rounds, const Objects &o,
                std::string *failure) {
    for (size_t i = 0; i < rounds.size(); ++i) {
        Round &round = *rounds[i];
        const bool good = round.p.order == Order::kWhole ? round.launch(o, 0, failure)
                          : round.p.order == Order::kHalves
                              ? launch_in_halves(round, o, failure)
                              : i % 2 == 0 || launch_crossed(*rounds[i - 1], round, o, failure);
        if (!good) return false;
    }
    return true;
}

}  // namespace

Results run_rounds(const Problem &p, const Seat &seat, std::string *failure) {
    Objects o;
    if (!o.create(p, seat, failure)) return {};
    std::vector<std::unique_ptr<Round>> rounds;
    for (int number = 0; number < p.rounds; ++number)
        rounds.push_back(std::make_unique<Round>(p, seat, number));
    if (seat.on_gpu()) cudaDeviceSynchronize();
    // Between these barriers nobody allocates or copies: that would wait for other ranks' kernels.
    if (!o.barrier(failure)) return {};
    if (!launch_all(rounds, o, failure)) return {};
    if (!o.await(failure) || !o.barrier(failure)) return {};
    Results results;
    for (int number = 0; number < p.rounds; ++number)
        rounds[number]->collect(number, &results);
    if (!o.count(&results, failure)) return {};
    return o.barrier(failure) ? std::move(results) : Results{};  // nobody leaves early
}

// ---- Replays ------------------------------------------------------------------------------------

namespace {

// Ends the program: nothing of the test can go on.
void must(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    std::abort();
}

// An array with pinned memory on the host, so that copies are queued on the rank's own stream and
// nothing waits for other ranks' kernels.
class Staged {
  public:
    Staged(const Array &array, cudaStream_t stream)
        : data_(array.memory.data()), bytes_(array.memory.bytes()), stream_(stream) {
        if (stream_ != nullptr) must(cudaMallocHost(&host_, bytes_), "cudaMallocHost");
    }
    Staged(Staged &&other) noexcept
        : data_(other.data_),
          host_(std::exchange(other.host_, nullptr)),
          bytes_(other.bytes_),
          stream_(other.stream_) {}
    Staged(const Staged &) = delete;
    Staged &operator=(const Staged &) = delete;
    ~Staged() {
        if (host_ != nullptr) cudaFreeHost(host_);
    }

    // Once the copy before is done.
    template <class T>
    void put(const std::vector<T> &values) {
        std::memcpy(stream_ == nullptr ? data_ : host_, values.data(), bytes_);
        copy(data_, host_, cudaMemcpyHostToDevice);
    }
    void fetch() { copy(host_, data_, cudaMemcpyDeviceToHost); }
    // What was fetched, once the stream has done it.
    std::vector<char> bytes() const {
        const auto *from = static_cast<const char *>(stream_ == nullptr ? data_ : host_);
        return {from, from + bytes_};
    }

  private:
    void copy(void *to, const void *from, cudaMemcpyKind kind) {
        if (stream_ != nullptr) must(cudaMemcpyAsync(to, from, bytes_, kind, stream_), "a copy");
    }
    void *data_, *host_ = nullptr;
    size_t bytes_;
    cudaStream_t stream_;  // none on the CPU, where there is nothing to copy
};

// A graph of what `launch` queues; without a stream it is called instead.
class Graph {
  public:
    Graph(cudaStream_t stream, std::function<bool()> launch)
        : stream_(stream), launch_(std::move(launch)) {
        if (stream_ == nullptr) return;
        cudaGraph_t graph = nullptr;
        must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "begin of capture");
        launched_ = launch_();
        must(cudaStreamEndCapture(stream_, &graph), "end of capture");
        must(cudaGraphInstantiateWithFlags(&graph_, graph, 0), "instantiation");
        must(cudaGraphUpload(graph_, stream_), "upload");  // or the first replay would do it
        must(cudaStreamSynchronize(stream_), "upload");
        cudaGraphDestroy(graph);
    }
    Graph(const Graph &) = delete;
    Graph &operator=(const Graph &) = delete;
    ~Graph() {
        if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    }

    bool launched() const { return launched_; }
    bool replay() {
        if (stream_ == nullptr) return launch_();
        must(cudaGraphLaunch(graph_, stream_), "launch of a graph");
        return true;
    }

  private:
    cudaStream_t stream_;
    std::function<bool()> launch_;
    cudaGraphExec_t graph_ = nullptr;
    bool launched_ = true;
};

// The arrays of one round, filled and fetched again and again.
class Layer {
  public:
    Layer(const Problem &p, const Seat &seat, const Objects &o)
        : round(p, seat, 0), seat_(seat), o_(o) {
        for (const Array *array : {&round.x, &round.idx, &round.weights, &round.y})
            inputs_.emplace_back(*array, o.stream);
        for (const auto &[name, array] : round.outputs())
            outputs_.emplace_back(name, Staged(*array, o.stream));
    }

    // Inputs of `number`, then `launch`, and all that it has written.
    bool run(int number, const std::function<bool()> &launch, Results *results,
             std::string *failure) {
        constexpr int kOfFullRounds = 3;  // Inputs::of() has all tokens for multiples of this
        const Inputs in = Inputs::of(round.p, seat_.rank, kOfFullRounds * number);
        inputs_[0].put(in.x);
        inputs_[1].put(in.idx);
        inputs_[2].put(in.weights);
        inputs_[3].put(
            Round::expert_outputs(round.p, uint32_t(number * round.p.ranks + seat_.rank)));
        if (!launch()) return false;
        for (auto &[name, output] : outputs_)
            output.fetch();
        if (!o_.await(failure)) return false;
        for (const auto &[name, output] : outputs_)
            results->emplace_back(Round::name_of(name, number), output.bytes());
        return true;
    }

    Round round;

  private:
    const Seat &seat_;
    const Objects &o_;
    std::vector<Staged> inputs_;
    std::vector<std::pair<const char *, Staged>> outputs_;
};

}  // namespace

Results run_replays(const Problem &p, const Seat &seat, std::string *failure) {
    constexpr int kReplays = 1000, kCallEvery = 50;
    Objects o;
    if (!o.create(p, seat, failure)) return {};
    Layer captured(p, seat, o), called(p, seat, o);
    Graph graph(o.stream, [&] { return captured.round.launch(o, 0, failure); });
    if (!graph.launched()) return {};
    if (seat.on_gpu()) cudaDeviceSynchronize();
    // Between these barriers nobody allocates, or copies on the default stream.
    if (!o.barrier(failure)) return {};
    Results results;
    for (int number = 0; number < kReplays; ++number) {
        if (!captured.run(number, [&] { return graph.replay(); }, &results, failure)) return {};
        if (number % kCallEvery != 0) continue;
        const auto call = [&] { return called.round.launch(o, 1, failure); };
        if (!called.run(kReplays + number, call, &results, failure)) return {};
    }
    if (!o.barrier(failure) || !o.count(&results, failure)) return {};
    return o.barrier(failure) ? std::move(results) : Results{};
}

// ---- Garbage ------------------------------------------------------------------------------------

namespace {

// This rank's window, and what spoils it: in the peers' names, but from here, where it is reached
// whatever the devices are. Nobody stores there meanwhile.
class Spoiler {
  public:
    Spoiler(const Objects &o, const Seat &seat, uint32_t seed)
        : Spoiler(o.buffer->buffer->round(nullptr, nullptr, 0), seat, seed) {}

    void spoil(uint64_t epoch) {
        constexpr int kStrokes = 6;
        copy(host_.data(), window_, cudaMemcpyDeviceToHost);
        pen_.pretend(epoch);
        for (int i = 0; i < kStrokes; ++i)
            pen_.scribble(epoch);
        copy(window_, host_.data(), cudaMemcpyHostToDevice);
    }

    // Some of the messages that have come from a rank in the first round.
    void lose_messages(const Problem &p, const Seat &seat, int from) {
        copy(host_.data(), window_, cudaMemcpyDeviceToHost);
        std::mt19937_64 random(p.seed * 31 + seat.rank);
        const int bits = p.quant != MEP_QUANT_NONE ? 8 : p.type_bits;
        for (int i = 0; i < p.tokens_max / 4; ++i)
            ep::test::lose_message(
                layout_, reinterpret_cast<char *>(host_.data()),
                {from, seat.rank, int(random() % p.tokens_max), 1, size_t(p.hidden) * bits / 8},
                random());
        copy(window_, host_.data(), cudaMemcpyHostToDevice);
    }

  private:
    Spoiler(const ep::Round &round, const Seat &seat, uint32_t seed)
        : on_gpu_(seat.on_gpu()),
          window_(address_of(round, seat)),
          layout_(round.layout),
          host_(round.layout.bytes / sizeof(uint64_t)),
          pen_(round.layout, reinterpret_cast<char *>(host_.data()),
               {seat.rank, (seat.rank + 1) % round.layout.shape.rank_count}, seed) {}

    // The table of windows is in device memory.
    static char *address_of(const ep::Round &round, const Seat &seat) {
        char *address = nullptr;
        char *const *at = round.windows + seat.rank;
        if (!seat.on_gpu()) return *at;
        must(cudaMemcpy(&address, at, sizeof address, cudaMemcpyDeviceToHost), "the window");
        return address;
    }

    void copy(void *to, const void *from, cudaMemcpyKind kind) const {
        const size_t bytes = host_.size() * sizeof(uint64_t);
        if (on_gpu_)
            must(cudaMemcpy(to, from, bytes, kind), "a copy of a window");
        else
            std::memcpy(to, from, bytes);
    }

    bool on_gpu_;
    char *window_;
    ep::Layout layout_;
    std::vector<uint64_t> host_;  // a copy of it
    ep::test::Pen pen_;
};

// Has a rank been masked since the last call because its rows did not come? Those that came are
// left out, but they were written.
bool has_lost_rows(const Objects &o, uint64_t *cursor) {
    constexpr int32_t kCapacity = 8;
    mep_event_t events[kCapacity];
    int32_t count = kCapacity;
    bool any = false;
    while (count == kCapacity) {
        count = 0;
        mep_buffer_read_events(o.buffer, cursor, events, kCapacity, &count);
        any = any || std::any_of(events, events + count, [](const mep_event_t &event) {
                  return event.phase == MEP_WAIT_ROWS;
              });
    }
    return any;
}

// What a dispatch has written but did not tell of; "" if there is nothing.
std::string untold(const Round &round, bool has_lost_rows) {
    const Problem &p = round.p;
    const std::vector<char> count_bytes = round.count.memory.get();
    for (int64_t e = 0; e < p.local(); ++e) {
        int32_t count;
        std::memcpy(&count, &count_bytes[e * sizeof count], sizeof count);
        const std::string expert = "local expert " + std::to_string(e) + ": ";
        if (count < 0 || count > p.rows()) return expert + std::to_string(count) + " rows";
        if (has_lost_rows) continue;
        for (const Array *array : {&round.out_x, &round.info, &round.scales}) {
            const std::vector<char> bytes = array->memory.get();
            const size_t row_bytes = bytes.size() / (p.local() * p.rows());
            const auto first = bytes.begin() + (e * p.rows() + count) * row_bytes;
            const auto end = bytes.begin() + (e + 1) * p.rows() * row_bytes;
            if (!std::all_of(first, end, [](char byte) { return byte == Array::kPoison; }))
                return expert + "something was written behind its rows";
        }
    }
    return "";
}

bool is_told(const Round &round, bool has_lost_rows, std::string *failure) {
    *failure = untold(round, has_lost_rows);
    for (const auto &[name, array] : round.outputs())
        if (!array->memory.guards_are_whole()) *failure = std::string("beside ") + name;
    return failure->empty();
}

// Of dispatch or of combine: sends, and receives what was spoiled, and is being spoiled.
bool halves_among_garbage(const Objects &o, Spoiler *spoiler, uint64_t epoch,
                          const std::function<bool(uint32_t)> &call, std::string *failure) {
    if (!call(MEP_PHASE_SEND) || !o.await(failure) || !o.barrier(failure)) return false;
    spoiler->spoil(epoch);
    if (!call(MEP_PHASE_RECEIVE)) return false;
    spoiler->spoil(epoch);
    return o.await(failure) && o.barrier(failure);
}

}  // namespace

Results run_among_garbage(const Problem &p, const Seat &seat, std::string *failure) {
    Seat guarded = seat;
    guarded.guard_bytes = 4096;
    Objects o;
    if (!o.create(p, seat, failure)) return {};
    o.waits_after_calls = false;  // its halves wait for nobody, so none is in the way of another
    Spoiler spoiler(o, seat, p.seed * 1009 + seat.rank);
    Array active(guarded, MEP_TYPE_INT, 32, {p.ranks});
    uint64_t cursor = 0;
    for (int number = 0; number < p.rounds; ++number) {
        Round round(p, guarded, number);
        round.active = &active;
        active.memory.put(std::vector<int32_t>(p.ranks, 1).data());
        const auto dispatch = [&](uint32_t phases) {
            return round.dispatch(o, 0, phases, failure);
        };
        const auto combine = [&](uint32_t phases) { return round.combine(o, 0, phases, failure); };
        if (!halves_among_garbage(o, &spoiler, number + 1, dispatch, failure)) return {};
        const bool lost = has_lost_rows(o, &cursor);
        if (!is_told(round, lost, failure)) return {};
        active.memory.put(std::vector<int32_t>(p.ranks, 1).data());
        if (!halves_among_garbage(o, &spoiler, number + 1, combine, failure)) return {};
        if (!is_told(round, lost, failure)) return {};
    }
    return {};
}

// ---- Lost rows ----------------------------------------------------------------------------------

namespace {

// Clears what is behind the rows that out_count tells of: of a rank that is lost some may have
// come.
void clear_untold(const Round &round, Results *results) {
    const Problem &p = round.p;
    const std::vector<char> counts = round.count.memory.get();
    for (auto &[name, bytes] : *results) {
        const std::string array = name.substr(0, name.find(' '));
        if (array != "out_x" && array != "out_scales" && array != "out_src_info") continue;
        const size_t row_bytes = bytes.size() / (p.local() * p.rows());
        for (int64_t e = 0; e < p.local(); ++e) {
            int32_t count;
            std::memcpy(&count, &counts[e * sizeof count], sizeof count);
            std::fill(bytes.begin() + (e * p.rows() + count) * row_bytes,
                      bytes.begin() + (e + 1) * p.rows() * row_bytes, char(0));
        }
    }
}

}  // namespace

Results run_losing_rows(const Problem &p, const Seat &seat, std::string *failure) {
    const bool dies = seat.rank == kDyingRank;
    Objects o;
    if (!o.create(p, seat, failure)) return {};
    Round round(p, seat, 0);
    Array active(seat, MEP_TYPE_INT, 32, {p.ranks});
    active.memory.put(std::vector<int32_t>(p.ranks, 1).data());
    round.active = &active;
    Spoiler spoiler(o, seat, p.seed);
    if (seat.on_gpu()) cudaDeviceSynchronize();
    if (!o.barrier(failure)) return {};
    if (dies && !(round.dispatch(o, 0, MEP_PHASE_SEND, failure) && o.await(failure))) return {};
    if (!o.barrier(failure)) return {};
    if (!dies) spoiler.lose_messages(p, seat, kDyingRank);
    if (!o.barrier(failure)) return {};
    if (!dies && !(round.launch(o, 0, failure) && o.await(failure))) return {};
    if (!o.barrier(failure)) return {};
    Results results;
    if (dies) return o.barrier(failure) ? std::move(results) : Results{};
    round.collect(0, &results);
    clear_untold(round, &results);
    results.emplace_back("active_ranks", active.memory.get());
    return o.barrier(failure) ? std::move(results) : Results{};
}

std::string difference(const Results &cpu, const Results &gpu) {
    if (cpu.size() != gpu.size()) return "the number of arrays";
    for (size_t i = 0; i < cpu.size(); ++i) {
        if (cpu[i].second == gpu[i].second) continue;
        size_t at = 0;
        while (at < cpu[i].second.size() && cpu[i].second[at] == gpu[i].second[at])
            ++at;
        return cpu[i].first + " at byte " + std::to_string(at) + " of " +
               std::to_string(cpu[i].second.size());
    }
    return "";
}

}  // namespace gpu
