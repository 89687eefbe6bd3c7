// The public header, alone and first, as strict C++11.
#include "mooncake_ep.h"

#include "header_test.h"

#define SIZE(type) sizeof(type),

extern "C" const size_t sizes_in_cpp[] = {MEP_STRUCTS(SIZE) MEP_PLAIN_STRUCTS(SIZE) 0};
