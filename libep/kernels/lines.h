// Messages by line: each line of 128 bytes carries 7 pieces of 16 bytes, and after them a Signal
// and 8 bytes more (wire/layout.h). Eight lanes move a line, one piece each; a warp moves a part of
// a row, so the warps of many blocks share one message. No fence, no barrier and no flag of its
// own.
#pragma once

#include "device/device.h"
#include "kernels/cast.h"
#include "kernels/kernels.h"
#include "kernels/routing.h"

namespace ep::EP_DEVICE_NAMESPACE {

constexpr int kLanesOfLine = 8;
constexpr int kLinesAtOnce = kWarpSize < kLanesOfLine ? 1 : kWarpSize / kLanesOfLine;

// Lines of a part, which a warp moves at a time.
constexpr int kPartLines = 8;

constexpr int kLineRankCountMax = 64;
constexpr int kWeightsOfPiece = static_cast<int>(Layout::kPieceBytes / sizeof(float));
constexpr int kWeightsOfLine = Layout::kPiecesOfLine * kWeightsOfPiece;

// This lane's place among the lines that its warp moves at once.
struct LineLane {
    EP_DEVICE static int line() { return Warp::rank() / kLanesOfLine; }
    EP_DEVICE static int piece() { return Warp::rank() % kLanesOfLine; }
    EP_DEVICE static bool has_signal() { return piece() == Layout::kPiecesOfLine; }
};

// Do messages of such a buffer go by line, where the link delivers lines? Small ones are fast so;
// large ones would pay for the Signals in them. Each block counts by itself in the memory that it
// shares, and a warp moves a head at once.
inline bool suits_lines(const Shape &shape) {
    return shape.token_count_max <= kLineTokenCountMax &&
           shape.token_count_max * shape.topk_max <= kLineChoiceCountMax &&
           shape.topk_max <= kLinesAtOnce * Layout::kPiecesOfLine &&
           shape.topk_max <= kWeightsOfLine && shape.expert_count <= kSharedExpertCountMax &&
           shape.rank_count <= kLineRankCountMax;
}

// One part of a row, in the lanes of a warp.
struct Part {
    static constexpr int kLines = kPartLines;
    static constexpr int kSteps = kLines < kLinesAtOnce ? 1 : kLines / kLinesAtOnce;
    static constexpr int kPieces = kLines * Layout::kPiecesOfLine;
    static constexpr int kBytes = kPieces * static_cast<int>(Layout::kPieceBytes);

    int index, line_count;  // lines of the whole row

    EP_DEVICE Part(int part_index, size_t row_bytes)
        : index(part_index), line_count(Layout::signal_lines(row_bytes)) {}

    EP_HOST_DEVICE static int count(size_t row_bytes) {
        return (Layout::signal_lines(row_bytes) + kLines - 1) / kLines;
    }

    EP_DEVICE int line(int step) const {
        return index * kLines + step * kLinesAtOnce + LineLane::line();
    }
    EP_DEVICE bool has_line(int step) const {
        return step * kLinesAtOnce + LineLane::line() < kLines && line(step) < line_count;
    }
    // The piece of the row that this lane moves; none if it is outside the row.
    EP_DEVICE int piece(int step) const {
        return line(step) * Layout::kPiecesOfLine + LineLane::piece();
    }
    EP_DEVICE bool has_piece(int step, size_t row_bytes) const {
        return has_line(step) && !LineLane::has_signal() &&
               piece(step) * Layout::kPieceBytes < row_bytes;
    }
    EP_DEVICE char *at(char *lines, int step) const {
        return lines + line(step) * Layout::kLineBytes + LineLane::piece() * Layout::kPieceBytes;
    }
};

// Blocks for so many parts, as far as there are so many: a block then has one for each of its warps
// that run at the same time.
inline int blocks_for(int64_t part_count, int most) {
    constexpr int kPartsOfBlock = kWarpsOfBlockMax < 4 ? kWarpsOfBlockMax : 4;
    const int64_t blocks = (part_count + kPartsOfBlock - 1) / kPartsOfBlock;
    return static_cast<int>(blocks < 1 || most < 1 ? 1 : blocks < most ? blocks : most);
}

// The blocks that send rows, of those that have a multiprocessor each: few fill a link.
inline int wide_sender_block_count_max(const Queue &queue) {
    constexpr int kProcessorsOfSender = 8;
    return (queue.block_count + kProcessorsOfSender - 1) / kProcessorsOfSender;
}

// What the lanes of a warp hold of a part.
struct Pieces {
    Vector step[Part::kSteps];
};

EP_DEVICE void push_part(const Part &part, char *lines, const Pieces &pieces, uint64_t signal) {
    EP_UNROLL
    for (int step = 0; step < Part::kSteps; ++step) {
        Vector piece = pieces.step[step];
        if (LineLane::has_signal()) piece.words[0] = signal;
        push(part.at(lines, step), part.has_line(step), LineLane::has_signal(), piece);
    }
}

// Looks for a part; true when all of it has come.
EP_DEVICE bool pull_part(const Part &part, char *lines, uint64_t epoch, Pieces *pieces) {
    const char *at[Part::kSteps];
    bool here[Part::kSteps];
    EP_UNROLL
    for (int step = 0; step < Part::kSteps; ++step) {
        at[step] = part.at(lines, step);
        here[step] = part.has_line(step);
    }
    return pull(at, here, LineLane::has_signal(), epoch, pieces->step);
}

// The groups of channels whose scales travel with a line of an FP8 row: those that begin in it, or
// before it. A line is shorter than a group, so there are at most two.
struct LineGroups {
    int first, last;
    bool first_begins;

