#include "base/command.h"

#include "base/socket.h"
#include "base/status.h"

#include <cerrno>
#include <csignal>
#include <fcntl.h>
#include <iterator>
#include <poll.h>
#include <spawn.h>
#include <sstream>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

extern char **environ;

namespace ep {
namespace {

constexpr size_t kBytesMax = 1 << 20, kLineCharsMax = 120;
constexpr int kWaitStepMs = 1000, kReapStepMs = 5;

// One of the two that a program prints to.
struct Pipe {
    Descriptor from, to;
    std::string text;

    bool open() {
        int ends[2];
        if (::pipe2(ends, O_CLOEXEC) != 0) return false;
        from = Descriptor(ends[0]);
        to = Descriptor(ends[1]);
        return ::fcntl(from.number(), F_SETFL, O_NONBLOCK) == 0;
    }
    // Takes a part of what is there; false at the end.
    bool read() {
        char part[4096];
        const ssize_t count = ::read(from.number(), part, sizeof part);
        if (count > 0 && text.size() < kBytesMax) text.append(part, count);
        return count > 0 || (count < 0 && (errno == EAGAIN || errno == EINTR));
    }
};

// Starts it in a process group of its own, so that all of it can be killed. Returns 0 or an errno.
int start(const char *command, const Pipe &output, const Pipe &errors, pid_t *process) {
    std::istringstream text(command);
    std::vector<std::string> words{std::istream_iterator<std::string>(text), {}};
    std::vector<char *> arguments;
    for (std::string &word : words)
        arguments.push_back(word.data());
    arguments.push_back(nullptr);
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attributes);
    posix_spawn_file_actions_adddup2(&files, output.to.number(), STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&files, errors.to.number(), STDERR_FILENO);
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
    const int error =
        posix_spawnp(process, arguments[0], &files, &attributes, arguments.data(), environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&files);
    return error;
}

// Returns at the end of both; false at the deadline.
bool read_all(Pipe *output, Pipe *errors, const Deadline &deadline) {
    bool more_output = true, more_errors = true;
    for (;;) {
        more_output = more_output && output->read();
        more_errors = more_errors && errors->read();
        if (!more_output && !more_errors) return true;
        if (deadline.passed()) return false;
        pollfd entries[] = {{more_output ? output->from.number() : -1, POLLIN, 0},
                            {more_errors ? errors->from.number() : -1, POLLIN, 0}};
        wait_ready(entries, 2, deadline, kWaitStepMs);
    }
}

// A command may close its output and go on. Someone else may have waited for it: then nobody knows
// how it ended, and `end` stays as it is.
bool has_ended(pid_t process, const Deadline &deadline, int *end) {
    for (;;) {
        int status = 0;
        const pid_t ended = ::waitpid(process, &status, WNOHANG);
        if (ended == process) *end = status;
        if (ended == process || (ended < 0 && errno != EINTR)) return true;
        if (deadline.passed()) return false;
        wait_ready(nullptr, 0, deadline, kReapStepMs);
    }
}

// The first line with something in it, in quotes, for a message.
std::string first_line(const std::string &text) {
    const size_t begin = text.find_first_not_of(" \t\r\n");
    if (begin == std::string::npos) return "nothing";
    const std::string line = text.substr(begin, text.find_first_of("\r\n", begin) - begin);
    return "\"" + printable(line.substr(0, kLineCharsMax).c_str()) +
           (line.size() > kLineCharsMax ? "...\"" : "\"");
}

mep_status_t check_end(const char *command, int end, const Pipe &output, const Pipe &errors) {
    if (end == 0 && !output.text.empty()) return MEP_OK;
    const bool killed = WIFSIGNALED(end);
    const std::string &said =
        errors.text.find_first_not_of(" \t\r\n") != std::string::npos ? errors.text : output.text;
    return fail(MEP_SYSTEM_ERROR, "%s ended %s %d and printed %s", command,
                killed ? "by signal" : "with status", killed ? WTERMSIG(end) : WEXITSTATUS(end),
                first_line(said).c_str());
}

}  // namespace

mep_status_t command_output(const char *command, const Deadline &deadline, std::string *output) {
    output->clear();
    Pipe printed, errors;
    if (!printed.open() || !errors.open())
        return fail(MEP_SYSTEM_ERROR, "%s", system_error("pipe2", errno).c_str());
    pid_t process = 0;
    const int error = start(command, printed, errors, &process);
    // A folder of the path that may not be read gives EACCES, too.
    if (error == ENOENT || error == EACCES || error == ENOTDIR) return MEP_OK;
    if (error != 0) return fail(MEP_SYSTEM_ERROR, "%s", system_error(command, error).c_str());
    printed.to.close();
    errors.to.close();
    int end = 0;
    if (!read_all(&printed, &errors, deadline) || !has_ended(process, deadline, &end)) {
        ::kill(-process, SIGKILL);
        ::waitpid(process, nullptr, 0);
        return fail(MEP_TIMEOUT, "%s did not end within %.1f s", command,
                    static_cast<double>(deadline.timeout_us()) * 1e-6);
    }
    EP_TRY(check_end(command, end, printed, errors));
    *output = std::move(printed.text);
    return MEP_OK;
}

}  // namespace ep
