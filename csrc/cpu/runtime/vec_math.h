// Selection, exponentials, logarithms and arctangents of vectors. Included like vec.h. The scalar
// twins are in csrc/math/host_device.h.
#pragma once

#include <limits>

#include "../../math/exact.h"
#include "vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
  using Scalar = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr Scalar kBias = 127;
};
template <>
struct BitsOf<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
  using Scalar = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr Scalar kBias = 1023;
};

// a in the lanes of the mask, b in the others.
#if defined(__AVX512F__)
FASTZOO_INLINE Vec<float> select(Mask<16> mask, Vec<float> a, Vec<float> b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(mask.bits), b.v, a.v);
}
FASTZOO_INLINE Vec<double> select(Mask<8> mask, Vec<double> a, Vec<double> b) {
  return _mm512_mask_blend_pd(static_cast<__mmask8>(mask.bits), b.v, a.v);
}
#else
template <class T>
FASTZOO_INLINE Vec<T> select(Mask<Vec<T>::size> mask, Vec<T> a, Vec<T> b) {
  using Bits = typename BitsOf<T>::type;
  using Scalar = typename BitsOf<T>::Scalar;
  Bits lane;
  for (int i = 0; i < Vec<T>::size; ++i) lane[i] = Scalar{1} << i;
  const Bits chosen = (lane & static_cast<Scalar>(mask.bits)) != 0;
  Bits a_bits, b_bits;
  __builtin_memcpy(&a_bits, &a.v, sizeof(Bits));
  __builtin_memcpy(&b_bits, &b.v, sizeof(Bits));
  const Bits bits = (a_bits & chosen) | (b_bits & ~chosen);
  Vec<T> result;
  __builtin_memcpy(&result.v, &bits, sizeof(Bits));
  return result;
}
#endif

// `chosen` in the lanes where a > b holds, `other` in the others.
template <class T>
FASTZOO_INLINE Vec<T> select_greater(Vec<T> a, Vec<T> b, Vec<T> chosen, Vec<T> other) {
  return a.v > b.v ? chosen.v : other.v;
}

template <class T>
FASTZOO_INLINE Vec<T> absolute(Vec<T> a) {
  using Bits = typename BitsOf<T>::type;
  constexpr auto kSign = std::numeric_limits<typename BitsOf<T>::Scalar>::min();
  Bits bits;
  __builtin_memcpy(&bits, &a.v, sizeof(Bits));
  bits &= ~kSign;
  __builtin_memcpy(&a.v, &bits, sizeof(Bits));
  return a;
}

template <class T>
FASTZOO_INLINE typename Vec<T>::MaskType is_nan(Vec<T> a) {
  return {~less_equal(a, a).bits & Vec<T>::MaskType::kAll};
}
template <class T>
FASTZOO_INLINE typename Vec<T>::MaskType is_zero(Vec<T> a) {
  return less_equal(absolute(a), Vec<T>(T(0)));
}

using math::square_root;
template <class T>
FASTZOO_INLINE Vec<T> square_root(Vec<T> a) {
  T values[Vec<T>::size];
  a.store(values);
  for (T& value : values) value = square_root(value);
  return Vec<T>::load(values);
}

template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kLeast = -87.33654f;        // its exponential is just above 2^-126
  static constexpr float kRound = 0x1.8p23f;         // adding it rounds to a whole number
  static constexpr float kLn2High = 0x1.62e4p-1f;    // exact times any exponent
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;  // ln 2 - kLn2High
  static constexpr float kTerms[] = {1,        1,         1.f / 2,   1.f / 6,
                                     1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
};
template <>
struct Exponential<double> {
  static constexpr double kLeast = -708.396418532264;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kTerms[] = {1,
                                      1,
                                      1. / 2,
                                      1. / 6,
                                      1. / 24,
                                      1. / 120,
                                      1. / 720,
                                      1. / 5040,
                                      1. / 40320,
                                      1. / 362880,
                                      1. / 3628800,
                                      1. / 39916800,
                                      1. / 479001600,
                                      1. / 6227020800};
};

// x as n ln 2 + r for a whole number n, where |r| is at most ln(2)/2, and (exp(r) - 1) / r, the
// remainder of whose series is below the rounding of its sum. Of x between -kRound and kRound.
template <class T>
struct ReducedExponent {
  Vec<T> shifted, n, r, series;  // the low bits of `shifted` are n

  __attribute__((always_inline)) explicit ReducedExponent(Vec<T> x) {
    using V = Vec<T>;
    using E = Exponential<T>;
    shifted = fused_multiply_add(x, V(static_cast<T>(1.44269504088896340736)), V(E::kRound));
    n = shifted - V(E::kRound);
    r = fused_multiply_add(n, V(-E::kLn2Low), fused_multiply_add(n, V(-E::kLn2High), x));
    constexpr int kCount = sizeof(E::kTerms) / sizeof(T);
    series = V(E::kTerms[kCount - 1]);
#pragma GCC unroll 16
    for (int i = kCount - 2; i > 0; --i) series = fused_multiply_add(series, r, V(E::kTerms[i]));
  }

