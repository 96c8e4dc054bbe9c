// Contrastive losses: a pair's term of the sigmoid loss, and its derivative. T is float, double, or
// a vector of them; each is finite wherever z is.
#pragma once

#include "host_device.h"

namespace fastzoo::math {

// log(1 + exp(z)).
template <class T>
FASTZOO_HD T softplus(T z) {
  return maximum(z, T(0)) + log_one_plus(exponential(minimum(z, T(0) - z)));
}

// 1 / (1 + exp(-z)).
template <class T>
FASTZOO_HD T sigmoid(T z) {
  const T e = exponential(minimum(z, T(0) - z));
  return select(greater(T(0), z), e, T(1)) / (T(1) + e);
}

}  // namespace fastzoo::math
