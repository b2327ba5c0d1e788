// The whole test framework: CHECK and CHECK_EQ print what failed and end the program, so that CTest sees it.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <iostream>

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

// Both values are printed with <<; + turns one-byte integers into numbers.
#define CHECK_EQ(got, want)                                                                                         \
  do {                                                                                                              \
    const auto got_value = (got);                                                                                   \
    const auto want_value = (want);                                                                                 \
    if (!(got_value == want_value)) {                                                                               \
      std::cerr << __FILE__ << ":" << __LINE__ << ": CHECK_EQ(" << #got << ", " << #want << "): got " << +got_value \
                << ", want " << +want_value << std::endl;                                                           \
      std::exit(1);                                                                                                 \
    }                                                                                                               \
  } while (false)
