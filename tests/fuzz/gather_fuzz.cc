// What comes from a peer that knows the secret and has joined: messages to the hub, a hub's to a
// spoke, and, whatever carries them, the bytes that ranks gather when a group and a buffer form.
// Whatever they are, a call ends in time, with what was gathered or with an error that stays.
#include "mooncake_ep.h"

#include "base/socket.h"
#include "base/status.h"
#include "core/bootstrap_tcp.h"
#include "core/greeting.h"
#include "transport/facts.h"

#include <algorithm>
#include <arpa/inet.h>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <fuzzer/FuzzedDataProvider.h>
#include <memory>
#include <netinet/in.h>
#include <string>
#include <sys/socket.h>
#include <thread>
#include <vector>

namespace {

using ep::Deadline;
using ep::Descriptor;
using Input = FuzzedDataProvider;
using Text = std::string;  // bytes on their way

constexpr int64_t kTimeoutUs = 2000, kPeerTimeoutUs = 1'000'000;
constexpr size_t kBodyMax = 300;
constexpr ep::Secret kSecret{};  // both ends know it
// Nobody looks whose user the other end is: the kernel's list for that is long here, and slow.
constexpr ep::Admission kAdmission{kSecret, false};

void must(bool holds) {
    if (!holds) std::abort();
}

// Whoever failed, and whatever it said of that: it is a status that there is, with a text.
mep_status_t told(mep_status_t status) {
    if (status != MEP_OK) must(*mep_last_error() != '\0' && ep::known_failure(status) == status);
    return status;
}

bool rarely(Input *input) {
    return input->ConsumeIntegralInRange(0, 7) == 1;
}

template <class Message>
Text bytes_of(const Message &message) {
    return Text(reinterpret_cast<const char *>(&message), sizeof message);
}

// As it is, or with some of its bytes changed, or only a part of it.
Text spoilt(Text bytes, Input *input) {
    for (int edits = rarely(input) ? input->ConsumeIntegralInRange(1, 3) : 0; edits > 0; --edits) {
        const size_t at = input->ConsumeIntegralInRange<size_t>(0, bytes.size() - 1);
        const Text with = input->ConsumeRandomLengthString(8);
        bytes.replace(at, std::min(with.size(), bytes.size() - at), with, 0, bytes.size() - at);
    }
    if (rarely(input)) bytes.resize(input->ConsumeIntegralInRange<size_t>(1, bytes.size()));
    return bytes;
}

struct Meeting {
    ep::Endpoint endpoint{htonl(INADDR_LOOPBACK), 0};
    Descriptor listener;

