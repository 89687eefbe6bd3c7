#include "transport/trial.h"

#include "base/log.h"
#include "base/status.h"

#include <chrono>
#include <thread>

namespace ep {

PeerTrial::PeerTrial(Device *device, int rank, int rank_count)
    : device_(device), rank_(rank), rank_count_(rank_count), sent_(rank_count, Trial::kNotMade) {
    if (device_->create_window(sizeof(uint64_t) * rank_count, Sharing::kPeers, &window_) == MEP_OK)
        handle_ = window_->handle();
    else
        log(MEP_LOG_WARNING, "rank %d cannot share its memory: %s", rank, last_error());
}

mep_status_t PeerTrial::knock(const std::vector<WindowHandle> &handles,
                              const std::vector<bool> &wanted) {
    std::vector<char *> addresses(rank_count_, nullptr);
    mappings_.resize(rank_count_);
    for (int peer = 0; peer < rank_count_; ++peer) {
        if (!wanted[peer]) continue;
        if (handles[peer].bytes == 0) {
            sent_[peer] = Trial::kNotShared;
        } else if (device_->open_window(handles[peer], &mappings_[peer]) != MEP_OK) {
            log(MEP_LOG_WARNING, "rank %d cannot map the memory of rank %d: %s", rank_, peer,
                last_error());
            sent_[peer] = Trial::kNotMapped;
        } else {
            sent_[peer] = Trial::kArrived;
            addresses[peer] = mappings_[peer]->data();
        }
    }
    const size_t bytes = sizeof(char *) * rank_count_;
    EP_TRY(device_->allocate(bytes, &addresses_));
    EP_TRY(device_->write(addresses_.get(), addresses.data(), bytes));
    Queue queue;
    queue.stream = device_->set_up_stream();
    const Entered entered(device_);
    return device_->launch_status(device_->kernels().knock(
        {static_cast<char *const *>(addresses_.get()), rank_, rank_count_}, queue));
}

mep_status_t PeerTrial::listen(const std::vector<bool> &expected, const Deadline &deadline,
                               std::vector<uint8_t> *heard) {
    heard->assign(rank_count_, 0);
    if (window_ == nullptr) return MEP_OK;
    std::vector<uint64_t> words(rank_count_);
    for (;;) {
        EP_TRY(device_->peek(words.data(), window_->mapping()->data(),
                             sizeof(uint64_t) * rank_count_));
        bool all = true;
        for (int peer = 0; peer < rank_count_; ++peer) {
            (*heard)[peer] = words[peer] == KnockArgs::kWord;
            all = all && (!expected[peer] || (*heard)[peer] != 0);
        }
        if (all || deadline.passed()) return MEP_OK;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
}

}  // namespace ep
