#include "base/host_turn.h"

#include <cerrno>
#include <chrono>
#include <fcntl.h>
#include <string>
#include <sys/file.h>
#include <thread>
#include <unistd.h>

namespace ep {

HostTurn::HostTurn(const Deadline &deadline) {
    // In shared memory, which processes that share a GPU's memory have in common.
    const std::string path = "/dev/shm/mooncake_ep." + std::to_string(geteuid()) + ".turn";
    const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (file < 0) return;
    while (flock(file, LOCK_EX | LOCK_NB) != 0) {
        if ((errno != EWOULDBLOCK && errno != EINTR) || deadline.passed()) {
            close(file);
            return;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    file_ = file;
}

HostTurn::~HostTurn() {
    if (file_ >= 0) close(file_);
}

}  // namespace ep
