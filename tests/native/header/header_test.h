/* What header_c99.c and header_cpp11.cc see, for header_test.cc to compare. */
#ifndef MOONCAKE_EP_TESTS_HEADER_TEST_H_
#define MOONCAKE_EP_TESTS_HEADER_TEST_H_

#include "mooncake_ep.h"

/* The structs that grow: they start with struct_size. */
#define MEP_STRUCTS(X)       \
    X(mep_backend_info_t)    \
    X(mep_rdma_info_t)       \
    X(mep_group_config_t)    \
    X(mep_group_info_t)      \
    X(mep_transport_info_t)  \
    X(mep_buffer_config_t)   \
    X(mep_buffer_sizes_t)    \
    X(mep_buffer_info_t)     \
    X(mep_buffer_counters_t) \
    X(mep_dispatch_args_t)   \
    X(mep_combine_args_t)

/* The structs that never change. */
#define MEP_PLAIN_STRUCTS(X) X(mep_device_t) X(mep_dtype_t) X(mep_tensor_t) X(mep_unique_id_t)

#ifdef __cplusplus
extern "C" {
#endif

extern const size_t sizes_in_c[];   /* ends with 0 */
extern const size_t sizes_in_cpp[]; /* ends with 0 */
int32_t version_in_c(void);

#ifdef __cplusplus
}
#endif

#endif /* MOONCAKE_EP_TESTS_HEADER_TEST_H_ */
