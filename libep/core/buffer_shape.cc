#include "core/buffer_shape.h"

#include "base/status.h"
#include "kernels/kernels.h"

#include <algorithm>

namespace ep {
namespace {

constexpr int kRoundsInFlightDefault = 2;
constexpr uint32_t kPayloadsAll =
    MEP_PAYLOAD_BF16 | MEP_PAYLOAD_FP16 | MEP_PAYLOAD_FP32 | MEP_PAYLOAD_FP8;

mep_status_t check_range(const char *name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return MEP_OK;
    return fail(MEP_INVALID_ARGUMENT, "config.%s is %lld; it must be in [%lld, %lld]", name,
                static_cast<long long>(value), static_cast<long long>(low),
                static_cast<long long>(high));
}

mep_status_t check_config(const mep_buffer_config_t &c, int rank_count) {
    EP_TRY(check_range("token_count_max", c.token_count_max, 1, MEP_TOKEN_COUNT_MAX));
    EP_TRY(check_range("hidden", c.hidden, MEP_HIDDEN_MULTIPLE, MEP_HIDDEN_MAX));
    EP_TRY(check_range("expert_count", c.expert_count, 1, MEP_EXPERT_COUNT_MAX));
    EP_TRY(check_range("topk_max", c.topk_max, 1, MEP_TOPK_MAX));
    EP_TRY(
        check_range("rounds_in_flight_max", c.rounds_in_flight_max, 0, MEP_ROUNDS_IN_FLIGHT_MAX));
    EP_TRY(check_range("fp32_partials", c.fp32_partials, 0, 1));
    EP_TRY(check_range("cpu_thread_count", c.cpu_thread_count, 0, MEP_CPU_THREAD_COUNT_MAX));
    if (c.sm_count_max != 0)
        EP_TRY(check_range("sm_count_max", c.sm_count_max, MEP_SM_COUNT_MIN, INT32_MAX));
    if (c.hidden % MEP_HIDDEN_MULTIPLE != 0)
        return fail(MEP_INVALID_ARGUMENT, "config.hidden is %d; it must be a multiple of %d",
                    c.hidden, MEP_HIDDEN_MULTIPLE);
    if (c.expert_count % rank_count != 0)
        return fail(MEP_INVALID_ARGUMENT,
                    "config.expert_count is %d; it must be a multiple of the %d ranks",
                    c.expert_count, rank_count);
    if (int64_t{c.expert_count} * c.token_count_max > INT32_MAX)
        return fail(MEP_INVALID_ARGUMENT,
                    "config.expert_count %d times config.token_count_max %d must be below 2^31",
                    c.expert_count, c.token_count_max);
    // Where a source's rows begin is told in a Signal.
    constexpr int64_t kRowsEnd = int64_t{1} << Signal::kValueBits;
    if (int64_t{rank_count} * c.token_count_max >= kRowsEnd)
        return fail(MEP_INVALID_ARGUMENT,
                    "config.token_count_max is %d; times the %d ranks it must be below 2^%d",
                    c.token_count_max, rank_count, Signal::kValueBits);
    if ((c.payload_types & ~kPayloadsAll) != 0)
        return fail(MEP_INVALID_ARGUMENT,
                    "config.payload_types is 0x%x; it must be made of MEP_PAYLOAD_* bits (0x%x)",
                    c.payload_types, kPayloadsAll);
    if ((c.payload_types & MEP_PAYLOAD_FP8) != 0 && c.hidden % MEP_SCALE_GROUP != 0)
        return fail(MEP_INVALID_ARGUMENT,
                    "config.hidden is %d; with MEP_PAYLOAD_FP8 it must be a multiple of %d",
                    c.hidden, MEP_SCALE_GROUP);
    return MEP_OK;
}

size_t row_bytes_max(const mep_buffer_config_t &c) {
    const size_t hidden = c.hidden;
    size_t bytes = 0;
    if ((c.payload_types & MEP_PAYLOAD_FP8) != 0)
        bytes = hidden + hidden / kScaleGroup * sizeof(float);
    if ((c.payload_types & (MEP_PAYLOAD_BF16 | MEP_PAYLOAD_FP16)) != 0)
        bytes = std::max(bytes, hidden * 2);
    if ((c.payload_types & MEP_PAYLOAD_FP32) != 0) bytes = hidden * 4;
    return bytes;
}

}  // namespace

HandleLayout HandleLayout::of(const Shape &s) {
    HandleLayout l{};
    const auto carve = [&l](size_t count, size_t element) {
        const size_t offset = l.bytes;
        l.bytes += Layout::lines(count * element);
        return offset;
    };
    const size_t own = size_t(s.token_count_max) * s.topk_max, ranks = s.rank_count;
    const size_t slots = ranks * s.token_count_max;
    l.state = carve(1, sizeof(HandleState));
    l.choices = carve(own, sizeof(int32_t));
    l.positions = carve(own, sizeof(int32_t));
    l.token_counts = carve(ranks, sizeof(uint64_t));
    l.begins = carve(s.expert_count / ranks * (ranks + 1), sizeof(uint64_t));
    l.row_counts = carve(slots, sizeof(int32_t));
    l.rows = carve(slots * s.topk_max, sizeof(int32_t));
    l.weights = carve(slots * s.topk_max, sizeof(float));
    l.lost = carve(ranks, sizeof(uint64_t));
    return l;
}

void BufferShape::go_by_line() {
    Shape shape = layout.shape;
    shape.carriage = Carriage::kLine;
    layout = Layout::of(shape);
}

mep_status_t BufferShape::of(const mep_buffer_config_t &config, int rank_count,
                             BufferShape *shape) {
    EP_TRY(check_range("rank_count", rank_count, 1, MEP_RANK_COUNT_MAX));
    EP_TRY(check_config(config, rank_count));
    mep_buffer_config_t c = config;
    c.struct_size = sizeof c;
    if (c.payload_types == 0)
        c.payload_types =
            c.hidden % MEP_SCALE_GROUP == 0 ? MEP_PAYLOAD_BF16 | MEP_PAYLOAD_FP8 : MEP_PAYLOAD_BF16;
    if (c.rounds_in_flight_max == 0) c.rounds_in_flight_max = kRoundsInFlightDefault;
    if ((c.payload_types & MEP_PAYLOAD_FP32) != 0) c.fp32_partials = 1;
    const size_t partial_bytes = size_t(c.hidden) * (c.fp32_partials != 0 ? 4 : 2);
    shape->config = c;
    shape->layout = Layout::of({rank_count, c.expert_count, c.token_count_max, c.topk_max,
                                2 * c.rounds_in_flight_max, row_bytes_max(c), partial_bytes});
    return MEP_OK;
}

size_t BufferShape::handle_bytes() const {
    return HandleLayout::of(layout.shape).bytes;
}

}  // namespace ep
