// Ranks on the CPU, which are threads, with a guard before and after each array, where nothing may
// be written. See support/abi.h.
#include "support/place_host.h"

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace ep::test {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr char kGuard = 0x5a;

// Memory that begins with the bytes of the array in it: that number, a guard, the array, a guard.
struct Guarded {
    char *memory;

    static constexpr size_t kHeadBytes = alignof(std::max_align_t);

    static Guarded of(char *array) { return {array - kGuardBytes - kHeadBytes}; }
    static Guarded make(size_t bytes) {
        const Guarded made{new char[kHeadBytes + bytes + 2 * kGuardBytes]};
        std::memcpy(made.memory, &bytes, sizeof bytes);
        for (char *guard : {made.before(), made.after()})
            std::fill_n(guard, kGuardBytes, kGuard);
        return made;
    }

    char *before() const { return memory + kHeadBytes; }
    char *array() const { return before() + kGuardBytes; }
    char *after() const {
        size_t bytes;
        std::memcpy(&bytes, memory, sizeof bytes);
        return array() + bytes;
    }
};

// AddressSanitizer tells who touches a guard, if it knows of it.
void hide(char *guard) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(guard, kGuardBytes);
#endif
    (void)guard;
}
void show(char *guard) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(guard, kGuardBytes);
#endif
    (void)guard;
}

void check_and_free(char *array) {
    const Guarded guarded = Guarded::of(array);
    for (char *guard : {guarded.before(), guarded.after()}) {
        show(guard);
        const char *end = guard + kGuardBytes;
        const char *written =
            std::find_if(guard, const_cast<char *>(end), [](char byte) { return byte != kGuard; });
        EXPECT_EQ(written, end) << "something was written beside an array, " << written - array
                                << " bytes from where it begins";
    }
    delete[] guarded.memory;
}

}  // namespace

Memory allocate(size_t bytes) {
    const Guarded guarded = Guarded::make(bytes);
    for (char *guard : {guarded.before(), guarded.after()})
        hide(guard);
    return {guarded.array(), check_and_free};
}

}  // namespace ep::test
