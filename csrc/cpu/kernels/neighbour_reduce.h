// Sums and maxima of features over lists of neighbours on the CPU: what the entries hand to the
// kernels.
#pragma once

#include <cstdint>

#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// "Compute type" is float, or double for float64.
struct NeighbourReduceArgs {
  Dtype dtype;  // of features, out and their gradients
  int64_t clouds, points, centres, neighbours_each, channels;  // B, N, S, K, C
  const void* features;                                        // [B][N][C]
  const int64_t* neighbours;                                   // [B][S][K], below N; negative: none
  const void* weights;  // [B][S][K] of the compute type, or nullptr
  void* out;            // [B][S][C]
  int32_t* winner;      // [B][S][C]: of a maximum; else nullptr

  // Backward only.
  const void* grad;     // [B][S][C]
  void* row_sums;       // [B][N][C] of the compute type, added to
  void* grad_features;  // [B][N][C]
  void* grad_weights;   // [B][S][K] of the compute type
  int64_t parts;        // that divide the channels of a cloud
};

// Centres of all clouds.
FASTZOO_DECLARE_KERNEL(neighbour_sum, (const NeighbourReduceArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(neighbour_maximum, (const NeighbourReduceArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(neighbour_sum_backward_weights,
                       (const NeighbourReduceArgs&, int64_t begin, int64_t end))
// Clouds times parts: each row of features is added to by one thread, in the order of the edges.
FASTZOO_DECLARE_KERNEL(neighbour_sum_backward,
                       (const NeighbourReduceArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(neighbour_maximum_backward,
                       (const NeighbourReduceArgs&, int64_t begin, int64_t end))
// Rows of features of all clouds: their gradient from its sums.
FASTZOO_DECLARE_KERNEL(neighbour_write_features,
                       (const NeighbourReduceArgs&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
