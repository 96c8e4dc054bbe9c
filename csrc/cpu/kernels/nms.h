#pragma once

#include <cstdint>

#include "../runtime/capability.h"

namespace fastzoo::cpu {

template <class T>
struct NmsArgs {
  const T* boxes;  // [n, 4]
  int64_t n;
  T threshold;     // an overlap above it suppresses
  int32_t* order;  // in: the n boxes by falling score; out: those kept, in front
  int64_t kept;    // out: how many; -1 where memory ran out
};

FASTZOO_DECLARE_KERNEL(nms_float, (NmsArgs<float>&))
FASTZOO_DECLARE_KERNEL(nms_double, (NmsArgs<double>&))

}  // namespace fastzoo::cpu
