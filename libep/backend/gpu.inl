// The host runtime of a GPU, once for CUDA and MACA. The including file defines, before,
//   EP_GPU(name)            cuda##name or mc##name
//   EP_GPU_PROPERTIES       the struct of a device's properties, which does not follow that rule
//   EP_GPU_NAME             "cuda" or "maca"
// and after it the functions that are declared first here.
#include "backend/backend.h"
#include "backend/window_table.h"
#include "base/host_turn.h"
#include "base/late_frees.h"
#include "base/log.h"
#include "base/status.h"

#include <cctype>
#include <cstring>

namespace ep {
namespace {

using GpuError = EP_GPU(Error_t);
using GpuProperties = EP_GPU_PROPERTIES;
using GpuStream = EP_GPU(Stream_t);
constexpr GpuError kGpuSuccess = EP_GPU(Success);

// Errors by their numbers, which are the same; of some, MACA's names are not sure.
constexpr int kOutOfMemory = 2, kPeerAccessAlreadyEnabled = 704;

// ---- What differs -------------------------------------------------------------------------------

Kernels gpu_kernels();

// Loads the kernels onto the current device, so that no launch has to; nothing else may be waited
// for.
mep_status_t load_gpu_kernels(GpuStream stream);

// Memory that peers write to while kernels here read it, on the current device.
mep_status_t allocate_window(void **data, size_t bytes);

// The same in every process.
DeviceUuid uuid_of(const GpuProperties &properties);

// Does a line that `device` stores arrive whole at `peer`, another device that this process sees?
bool lines_arrive_whole(int device, int peer);

// Does a device reach another, which this process does not see, and lines arrive whole? False if
// that cannot be told.
bool reaches_unseen(const DeviceUuid &device, const DeviceUuid &peer);

// "" if dispatch casts rows to FP8; else why not.
const char *no_quant_reason();

bool stream_is_capturing(GpuStream stream);

// May only one process at a time close what it has mapped of others?
bool closes_in_turn();

// ---- Errors -------------------------------------------------------------------------------------

mep_status_t gpu_status(GpuError error, const char *what) {
    if (error == kGpuSuccess) return MEP_OK;
    EP_GPU(GetLastError)();  // said here, so the next launch must not find it
    const mep_status_t status = error == kOutOfMemory ? MEP_OUT_OF_MEMORY : MEP_DEVICE_ERROR;
    return fail(status, "%s: %s (%s)", what, EP_GPU(GetErrorName)(error),
                EP_GPU(GetErrorString)(error));
}

#define EP_TRY_GPU(call) EP_TRY(gpu_status(EP_GPU(call), #call))

// Makes a device current for a scope, and the caller's again after it.
class DeviceScope {
  public:
    explicit DeviceScope(int device) {
        if (EP_GPU(GetDevice)(&previous_) != kGpuSuccess) previous_ = -1;
        if (previous_ != device) error_ = EP_GPU(SetDevice)(device);
    }
    DeviceScope(const DeviceScope &) = delete;
    DeviceScope &operator=(const DeviceScope &) = delete;
    ~DeviceScope() {
        // To make a device current is to start it, which costs time and memory.
        if (previous_ >= 0 && !LateFrees::beside()) EP_GPU(SetDevice)(previous_);
    }
    mep_status_t status() const { return gpu_status(error_, "selecting the device"); }

  private:
    int previous_ = -1;
    GpuError error_ = kGpuSuccess;
};

// For memory of a device that must not be current where it is freed.
void free_on(int device, void *memory) {
    LateFrees::run([device, memory] {
        const DeviceScope scope(device);
        EP_GPU(Free)(memory);
    });
}
void free_host(void *memory) {
    EP_GPU(FreeHost)(memory);
}

// ---- Windows ------------------------------------------------------------------------------------

// A window of this process.
class OwnMapping : public Mapping {
  public:
    OwnMapping(char *data, int device) : data_(data), device_(device) {}
    OwnMapping(const OwnMapping &) = delete;
    OwnMapping &operator=(const OwnMapping &) = delete;
    ~OwnMapping() override { free_on(device_, data_); }
    char *data() const override { return data_; }