  // exp(r).
  __attribute__((always_inline)) Vec<T> rest() const {
    return fused_multiply_add(series, r, Vec<T>(T(1)));
  }
  // 2^n, as long as that is a normal number.
  __attribute__((always_inline)) Vec<T> power() const {
    using Bits = typename BitsOf<T>::type;
    Bits bits;
    __builtin_memcpy(&bits, &shifted.v, sizeof(Bits));
    bits = (bits + BitsOf<T>::kBias) << BitsOf<T>::kMantissa;
    Vec<T> power;
    __builtin_memcpy(&power.v, &bits, sizeof(Bits));
    return power;
  }
};

// exp(x) for x up to 80, within about one unit in the last place. A result below the smallest
// normal number is 0; that of NaN is NaN.
template <class T>
FASTZOO_INLINE Vec<T> exponential(Vec<T> x) {
  using V = Vec<T>;
  const ReducedExponent<T> e(x);
  return select(less(x, V(Exponential<T>::kLeast)), V(T(0)), e.rest() * e.power());
}

// a 2^n for whole numbers n whose halves are exponents of normal numbers.
#if defined(__AVX512F__)
FASTZOO_INLINE Vec<float> scale_by_power(Vec<float> a, const ReducedExponent<float>& e) {
  return _mm512_scalef_ps(a.v, e.n.v);
}
FASTZOO_INLINE Vec<double> scale_by_power(Vec<double> a, const ReducedExponent<double>& e) {
  return _mm512_scalef_pd(a.v, e.n.v);
}
#else
template <class T>
FASTZOO_INLINE Vec<T> scale_by_power(Vec<T> a, const ReducedExponent<T>& e) {
  using Bits = typename BitsOf<T>::type;
  using Scalar = typename BitsOf<T>::Scalar;
  Bits n;
  __builtin_memcpy(&n, &e.shifted.v, sizeof(Bits));
  // What is above n in the bits is that of kRound, whose lower half is 0.
  n -= math::bits_as<Scalar>(Exponential<T>::kRound);
  const Bits half = n >> 1;
  const Bits first = (half + BitsOf<T>::kBias) << BitsOf<T>::kMantissa;
  const Bits second = (n - half + BitsOf<T>::kBias) << BitsOf<T>::kMantissa;
  Vec<T> powers[2];
  __builtin_memcpy(&powers[0].v, &first, sizeof(Bits));
  __builtin_memcpy(&powers[1].v, &second, sizeof(Bits));
  return a * powers[0] * powers[1];
}
#endif

// exp(x) for any x: infinite above the largest number; NaN of NaN.
template <class T>
FASTZOO_INLINE Vec<T> wide_exponential(Vec<T> x) {
  using V = Vec<T>;
  const V highest(static_cast<T>(sizeof(T) == 4 ? 89 : 710));
  const V lowest(static_cast<T>(sizeof(T) == 4 ? -104 : -746));
  const ReducedExponent<T> e(maximum(minimum(x, highest), lowest));
  return scale_by_power(e.rest(), e);
}

// exp(x) and exp(x) - 1 for x that is not positive. What is less than the smallest normal number
// counts as about that.
template <class T>
FASTZOO_INLINE math::ExponentialPair<Vec<T>> exponential_pair(Vec<T> x) {
  using V = Vec<T>;
  const ReducedExponent<T> e(maximum(x, V(Exponential<T>::kLeast)));
  const V power = e.power();
  return {e.rest() * power, fused_multiply_add(e.series * e.r, power, power - V(T(1)))};
}

// The vectors that csrc/math/exact.h is given: lane by lane what its functions of doubles give.
// Numbers are below 2^51.
FASTZOO_INLINE Vec<double> exact_floor(Vec<double> x) {
  const Vec<double> shift(0x1.8p52), one(1.0);
  const Vec<double> nearest = (x + shift) - shift;
  return select(greater(nearest, x), nearest - one, nearest);
}

FASTZOO_INLINE Vec<double> exact_power_of_two(Vec<double> k) {
  const Vec<double> shifted = k + Vec<double>(0x1.8p52);  // whose low bits are k
  BitsOf<double>::type bits;
  __builtin_memcpy(&bits, &shifted.v, sizeof(bits));
  bits = (bits + 1023) << 52;
  Vec<double> power;
  __builtin_memcpy(&power.v, &bits, sizeof(bits));
  return power;
}

// Of numbers that are at most 709, and not NaN.
FASTZOO_INLINE Vec<double> exact_exponential(Vec<double> x) {
  return select(less(x, Vec<double>(-708.0)), Vec<double>(0.0), math::exact_exponential_inside(x));
}

