// Coupling on the CPU: what the entries hand to the kernels.
#pragma once

#include <cstdint>

#include "../../math/coupling.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// Elements of a tile at most.
constexpr int64_t kCouplingTile = 1024;

// The mapped columns of all rows in tiles: of several whole rows where they are short, and else of
// a piece of one row.
struct CouplingTiles {
  int64_t rows, width;  // R, m
  int64_t rows_each;    // of a tile
  int64_t pieces;       // of a row
  int64_t piece;        // columns of a piece, but for the last

  __attribute__((always_inline)) CouplingTiles(int64_t rows, int64_t width)
      : rows(rows), width(width), rows_each(1), pieces(1), piece(width) {
    if (width <= kCouplingTile) {
      rows_each = kCouplingTile / (width > 1 ? width : 1);
    } else {
      constexpr int64_t kLine = 64;
      const int64_t least = (width + kCouplingTile - 1) / kCouplingTile;
      piece = math::round_up((width + least - 1) / least, kLine);
      pieces = (width + piece - 1) / piece;
    }
  }

  __attribute__((always_inline)) int64_t count() const {
    return (rows + rows_each - 1) / rows_each * pieces;
  }
};

// Shift or scale [R][m], with strides in elements; nullptr where the map has none.
struct CouplingParameter {
  const void* data;
  int64_t row, column;
};

// The log-determinant and its gradient are of the compute type: float, or double for float64.
struct CouplingArgs {
  Dtype dtype;  // of x, y, shift, scale and all their gradients
  math::CouplingMap map;
  double constant, floor;
  bool shift_first, inverse;
  int64_t rows, columns, begin, end;  // R, n; of the mapped columns
  const void* x;                      // [R][n]
  CouplingParameter shift, scale;
  const uint8_t* mask;  // [m] or, `mask_rows`, [R][m]; or nullptr
  bool mask_rows;
  bool sum_logdet;
  bool streams;  // whether what is written is to bypass the caches

  // Forward only.
  void* y;        // [R][n]
  void* logdet;   // [R], or [R][n] unless it is to be summed
  double* parts;  // [R][pieces]: the sums of the pieces of rows that have several; else nullptr

  // Backward only.
  const void* grad_y;       // [R][n]
  const void* grad_logdet;  // like logdet
  void* grad_x;             // [R][n]
  void* grad_shift;         // [R][m], or nullptr
  void* grad_scale;         // [R][m], or nullptr

  __attribute__((always_inline)) CouplingTiles tiles() const { return {rows, end - begin}; }
};

// Of tiles [begin, end).
FASTZOO_DECLARE_KERNEL(coupling_forward, (const CouplingArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(coupling_backward, (const CouplingArgs&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
