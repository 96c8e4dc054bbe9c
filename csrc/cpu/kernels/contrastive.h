// Contrastive losses on the CPU: what the entries hand to the kernels.
#pragma once

#include <cstdint>

#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// "Compute type" is float, or double for float64; what has no other type below is of it. N queries,
// M keys, D dimensions.
struct ContrastiveArgs {
  Dtype dtype;
  bool backward;
  bool bfloat16_products;
  bool exclude_self, columns, sigmoid;
  bool needs_queries, needs_keys, needs_scale;
  int64_t queries_count, keys_count, dims;
  int parts;  // ranges of keys that are worked on at once

  // The queries at hand: they may come in several ranges, one call of each kernel a range.
  int64_t first, count;

  const void* queries;       // [N][D] of dtype
  const void* keys;          // [M][D] of dtype
  const int64_t* positives;  // [N]
  const void* scale;         // [1]
  const void* bias;          // [1]

  // Backward only.
  const void* grad_positive;  // [N]
  const void* grad_row;       // [N]
  const void* grad_column;    // [M], or nullptr
  const void* saved_row;      // [N]
  const void* saved_column;   // [M]

  void* memory;  // ContrastivePlan::bytes

  void* positive;        // [N]
  void* row;             // [N]
  void* column;          // [M]
  void* column_sum;      // [M]: scratch that outlives a range of queries
  void* grad_queries;    // [N][D] of dtype
  void* grad_keys;       // [M][D] of dtype
  double* grad_scalars;  // [2]: of scale and bias, so far
  void* grad_scale;      // [1]
  void* grad_bias;       // [1]
};

struct ContrastivePlan {
  int64_t bytes;
  int64_t blocks;  // of queries, for contrastive_prepare and contrastive_finish
  int64_t chunks;  // of keys
};

FASTZOO_DECLARE_KERNEL(contrastive_plan, (const ContrastiveArgs&, ContrastivePlan&))
// Blocks [begin, end).
FASTZOO_DECLARE_KERNEL(contrastive_prepare, (const ContrastiveArgs&, int64_t begin, int64_t end))
// One part: its chunks of keys, for the range of queries.
FASTZOO_DECLARE_KERNEL(contrastive_part, (const ContrastiveArgs&, int part))
// Blocks [begin, end); sums is scratch for D doubles.
FASTZOO_DECLARE_KERNEL(contrastive_finish,
                       (const ContrastiveArgs&, int64_t begin, int64_t end, double* sums))
// The gradients of scale and bias, over the range of queries.
FASTZOO_DECLARE_KERNEL(contrastive_scalars, (const ContrastiveArgs&))

}  // namespace fastzoo::cpu
