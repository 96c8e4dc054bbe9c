// Coupling's maps, of vectors and of scalars, against the definition in long double, and their
// gradients against its differences.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_coupling, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_coupling)

#else

#include <math.h>

#include "../../csrc/cpu/runtime/vec_math.h"
#include "../../csrc/math/coupling.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::CouplingMap;
using Real = long double;

struct Case {
  CouplingMap map;
  double constant, floor;
  bool shift_first, inverse;
};

Real log_scale(const Case& c, Real s) {
  const Real constant = c.constant, floor = c.floor;
  switch (c.map) {
    case CouplingMap::exp:
      return s;
    case CouplingMap::sigmoid2:
      return floor == 0 ? -log1pl(expl(-s - 2)) : logl(1 / (1 + expl(-s - 2)) + floor);
    case CouplingMap::tanh:
      return constant * tanhl(s);
    case CouplingMap::atan:
      return constant * 0.636L * atanl(s);
    case CouplingMap::softplus:
      return logl(log1pl(expl(s)) + floor);
    case CouplingMap::softclip:
      return s / (1 + fabsl(s / logl(constant)));
    default:
      return 0;
  }
}

Real sigmoid(Real x) { return 1 / (1 + expl(-x)); }

struct Result {
  Real value, log;
};

Result define(const Case& c, Real x, Real t, Real s) {
  const Real constant = c.constant;
  switch (c.map) {
    case CouplingMap::soft_clip:
      if (c.inverse) return {x / (1 - fabsl(x) / constant), -2 * log1pl(-fabsl(x) / constant)};
      return {x / (1 + fabsl(x) / constant), -2 * log1pl(fabsl(x) / constant)};
    case CouplingMap::logit: {
      const Real inner = 1 - 2 * constant;
      if (c.inverse) {
        const Real slope = sigmoid(x) * sigmoid(-x) / inner;
        return {(sigmoid(x) - constant) / inner, logl(slope)};
      }
      const Real u = constant + inner * x;
      return {logl(u / (1 - u)), logl(inner / (u * (1 - u)))};
    }
    case CouplingMap::leaky_relu: {
      const Real slope = c.inverse ? 1 / constant : constant;
      return x >= 0 ? Result{x, 0} : Result{slope * x, logl(slope)};
    }
    default: {
      const Real a = log_scale(c, s);
      if (c.inverse) return {c.shift_first ? x * expl(-a) - t : (x - t) * expl(-a), -a};
      return {c.shift_first ? (x + t) * expl(a) : x * expl(a) + t, a};
    }
  }
}

// Of grad value + grad_log log, by argument 0, 1 or 2. Differences are good to about 1e-12.
Real difference(const Case& c, Real grad, Real grad_log, const Real (&at)[3], int by) {
  constexpr Real kStep = 1e-5L;
  const auto total = [&](Real move) {
    Real moved[3] = {at[0], at[1], at[2]};
    moved[by] += move;
    const Result r = define(c, moved[0], moved[1], moved[2]);
    return grad * r.value + grad_log * r.log;
  };
  const Real near = (total(kStep) - total(-kStep)) / (2 * kStep);
  const Real far = (total(2 * kStep) - total(-2 * kStep)) / (4 * kStep);
  return (4 * near - far) / 3;
}

// V is T or a vector of it, given the same number in each lane.
template <class T, class V>
T lane(V value) {
  T values[sizeof(V) / sizeof(T)];
  __builtin_memcpy(values, &value, sizeof(V));
  return values[sizeof(V) / sizeof(T) - 1];
}

template <class T, class V>
void check_case(const Case& c, Real x, Real t, Real s, int& failures) {
  const auto constants = math::coupling_constants<T>(c.constant, c.floor, c.shift_first, c.inverse);
  const Real unit = sizeof(T) == 4 ? 0x1p-24L : 0x1p-53L;
  math::with_coupling_map(c.map, [&](auto of) {
    using Map = decltype(of);
    const V xs(static_cast<T>(x)), ts(static_cast<T>(t)), ss(static_cast<T>(s));
    const Real at[3] = {static_cast<T>(x), static_cast<T>(t), static_cast<T>(s)};
    const Result wanted = define(c, at[0], at[1], at[2]);
    const math::Mapped<V> got = Map::apply(constants, xs, ts, ss);
    // Of a logarithm, its own roundings and those of s, and of 1; of a value those of its terms.
    const Real of_log = (4 + 4 * fabsl(s)) * (1 + fabsl(wanted.log));
    const Real size = fabsl(wanted.value) + (fabsl(x) + fabsl(t)) * expl(wanted.log) + fabsl(t);
    CHECK(fabsl(lane<T>(got.log) - wanted.log) <= unit * of_log);
    CHECK(fabsl(lane<T>(got.value) - wanted.value) <= unit * size * (4 + of_log));

    const T grad = static_cast<T>(0.7), grad_log = static_cast<T>(-1.3);
    const auto grads = Map::gradients(constants, V(grad), V(grad_log), xs, ts, ss);
    const V parts[3] = {grads.x, grads.shift, grads.scale};
    for (int by = 0; by <= Map::kParameters; ++by) {
      const Real exact = difference(c, grad, grad_log, at, by);
      const Real terms = fabsl(exact) + size * (1 + fabsl(s)) + expl(wanted.log) + 2;
      CHECK(fabsl(lane<T>(parts[by]) - exact) <= unit * 16 * terms * (1 + of_log) + 1e-11L * terms);
    }
  });
}

