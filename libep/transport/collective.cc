#include "transport/collective.h"

#include "base/status.h"
#include "transport/incident.h"

namespace ep {

mep_status_t Collective::create(Device *device, Engine *engine, DeviceEngine *device_engine,
                                const Layout &layout, const std::vector<bool> &far,
                                bool takes_part) {
    int32_t boxes = 0;
    for (const bool one : far)
        box_of_.push_back(one ? boxes++ : Far::kNear);
    if (boxes == 0 && !takes_part) return MEP_OK;
    const size_t numbers_bytes = sizeof(int32_t) * box_of_.size();
    kernel_far_.boxes = Boxes::of(layout, boxes);
    EP_TRY(device->allocate(numbers_bytes, &box_of_on_device_));
    EP_TRY(device->write(box_of_on_device_.get(), box_of_.data(), numbers_bytes));
    const size_t bytes = kernel_far_.boxes.bytes();
    if (device_engine == nullptr) {
        EP_TRY(allocate_boxes(device, bytes, &outbox_));
    } else {
        EP_TRY(device_engine->allocate(bytes, &outbox_));
        EP_TRY(device_engine->allocate(bytes, &inbox_));
    }
    kernel_far_.box_of = static_cast<const int32_t *>(box_of_on_device_.get());
    kernel_far_.outbox = outbox_.get();
    sent_.resize(far.size());
    received_.resize(far.size());
    if (device_engine != nullptr) EP_TRY(device_engine->open(&channel_));
    device_ = device;
    engine_ = engine;
    device_engine_ = device_engine;
    far_ = far;
    return MEP_OK;
}

mep_status_t Collective::carry(const Round &round, Cargo cargo, size_t body_bytes,
                               const Queue &queue, const Deadline &deadline, bool stays_in_inbox) {
    if (device_engine_ == nullptr) return carry_parcels(round, cargo, body_bytes, queue, deadline);
    EP_TRY(carry_boxes(round, cargo, queue, deadline));
    if (stays_in_inbox) return MEP_OK;
    DeliverArgs args{round, cargo, body_bytes};
    args.round.far.inbox = inbox();
    return device_->launch_status(device_->kernels().deliver(args, queue));
}

// ---- Boxes, on GPUs -----------------------------------------------------------------------------

// All of a box, whatever is in it: nobody has to know how much that is.
mep_status_t Collective::carry_boxes(const Round &round, Cargo cargo, const Queue &queue,
                                     const Deadline &deadline) {
    const Boxes &boxes = kernel_far_.boxes;
    std::vector<Exchange> exchanges(far_.size());
    for (size_t peer = 0; peer < far_.size(); ++peer)
        if (far_[peer])
            exchanges[peer] = {boxes.box(kernel_far_.outbox, cargo, box_of_[peer]),
                               boxes.box(inbox(), cargo, box_of_[peer]), boxes.bytes_of(cargo)};
    return device_engine_->exchange(channel_, {round, cargo, deadline}, exchanges, queue);
}

// ---- Parcels, on the CPU ------------------------------------------------------------------------

// The far peers that are not masked.
std::vector<bool> Collective::partners(const Round &round) const {
    std::vector<bool> partners = far_;
    for (size_t peer = 0; peer < partners.size(); ++peer)
        partners[peer] = partners[peer] && round.active[peer] != 0 && round.members[peer] != 0;
    return partners;
}

namespace {

// Weights are due a while before the sums that the same call carries next: who has waited for those
// of a lost rank to the end has time left for the sums of the others, which have waited as long.
Deadline due(Cargo cargo, const Deadline &deadline) {
    constexpr int64_t kMargins = 8;  // of the timeout
    if (cargo != Cargo::kWeights) return deadline;
    return deadline.earlier_by(deadline.timeout_us() / kMargins);
}

}  // namespace

mep_status_t Collective::carry_parcels(const Round &round, Cargo cargo, size_t body_bytes,
                                       const Queue &queue, const Deadline &deadline) {
    ParcelArgs args{};
    args.round = round;
    args.cargo = cargo;
    args.body_bytes = body_bytes;
    const std::vector<bool> asked = partners(round);
    EP_TRY(pack(args, queue));
    std::vector<bool> with = asked;
    const Stopwatch stopwatch;
    EP_TRY(engine_->exchange(sent_, args.bytes(round.layout.shape.token_count_max),
                             due(cargo, deadline), &with, &received_));
    for (size_t peer = 0; peer < with.size(); ++peer)
        if (asked[peer] && !with[peer])
            EP_TRY(
                mask_lost(device_, round, cargo, static_cast<int>(peer), stopwatch.elapsed_ns()));
    return place(args, queue);
}

// The kernels' arrays are the host's own here.
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
