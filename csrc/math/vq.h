// Nearest-codebook lookup: the exact score that defines the answer, and the bound that lets a
// fast pass prove it. The answer is the lowest index whose score is highest, where the score is
// computed in double, summed over the dimensions in ascending order:
//   l2      -sum (x - c)^2
//   dot      sum x c
//   cosine   sum x c / max(|c|, 1e-12)
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastzoo::math {

enum class Metric : int { l2 = 0, cosine = 1, dot = 2 };

// False where no metric has the name. Host only.
static inline bool metric_named(const char* name, Metric& metric) {
  return value_named(name, {"l2", "cosine", "dot"}, metric);
}

// What stands for the gradient of a chosen code by its row.
enum class Estimator : int { ste = 0, rotation = 1, none = 2 };

// False where no estimator has the name. Host only.
static inline bool estimator_named(const char* name, Estimator& estimator) {
  return value_named(name, {"ste", "rotation", "none"}, estimator);
}

// The term that dimension adds to the exact score's sum (for l2 the sum is negated at the end).
FASTZOO_HD double score_term(Metric metric, double x, double c) {
  if (metric == Metric::l2) {
    const double difference = x - c;
    return difference * difference;
  }
  return x * c;
}

// NaN ranks below everything, -inf included.
FASTZOO_HD bool better(double a, double b) { return a > b || (is_nan(b) && !is_nan(a)); }

// The exact score of a code, where x(d) and c(d) give the coordinates in double.
template <class X, class Code>
FASTZOO_HD double exact_score(Metric metric, const X& x, const Code& c, int64_t n) {
  double sum = 0;
  double squares = 0;
  for (int64_t d = 0; d < n; ++d) {
    const double code = c(d);
    sum += score_term(metric, x(d), code);
    if (metric == Metric::cosine) squares += code * code;
  }
  if (metric == Metric::l2) return -sum;
  return metric == Metric::cosine ? sum / maximum(__builtin_sqrt(squares), kNormFloor) : sum;
}

// The fast pass scores a code by  x'.c' - |c'|^2/2  (l2; x' and c' are centred),  x.c  (dot)  or
// x.(c/|c|)  (cosine), in arithmetic of unit round-off `unit` (2^-24 for float, 2^-53 for double)
// and in any order of summation, with or without fused multiply-add. This bounds how far such a
// score lies from the exact one (l2: from half of it, up to a constant of the row):
//   a = |x'|, b = max |c'| as the fast pass sees them, n = D.
//   l2:     gamma(n+1) (b^2/2 + ab)  for the sum,  unit (a+b)^2 (1 + ..)  for rounding x', c',
//           and (n+2) 2^-53 (a+b)^2 / 2 for the definition's own rounding;
//   others: gamma(n+1) ab + unit ab for rounding c/|c|, and (n+3) 2^-53 ab for the definition;
//           cosine also n 2^-53 ab where the fast pass sums |c| in another order.
// All are below the first two terms used, for n <= 65536 and while no partial sum of the fast pass
// can overflow; beyond that nothing is proven and every code is a candidate. The second term covers
// results that underflow, flushed to zero or not. For cosine, b is infinite where a |c| is.
// a and b come from norm_above(): a norm taken in double, never too small.
//
// Where the fast pass multiplies rounded operands x~ and c~ instead of x' and c', a_lost and b_lost
// are the norms of what they lack, |x' - x~| and max |c' - c~|, taken likewise:
//   |x'.c' - x~.c~| <= |x'| |c' - c~| + |x' - x~| |c~|  <=  a b_lost + a_lost (b + b_lost)
// Then n is the number of products that are added up; norms of x~ and c~ within 2^-8 of a and b
// leave the other terms above what they bound. Matrix instructions align and truncate the terms of
// one step: a unit of 2^-22 covers them.
// A code whose fast score s satisfies s < best - 2 bound cannot be the answer; written as
// "not less", the test keeps every code when anything is NaN or infinite.
FASTZOO_HD double norm_above(double sum_of_squares, int64_t n) {
  return __builtin_sqrt(sum_of_squares + static_cast<double>(n) * 0x1p-1022);
}

FASTZOO_HD double score_bound(Metric metric, int64_t n, double a, double b, double a_lost,
                              double b_lost, double unit, double smallest) {
  const double largest_sum = unit > 0x1p-40 ? 1e38 : 1e307;
  if (n > 65536 || !(a * b + b * b < largest_sum)) return __builtin_inf();
  const double scale = metric == Metric::l2 ? (a + b) * (a + b) / 2 : a * b;
  const double roundings = static_cast<double>(n + 8);
  const double largest = a > b ? a : b;
  return 1.04 * (roundings * (unit + 0x1p-52) * scale + a * b_lost + a_lost * (b + b_lost)) +
         4 * roundings * smallest * (1 + largest);
}

}  // namespace fastzoo::math
