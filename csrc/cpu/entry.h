// What the entries of the CPU operators share.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../torch_abi.h"
#include "runtime/dtype.h"

namespace fastzoo {

inline cpu::Dtype kernel_dtype(ScalarType dtype, const char* op) {
  switch (dtype) {
    case ScalarType::Float:
      return cpu::Dtype::float32;
    case ScalarType::Double:
      return cpu::Dtype::float64;
    case ScalarType::Half:
      return cpu::Dtype::float16;
    case ScalarType::BFloat16:
      return cpu::Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": float, double, half or bfloat16 needed");
  }
}

// Before a large output is written for the first time: memory that the system hands out in large
// pages costs a few faults instead of one every 4 KiB.
inline void ask_for_large_pages(const Tensor& output, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kLargePage = int64_t{2} << 20;
  if (bytes < 2 * kLargePage) return;
  const intptr_t begin = reinterpret_cast<intptr_t>(output.mutable_data_ptr());
  const intptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const intptr_t last = (begin + bytes) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
#endif
}

}  // namespace fastzoo
