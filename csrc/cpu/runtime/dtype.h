// Element types as the CPU kernels see them.
#pragma once

#include <cstdint>

namespace fastzoo::cpu {

enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The type that elements are computed in.
template <class Element>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

}  // namespace fastzoo::cpu
