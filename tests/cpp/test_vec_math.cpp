// Exponentials, logarithms, arctangents and selection of vectors against the C library's in a wider
// type.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_vec_math, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_vec_math)

#else

#include <math.h>

#include "../../csrc/cpu/runtime/vec_math.h"
#include "../../csrc/math/contrastive.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr double unit = 0x1p-23, smallest = 0x1p-126, lowest = -87.3, highest = 88.72;
};
template <>
struct Range<double> {
  static constexpr double unit = 0x1p-52, smallest = 0x1p-1022, lowest = -708.3, highest = 709.78;
};

// The largest error of f(x) in units of the last place, for x from `begin` to `end`.
template <class T, class Function, class Exact>
double worst(double begin, double end, const Function& function, const Exact& exact) {
  using V = Vec<T>;
  constexpr int64_t kCount = 1 << 17;
  double result = 0;
  for (int64_t i = 0; i < kCount; i += V::size) {
    T x[V::size];
    for (int j = 0; j < V::size; ++j) {
      x[j] = static_cast<T>(begin + (end - begin) * static_cast<double>(i + j) / (kCount - 1));
    }
    const V value = function(V::load(x));
    for (int j = 0; j < V::size; ++j) {
      const long double wanted = exact(static_cast<long double>(x[j]));
      const long double error = fabsl(static_cast<long double>(value[j]) - wanted);
      const double units = static_cast<double>(error / (wanted * Range<T>::unit));
      if (!(units <= result)) result = units;
    }
  }
  return result;
}

