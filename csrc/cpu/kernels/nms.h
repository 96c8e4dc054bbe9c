#pragma once

#include <cstdint>

#include "../runtime/capability.h"

namespace fastzoo::cpu {

// Greedy suppression within one segment. A box is named by its rank, its place by falling score.
struct SuppressArgs {
  const void* boxes;     // [., 4] of the kernel's type; rotated: [., 5] of double
  double threshold;      // an overlap above it suppresses
  bool degrees;          // of rotated boxes
  bool match;            // whether it is wanted which box suppresses one
  const int32_t* order;  // by rank, the boxes
  int32_t* ranks;        // [n] of the segment, rising; overwritten
  int64_t n;
  int32_t* by;         // out, by rank: of a kept one itself; with a match, of another the first
                       // that suppresses it
  bool out_of_memory;  // set where memory ran out
};

FASTZOO_DECLARE_KERNEL(suppress_float, (SuppressArgs&))
FASTZOO_DECLARE_KERNEL(suppress_double, (SuppressArgs&))
FASTZOO_DECLARE_KERNEL(suppress_rotated, (SuppressArgs&))

}  // namespace fastzoo::cpu