  private:
    char *data_;
    int device_;
};

// A window of another process.
class IpcMapping : public Mapping {
  public:
    IpcMapping(void *data, int device) : data_(data), device_(device) {}
    IpcMapping(const IpcMapping &) = delete;
    IpcMapping &operator=(const IpcMapping &) = delete;
    ~IpcMapping() override {
        LateFrees::run([device = device_, data = data_] {
            if (closes_in_turn())
                close_in_turn(device, data);
            else
                close(device, data);
        });
    }
    char *data() const override { return static_cast<char *>(data_); }

  private:
    static void close_in_turn(int device, void *data) {
        constexpr int64_t kWaitUs = 5'000'000;
        const HostTurn turn{Deadline(kWaitUs)};
        if (turn.has_come())
            close(device, data);
        else
            log(MEP_LOG_WARNING,
                "the memory of a peer stays mapped until this process ends: no turn to close it");
    }
    static void close(int device, void *data) {
        const DeviceScope scope(device);
        EP_GPU(IpcCloseMemHandle)(data);
    }

    void *data_;
    int device_;
};

class GpuWindow : public Window {
  public:
    GpuWindow() = default;
    GpuWindow(const GpuWindow &) = delete;
    GpuWindow &operator=(const GpuWindow &) = delete;
    ~GpuWindow() override { WindowTable::instance().remove(handle_.number); }

    mep_status_t create(int device, GpuStream stream, size_t bytes, Sharing sharing) {
        // A handle names a whole block of the allocator; this way the window has one of its own.
        constexpr size_t kBlockBytes = size_t{2} << 20;
        const size_t rounded = (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
        void *data = nullptr;
        EP_TRY(allocate_window(&data, rounded));
        mapping_ = std::make_shared<OwnMapping>(static_cast<char *>(data), device);
        EP_TRY_GPU(MemsetAsync(data, 0, rounded, stream));
        EP_TRY_GPU(StreamSynchronize(stream));
        const ProcessIdentity process = process_identity();
        handle_.bytes = bytes;
        handle_.process[0] = process.words[0];
        handle_.process[1] = process.words[1];
        handle_.device = device;
        if (sharing == Sharing::kNobody) return MEP_OK;
        EP_GPU(IpcMemHandle_t) ipc;
        static_assert(sizeof ipc <= sizeof handle_.name, "a handle fits");
        EP_TRY_GPU(IpcGetMemHandle(&ipc, data));
        std::memcpy(handle_.name, &ipc, sizeof ipc);
        handle_.number = WindowTable::instance().add(mapping_);
        return MEP_OK;
    }

    std::shared_ptr<Mapping> mapping() const override { return mapping_; }
    WindowHandle handle() const override { return handle_; }
    void seal() override {}

  private:
    WindowHandle handle_{};
    std::shared_ptr<Mapping> mapping_;
};

// ---- The device ---------------------------------------------------------------------------------

class Gpu : public Device {
  public:
    explicit Gpu(int device) : device_(device), kernels_(gpu_kernels()) {}
    Gpu(const Gpu &) = delete;
    Gpu &operator=(const Gpu &) = delete;
    ~Gpu() override {
        if (stream_ == nullptr) return;
        LateFrees::run([device = device_, stream = stream_] {
            const DeviceScope scope(device);
            EP_GPU(StreamDestroy)(stream);
        });
    }

    mep_status_t start() {
        GpuProperties properties;
        EP_TRY_GPU(GetDeviceProperties(&properties, device_));
        block_count_ = properties.multiProcessorCount;
        uuid_ = uuid_of(properties);
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        EP_TRY_GPU(StreamCreateWithFlags(&stream_, EP_GPU(StreamNonBlocking)));
        return load_gpu_kernels(stream_);
    }

    const Kernels &kernels() const override { return kernels_; }
    DeviceUuid uuid() const override { return uuid_; }
    int block_count() const override { return block_count_; }