// log(1 + x) for x from 0 to 1: 2 artanh(x / (2 + x)), whose series in a square of at most 1/9 is
// short.
template <class T>
FASTZOO_INLINE Vec<T> log_one_plus(Vec<T> x) {
  using V = Vec<T>;
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 17;
  const V s = x / (x + V(T(2)));
  const V square = s * s;
  V sum(T(0));
#pragma GCC unroll 20
  for (int i = kTerms - 1; i > 0; --i) {
    sum = fused_multiply_add(sum, square, V(T(1) / static_cast<T>(2 * i + 1)));
  }
  const V twice = s + s;
  return fused_multiply_add(twice, sum * square, twice);
}

template <class T>
struct Logarithm;
template <>
struct Logarithm<float> {
  static constexpr float kSmallest = 0x1p-126f, kPower = 0x1p24f, kExponent = 24;
  static constexpr int32_t kMiddle = 0x3f3504f3;  // the bits of the root of 1/2
  static constexpr int kTerms = 5;
};
template <>
struct Logarithm<double> {
  static constexpr double kSmallest = 0x1p-1022, kPower = 0x1p54, kExponent = 54;
  static constexpr int64_t kMiddle = 0x3fe6a09e667f3bcd;
  static constexpr int kTerms = 10;
};

// log(x), within about one unit in the last place: of 0 it is -infinity, of what is negative NaN.
// 2^k (1 + f) is x, with 1 + f between the roots of 1/2 and of 2, and log(1 + f) the odd series
// in s = f / (2 + f), written so that f itself is what the small terms are added to.
template <class T>
FASTZOO_INLINE Vec<T> logarithm(Vec<T> x) {
  using V = Vec<T>;
  using L = Logarithm<T>;
  using Bits = typename BitsOf<T>::type;
  const V zero(T(0)), smallest(L::kSmallest), infinity(static_cast<T>(__builtin_inf()));
  const V normal = select_greater(smallest, x, x * V(L::kPower), x);
  Bits bits;
  __builtin_memcpy(&bits, &normal.v, sizeof(Bits));
  const Bits exponent = (bits - L::kMiddle) >> BitsOf<T>::kMantissa;
  bits -= exponent << BitsOf<T>::kMantissa;
  V mantissa;
  __builtin_memcpy(&mantissa.v, &bits, sizeof(Bits));
  const V k = V(__builtin_convertvector(exponent, typename V::Native)) -
              select_greater(smallest, x, V(L::kExponent), zero);
  const V f = mantissa - V(T(1));
  const V s = f / (f + V(T(2)));
  const V square = s * s;
  V series(T(0));
#pragma GCC unroll 12
  for (int i = L::kTerms; i > 0; --i) {
    series = fused_multiply_add(series, square, V(T(2) / static_cast<T>(2 * i + 1)));
  }
  const V half_square = V(static_cast<T>(0.5)) * f * f;
  const V small = fused_multiply_add(s, fused_multiply_add(series, square, half_square),
                                     k * V(Exponential<T>::kLn2Low));
  const V log = fused_multiply_add(k, V(Exponential<T>::kLn2High), f - (half_square - small));
  const V inside = select_greater(infinity, x, log, x);  // of infinity and NaN as they are
  const V none(static_cast<T>(__builtin_nan("")));
  return select_greater(x, zero, inside, select_greater(zero, x, none, x - infinity));
}

// log(1 + x) for any x that is not negative: what 1 + x was rounded by is made good.
template <class T>
FASTZOO_INLINE Vec<T> wide_log_one_plus(Vec<T> x) {
  using V = Vec<T>;
  const V one(T(1));
  const V finite = minimum(x, V(static_cast<T>(0x1p100)));
  const V sum = one + finite;
  return logarithm(one + x) + (finite - (sum - one)) / sum;
}

// The arctangent, within 2 units in the last place. Tangents are brought below that of pi/8 by
// turning by pi/4 or pi/2, where the square in the series is at most 0.172.
template <class T>
FASTZOO_INLINE Vec<T> arctangent(Vec<T> x) {
  using V = Vec<T>;
  constexpr int kTerms = sizeof(T) == 4 ? 10 : 21;
  const V zero(T(0)), one(T(1));
  const V size = maximum(x, zero - x);
  const V low(static_cast<T>(0.41421356237309503));   // tan(pi/8)
  const V high(static_cast<T>(2.41421356237309503));  // its inverse
  const auto by_size = [&](V above_high, V above_low, V below) {
    return select_greater(size, high, above_high, select_greater(size, low, above_low, below));
  };
  const V s = by_size(zero - one, size - one, size) / by_size(size, size + one, one);
  const V turned = by_size(V(static_cast<T>(1.57079632679489661923)),
                           V(static_cast<T>(0.78539816339744830962)), zero);
  const V square = s * s;
  V sum(T(0));
#pragma GCC unroll 24
  for (int i = kTerms - 1; i > 0; --i) {
    sum =
        fused_multiply_add(sum, square, V((i % 2 == 0 ? T(1) : T(-1)) / static_cast<T>(2 * i + 1)));
  }
  const V angle = turned + fused_multiply_add(s, sum * square, s);
  return select_greater(zero, x, zero - angle, angle);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
