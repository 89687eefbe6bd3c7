/* Stands for libibverbs: a machine with the devices of FAKE_DEVICES, a list of strings. */
#include <stddef.h>

static const char *const names[] = {FAKE_DEVICES NULL};
static const char **list[sizeof names / sizeof *names];

const char ***ibv_get_device_list(int *count);
void ibv_free_device_list(const char ***devices);
const char *ibv_get_device_name(const char **device);

static int lists_in_use = 0;

const char ***ibv_get_device_list(int *count) {
    *count = (int)(sizeof names / sizeof *names) - 1;
    for (int i = 0; i < *count; ++i)
        list[i] = (const char **)&names[i];
    ++lists_in_use;
    return *count < 0 ? NULL : list;
}

void ibv_free_device_list(const char ***devices) {
    if (devices == list) --lists_in_use;
}

const char *ibv_get_device_name(const char **device) {
    return lists_in_use == 1 ? *device : "a list that was given back";
}
