// Trying the ways between ranks, with devices on which some do not work.
#include "transport/trial.h"

#include "backend/backend.h"
#include "base/status.h"
#include "support/forwarding_device.h"

#include <gtest/gtest.h>

namespace ep::test {
namespace {

enum class Fault { kNone, kSharesNothing, kMapsNothing, kStoresElsewhere };

// The CPU's device, with a fault.
class FaultyDevice : public ForwardingDevice {
  public:
    explicit FaultyDevice(Fault fault) : fault_(fault) {}
    mep_status_t create_window(size_t bytes, Sharing sharing,
                               std::unique_ptr<Window> *window) override {
        if (fault_ == Fault::kSharesNothing) return fail(MEP_SYSTEM_ERROR, "no shared memory");
        return device_->create_window(bytes, sharing, window);
    }
    mep_status_t open_window(const WindowHandle &handle,
                             std::shared_ptr<Mapping> *mapping) override {
        if (fault_ == Fault::kMapsNothing) return fail(MEP_SYSTEM_ERROR, "no mapping");
        if (fault_ != Fault::kStoresElsewhere) return device_->open_window(handle, mapping);
        std::unique_ptr<Window> window;
        EXPECT_EQ(device_->create_window(handle.bytes, Sharing::kNobody, &window), MEP_OK);
        *mapping = window->mapping();
        return MEP_OK;
    }

  private:
    const Fault fault_;
};

// All ranks' steps, one rank after the other; [from][to].
std::vector<Trial> trials_of(const std::vector<Fault> &faults) {
    const int ranks = static_cast<int>(faults.size());
    std::vector<std::unique_ptr<FaultyDevice>> devices;
    std::vector<std::unique_ptr<PeerTrial>> trials;
    std::vector<WindowHandle> handles;
    for (int rank = 0; rank < ranks; ++rank) {
        devices.push_back(std::make_unique<FaultyDevice>(faults[rank]));
        trials.push_back(std::make_unique<PeerTrial>(devices[rank].get(), rank, ranks));
        handles.push_back(trials[rank]->handle());
    }
    std::vector<Trial> found;
    for (int rank = 0; rank < ranks; ++rank) {
        std::vector<bool> wanted(ranks, true);
        wanted[rank] = false;
        EXPECT_EQ(trials[rank]->knock(handles, wanted), MEP_OK);
        found.insert(found.end(), trials[rank]->sent().begin(), trials[rank]->sent().end());
    }
    for (int rank = 0; rank < ranks; ++rank) {
        std::vector<bool> expected(ranks);
        std::vector<uint8_t> heard;
        for (int from = 0; from < ranks; ++from)
            expected[from] = found[from * ranks + rank] == Trial::kArrived;
        constexpr int64_t kSoonUs = 20'000;
        EXPECT_EQ(trials[rank]->listen(expected, Deadline(kSoonUs), &heard), MEP_OK);
        for (int from = 0; from < ranks; ++from)
            if (expected[from] && heard[from] == 0) found[from * ranks + rank] = Trial::kLost;
    }
    return found;
}

void expect_row(const std::vector<Trial> &trials, int from, std::vector<Trial> row) {
    row[from] = Trial::kNotMade;
    const int ranks = static_cast<int>(row.size());
    for (int to = 0; to < ranks; ++to)
        EXPECT_EQ(trials[from * ranks + to], row[to]) << "from " << from << " to " << to;
}

TEST(Trials, ArriveWhereAllIsWell) {
    const std::vector<Trial> trials = trials_of(std::vector<Fault>(5, Fault::kNone));
    for (int from = 0; from < 5; ++from)
        expect_row(trials, from, std::vector<Trial>(5, Trial::kArrived));
}

TEST(Trials, FindARankThatSharesNothing) {
    const std::vector<Trial> trials =
        trials_of({Fault::kNone, Fault::kSharesNothing, Fault::kNone});
    const std::vector<Trial> good{Trial::kArrived, Trial::kNotShared, Trial::kArrived};
    expect_row(trials, 0, good);
    expect_row(trials, 2, good);
    // It has no window to hear with, but its own words arrive.
    expect_row(trials, 1, {Trial::kArrived, Trial::kNotMade, Trial::kArrived});
}

TEST(Trials, FindARankThatMapsNothing) {
    const std::vector<Trial> trials = trials_of({Fault::kNone, Fault::kNone, Fault::kMapsNothing});
    expect_row(trials, 2, std::vector<Trial>(3, Trial::kNotMapped));
    expect_row(trials, 0, std::vector<Trial>(3, Trial::kArrived));
}

TEST(Trials, FindStoresThatGoElsewhere) {
    const std::vector<Trial> trials = trials_of({Fault::kNone, Fault::kStoresElsewhere});
    expect_row(trials, 1, {Trial::kLost, Trial::kNotMade});
    expect_row(trials, 0, {Trial::kNotMade, Trial::kArrived});
}

}  // namespace
}  // namespace ep::test