    EP_DEVICE static LineGroups of(int line) {
        constexpr int kChannels = Layout::kPiecesOfLine * static_cast<int>(Layout::kPieceBytes);
        const int channel = line * kChannels;
        return {channel / kScaleGroup, (channel + kChannels - 1) / kScaleGroup,
                channel % kScaleGroup == 0};
    }
};

struct TwoScales {
    float first, last;
};

// This lane's pieces of a row that travels as it is.
EP_DEVICE void load_part(const Part &part, const char *row, size_t row_bytes, Pieces *pieces) {
    EP_UNROLL
    for (int step = 0; step < Part::kSteps; ++step)
        if (part.has_piece(step, row_bytes))
            pieces->step[step] =
                pass_load_constant(reinterpret_cast<const Vector *>(row) + part.piece(step));
}

// The scales of a row that comes with them, where they travel.
EP_DEVICE void load_part_scales(const Part &part, const float *scales, int64_t stride, int groups,
                                Pieces *pieces) {
    EP_UNROLL
    for (int step = 0; step < Part::kSteps; ++step) {
        if (!LineLane::has_signal() || !part.has_line(step)) continue;
        const LineGroups at = LineGroups::of(part.line(step));
        const int last = at.last < groups ? at.last : at.first;
        pieces->step[step].words[1] =
            bit_cast<uint64_t>(TwoScales{scales[at.first * stride], scales[last * stride]});
    }
}

// A part of a row that is cast on the way, as it was read: each lane has 16 channels of a group at
// each step. A part holds whole groups.
template <Element kType>
struct UncastPart {
    static constexpr int kChannels = static_cast<int>(Layout::kPieceBytes);
    static constexpr int kPieces = Part::kPieces, kPartBytes = Part::kBytes;
    static constexpr int kSteps = (kPieces + kWarpSize - 1) / kWarpSize;
    static_assert(kPartBytes % kScaleGroup == 0, "whole groups");
    Channels<kType, 1> steps[kSteps];

    EP_DEVICE static UncastPart of(const Part &part, const char *row, int hidden) {
        UncastPart read;
        EP_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            const int piece = step * kWarpSize + Warp::rank();
            const int channel = part.index * kPartBytes + piece * kChannels;
            read.steps[step] =
                Channels<kType, 1>::of(row, channel, piece < kPieces && channel < hidden);
        }
        return read;
    }
};

// Casts a part to float8_e4m3fn, and moves its pieces from lane to lane to where they travel.
template <Element kType>
EP_DEVICE void cast_part(const Part &part, const UncastPart<kType> &read, bool power_of_two,
                         Pieces *pieces) {
    using Uncast = UncastPart<kType>;
    constexpr int kLanesOfGroup = kScaleGroup / Uncast::kChannels;
    Cast<1> cast[Uncast::kSteps];
    EP_UNROLL
    for (int step = 0; step < Uncast::kSteps; ++step)
        cast[step] = cast_channels<kLanesOfGroup>(read.steps[step], power_of_two);
    EP_UNROLL
    for (int to = 0; to < Part::kSteps; ++to) {
        const int piece = part.piece(to) - part.index * Uncast::kPieces;
        const LineGroups at = LineGroups::of(part.line(to) - part.index * Part::kLines);
        Vector found{};
        TwoScales two{};
        EP_UNROLL
        for (int step = 0; step < Uncast::kSteps; ++step) {
            const Vector one = {{Warp::from(cast[step].pieces[0].words[0], piece % kWarpSize),
                                 Warp::from(cast[step].pieces[0].words[1], piece % kWarpSize)}};
            const int first = at.first * kLanesOfGroup, last = at.last * kLanesOfGroup;
            const float first_scale = Warp::from(cast[step].scale, first % kWarpSize);
            const float last_scale = Warp::from(cast[step].scale, last % kWarpSize);
            if (piece / kWarpSize == step) found = one;
            if (first / kWarpSize == step) two.first = first_scale;
            if (last / kWarpSize == step) two.last = last_scale;
        }
        if (LineLane::has_signal()) found.words[1] = bit_cast<uint64_t>(two);
        pieces->step[to] = found;
    }
}

// Writes a part to one place of its row, and the scales that begin in it.
template <bool kScales>
EP_DEVICE void place_part(const Part &part, const Pieces &pieces, size_t row_bytes,
                          const Target &to, int groups) {
    EP_UNROLL
    for (int step = 0; step < Part::kSteps; ++step) {
        if (part.has_piece(step, row_bytes))
            reinterpret_cast<Vector *>(to.row)[part.piece(step)] = pieces.step[step];
        if constexpr (kScales) {
            if (!LineLane::has_signal() || !part.has_line(step)) continue;
            const LineGroups at = LineGroups::of(part.line(step));
            const auto two = bit_cast<TwoScales>(pieces.step[step].words[1]);
            if (at.first_begins) to.scales[at.first * to.scale_stride] = two.first;
            if (at.last != at.first && at.last < groups)
                to.scales[at.last * to.scale_stride] = two.last;
        }
    }
}

}  // namespace ep::EP_DEVICE_NAMESPACE
