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

// How many lines a part has, kLines below: few while there are warps for more parts, each of which
// then ends sooner. Where kLines may be 0, that is a message by flag.
constexpr int kPartLinesMin = 8, kPartLinesMax = 16;

// This lane's place among the lines that its warp moves at once.
struct LineLane {
    EP_DEVICE static int line() { return Warp::rank() / kLanesOfLine; }
    EP_DEVICE static int piece() { return Warp::rank() % kLanesOfLine; }
    EP_DEVICE static bool has_signal() { return piece() == Layout::kPiecesOfLine; }
};

// Do messages of such a buffer go by line, where the link delivers lines? Small ones are fast so;
// large ones would pay for the Signals in them. Each block counts by itself, and a warp moves a
// head at once.
inline bool suits_lines(const Shape &shape) {
    return shape.token_count_max <= kLineTokenCountMax &&
           shape.token_count_max * shape.topk_max <= kChoicesCountedByAllMax &&
           shape.topk_max <= kLinesAtOnce * Layout::kPiecesOfLine;
}

// One part of a row, in the lanes of a warp.
template <int kLines>
struct Part {
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

// Into how many parts a row is split; 1 by flag.
template <int kLines>
EP_HOST_DEVICE inline int part_count_of(size_t row_bytes) {
    if constexpr (kLines == 0)
        return 1;
    else
        return Part<kLines>::count(row_bytes);
}

// What the lanes of a warp hold of a part.
template <int kLines>
struct Pieces {
    Vector step[Part<kLines>::kSteps];
};

template <int kLines>
EP_DEVICE void push_part(const Part<kLines> &part, char *lines, const Pieces<kLines> &pieces,
                         uint64_t signal) {
    EP_UNROLL
    for (int step = 0; step < Part<kLines>::kSteps; ++step) {
        Vector piece = pieces.step[step];
        if (LineLane::has_signal()) piece.words[0] = signal;
        push(part.at(lines, step), part.has_line(step), LineLane::has_signal(), piece);
    }
}

// What has come of a part.
template <int kLines>
struct PartArrival {
    Pieces<kLines> pieces;
    bool steps[Part<kLines>::kSteps] = {};

    // Looks once more; true when all has come.
    EP_DEVICE bool pull_rest(const Part<kLines> &part, char *lines, uint64_t epoch) {
        bool all = true;
        EP_UNROLL
        for (int step = 0; step < Part<kLines>::kSteps; ++step) {
            if (!steps[step])
                steps[step] = pull(part.at(lines, step), part.has_line(step),
                                   LineLane::has_signal(), epoch, &pieces.step[step]);
            all = all && steps[step];
        }
        return all;
    }
};

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
template <int kLines>
EP_DEVICE void load_part(const Part<kLines> &part, const char *row, size_t row_bytes,
                         Pieces<kLines> *pieces) {
    EP_UNROLL
    for (int step = 0; step < Part<kLines>::kSteps; ++step)
        if (part.has_piece(step, row_bytes))
            pieces->step[step] = reinterpret_cast<const Vector *>(row)[part.piece(step)];
}

// The scales of a row that comes with them, where they travel.
template <int kLines>
EP_DEVICE void load_part_scales(const Part<kLines> &part, const float *scales, int64_t stride,
                                int groups, Pieces<kLines> *pieces) {
    EP_UNROLL
    for (int step = 0; step < Part<kLines>::kSteps; ++step) {
        if (!LineLane::has_signal() || !part.has_line(step)) continue;
        const LineGroups at = LineGroups::of(part.line(step));
        const int last = at.last < groups ? at.last : at.first;
        pieces->step[step].words[1] =
            bit_cast<uint64_t>(TwoScales{scales[at.first * stride], scales[last * stride]});
    }
}

// Casts a part of a row to float8_e4m3fn: first each lane 16 channels of a group, then from lane to
// lane to where they travel. A part holds whole groups.
template <Element kType, int kLines>
EP_DEVICE void cast_part(const Part<kLines> &part, const char *row, int hidden, bool power_of_two,
                         Pieces<kLines> *pieces) {
    constexpr int kChannels = static_cast<int>(Layout::kPieceBytes);
    constexpr int kLanesOfGroup = kScaleGroup / kChannels;
    constexpr int kPieces = Part<kLines>::kPieces, kPartBytes = Part<kLines>::kBytes;
    constexpr int kSteps = (kPieces + kWarpSize - 1) / kWarpSize;
    static_assert(kPartBytes % kScaleGroup == 0, "whole groups");
    Cast<1> cast[kSteps];
    EP_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        const int piece = step * kWarpSize + Warp::rank();
        const int channel = part.index * kPartBytes + piece * kChannels;
        const bool inside = piece < kPieces && channel < hidden;
        cast[step] = cast_channels<kType, kLanesOfGroup, 1>(row, channel, inside, power_of_two);
    }
    EP_UNROLL
    for (int to = 0; to < Part<kLines>::kSteps; ++to) {
        const int piece = part.piece(to) - part.index * kPieces;
        const LineGroups at = LineGroups::of(part.line(to) - part.index * kLines);
        Vector found{};
        TwoScales two{};
        EP_UNROLL
        for (int step = 0; step < kSteps; ++step) {
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
template <bool kScales, int kLines>
EP_DEVICE void place_part(const Part<kLines> &part, const Pieces<kLines> &pieces, size_t row_bytes,
                          const Target &to, int groups) {
    EP_UNROLL
    for (int step = 0; step < Part<kLines>::kSteps; ++step) {
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
