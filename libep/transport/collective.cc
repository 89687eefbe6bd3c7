#include "transport/collective.h"

#include "base/status.h"

#include <algorithm>
#include <cstring>

namespace ep {

mep_status_t Collective::create(Device *device, Engine *engine, const Layout &layout,
                                const std::vector<bool> &far, BufferState *state) {
    if (std::find(far.begin(), far.end(), true) == far.end()) return MEP_OK;
    const std::vector<int32_t> numbers(far.begin(), far.end());
    EP_TRY(device->allocate(sizeof(int32_t) * numbers.size(), &far_on_device_));
    EP_TRY(device->write(far_on_device_.get(), numbers.data(), sizeof(int32_t) * numbers.size()));
    EP_TRY(device->allocate(layout.bytes, &outbox_));
    const auto *numbers_there = static_cast<const int32_t *>(far_on_device_.get());
    auto *outbox = static_cast<char *>(outbox_.get());
    EP_TRY(device->write(&state->far, &numbers_there, sizeof numbers_there));
    EP_TRY(device->write(&state->outbox, &outbox, sizeof outbox));
    sent_.resize(far.size());
    received_.resize(far.size());
    far_ = far;
    device_ = device;
    engine_ = engine;
    return MEP_OK;
}

// The far peers that are not masked.
std::vector<bool> Collective::partners(const Round &round) const {
    std::vector<bool> partners = far_;
    for (size_t peer = 0; peer < partners.size(); ++peer)
        partners[peer] = partners[peer] && round.active[peer] != 0;
    return partners;
}

mep_status_t Collective::carry(const Round &round, Cargo cargo, size_t body_bytes,
                               const Queue &queue, const Deadline &deadline) {
    ParcelArgs args{};
    args.round = round;
    args.cargo = cargo;
    args.body_bytes = body_bytes;
    const std::vector<bool> asked = partners(round);
    EP_TRY(pack(args, queue));
    std::vector<bool> with = asked;
    EP_TRY(engine_->exchange(sent_, args.bytes(round.layout.shape.token_count_max), deadline, &with,
                             &received_));
    for (size_t peer = 0; peer < with.size(); ++peer)
        if (asked[peer] && !with[peer]) round.active[peer] = 0;
    return place(args, queue);
}

// The kernels' arrays are the host's own here: a device with far peers is one whose memory the host
// reaches (see core/group.cc).
mep_status_t Collective::pack(ParcelArgs args, const Queue &queue) {
    std::vector<char *> parcels(far_.size());
    std::vector<uint64_t> sizes(far_.size());
    const std::vector<bool> with = partners(args.round);
    // As many as there may be: of own tokens, or for the combine, of the peers'.
    const int records = args.cargo == Cargo::kPartials ? args.round.layout.shape.token_count_max
                                                       : args.round.token_count;
    for (size_t peer = 0; peer < far_.size(); ++peer) {
        sent_[peer].resize(with[peer] ? args.bytes(records) : 0);
        parcels[peer] = sent_[peer].data();
    }
    args.parcels = parcels.data();
    args.sizes = sizes.data();
    EP_TRY(device_->launch_status(device_->kernels().pack(args, queue)));
    for (size_t peer = 0; peer < far_.size(); ++peer)
        sent_[peer].resize(sizes[peer]);
    return MEP_OK;
}

mep_status_t Collective::place(ParcelArgs args, const Queue &queue) {
    std::vector<char *> parcels(far_.size());
    std::vector<uint64_t> sizes(far_.size());
    for (size_t peer = 0; peer < far_.size(); ++peer) {
        parcels[peer] = received_[peer].data();
        sizes[peer] = received_[peer].size();
    }
    args.parcels = parcels.data();
    args.sizes = sizes.data();
    return device_->launch_status(device_->kernels().place(args, queue));
}

}  // namespace ep
