// What the host may launch. No device code: the core includes this, and each backend fills one
// Kernels from the same kernel sources.
#pragma once

#include "device/queue.h"
#include "wire/boxes.h"
#include "wire/layout.h"

namespace ep {

// What a wait for a peer is for; MEP_WAIT_* of the header.
enum class Awaited : int32_t {
    kCounts = 1,
    kRows,
    kWeights,
    kSums,
    kBegin,
    kFence,
    kExchange,  // by an engine
};

// Why a peer was masked.
struct Incident {
    uint64_t number;  // from 1 on; written last
    uint64_t epoch, waited_ns;
    int32_t peer;
    Awaited awaited;
    int32_t broke_limit;  // it did not come late
    int32_t reserved;
};

// One per buffer, in device memory; the kernels advance the epochs, so that a launch may be
// replayed.
struct BufferState {
    uint64_t dispatch_tickets, combine_tickets;  // kTicketsOfRound for each round sent
    uint64_t invalid_expert_ids, invalid_messages;
    uint64_t timeout_ns;  // of rounds that bring none; the host may change it at any time

    uint64_t receive_tickets;  // the same of launches that only receive a dispatch, for themselves
    int32_t repairs;           // 1: a block of the launch has taken on to leave out what was lost
    int32_t reserved;

    static constexpr int kIncidentsKept = 64;
    uint64_t incident_count;
    Incident incidents[kIncidentsKept];  // the newest: number n at (n - 1) % kIncidentsKept

    // The blocks of the launch that sends a round hand in so many together, each at its end: until
    // the last has, the quotient is the epoch of the round before, for whoever looks.
    static constexpr uint64_t kTicketsOfRound = uint64_t{1} << 16;
};

// What a buffer counts for each peer. A row is a token at one of its experts.
struct PeerCounts {
    uint64_t rows_sent, rows_received;
    uint64_t waited_ns;  // for its counts and its begin of a combine
};

// How far a peer is, as this rank knows, in each operation: dispatch, then combine.
struct Pace {
    uint64_t begun[2];     // the last round that it is known to have begun
    uint64_t standing[2];  // Signal: a Standing, in the last round that this rank has begun
    uint64_t unweighted;   // the last combine of which weights were held back from it
};

struct HandleState {
    uint64_t dispatch_epoch, combine_epoch;  // of the handle's last round of each
};

// What a handle remembers of its dispatch, in device memory. "Slots" are [source][token].
struct Routing {
    // A choice: an expert's id, kNoChoice, or repeat_of(id) if the token named it before.
    static constexpr int32_t kNoChoice = -1;
    EP_HOST_DEVICE static int32_t repeat_of(int32_t expert) { return -2 - expert; }

    HandleState *state;
    int32_t *choices;  // [token][topk]  of this rank's tokens
    int32_t
        *positions;  // [token][topk]  rank of the choice among this rank's tokens for that expert
    uint64_t *token_counts;  // [source]  Signal: tokens of each rank; 0 for a masked one
    uint64_t *begins;     // [local expert][source + 1]  Signal: first row of each source; the end
    int32_t *row_counts;  // [slot]  distinct local experts of a token
    int32_t *rows;   // [slot][topk_max]  their rows, counted over all experts' regions; -1: none
    float *weights;  // [slot][topk_max]  their weights
    uint64_t *lost;  // [source]  the last round of which a message did not come
};

// Which half of an operation a launch does.
enum class Phases : int32_t { kSend = 1, kReceive = 2, kBoth = 3 };

EP_HOST_DEVICE constexpr bool has_phase(Phases phases, Phases one) {
    return (static_cast<int32_t>(phases) & static_cast<int32_t>(one)) != 0;
}

// Division of what is below 2^24 by what the host knows, without dividing.
struct Divisor {
    static constexpr int kBits = 40;

    int32_t value;
    uint64_t inverse;  // times 2^kBits, rounded up

    static Divisor of(int value) { return {value, ((uint64_t{1} << kBits) + value - 1) / value}; }
    EP_HOST_DEVICE int quotient(int n) const { return static_cast<int>(n * inverse >> kBits); }
    EP_HOST_DEVICE int rest(int n) const { return n - quotient(n) * value; }
};

// What any round knows.
struct Round {
    Layout layout;
    int rank;
    // [rank] each rank's window, as mapped here. Not in the arguments, as an update of the group
    // changes them, and graphs are to find that.
    char *const *windows;
    BufferState *state;
    Routing routing;
    const int32_t *members;   // [rank] 0: not in the group now
    int32_t *active;          // [rank] 1: takes part; a peer that misses the deadline gets 0
    Pace *paces;              // [rank]
    PeerCounts *peer_counts;  // [rank]
    uint64_t *expert_rows;    // [local expert]  received
    uint64_t timeout_ns;      // kNever: wait for ever; kOfBuffer: BufferState's
    int token_count;          // of this rank
    int topk;  // K of the dispatch, the stride of the caller's topk arrays and of choices
    int hidden;
    Caching caching;  // of rows
    Far far;

