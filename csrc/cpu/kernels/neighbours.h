// Neighbour search on the CPU: what the entry hands to the kernels. Everything is of the compute
// type, float or double, and of one cloud.
#pragma once

#include <cstdint>

#include "../../math/neighbours.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// A tree of more dimensions than these would skip next to nothing.
constexpr int kMostTreeDims = 8;

struct NeighbourArgs {
  Dtype dtype;
  math::Norm norm;
  bool first;  // the lowest indices, not the nearest
  double radius;
  int64_t dims;
  int64_t k;  // results of a query
};

struct NeighbourCloud {
  int64_t points;
  const void* queries;  // [queries][dims]
  // In which order to search for them, or null for that of their rows; near ones should follow one
  // another.
  const int32_t* order;

  // PointBlocksView of the points: `tree` with boxes, or null for a search of every pair; `rows` in
  // the order of the rows, or null where `tree` alone will do.
  const void* tree;
  const void* rows;

  void* distances;   // [queries][k]
  int64_t* indices;  // likewise
};

FASTZOO_DECLARE_KERNEL(neighbour_workspace, (const NeighbourArgs&, int64_t points, int64_t& bytes))
// Queries [begin, end) in the order of search.
FASTZOO_DECLARE_KERNEL(neighbour_search, (const NeighbourArgs&, const NeighbourCloud&,
                                          int64_t begin, int64_t end, void* workspace))

struct NeighbourBackwardArgs {
  Dtype dtype;
  math::Norm norm;
  int64_t dims;
  int64_t k;
};

struct NeighbourBackwardCloud {
  int64_t queries, points;
  const void* p1;          // [queries][dims]
  const void* p2;          // [points][dims]
  const void* grad;        // [queries][k]
  const int64_t* indices;  // likewise
  void* grad_p1;
  void* grad_p2;
};

// Queries [begin, end) of grad_p1; `sums` has room for the dimensions of one.
FASTZOO_DECLARE_KERNEL(neighbour_backward_p1,
                       (const NeighbourBackwardArgs&, const NeighbourBackwardCloud&, int64_t begin,
                        int64_t end, double* sums))
// Points [begin, end) of grad_p2; `sums` has room for the dimensions of all of these, `pairs` for k
// numbers.
FASTZOO_DECLARE_KERNEL(neighbour_backward_p2,
                       (const NeighbourBackwardArgs&, const NeighbourBackwardCloud&, int64_t begin,
                        int64_t end, double* sums, int32_t* pairs))

}  // namespace fastzoo::cpu
