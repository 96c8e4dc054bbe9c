// Farthest points and voxels on the CPU: what the entry hands to the kernels.
#pragma once

#include <cstdint>

#include "../runtime/capability.h"
#include "../runtime/point_blocks.h"

namespace fastzoo::cpu {

// One cloud. Places are those of `blocks`, which has boxes where they are to be used.
template <class T>
struct FarthestArgs {
  PointBlocksView<T> blocks;
  T* least;  // [places]: the least distance to those chosen; -1 of a chosen one, and of no point
  // Of each box of a level, 16 to a group: the greatest of `least`, and the place that has it.
  T* greatest[PointBlocksView<T>::kMostLevels];
  int32_t* farthest[PointBlocksView<T>::kMostLevels];
  int32_t start;  // a place
  int64_t count;  // from 1 to the size of the cloud
  int64_t* out;   // [count] rows
};

// Rows [begin, end) of [rows][dims] points.
template <class T>
struct CellsArgs {
  const T* points;
  const T* start;  // [dims]
  const T* size;   // [dims]
  int64_t dims;
  T* cells;          // [end - begin][dims]
  uint64_t* hashes;  // [end - begin]: kNoCell of a point without one
};
constexpr uint64_t kNoCell = 0;

FASTZOO_DECLARE_KERNEL(farthest_points_float, (const FarthestArgs<float>&))
FASTZOO_DECLARE_KERNEL(farthest_points_double, (const FarthestArgs<double>&))
FASTZOO_DECLARE_KERNEL(find_cells_float, (const CellsArgs<float>&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(find_cells_double, (const CellsArgs<double>&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
