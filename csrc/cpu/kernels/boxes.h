#pragma once

#include <cstdint>

#include "../../math/boxes.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// Pairs of each with each are taken in tiles, down the columns of tiles first. What a tile is
// depends on the numbers of boxes alone, and so does the order in which gradients are summed.
struct PairTiles {
  static constexpr int64_t kRows = 256, kColumns = 512;  // at most
  // Of a cache line, and of any vector.
  static constexpr int64_t kMultiple = 16;

  int64_t n, m;  // boxes

  static int64_t count_of(int64_t items, int64_t most) { return (items + most - 1) / most; }
  int64_t down() const { return count_of(n, kRows); }
  int64_t across() const { return count_of(m, kColumns); }
  int64_t count() const { return down() * across(); }
  int64_t rows() const { return count_of(n, down()); }
  int64_t columns() const { return count_of(count_of(m, across()), kMultiple) * kMultiple; }
};

struct OverlapArgs {
  Dtype dtype;
  math::Measure measure;
  double union_eps;  // added to the union
  double eps;        // to the other denominators
  PairTiles tiles;
  const void* boxes1;  // [n, 4]
  const void* boxes2;  // [m, 4]
  void* overlap;       // out: [n, m], or [n] of box i with box i
  // The backward pass.
  const void* grad;  // of the overlap
  void* grad1;       // out: [n, 4], of the boxes' dtype
  void* grad2;       // out: [m, 4]
  void* sums1;       // each with each: [tiles across, n, 4], of one tile each
  void* sums2;       // [tiles down, m, 4]
};

// From pair `begin` to `end`.
FASTZOO_DECLARE_KERNEL(overlap_each, (const OverlapArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(overlap_each_backward, (const OverlapArgs&, int64_t begin, int64_t end))
// From tile `begin` to `end`; the backward pass leaves sums, and these are put together next.
FASTZOO_DECLARE_KERNEL(overlap_tiles, (const OverlapArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(overlap_tiles_backward, (const OverlapArgs&, int64_t begin, int64_t end))
// `begin` to `end` of the first set's gradients and then the second's.
FASTZOO_DECLARE_KERNEL(overlap_sums, (const OverlapArgs&, int64_t begin, int64_t end))

struct RotatedArgs {
  Dtype dtype;
  bool degrees;
  PairTiles tiles;
  const void* boxes1;  // [n, 5]
  const void* boxes2;  // [m, 5]
  void* overlap;       // out: [n, m], or [n] of box i with box i
};

FASTZOO_DECLARE_KERNEL(rotated_each, (const RotatedArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(rotated_tiles, (const RotatedArgs&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
