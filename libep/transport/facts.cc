#include "transport/facts.h"

#include "backend/backend.h"
#include "base/status.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace ep {

mep_status_t local_facts(const Device &device, int32_t backend, RankFacts *facts) {
    *facts = {};
    facts->backend = backend;
    std::memcpy(facts->device, device.uuid().bytes, sizeof facts->device);
    // Differs between hosts and between two boots of one; the same in all containers of a host.
    constexpr const char *kBootId = "/proc/sys/kernel/random/boot_id";
    std::FILE *file = std::fopen(kBootId, "r");
    if (file == nullptr) return fail(MEP_SYSTEM_ERROR, "%s", system_error(kBootId, errno).c_str());
    const size_t length = std::fread(facts->host, 1, sizeof facts->host - 1, file);
    std::fclose(file);
    if (length == 0) return fail(MEP_SYSTEM_ERROR, "%s is empty", kBootId);
    facts->host[std::strcspn(facts->host, "\n")] = '\0';
    const ProcessIdentity process = process_identity();
    facts->process[0] = process.words[0];
    facts->process[1] = process.words[1];
    return MEP_OK;
}

bool same_host(const RankFacts &one, const RankFacts &other) {
    return std::strncmp(one.host, other.host, sizeof one.host) == 0;
}

bool same_process(const RankFacts &one, const RankFacts &other) {
    return one.process[0] == other.process[0] && one.process[1] == other.process[1];
}

bool same_device(const RankFacts &one, const RankFacts &other) {
    return std::memcmp(one.device, other.device, sizeof one.device) == 0;
}

TransportChoice choose_transport(const RankFacts &one, const RankFacts &other, bool same_rank) {
    if (same_rank) return {MEP_TRANSPORT_SELF, "self", "the rank itself"};
    if (!same_host(one, other))
        return {0, "none", "on different hosts, and this version moves rows only inside one"};
    const bool gpu = one.backend != MEP_BACKEND_CPU;
    if (same_process(one, other))
        return {MEP_TRANSPORT_THREAD, "thread",
                gpu ? "threads of one process: the GPUs reach each other's memory"
                    : "threads of one process: the same memory"};
    if (gpu)
        return {MEP_TRANSPORT_IPC, "ipc",
                "processes of one host: GPU memory mapped by its IPC handle"};
    return {MEP_TRANSPORT_SHM, "shm",
            "processes of one host: POSIX shared memory, the fastest between CPU ranks"};
}

}  // namespace ep
