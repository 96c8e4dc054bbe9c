// Rational-quadratic splines on the CPU: what the entry hands to the kernels.
#pragma once

#include <cstdint>

#include "../../math/splines.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

constexpr int kMostSplineBins = 64;

// Elements of a tile: whole rows, or a part of one row that is longer.
constexpr int64_t kSplineTile = 1024;

// Raw parameters of one kind, those of an element side by side; strides are in elements.
struct SplineLines {
  void* data;
  int64_t row, column;
};

// Everything is of dtype, or where it is said of the type that this is computed in.
struct SplineArgs {
  Dtype dtype;
  math::SplineConvention convention;
  math::SplineTails tails;
  bool inverse, sum_logdet;
  int bins;
  int64_t rows, columns, begin, end;  // the spline is of columns [begin, end)
  double left, right, bottom, top;
  double min_width, min_height, min_derivative;
  const void* x;  // [rows][columns]
  SplineLines widths, heights, derivatives;

  // Forward.
  void* y;        // as x
  void* logdet;   // [rows] or [rows][columns], of the compute type
  double* parts;  // [rows][parts()]: sums of the parts of a row, where it has more than one

  // Backward.
  const void* grad_y;       // as x
  const void* grad_logdet;  // as logdet
  void* grad_x;
  SplineLines grad_widths, grad_heights, grad_derivatives;

  __attribute__((always_inline)) int64_t width() const { return end > begin ? end - begin : 1; }
  __attribute__((always_inline)) int64_t rows_of_tile() const {
    return width() < kSplineTile ? kSplineTile / width() : 1;
  }
  __attribute__((always_inline)) int64_t parts_of_row() const {
    return (width() + kSplineTile - 1) / kSplineTile;
  }
  __attribute__((always_inline)) int64_t tiles() const {
    return (rows + rows_of_tile() - 1) / rows_of_tile() * parts_of_row();
  }
};

// Tiles [first, last).
FASTZOO_DECLARE_KERNEL(splines_forward, (const SplineArgs&, int64_t first, int64_t last))
FASTZOO_DECLARE_KERNEL(splines_backward, (const SplineArgs&, int64_t first, int64_t last))

}  // namespace fastzoo::cpu
