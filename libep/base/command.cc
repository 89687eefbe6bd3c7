#include "base/command.h"

#include "base/socket.h"
#include "base/status.h"

#include <cerrno>
#include <csignal>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

namespace ep {
namespace {

constexpr size_t kBytesMax = 1 << 20;
constexpr int kWaitStepMs = 1000, kReapStepMs = 5;

// Starts the shell in a process group of its own, so that all of it can be killed, with its output
// in `to`. Returns 0 or an errno.
int start(const char *command, int to, pid_t *process) {
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attributes);
    posix_spawn_file_actions_adddup2(&files, to, STDOUT_FILENO);
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
    const char *const arguments[] = {"sh", "-c", command, nullptr};
    const int error = posix_spawn(process, "/bin/sh", &files, &attributes,
                                  const_cast<char *const *>(arguments), environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&files);
    return error;
}

// Returns at the end of what comes; false at the deadline.
bool read_all(int from, const Deadline &deadline, std::string *output) {
    char part[4096];
    for (;;) {
        const ssize_t count = ::read(from, part, sizeof part);
        if (count == 0) return true;
        if (count > 0 && output->size() < kBytesMax) output->append(part, count);
        if (count < 0 && errno != EAGAIN && errno != EINTR) return true;
        if (deadline.passed()) return false;
        if (count > 0) continue;
        pollfd entry = {from, POLLIN, 0};
        wait_ready(&entry, 1, deadline, kWaitStepMs);
    }
}

// A command may close its output and go on. Someone else may have waited for it: then nobody knows
// how it ended.
bool has_ended(pid_t process, const Deadline &deadline, bool *well) {
    for (;;) {
        int status = 0;
        const pid_t ended = ::waitpid(process, &status, WNOHANG);
        if (ended == process || (ended < 0 && errno != EINTR)) {
            *well = ended == process && WIFEXITED(status) && WEXITSTATUS(status) == 0;
            return true;
        }
        if (deadline.passed()) return false;
        wait_ready(nullptr, 0, deadline, kReapStepMs);
    }
}

}  // namespace

mep_status_t command_output(const char *command, const Deadline &deadline, std::string *output) {
    output->clear();
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0)
        return fail(MEP_SYSTEM_ERROR, "%s", system_error("pipe2", errno).c_str());
    const Descriptor from(ends[0]);
    Descriptor to(ends[1]);
    ::fcntl(from.number(), F_SETFL, O_NONBLOCK);
    pid_t process = 0;
    if (start(command, to.number(), &process) != 0) return MEP_OK;
    to.close();
    bool well = false;
    if (!read_all(from.number(), deadline, output) || !has_ended(process, deadline, &well)) {
        ::kill(-process, SIGKILL);
        ::waitpid(process, nullptr, 0);
        output->clear();
        return fail(MEP_TIMEOUT, "%s did not end within %.1f s", command,
                    static_cast<double>(deadline.timeout_us()) * 1e-6);
    }
    if (!well) output->clear();
    return MEP_OK;
}

}  // namespace ep
