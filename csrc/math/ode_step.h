// A sampler's or solver's step: rows of weighted sums of tensors, of the rows before and of noise.
// Numbers are of type V, that is float, double or the CPU's vector of them.
// fastzoo/reference/ode_step.py defines it.
#pragma once

#include "counter_random.h"

namespace fastzoo::math {

constexpr int kStepTensors = 8;
constexpr int kStepRows = 3;

// Where the numbers of a row of the table are.
constexpr int kStepPrevious = kStepTensors;  // the weights of rows 0 and 1
constexpr int kStepNoise = 10;
constexpr int kStepDraw = 11;
constexpr int kStepBound = 12;
constexpr int kStepNumbers = 13;

// NaN stays NaN.
template <class V>
FASTZOO_HD V clamp_to(V value, V bound) {
  const V least = V(0) - bound;
  return select_greater(value, bound, bound, select_greater(least, value, least, value));
}

// Dynamic thresholding.
template <class V>
FASTZOO_HD V thresholded(V value, V threshold) {
  return clamp_to(value, threshold) / threshold;
}

// A sum and one term more. A weight of 0 ignores what it weighs, whatever that holds; of any other
// weight this is fused_multiply_add().
template <class V>
FASTZOO_HD V add_weighted(V weight, V value, V sum) {
  return select(is_zero(weight), sum, fused_multiply_add(weight, value, sum));
}

// The bits of a float rounded to bfloat16 or half, up or down with the probability that makes the
// mean right; the word is that of the element in draw | kRoundingDraw. `nearest` has the bits that
// rounding to nearest gives: NaN and what is beyond the largest half take them.
template <class F, class W>
FASTZOO_HD W stochastic_bfloat16(F value, W word, W nearest) {
  const W bits = bits_of(value), magnitude = bits & W(0x7fffffffu);
  const W rounded = (bits + (word & W(0xffffu))) >> 16;
  const W beyond_infinity = (W(0x7f800000u) - magnitude) & W(0x80000000u);
  return select_nonzero(beyond_infinity, nearest, rounded);
}

template <class F, class W>
FASTZOO_HD W stochastic_half(F value, W word, W nearest) {
  const W bits = bits_of(value), magnitude = bits & W(0x7fffffffu);
  const W top(0x80000000u);
  const W normal = (magnitude + (word & W(0x1fffu)) - W(0x38000000u)) >> 13;
  // Below 2^-14 halves are the multiples of 2^-24, and their bits the number of it.
  const F steps =
      float_of_bits(magnitude) * F(0x1p24f) + float_of(word & W(0xffffffu)) * F(0x1p-24f);
  const W subnormal = truncated(minimum(F(2048.0f), steps));
  const W is_subnormal = (magnitude - W(0x38800000u)) & top;
  const W is_beyond = (W(0x477fe000u) - magnitude) & top;
  const W rounded = select_nonzero(is_subnormal, subnormal, normal) | ((bits & top) >> 16);
  return select_nonzero(is_beyond, nearest, rounded);
}

// What an error is divided by: atol + rtol max(|a|, |b|), NaN where either is.
template <class V>
FASTZOO_HD V error_scale(V a, V b, V rtol, V atol) {
  const V size = absolute(b);
  const V larger = select(is_nan(size), size, maximum(absolute(a), size));
  return fused_multiply_add(rtol, larger, atol);
}

}  // namespace fastzoo::math
