// Sums over the rows of each code on the CPU, and the gradients that hold such sums: what the entry
// hands to the kernels.
#pragma once

#include <cstdint>

#include "../../math/vq.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// Rows [begin, end) of `order`, all of one code. The rows of a code that many chose are divided
// into parts of a fixed size, so that threads share them and the sums do not depend on how.
struct VqPart {
  int64_t code, begin, end;
  int64_t slot;  // of the part's sums in `partials`; -1 where the part has all rows of the code
};

struct VqCodesArgs {
  Dtype dtype;
  int64_t rows, dims;
  const void* x;           // [rows][dims]
  const void* codebook;    // [codes][dims]; not for vq_sum_rows
  const int64_t* indices;  // [rows]: negative for a row without a code

  const int64_t* order;  // the rows sorted by code, ascending within one
  const VqPart* parts;   // by code, then by row; every code has one
  double* partials;      // [slots][dims]
  Dtype sums_dtype;
  void* sums;  // [codes][dims]: the sums of rows, or the gradient by the codebook
};

struct VqNearestBackwardArgs : VqCodesArgs {
  math::Metric metric;
  const void* grad;  // [rows] of the compute type
  double* slopes;  // [rows][2], which the gradient by x leaves to that by the codebook; for cosine
  void* grad_x;    // [rows][dims]
};

struct VqQuantizeBackwardArgs : VqCodesArgs {
  math::Estimator estimator;
  double codebook_weight, beta;
  const void* grad_quantized;  // [rows][dims]
  const void* grad_losses;     // [rows] of the compute type
  void* grad_x;                // [rows][dims]
};

// Parts [begin, end).
FASTZOO_DECLARE_KERNEL(vq_sum_rows, (const VqCodesArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(vq_nearest_backward_codebook,
                       (const VqNearestBackwardArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(vq_quantize_backward_codebook,
                       (const VqQuantizeBackwardArgs&, int64_t begin, int64_t end))
// After all parts: adds up those of [begin, end) that have a slot.
FASTZOO_DECLARE_KERNEL(vq_join_parts, (const VqCodesArgs&, int64_t begin, int64_t end))
// Rows [begin, end).
FASTZOO_DECLARE_KERNEL(vq_nearest_backward_x,
                       (const VqNearestBackwardArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(vq_quantize_backward_x,
                       (const VqQuantizeBackwardArgs&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
