// Neighbour search: the arithmetic that decides which points are near, and the Morton order that
// lets a search skip most of them. Built without contraction everywhere, so that every backend
// finds the same neighbours to the last bit.
//
// The distance of two points is the sum over the dimensions, ascending, of (a - b)^2 for norm 2 or
// |a - b| for norm 1, each operation rounded by itself; the sum starts with the first term.
// Candidates are ordered by (distance, index), NaN last.
//
// Rounding is monotone, so that a box of points can be skipped exactly: with `near` the point of
// the box that is nearest to q along each axis, |q - near| <= |q - p| for every p of the box, hence
// the distance computed of (q, near) is at most that computed of (q, p). It may be skipped only
// where that is greater than the limit: at an equal distance a lower index counts.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastzoo::math {

enum class Norm : int { one = 1, two = 2 };

// What a dimension adds to the distance. V is a scalar or the CPU's vector.
template <Norm kNorm, class V>
FASTZOO_HD V distance_term(V a, V b) {
  const V difference = a - b;
  if constexpr (kNorm == Norm::one) {
    return absolute(difference);
  } else {
    return difference * difference;
  }
}

// Likewise of a point and a box. NaN bounds give NaN, which no limit admits.
template <Norm kNorm, class V>
FASTZOO_HD V box_distance_term(V q, V lower, V upper) {
  // q - near, or its negative: one of the differences at most is positive.
  const V outside = maximum(maximum(lower - q, q - upper), V(0));
  if constexpr (kNorm == Norm::one) {
    return outside;
  } else {
    return outside * outside;
  }
}

// Candidates have a distance below this, where the radius limits.
template <class T>
FASTZOO_HD T radius_limit(Norm norm, double radius) {
  const T rounded = static_cast<T>(radius);
  return norm == Norm::two ? rounded * rounded : rounded;
}

// False for an infinite radius alone: then a candidate may be at any distance, NaN too.
FASTZOO_HD bool radius_limits(double radius) { return radius != __builtin_inf(); }

// Distances are never negative: their bits ascend as they do. Every NaN is one, and the last.
FASTZOO_HD uint32_t distance_bits(float distance) {
  return is_nan(distance) ? 0x7fc00000u : bits_as<uint32_t>(distance);
}
FASTZOO_HD uint64_t distance_bits(double distance) {
  return is_nan(distance) ? 0x7ff8000000000000u : bits_as<uint64_t>(distance);
}

// Ascends as (distance, index) does.
FASTZOO_HD uint64_t distance_key(float distance, uint32_t index) {
  return static_cast<uint64_t>(distance_bits(distance)) << 32 | index;
}

// ---- Morton order ------------------------------------------------------------------------------
// A code has 30 bits: those of the cells along the first one, two or three axes, interleaved.
constexpr int kMortonBits = 30;

FASTZOO_HD int morton_axes(int64_t dims) { return dims < 3 ? static_cast<int>(dims) : 3; }

// Cells along an axis, for points of so many axes.
FASTZOO_HD uint32_t morton_cells(int axes) { return uint32_t{1} << kMortonBits / axes; }

// Two, or one, zero bits before each bit of a cell.
FASTZOO_HD uint32_t spread_by_three(uint32_t cell) {
  cell = (cell | cell << 16) & 0x030000ffu;
  cell = (cell | cell << 8) & 0x0300f00fu;
  cell = (cell | cell << 4) & 0x030c30c3u;
  return (cell | cell << 2) & 0x09249249u;
}
FASTZOO_HD uint32_t spread_by_two(uint32_t cell) {
  cell = (cell | cell << 8) & 0x00ff00ffu;
  cell = (cell | cell << 4) & 0x0f0f0f0fu;
  cell = (cell | cell << 2) & 0x33333333u;
  return (cell | cell << 1) & 0x55555555u;
}

// Cells in half a unit: the same along all axes, so that cells are cubes. `extent` is half the
// longest side of the points' box. 0 where all points are one. Halves keep every difference of
// finite coordinates finite.
FASTZOO_HD double morton_scale(double extent, int axes) {
  constexpr double kLargest = 0x1.fffffffffffffp1023;
  if (!(extent > 0)) return 0;
  return minimum(static_cast<double>(morton_cells(axes)) / extent, kLargest);
}

FASTZOO_HD uint32_t morton_cell(double coordinate, double lowest, double scale, int axes) {
  const double cell = (0.5 * coordinate - 0.5 * lowest) * scale;
  const double last = static_cast<double>(morton_cells(axes) - 1);
  return static_cast<uint32_t>(maximum(0.0, minimum(last, cell)));
}

// `point` and `lowest`, the lower corner of the points' box, have `axes` finite coordinates.
template <class T>
FASTZOO_HD uint32_t morton_code(const T* point, const T* lowest, double scale, int axes) {
  const uint32_t x = morton_cell(point[0], lowest[0], scale, axes);
  if (axes == 1) return x;
  const uint32_t y = morton_cell(point[1], lowest[1], scale, axes);
  if (axes == 2) return spread_by_two(x) | spread_by_two(y) << 1;
  const uint32_t z = morton_cell(point[2], lowest[2], scale, axes);
  return spread_by_three(x) | spread_by_three(y) << 1 | spread_by_three(z) << 2;
}

}  // namespace fastzoo::math
