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
  int64_t rows, codes, dims;
  const void* x;         // [rows][dims]
  const void* codebook;  // [codes][dims]
  int threads;           // how many lookups run at once

  // Filled by the kernels, in the order below. "Compute type" is float, or double for float64.
  void* centre;     // [dims] of the compute type: what l2 subtracts from both sides
  void* panels;     // the packed codebook
  double* norms;    // [codes] |c|; only for cosine
  double* squares;  // [codes] |c'|^2 of the codes as packed
  int32_t* loose;   // [loose_count] codes that the fast pass cannot score
  int64_t loose_count;
  double largest_norm;         // of the packed codes
  double largest_cosine_norm;  // of norms

  int64_t* indices;  // [rows]
  void* distance;    // [rows] of the compute type
};

struct VqPlan {
  int64_t code_panels;
  int64_t panels_bytes;
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
// Rows [begin, end).
FASTZOO_DECLARE_KERNEL(vq_lookup, (const VqArgs&, int64_t begin, int64_t end, void* workspace))

}  // namespace fastzoo::cpu
