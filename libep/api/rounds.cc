// mep_dispatch and mep_combine: what of their arguments is checked, and the rounds they stand for.
#include "mooncake_ep.h"

#include "api/checks.h"
#include "base/status.h"
#include "core/operations.h"
#include "core/tensor.h"

using ep::Argument;
using ep::Array;
using ep::Buffer;
using ep::Call;
using ep::CombineArgs;
using ep::Device;
using ep::DispatchArgs;
using ep::Element;
using ep::fail;
using ep::Handle;
using ep::Layout;
using ep::Quant;
using ep::read_struct;
using ep::Round;
using ep::Scales;
using ep::type_name;
using ep::api::check_timeout;
using ep::api::not_null;

namespace {

// ---- What dispatch and combine have in common ---------------------------------------------------

struct Shapes {
    int64_t tokens_max, hidden, experts, ranks, topk_max;
    int64_t rows() const { return ranks * tokens_max; }

    static Shapes of(const Buffer &buffer) {
        const Layout &layout = buffer.shape().layout;
        return {layout.shape.token_count_max, buffer.shape().config.hidden,
                layout.local_expert_count, layout.shape.rank_count, layout.shape.topk_max};
    }
};

// An element type's name in DLPack and the payload bit that stands for it.
struct ElementType {
    Element element;
    int code, bits;
    uint32_t payload;
    const char *payload_name;
};
constexpr ElementType kElementTypes[] = {
    {Element::kBf16, MEP_TYPE_BFLOAT, 16, MEP_PAYLOAD_BF16, "MEP_PAYLOAD_BF16"},
    {Element::kFp16, MEP_TYPE_FLOAT, 16, MEP_PAYLOAD_FP16, "MEP_PAYLOAD_FP16"},
    {Element::kFp32, MEP_TYPE_FLOAT, 32, MEP_PAYLOAD_FP32, "MEP_PAYLOAD_FP32"},
    {Element::kFp8, MEP_TYPE_FLOAT8_E4M3FN, 8, MEP_PAYLOAD_FP8, "MEP_PAYLOAD_FP8"},
    {Element::kFp8, MEP_TYPE_UINT, 8, MEP_PAYLOAD_FP8, "MEP_PAYLOAD_FP8"},
};

mep_status_t element_of(const Argument &argument, const ElementType **type) {
    for (const ElementType &candidate : kElementTypes) {
        if (!ep::is_type(argument.array().dtype, candidate.code, candidate.bits)) continue;
        *type = &candidate;
        return MEP_OK;
    }
    return fail(MEP_INVALID_ARGUMENT,
                "%s is %s; it must be bfloat16, float16, float32 or float8_e4m3fn", argument.name(),
                type_name(argument.array().dtype).c_str());
}

mep_status_t check_payload(const Buffer &buffer, uint32_t payload, const char *what,
                           const char *payload_name) {
    if ((buffer.shape().config.payload_types & payload) != 0) return MEP_OK;
    return fail(MEP_INVALID_ARGUMENT, "%s needs %s, but config.payload_types of the buffer is 0x%x",
                what, payload_name, buffer.shape().config.payload_types);
}

// Objects, phases, mask and time-out of a call.
mep_status_t check_call(mep_buffer_t *buffer, mep_handle_t *handle, uint32_t phases,
                        int64_t timeout_us, const mep_tensor_t *active_ranks, Call *call) {
    constexpr uint32_t kBoth = MEP_PHASE_SEND | MEP_PHASE_RECEIVE;
    EP_TRY(not_null(buffer, "buffer"));
    EP_TRY(not_null(handle, "handle"));
    *call = {buffer->buffer.get(),
             handle->handle.get(),
             phases == 0 ? kBoth : phases,
             nullptr,
             timeout_us,
             nullptr};
    if (call->handle->buffer() != call->buffer)
        return fail(MEP_INVALID_ARGUMENT, "handle %p was made from another buffer",
                    static_cast<void *>(handle));
    if ((phases & ~kBoth) != 0)
        return fail(MEP_INVALID_ARGUMENT,
                    "args.phases is 0x%x; it must be made of MEP_PHASE_* bits", phases);
    EP_TRY(check_timeout(timeout_us, "args.timeout_us"));
    if (active_ranks == nullptr) return MEP_OK;
    Argument active("active_ranks", active_ranks);
    EP_TRY(active.read(*call->buffer->device(), 1));
    EP_TRY(active.has_type(MEP_TYPE_INT, 32));
    EP_TRY(active.is_compact());
    if (active.array().shape[0] < call->buffer->group().rank_count())
        return fail(MEP_INVALID_ARGUMENT, "active_ranks has %lld elements for %d ranks",
                    static_cast<long long>(active.array().shape[0]),
                    call->buffer->group().rank_count());
    call->active = reinterpret_cast<int32_t *>(active.array().data);
    return MEP_OK;
}

// Reads an array of this shape, row-major, of one type; NULL is allowed and gives nullptr.
template <class T>
mep_status_t read_optional(const Device &device, const char *name, const mep_tensor_t *tensor,
                           std::initializer_list<int64_t> shape, T **data) {
    *data = nullptr;
    if (tensor == nullptr) return MEP_OK;
    Argument argument(name, tensor);
    EP_TRY(argument.read(device, static_cast<int>(shape.size())));
    EP_TRY(argument.has_type(
        std::is_floating_point<std::remove_const_t<T>>::value ? MEP_TYPE_FLOAT : MEP_TYPE_INT,
        sizeof(T) * 8));
    EP_TRY(argument.has_shape(shape));
    EP_TRY(argument.is_compact());
    *data = reinterpret_cast<T *>(argument.array().data);
    return MEP_OK;
}

// ---- Arguments of dispatch ----------------------------------------------------------------------

mep_status_t check_tokens(const Buffer &buffer, const mep_dispatch_args_t &a, DispatchArgs *args) {
    const Shapes s = Shapes::of(buffer);
    Argument x("x", a.x);
    EP_TRY(x.read(*buffer.device(), 2));
    const ElementType *type = nullptr;
    EP_TRY(element_of(x, &type));
    EP_TRY(x.has_shape({x.array().shape[0], s.hidden}));
    if (x.array().shape[0] > s.tokens_max)
        return fail(MEP_INVALID_ARGUMENT, "x has %lld tokens; the buffer's token_count_max is %lld",
                    static_cast<long long>(x.array().shape[0]),
                    static_cast<long long>(s.tokens_max));
    EP_TRY(x.has_aligned_rows());
    args->x = x.array().data;
    args->x_stride = x.array().strides[0] * ep::element_bytes(type->element);
    args->x_type = type->element;
    args->round.token_count = static_cast<int>(x.array().shape[0]);
    if (a.quant > MEP_QUANT_FP8_POW2)
        return fail(MEP_INVALID_ARGUMENT, "args.quant is %u; it must be one of MEP_QUANT_*",
                    a.quant);
    args->quant = static_cast<Quant>(a.quant);
    if (args->quant == Quant::kNone)
        return check_payload(buffer, type->payload, "this type of x", type->payload_name);
    if (type->element == Element::kFp8)
        return fail(MEP_INVALID_ARGUMENT, "args.quant is %u, but x is float8_e4m3fn already",
                    a.quant);
    if (const char *reason = buffer.device()->no_quant_reason(); *reason != '\0')
        return fail(MEP_UNSUPPORTED, "args.quant is %u, but %s", a.quant, reason);
    return check_payload(buffer, MEP_PAYLOAD_FP8, "quant", "MEP_PAYLOAD_FP8");
}

mep_status_t check_choices(const Buffer &buffer, const mep_dispatch_args_t &a, DispatchArgs *args) {
    const Shapes s = Shapes::of(buffer);
    Argument idx("topk_idx", a.topk_idx);
    EP_TRY(idx.read(*buffer.device(), 2));
    const mep_dtype_t dtype = idx.array().dtype;
    if (!ep::is_type(dtype, MEP_TYPE_INT, 32) && !ep::is_type(dtype, MEP_TYPE_INT, 64))
        return fail(MEP_INVALID_ARGUMENT, "topk_idx is %s; it must be int32 or int64",
                    type_name(dtype).c_str());
    const int64_t topk = idx.array().shape[1];
    EP_TRY(idx.has_shape({args->round.token_count, topk}));
    if (topk < 1 || topk > s.topk_max)
        return fail(MEP_INVALID_ARGUMENT,
                    "topk_idx has %lld choices a token; the buffer's topk_max "
                    "allows [1, %lld]",
                    static_cast<long long>(topk), static_cast<long long>(s.topk_max));
    EP_TRY(idx.is_compact());
    args->topk_idx = idx.array().data;
    args->topk_idx_bytes = dtype.bits / 8;
    args->round.topk = static_cast<int>(topk);
    return read_optional(*buffer.device(), "topk_weights", a.topk_weights,
                         {args->round.token_count, topk}, &args->topk_weights);
}

// Scales are wanted exactly when their rows are FP8.
mep_status_t check_scales(const Device &device, Argument scales, bool given, bool wanted,
                          std::initializer_list<int64_t> shape, Scales *out) {
    *out = {};
    if (given != wanted)
        return fail(MEP_INVALID_ARGUMENT,
                    "%s is %s; it must be given exactly when the rows are "
                    "float8_e4m3fn",
                    scales.name(), given ? "given" : "NULL");
    if (!wanted) return MEP_OK;
    const int ndim = static_cast<int>(shape.size());
    EP_TRY(scales.read(device, ndim));
    EP_TRY(scales.has_type(MEP_TYPE_FLOAT, 32));
    EP_TRY(scales.has_shape(shape));
    const Array &array = scales.array();
    *out = {reinterpret_cast<float *>(array.data), ndim == 3 ? array.strides[0] : 0,
            array.strides[ndim - 2], array.strides[ndim - 1]};
    return MEP_OK;
}

// An output whose elements share memory would hold only one of them.
mep_status_t check_no_overlap(const mep_tensor_t *tensor, const char *name) {
    for (int i = 0; tensor != nullptr && tensor->strides != nullptr && i < tensor->ndim; ++i)
        if (tensor->strides[i] == 0 && tensor->shape[i] > 1)
            return fail(MEP_INVALID_ARGUMENT,
                        "%s has stride 0 in dimension %d; its elements must not overlap", name, i);
    return MEP_OK;
}

mep_status_t check_outputs(const Buffer &buffer, const mep_dispatch_args_t &a, DispatchArgs *args) {
    const Shapes s = Shapes::of(buffer);
    const Device &device = *buffer.device();
    Argument x("out_x", a.out_x);
    EP_TRY(x.read(device, 3));
    EP_TRY(x.has_shape({s.experts, s.rows(), s.hidden}));
    const ElementType *type = nullptr;
    EP_TRY(element_of(x, &type));
    if (type->element != args->out_type())
        return fail(MEP_INVALID_ARGUMENT,
                    "out_x is %s; it must have the type of x, or be "
                    "float8_e4m3fn with args.quant",
                    type_name(x.array().dtype).c_str());
    EP_TRY(x.is_compact());
    EP_TRY(x.has_aligned_rows());
    args->out_x = x.array().data;
    EP_TRY(check_scales(device, Argument("out_scales", a.out_scales), a.out_scales != nullptr,
                        args->out_type() == Element::kFp8,
                        {s.experts, s.rows(), s.hidden / MEP_SCALE_GROUP}, &args->out_scales));
    EP_TRY(check_no_overlap(a.out_scales, "out_scales"));
    EP_TRY(not_null(a.out_count, "out_count"));
    EP_TRY(read_optional(device, "out_count", a.out_count, {s.experts}, &args->out_count));
    EP_TRY(read_optional(device, "out_src_info", a.out_src_info, {s.experts, s.rows()},
                         &args->out_src_info));
    return read_optional(device, "out_layout_range", a.out_layout_range, {s.experts, s.ranks},
                         &args->out_layout_range);
}

mep_status_t check_dispatch(const Buffer &buffer, const mep_dispatch_args_t &a,
                            DispatchArgs *args) {
    EP_TRY(check_tokens(buffer, a, args));
    EP_TRY(check_scales(*buffer.device(), Argument("x_scales", a.x_scales), a.x_scales != nullptr,
                        args->x_type == Element::kFp8,
                        {args->round.token_count, Shapes::of(buffer).hidden / MEP_SCALE_GROUP},
                        &args->x_scales));
    EP_TRY(check_choices(buffer, a, args));
    return check_outputs(buffer, a, args);
}

// A RECEIVE must bring the arrays of its SEND.
mep_status_t check_same_round(const Call &call, const Round &round) {
    if (call.sends()) return MEP_OK;
    if (round.token_count == call.handle->token_count && round.topk == call.handle->topk)
        return MEP_OK;
    return fail(MEP_INVALID_ARGUMENT,
                "topk_idx is [%d, %d]; the dispatch that this call receives "
                "was sent with [%d, %d]",
                round.token_count, round.topk, call.handle->token_count, call.handle->topk);
}

// ---- Arguments of combine -----------------------------------------------------------------------

mep_status_t check_expert_rows(const Buffer &buffer, const mep_combine_args_t &a,
                               CombineArgs *args) {
    const Shapes s = Shapes::of(buffer);
    Argument x("x", a.x);
    EP_TRY(x.read(*buffer.device(), 3));
    EP_TRY(x.has_shape({s.experts, s.rows(), s.hidden}));
    const ElementType *type = nullptr;
    EP_TRY(element_of(x, &type));
    if (type->element == Element::kFp8)
        return fail(MEP_INVALID_ARGUMENT, "x is %s; combine takes bfloat16, float16 or float32",
                    type_name(x.array().dtype).c_str());
    if (type->element == Element::kFp32 && buffer.shape().config.fp32_partials == 0)
        return fail(MEP_INVALID_ARGUMENT,
                    "x is float32, but the buffer was made with neither "
                    "MEP_PAYLOAD_FP32 nor fp32_partials");
    EP_TRY(x.is_compact());
    EP_TRY(x.has_aligned_rows());
    args->x = x.array().data;
    args->x_type = type->element;
    return MEP_OK;
}

mep_status_t check_combine(const Call &call, const mep_combine_args_t &a, CombineArgs *args) {
    const Buffer &buffer = *call.buffer;
    const int64_t tokens = call.handle->token_count;
    EP_TRY(check_expert_rows(buffer, a, args));
    EP_TRY(read_optional(*buffer.device(), "topk_weights", a.topk_weights,
                         {tokens, call.handle->topk}, &args->topk_weights));
    // An empty tensor may have no data, but its presence says how all ranks proceed.
    if (a.topk_weights != nullptr && args->topk_weights == nullptr) {
        static const float none = 0;
        args->topk_weights = &none;
    }
    Argument out("out", a.out);
    EP_TRY(out.read(*buffer.device(), 2));
    EP_TRY(out.has_shape({tokens, Shapes::of(buffer).hidden}));
    const ElementType *type = nullptr;
    EP_TRY(element_of(out, &type));
    if (type->element != args->x_type)
        return fail(MEP_INVALID_ARGUMENT, "out is %s; it must have the type of x",
                    type_name(out.array().dtype).c_str());
    EP_TRY(out.has_aligned_rows());
    args->out = out.array().data;
    args->out_stride = out.array().strides[0] * ep::element_bytes(type->element);
    return MEP_OK;
}

}  // namespace

mep_status_t mep_dispatch(mep_buffer_t *buffer, mep_handle_t *handle,
                          const mep_dispatch_args_t *args) {
    mep_dispatch_args_t a;
    EP_TRY(read_struct(&a, args, "args"));
    Call call;
    EP_TRY(check_call(buffer, handle, a.phases, a.timeout_us, a.active_ranks, &call));
    call.stream = a.stream;
    EP_TRY(ep::may_dispatch(call));
    DispatchArgs checked{};
    EP_TRY(check_dispatch(*call.buffer, a, &checked));
    EP_TRY(check_same_round(call, checked.round));
    return ep::dispatch(call, checked);
}

mep_status_t mep_combine(mep_buffer_t *buffer, mep_handle_t *handle,
                         const mep_combine_args_t *args) {
    mep_combine_args_t a;
    EP_TRY(read_struct(&a, args, "args"));
    Call call;
    EP_TRY(check_call(buffer, handle, a.phases, a.timeout_us, a.active_ranks, &call));
    call.stream = a.stream;
    EP_TRY(ep::may_combine(call));
    CombineArgs checked{};
    EP_TRY(check_combine(call, a, &checked));
    return ep::combine(call, checked);
}
