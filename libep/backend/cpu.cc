// The CPU backend: windows in POSIX shared memory, launches on the caller's thread and its workers.
#include "backend/backend.h"
#include "backend/cpu_levels.h"
#include "backend/shm_names.h"
#include "backend/window_table.h"
#include "base/socket.h"
#include "base/status.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace ep {
namespace {

class HostMapping : public Mapping {
  public:
    HostMapping(void *data, size_t bytes) : data_(data), bytes_(bytes) {}
    HostMapping(const HostMapping &) = delete;
    HostMapping &operator=(const HostMapping &) = delete;
    ~HostMapping() override { munmap(data_, bytes_); }
    char *data() const override { return static_cast<char *>(data_); }

  private:
    void *data_;
    size_t bytes_;
};

// What the system says it could give without taking anything from a program; 0 if it does not say.
uint64_t available_bytes() {
    std::FILE *file = std::fopen("/proc/meminfo", "r");
    if (file == nullptr) return 0;
    char line[128];
    unsigned long long kilobytes = 0;
    while (std::fgets(line, sizeof line, file) != nullptr)
        if (std::sscanf(line, "MemAvailable: %llu kB", &kilobytes) == 1) break;
    std::fclose(file);
    return kilobytes * 1024;
}

// A system that promises more than it has would kill the process that takes it.
mep_status_t check_available(size_t bytes, const char *what) {
    const uint64_t available = available_bytes();
    if (available == 0 || bytes <= available) return MEP_OK;
    return fail(MEP_OUT_OF_MEMORY, "no memory for %s of %zu bytes: %llu are available", what, bytes,
                static_cast<unsigned long long>(available));
}

mep_status_t map(size_t bytes, int flags, int descriptor, std::shared_ptr<Mapping> *mapping) {
    void *data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags | MAP_POPULATE, descriptor, 0);
    if (data == MAP_FAILED)
        return fail(MEP_OUT_OF_MEMORY, "mapping a window of %zu bytes: %s", bytes,
                    system_error("mmap", errno).c_str());
    // Fewer misses of the page tables where the system allows it; only a hint.
    madvise(data, bytes, MADV_HUGEPAGE);
    *mapping = std::make_shared<HostMapping>(data, bytes);
    return MEP_OK;
}

class HostWindow : public Window {
  public:
    HostWindow() = default;
    HostWindow(const HostWindow &) = delete;
    HostWindow &operator=(const HostWindow &) = delete;
    ~HostWindow() override {
        seal();
        WindowTable::instance().remove(handle_.number);
    }

    mep_status_t create(size_t bytes, Sharing sharing) {
        handle_.bytes = bytes;
        const ProcessIdentity process = process_identity();
        handle_.process[0] = process.words[0];
        handle_.process[1] = process.words[1];
        if (sharing == Sharing::kNobody) {
            EP_TRY(check_available(bytes, "a window"));
            return map(bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1, &mapping_);
        }
        EP_TRY(create_shared(bytes));
        handle_.number = WindowTable::instance().add(mapping_);
        return MEP_OK;
    }

    std::shared_ptr<Mapping> mapping() const override { return mapping_; }
    WindowHandle handle() const override { return handle_; }
    void seal() override {
        if (handle_.name[0] != '\0') shm_unlink(handle_.name);
        handle_.name[0] = '\0';
    }

  private:
    mep_status_t create_shared(size_t bytes) {
        sweep_shm_names();
        std::string name;
        EP_TRY(new_shm_name(&name));
        const Descriptor file(shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
        if (file.number() < 0)
            return fail(MEP_SYSTEM_ERROR, "creating shared memory: %s",
                        system_error("shm_open", errno).c_str());
        std::memcpy(handle_.name, name.c_str(), name.size() + 1);
        // Takes the pages now: with none left, a later access would kill the process.
        if (const int error = posix_fallocate(file.number(), 0, static_cast<off_t>(bytes)))
            return fail(error == ENOSPC || error == ENOMEM ? MEP_OUT_OF_MEMORY : MEP_SYSTEM_ERROR,
                        "a window of %zu bytes in /dev/shm: %s", bytes,
                        system_error("posix_fallocate", error).c_str());
        return map(bytes, MAP_SHARED, file.number(), &mapping_);
    }

    WindowHandle handle_{};
    std::shared_ptr<Mapping> mapping_;
};

template <class Word>
void peek_word(char *to, const char *from) {
    const Word word = __atomic_load_n(reinterpret_cast<const Word *>(from), __ATOMIC_ACQUIRE);
    std::memcpy(to, &word, sizeof word);
}

class Cpu : public Device {
  public:
    Cpu() {
        for (const CpuLevel &level : cpu_levels())
            if (level.supported) kernels_ = level.kernels;
    }

    const Kernels &kernels() const override { return kernels_; }

