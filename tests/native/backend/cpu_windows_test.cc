// The shared memory of a CPU rank's window: who can open it, and how long.
#include "backend/backend.h"
#include "support/forked.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <memory>
#include <sys/stat.h>

namespace ep {
namespace {

constexpr unsigned kSecondsMax = 30;
constexpr uid_t kNobody = 65534;

// errno of an attempt to open it; 0 if it opens.
int open_error(const std::string &name, int flags) {
    const int file = shm_open(name.c_str(), flags, 0);
    if (file < 0) return errno;
    close(file);
    return 0;
}

TEST(CpuWindows, AreOpenedByNoOtherUserAndByNobodyOnceAllHaveMappedThem) {
    if (geteuid() != 0) GTEST_SKIP() << "only root can become another user";
    std::shared_ptr<Device> device;
    ASSERT_EQ(find_backend(MEP_BACKEND_CPU)->create_device(0, &device), MEP_OK);
    std::unique_ptr<Window> window;
    ASSERT_EQ(device->create_window(4096, Sharing::kPeers, &window), MEP_OK);
    const std::string name = window->handle().name;
    test::run_forked(1, kSecondsMax, [&](int) {
        ASSERT_EQ(open_error(name, O_RDWR), 0) << "this user's own";
        struct stat status{};
        const int file = shm_open(name.c_str(), O_RDONLY, 0);
        ASSERT_EQ(fstat(file, &status), 0);
        EXPECT_EQ(status.st_mode & 07777, 0600U);
        close(file);
        ASSERT_EQ(setuid(kNobody), 0) << std::strerror(errno);
        for (const int flags : {O_RDONLY, O_RDWR})
            EXPECT_EQ(open_error(name, flags), EACCES) << std::strerror(open_error(name, flags));
        EXPECT_NE(shm_unlink(name.c_str()), 0) << "taken away by another user";
    });
    window->seal();
    EXPECT_EQ(open_error(name, O_RDWR), ENOENT);
    EXPECT_NE(window->mapping()->data(), nullptr);
}

}  // namespace
}  // namespace ep
