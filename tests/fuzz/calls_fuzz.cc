// The C ABI with arguments of any kind: an error that says why, or a call that stays within the
// arrays that it was given.
#include "mooncake_ep.h"

#include <cstdlib>
#include <cstring>
#include <fuzzer/FuzzedDataProvider.h>
#include <list>
#include <vector>

namespace {

constexpr int kTokens = 4, kHidden = 128, kExperts = 4, kTopk = 3;
constexpr size_t kArrayBytes = size_t{1} << 16;

mep_status_t told(mep_status_t status) {
    if (status != MEP_OK && *mep_last_error() == '\0') std::abort();
    if (std::strcmp(mep_status_name(status), "MEP_UNKNOWN_STATUS") == 0) std::abort();
    return status;
}

void must(mep_status_t status) {
    if (status != MEP_OK) std::abort();
}

// Arrays whose descriptions are as they should be, or nearly.
class Arrays {
  public:
    explicit Arrays(FuzzedDataProvider *input) : input_(*input) {}

    const mep_tensor_t *any(uint8_t code, uint8_t bits, std::initializer_list<int64_t> shape) {
        if (rarely()) return nullptr;
        Kept &kept = kept_.emplace_back();
        kept.shape.assign(shape);
        for (int64_t &extent : kept.shape)
            if (rarely()) extent = number();
        kept.memory.resize(kArrayBytes / sizeof kept.memory[0]);
        const std::vector<uint8_t> bytes = input_.ConsumeBytes<uint8_t>(64);
        if (!bytes.empty()) std::memcpy(kept.memory.data(), bytes.data(), bytes.size());
        mep_tensor_t &tensor = kept.tensor;
        tensor.data = rarely() ? nullptr : kept.memory.data();
        tensor.device = {rarely() ? int32_t(number()) : MEP_DEVICE_CPU,
                         rarely() ? int32_t(number()) : 0};
        tensor.dtype = {rarely() ? uint8_t(number()) : code, rarely() ? uint8_t(number()) : bits,
                        uint16_t(rarely() ? number() : 1)};
        if (rarely()) kept.shape.resize(input_.ConsumeIntegralInRange(0, 4), number());
        tensor.ndim = rarely() ? int32_t(number()) : int32_t(kept.shape.size());
        if (tensor.ndim < 0 || tensor.ndim > int32_t(kept.shape.size()))
            tensor.ndim = input_.ConsumeBool() ? -1 : int32_t(kept.shape.size());
        tensor.shape = rarely() ? nullptr : kept.shape.data();
        if (rarely()) {
            for (size_t i = 0; i < kept.shape.size(); ++i)
                kept.strides.push_back(
                    input_.PickValueInArray<int64_t>({-1, 0, 1, 3, 4, 16, 128, 130}));
            tensor.strides = kept.strides.data();
        }
        tensor.byte_offset = rarely() ? input_.ConsumeIntegralInRange(0, 64) : 0;
        return &tensor;
    }
    // Of a struct: as it is, or of an older version of the header.
    uint32_t size(size_t bytes) {
        return static_cast<uint32_t>(rarely() ? input_.ConsumeIntegralInRange<size_t>(0, bytes)
                                              : bytes);
    }
    bool rarely() { return input_.ConsumeIntegralInRange(0, 15) == 1; }
    int64_t number() {
        return input_.ConsumeBool()
                   ? input_.PickValueInArray<int64_t>({-1, 0, 1, 2, 3, 4, 5, 8, 16, 32, 64, 128,
                                                       INT32_MAX, INT64_MAX, INT64_MIN})
                   : input_.ConsumeIntegral<int64_t>();
    }

