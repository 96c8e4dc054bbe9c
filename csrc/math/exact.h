// Functions of doubles made of additions, products and exact steps alone, in a fixed order: equal
// bit for bit on every backend, where libraries' own differ in the last bit and so would the keeps
// that hang on them. Within 2 ulp. The twin of fastzoo/reference/exact.py; built without
// contraction.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastzoo::math {

FASTZOO_HD double exact_floor(double x) {
#if defined(__CUDA_ARCH__)
  return ::floor(x);
#else
  return __builtin_floor(x);
#endif
}

// 2^k for a whole number k from -1022 to 1023.
FASTZOO_HD double exact_power_of_two(double k) {
  return bits_as<double>(static_cast<uint64_t>(static_cast<int64_t>(k) + 1023) << 52);
}

// e^x where -708 <= x <= 709. V is double or the CPU's vector of doubles.
template <class V>
FASTZOO_HD V exact_exponential_inside(V x) {
  // Cody and Waite: the product of k and the leading part of log 2 is exact.
  const V k = exact_floor(x * V(1.4426950408889634) + V(0.5));
  const V r = (x - k * V(6.93147180369123816490e-01)) - k * V(1.90821492927058770002e-10);
  V p(1.0 / 6227020800);  // 1/13!
  p = p * r + V(1.0 / 479001600);
  p = p * r + V(1.0 / 39916800);
  p = p * r + V(1.0 / 3628800);
  p = p * r + V(1.0 / 362880);
  p = p * r + V(1.0 / 40320);
  p = p * r + V(1.0 / 5040);
  p = p * r + V(1.0 / 720);
  p = p * r + V(1.0 / 120);
  p = p * r + V(1.0 / 24);
  p = p * r + V(1.0 / 6);
  p = p * r + V(1.0 / 2);
  p = p * r + V(1.0);
  p = p * r + V(1.0);
  return p * exact_power_of_two(k);
}

// e^x; 0 below -708, infinite above 709.
FASTZOO_HD double exact_exponential(double x) {
  if (x < -708) return 0;
  if (x > 709) return __builtin_huge_val();
  if (is_nan(x)) return x;
  return exact_exponential_inside(x);
}

FASTZOO_HD double exact_sigmoid(double x) { return 1 / (1 + exact_exponential(-x)); }

struct SineCosine {
  double sine, cosine;
};

// Multiples of 90 degrees are exact. Radians beyond 10^5 lose accuracy.
FASTZOO_HD SineCosine exact_sine_cosine(double angle, bool degrees) {
  double quarter, r;
  if (degrees) {
    quarter = exact_floor(angle / 90 + 0.5);
    r = (angle - quarter * 90) * 0.017453292519943295;
  } else {
    quarter = exact_floor(angle * 0.6366197723675814 + 0.5);
    r = angle - quarter * 1.57079632673412561417e00;
    r = r - quarter * 6.07710050630396597660e-11;
    r = r - quarter * 2.02226624879595063154e-21;
  }
  const double square = r * r;
  double s = 1.0 / 355687428096000;  // 1/17!
  s = s * square - 1.0 / 1307674368000;
  s = s * square + 1.0 / 6227020800;
  s = s * square - 1.0 / 39916800;
  s = s * square + 1.0 / 362880;
  s = s * square - 1.0 / 5040;
  s = s * square + 1.0 / 120;
  s = s * square - 1.0 / 6;
  const double sine = r + r * (square * s);
  double c = -1.0 / 6402373705728000;  // -1/18!
  c = c * square + 1.0 / 20922789888000;
  c = c * square - 1.0 / 87178291200;
  c = c * square + 1.0 / 479001600;
  c = c * square - 1.0 / 3628800;
  c = c * square + 1.0 / 40320;
  c = c * square - 1.0 / 720;
  c = c * square + 1.0 / 24;
  c = c * square - 1.0 / 2;
  const double cosine = 1 + square * c;
  const double quadrant = quarter - 4 * exact_floor(quarter * 0.25);
  const bool odd = quadrant == 1 || quadrant == 3;
  const double first = odd ? cosine : sine;
  const double second = odd ? sine : cosine;
  return {quadrant >= 2 ? -first : first, quadrant == 1 || quadrant == 2 ? -second : second};
}

}  // namespace fastzoo::math
