// Ranks on the CPU, which are threads; all of support/abi.h that depends on the place but the
// memory of arrays. Defined here: for one file of a program.
#pragma once

#include "support/abi.h"

namespace ep::test {

bool on_cpu() {
    return true;
}

void be_rank(int) {}

mep_device_t tensor_device() {
    return {MEP_DEVICE_CPU, 0};
}

void choose_device(mep_group_config_t *) {}

void *stream() {
    return nullptr;
}

void finish() {}

std::function<void()> captured(const std::function<void()> &body) {
    return body;
}

void run_groups(int rank_count, const std::function<void(int, const Group &)> &body) {
    const World world = make_world(rank_count);
    run_ranks(rank_count, [&](int rank) {
        body(rank, make_group(group_config(rank, rank_count, world.get())));
    });
}

}  // namespace ep::test
