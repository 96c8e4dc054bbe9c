// Kernel density: the profiles k(u) of a scaled squared distance u = s |q - p|^2, and their
// derivatives. T is float, double, or a vector of them.
#pragma once

#include "host_device.h"

namespace fastzoo::math {

enum class DensityKernel : int { gaussian = 0, epanechnikov = 1, tophat = 2 };

// False where no kernel has the name. Host only.
static inline bool density_kernel_named(const char* name, DensityKernel& kernel) {
  return value_named(name, {"gaussian", "epanechnikov", "tophat"}, kernel);
}

// exp(-u), max(1 - u, 0), [u < 1]. A NaN stays one, but for the tophat.
template <DensityKernel kKernel, class T>
FASTZOO_HD T density_profile(T u) {
  if constexpr (kKernel == DensityKernel::gaussian) {
    return exponential(T(0) - u);
  } else if constexpr (kKernel == DensityKernel::epanechnikov) {
    return maximum(T(1) - u, T(0));
  } else {
    return select_greater(T(1), u, T(1), T(0));
  }
}

// k'(u), given that k(u) = profile.
template <DensityKernel kKernel, class T>
FASTZOO_HD T density_slope(T u, T profile) {
  if constexpr (kKernel == DensityKernel::gaussian) {
    return T(0) - profile;
  } else if constexpr (kKernel == DensityKernel::epanechnikov) {
    return select_greater(T(1), u, T(-1), T(0));
  } else {
    return T(0);
  }
}

// Beyond this u both are exactly zero. T is float or double.
template <class T>
FASTZOO_HD T density_reach(DensityKernel kernel) {
  if (kernel != DensityKernel::gaussian) return T(1);
  return sizeof(T) == 4 ? T(104) : T(746);
}

}  // namespace fastzoo::math