template <class T, class V>
void check_type(int& failures) {
  constexpr Case kCases[] = {
      {CouplingMap::exp, 1, 0},        {CouplingMap::sigmoid2, 1, 0},
      {CouplingMap::sigmoid2, 1, 0.5}, {CouplingMap::tanh, 2, 0},
      {CouplingMap::atan, 1.5, 0},     {CouplingMap::softplus, 1, 0},
      {CouplingMap::softplus, 1, 0.1}, {CouplingMap::softclip, 1e-3, 0},
      {CouplingMap::additive, 1, 0},   {CouplingMap::soft_clip, 1.7, 0},
      {CouplingMap::logit, 0.05, 0},   {CouplingMap::leaky_relu, 0.2, 0},
  };
  for (Case c : kCases) {
    const bool inside = c.map == CouplingMap::soft_clip || c.map == CouplingMap::logit;
    for (int flags = 0; flags < 4; ++flags) {
      c.shift_first = (flags & 1) != 0;
      c.inverse = (flags & 2) != 0;
      for (int i = -6; i <= 6; ++i) {
        const Real x = inside ? (i + 6.5L) / 14 : i * 0.61L + 0.013L;
        for (const Real s : {-25.3L, -6.2L, -1.7L, -0.3L, 1e-3L, 0.8L, 2.6L, 9.1L}) {
          check_case<T, V>(c, x, 0.4L * i - 0.9L, s, failures);
        }
      }
    }
  }
}

// What rounding alone would not get right.
template <class T>
void check_edges(int& failures) {
  using V = Vec<T>;
  using math::coupling_constants;
  const V zero(T(0)), one(T(1));
  const T infinity = static_cast<T>(__builtin_inf()), nan = static_cast<T>(__builtin_nan(""));
  const auto bounded = coupling_constants<T>(2, 0, false, false);
  for (const T s : {infinity, -infinity, T(1e30)}) {
    const auto out =
        math::AffineMap<math::ExponentialOf<math::TanhLog> >::apply(bounded, one, zero, V(s));
    CHECK(out.log[0] == (s > 0 ? 2 : -2));
  }
  const auto softplus = math::SoftplusScale::of(bounded, V(T(-80)));
  CHECK(softplus.log[0] == -80 && softplus.slope[0] == 1 && softplus.factor[0] > 0);
  const auto soft_clip = coupling_constants<T>(1, 0, false, true);
  for (const T y : {T(1), T(-1), T(3), nan}) {
    const auto out = math::SoftClipMap::apply(soft_clip, V(y), zero, zero);
    CHECK(math::is_nan(out.value[0]) && math::is_nan(out.log[0]));
  }
  const auto logit = coupling_constants<T>(0, 0, false, false);
  CHECK(math::LogitMap::apply(logit, zero, zero, zero).value[0] == -infinity);
  CHECK(math::LogitMap::apply(logit, one, zero, zero).value[0] == infinity);
  CHECK(math::is_nan(math::LogitMap::apply(logit, V(T(1.5)), zero, zero).value[0]));
  const auto leaky = coupling_constants<T>(0.5, 0, false, false);
  CHECK(math::LeakyReluMap::apply(leaky, V(T(-0.0)), zero, zero).log[0] == 0);
  CHECK(math::is_nan(math::LeakyReluMap::apply(leaky, V(nan), zero, zero).value[0]));
}

}  // namespace

void check_coupling(int& failures) {
  check_type<float, Vec<float> >(failures);
  check_type<double, Vec<double> >(failures);
  check_type<float, float>(failures);
  check_type<double, double>(failures);
  check_edges<float>(failures);
  check_edges<double>(failures);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
