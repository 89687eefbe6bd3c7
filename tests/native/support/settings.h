// Variables of the environment, for a while. Which kernels a buffer takes is decided by them when
// it is created.
#pragma once

#include <cstdlib>
#include <functional>
#include <gtest/gtest.h>
#include <optional>
#include <string>

namespace ep::test {

class Setting {
  public:
    Setting(const char *name, const char *value) : name_(name) {
        if (const char *before = getenv(name)) before_ = before;
        setenv(name, value, 1);
    }
    Setting(const Setting &) = delete;
    Setting &operator=(const Setting &) = delete;
    ~Setting() {
        if (before_.has_value())
            setenv(name_, before_->c_str(), 1);
        else
            unsetenv(name_);
    }

  private:
    const char *name_;
    std::optional<std::string> before_;
};

// By line; by flag, rows by bulk copies; by flag, rows by the lanes.
inline void with_all_kernels(const std::function<void()> &body) {
    struct Way {
        const char *lines, *bulk_copies;
    };
    for (const Way &way : {Way{"1", "1"}, Way{"0", "1"}, Way{"0", "0"}}) {
        if (::testing::Test::IsSkipped()) return;
        SCOPED_TRACE(std::string("MOONCAKE_EP_LINES=") + way.lines +
                     " MOONCAKE_EP_BULK_COPIES=" + way.bulk_copies);
        const Setting lines("MOONCAKE_EP_LINES", way.lines);
        const Setting bulk_copies("MOONCAKE_EP_BULK_COPIES", way.bulk_copies);
        body();
    }
}

}  // namespace ep::test
