// A caller's array, checked. Each check names the argument, its value and the rule it broke.
#pragma once

#include "mooncake_ep.h"

#include "backend/backend.h"

#include <initializer_list>
#include <string>

namespace ep {

// What the rest of the library needs of an array of at most three dimensions.
struct Array {
    char *data;  // of the first element
    mep_dtype_t dtype;
    int ndim;
    int64_t shape[3];
    int64_t strides[3];  // in elements
};

bool is_type(mep_dtype_t dtype, int code, int bits);

// "int32", "bfloat16", ... for messages.
std::string type_name(mep_dtype_t dtype);

// An argument under check. Every function returns MEP_OK or the worded failure.
class Argument {
  public:
    Argument(const char *name, const mep_tensor_t *tensor) : name_(name), tensor_(tensor) {}

    // Not NULL, reachable by the device, `ndim` dimensions, none negative, data not NULL; fills in
    // the rest of the object.
    mep_status_t read(const Device &device, int ndim);

    mep_status_t has_type(int code, int bits) const;
    mep_status_t has_shape(std::initializer_list<int64_t> shape) const;

    // Row-major without gaps.
    mep_status_t is_compact() const;

    // The last dimension without gaps, every row at a multiple of MEP_ALIGNMENT.
    mep_status_t has_aligned_rows() const;

    const Array &array() const { return array_; }
    const char *name() const { return name_; }

  private:
    const char *name_;
    const mep_tensor_t *tensor_;
    Array array_{};
};

}  // namespace ep