    Access access(const DeviceUuid &peer) const override {
        if (std::memcmp(&peer, &uuid_, sizeof uuid_) == 0) return Access::kSame;
        const int device = find_device(peer);
        if (device < 0) return reaches_unseen(uuid_, peer) ? Access::kPeer : Access::kUnknown;
        int reaches = 0;
        return EP_GPU(DeviceCanAccessPeer)(&reaches, device_, device) == kGpuSuccess && reaches != 0
                   ? Access::kPeer
                   : Access::kRefused;
    }
    void *set_up_stream() const override { return stream_; }
    std::string pci_address() const override {
        char address[32] = "";
        if (EP_GPU(DeviceGetPCIBusId)(address, sizeof address, device_) != kGpuSuccess) return "";
        for (char &letter : address)
            letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
        return address;
    }

    bool delivers_lines(const DeviceUuid &peer) const override {
        if (std::memcmp(&peer, &uuid_, sizeof uuid_) == 0) return true;
        const int device = find_device(peer);
        return device >= 0 ? lines_arrive_whole(device_, device) : reaches_unseen(uuid_, peer);
    }
    const char *no_quant_reason() const override { return ep::no_quant_reason(); }

    mep_status_t allocate(size_t bytes, DeviceMemory *memory) override {
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        void *data = nullptr;
        EP_TRY_GPU(Malloc(&data, bytes == 0 ? 1 : bytes));
        *memory = DeviceMemory(data, [device = device_](void *freed) { free_on(device, freed); });
        return clear(data, bytes);
    }
    mep_status_t clear(void *device, size_t bytes) override {
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        EP_TRY_GPU(MemsetAsync(device, 0, bytes, stream_));
        return gpu_status(EP_GPU(StreamSynchronize)(stream_), "clearing memory");
    }
    mep_status_t allocate_shared(size_t bytes, DeviceMemory *memory) override {
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        void *data = nullptr;
        EP_TRY_GPU(MallocHost(&data, bytes));
        std::memset(data, 0, bytes);
        *memory = DeviceMemory(data, free_host);
        return MEP_OK;
    }
    mep_status_t wait(void *stream) override {
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        return gpu_status(EP_GPU(StreamSynchronize)(static_cast<GpuStream>(stream)),
                          "waiting for the stream");
    }
    bool is_capturing(void *stream) const override {
        const DeviceScope scope(device_);
        return stream_is_capturing(static_cast<GpuStream>(stream));
    }
    mep_status_t write(void *device, const void *host, size_t bytes) override {
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        EP_TRY_GPU(MemcpyAsync(device, host, bytes, EP_GPU(MemcpyHostToDevice), stream_));
        return gpu_status(EP_GPU(StreamSynchronize)(stream_), "copying to the device");
    }
    mep_status_t peek(void *host, const void *device, size_t bytes) override {
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        EP_TRY_GPU(MemcpyAsync(host, device, bytes, EP_GPU(MemcpyDeviceToHost), stream_));
        return gpu_status(EP_GPU(StreamSynchronize)(stream_), "copying from the device");
    }
    // After all that was queued on any stream of the device.
    mep_status_t read(void *host, const void *device, size_t bytes) override {
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        EP_TRY_GPU(DeviceSynchronize());
        return gpu_status(EP_GPU(Memcpy)(host, device, bytes, EP_GPU(MemcpyDeviceToHost)),
                          "copying from the device");
    }

    mep_status_t create_window(size_t bytes, Sharing sharing,
                               std::unique_ptr<Window> *window) override {
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        auto created = std::make_unique<GpuWindow>();
        mep_status_t status = created->create(device_, stream_, bytes, sharing);
        // What an earlier call has left may be going.
        if (status == MEP_OUT_OF_MEMORY && LateFrees::finish())
            status = created->create(device_, stream_, bytes, sharing);
        EP_TRY(status);
        *window = std::move(created);
        return MEP_OK;
    }

