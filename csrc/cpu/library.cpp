// C entries of _C_cpu.so, for fastzoo._native: which instruction set the kernels run on.
#include <exception>
#include <string>

#include "runtime/capability.h"

#define FASTZOO_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
thread_local std::string last_error;
}

// nullptr where the environment asks for what this CPU lacks; fastzoo_cpu_error() says what.
FASTZOO_EXPORT const char* fastzoo_cpu_capability() try {
  return fastzoo::cpu::capability_name(fastzoo::cpu::active_capability());
} catch (const std::exception& error) {
  last_error = error.what();
  return nullptr;
}

FASTZOO_EXPORT int fastzoo_force_cpu_capability(const char* name) try {
  fastzoo::cpu::force_capability(name);
  return 0;
} catch (const std::exception& error) {
  last_error = error.what();
  return 1;
}

FASTZOO_EXPORT const char* fastzoo_cpu_error() { return last_error.c_str(); }