  private:
    struct Kept {
        mep_tensor_t tensor{};
        std::vector<int64_t> shape, strides;
        std::vector<uint64_t> memory;
    };
    FuzzedDataProvider &input_;
    std::list<Kept> kept_;
};

mep_buffer_config_t config_of(Arrays *arrays) {
    mep_buffer_config_t config{};
    config.struct_size = arrays->size(sizeof config);
    config.token_count_max = arrays->rarely() ? int32_t(arrays->number()) : kTokens;
    config.hidden = arrays->rarely() ? int32_t(arrays->number()) : kHidden;
    config.expert_count = arrays->rarely() ? int32_t(arrays->number()) : kExperts;
    config.topk_max = arrays->rarely() ? int32_t(arrays->number()) : kTopk;
    config.payload_types = arrays->rarely() ? uint32_t(arrays->number()) : 0;
    config.rounds_in_flight_max = arrays->rarely() ? int32_t(arrays->number()) : 0;
    config.fp32_partials = arrays->rarely() ? int32_t(arrays->number()) : 0;
    config.cpu_thread_count = arrays->rarely() ? int32_t(arrays->number()) : 1;
    config.sm_count_max = arrays->rarely() ? int32_t(arrays->number()) : 0;
    return config;
}

// A group's, and who comes.
struct GroupConfig {
    mep_group_config_t config{};
    std::vector<int32_t> active;

    explicit GroupConfig(Arrays *arrays) {
        config.struct_size = arrays->size(sizeof config);
        config.rank = arrays->rarely() ? int32_t(arrays->number()) : 0;
        config.rank_count = arrays->rarely() ? int32_t(arrays->number()) : 1;
        config.backend = arrays->rarely() ? int32_t(arrays->number()) : 0;
        config.device_id = arrays->rarely() ? int32_t(arrays->number()) : 0;
        config.disable_p2p = arrays->rarely() ? int32_t(arrays->number()) : 0;
        config.timeout_us = arrays->rarely() ? arrays->number() : 0;
        if (!arrays->rarely()) return;
        active.assign(MEP_RANK_COUNT_MAX, 1);
        for (int rank = 0; rank < 4; ++rank)
            if (arrays->rarely()) active[rank] = int32_t(arrays->number());
        config.active_ranks = active.data();
    }
};

void configure(Arrays *arrays) {
    const mep_buffer_config_t config = config_of(arrays);
    mep_buffer_sizes_t sizes{};
    sizes.struct_size = arrays->size(sizeof sizes);
    told(mep_buffer_query_sizes(&config, arrays->rarely() ? int32_t(arrays->number()) : 1, &sizes));
    const GroupConfig given(arrays);
    mep_group_t *group = nullptr;
    if (told(mep_group_create(&given.config, &group)) == MEP_OK) mep_group_destroy(group);
}

// A group of one rank, and its buffer and handle, made anew when a call has left a round in flight.
struct Objects {
    mep_group_t *group = nullptr;
    mep_buffer_t *buffer = nullptr;
    mep_handle_t *handle = nullptr;

