// A C++ test that is compiled like a CPU kernel: once per instruction set with FASTZOO_CPU_ISA set,
// where it defines its checks, and once without, where it defines main().
#pragma once

#include <cstdio>
#include <exception>
#include <initializer_list>

#include "../../csrc/cpu/runtime/capability.h"

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      ++failures;                                                         \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                     \
  } while (false)

// Defines main(): runs checks(int& failures) of every instruction set that this CPU has.
#define FASTZOO_RUN_ON_EACH_ISA(checks)                                      \
  int main() {                                                               \
    using namespace fastzoo::cpu;                                            \
    int failures = 0;                                                        \
    for (const char* name : {"baseline", "avx2", "avx512", "avx512_bf16"}) { \
      try {                                                                  \
        force_capability(name);                                              \
      } catch (const std::exception& reason) {                               \
        std::printf("%s: skipped, %s\n", name, reason.what());               \
        continue;                                                            \
      }                                                                      \
      const int before = failures;                                           \
      FASTZOO_SELECT_KERNEL(checks)(failures);                               \
      std::printf("%s: %s\n", name, failures == before ? "ok" : "FAILED");   \
    }                                                                        \
    return failures == 0 ? 0 : 1;                                            \
  }
