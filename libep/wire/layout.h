// Where everything is in a rank's window. The host, the kernels and the tests all ask this one
// struct, and it computes each offset exactly once.
//
// A window holds `slot_count` slots, a power of two; a round of epoch n uses slot n mod slot_count.
// Dispatch and combine have epochs, and so slots, of their own. In each slot:
//
//   counts    [source][local expert, then one for the token count]  Signal
//   messages  [box][token]  message.h
//   arrivals  [source]      Signal: the source has begun this combine
//   weights   [box][token]  Signal, then a float per entry of the token's dispatch message
//   partials  [box][token]  Signal, then the row
//
// and behind all slots
//
//   fences    [operation][source]  the epoch that the source has sent whole (kernels/fence.h); the
//                                  owner's own: the last that it has begun (kernels/routing.h)
//
// A box is a source other than the owner: a rank's own tokens never pass through its window.
//
// A message is carried in one of two ways, the same for all of a window:
//   by flag  the head's Signal is published after all the rest
//   by line  each line of 128 bytes carries 112 bytes of the message, and after them its own Signal
//            and 8 bytes more, so that whoever sees the Signal has the line; the head takes lines
//            of its own. For links that deliver a line whole.
#pragma once

#include "wire/message.h"
#include "wire/signal.h"

#include <cstddef>
#include <cstdint>

namespace ep {

enum class Carriage : int32_t { kFlag, kLine };

struct Shape {
    int rank_count;
    int expert_count;
    int token_count_max;
    int topk_max;
    int slot_count;            // rounded up by Layout::of
    size_t row_bytes_max;      // payload of a dispatch message, scales included
    size_t partial_bytes_max;  // payload of a combine row
    Carriage carriage = Carriage::kFlag;
};

struct Layout {
    static constexpr size_t kLineBytes = 128;  // of NVLink, L2 and two CPU cache lines
    static constexpr size_t kPieceBytes = 16;  // what a lane moves at once
    static constexpr int kPiecesOfLine = 7;    // of a line that carries its own Signal
    static constexpr int kOperations = 2;      // dispatch, combine

    Shape shape;
    int local_expert_count;
    size_t head_bytes, message_bytes, weight_bytes, partial_bytes;
    // Offsets: of each region in a slot, of the combine slots, and the end.
    size_t counts, messages, dispatch_slot_bytes;
    size_t arrivals, weights, partials, combine_slot_bytes;
    size_t combine_slots, fences, bytes;

    static constexpr size_t lines(size_t bytes) {
        return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
    }

    // How many lines with Signals carry so many bytes.
    EP_HOST_DEVICE static constexpr int signal_lines(size_t bytes) {
        constexpr size_t kBytes = kPiecesOfLine * kPieceBytes;
        return static_cast<int>((bytes + kBytes - 1) / kBytes);
    }

    static Layout of(const Shape &shape) {
        Layout l{};
        l.shape = shape;
        for (l.shape.slot_count = 1; l.shape.slot_count < shape.slot_count;)
            l.shape.slot_count *= 2;
        l.local_expert_count = shape.expert_count / shape.rank_count;
        if (shape.carriage == Carriage::kLine) {
            l.head_bytes = kLineBytes * signal_lines(sizeof(Entry) * shape.topk_max);
            l.message_bytes = l.head_bytes + kLineBytes * signal_lines(shape.row_bytes_max);
            l.partial_bytes = kLineBytes * signal_lines(shape.partial_bytes_max);
        } else {
            l.head_bytes = lines(kHeadFlagBytes + sizeof(Entry) * shape.topk_max);
            l.message_bytes = l.head_bytes + lines(shape.row_bytes_max);
            l.partial_bytes = kLineBytes + lines(shape.partial_bytes_max);
        }
        l.weight_bytes = lines(kHeadFlagBytes + sizeof(float) * shape.topk_max);
        const size_t boxed = size_t(shape.rank_count - 1) * shape.token_count_max;
        const auto carve = [](size_t *end, size_t bytes) {
            const size_t offset = *end;
            *end += lines(bytes);
            return offset;
        };
        l.counts = carve(&l.dispatch_slot_bytes,
                         sizeof(uint64_t) * shape.rank_count * (l.local_expert_count + 1));
        l.messages = carve(&l.dispatch_slot_bytes, l.message_bytes * boxed);
        l.arrivals = carve(&l.combine_slot_bytes, sizeof(uint64_t) * shape.rank_count);
        l.weights = carve(&l.combine_slot_bytes, l.weight_bytes * boxed);
        l.partials = carve(&l.combine_slot_bytes, l.partial_bytes * boxed);
        l.combine_slots = l.dispatch_slot_bytes * l.shape.slot_count;
        l.fences = l.combine_slots + l.combine_slot_bytes * l.shape.slot_count;
        l.bytes = l.fences + lines(sizeof(uint64_t) * kOperations * shape.rank_count);
        return l;
    }

