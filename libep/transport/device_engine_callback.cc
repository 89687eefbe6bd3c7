#include "base/status.h"
#include "transport/device_engine.h"

namespace ep {
namespace {

class CallbackDeviceEngine : public DeviceEngine {
  public:
    CallbackDeviceEngine(Device *device, int rank_count,
                         mep_all_to_all_on_stream_callback_t callback, void *context)
        : device_(device), rank_count_(rank_count), callback_(callback), context_(context) {}

    mep_status_t allocate(size_t bytes, std::shared_ptr<char> *memory) override {
        return allocate_boxes(device_, bytes, memory);
    }
    mep_status_t exchange(void *, const Trip &, const std::vector<Exchange> &exchanges,
                          const Queue &queue) override {
        std::vector<const void *> send(rank_count_);
        std::vector<void *> receive(rank_count_);
        std::vector<size_t> bytes(rank_count_);
        for (int peer = 0; peer < rank_count_; ++peer) {
            send[peer] = exchanges[peer].send;
            receive[peer] = exchanges[peer].receive;
            bytes[peer] = exchanges[peer].bytes;
        }
        if (result_ == 0)
            result_ = callback_(context_, send.data(), receive.data(), bytes.data(), queue.stream);
        if (result_ == 0) return MEP_OK;
        return fail(MEP_SYSTEM_ERROR,
                    "the caller's all_to_all_on_stream has failed (it returned "
                    "%d)",
                    result_);
    }
    // Whether it can be captured is the callback's affair.
    const char *no_capture_reason() const override { return ""; }
    std::string take_failure() override { return ""; }

  private:
    Device *const device_;
    const int rank_count_;
    const mep_all_to_all_on_stream_callback_t callback_;
    void *const context_;
    int32_t result_ = 0;
};

}  // namespace

std::unique_ptr<DeviceEngine> device_engine_by_callback(
    Device *device, int rank_count, mep_all_to_all_on_stream_callback_t callback, void *context) {
    return std::make_unique<CallbackDeviceEngine>(device, rank_count, callback, context);
}

}  // namespace ep
