// The engine over TCP: threads act as ranks. Where a rank is to break the rules, the test plays it
// by hand, over plain sockets.
#include "transport/engine.h"

#include "base/deadline.h"
#include "base/log.h"
#include "base/socket.h"
#include "base/status.h"
#include "core/bootstrap.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace ep {
namespace {

constexpr int64_t kPlentyUs = 20'000'000;  // of a wait that is to succeed, or to fail long before
constexpr int64_t kShortUs = 200'000;      // of a wait that is to reach its deadline
constexpr double kSlackSeconds = 3.0;      // sanitizers on a busy machine
constexpr size_t kBytesMax = 64 << 20;
constexpr const char *kAddress = "127.0.0.1";

using Clock = std::chrono::steady_clock;
using EnginePointer = std::unique_ptr<Engine>;
using BootstrapPointer = std::unique_ptr<Bootstrap>;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

int descriptor_count() {
    const std::filesystem::directory_iterator entries("/proc/self/fd");
    return static_cast<int>(std::distance(begin(entries), end(entries)));
}

void run_threads(int count, const std::function<void(int)> &body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i)
        threads.emplace_back(body, i);
    for (std::thread &thread : threads)
        thread.join();
}

// What a call left behind on the thread that made it.
struct Outcome {
    mep_status_t status = MEP_OK;
    std::string text;
    double elapsed = 0;

    bool names(const std::string &part) const { return text.find(part) != std::string::npos; }
};

std::ostream &operator<<(std::ostream &stream, const Outcome &outcome) {
    return stream << outcome.status << " \"" << outcome.text << "\" after " << outcome.elapsed
                  << " s";
}

Outcome observe(const std::function<mep_status_t()> &call) {
    const auto start = Clock::now();
    Outcome outcome;
    outcome.status = call();
    if (outcome.status != MEP_OK) outcome.text = last_error();
    outcome.elapsed = seconds_since(start);
    return outcome;
}

// What ranks say during set-up and in an exchange, as in engine_tcp.cc. That these copies are right
// is shown by the tests in which a played rank is accepted.
struct Secret {
    uint8_t bytes[32];
};
struct Invitation {
    int32_t present, status;
    uint32_t ipv4;
    uint32_t port;
    Secret secret;
    char text[256];
};
struct Hello {
    uint64_t magic;
    uint32_t protocol;
    int32_t rank;
    Secret secret;
};
struct Header {
    uint64_t magic;
    uint64_t sequence;
    uint64_t bytes;
};
constexpr uint64_t kHelloMagic = 0x4f4c4c4548544e45U;
constexpr uint64_t kHeaderMagic = 0x4c45435241504e45U;
constexpr uint32_t kProtocol = 1;

Endpoint endpoint_of(const Invitation &invitation) {
    return {invitation.ipv4, static_cast<uint16_t>(invitation.port)};
}

Descriptor connect(const Invitation &invitation) {
    Descriptor connected;
    EXPECT_EQ(connect_to(endpoint_of(invitation), Deadline(kPlentyUs), &connected), 0);
    return connected;
}

void say(const Descriptor &socket, const void *data, size_t size) {
    size_t count = 0;
    EXPECT_EQ(send_more(socket.number(), {{data, size}, {nullptr, 0}}, &count), 0);
    EXPECT_EQ(count, size);
}

// Reads until `size` bytes are there or the connection ends. Returns how many came.
size_t hear(const Descriptor &socket, void *data, size_t size) {
    const Deadline deadline(kPlentyUs);
    size_t count = 0;
    while (count < size && !deadline.passed()) {
        pollfd entry = {socket.number(), POLLIN, 0};
        wait_ready(&entry, 1, deadline, 1000);
        if (receive_more(socket.number(), data, size, &count) != 0) break;
    }
    return count;
}

bool hears_hello(const Descriptor &socket) {
    Hello hello = {};
    return hear(socket, &hello, sizeof hello) == sizeof hello && hello.magic == kHelloMagic;
}

// Each test also promises to leave no descriptor open. What is logged is kept for it.
class EngineByTcp : public testing::Test {
  protected:
    void SetUp() override {
        before_ = descriptor_count();
        set_log_callback(&EngineByTcp::keep_line, this, MEP_LOG_INFO);
    }
    void TearDown() override {
        set_log_callback(nullptr, nullptr, MEP_LOG_WARNING);
        EXPECT_EQ(descriptor_count(), before_) << "descriptors leaked";
    }

