// Which instruction set the CPU kernels run on. Every file of csrc/cpu/kernels is compiled once
// per instruction set, each time in the namespace of that name; a kernel's entry picks one here.
#pragma once

#include <type_traits>

#if defined(__x86_64__)
#define FASTZOO_X86 1
#else
#define FASTZOO_X86 0
#endif

namespace fastzoo::cpu {

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best that this CPU has, or what FASTZOO_CPU_CAPABILITY or force_capability() asked for.
// Throws std::runtime_error where a forced one is unknown or this CPU lacks it.
Capability active_capability();

// nullptr or "" returns to the environment's choice.
void force_capability(const char* name);

bool cpu_has(Capability capability);
const char* capability_name(Capability capability);

template <class Kernel>
Kernel* select(Kernel* const (&by_capability)[4]) {
  return by_capability[static_cast<int>(active_capability())];
}

}  // namespace fastzoo::cpu

// FASTZOO_DECLARE_KERNEL(name, (argument types)): declares the kernel in each namespace.
// FASTZOO_SELECT_KERNEL(name): the one for this CPU.
#if FASTZOO_X86
#define FASTZOO_DECLARE_KERNEL(name, arguments) \
  namespace baseline {                          \
  void name arguments;                          \
  }                                             \
  namespace avx2 {                              \
  void name arguments;                          \
  }                                             \
  namespace avx512 {                            \
  void name arguments;                          \
  }                                             \
  namespace avx512_bf16 {                       \
  void name arguments;                          \
  }
#define FASTZOO_SELECT_KERNEL(name)                                                         \
  ::fastzoo::cpu::select<std::remove_pointer_t<decltype(&::fastzoo::cpu::baseline::name)>>( \
      {&::fastzoo::cpu::baseline::name, &::fastzoo::cpu::avx2::name,                        \
       &::fastzoo::cpu::avx512::name, &::fastzoo::cpu::avx512_bf16::name})
#else
#define FASTZOO_DECLARE_KERNEL(name, arguments) \
  namespace baseline {                          \
  void name arguments;                          \
  }
#define FASTZOO_SELECT_KERNEL(name) (&::fastzoo::cpu::baseline::name)
#endif
