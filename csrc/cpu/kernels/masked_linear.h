// Masked-autoregressive transforms on the CPU: what the entry hands to the kernels.
#pragma once

#include <cstdint>

#include "../../math/masked_linear.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// All values are of the compute type: float, or double for float64.
struct MaskedArgs {
  Dtype dtype;
  math::MaskedLayout layout;
  math::MaskedSteps steps;
  math::MaskedMap map;
  math::Activation activation;
  int64_t batch;
  const void* net;    // [layout.size]
  const void* first;  // [batch][units of the first layer], added to what enters them, or nullptr
  const void* y;      // [batch][features]
  void* x;            // likewise
  void* logdet;       // [batch]
};

struct MaskedPlan {
  int vectors;  // of samples in a tile; what a sample gives does not depend on it
  int64_t tiles, scratch_bytes;
};

FASTZOO_DECLARE_KERNEL(masked_linear_plan, (const MaskedArgs&, int64_t threads, MaskedPlan&))
// Tiles [begin, end), in scratch of the plan's bytes.
FASTZOO_DECLARE_KERNEL(autoregressive_inverse, (const MaskedArgs&, const MaskedPlan&, int64_t begin,
                                                int64_t end, void* scratch))

}  // namespace fastzoo::cpu
