// Who may join the rendezvous of a group whose secret everybody knows: of this machine, its user.
#include "core/bootstrap_tcp.h"
#include "support/forked.h"

#include <cerrno>
#include <cstring>
#include <gtest/gtest.h>
#include <string>
#include <unistd.h>

namespace ep::test {
namespace {

constexpr unsigned kSecondsMax = 30;
constexpr uid_t kNobody = 65534;
constexpr int64_t kTimeoutUs = 1'000'000;

struct Case {
    int other;  // the rank of another user; -1: none
    bool hub_asks, spoke_asks;
    mep_status_t hub_gets, spoke_gets;
    const char *named;  // in what the one hears who asks
};

class Admitted : public ::testing::TestWithParam<Case> {};

TEST_P(Admitted, OnlyOfOneUserUnlessNobodyAsks) {
    if (geteuid() != 0) GTEST_SKIP() << "only root can become another user";
    const Case &c = GetParam();
    Endpoint hub = {};
    ASSERT_EQ(resolve_ipv4("127.0.0.1", &hub.ipv4), 0);
    Descriptor listener;
    ASSERT_EQ(open_listener(hub, kListenBacklog, &listener), 0);
    ASSERT_EQ(local_endpoint(listener.number(), &hub), 0);
    run_forked(2, kSecondsMax, [&](int rank) {
        if (rank == c.other) {
            ASSERT_EQ(setuid(kNobody), 0) << std::strerror(errno);
        }
        std::unique_ptr<Bootstrap> bootstrap;
        mep_status_t status =
            rank == 0 ? tcp_host(std::move(listener), 2, {{}, c.hub_asks}, Deadline(kTimeoutUs),
                                 &bootstrap)
                      : tcp_join(hub, {1, 2}, {{}, c.spoke_asks}, Deadline(kTimeoutUs), &bootstrap);
        char mine = 'x', all[2];
        if (status == MEP_OK) status = bootstrap->all_gather(&mine, all, 1, Deadline(kTimeoutUs));
        EXPECT_EQ(status, rank == 0 ? c.hub_gets : c.spoke_gets) << last_error();
        if (status == MEP_BOOTSTRAP_FAILED && rank == 1) {
            EXPECT_NE(std::string(last_error()).find(c.named), std::string::npos) << last_error();
            EXPECT_NE(std::string(last_error()).find("MOONCAKE_EP_SECRET"), std::string::npos);
        }
    });
}

INSTANTIATE_TEST_SUITE_P(Ranks, Admitted,
                         ::testing::Values(Case{-1, true, true, MEP_OK, MEP_OK, ""},
                                           Case{1, false, false, MEP_OK, MEP_OK, ""},
                                           Case{1, true, true, MEP_TIMEOUT, MEP_BOOTSTRAP_FAILED,
                                                "rank 1 is of user 65534"},
                                           Case{0, true, true, MEP_TIMEOUT, MEP_BOOTSTRAP_FAILED,
                                                "rank 1 is of user 0"},
                                           // A hub that lets everybody in is not trusted either.
                                           Case{0, false, true, MEP_BOOTSTRAP_FAILED,
                                                MEP_BOOTSTRAP_FAILED, "rank 0 is of user 65534"}));

}  // namespace
}  // namespace ep::test
