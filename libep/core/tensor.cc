#include "core/tensor.h"

#include "base/status.h"

namespace ep {
namespace {

std::string shape_text(const int64_t *shape, size_t ndim) {
    std::string text = "[";
    for (size_t i = 0; i < ndim; ++i)
        text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

}  // namespace

bool is_type(mep_dtype_t dtype, int code, int bits) {
    return dtype.code == code && dtype.bits == bits && dtype.lanes == 1;
}

std::string type_name(mep_dtype_t dtype) {
    const std::string lanes = dtype.lanes == 1 ? "" : " x " + std::to_string(dtype.lanes);
    switch (dtype.code) {
        case MEP_TYPE_INT:
            return "int" + std::to_string(dtype.bits) + lanes;
        case MEP_TYPE_UINT:
            return "uint" + std::to_string(dtype.bits) + lanes;
        case MEP_TYPE_FLOAT:
            return "float" + std::to_string(dtype.bits) + lanes;
        case MEP_TYPE_BFLOAT:
            return "bfloat" + std::to_string(dtype.bits) + lanes;
        case MEP_TYPE_FLOAT8_E4M3FN:
            return "float8_e4m3fn" + lanes;
        default:
            return "DLPack type " + std::to_string(dtype.code) + " of " +
                   std::to_string(dtype.bits) + " bits" + lanes;
    }
}

mep_status_t Argument::read(const Device &device, int ndim) {
    if (tensor_ == nullptr) return fail(MEP_INVALID_ARGUMENT, "%s is NULL", name_);
    if (tensor_->ndim != ndim)
        return fail(MEP_INVALID_ARGUMENT, "%s has %d dimensions; it must have %d", name_,
                    tensor_->ndim, ndim);
    if (tensor_->shape == nullptr) return fail(MEP_INVALID_ARGUMENT, "%s.shape is NULL", name_);
    if (!device.reaches(tensor_->device))
        return fail(MEP_INVALID_ARGUMENT,
                    "%s is on device %d:%d (DLPack codes), which the group's backend cannot read",
                    name_, tensor_->device.device_type, tensor_->device.device_id);
    int64_t compact = 1;  // stride of a dimension if there are no gaps; capped
    array_.ndim = ndim;
    array_.dtype = tensor_->dtype;
    for (int i = ndim - 1; i >= 0; --i) {
        array_.shape[i] = tensor_->shape[i];
        array_.strides[i] = tensor_->strides == nullptr ? compact : tensor_->strides[i];
        if (array_.shape[i] < 0)
            return fail(MEP_INVALID_ARGUMENT, "%s has shape %s; no dimension may be negative",
                        name_, shape_text(tensor_->shape, ndim).c_str());
        if (array_.strides[i] < 0)
            return fail(MEP_INVALID_ARGUMENT,
                        "%s has stride %lld in dimension %d; it must not be "
                        "negative",
                        name_, static_cast<long long>(array_.strides[i]), i);
        if (__builtin_mul_overflow(compact, array_.shape[i], &compact)) compact = INT64_MAX;
    }
    if (tensor_->data == nullptr && compact > 0)
        return fail(MEP_INVALID_ARGUMENT, "%s.data is NULL, but its shape is %s", name_,
                    shape_text(tensor_->shape, ndim).c_str());
    // No arithmetic on NULL, which an empty array may have.
    array_.data = tensor_->data == nullptr
                      ? nullptr
                      : static_cast<char *>(tensor_->data) + tensor_->byte_offset;
    const uintptr_t element = tensor_->dtype.bits / 8;
    if (element > 1 && reinterpret_cast<uintptr_t>(array_.data) % element != 0)
        return fail(MEP_INVALID_ARGUMENT, "%s.data is at %p; it must be a multiple of %zu bytes",
                    name_, static_cast<void *>(array_.data), static_cast<size_t>(element));
    return MEP_OK;
}

mep_status_t Argument::has_type(int code, int bits) const {
    if (is_type(array_.dtype, code, bits)) return MEP_OK;
    return fail(MEP_INVALID_ARGUMENT, "%s is %s; it must be %s", name_,
                type_name(array_.dtype).c_str(),
                type_name({static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1}).c_str());
}

mep_status_t Argument::has_shape(std::initializer_list<int64_t> shape) const {
    for (size_t i = 0; i < shape.size(); ++i)
        if (array_.shape[i] != shape.begin()[i])
            return fail(MEP_INVALID_ARGUMENT, "%s has shape %s; it must be %s", name_,
                        shape_text(array_.shape, array_.ndim).c_str(),
                        shape_text(shape.begin(), shape.size()).c_str());
    return MEP_OK;
}

mep_status_t Argument::is_compact() const {
    for (int i = 0; i < array_.ndim; ++i)
        if (array_.shape[i] == 0) return MEP_OK;  // nothing is anywhere; NumPy's strides are then 0
    int64_t expected = 1;
    for (int i = array_.ndim - 1; i >= 0; --i) {
        if (array_.shape[i] > 1 && array_.strides[i] != expected)
            return fail(MEP_INVALID_ARGUMENT,
                        "%s has strides %s; it must be row-major without gaps", name_,
                        shape_text(array_.strides, array_.ndim).c_str());
        if (__builtin_mul_overflow(expected, array_.shape[i], &expected)) expected = INT64_MAX;
    }
    return MEP_OK;
}

mep_status_t Argument::has_aligned_rows() const {
    const int last = array_.ndim - 1;
    const int64_t element = array_.dtype.bits / 8;
    if (array_.shape[0] == 0) return MEP_OK;
    if (array_.shape[last] > 1 && array_.strides[last] != 1)
        return fail(MEP_INVALID_ARGUMENT, "%s has strides %s; its last must be 1", name_,
                    shape_text(array_.strides, array_.ndim).c_str());
    const auto address = reinterpret_cast<uintptr_t>(array_.data);
    if (address % MEP_ALIGNMENT != 0)
        return fail(MEP_INVALID_ARGUMENT, "%s.data is at %p; it must be a multiple of %d bytes",
                    name_, static_cast<void *>(array_.data), MEP_ALIGNMENT);
    if (last == 1 && array_.shape[0] > 1) {
        if (array_.strides[0] < array_.shape[1])
            return fail(MEP_INVALID_ARGUMENT,
                        "%s has rows %lld elements apart; they must not overlap (%lld)", name_,
                        static_cast<long long>(array_.strides[0]),
                        static_cast<long long>(array_.shape[1]));
        if (array_.strides[0] * element % MEP_ALIGNMENT != 0)
            return fail(MEP_INVALID_ARGUMENT,
                        "%s has rows %lld bytes apart; it must be a multiple of %d", name_,
                        static_cast<long long>(array_.strides[0] * element), MEP_ALIGNMENT);
    }
    return MEP_OK;
}

}  // namespace ep