    void create() {
        mep_group_config_t group_config{};
        group_config.struct_size = sizeof group_config;
        group_config.rank_count = 1;
        must(mep_group_create(&group_config, &group));
        mep_buffer_config_t config{};
        config.struct_size = sizeof config;
        config.token_count_max = kTokens;
        config.hidden = kHidden;
        config.expert_count = kExperts;
        config.topk_max = kTopk;
        config.payload_types =
            MEP_PAYLOAD_BF16 | MEP_PAYLOAD_FP16 | MEP_PAYLOAD_FP32 | MEP_PAYLOAD_FP8;
        config.cpu_thread_count = 1;
        must(mep_buffer_create(group, &config, &buffer));
        must(mep_handle_create(buffer, &handle));
    }
    void destroy() {
        mep_handle_destroy(handle);
        mep_buffer_destroy(buffer);
        mep_group_destroy(group);
    }
};

Objects *the_objects() {
    static Objects *const objects = [] {
        auto *made = new Objects;
        made->create();
        return made;
    }();
    return objects;
}

// What is asked beside the rounds, and updates of the group.
void ask(FuzzedDataProvider *input, Arrays *arrays) {
    Objects *const objects = the_objects();
    const auto count = [&](int usual) {
        return arrays->rarely() ? int32_t(arrays->number()) : int32_t(usual);
    };
    std::vector<int32_t> mask(4, 1);
    if (arrays->rarely()) mask[0] = int32_t(arrays->number());
    if (input->ConsumeBool())
        told(mep_buffer_set_mask(objects->buffer, arrays->rarely() ? nullptr : mask.data(),
                                 count(1)));
    told(mep_buffer_query_mask(objects->buffer, mask.data(), count(1)));
    std::vector<uint64_t> rows(kExperts);
    told(mep_buffer_query_expert_rows(objects->buffer, rows.data(), count(kExperts)));
    mep_peer_counters_t peer{};
    peer.struct_size = arrays->size(sizeof peer);
    told(mep_buffer_query_peer(objects->buffer, count(0), &peer));
    uint64_t cursor = arrays->rarely() ? uint64_t(arrays->number()) : 0;
    std::vector<mep_event_t> events(64);
    int32_t event_count = 0;
    const int32_t capacity = input->ConsumeIntegralInRange(-1, 64);
    told(mep_buffer_read_events(objects->buffer, &cursor, events.data(), capacity, &event_count));
    told(mep_group_set_timeout(objects->group, arrays->number()));
    told(mep_group_set_timeout(objects->group, 0));
    if (!arrays->rarely()) return;
    const GroupConfig given(arrays);
    told(mep_group_update(objects->group, &given.config));
}

void call(FuzzedDataProvider *input, Arrays *arrays) {
    Objects *const objects = the_objects();
    const bool fp32 = input->ConsumeBool(), quant = input->ConsumeBool();
    const uint8_t code = fp32 ? MEP_TYPE_FLOAT : MEP_TYPE_BFLOAT, bits = fp32 ? 32 : 16;
    const int64_t tokens = input->ConsumeIntegralInRange(0, kTokens), rows = kTokens;
    mep_dispatch_args_t args{};
    args.struct_size = arrays->size(sizeof args);
    args.phases = arrays->rarely() ? uint32_t(arrays->number()) : 0;
    args.x = arrays->any(code, bits, {tokens, kHidden});
    args.topk_idx = arrays->any(MEP_TYPE_INT, input->ConsumeBool() ? 64 : 32, {tokens, kTopk});
    if (input->ConsumeBool()) args.topk_weights = arrays->any(MEP_TYPE_FLOAT, 32, {tokens, kTopk});
    if (arrays->rarely()) args.x_scales = arrays->any(MEP_TYPE_FLOAT, 32, {tokens, kHidden / 128});
    args.out_x = arrays->any(quant ? uint8_t(MEP_TYPE_FLOAT8_E4M3FN) : code,
                             quant ? uint8_t(8) : bits, {kExperts, rows, kHidden});
    if (quant || arrays->rarely())
        args.out_scales = arrays->any(MEP_TYPE_FLOAT, 32, {kExperts, rows, kHidden / 128});
    args.out_count = arrays->any(MEP_TYPE_INT, 32, {kExperts});
    if (input->ConsumeBool()) args.out_src_info = arrays->any(MEP_TYPE_INT, 32, {kExperts, rows});
    if (input->ConsumeBool()) args.out_layout_range = arrays->any(MEP_TYPE_INT, 64, {kExperts, 1});
    if (arrays->rarely()) args.active_ranks = arrays->any(MEP_TYPE_INT, 32, {1});
    args.quant = arrays->rarely() ? uint32_t(arrays->number()) : quant ? MEP_QUANT_FP8 : 0;
    args.timeout_us = arrays->rarely() ? arrays->number() : 0;
    const mep_status_t dispatched = told(mep_dispatch(objects->buffer, objects->handle, &args));
    mep_combine_args_t back{};
    back.struct_size = arrays->size(sizeof back);
    back.phases = arrays->rarely() ? uint32_t(arrays->number()) : 0;
    back.x = arrays->any(code, bits, {kExperts, rows, kHidden});
    if (input->ConsumeBool()) back.topk_weights = arrays->any(MEP_TYPE_FLOAT, 32, {tokens, kTopk});
    back.out = arrays->any(code, bits, {tokens, kHidden});
    const mep_status_t combined = told(mep_combine(objects->buffer, objects->handle, &back));
    const bool halves = (dispatched == MEP_OK && args.phases == MEP_PHASE_SEND) ||
                        (combined == MEP_OK && back.phases == MEP_PHASE_SEND);
    if (!halves) return;
    objects->destroy();
    objects->create();
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    mep_log_set_callback([](void *, int32_t, const char *) {}, nullptr, MEP_LOG_ERROR);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    FuzzedDataProvider input(data, size);
    Arrays arrays(&input);
    const int kind = input.ConsumeIntegralInRange(0, 7);
    if (kind == 0)
        configure(&arrays);
    else if (kind == 1)
        ask(&input, &arrays);
    else
        call(&input, &arrays);
    return 0;
}
