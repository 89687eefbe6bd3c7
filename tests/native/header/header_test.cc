// The header means the same in C99, in C++11 and in the library.
#include "header_test.h"

#include <gtest/gtest.h>

TEST(Header, HasTheSameLayoutInCAndCpp) {
    int count = 0;
    for (; sizes_in_c[count] != 0; ++count)
        EXPECT_EQ(sizes_in_c[count], sizes_in_cpp[count]) << "struct " << count;
    EXPECT_EQ(sizes_in_cpp[count], 0U);
    EXPECT_EQ(count, 15);
}

TEST(Header, HasThePlainLayoutsThatDlpackAndTheWireFix) {
    EXPECT_EQ(sizeof(mep_device_t), 8U);
    EXPECT_EQ(sizeof(mep_dtype_t), 4U);
    EXPECT_EQ(sizeof(mep_tensor_t), 48U);
    EXPECT_EQ(sizeof(mep_unique_id_t), size_t{MEP_UNIQUE_ID_BYTES});
}

TEST(Header, StatesTheVersionOfTheLibrary) {
    EXPECT_EQ(mep_version(), version_in_c());
}
