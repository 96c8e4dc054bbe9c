// Non-maximum suppression: the arithmetic that decides a keep. Built without contraction
// everywhere, so that every backend takes the same decision to the last bit.
#pragma once

#include <cstdint>

#include "boxes.h"
#include "exact.h"
#include "host_device.h"

namespace fastzoo::math {

// The largest T not above `threshold`: for an overlap of type T, overlap > threshold in double
// holds exactly when overlap > round_down<T>(threshold) holds in T.
template <class T>
FASTZOO_HD T round_down(double threshold) {
  const T nearest = static_cast<T>(threshold);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (static_cast<double>(nearest) > threshold) {
      const uint32_t bits = bits_as<uint32_t>(nearest);
      if (nearest == 0) return bits_as<T>(0x80000001u);
      return bits_as<T>(nearest > 0 ? bits - 1 : bits + 1);
    }
  }
  return nearest;
}

// Unsigned keys that ascend as scores fall. -0 equals +0; every NaN shares the last key.
FASTZOO_HD uint32_t falling_key(float score) {
  if (is_nan(score)) return 0xffffffffu;
  const uint32_t bits = bits_as<uint32_t>(score + 0.0f);
  return (bits >> 31) ? bits : 0x7fffffffu - bits;
}

FASTZOO_HD uint64_t falling_key(double score) {
  if (is_nan(score)) return 0xffffffffffffffffull;
  const uint64_t bits = bits_as<uint64_t>(score + 0.0);
  return (bits >> 63) ? bits : 0x7fffffffffffffffull - bits;
}

// The rules that lower scores. Each decay is one rounding of T, whatever computes it.
enum class Decay { linear, gaussian, hard };

// The rule of a name, as the operators' schemas have it; false where there is none. Host only.
static inline bool decay_named(const char* name, Decay& decay) {
  return value_named(name, {"linear", "gaussian", "hard"}, decay);
}

// V is double or the CPU's vector of doubles.
template <class V>
FASTZOO_HD V gaussian_decay(V iou, V sigma) {
  return exact_exponential((V(0.0) - iou * iou) / sigma);
}

// What soft-NMS multiplies the score of a box with for its overlap with one that was taken. At
// most 1; NaN decays nothing. `threshold` is rounded down to T.
template <class T>
FASTZOO_HD T soft_decay(T iou, Decay method, T threshold, double sigma) {
  if (method == Decay::gaussian) {
    if (is_nan(iou)) return T(1);
    return static_cast<T>(gaussian_decay<double>(iou, sigma));
  }
  if (!(iou > threshold)) return T(1);
  return method == Decay::linear ? T(1) - iou : T(0);
}

// What matrix NMS takes the least of, over the boxes before one: of the gaussian method the
// exponent of its decay, of the linear one the decay itself. `covered` is the largest overlap of
// the earlier box with those before that. NaN counts for nothing; an iou of 0 changes nothing.
template <class T>
FASTZOO_HD double matrix_decay(T iou, T covered, Decay method, double sigma) {
  const double wide = iou, most = covered;
  if (method == Decay::gaussian) return sigma * (most * most - wide * wide);
  return (1 - wide) / (1 - most);
}

}  // namespace fastzoo::math
