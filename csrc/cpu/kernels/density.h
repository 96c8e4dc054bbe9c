// Kernel density on the CPU: what the entry hands to the kernels. A sum over pairs of two sides is
// kept for each of the owners; the points of the other side, the stream, pass by.
#pragma once

#include <cstdint>

#include "../../math/density.h"
#include "../runtime/arena.h"
#include "../runtime/capability.h"

namespace fastzoo::cpu {

enum class DensitySum : int { values = 0, by_queries = 1, by_points = 2 };

// Points stand in panels; those of a cloud begin with a panel.
constexpr int64_t kDensityPanel = 16;
// Panels have boxes up to so many dimensions.
constexpr int64_t kDensityBoxDims = 8;

// Values and results are of the compute type.
struct DensitySide {
  const void* coordinates;  // [points][dims]
  const int64_t* rows;      // [panels][kDensityPanel]: the point at each place; -1 where none is
};

// Owners are the queries, and the points are the stream; by_points it is the other way round.
struct DensityArgs {
  math::DensityKernel kernel;
  DensitySum sum;
  int64_t dims;
  DensitySide owners, stream;
  const void* scale;   // [points]
  const void* weight;  // [points]
  const void* grad;    // [queries]; not for values

  int64_t panels;  // of the stream
  void* lines;     // [panels][lines_of_panel()][kDensityPanel]
  void* boxes;     // [2 dims + 1][panels] and a panel more; nullptr: no panel is left out

  void* out;          // values: [queries]; else the owners' gradient
  void* grad_scale;   // by_points: [points]
  void* grad_weight;  // likewise

  // Of a panel: the coordinates, then scale and weight, or the gradient.
  __attribute__((always_inline)) int64_t lines_of_panel() const {
    return dims + (sum == DensitySum::by_points ? 1 : 2);
  }
};

// Owners at places [begin, end), all of one cloud, and the panels of its stream.
struct DensityTask {
  int64_t begin, end;
  int64_t first_panel, last_panel;
};

// How many owners a task has at most.
__attribute__((always_inline)) inline int64_t density_owners(int64_t dims) {
  return dims > 32 ? 16 : 64;
}

// What a task works in, T being the compute type.
template <class T>
struct DensityScratch {
  Arena arena;
  T* owners;      // [density_owners()][dims]
  double* sums;   // [density_owners()][dims + 2]
  int32_t* near;  // [panels of the task]

  // Without a base it only counts.
  __attribute__((always_inline)) DensityScratch(void* base, int64_t dims, int64_t panels)
      : arena(base),
        owners(arena.take<T>(density_owners(dims) * dims)),
        sums(arena.take<double>(density_owners(dims) * (dims + 2))),
        near(arena.take<int32_t>(panels)) {}
};

// Fills the lines and boxes of panels [begin, end).
FASTZOO_DECLARE_KERNEL(density_pack_float, (const DensityArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(density_pack_double, (const DensityArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(density_run_float, (const DensityArgs&, const DensityTask&, void* scratch))
FASTZOO_DECLARE_KERNEL(density_run_double, (const DensityArgs&, const DensityTask&, void* scratch))

}  // namespace fastzoo::cpu
