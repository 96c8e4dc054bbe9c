#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastzoo::cpu {
namespace {

constexpr Capability kAll[] = {Capability::baseline, Capability::avx2, Capability::avx512,
                               Capability::avx512_bf16};
constexpr int kUnset = -1;
std::atomic<int> active{kUnset};

Capability parse(const char* name) {
  for (const Capability capability : kAll) {
    if (std::strcmp(name, capability_name(capability)) != 0) continue;
    if (cpu_has(capability)) return capability;
    throw std::runtime_error(std::string("FASTZOO_CPU_CAPABILITY=") + name +
                             ": this CPU lacks these instructions");
  }
  throw std::runtime_error(std::string("FASTZOO_CPU_CAPABILITY=") + name +
                           ": expected baseline, avx2, avx512 or avx512_bf16");
}

Capability choose() {
  const char* wanted = std::getenv("FASTZOO_CPU_CAPABILITY");
  if (wanted != nullptr && *wanted != '\0') return parse(wanted);
  Capability best = Capability::baseline;
  for (const Capability capability : kAll) {
    if (cpu_has(capability)) best = capability;
  }
  return best;
}

}  // namespace

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::baseline:
      return "baseline";
    case Capability::avx2:
      return "avx2";
    case Capability::avx512:
      return "avx512";
    case Capability::avx512_bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

bool cpu_has(Capability capability) {
  if (capability == Capability::baseline) return true;
#if FASTZOO_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (capability) {
    case Capability::avx2:
      return avx2;
    case Capability::avx512:
      return avx512;
    default:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#else
  return false;
#endif
}

Capability active_capability() {
  int current = active.load(std::memory_order_relaxed);
  if (current == kUnset) {
    current = static_cast<int>(choose());
    active.store(current, std::memory_order_relaxed);
  }
  return static_cast<Capability>(current);
}

void force_capability(const char* name) {
  const bool wanted = name != nullptr && *name != '\0';
  active.store(wanted ? static_cast<int>(parse(name)) : kUnset, std::memory_order_relaxed);
}

}  // namespace fastzoo::cpu
