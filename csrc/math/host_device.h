// Functions of csrc/math serve C++ and CUDA alike. They are never emitted on their own: the CPU
// kernels are compiled once per instruction set, and a shared inline symbol would let the linker
// pick one set's code for all of them.
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__CUDACC__)
#define FASTZOO_HD static __host__ __device__ __forceinline__
#define FASTZOO_HD_MEMBER __host__ __device__ __forceinline__
#else
#define FASTZOO_HD static inline __attribute__((always_inline))
#define FASTZOO_HD_MEMBER inline __attribute__((always_inline))
#endif

namespace fastzoo::math {

// Norms are held above this where they divide.
constexpr double kNormFloor = 1e-12;

// The scalar twins of the vector type's functions, so that one formula serves both.
// Like std::max and std::min: the first argument unless the second is strictly beyond it.
FASTZOO_HD float maximum(float a, float b) { return a < b ? b : a; }
FASTZOO_HD double maximum(double a, double b) { return a < b ? b : a; }
FASTZOO_HD float minimum(float a, float b) { return b < a ? b : a; }
FASTZOO_HD double minimum(double a, double b) { return b < a ? b : a; }

FASTZOO_HD float absolute(float a) { return __builtin_fabsf(a); }
FASTZOO_HD double absolute(double a) { return __builtin_fabs(a); }
FASTZOO_HD bool greater(float a, float b) { return a > b; }
FASTZOO_HD bool greater(double a, double b) { return a > b; }
FASTZOO_HD float select(bool condition, float a, float b) { return condition ? a : b; }
FASTZOO_HD double select(bool condition, double a, double b) { return condition ? a : b; }
// a > b ? chosen : other, lane by lane.
FASTZOO_HD float select_greater(float a, float b, float chosen, float other) {
  return a > b ? chosen : other;
}
FASTZOO_HD double select_greater(double a, double b, double chosen, double other) {
  return a > b ? chosen : other;
}
FASTZOO_HD float fused_multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
FASTZOO_HD double fused_multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
FASTZOO_HD float exponential(float a) { return ::expf(a); }
FASTZOO_HD double exponential(double a) { return ::exp(a); }
FASTZOO_HD float log_one_plus(float a) { return ::log1pf(a); }
FASTZOO_HD double log_one_plus(double a) { return ::log1p(a); }
// Where a vector's exponential and log_one_plus are of less than all numbers, these are of all: of
// any, and of any that is not negative.
FASTZOO_HD float wide_exponential(float a) { return ::expf(a); }
FASTZOO_HD double wide_exponential(double a) { return ::exp(a); }
FASTZOO_HD float wide_log_one_plus(float a) { return ::log1pf(a); }
FASTZOO_HD double wide_log_one_plus(double a) { return ::log1p(a); }
FASTZOO_HD float logarithm(float a) { return ::logf(a); }
FASTZOO_HD double logarithm(double a) { return ::log(a); }

// exp(a) and exp(a) - 1, where a is not positive.
template <class T>
struct ExponentialPair {
  T value, less_one;
};
FASTZOO_HD ExponentialPair<float> exponential_pair(float a) { return {::expf(a), ::expm1f(a)}; }
FASTZOO_HD ExponentialPair<double> exponential_pair(double a) { return {::exp(a), ::expm1(a)}; }

FASTZOO_HD float arctangent(float a) { return ::atanf(a); }
FASTZOO_HD double arctangent(double a) { return ::atan(a); }

FASTZOO_HD float square_root(float a) { return ::sqrtf(a); }
FASTZOO_HD double square_root(double a) { return ::sqrt(a); }

FASTZOO_HD bool is_nan(float a) { return a != a; }
FASTZOO_HD bool is_nan(double a) { return a != a; }
FASTZOO_HD bool is_zero(float a) { return a == 0; }
FASTZOO_HD bool is_zero(double a) { return a == 0; }

FASTZOO_HD constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The bits of a value, for ordering and for stepping to its neighbour.
template <class To, class From>
FASTZOO_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as needs types of one size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// The value of an enumeration that stands where `name` does among the names of all, in order;
// false where it is none of them. Host only.
template <class Enumeration, int kCount>
static inline bool value_named(const char* name, const char* const (&names)[kCount],
                               Enumeration& value) {
  for (int i = 0; i < kCount; ++i) {
    if (__builtin_strcmp(name, names[i]) != 0) continue;
    value = static_cast<Enumeration>(i);
    return true;
  }
  return false;
}

}  // namespace fastzoo::math
