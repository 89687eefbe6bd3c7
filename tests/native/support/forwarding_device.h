// The CPU's device, for tests that change a part of it.
#pragma once

#include "backend/backend.h"

#include <gtest/gtest.h>
#include <memory>
#include <string>

namespace ep::test {

class ForwardingDevice : public Device {
  public:
    ForwardingDevice() { EXPECT_EQ(kCpuBackend.create_device(0, &device_), MEP_OK); }

    mep_status_t create_window(size_t bytes, Sharing sharing,
                               std::unique_ptr<Window> *window) override {
        return device_->create_window(bytes, sharing, window);
    }
    mep_status_t open_window(const WindowHandle &handle,
                             std::shared_ptr<Mapping> *mapping) override {
        return device_->open_window(handle, mapping);
    }
    const Kernels &kernels() const override { return device_->kernels(); }
    mep_status_t allocate(size_t bytes, DeviceMemory *memory) override {
        return device_->allocate(bytes, memory);
    }
    mep_status_t allocate_shared(size_t bytes, DeviceMemory *memory) override {
        return device_->allocate_shared(bytes, memory);
    }
    mep_status_t clear(void *device, size_t bytes) override {
        return device_->clear(device, bytes);
    }
    mep_status_t wait(void *stream) override { return device_->wait(stream); }
    bool is_capturing(void *stream) const override { return device_->is_capturing(stream); }
    mep_status_t write(void *device, const void *host, size_t bytes) override {
        return device_->write(device, host, bytes);
    }
    mep_status_t read(void *host, const void *device, size_t bytes) override {
        return device_->read(host, device, bytes);
    }
    mep_status_t peek(void *host, const void *device, size_t bytes) override {
        return device_->peek(host, device, bytes);
    }
    Access access(const DeviceUuid &peer) const override { return device_->access(peer); }
    void *set_up_stream() const override { return device_->set_up_stream(); }
    std::string pci_address() const override { return device_->pci_address(); }
    const char *no_quant_reason() const override { return device_->no_quant_reason(); }
    bool reaches(mep_device_t device) const override { return device_->reaches(device); }
    bool is_synchronous() const override { return device_->is_synchronous(); }
    DeviceUuid uuid() const override { return device_->uuid(); }
    bool delivers_lines(const DeviceUuid &peer) const override {
        return device_->delivers_lines(peer);
    }
    int block_count() const override { return device_->block_count(); }
    int enter() override { return device_->enter(); }
    void leave(int previous) override { device_->leave(previous); }
    mep_status_t launch_status(int error) const override { return device_->launch_status(error); }

  protected:
    std::shared_ptr<Device> device_;
};

}  // namespace ep::test