    // Whether a line has both parts.
    bool has_logged(const std::string &part, const std::string &other) {
        const std::lock_guard<std::mutex> lock(mutex_);
        return std::any_of(lines_.begin(), lines_.end(), [&](const std::string &line) {
            return line.find(part) != std::string::npos && line.find(other) != std::string::npos;
        });
    }

    size_t logged_count() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return lines_.size();
    }

  private:
    static void keep_line(void *context, int32_t, const char *message) {
        EngineByTcp &self = *static_cast<EngineByTcp *>(context);
        const std::lock_guard<std::mutex> lock(self.mutex_);
        self.lines_.emplace_back(message);
    }

    int before_ = 0;
    std::mutex mutex_;
    std::vector<std::string> lines_;
};

// Where the ranks of one engine meet.
class Place {
  public:
    explicit Place(int rank_count) : rank_count_(rank_count) {
        EXPECT_EQ(world_create(rank_count, &world_), MEP_OK);
        for (int rank = 0; rank < rank_count; ++rank) {
            bootstraps_.emplace_back();
            EXPECT_EQ(bootstrap_from_world({rank, rank_count}, world_, &bootstraps_.back()),
                      MEP_OK);
        }
    }
    ~Place() { world_destroy(world_); }

    mep_status_t gather(int rank, const void *send, void *receive, size_t bytes) {
        return bootstraps_[rank]->all_gather(send, receive, bytes, Deadline(kPlentyUs));
    }

    Outcome make(int rank, EnginePointer *engine, int64_t timeout_us = kPlentyUs,
                 const char *address = kAddress) {
        return observe([&] {
            return engine_by_tcp(
                rank, rank_count_, address,
                [&](const void *send, void *receive, size_t bytes) {
                    return gather(rank, send, receive, bytes);
                },
                Deadline(timeout_us), engine);
        });
    }

    // Takes part in the all-gather as `rank`, listening at `endpoint`.
    std::vector<Invitation> gather_by_hand(int rank, Endpoint endpoint, const Secret &secret) {
        const Invitation own = {1, MEP_OK, endpoint.ipv4, endpoint.port, secret, ""};
        std::vector<Invitation> all(rank_count_);
        EXPECT_EQ(gather(rank, &own, all.data(), sizeof own), MEP_OK);
        return all;
    }

  private:
    const int rank_count_;
    mep_world_t *world_ = nullptr;
    std::vector<BootstrapPointer> bootstraps_;
};

// The engines of all ranks.
std::vector<EnginePointer> make_engines(int rank_count) {
    Place place(rank_count);
    std::vector<EnginePointer> engines(rank_count);
    run_threads(rank_count, [&](int rank) {
        const Outcome outcome = place.make(rank, &engines[rank]);
        ASSERT_EQ(outcome.status, MEP_OK) << outcome;
    });
    return engines;
}

