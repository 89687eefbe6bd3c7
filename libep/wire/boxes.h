// Where everything is that an engine carries. A rank has an outbox, and where the engine fills
// device memory an inbox, both of this layout: for each kind of cargo a box per far peer, in their
// order. A box has one round's worth, whatever its epoch; see the window's layout (wire/layout.h).
//
//   messages  the counts of one source, then its messages by flag [token]
//   weights   [token]
//   partials  the arrival of one source, then its partials [token]
#pragma once

#include "wire/layout.h"

namespace ep {

// What is carried by an engine at once.
enum class Cargo : int32_t { kMessages, kWeights, kPartials };

struct Boxes {
    size_t messages, partials;  // offsets of the first of them in a box
    size_t box_bytes[3];        // of each Cargo
    size_t begins[4];           // offsets of the boxes of each Cargo, and the end

    static Boxes of(const Layout &layout, int peer_count) {
        Boxes b{};
        const size_t tokens = layout.shape.token_count_max;
        b.messages = Layout::lines(sizeof(uint64_t) * (layout.local_expert_count + 1));
        b.partials = Layout::kLineBytes;
        b.box_bytes[0] = b.messages + tokens * layout.message_bytes;
        b.box_bytes[1] = tokens * layout.weight_bytes;
        b.box_bytes[2] = b.partials + tokens * layout.partial_bytes;
        for (int cargo = 0; cargo < 3; ++cargo)
            b.begins[cargo + 1] = b.begins[cargo] + peer_count * b.box_bytes[cargo];
        return b;
    }

    EP_HOST_DEVICE size_t bytes() const { return begins[3]; }
    EP_HOST_DEVICE size_t bytes_of(Cargo cargo) const { return box_bytes[static_cast<int>(cargo)]; }
    // Of the index-th far peer.
    EP_HOST_DEVICE char *box(char *boxes, Cargo cargo, int index) const {
        return boxes + begins[static_cast<int>(cargo)] + index * bytes_of(cargo);
    }
};

// What a round knows of far peers: those whose window is not mapped here.
struct Far {
    const int32_t *box_of;  // [rank] the index of its boxes; kNear; nullptr: there are no far peers
    char *outbox;           // what goes to them
    char *inbox;            // what comes from them; nullptr: it comes into the window
    Boxes boxes;

    static constexpr int32_t kNear = -1;
};

}  // namespace ep