    Meeting() {
        must(ep::open_listener(endpoint, ep::kListenBacklog, &listener) == 0);
        must(ep::local_endpoint(listener.number(), &endpoint) == 0);
    }
};

void send_all(const Descriptor &socket, const Text &bytes) {
    if (socket.is_open()) send(socket.number(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
}

// The other end sees that no more comes; it can still send, so nothing is reset.
void end_of(const Descriptor &socket) {
    if (socket.is_open()) shutdown(socket.number(), SHUT_WR);
}

// Takes part until it fails, which it then goes on to do.
bool takes_part(ep::Bootstrap *bootstrap, const std::vector<char> &mine, std::vector<char> *all) {
    const mep_status_t status =
        told(bootstrap->all_gather(mine.data(), all->data(), mine.size(), Deadline(kTimeoutUs)));
    if (status == MEP_OK) return true;
    must(bootstrap->all_gather(nullptr, nullptr, 0, Deadline(kTimeoutUs)) == status);
    return false;
}

// ---- Peers of a hub -----------------------------------------------------------------------------

struct Spoke {
    Descriptor socket;
    Text body;              // of this step
    bool is_honest = true;  // all that it sent is what belongs there, so the body has to arrive
};

Text hello_of(int rank, int rank_count) {
    return bytes_of(
        ep::Hello{ep::kHelloMagic, ep::kProtocol, ep::kVersion, rank, rank_count, kSecret});
}

// What a spoke sends in a step of `size` bytes: mostly what belongs there.
Text next_of(Spoke *spoke, uint64_t sequence, size_t size, Input *input) {
    ep::Request request = {ep::kRequestMagic, sequence, size};
    spoke->body = input->ConsumeBytesAsString(size);
    spoke->body.resize(size);
    if (!rarely(input)) return bytes_of(request) + spoke->body;
    spoke->is_honest = false;
    Text sent;
    for (int messages = input->ConsumeIntegralInRange(0, 3); messages > 0; --messages) {
        if (input->ConsumeBool()) request.magic = ep::kGiveUpMagic;
        if (input->ConsumeBool()) request.sequence = input->ConsumeIntegral<uint64_t>();
        if (input->ConsumeBool()) request.bytes = input->ConsumeIntegral<uint64_t>();
        sent += spoilt(bytes_of(request), input) + input->ConsumeRandomLengthString(2 * kBodyMax);
    }
    return sent;
}

void send_parts(const std::vector<Spoke> &spokes, const std::vector<Text> &parts, bool last) {
    for (size_t rank = 1; rank < spokes.size(); ++rank) {
        send_all(spokes[rank].socket, parts[rank]);
        if (last) end_of(spokes[rank].socket);
    }
}

// What was sent before a call is there when it looks; the rest comes meanwhile.
bool gather_on_hub(ep::Bootstrap *hub, std::vector<Spoke> *spokes, uint64_t sequence, bool last,
                   Input *input) {
    const size_t size = input->ConsumeIntegralInRange<size_t>(0, kBodyMax), ranks = spokes->size();
    std::vector<Text> before(ranks), meanwhile(ranks);
    const bool is_split = rarely(input);
    for (size_t rank = 1; rank < ranks; ++rank) {
        before[rank] = next_of(&(*spokes)[rank], sequence, size, input);
        if (!is_split) continue;
        const size_t cut = input->ConsumeIntegralInRange<size_t>(0, before[rank].size());
        meanwhile[rank] = before[rank].substr(cut);
        before[rank].resize(cut);
    }
    send_parts(*spokes, before, last && !is_split);
    std::thread sender;
    if (is_split) sender = std::thread([&] { send_parts(*spokes, meanwhile, last); });
    std::vector<char> all(ranks * size);
    const bool is_there = takes_part(hub, std::vector<char>(size), &all);
    must(is_there || *mep_last_error() != '\0');
    if (is_split) sender.join();
    for (size_t rank = 1; is_there && rank < ranks; ++rank) {
        const Spoke &spoke = (*spokes)[rank];
        must(!spoke.is_honest || spoke.body == Text(all.data() + rank * size, size));
    }
    return is_there;
}

void fuzz_hub(Input *input) {
    const int ranks = input->ConsumeIntegralInRange(2, 4);
    const int steps = input->ConsumeIntegralInRange(1, 3);
    Meeting meeting;
    std::vector<Spoke> spokes(ranks);
    for (int rank = 1; rank < ranks; ++rank) {
        Descriptor &socket = spokes[rank].socket;
        if (ep::connect_to(meeting.endpoint, Deadline(kPeerTimeoutUs), &socket) != 0) return;
        const Text hello = hello_of(rank, ranks);
        // What comes too early may be a part of the first step's message.
        Text sent = spoilt(hello, input);
        if (rarely(input)) sent += input->ConsumeRandomLengthString(2 * sizeof(ep::Request));
        spokes[rank].is_honest = sent == hello;
        send_all(socket, sent);
    }
    std::unique_ptr<ep::Bootstrap> hub;
    if (told(ep::tcp_host(std::move(meeting.listener), ranks, kAdmission, Deadline(kTimeoutUs),
                          &hub)) != MEP_OK)
        return;
    for (int step = 1; step <= steps; ++step)
        if (!gather_on_hub(hub.get(), &spokes, step, step == steps, input)) return;
}

// ---- The hub of a spoke -------------------------------------------------------------------------

Text reply_of(uint64_t sequence, const Text &body, Input *input) {
    ep::Reply reply = {ep::kReplyMagic, sequence, body.size(), MEP_OK, 0};
    if (!rarely(input)) return bytes_of(reply) + body;
    const Text text = input->ConsumeRandomLengthString(ep::kErrorTextMax + 8);
    reply.bytes = rarely(input) ? input->ConsumeIntegral<uint64_t>() : text.size();
    reply.status = input->ConsumeIntegralInRange(-20, 2);
    if (rarely(input)) reply.sequence = input->ConsumeIntegral<uint64_t>();
    return spoilt(bytes_of(reply), input) + text;
}

void fuzz_spoke(Input *input) {
    const int ranks = input->ConsumeIntegralInRange(2, 4), rank = ranks - 1;
    const size_t steps = input->ConsumeIntegralInRange<size_t>(0, 3);
    std::vector<Text> bodies;
    Text sent = reply_of(ep::kJoinSequence, "", input) + reply_of(ep::kJoinSequence, "", input);
    for (size_t step = 1; step <= steps; ++step) {
        Text body = input->ConsumeBytesAsString(input->ConsumeIntegralInRange<size_t>(0, kBodyMax));
        body.resize(body.size() / ranks * ranks);
        sent += reply_of(step, body, input);
        bodies.push_back(body);
    }
    const bool stays = rarely(input);
    Meeting meeting;
    Descriptor accepted;
    std::thread hub([&] {
        pollfd entry = {meeting.listener.number(), POLLIN, 0};
        ep::wait_ready(&entry, 1, Deadline(kPeerTimeoutUs), kPeerTimeoutUs / 1000);
        ep::accept_one(meeting.listener.number(), &accepted);
        meeting.listener.close();  // a spoke that has heard nothing tries again
        send_all(accepted, sent);
        if (!stays) end_of(accepted);
    });
    std::unique_ptr<ep::Bootstrap> spoke;
    bool goes_on = told(ep::tcp_join(meeting.endpoint, {rank, ranks}, kAdmission,
                                     Deadline(kTimeoutUs), &spoke)) == MEP_OK;
    for (size_t step = 0; goes_on && step < steps; ++step) {
        std::vector<char> all(bodies[step].size());
        goes_on = takes_part(spoke.get(), std::vector<char>(all.size() / ranks), &all);
    }
    hub.join();
}

// ---- What ranks gather when they form a group and a buffer --------------------------------------

// Ranks that say what this one does, but for some bytes.
struct Echoes {
    Input *input;
    int ranks;
    int calls = 0;
};

int32_t echo(void *context, const void *send, void *receive, size_t bytes) {
    // A Greeting is the first of all.
    constexpr size_t kRankAt = offsetof(ep::Greeting, rank);
    constexpr size_t kProcessAt = offsetof(ep::Greeting, facts) + offsetof(ep::RankFacts, process);
    Echoes &echoes = *static_cast<Echoes *>(context);
    Input *input = echoes.input;
    for (int rank = 0; rank < echoes.ranks; ++rank) {
        Text said(static_cast<const char *>(send), bytes);
        if (rank > 0 && echoes.calls == 0) {
            std::memcpy(&said[kRankAt], &rank, sizeof rank);
            if (input->ConsumeBool()) ++said[kProcessAt];
        }
        if (rank > 0 && bytes > 0) said = spoilt(said, input);
        said.resize(bytes);
        std::memcpy(static_cast<char *>(receive) + rank * bytes, said.data(), bytes);
    }
    ++echoes.calls;
    return rarely(input) && rarely(input);
}

int32_t carry_nothing(void *, const void *const *, const size_t *, void *const *, const size_t *) {
    return 1;
}

void fuzz_formation(Input *input) {
    Echoes echoes{input, input->ConsumeIntegralInRange(2, 4)};
    mep_group_config_t config{};
    config.struct_size = sizeof config;
    config.rank_count = echoes.ranks;
    config.timeout_us = kTimeoutUs;
    config.all_gather = echo;
    config.all_gather_context = &echoes;
    config.all_to_all = carry_nothing;  // or ranks that are far would connect to each other
    config.disable_p2p = input->ConsumeBool();
    mep_group_t *group = nullptr;
    if (told(mep_group_create(&config, &group)) != MEP_OK) return must(group == nullptr);
    mep_buffer_config_t shape{};
    shape.struct_size = sizeof shape;
    shape.token_count_max = 4;
    shape.hidden = 128;
    shape.expert_count = echoes.ranks;
    shape.topk_max = 1;
    shape.cpu_thread_count = 1;
    mep_buffer_t *buffer = nullptr;
    if (told(mep_buffer_create(group, &shape, &buffer)) == MEP_OK) mep_buffer_destroy(buffer);
    mep_group_destroy(group);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    mep_log_set_callback([](void *, int32_t, const char *) {}, nullptr, MEP_LOG_ERROR);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Input input(data, size);
    switch (input.ConsumeIntegralInRange(0, 2)) {
        case 0:
            fuzz_hub(&input);
            break;
        case 1:
            fuzz_spoke(&input);
            break;
        default:
            fuzz_formation(&input);
    }
    return 0;
}