    // Of the launch, filled in by its launcher; see Role.
    Phases phases;
    int sender_block_count, receiver_block_count;
    int choice_bits;  // that tell apart the experts and what is none
    // By flag: chunks of this rank's tokens, each counted, numbered and sent by a block; of any
    // rank's.
    int chunk_count, chunk_count_max;
    // By line: receivers beside each other that share a chunk, parts of a row, experts of a rank.
    int receivers_of_chunk;
    Divisor parts, local_experts;

    EP_HOST_DEVICE char *window(int of_rank) const { return windows[of_rank]; }
    EP_HOST_DEVICE bool sends() const { return has_phase(phases, Phases::kSend); }
    EP_HOST_DEVICE bool receives() const { return has_phase(phases, Phases::kReceive); }

    static constexpr uint64_t kNever = ~uint64_t{0}, kOfBuffer = 0;
};

// A strided float array of scales, [expert][row][group]; strides in elements.
struct Scales {
    float *data;
    int64_t expert_stride, row_stride, group_stride;
};

enum class Quant : int32_t { kNone, kFp8, kFp8Pow2 };

struct DispatchArgs {
    Round round;
    int32_t *tally;  // scratch [tally_row_count(chunks)][E]
    const void *topk_idx;
    int topk_idx_bytes;         // 4 or 8
    const float *topk_weights;  // nullptr: all 1
    const char *x;
    size_t x_stride;  // bytes from token to token
    Element x_type;
    Scales x_scales;  // expert_stride unused
    Quant quant;
    char *out_x;
    Scales out_scales;
    int32_t *out_count;
    int32_t *out_src_info;      // or nullptr
    int64_t *out_layout_range;  // or nullptr

    EP_HOST_DEVICE Element out_type() const {
        return quant == Quant::kNone ? x_type : Element::kFp8;
    }
};

struct CombineArgs {
    Round round;
    Element x_type;
    bool fp32_partials;
    const char *x;
    const float *topk_weights;  // nullptr: those of the dispatch
    char *out;
    size_t out_stride;      // bytes from token to token
    bool weights_are_sent;  // by a launch before
};

// One word to each window that is not nullptr, at this rank's place.
struct KnockArgs {
    static constexpr uint64_t kWord = 0x6b6e6f636b;

    char *const *windows;  // [rank_count], as mapped here; in device memory
    int rank, rank_count;
};

struct ParcelHead {
    uint64_t epoch;
    Cargo cargo;
    int32_t token_count;  // that records may be of
    int32_t record_count;
    int32_t reserved[3];
};

// Parcels for far peers, and from them; see kernels/parcels.h.
struct ParcelArgs {
    static constexpr size_t kRecordHeadBytes = 16;

    Round round;
    Cargo cargo;
    size_t body_bytes;     // of a record, a multiple of 16
    char *const *parcels;  // [rank]
    uint64_t *sizes;       // [rank] in bytes

    EP_HOST_DEVICE size_t record_bytes() const { return kRecordHeadBytes + body_bytes; }
    EP_HOST_DEVICE size_t first_record() const {
        constexpr size_t kAlignment = 16;
        const size_t counts = cargo == Cargo::kMessages
                                  ? sizeof(int32_t) * round.layout.local_expert_count
                                  : size_t{0};
        return sizeof(ParcelHead) + (counts + kAlignment - 1) / kAlignment * kAlignment;
    }
    EP_HOST_DEVICE char *record(char *parcel, int index) const {
        return parcel + first_record() + index * record_bytes();
    }
    EP_HOST_DEVICE size_t bytes(int record_count) const {
        return first_record() + record_count * record_bytes();
    }
};

// What has come into boxes of the inbox, to its places in the window; see kernels/deliver.h.
struct DeliverArgs {
    Round round;
    Cargo cargo;
    size_t body_bytes;  // behind a Signal
};

// What the host watches the exchanges of a buffer by, in host memory that the device reaches; see
// kernels/watch.h.
struct Watch {
    uint64_t begun, done;  // exchanges
    uint64_t timeout_ns;   // of the last one begun; not Round::kOfBuffer
    uint64_t failed;       // 1: the host has given up
};
struct WatchState {  // in device memory, where reading takes less time
    uint64_t begun;
};

struct WatchArgs {
    Round round;
    Cargo cargo;
    Watch *watch;
    WatchState *state;
    bool ends;  // or begins
};

// Rows of DispatchArgs::tally for launches of at most so many chunks: each chunk's counts, then,
// for blocks whose shared memory is too small, each chunk's next numbers, and the counter's.
constexpr int tally_row_count(int chunk_count) {
    return 2 * chunk_count + 1;
}

// Each returns 0 or the device runtime's error.
struct Kernels {
    int (*chunk_count_max)(const Queue &queue);
    int (*dispatch)(DispatchArgs args, Phases phases, const Queue &queue);
    int (*combine)(CombineArgs args, Phases phases, const Queue &queue);
    bool (*suits_lines)(const Shape &shape);  // may its messages go by line?
    int (*knock)(const KnockArgs &args, const Queue &queue);
    int (*combine_weights)(CombineArgs args, const Queue &queue);  // that launch of combine alone
    int (*pack)(const ParcelArgs &args, const Queue &queue);
    int (*place)(const ParcelArgs &args, const Queue &queue);
    int (*deliver)(const DeliverArgs &args, const Queue &queue);
    int (*watch)(const WatchArgs &args, const Queue &queue);
};

}  // namespace ep
