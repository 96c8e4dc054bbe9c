// Margin softmax on the CPU: what the entries hand to the kernels.
#pragma once

#include <cstdint>

#include "../../math/margin_softmax.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

enum class MarginPass : int { negatives, negatives_backward, scores, scores_backward };

// "Compute type" is float, or double for float64; what has no other type below is of it. N rows,
// C classes of K sub-centres, D dimensions.
struct MarginArgs {
  MarginPass pass;
  Dtype dtype;
  bool bfloat16_products;
  int64_t rows, classes, sub_centers, dims;
  bool normalize_embeddings, normalize_weight, with_total;
  bool needs_embeddings, needs_weight, needs_scale;
  double interclass_filter;
  int parts;  // ranges of classes that are worked on at once

  // The rows at hand: they may come in several ranges, one call of each kernel a range.
  int64_t first, count;

  const void* embeddings;    // [N][D] of dtype
  const void* weight;        // [C * K][D] of dtype
  const int64_t* labels;     // [N]
  const void* scale;         // [N]
  const void* threshold;     // [N], or nullptr
  const void* hardness;      // [1], or nullptr
  const void* class_weight;  // [C], or nullptr

  // Backward only.
  const void* grad_target;          // [N]
  const void* grad_lse;             // [N]
  const void* grad_total;           // [N]
  const void* grad_scores;          // [N][C]
  const void* grad_embedding_norm;  // [N]
  const void* grad_weight_norm;     // [N]
  const void* saved_lse;            // [N]
  const uint16_t* saved_kept;       // [C][N], or nullptr
  const void* saved_kept_max;       // [ceil(C / 64)][N]

  void* memory;  // MarginPlan::bytes

  // [N] each, but where said.
  void* target;
  void* lse;
  void* total;
  void* scores;  // [N][C]
  void* embedding_norm;
  void* weight_norm;
  uint16_t* kept;         // [C][N], or nullptr
  void* kept_max;         // [ceil(C / 64)][N]
  void* grad_embeddings;  // [N][D] of dtype
  void* grad_weight;      // [C * K][D] of dtype
  void* grad_scale;
};

struct MarginPlan {
  int64_t bytes;
  int64_t blocks;  // of rows, for margin_prepare and margin_finish
  int64_t chunks;  // of classes
};

FASTZOO_DECLARE_KERNEL(margin_plan, (const MarginArgs&, MarginPlan&))
// Blocks [begin, end).
FASTZOO_DECLARE_KERNEL(margin_prepare, (const MarginArgs&, int64_t begin, int64_t end))
// One part: its chunks of classes, for all rows.
FASTZOO_DECLARE_KERNEL(margin_part, (const MarginArgs&, int part))
// Blocks [begin, end); sums is scratch for D doubles.
FASTZOO_DECLARE_KERNEL(margin_finish, (const MarginArgs&, int64_t begin, int64_t end, double* sums))

struct MarginTargetArgs {
  Dtype dtype;  // float32 or float64, of everything below, each [rows]
  math::MarginRule rule;
  const void *cosine, *m1, *m2, *m3;
  const void* grad;  // nullptr: the value is wanted
  void* value;
  void *grad_cosine, *grad_m1, *grad_m2, *grad_m3;
};

// Rows [begin, end).
FASTZOO_DECLARE_KERNEL(margin_target, (const MarginTargetArgs&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
