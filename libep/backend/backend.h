// The host runtime of a kind of device: memory, windows that peers can map, and the kernels.
#pragma once

#include "mooncake_ep.h"

#include "kernels/kernels.h"

#include <functional>
#include <memory>
#include <string>

namespace ep {

using DeviceMemory = std::unique_ptr<void, std::function<void(void *)>>;

// Says where a window is, to another rank. Plain bytes: it travels.
struct WindowHandle {
    uint64_t bytes;
    uint64_t process[2];  // identity of the owner's process, see process_identity()
    uint64_t number;      // among the owner's process's windows, for a rank of the same process
    int32_t device;       // of the owner's process
    int32_t reserved;
    char name[64];  // for another process: of the shared memory object, or a GPU's handle
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

struct DeviceUuid {
    char bytes[16];
};

// What the device runtime says about a device's way to another's memory.
enum class Access : uint8_t {
    kUnknown,  // this process does not see the other: only trying tells
    kSame,     // one memory
    kPeer,
    kRefused,
    kGated,  // it says that it does, but that is not relied on for these two
};

// One device, as one rank uses it.
class Device {
  public:
    virtual ~Device() = default;
    virtual const Kernels &kernels() const = 0;

    // Zeroed device memory, aligned to a line of the wire.
    virtual mep_status_t allocate(size_t bytes, DeviceMemory *memory) = 0;
    virtual mep_status_t clear(void *device, size_t bytes) = 0;
    virtual mep_status_t write(void *device, const void *host, size_t bytes) = 0;
    virtual mep_status_t read(void *host, const void *device, size_t bytes) = 0;

    // Host memory that the kernels reach too, zeroed.
    virtual mep_status_t allocate_shared(size_t bytes, DeviceMemory *memory) = 0;

    // Until all that was queued on the stream is done.
    virtual mep_status_t wait(void *stream) = 0;

    // Does a graph take note of what is queued on the stream, instead of the device?
    virtual bool is_capturing(void *stream) const = 0;

    // Zeroed.
    virtual mep_status_t create_window(size_t bytes, Sharing sharing,
                                       std::unique_ptr<Window> *window) = 0;
    virtual mep_status_t open_window(const WindowHandle &handle,
                                     std::shared_ptr<Mapping> *mapping) = 0;

    // "0000:18:00.0"; "" for the CPU, or if it cannot be told.
    virtual std::string pci_address() const = 0;

    // The device's way to the memory of another of this host.
    virtual Access access(const DeviceUuid &peer) const = 0;

    // Like read(), but waits for set_up_stream() only.
    virtual mep_status_t peek(void *host, const void *device, size_t bytes) = 0;

    // For launches while a group or buffer is made; nullptr on the CPU.
    virtual void *set_up_stream() const = 0;

    // Can the kernels read a caller's array that lies there?
    virtual bool reaches(mep_device_t device) const = 0;

    // True if a launch has done its work when it returns.
    virtual bool is_synchronous() const = 0;

    // The same in every process; zero for the CPU.
    virtual DeviceUuid uuid() const = 0;

    // Does a line that this device stores arrive whole in the memory of that one? False if it
    // cannot be told, as for a device that this process does not see.
    virtual bool delivers_lines(const DeviceUuid &peer) const = 0;

    // "" if its dispatch casts rows to FP8; else why not.
    virtual const char *no_quant_reason() const = 0;

    // How many multiprocessors it has; 0 on the CPU.
    virtual int block_count() const = 0;

    // Makes the device the calling thread's, and gives back what was before; see Entered.
    virtual int enter() = 0;
    virtual void leave(int previous) = 0;

    // Words a launcher's error.
    virtual mep_status_t launch_status(int error) const = 0;
};

// The calling thread uses a device for a scope, and after it what it used before.
class Entered {
  public:
    explicit Entered(Device *device) : device_(device), previous_(device->enter()) {}
    Entered(const Entered &) = delete;
    Entered &operator=(const Entered &) = delete;
    ~Entered() { device_->leave(previous_); }

  private:
    Device *device_;
    int previous_;
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
