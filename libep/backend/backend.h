// The host runtime of a kind of device: memory, windows that peers can map, and the kernels.
#pragma once

#include "mooncake_ep.h"

#include "kernels/kernels.h"

#include <memory>
#include <string>

namespace ep {

using DeviceMemory = std::unique_ptr<void, void (*)(void *)>;

// Says where a window is, to another rank. Plain bytes: it travels.
struct WindowHandle {
    uint64_t bytes;
    uint64_t process[2];  // identity of the owner's process, see process_identity()
    uint64_t number;      // among the owner's process's windows, for a rank of the same process
    char name[64];        // of the shared memory object, for another process
};

// A peer's window, or one's own, as mapped here. Stays valid when its owner goes.
class Mapping {
  public:
    virtual ~Mapping() = default;
    virtual char *data() const = 0;
};

// This rank's window.
class Window {
  public:
    virtual ~Window() = default;
    virtual std::shared_ptr<Mapping> mapping() const = 0;
    virtual WindowHandle handle() const = 0;

    // Takes the window's name back, once every peer has mapped it.
    virtual void seal() = 0;
};

// Who a window is for.
enum class Sharing { kNobody, kPeers };

// One device, as one rank uses it.
class Device {
  public:
    virtual ~Device() = default;
    virtual const Kernels &kernels() const = 0;

    // Zeroed device memory, aligned to a line of the wire.
    virtual mep_status_t allocate(size_t bytes, DeviceMemory *memory) = 0;
    virtual mep_status_t write(void *device, const void *host, size_t bytes) = 0;
    virtual mep_status_t read(void *host, const void *device, size_t bytes) = 0;

    // Zeroed.
    virtual mep_status_t create_window(size_t bytes, Sharing sharing,
                                       std::unique_ptr<Window> *window) = 0;
    virtual mep_status_t open_window(const WindowHandle &handle,
                                     std::shared_ptr<Mapping> *mapping) = 0;

    // Can the kernels read a caller's array that lies there?
    virtual bool reaches(mep_device_t device) const = 0;

    // True if a launch has done its work when it returns.
    virtual bool is_synchronous() const = 0;

    // Words a launcher's error.
    virtual mep_status_t launch_status(int error) const = 0;
};

struct Backend {
    int32_t id;
    const char *name;
    int (*device_count)();
    const char *(*unavailable_reason)();  // "" if it is available
    mep_status_t (*create_device)(int device_id, std::shared_ptr<Device> *device);
};

// The backend of that id, available or not; nullptr for an unknown id.
const Backend *find_backend(int32_t id);

extern const Backend kCpuBackend, kCudaBackend, kMacaBackend;

// Threads for the CPU's launches, the calling one included. `count` at least 1.
mep_status_t create_workers(int count, std::unique_ptr<Workers> *workers);

// Differs between any two processes, also in containers that share a host.
struct ProcessIdentity {
    uint64_t words[2];
};
ProcessIdentity process_identity();

}  // namespace ep
