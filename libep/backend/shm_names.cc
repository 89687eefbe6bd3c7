#include "backend/shm_names.h"

#include "base/meeting.h"
#include "base/status.h"

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <dirent.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

namespace ep {
namespace {

constexpr const char *kFolder = "/dev/shm";
constexpr const char *kPrefix = "mooncake_ep-";
constexpr unsigned long long kKept = 0xffffffff;  // of numbers that have more bits

// Tells a process from a later one with its number; 0: there is none, or it cannot be told.
unsigned long long start_time(int pid) {
    const std::string path = "/proc/" + std::to_string(pid) + "/stat";
    std::FILE *file = std::fopen(path.c_str(), "r");
    if (file == nullptr) return 0;
    char line[1024] = {};
    const size_t length = std::fread(line, 1, sizeof line - 1, file);
    std::fclose(file);
    line[length] = '\0';
    // The name of the program, in brackets, may have anything in it.
    const char *after = std::strrchr(line, ')');
    unsigned long long ticks = 0;
    constexpr const char *kField22 =
        ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu";
    return after != nullptr && std::sscanf(after, kField22, &ticks) == 1 ? ticks : 0;
}

// Process numbers are of a namespace, of which there may be several around one /dev/shm. 0:
// unknown.
unsigned long long pid_namespace() {
    struct stat facts;
    return stat("/proc/self/ns/pid", &facts) == 0 ? facts.st_ino : 0;
}

bool is_gone(int pid, unsigned long long started) {
    if (kill(pid, 0) != 0 && errno == ESRCH) return true;
    const unsigned long long now = start_time(pid);
    return now != 0 && (now & kKept) != started;
}

}  // namespace

mep_status_t new_shm_name(std::string *name) {
    uint64_t random[2];
    if (!fill_random(random, sizeof random))
        return fail(MEP_SYSTEM_ERROR, "%s", system_error("getrandom", errno).c_str());
    char text[64];
    const int length =
        std::snprintf(text, sizeof text, "/%s%llx-%x-%llx-%016llx", kPrefix,
                      pid_namespace() & kKept, static_cast<unsigned>(getpid()),
                      start_time(getpid()) & kKept, static_cast<unsigned long long>(random[0]));
    std::snprintf(text + length, sizeof text - length, "%08x", static_cast<unsigned>(random[1]));
    *name = text;
    return MEP_OK;
}

void sweep_shm_names() {
    const unsigned long long ours = pid_namespace() & kKept;
    DIR *directory = opendir(kFolder);
    if (directory == nullptr) return;
    std::vector<std::string> left;
    while (const dirent *entry = readdir(directory)) {
        const std::string name = entry->d_name;
        if (name.compare(0, std::strlen(kPrefix), kPrefix) != 0) continue;
        unsigned long long space = 0, started = 0;
        unsigned pid = 0;
        if (std::sscanf(name.c_str() + std::strlen(kPrefix), "%llx-%x-%llx-", &space, &pid,
                        &started) != 3)
            continue;
        if (space == ours && space != 0 && started != 0 && is_gone(static_cast<int>(pid), started))
            left.push_back("/" + name);
    }
    closedir(directory);
    for (const std::string &name : left)
        shm_unlink(name.c_str());  // of another user: refused
}

}  // namespace ep