    mep_status_t open_window(const WindowHandle &handle,
                             std::shared_ptr<Mapping> *mapping) override {
        const DeviceScope scope(device_);
        EP_TRY(scope.status());
        const ProcessIdentity process = process_identity();
        if (handle.process[0] == process.words[0] && handle.process[1] == process.words[1])
            return share_window(handle, mapping);
        EP_GPU(IpcMemHandle_t) ipc;
        std::memcpy(&ipc, handle.name, sizeof ipc);
        void *data = nullptr;
        EP_TRY_GPU(IpcOpenMemHandle(&data, ipc, EP_GPU(IpcMemLazyEnablePeerAccess)));
        *mapping = std::make_shared<IpcMapping>(data, device_);
        return MEP_OK;
    }

    bool reaches(mep_device_t device) const override {
        return device.device_type == MEP_DEVICE_CUDA && device.device_id == device_;
    }
    bool is_synchronous() const override { return false; }
    int enter() override {
        int previous = -1;
        if (EP_GPU(GetDevice)(&previous) != kGpuSuccess) return -1;
        if (previous != device_) EP_GPU(SetDevice)(device_);
        return previous;
    }
    void leave(int previous) override {
        if (previous >= 0 && previous != device_) EP_GPU(SetDevice)(previous);
    }
    mep_status_t launch_status(int error) const override {
        return gpu_status(static_cast<GpuError>(error), "launching a kernel");
    }

  private:
    // The number of a device in this process; -1 if it does not see it.
    static int find_device(const DeviceUuid &uuid) {
        int count = 0;
        if (EP_GPU(GetDeviceCount)(&count) != kGpuSuccess) return -1;
        for (int device = 0; device < count; ++device) {
            GpuProperties properties;
            if (EP_GPU(GetDeviceProperties)(&properties, device) != kGpuSuccess) continue;
            const DeviceUuid found = uuid_of(properties);
            if (std::memcmp(&uuid, &found, sizeof uuid) == 0) return device;
        }
        return -1;
    }

    // A window of this process: its address is good here once this device may reach the other.
    mep_status_t share_window(const WindowHandle &handle, std::shared_ptr<Mapping> *mapping) {
        *mapping = WindowTable::instance().find(handle.number);
        if (*mapping == nullptr)
            return fail(MEP_SYSTEM_ERROR, "a peer's window is gone; its rank has failed");
        if (handle.device == device_) return MEP_OK;
        const GpuError error = EP_GPU(DeviceEnablePeerAccess)(handle.device, 0);
        if (error == kPeerAccessAlreadyEnabled) {
            EP_GPU(GetLastError)();  // not an error, but it would be found by the next launch
            return MEP_OK;
        }
        return gpu_status(error, "enabling access to a peer's device");
    }

    const int device_;
    const Kernels kernels_;
    // For set-up: it waits for nothing else, as another rank's kernel may be waiting for this rank.
    GpuStream stream_ = nullptr;
    DeviceUuid uuid_{};
    int block_count_ = 1;
};

int device_count() {
    int count = 0;
    if (EP_GPU(GetDeviceCount)(&count) != kGpuSuccess) {
        EP_GPU(GetLastError)();
        return 0;
    }
    return count;
}

const char *unavailable_reason() {
    int count = 0;
    const GpuError error = EP_GPU(GetDeviceCount)(&count);
    if (error == kGpuSuccess) return count > 0 ? "" : "no device is visible";
    EP_GPU(GetLastError)();
    return EP_GPU(GetErrorString)(error);
}

mep_status_t create_device(int device_id, std::shared_ptr<Device> *device) {
    const char *reason = unavailable_reason();
    if (*reason != '\0')
        return fail(MEP_UNSUPPORTED, "backend %s is not available: %s", EP_GPU_NAME, reason);
    if (device_id < 0 || device_id >= device_count())
        return fail(MEP_INVALID_ARGUMENT, "config.device_id is %d; it must be in [0, %d)",
                    device_id, device_count());
    auto created = std::make_shared<Gpu>(device_id);
    EP_TRY(created->start());
    *device = std::move(created);
    return MEP_OK;
}

}  // namespace
}  // namespace ep
