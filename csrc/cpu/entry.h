// What the entries of the CPU operators share.
#pragma once

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

}  // namespace fastzoo
