#pragma once

#include <cstdint>

#include "../runtime/capability.h"

namespace fastzoo::cpu {

// Greedy suppression within one segment.
struct SuppressArgs {
  const void* boxes;   // [., 4] of the kernel's type; rotated: [., 5] of double
  double threshold;    // an overlap above it suppresses
  bool degrees;        // of rotated boxes
  int32_t* order;      // in: the segment's boxes by falling score; out: those kept, in front
  int64_t n;           // how many
  int64_t kept;        // out: how many
  int32_t* by;         // out, of each box of the segment: the first that suppresses it, or itself;
                       // nullptr where it is not wanted
  bool out_of_memory;  // set where memory ran out
};

FASTZOO_DECLARE_KERNEL(suppress_float, (SuppressArgs&))
FASTZOO_DECLARE_KERNEL(suppress_double, (SuppressArgs&))
FASTZOO_DECLARE_KERNEL(suppress_rotated, (SuppressArgs&))

}  // namespace fastzoo::cpu
