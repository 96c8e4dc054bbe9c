// Nearest-codebook lookup on the CPU: what the entry hands to the kernels.
#pragma once

#include <cstdint>

#include "../../math/vq.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

struct VqArgs {
  Dtype dtype;
  math::Metric metric;
  bool bfloat16;  // find candidates by bfloat16 products
  bool fast;      // and believe them
  bool probing;   // a lookup that only counts candidates
  int64_t rows, codes, dims;
  int64_t k;      // answers for each row
  const void* x;  // rows of dims, x_stride elements apart
  int64_t x_stride;
  const void* codebook;  // [codes][dims]
  const bool* mask;      // [rows]: which have an answer; or null
  int threads;           // how many lookups run at once

  // Filled by the kernels, in the order below. "Compute type" is float, or double for float64.
  void* centre;     // [dims] of the compute type: what l2 subtracts from both sides
  void* starts;     // of the packed codes, in the compute type: what their scores start from
  void* lines;      // the packed codes
  double* norms;    // [codes] |c|; only for cosine
  double* squares;  // [codes] |c'|^2 of the codes before their products round them
  double* lost;     // [codes] the squares of what they lose by that; only for bfloat16
  int32_t* loose;   // [loose_count] codes that the fast pass cannot score
  int64_t loose_count;
  double largest_norm;         // of the packed codes
  double largest_lost;         // likewise
  double largest_cosine_norm;  // of norms

  int64_t* indices;  // k for each row, out_stride apart
  void* values;  // likewise, of the compute type: distances; losses where quantized is asked for
  int64_t out_stride;
  void* quantized;     // like x: the codes found; or null
  double loss_weight;  // of the squared distance in a loss
};

struct VqPlan {
  bool bfloat16;  // whether its products could pay
  int64_t code_panels;
  int64_t starts_bytes;
  int64_t lines_bytes;
  int64_t table_size;       // of vq_select's hash table, a power of two
  int64_t workspace_bytes;  // for each running vq_lookup
};

FASTZOO_DECLARE_KERNEL(vq_plan, (const VqArgs&, VqPlan&))
// Dimensions [begin, end) of the centre.
FASTZOO_DECLARE_KERNEL(vq_centre, (const VqArgs&, int64_t begin, int64_t end))
// Code panels [begin, end).
FASTZOO_DECLARE_KERNEL(vq_pack, (const VqArgs&, int64_t begin, int64_t end))
// Takes out of the panels what the fast pass need not or cannot score.
FASTZOO_DECLARE_KERNEL(vq_select, (VqArgs&, int32_t* table, int64_t table_size))
// Whether bfloat16 leaves few enough candidates to pay; from a sample of the rows.
FASTZOO_DECLARE_KERNEL(vq_probe, (const VqArgs&, void* workspace, bool& result))
// Rows [begin, end).
FASTZOO_DECLARE_KERNEL(vq_lookup, (const VqArgs&, int64_t begin, int64_t end, void* workspace))

}  // namespace fastzoo::cpu
