// Where this rank stores what it has for a peer, and where it looks for what a source has for it:
// in a window; or, where that is not mapped, in a box that an engine carries (wire/boxes.h).
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"

namespace ep::EP_DEVICE_NAMESPACE {

// Places of one kind of cargo, of one sender and one receiver.
struct Slots {
    char *first;   // of token 0
    size_t bytes;  // from token to token

    EP_DEVICE char *of(int token) const { return first + size_t(token) * bytes; }
};

// In a window of rank `owner`.
EP_DEVICE Slots slots_in(const Layout &layout, Cargo cargo, char *window, uint64_t epoch, int owner,
                         int source) {
    switch (cargo) {
        case Cargo::kMessages:
            return {layout.message(window, epoch, owner, source, 0), layout.message_bytes};
        case Cargo::kWeights:
            return {layout.weight(window, epoch, owner, source, 0), layout.weight_bytes};
        case Cargo::kPartials:
            break;
    }
    return {layout.partial(window, epoch, owner, source, 0), layout.partial_bytes};
}

// The words beside them: of messages the counts [local expert of the receiver, then one for the
// token count], of partials the arrival.
EP_DEVICE uint64_t *words_in(const Layout &layout, Cargo cargo, char *window, uint64_t epoch,
                             int source) {
    return cargo == Cargo::kMessages ? layout.count(window, epoch, source, 0)
                                     : layout.arrival(window, epoch, source);
}

// The peer's box in `boxes`; nullptr if it has none there.
EP_DEVICE char *box_of(const Round &r, char *boxes, Cargo cargo, int peer) {
    if (r.far.box_of == nullptr || boxes == nullptr) return nullptr;
    const int32_t index = r.far.box_of[peer];
    return index == Far::kNear ? nullptr : r.far.boxes.box(boxes, cargo, index);
}
EP_DEVICE Slots slots_in_box(const Round &r, Cargo cargo, char *box) {
    switch (cargo) {
        case Cargo::kMessages:
            return {box + r.far.boxes.messages, r.layout.message_bytes};
        case Cargo::kWeights:
            return {box, r.layout.weight_bytes};
        case Cargo::kPartials:
            break;
    }
    return {box + r.far.boxes.partials, r.layout.partial_bytes};
}

EP_DEVICE Slots slots_to(const Round &r, Cargo cargo, uint64_t epoch, int peer) {
    char *box = box_of(r, r.far.outbox, cargo, peer);
    return box == nullptr ? slots_in(r.layout, cargo, r.window(peer), epoch, peer, r.rank)
                          : slots_in_box(r, cargo, box);
}
EP_DEVICE uint64_t *words_to(const Round &r, Cargo cargo, uint64_t epoch, int peer) {
    char *box = box_of(r, r.far.outbox, cargo, peer);
    return box == nullptr ? words_in(r.layout, cargo, r.window(peer), epoch, r.rank)
                          : reinterpret_cast<uint64_t *>(box);
}

// In this rank's window.
EP_DEVICE Slots slots_here(const Round &r, Cargo cargo, uint64_t epoch, int source) {
    return slots_in(r.layout, cargo, r.window(r.rank), epoch, r.rank, source);
}
EP_DEVICE uint64_t *words_here(const Round &r, Cargo cargo, uint64_t epoch, int source) {
    return words_in(r.layout, cargo, r.window(r.rank), epoch, source);
}

EP_DEVICE Slots slots_from(const Round &r, Cargo cargo, uint64_t epoch, int source) {
    char *box = box_of(r, r.far.inbox, cargo, source);
    return box == nullptr ? slots_here(r, cargo, epoch, source) : slots_in_box(r, cargo, box);
}
EP_DEVICE uint64_t *words_from(const Round &r, Cargo cargo, uint64_t epoch, int source) {
    char *box = box_of(r, r.far.inbox, cargo, source);
    return box == nullptr ? words_here(r, cargo, epoch, source) : reinterpret_cast<uint64_t *>(box);
}

// What is behind the Signal in one of them.
EP_DEVICE char *body_of(Cargo cargo, char *slot) {
    return slot + (cargo == Cargo::kPartials ? Layout::kLineBytes : kHeadFlagBytes);
}

}  // namespace ep::EP_DEVICE_NAMESPACE
