// Division by what the host knows, without dividing.
#include "kernels/kernels.h"

#include <gtest/gtest.h>
#include <random>

namespace ep {
namespace {

constexpr int kBelow = 1 << 24;

TEST(Divisor, DividesExactlyAroundEachMultiple) {
    for (int value = 1; value <= 65536; value += value < 300 ? 1 : 97) {
        const Divisor divisor = Divisor::of(value);
        for (int multiple = 0; multiple < kBelow; multiple += value * (1 + kBelow / value / 50))
            for (int n = multiple > 0 ? multiple - 1 : 0; n <= multiple + 1 && n < kBelow; ++n) {
                ASSERT_EQ(divisor.quotient(n), n / value) << n << " / " << value;
                ASSERT_EQ(divisor.rest(n), n % value) << n << " / " << value;
            }
    }
}

TEST(Divisor, DividesExactlyAtRandom) {
    std::mt19937 random(1);
    for (int i = 0; i < 1000000; ++i) {
        const int value = 1 + int(random() % 65536), n = int(random() % kBelow);
        ASSERT_EQ(Divisor::of(value).quotient(n), n / value) << n << " / " << value;
    }
}

}  // namespace
}  // namespace ep
