/* The public header, alone and first, as strict C99. */
#include "mooncake_ep.h"

#include "header_test.h"

#define SIZE(type) sizeof(type),
#define STRUCT_SIZE_IS_FIRST(type) \
    typedef char type##_starts_with_struct_size[offsetof(type, struct_size) == 0 ? 1 : -1];

MEP_STRUCTS(STRUCT_SIZE_IS_FIRST)

const size_t sizes_in_c[] = {MEP_STRUCTS(SIZE) MEP_PLAIN_STRUCTS(SIZE) 0};

int32_t version_in_c(void) {
    return MEP_VERSION_MAJOR * 10000 + MEP_VERSION_MINOR * 100 + MEP_VERSION_PATCH;
}