    mep_status_t allocate(size_t bytes, DeviceMemory *memory) override {
        EP_TRY(check_available(bytes, "an array"));
        void *data = nullptr;
        if (posix_memalign(&data, Layout::kLineBytes, bytes == 0 ? 1 : bytes) != 0)
            return fail(MEP_OUT_OF_MEMORY, "no memory for %zu bytes", bytes);
        std::memset(data, 0, bytes);
        *memory = DeviceMemory(data, std::free);
        return MEP_OK;
    }
    mep_status_t allocate_shared(size_t bytes, DeviceMemory *memory) override {
        return allocate(bytes, memory);
    }
    mep_status_t wait(void *) override { return MEP_OK; }
    bool is_capturing(void *) const override { return false; }
    mep_status_t clear(void *device, size_t bytes) override {
        std::memset(device, 0, bytes);
        return MEP_OK;
    }
    mep_status_t write(void *device, const void *host, size_t bytes) override {
        uint64_t word;
        if (bytes != sizeof word) {
            std::memcpy(device, host, bytes);
            return MEP_OK;
        }
        // At once, as a kernel may be looking.
        std::memcpy(&word, host, sizeof word);
        __atomic_store_n(static_cast<uint64_t *>(device), word, __ATOMIC_RELEASE);
        return MEP_OK;
    }
    mep_status_t read(void *host, const void *device, size_t bytes) override {
        return peek(host, device, bytes);
    }

    mep_status_t peek(void *host, const void *device, size_t bytes) override {
        // A word at a time, as peers and kernels store them meanwhile; what is less has halves.
        const char *from = static_cast<const char *>(device);
        char *to = static_cast<char *>(host);
        size_t at = 0;
        for (; at + sizeof(uint64_t) <= bytes; at += sizeof(uint64_t))
            peek_word<uint64_t>(to + at, from + at);
        for (; at + sizeof(uint32_t) <= bytes; at += sizeof(uint32_t))
            peek_word<uint32_t>(to + at, from + at);
        std::memcpy(to + at, from + at, bytes - at);
        return MEP_OK;
    }

    mep_status_t create_window(size_t bytes, Sharing sharing,
                               std::unique_ptr<Window> *window) override {
        auto created = std::make_unique<HostWindow>();
        EP_TRY(created->create(bytes, sharing));
        *window = std::move(created);
        return MEP_OK;
    }

    mep_status_t open_window(const WindowHandle &handle,
                             std::shared_ptr<Mapping> *mapping) override {
        const ProcessIdentity process = process_identity();
        if (handle.process[0] == process.words[0] && handle.process[1] == process.words[1]) {
            *mapping = WindowTable::instance().find(handle.number);
            if (*mapping == nullptr)
                return fail(MEP_SYSTEM_ERROR, "a peer's window is gone; its rank has failed");
            return MEP_OK;
        }
        char name[sizeof handle.name + 1] = {};
        std::memcpy(name, handle.name, sizeof handle.name);
        const Descriptor file(shm_open(name, O_RDWR | O_CLOEXEC, 0));
        struct stat status;
        if (file.number() < 0 || fstat(file.number(), &status) != 0)
            return fail(MEP_SYSTEM_ERROR, "opening a peer's shared memory: %s",
                        system_error("shm_open", errno).c_str());
        if (static_cast<uint64_t>(status.st_size) != handle.bytes)
            return fail(MEP_SYSTEM_ERROR, "a peer's shared memory has %lld bytes instead of %llu",
                        static_cast<long long>(status.st_size),
                        static_cast<unsigned long long>(handle.bytes));
        return map(handle.bytes, MAP_SHARED, file.number(), mapping);
    }

    bool reaches(mep_device_t device) const override {
        return device.device_type == MEP_DEVICE_CPU;
    }
    bool is_synchronous() const override { return true; }
    DeviceUuid uuid() const override { return {}; }
    Access access(const DeviceUuid &) const override { return Access::kSame; }
    void *set_up_stream() const override { return nullptr; }
    std::string pci_address() const override { return ""; }
    int block_count() const override { return 0; }
    bool delivers_lines(const DeviceUuid &) const override { return false; }
    const char *no_quant_reason() const override { return ""; }
    int enter() override { return 0; }
    void leave(int) override {}
    mep_status_t launch_status(int) const override { return MEP_OK; }

  private:
    Kernels kernels_{};  // of the widest level that this machine has
};

int device_count() {
    return 1;
}

const char *unavailable_reason() {
    return "";
}

mep_status_t create_device(int device_id, std::shared_ptr<Device> *device) {
    if (device_id != 0)
        return fail(MEP_INVALID_ARGUMENT, "config.device_id is %d; the CPU has only device 0",
                    device_id);
    *device = std::make_shared<Cpu>();
    return MEP_OK;
}

}  // namespace

const Backend kCpuBackend{MEP_BACKEND_CPU, "cpu", device_count, unavailable_reason, create_device};

}  // namespace ep