// What `from` sends to `to` in exchange number `round`.
Parcel pattern(int from, int to, int round, size_t bytes) {
    Parcel parcel(bytes);
    uint64_t word = static_cast<uint64_t>(from * 10'007 + to * 101 + round) * 0x9e3779b97f4a7c15U;
    for (size_t at = 0; at < bytes; at += sizeof word) {
        word = word * 6364136223846793005U + 1442695040888963407U;
        std::memcpy(&parcel[at], &word, std::min(sizeof word, bytes - at));
    }
    return parcel;
}

struct Exchanged {
    Outcome outcome;
    std::vector<bool> with;
    std::vector<Parcel> receive;
};

// One exchange of parcels of `bytes` bytes with the ranks in `with`.
Exchanged exchange(const EnginePointer &engine, int rank, std::vector<bool> with, size_t bytes,
                   int64_t timeout_us, size_t bytes_max = kBytesMax) {
    Exchanged done;
    done.with = std::move(with);
    std::vector<Parcel> send;
    for (size_t to = 0; to < done.with.size(); ++to)
        send.push_back(pattern(rank, static_cast<int>(to), 0, bytes));
    // What an earlier exchange has left there is to go.
    done.receive.assign(done.with.size(), Parcel(3, 'x'));
    done.outcome = observe([&] {
        return engine->exchange(send, bytes_max, Deadline(timeout_us), &done.with, &done.receive);
    });
    EXPECT_EQ(done.outcome.status, MEP_OK) << done.outcome;
    return done;
}

std::vector<bool> all_but(int rank_count, std::vector<int> without) {
    std::vector<bool> with(rank_count, true);
    for (const int rank : without)
        with[rank] = false;
    return with;
}

// That `rank` has exchanged parcels of `bytes` bytes with all but `without`, and nothing with
// these.
void expect_exchanged(const Exchanged &done, int rank, std::vector<int> without, size_t bytes) {
    std::vector<bool> with = done.with;
    with[rank] = true;  // its own says nothing
    const int rank_count = static_cast<int>(with.size());
    EXPECT_EQ(with, all_but(rank_count, without)) << "rank " << rank;
    for (int from = 0; from < rank_count; ++from) {
        const Parcel expected =
            from != rank && with[from] ? pattern(from, rank, 0, bytes) : Parcel();
        EXPECT_TRUE(done.receive[from] == expected) << "rank " << rank << " from " << from;
    }
}

// ---- The right bytes ----------------------------------------------------------------------------

class RankCounts : public EngineByTcp, public testing::WithParamInterface<int> {};

TEST_P(RankCounts, AllPairsGetTheRightBytes) {
    constexpr unsigned kSeed = 20261125;
    constexpr int kRoundCount = 5;
    constexpr size_t kHuge = 16 << 20;  // more than sockets hold, so that both ends have to read
    SCOPED_TRACE(kSeed);
    const int rank_count = GetParam();
    std::mt19937 random(kSeed);
    std::vector<size_t> sizes(kRoundCount * rank_count * rank_count);
    for (size_t &size : sizes) {
        const size_t choices[] = {0, 1, random() % 100, random() % 100'000, random() % 5'000'000};
        size = choices[random() % 5];
    }
    const auto size_of = [&](int round, int from, int to) {
        if (round == 1 && from + to == 1) return kHuge;
        return sizes[(round * rank_count + from) * rank_count + to];
    };
    const std::vector<EnginePointer> engines = make_engines(rank_count);
    run_threads(rank_count, [&](int rank) {
        std::vector<Parcel> receive;
        for (int round = 0; round < kRoundCount; ++round) {
            std::vector<Parcel> send;
            for (int to = 0; to < rank_count; ++to)
                send.push_back(pattern(rank, to, round, size_of(round, rank, to)));
            std::vector<bool> with(rank_count, true);
            ASSERT_EQ(engines[rank]->exchange(send, kHuge, Deadline(kPlentyUs), &with, &receive),
                      MEP_OK);
            EXPECT_EQ(with, all_but(rank_count, {})) << "round " << round;
            for (int from = 0; from < rank_count; ++from) {
                const size_t size = from == rank ? 0 : size_of(round, from, rank);
                EXPECT_TRUE(receive[from] == pattern(from, rank, round, size))
                    << "round " << round << ", from " << from << " to " << rank;
            }
        }
    });
    EXPECT_EQ(logged_count(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Engine, RankCounts, testing::Values(1, 2, 3, 5),
                         testing::PrintToStringParamName());

TEST_F(EngineByTcp, WrongArgumentsAreRefusedAndChangeNothing) {
    const std::vector<EnginePointer> engines = make_engines(2);
    std::vector<bool> with(3, true);
    std::vector<Parcel> receive;
    EXPECT_EQ(engines[0]->exchange(std::vector<Parcel>(2), 0, Deadline(0), &with, &receive),
              MEP_INVALID_ARGUMENT);
    run_threads(2, [&](int rank) {
        expect_exchanged(exchange(engines[rank], rank, all_but(2, {}), 10, kPlentyUs), rank, {},
                         10);
    });
}

// ---- Ranks that do not do their part ------------------------------------------------------------

TEST_F(EngineByTcp, ASilentRankIsTakenOutAtTheDeadlineAndForGood) {
    constexpr int kRankCount = 4;
    const std::vector<EnginePointer> engines = make_engines(kRankCount);
    run_threads(kRankCount, [&](int rank) {
        if (rank == 2) return;
        const Exchanged late = exchange(engines[rank], rank, all_but(4, {}), 1000, kShortUs);
        expect_exchanged(late, rank, {2}, 1000);
        EXPECT_LT(late.outcome.elapsed, kSlackSeconds);
        EXPECT_GE(late.outcome.elapsed, 0.9e-6 * kShortUs);
        for (int i = 0; i < 3; ++i) {
            const Exchanged later = exchange(engines[rank], rank, all_but(4, {}), i, kPlentyUs);
            expect_exchanged(later, rank, {2}, i);
            EXPECT_LT(later.outcome.elapsed, kSlackSeconds);
        }
        const std::string who = "rank " + std::to_string(rank) + " takes rank 2 of 4 out";
        EXPECT_TRUE(has_logged(who, "it did not send all within 0.2 s"));
    });
    EXPECT_EQ(logged_count(), 3U);
}

TEST_F(EngineByTcp, WithAllOthersDeadAnExchangeIsEmptyAndSucceeds) {
    std::vector<EnginePointer> engines = make_engines(3);
    engines[1].reset();
    engines[2].reset();
    for (int i = 0; i < 2; ++i) {
        const Exchanged done = exchange(engines[0], 0, all_but(3, {}), 10, kPlentyUs);
        expect_exchanged(done, 0, {1, 2}, 10);
        EXPECT_LT(done.outcome.elapsed, kSlackSeconds);
    }
}

TEST_F(EngineByTcp, ARankThatLeavesIsTakenOutLongBeforeTheDeadline) {
    constexpr int kRankCount = 4;
    constexpr size_t kBytes = 100'000;
    std::vector<EnginePointer> engines = make_engines(kRankCount);
    run_threads(kRankCount, [&](int rank) {
        const Exchanged first = exchange(engines[rank], rank, all_but(4, {}), kBytes, kPlentyUs);
        expect_exchanged(first, rank, {}, kBytes);
        if (rank == 1) {
            engines[rank].reset();
            return;
        }
        const Exchanged second = exchange(engines[rank], rank, all_but(4, {}), kBytes, kPlentyUs);
        expect_exchanged(second, rank, {1}, kBytes);
        EXPECT_LT(second.outcome.elapsed, kSlackSeconds);
    });
}

TEST_F(EngineByTcp, OnlyBytesMaxAreTakenFromARank) {
    constexpr size_t kMax = 1000;
    const std::vector<EnginePointer> engines = make_engines(3);
    run_threads(3, [&](int rank) {
        // Rank 1 sends a byte too many, to all. It sees that it is thrown out.
        const size_t bytes = rank == 1 ? kMax + 1 : kMax;
        const Exchanged done =
            exchange(engines[rank], rank, all_but(3, {}), bytes, kPlentyUs, kMax);
        if (rank != 1) {
            expect_exchanged(done, rank, {1}, kMax);
            EXPECT_EQ(done.receive[1].capacity(), 0U);
        }
        EXPECT_LT(done.outcome.elapsed, kSlackSeconds);
        const Exchanged next = exchange(engines[rank], rank, all_but(3, {}), 7, kPlentyUs, kMax);
        expect_exchanged(next, rank, rank == 1 ? std::vector<int>{0, 2} : std::vector<int>{1}, 7);
    });
    EXPECT_TRUE(has_logged("takes rank 1 of 3 out", "it sends 1001 bytes, of at most 1000"));
}

TEST_F(EngineByTcp, ARankLeftOutByTheCallerIsNeitherSentToNorAwaitedAndStaysOut) {
    const std::vector<EnginePointer> engines = make_engines(3);
    run_threads(2, [&](int rank) {
        const Exchanged done = exchange(engines[rank], rank, all_but(3, {2}), 50, kPlentyUs);
        expect_exchanged(done, rank, {2}, 50);
        EXPECT_LT(done.outcome.elapsed, kSlackSeconds);
        const Exchanged next = exchange(engines[rank], rank, all_but(3, {}), 60, kPlentyUs);
        expect_exchanged(next, rank, {2}, 60);
        EXPECT_LT(next.outcome.elapsed, kSlackSeconds);
    });
    EXPECT_EQ(logged_count(), 0U);  // it was the caller's will
    // Had they sent anything, it would be here.
    const Exchanged lonely = exchange(engines[2], 2, all_but(3, {}), 50, kPlentyUs);
    expect_exchanged(lonely, 2, {0, 1}, 50);
    EXPECT_LT(lonely.outcome.elapsed, kSlackSeconds);
}

// ---- Rank 1 of 2, played by hand ----------------------------------------------------------------

class PlayedByHand : public EngineByTcp {
  protected:
    void SetUp() override {
        EngineByTcp::SetUp();
        Place place(2);
        std::thread played([&] {
            const Secret secret = {{7}};
            const std::vector<Invitation> all = place.gather_by_hand(1, {}, secret);
            socket_ = connect(all[0]);
            const Hello hello = {kHelloMagic, kProtocol, 1, all[0].secret};
            say(socket_, &hello, sizeof hello);
            Hello answer = {};
            ASSERT_EQ(hear(socket_, &answer, sizeof answer), sizeof answer);
            EXPECT_EQ(answer.magic, kHelloMagic);
            EXPECT_EQ(answer.rank, 0);
            EXPECT_EQ(std::memcmp(&answer.secret, &secret, sizeof secret), 0);
        });
        const Outcome outcome = place.make(0, &engine_);
        played.join();
        ASSERT_EQ(outcome.status, MEP_OK) << outcome;
    }
    void TearDown() override {
        engine_.reset();
        socket_.close();
        EngineByTcp::TearDown();
    }

    void send_header(uint64_t magic, uint64_t sequence, uint64_t bytes) {
        const Header header = {magic, sequence, bytes};
        say(socket_, &header, sizeof header);
    }

    // That rank 0 throws rank 1 out in its next exchange, for `reason`.
    void expect_thrown_out(size_t bytes, int64_t timeout_us, const std::string &reason) {
        const Exchanged done = exchange(engine_, 0, all_but(2, {}), bytes, timeout_us);
        expect_exchanged(done, 0, {1}, bytes);
        EXPECT_LT(done.outcome.elapsed, kSlackSeconds);
        EXPECT_TRUE(has_logged("rank 0 takes rank 1 of 2 out of exchange", reason)) << reason;
    }

    EnginePointer engine_;
    Descriptor socket_;
};

TEST_F(PlayedByHand, WhatKeepsTheRulesIsHeard) {
    const Parcel parcel = pattern(1, 0, 0, 500);
    for (const uint64_t sequence : {1, 2}) {
        send_header(kHeaderMagic, sequence, parcel.size());
        say(socket_, parcel.data(), parcel.size());
        const Exchanged done = exchange(engine_, 0, all_but(2, {}), 500, kPlentyUs);
        expect_exchanged(done, 0, {}, 500);
        Header header = {};
        Parcel heard(500);
        ASSERT_EQ(hear(socket_, &header, sizeof header), sizeof header);
        EXPECT_EQ(header.sequence, sequence);
        ASSERT_EQ(hear(socket_, heard.data(), heard.size()), heard.size());
        EXPECT_TRUE(heard == pattern(0, 1, 0, 500));
    }
}

// More than sockets hold: a rank that did one after the other would wait for ever with one of
// these.
TEST_F(PlayedByHand, APeerMaySendAllBeforeItReadsAndReadAllBeforeItSends) {
    constexpr size_t kBytes = 24 << 20;
    const Parcel parcel = pattern(1, 0, 0, kBytes);
    const auto send_all = [&](uint64_t sequence) {
        send_header(kHeaderMagic, sequence, kBytes);
        const Deadline deadline(kPlentyUs);
        size_t count = 0;
        while (count < kBytes && !deadline.passed()) {
            pollfd entry = {socket_.number(), POLLOUT, 0};
            wait_ready(&entry, 1, deadline, 1000);
            const Message message = {{parcel.data(), kBytes}, {nullptr, 0}};
            if (send_more(socket_.number(), message, &count) != 0) break;
        }
        EXPECT_EQ(count, kBytes);
    };
    const auto read_all = [&] {
        Parcel heard(sizeof(Header) + kBytes);
        EXPECT_EQ(hear(socket_, heard.data(), heard.size()), heard.size());
    };
    std::thread played([&] {
        send_all(1);
        read_all();
        read_all();
        send_all(2);
    });
    for (int i = 0; i < 2; ++i)
        expect_exchanged(exchange(engine_, 0, all_but(2, {}), kBytes, kPlentyUs), 0, {}, kBytes);
    played.join();
}

TEST_F(PlayedByHand, AWrongMagicIsNoParcel) {
    send_header(kHelloMagic, 1, 0);
    expect_thrown_out(0, kPlentyUs, "makes no sense");
}

TEST_F(PlayedByHand, AnotherExchangeIsNotThisOne) {
    send_header(kHeaderMagic, 2, 0);
    expect_thrown_out(0, kPlentyUs, "it is in exchange 2, this rank in 1");
}

TEST_F(PlayedByHand, AHugeSizeIsNotAllocated) {
    send_header(kHeaderMagic, 1, UINT64_MAX);
    expect_thrown_out(0, kPlentyUs, "18446744073709551615 bytes");
}

TEST_F(PlayedByHand, ASizeThatNoMemoryHoldsThrowsNothing) {
    send_header(kHeaderMagic, 1, UINT64_MAX);
    const Exchanged done = exchange(engine_, 0, all_but(2, {}), 0, kPlentyUs, SIZE_MAX);
    expect_exchanged(done, 0, {1}, 0);
    EXPECT_TRUE(has_logged("takes rank 1 of 2 out", "there is no memory"));
}

TEST_F(PlayedByHand, AConnectionLostInTheMiddleOfAParcelLeavesNoneOfIt) {
    send_header(kHeaderMagic, 1, 1000);
    say(socket_, Parcel(400).data(), 400);
    std::thread leaver([&] {
        Header header = {};
        hear(socket_, &header, sizeof header);  // now rank 0 is in its exchange
        socket_.close();
    });
    expect_thrown_out(0, kPlentyUs, "connection closed by the other end");
    leaver.join();
}

TEST_F(PlayedByHand, AHalfSentParcelIsThrownAwayAtTheDeadline) {
    send_header(kHeaderMagic, 1, 1000);
    say(socket_, Parcel(999).data(), 999);
    expect_thrown_out(0, kShortUs, "it did not send all within 0.2 s");
}

TEST_F(PlayedByHand, ARankThatTakesNothingIsThrownOutAtTheDeadline) {
    send_header(kHeaderMagic, 1, 0);
    expect_thrown_out(40 << 20, kShortUs, "it did not take all within 0.2 s");
}

// ---- Set-up: strangers --------------------------------------------------------------------------

TEST_F(EngineByTcp, StrangersAreTurnedAwayAndDoNotDisturb) {
    constexpr int kRankCount = 3;
    const std::vector<std::string> kinds = {
        "silent", "gone", "magic", "garbage", "beginning of a Hello", "secret", "protocol", "rank"};
    Place place(kRankCount);
    std::vector<EnginePointer> engines(kRankCount);
    std::vector<Descriptor> strangers;
    // Strangers reach each listener before any rank does: only then rank 0 takes part.
    const auto disturb = [&](const std::vector<Invitation> &all) {
        for (int rank = 0; rank < kRankCount; ++rank)
            for (const std::string &kind : kinds) {
                Descriptor socket = connect(all[rank]);
                Hello hello = {kHelloMagic, kProtocol, kRankCount - 1, all[rank].secret};
                if (kind == "garbage") std::memset(&hello, 'x', sizeof hello);
                if (kind == "magic") ++hello.magic;
                if (kind == "secret") hello.secret.bytes[31] ^= 1;
                if (kind == "protocol") ++hello.protocol;
                if (kind == "rank") hello.rank = rank;
                const size_t size = kind == "silent" || kind == "gone" ? 0
                                    : kind == "beginning of a Hello"   ? 20
                                                                       : sizeof hello;
                if (size > 0) say(socket, &hello, size);
                if (kind != "gone") strangers.push_back(std::move(socket));
            }
    };
    std::promise<void> has_disturbed;
    const auto is_disturbed = has_disturbed.get_future().share();
    run_threads(kRankCount, [&](int rank) {
        const AllGather all_gather = [&](const void *send, void *receive, size_t bytes) {
            EXPECT_EQ(bytes, sizeof(Invitation));
            const mep_status_t status = place.gather(rank, send, receive, bytes);
            std::vector<Invitation> all(kRankCount);
            std::memcpy(all.data(), receive, kRankCount * sizeof(Invitation));
            if (rank == 0) {
                disturb(all);
                has_disturbed.set_value();
            }
            is_disturbed.wait();
            return status;
        };
        const Outcome outcome = observe([&] {
            return engine_by_tcp(rank, kRankCount, kAddress, all_gather, Deadline(kPlentyUs),
                                 &engines[rank]);
        });
        ASSERT_EQ(outcome.status, MEP_OK) << outcome;
        EXPECT_LT(outcome.elapsed, kSlackSeconds);
        const Exchanged done = exchange(engines[rank], rank, all_but(3, {}), 5000, kPlentyUs);
        expect_exchanged(done, rank, {}, 5000);
    });
    for (const Descriptor &stranger : strangers)
        EXPECT_FALSE(hears_hello(stranger));
    EXPECT_TRUE(has_logged("rank 0 turned a connection away", "it is no rank of a group"));
    EXPECT_TRUE(has_logged("rank 0 turned a connection away", "its secret is wrong"));
    EXPECT_TRUE(has_logged("rank 1 turned a connection away", "its protocol is 2, not 1"));
}

// Ranks 1 and 2 of 3, played by hand.
TEST_F(EngineByTcp, ARankIsTakenOnlyOnceAndOnlyIfItIsExpected) {
    Place place(3);
    std::vector<Descriptor> sockets;
    const auto call = [&](const Invitation &invitation, int rank) {
        sockets.push_back(connect(invitation));
        const Hello hello = {kHelloMagic, kProtocol, rank, invitation.secret};
        say(sockets.back(), &hello, sizeof hello);
        return hears_hello(sockets.back());
    };
    run_threads(3, [&](int rank) {
        EnginePointer engine;
        if (rank == 0) {
            const Outcome outcome = place.make(0, &engine);
            EXPECT_EQ(outcome.status, MEP_OK) << outcome;
            return;
        }
        const std::vector<Invitation> all = place.gather_by_hand(rank, {}, {});
        if (rank == 2) return;
        EXPECT_TRUE(call(all[0], 1));
        for (const int wrong : {1, 0, -1, 3, INT32_MIN, INT32_MAX})
            EXPECT_FALSE(call(all[0], wrong)) << wrong;
        EXPECT_TRUE(call(all[0], 2));
    });
    EXPECT_TRUE(has_logged("it says that it is rank 1", "already there"));
}

// ---- Set-up: ranks that are missing or cannot listen --------------------------------------------

TEST_F(EngineByTcp, AnAddressThatCannotBeListenedOnIsNamedOnAllRanks) {
    // The space keeps the resolver from asking others; 192.0.2.0/24 is only for documents.
    for (const char *address : {"no such host", "", "0.0.0.0", "192.0.2.1"}) {
        Place place(3);
        run_threads(3, [&](int rank) {
            EnginePointer engine;
            const Outcome outcome =
                place.make(rank, &engine, kPlentyUs, rank == 1 ? address : kAddress);
            EXPECT_EQ(outcome.status, MEP_INVALID_ARGUMENT) << outcome;
            EXPECT_TRUE(outcome.names("address \"" + std::string(address) + "\"")) << outcome;
            EXPECT_EQ(outcome.names("rank 1 of 3"), rank != 1) << outcome;
            EXPECT_LT(outcome.elapsed, kSlackSeconds);
            EXPECT_EQ(engine, nullptr);
        });
    }
}

TEST_F(EngineByTcp, NoAddressIsAnInvalidOne) {
    Place place(1);
    EnginePointer engine;
    EXPECT_EQ(place.make(0, &engine, kPlentyUs, nullptr).status, MEP_INVALID_ARGUMENT);
}

TEST_F(EngineByTcp, AFailedAllGatherIsPassedOn) {
    EnginePointer engine;
    const Outcome outcome = observe([&] {
        return engine_by_tcp(
            0, 2, kAddress,
            [](const void *, void *, size_t) { return fail(MEP_MISMATCH, "what went wrong"); },
            Deadline(kPlentyUs), &engine);
    });
    EXPECT_EQ(outcome.status, MEP_MISMATCH);
    EXPECT_TRUE(outcome.names("what went wrong")) << outcome;
}

TEST_F(EngineByTcp, ARankThatIsNotThereIsNotWaitedFor) {
    Place place(3);
    run_threads(3, [&](int rank) {
        if (rank == 1) {  // as a gather among the others gives it
            const Invitation nobody{};
            std::vector<Invitation> all(3);
            EXPECT_EQ(place.gather(rank, &nobody, all.data(), sizeof nobody), MEP_OK);
            return;
        }
        EnginePointer engine;
        const Outcome outcome = place.make(rank, &engine, kPlentyUs);
        ASSERT_EQ(outcome.status, MEP_OK) << outcome;
        const Exchanged done = exchange(engine, rank, all_but(3, {1}), 500, kPlentyUs);
        expect_exchanged(done, rank, {1}, 500);
    });
}

TEST_F(EngineByTcp, ARankThatDoesNotConnectIsNamedAtTheDeadline) {
    Place place(3);
    run_threads(3, [&](int rank) {
        if (rank == 2) {
            place.gather_by_hand(rank, {}, {});
            return;
        }
        EnginePointer engine;
        const Outcome outcome = place.make(rank, &engine, kShortUs);
        EXPECT_EQ(outcome.status, MEP_TIMEOUT) << outcome;
        EXPECT_TRUE(outcome.names("rank 2 of 3")) << outcome;
        EXPECT_LT(outcome.elapsed, kSlackSeconds);
        EXPECT_EQ(engine, nullptr);
    });
}

TEST_F(EngineByTcp, ARankThatDoesNotAnswerIsNamedAtTheDeadline) {
    Descriptor listener;
    Endpoint endpoint = {};
    ASSERT_EQ(resolve_ipv4(kAddress, &endpoint.ipv4), 0);
    ASSERT_EQ(open_listener(endpoint, 8, &listener), 0);
    ASSERT_EQ(local_endpoint(listener.number(), &endpoint), 0);
    Place place(2);
    run_threads(2, [&](int rank) {
        if (rank == 0) {
            place.gather_by_hand(rank, endpoint, {});
            return;
        }
        EnginePointer engine;
        const Outcome outcome = place.make(rank, &engine, kShortUs);
        EXPECT_EQ(outcome.status, MEP_TIMEOUT) << outcome;
        EXPECT_TRUE(outcome.names("rank 0 of 2")) << outcome;
        EXPECT_LT(outcome.elapsed, kSlackSeconds);
    });
}

TEST_F(EngineByTcp, ARankThatListensNoMoreIsNamedAtOnceWithItsEndpoint) {
    Descriptor listener;
    Endpoint endpoint = {};
    ASSERT_EQ(resolve_ipv4(kAddress, &endpoint.ipv4), 0);
    ASSERT_EQ(open_listener(endpoint, 8, &listener), 0);
    ASSERT_EQ(local_endpoint(listener.number(), &endpoint), 0);
    listener.close();
    Place place(2);
    run_threads(2, [&](int rank) {
        if (rank == 0) {
            place.gather_by_hand(rank, endpoint, {});
            return;
        }
        EnginePointer engine;
        const Outcome outcome = place.make(rank, &engine, kPlentyUs);
        EXPECT_EQ(outcome.status, MEP_BOOTSTRAP_FAILED) << outcome;
        EXPECT_TRUE(outcome.names("rank 0 of 2, at " + endpoint_text(endpoint))) << outcome;
        EXPECT_LT(outcome.elapsed, kSlackSeconds);
    });
}

// It knows the secret that everybody has been given, but not the one that only the right rank was.
TEST_F(EngineByTcp, AnImpostorAtTheEndpointOfARankIsNotBelieved) {
    Descriptor listener;
    Endpoint endpoint = {};
    ASSERT_EQ(resolve_ipv4(kAddress, &endpoint.ipv4), 0);
    ASSERT_EQ(open_listener(endpoint, 8, &listener), 0);
    ASSERT_EQ(local_endpoint(listener.number(), &endpoint), 0);
    Place place(2);
    run_threads(2, [&](int rank) {
        if (rank == 1) {
            EnginePointer engine;
            const Outcome outcome = place.make(rank, &engine, kPlentyUs);
            EXPECT_EQ(outcome.status, MEP_BOOTSTRAP_FAILED) << outcome;
            EXPECT_TRUE(outcome.names("its secret is wrong")) << outcome;
            return;
        }
        place.gather_by_hand(rank, endpoint, {});
        pollfd entry = {listener.number(), POLLIN, 0};
        wait_ready(&entry, 1, Deadline(kPlentyUs), 20'000);
        Descriptor called;
        ASSERT_EQ(accept_one(listener.number(), &called), 0);
        const Hello hello = {kHelloMagic, kProtocol, 0, {}};
        say(called, &hello, sizeof hello);
        char rest[1000];
        hear(called, rest, sizeof rest);  // until the other end has judged
    });
}

}  // namespace
}  // namespace ep
