// Suppression that lowers scores, on the CPU: what the entries hand to the kernels.
#pragma once

#include <cstdint>

#include "../../math/nms.h"
#include "../runtime/capability.h"

namespace fastzoo::cpu {

// Columns are read a whole vector at a time: they have room for a multiple of this many boxes.
constexpr int64_t kColumnMultiple = 16;

template <class T>
struct BoxColumns {
  T *x1, *y1, *x2, *y2;
};

// One segment, its boxes by falling score.
template <class T>
struct SoftNmsArgs {
  BoxColumns<T> boxes;     // [n]
  const int32_t* indices;  // [n] of equal scores the box of the lower index is taken first
  T* scores;               // [n] in: all above the threshold; out: as it was taken, NaN if never
  int64_t n, most;         // at most so many are taken
  math::Decay method;
  T iou_threshold;
  double sigma, score_threshold;

  // Scratch, with room for a whole vector.
  BoxColumns<T> taken;         // [n]
  BoxColumns<T> waiting;       // [n] looked at, but not taken yet
  T* waiting_scores;           // [n] zeros
  int32_t* waiting_positions;  // [n]
};

// All segments, one after another, the boxes of each by falling score. Columns have room for a
// whole vector.
template <class T>
struct MatrixNmsArgs {
  BoxColumns<T> boxes;      // [n]
  const int32_t* segments;  // [n] where the segment of a box begins
  T* covered;               // [n] the largest overlap with an earlier box
  double* decays;           // [n]
  int64_t n;
  math::Decay method;
  double sigma;
};

FASTZOO_DECLARE_KERNEL(soft_nms_float, (const SoftNmsArgs<float>&))
FASTZOO_DECLARE_KERNEL(soft_nms_double, (const SoftNmsArgs<double>&))

// Rows [begin, end): of all rows `covered` first, then `decays`.
FASTZOO_DECLARE_KERNEL(matrix_nms_cover_float,
                       (const MatrixNmsArgs<float>&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(matrix_nms_cover_double,
                       (const MatrixNmsArgs<double>&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(matrix_nms_decay_float,
                       (const MatrixNmsArgs<float>&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(matrix_nms_decay_double,
                       (const MatrixNmsArgs<double>&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
