// What tests write into windows, by flag or by line: of a hostile rank, random words, and words
// that look right but are not, of this round and of others; and nothing where something has come.
#pragma once

#include "wire/layout.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>

namespace ep::test {

// A message of a dispatch.
struct SentMessage {
    int from, to, token;
    uint64_t epoch;
    size_t row_bytes;  // without scales
};

// Takes one that has come, or a part of it, out of the window of its receiver, as if its rank had
// died before it sent that.
inline void lose_message(const Layout &layout, char *window, const SentMessage &sent,
                         uint64_t draw) {
    char *message = layout.message(window, sent.epoch, sent.to, sent.from, sent.token);
    if (layout.shape.carriage == Carriage::kFlag) {
        *Layout::flag(message) = 0;
        return;
    }
    const auto signal = [](char *line) {
        return reinterpret_cast<uint64_t *>(line + Layout::kPiecesOfLine * Layout::kPieceBytes);
    };
    const size_t lines = Layout::signal_lines(sent.row_bytes);
    if (draw % 2 == 0 && Signal::value(*signal(message)) > 0)  // it has a row
        *signal(layout.payload(message) + draw / 2 % lines * Layout::kLineBytes) = 0;
    else
        *signal(message) = 0;
}

class Pen {
  public:
    struct Ranks {
        int victim, hostile;
    };

    // `window`: the victim's, mapped here, or a copy of it.
    Pen(const Layout &layout, char *window, Ranks ranks, uint64_t seed)
        : layout_(layout), window_(window), ranks_(ranks), random_(seed) {}

    // Anything, anywhere, also in the name of others.
    void scribble(uint64_t epoch) {
        if (draw(2) == 0)
            smear();
        else
            forge(near(epoch), int(draw(layout_.shape.rank_count)));
    }

    // Everything that the hostile rank owes to its victim, so that it is not waited for in vain.
    void pretend(uint64_t epoch) {
        constexpr int kStrokes = 8;
        const int source = ranks_.hostile;
        for (int i = 0; i < kStrokes; ++i)
            forge(near(epoch), source);
        for (int index = 0; index <= layout_.local_expert_count; ++index)
            put(layout_.count(window_, epoch, source, index), epoch, number(tokens_max()));
        put(layout_.arrival(window_, epoch, source), epoch, 0);
        for (int token = 0; token < tokens_max(); ++token) {
            write_message(epoch, source, token);
            write_weight(epoch, source, token);
            write_partial(epoch, source, token);
        }
    }

  private:
    bool by_line() const { return layout_.shape.carriage == Carriage::kLine; }
    int tokens_max() const { return layout_.shape.token_count_max; }
    uint64_t draw(uint64_t below) { return random_() % below; }

    // Up to a limit, or beyond it now and then.
    uint32_t number(int limit) {
        constexpr uint32_t kMost = (1U << Signal::kValueBits) - 1;
        if (draw(8) == 0) return draw(2) == 0 ? kMost : uint32_t(limit + 1);
        return uint32_t(draw(limit + 1));
    }
    // Near a limit more often than not.
    int32_t strange_number() {
        const int32_t extremes[] = {INT32_MAX, INT32_MIN, -1, 1 << 30};
        return draw(4) == 0 ? extremes[draw(std::size(extremes))] : int32_t(draw(8));
    }
    uint64_t near(uint64_t epoch) {
        const uint64_t slots = layout_.shape.slot_count;
        const uint64_t others[] = {epoch - 1,     epoch + 1,     epoch + 2,
                                   epoch + slots, epoch - slots, random_()};
        return draw(2) == 0 ? epoch : others[draw(std::size(others))];
    }

    static void store(uint64_t *word, uint64_t value) {
        __atomic_store_n(word, value, __ATOMIC_RELEASE);
    }
    static void put(uint64_t *word, uint64_t epoch, uint32_t value) {
        store(word, Signal::pack(epoch, value));
    }

    // Random words in a row; now and then to the end of the window.
    void smear() {
        auto *words = reinterpret_cast<uint64_t *>(window_);
        const size_t all = layout_.bytes / sizeof(uint64_t), first = draw(all);
        const size_t end = draw(64) == 0 ? all : std::min<size_t>(all, first + 1 + draw(40));
        for (size_t i = first; i < end; ++i)
            store(&words[i], random_());
    }

    // A word or a message that says it is of `source` and of this round.
    void forge(uint64_t epoch, int source) {
        const int token = int(draw(tokens_max())), expert = int(draw(layout_.local_expert_count));
        constexpr int kWords = 3, kKinds = 6;
        // In the name of the victim itself there are no boxes.
        switch (draw(source == ranks_.victim ? kWords : kKinds)) {
            case 0:
                put(layout_.count(window_, epoch, source, expert), epoch, number(tokens_max()));
                break;
            case 1:
                put(layout_.token_count(window_, epoch, source), epoch, number(tokens_max()));
                break;
            case 2:
                put(layout_.arrival(window_, epoch, source), epoch, number(1));
                break;
            case 3:
                write_message(epoch, source, token);
                break;
            case 4:
                write_weight(epoch, source, token);
                break;
            default:
                write_partial(epoch, source, token);
        }
    }

    void write_message(uint64_t epoch, int source, int token) {
        constexpr int kAgain = 8;  // while it is read
        char *message = layout_.message(window_, epoch, ranks_.victim, source, token);
        write_entries(message);
        publish(message, layout_.message_bytes, epoch, number(layout_.shape.topk_max));
        for (int i = 0; i < kAgain; ++i)
            write_entries(message);
    }
    void write_entries(char *message) {
        for (int i = 0; i < layout_.shape.topk_max; ++i) {
            const Entry entry{strange_number(), strange_number(), 1, 0};
            const size_t at = by_line() ? i / Layout::kPiecesOfLine * Layout::kLineBytes +
                                              i % Layout::kPiecesOfLine * Layout::kPieceBytes
                                        : kHeadFlagBytes + i * sizeof entry;
            std::memcpy(message + at, &entry, sizeof entry);
        }
    }
    void write_weight(uint64_t epoch, int source, int token) {
        char *weight = layout_.weight(window_, epoch, ranks_.victim, source, token);
        for (int i = 0; i < layout_.shape.topk_max; ++i) {
            const auto value = float(strange_number());
            std::memcpy(weight + (by_line() ? 0 : kHeadFlagBytes) + i * sizeof value, &value,
                        sizeof value);
        }
        publish(weight, by_line() ? Layout::kLineBytes : 0, epoch, number(1));
    }
    void write_partial(uint64_t epoch, int source, int token) {
        publish(layout_.partial(window_, epoch, ranks_.victim, source, token),
                layout_.partial_bytes, epoch, number(1));
    }

    // By line, in each line of `bytes`.
    void publish(char *from, size_t bytes, uint64_t epoch, uint32_t value) {
        if (!by_line()) return put(Layout::flag(from), epoch, value);
        for (size_t line = 0; line < bytes; line += Layout::kLineBytes)
            put(Layout::flag(from + line + Layout::kPiecesOfLine * Layout::kPieceBytes), epoch,
                value);
    }

    const Layout layout_;
    char *const window_;
    const Ranks ranks_;
    std::mt19937_64 random_;
};

}  // namespace ep::test
