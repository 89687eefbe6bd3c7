/* The smallest program that uses the installed library, in what C99 and C++11 share: one rank sends
 * its tokens to experts that return them unchanged, so combine gives them back. */
#include <mooncake_ep.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 3, HIDDEN = 16, EXPERTS = 4, TOPK = 2, ROWS = TOKENS };

static void check(mep_status_t status, const char *call) {
    if (status == MEP_OK) return;
    fprintf(stderr, "%s: %s: %s\n", call, mep_status_name(status), mep_last_error());
    exit(1);
}

#define CHECK(call) check((call), #call)

static mep_tensor_t tensor(void *data, mep_dtype_t dtype, int32_t ndim, int64_t *shape) {
    mep_tensor_t made;
    memset(&made, 0, sizeof made);
    made.data = data;
    made.device.device_type = MEP_DEVICE_CPU;
    made.ndim = ndim;
    made.dtype = dtype;
    made.shape = shape;
    return made;
}

static mep_group_t *create_group(void) {
    mep_group_t *group = NULL;
    mep_group_config_t config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.rank_count = 1;
    CHECK(mep_group_create(&config, &group));
    return group;
}

static mep_buffer_t *create_buffer(mep_group_t *group) {
    mep_buffer_t *buffer = NULL;
    mep_buffer_config_t config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.token_count_max = TOKENS;
    config.hidden = HIDDEN;
    config.expert_count = EXPERTS;
    config.topk_max = TOPK;
    config.payload_types = MEP_PAYLOAD_FP32;
    CHECK(mep_buffer_create(group, &config, &buffer));
    return buffer;
}

/* Dispatches x, lets every expert return its rows, and combines into out. */
static void run_layer(mep_buffer_t *buffer, mep_handle_t *handle, float *x, float *out) {
    const mep_dtype_t fp32 = {MEP_TYPE_FLOAT, 32, 1}, int32 = {MEP_TYPE_INT, 32, 1};
    int64_t token_shape[] = {TOKENS, HIDDEN}, choice_shape[] = {TOKENS, TOPK};
    int64_t expert_shape[] = {EXPERTS, ROWS, HIDDEN}, count_shape[] = {EXPERTS};
    int32_t topk_idx[TOKENS][TOPK] = {{0, 3}, {3, 1}, {2, -1}};
    float topk_weights[TOKENS][TOPK] = {{0.25F, 0.75F}, {0.5F, 0.5F}, {1.0F, 0.0F}};
    int32_t counts[EXPERTS] = {0};
    float *rows = (float *)calloc((size_t)EXPERTS * ROWS * HIDDEN, sizeof *rows);
    if (rows == NULL) exit(1);

    const mep_tensor_t x_tensor = tensor(x, fp32, 2, token_shape);
    const mep_tensor_t idx_tensor = tensor(topk_idx, int32, 2, choice_shape);
    const mep_tensor_t weights_tensor = tensor(topk_weights, fp32, 2, choice_shape);
    const mep_tensor_t rows_tensor = tensor(rows, fp32, 3, expert_shape);
    const mep_tensor_t counts_tensor = tensor(counts, int32, 1, count_shape);
    const mep_tensor_t out_tensor = tensor(out, fp32, 2, token_shape);

    mep_dispatch_args_t dispatch;
    memset(&dispatch, 0, sizeof dispatch);
    dispatch.struct_size = sizeof dispatch;
    dispatch.x = &x_tensor;
    dispatch.topk_idx = &idx_tensor;
    dispatch.topk_weights = &weights_tensor;
    dispatch.out_x = &rows_tensor;
    dispatch.out_count = &counts_tensor;
    CHECK(mep_dispatch(buffer, handle, &dispatch));
    if (counts[0] != 1 || counts[1] != 1 || counts[2] != 1 || counts[3] != 2) {
        fprintf(stderr, "experts got %d %d %d %d rows\n", counts[0], counts[1], counts[2],
                counts[3]);
        exit(1);
    }

    mep_combine_args_t combine;
    memset(&combine, 0, sizeof combine);
    combine.struct_size = sizeof combine;
    combine.x = &rows_tensor;
    combine.out = &out_tensor;
    CHECK(mep_combine(buffer, handle, &combine));
    free(rows);
}

int main(void) {
    const size_t element_count = (size_t)TOKENS * HIDDEN;
    float *x = (float *)malloc(element_count * sizeof *x);
    float *out = (float *)malloc(element_count * sizeof *out);
    if (x == NULL || out == NULL) return 1;
    for (size_t i = 0; i < element_count; ++i)
        x[i] = (float)(i + 1);

    mep_group_t *group = create_group();
    mep_buffer_t *buffer = create_buffer(group);
    mep_handle_t *handle = NULL;
    CHECK(mep_handle_create(buffer, &handle));
    run_layer(buffer, handle, x, out);
    mep_handle_destroy(handle);
    mep_buffer_destroy(buffer);
    mep_group_destroy(group);

    for (size_t i = 0; i < element_count; ++i) {
        if (out[i] == x[i]) continue;
        fprintf(stderr, "out[%lu] is %g, not %g\n", (unsigned long)i, (double)out[i], (double)x[i]);
        return 1;
    }
    free(x);
    free(out);
    puts("consumer ok");
    return 0;
}
