// The exported functions: check the arguments, call the core. No logic here.
#include "mooncake_ep.h"

#include "base/env.h"
#include "base/log.h"
#include "base/status.h"
#include "core/machine.h"
#include "core/operations.h"
#include "core/tensor.h"

#include <new>

using ep::Argument;
using ep::Array;
using ep::Backend;
using ep::Buffer;
using ep::BufferShape;
using ep::Call;
using ep::CombineArgs;
using ep::Device;
using ep::DispatchArgs;
using ep::Element;
using ep::fail;
using ep::Group;
using ep::Handle;
using ep::Layout;
using ep::Quant;
using ep::read_struct;
using ep::Round;
using ep::Scales;
using ep::TransportChoice;
using ep::type_name;
using ep::write_struct;

namespace {

mep_status_t not_null(const void *pointer, const char *name) {
    return pointer != nullptr ? MEP_OK : fail(MEP_INVALID_ARGUMENT, "%s is NULL", name);
}

// Makes the C object around a C++ one.
template <class C, class Inner>
mep_status_t wrap(Inner inner, C **object) {
    auto *created = new (std::nothrow) C{std::move(inner)};
    if (created == nullptr) return fail(MEP_OUT_OF_MEMORY, "no memory for an object");
    *object = created;
    return MEP_OK;
}

mep_status_t check_timeout(int64_t timeout_us, const char *name) {
    if (timeout_us >= -1) return MEP_OK;
    return fail(MEP_INVALID_ARGUMENT, "%s is %lld; it must be -1 (never), 0 (default) or more",
                name, static_cast<long long>(timeout_us));
}

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

int32_t mep_version(void) {
    return 10000 * MEP_VERSION_MAJOR + 100 * MEP_VERSION_MINOR + MEP_VERSION_PATCH;
}

const char *mep_status_name(mep_status_t status) {
    switch (status) {
#define EP_NAME(name) \
    case name:        \
        return #name;
        EP_NAME(MEP_OK)
        EP_NAME(MEP_INVALID_ARGUMENT)
        EP_NAME(MEP_UNSUPPORTED)
        EP_NAME(MEP_INVALID_STATE)
        EP_NAME(MEP_OUT_OF_MEMORY)
        EP_NAME(MEP_DEVICE_ERROR)
        EP_NAME(MEP_SYSTEM_ERROR)
        EP_NAME(MEP_PEER_FAILED)
        EP_NAME(MEP_TIMEOUT)
        EP_NAME(MEP_MISMATCH)
        EP_NAME(MEP_BOOTSTRAP_FAILED)
#undef EP_NAME
        default:
            return "MEP_UNKNOWN_STATUS";
    }
}

const char *mep_last_error(void) {
    return ep::last_error();
}

mep_status_t mep_log_set_callback(mep_log_callback_t callback, void *context, int32_t level) {
    if (level < MEP_LOG_ERROR || level > MEP_LOG_DEBUG)
        return fail(MEP_INVALID_ARGUMENT, "level is %d; it must be one of MEP_LOG_*", level);
    ep::set_log_callback(callback, context, level);
    return MEP_OK;
}

mep_status_t mep_backend_query(int32_t backend, mep_backend_info_t *info) {
    const Backend *found = ep::find_backend(backend);
    if (found == nullptr)
        return fail(MEP_INVALID_ARGUMENT, "backend is %d; it must be one of MEP_BACKEND_*",
                    backend);
    const char *reason = found->unavailable_reason();
    const mep_backend_info_t answer{sizeof answer, *reason == '\0', found->device_count(), 0,
                                    found->name,   reason};
    return write_struct(info, answer, "info");
}

mep_status_t mep_rdma_query(mep_rdma_info_t *info) {
    const ep::RdmaProbe &probe = ep::Group::rdma();
    const mep_rdma_info_t answer{sizeof answer, 0, static_cast<int32_t>(probe.devices.size()), 0,
                                 probe.reason.c_str()};
    return write_struct(info, answer, "info");
}

mep_status_t mep_topology_read(const char *root, mep_topology_t **topology) {
    EP_TRY(not_null(topology, "topology"));
    ep::Machine machine;
    EP_TRY(machine.read(root == nullptr ? "/" : root));
    if (root == nullptr) machine.ask_drivers();
    return wrap(std::move(machine), topology);
}

mep_status_t mep_topology_load(const char *text, mep_topology_t **topology) {
    EP_TRY(not_null(text, "text"));
    EP_TRY(not_null(topology, "topology"));
    ep::Machine machine;
    EP_TRY(machine.load(text));
    return wrap(std::move(machine), topology);
}

mep_status_t mep_topology_apply_smi(mep_topology_t *topology, const char *tool, const char *text) {
    EP_TRY(not_null(topology, "topology"));
    EP_TRY(not_null(tool, "tool"));
    EP_TRY(not_null(text, "text"));
    return topology->machine.apply_smi(tool, text);
}

mep_status_t mep_topology_text(const mep_topology_t *topology, const char **text) {
    EP_TRY(not_null(topology, "topology"));
    EP_TRY(not_null(text, "text"));
    *text = topology->machine.text();
    return MEP_OK;
}

mep_status_t mep_topology_nic(mep_topology_t *topology, int32_t gpu, const char *filter,
                              const char **name) {
    EP_TRY(not_null(topology, "topology"));
    EP_TRY(not_null(name, "name"));
    if (gpu < 0 || gpu >= topology->machine.gpu_count())
        return fail(MEP_INVALID_ARGUMENT, "gpu is %d; it must be in [0, %d)", gpu,
                    topology->machine.gpu_count());
    const std::string set = ep::env_text("MOONCAKE_EP_DEVICE_FILTER");
    EP_TRY(topology->machine.select_nics(filter == nullptr ? set.c_str() : filter));
    *name = topology->machine.nic(gpu);
    return MEP_OK;
}

void mep_topology_destroy(mep_topology_t *topology) {
    delete topology;
}

mep_status_t mep_unique_id_create(const char *address, mep_unique_id_t *id) {
    EP_TRY(not_null(id, "id"));
    return ep::unique_id_create(address, id);
}

void mep_unique_id_destroy(const mep_unique_id_t *id) {
    if (id != nullptr) ep::unique_id_destroy(*id);
}

mep_status_t mep_world_create(int32_t rank_count, mep_world_t **world) {
    EP_TRY(not_null(world, "world"));
    if (rank_count < 1 || rank_count > MEP_RANK_COUNT_MAX)
        return fail(MEP_INVALID_ARGUMENT, "rank_count is %d; it must be in [1, %d]", rank_count,
                    MEP_RANK_COUNT_MAX);
    return ep::world_create(rank_count, world);
}

void mep_world_destroy(mep_world_t *world) {
    if (world != nullptr) ep::world_destroy(world);
}

mep_status_t mep_group_create(const mep_group_config_t *config, mep_group_t **group) {
    EP_TRY(not_null(group, "group"));
    mep_group_config_t c;
    EP_TRY(read_struct(&c, config, "config"));
    EP_TRY(check_timeout(c.timeout_us, "config.timeout_us"));
    std::shared_ptr<Group> created;
    EP_TRY(Group::create(c, &created));
    return wrap(std::move(created), group);
}

void mep_group_destroy(mep_group_t *group) {
    if (group != nullptr) group->group->leave();
    delete group;
}

mep_status_t mep_group_query(const mep_group_t *group, mep_group_info_t *info) {
    EP_TRY(not_null(group, "group"));
    const Group &g = *group->group;
    const mep_group_info_t answer{sizeof answer, g.rank(), g.rank_count(), g.backend().id,
                                  g.device_id(), 0,        g.timeout_us()};
    return write_struct(info, answer, "info");
}

mep_status_t mep_group_query_transport(const mep_group_t *group, int32_t peer,
                                       mep_transport_info_t *info) {
    EP_TRY(not_null(group, "group"));
    const Group &g = *group->group;
    if (peer < 0 || peer >= g.rank_count())
        return fail(MEP_INVALID_ARGUMENT, "peer is %d; it must be in [0, %d)", peer,
                    g.rank_count());
    const TransportChoice &choice = g.transport(peer);
    const mep_transport_info_t answer{sizeof answer, choice.kind, choice.name,
                                      choice.reason.c_str()};
    return write_struct(info, answer, "info");
}

mep_status_t mep_group_all_gather(mep_group_t *group, const void *send, void *receive,
                                  size_t bytes) {
    EP_TRY(not_null(group, "group"));
    EP_TRY(not_null(send, "send"));
    EP_TRY(not_null(receive, "receive"));
    if (bytes == 0 || bytes > MEP_ALL_GATHER_BYTES_MAX)
        return fail(MEP_INVALID_ARGUMENT, "bytes is %zu; it must be in [1, %d]", bytes,
                    MEP_ALL_GATHER_BYTES_MAX);
    return group->group->all_gather(send, receive, bytes);
}

mep_status_t mep_buffer_query_sizes(const mep_buffer_config_t *config, int32_t rank_count,
                                    mep_buffer_sizes_t *sizes) {
    mep_buffer_config_t c;
    EP_TRY(read_struct(&c, config, "config"));
    BufferShape shape;
    EP_TRY(BufferShape::of(c, rank_count, &shape));
    const mep_buffer_sizes_t answer{sizeof answer, 0, shape.layout.bytes, shape.handle_bytes()};
    return write_struct(sizes, answer, "sizes");
}

mep_status_t mep_buffer_create(mep_group_t *group, const mep_buffer_config_t *config,
                               mep_buffer_t **buffer) {
    EP_TRY(not_null(group, "group"));
    EP_TRY(not_null(buffer, "buffer"));
    mep_buffer_config_t c{};
    const mep_status_t status = read_struct(&c, config, "config");
    std::unique_ptr<Buffer> created;
    EP_TRY(Buffer::create(group->group, c, status, &created));
    return wrap(std::move(created), buffer);
}

void mep_buffer_destroy(mep_buffer_t *buffer) {
    delete buffer;
}

mep_status_t mep_buffer_query(const mep_buffer_t *buffer, mep_buffer_info_t *info) {
    EP_TRY(not_null(buffer, "buffer"));
    const Buffer &b = *buffer->buffer;
    const mep_buffer_config_t &c = b.shape().config;
    const Layout &layout = b.shape().layout;
    const mep_buffer_info_t answer{sizeof answer,
                                   b.group().rank(),
                                   b.group().rank_count(),
                                   c.token_count_max,
                                   c.hidden,
                                   c.expert_count,
                                   layout.local_expert_count,
                                   c.topk_max,
                                   c.payload_types,
                                   c.rounds_in_flight_max,
                                   c.fp32_partials,
                                   b.thread_count(),
                                   layout.bytes,
                                   b.shape().handle_bytes(),
                                   b.sm_count(),
                                   0};
    return write_struct(info, answer, "info");
}

mep_status_t mep_buffer_query_counters(const mep_buffer_t *buffer,
                                       mep_buffer_counters_t *counters) {
    EP_TRY(not_null(buffer, "buffer"));
    mep_buffer_counters_t answer;
    EP_TRY(buffer->buffer->counters(&answer));
    return write_struct(counters, answer, "counters");
}

mep_status_t mep_handle_create(mep_buffer_t *buffer, mep_handle_t **handle) {
    EP_TRY(not_null(buffer, "buffer"));
    EP_TRY(not_null(handle, "handle"));
    if (buffer->buffer->group().left())
        return fail(MEP_INVALID_STATE, "buffer: its group was destroyed");
    std::unique_ptr<Handle> created;
    EP_TRY(Handle::create(buffer->buffer.get(), &created));
    return wrap(std::move(created), handle);
}

void mep_handle_destroy(mep_handle_t *handle) {
    delete handle;
}

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
