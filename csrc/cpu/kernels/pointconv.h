// PointConv on the CPU: what the entries hand to the kernels.
#pragma once

#include <cstdint>

#include "../../math/pointconv.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// The edges from centres to their neighbours, and the net that weighs them. "Compute type" is
// float, or double for float64.
struct EdgeArgs {
  Dtype dtype;  // its compute type is that of all below
  math::NetLayout layout;
  int64_t clouds, points, centres, neighbours_each;  // B, N, S, K
  const void* xyz;                                   // [B][N][dims]
  const void* centre_xyz;                            // [B][S][dims]
  const int64_t* neighbours;                         // [B][S][K], below N; negative for none
  const void* net;                                   // [layout.size]

  // A unit is some centres in turn, of all clouds. Nothing but it decides how sums are divided, so
  // that they do not depend on the number of threads.
  int64_t unit;
  // The units at hand begin at centre `first` and have `count` of them.
  int64_t first, count;

  void* memory;  // of the plan's bytes, kept while the same centres are at hand

  // Backward only.
  bool wants_coordinates;
  double* net_sums;    // [units at hand][layout.size]: gradients by the net
  void* grad_xyz;      // [B][N][dims], added to
  void* grad_centres;  // [B][S][dims]
};

struct PointConvArgs : EdgeArgs {
  bool grouped;                          // whether features are [B][S][K][C]
  bool has_linear;                       // else the outputs are the sums themselves
  int64_t channels, outputs;             // C, and O or C M
  const void *features, *linear, *bias;  // of dtype: [B][N][C], [O][C M], [O] or nullptr
  const void* scale;                     // [B][S][K], or nullptr
  void* out;                             // [B][S][O] of dtype
  int parts;                             // that divide the rows of products

  // Backward only.
  const void* grad;     // [B][S][O] of dtype; nullptr forward
  void* row_sums;       // [B][N][C] of the compute type, added to; nullptr where grouped
  void* grad_features;  // of dtype, as features
  void* grad_scale;     // [B][S][K]; edges without a neighbour are left alone
  void* linear_sums;    // PointConvPlan::linear_sums of the compute type, added to
  void* grad_linear;    // [O][C M] of dtype
  double* bias_sums;    // [O], added to
};

struct PointConvPlan {
  int64_t bytes, scratch_bytes;
  // What the kernels' work is divided by.
  int64_t output_panels, channel_vectors, channel_pairs, linear_panels;
  int64_t linear_sums;
};

// Also sets which centres are taken at first, and how many at once.
FASTZOO_DECLARE_KERNEL(pointconv_plan, (PointConvArgs&, PointConvPlan&))

// Each takes a range of its work, and scratch of the plan's bytes.
#define FASTZOO_DECLARE_POINTCONV(name) \
  FASTZOO_DECLARE_KERNEL(name, (const PointConvArgs&, int64_t begin, int64_t end, void* scratch))
// Units of centres: lists their edges, weighs them and sums their features.
FASTZOO_DECLARE_POINTCONV(pointconv_sum)
// Output panels times parts: the linear layer.
FASTZOO_DECLARE_POINTCONV(pointconv_output)

// After pointconv_sum. Channel vectors times parts: the gradient by the sums of features.
FASTZOO_DECLARE_POINTCONV(pointconv_backward_sums)
// Panels of the linear layer: adds to its gradient.
FASTZOO_DECLARE_POINTCONV(pointconv_backward_linear)
// Outputs: adds to the gradient by the bias.
FASTZOO_DECLARE_POINTCONV(pointconv_backward_bias)
// After pointconv_backward_sums. Clouds at hand times pairs of channel vectors: adds to the
// gradient by features, or sets it where they are grouped.
FASTZOO_DECLARE_POINTCONV(pointconv_backward_features)
// After pointconv_backward_sums. Units of centres: the gradients by scale, net and centres.
FASTZOO_DECLARE_POINTCONV(pointconv_backward_edges)

// At the end. Rows of the linear layer: its gradient from its sums.
FASTZOO_DECLARE_POINTCONV(pointconv_write_linear)
// Rows of features: their gradient from its sums.
FASTZOO_DECLARE_POINTCONV(pointconv_write_features)

struct MomentsArgs : EdgeArgs {
  double* sums;  // [units at hand][M + M * M], of the outputs and of their products
  // Backward only, of the compute type.
  const void *mean, *grad_mean;  // [M]
  const void* slope;             // [M][M]: the gradient by the covariance plus its transpose
  double edges;                  // of all clouds
};

FASTZOO_DECLARE_KERNEL(pointconv_moments_plan, (MomentsArgs&, PointConvPlan&))
// Units of centres.
FASTZOO_DECLARE_KERNEL(pointconv_moments_sum,
                       (const MomentsArgs&, int64_t begin, int64_t end, void* scratch))
FASTZOO_DECLARE_KERNEL(pointconv_moments_backward,
                       (const MomentsArgs&, int64_t begin, int64_t end, void* scratch))

// After the kernel of either that finds the gradient by the centres. Dimensions of the coordinates:
// adds to the gradient by xyz.
FASTZOO_DECLARE_KERNEL(pointconv_backward_points, (const EdgeArgs&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