    // The window of rank `owner`, mapped at `window`, in the round of `epoch`.
    EP_HOST_DEVICE uint64_t *count(char *window, uint64_t epoch, int source, int index) const {
        char *first = dispatch_slot(window, epoch) + counts;
        return word(first) + size_t(source) * (local_expert_count + 1) + index;
    }
    EP_HOST_DEVICE uint64_t *token_count(char *window, uint64_t epoch, int source) const {
        return count(window, epoch, source, local_expert_count);
    }
    EP_HOST_DEVICE char *message(char *window, uint64_t epoch, int owner, int source,
                                 int token) const {
        return dispatch_slot(window, epoch) + messages +
               index_in_boxes(owner, source, token) * message_bytes;
    }
    EP_HOST_DEVICE uint64_t *arrival(char *window, uint64_t epoch, int source) const {
        return word(combine_slot(window, epoch) + arrivals) + source;
    }
    EP_HOST_DEVICE char *weight(char *window, uint64_t epoch, int owner, int source,
                                int token) const {
        return combine_slot(window, epoch) + weights +
               index_in_boxes(owner, source, token) * weight_bytes;
    }
    EP_HOST_DEVICE char *partial(char *window, uint64_t epoch, int owner, int source,
                                 int token) const {
        return combine_slot(window, epoch) + partials +
               index_in_boxes(owner, source, token) * partial_bytes;
    }

    EP_HOST_DEVICE uint64_t *fence(char *window, int operation, int source) const {
        return word(window + fences) + operation * shape.rank_count + source;
    }

    // Inside a message, a weight or a partial; all but the payload and the weight only by flag.
    EP_HOST_DEVICE static uint64_t *flag(char *head) { return word(head); }
    EP_HOST_DEVICE static Entry *entries(char *message) {
        return reinterpret_cast<Entry *>(message + kHeadFlagBytes);
    }
    EP_HOST_DEVICE char *payload(char *message) const { return message + head_bytes; }
    EP_HOST_DEVICE static float *weight_values(char *weight) {
        return reinterpret_cast<float *>(weight + kHeadFlagBytes);
    }
    EP_HOST_DEVICE static char *partial_row(char *partial) { return partial + kLineBytes; }

  private:
    EP_HOST_DEVICE static uint64_t *word(char *at) { return reinterpret_cast<uint64_t *>(at); }
    EP_HOST_DEVICE size_t slot(uint64_t epoch) const { return epoch & (shape.slot_count - 1); }
    EP_HOST_DEVICE char *dispatch_slot(char *window, uint64_t epoch) const {
        return window + slot(epoch) * dispatch_slot_bytes;
    }
    EP_HOST_DEVICE char *combine_slot(char *window, uint64_t epoch) const {
        return window + combine_slots + slot(epoch) * combine_slot_bytes;
    }
    EP_HOST_DEVICE size_t index_in_boxes(int owner, int source, int token) const {
        return size_t(source - (source > owner)) * shape.token_count_max + token;
    }
};

}  // namespace ep