template <class T>
void check_type(int& failures) {
  using V = Vec<T>;
  const T infinity = static_cast<T>(__builtin_inf());
  const T nan = static_cast<T>(__builtin_nan(""));
  const auto exponent = [](V x) { return exponential(x); };
  // Without fused operations the reduced argument is rounded once more.
  const double allowed = kVectorBytes == 16 ? 2 : 1.2;
  CHECK(worst<T>(-1, 1, exponent, expl) < allowed);
  CHECK(worst<T>(Range<T>::lowest, 80, exponent, expl) < allowed);
  CHECK(exponential(V(T(0)))[0] == 1);
  CHECK(exponential(V(-infinity))[0] == 0);
  CHECK(exponential(V(T(-1e30)))[0] == 0);
  CHECK(exponential(V(static_cast<T>(Range<T>::lowest - 0.1)))[0] == 0);
  CHECK(math::is_nan(exponential(V(nan))[V::size - 1]));

  const auto wide_exponent = [](V x) { return wide_exponential(x); };
  CHECK(worst<T>(-1, 1, wide_exponent, expl) < allowed);
  CHECK(worst<T>(Range<T>::lowest, Range<T>::highest, wide_exponent, expl) < allowed);
  CHECK(wide_exponential(V(static_cast<T>(Range<T>::highest + 0.1)))[0] == infinity);
  CHECK(wide_exponential(V(infinity))[0] == infinity);
  CHECK(wide_exponential(V(-infinity))[0] == 0);
  const T subnormal = static_cast<T>(Range<T>::lowest - 2);
  CHECK(fabsl(wide_exponential(V(subnormal))[0] / expl(subnormal) - 1) < 1e-5);
  CHECK(math::is_nan(wide_exponential(V(nan))[0]));
  const auto less_one = [](V x) { return exponential_pair(x).less_one; };
  CHECK(worst<T>(-1, -1e-6, less_one, expm1l) < 2);
  CHECK(worst<T>(Range<T>::lowest, -1e-6, less_one, expm1l) < 2);
  CHECK(exponential_pair(V(T(0))).less_one[0] == 0 && exponential_pair(V(T(0))).value[0] == 1);
  CHECK(exponential_pair(V(-infinity)).less_one[0] == -1);
  CHECK(math::is_nan(exponential_pair(V(nan)).less_one[0]));

  const auto log = [](V x) { return logarithm(x); };
  CHECK(worst<T>(1e-3, 0.99, log, logl) < allowed);
  CHECK(worst<T>(1.001, 3, log, logl) < allowed);
  CHECK(worst<T>(3, 1e30, log, logl) < allowed);
  const T few = static_cast<T>(Range<T>::smallest / 1024);
  CHECK(fabsl(logarithm(V(few))[0] / logl(few) - 1) < Range<T>::unit);
  CHECK(logarithm(V(T(1)))[0] == 0 && logarithm(V(T(0)))[0] == -infinity);
  CHECK(logarithm(V(infinity))[0] == infinity);
  CHECK(math::is_nan(logarithm(V(T(-1)))[0]) && math::is_nan(logarithm(V(nan))[0]));
  const auto wide_log = [](V x) { return wide_log_one_plus(x); };
  CHECK(worst<T>(1e-6, 4, wide_log, log1pl) < 2);
  CHECK(worst<T>(4, 1e30, wide_log, log1pl) < 2);
  CHECK(wide_log_one_plus(V(infinity))[0] == infinity);
  CHECK(wide_log_one_plus(V(few))[0] == few && math::is_nan(wide_log_one_plus(V(nan))[0]));

  CHECK(worst<T>(1e-6, 1, [](V x) { return log_one_plus(x); }, log1pl) < 2.5);
  CHECK(log_one_plus(V(T(0)))[0] == 0);
  CHECK(log_one_plus(V(static_cast<T>(Range<T>::smallest)))[0] ==
        static_cast<T>(Range<T>::smallest));

  const auto tangent = [](V x) { return arctangent(x); };
  for (const double end : {0.4142, 2.4143, 40., 1e6}) {
    CHECK(worst<T>(end / 1e5, end, tangent, atanl) < 2);
    CHECK(worst<T>(-end, -end / 1e5, tangent, atanl) < 2);
  }
  CHECK(arctangent(V(T(0)))[0] == 0);
  CHECK(arctangent(V(static_cast<T>(Range<T>::smallest)))[0] == static_cast<T>(Range<T>::smallest));
  CHECK(arctangent(V(infinity))[0] == static_cast<T>(1.57079632679489661923));
  CHECK(arctangent(V(-infinity))[0] == static_cast<T>(-1.57079632679489661923));
  CHECK(math::is_nan(arctangent(V(nan))[V::size - 1]));
  const V ahead = select_greater(V(T(2)), V(T(1)), V(T(3)), V(T(4)));
  const V level = select_greater(V(T(1)), V(T(1)), V(T(3)), V(T(4)));
  CHECK(ahead[0] == 3 && level[V::size - 1] == 4);
  CHECK(select_greater(V(nan), V(T(1)), V(T(3)), V(T(4)))[0] == 4);

  const auto softplus = [](V z) { return math::softplus(z); };
  const auto exact_softplus = [](long double z) { return log1pl(expl(z)); };
  CHECK(worst<T>(-80, 80, softplus, exact_softplus) < 4);
  const auto sigmoid = [](V z) { return math::sigmoid(z); };
  CHECK(worst<T>(-80, 80, sigmoid, [](long double z) { return 1 / (1 + expl(-z)); }) < 4);
  CHECK(math::softplus(V(-infinity))[0] == 0 && math::sigmoid(V(-infinity))[0] == 0);
  CHECK(math::softplus(V(T(1e30)))[0] == T(1e30) && math::sigmoid(V(infinity))[0] == 1);

  for (uint32_t bits : {0u, 1u, 0xa5a5u, 0xffffu}) {
    const Mask<V::size> mask{bits & Mask<V::size>::kAll};
    const V chosen = select(mask, V(T(-0.0)), V(nan));
    for (int i = 0; i < V::size; ++i) {
      CHECK((mask.bits >> i & 1u) != 0 ? chosen[i] == 0 : math::is_nan(chosen[i]));
    }
  }

  T ramp[V::size];
  for (int i = 0; i < V::size; ++i) ramp[i] = static_cast<T>(i * 7 % V::size);
  CHECK(lane_sum(V::load(ramp)) == V::size * (V::size - 1) / 2);
  CHECK(lane_maximum(V::load(ramp)) == V::size - 1);
}

}  // namespace

void check_vec_math(int& failures) {
  check_type<float>(failures);
  check_type<double>(failures);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
