// Coupling: elementwise maps of a number x and the logs of their derivatives. Numbers are of type
// V, that is T, float or double, or the CPU's vector of them. fastzoo/reference/coupling.py defines
// them.
//
// Those that a conditioner steers have a shift t and a raw scale s, of which the log of the scale a
// is made: y = x e^a + t, or (x + t) e^a where the shift comes first. An inverse is such a map
// again: of -t and -a, with the shift first where it was last, and last where it was first.
#pragma once

#include "host_device.h"

namespace fastzoo::math {

enum class CouplingMap : int {
  exp = 0,
  sigmoid2 = 1,
  tanh = 2,
  atan = 3,
  softplus = 4,
  softclip = 5,
  additive = 6,
  soft_clip = 7,
  logit = 8,
  leaky_relu = 9
};

// False where no map has the name. Host only.
static inline bool coupling_map_named(const char* name, CouplingMap& map) {
  return value_named(name,
                     {"exp", "sigmoid2", "tanh", "atan", "softplus", "softclip", "additive",
                      "soft_clip", "logit", "leaky_relu"},
                     map);
}

// What is the same for every number; which of it counts, the map says.
template <class T>
struct CouplingConstants {
  T constant, floor;
  T reciprocal;  // 1 / constant
  T log_constant;
  T inner, log_inner;  // 1 - 2 constant, and its log
  T turn;              // -1 of an inverse, else 1
  bool inverse, adds_first;
};

// Host only.
template <class T>
static inline CouplingConstants<T> coupling_constants(double constant, double floor,
                                                      bool shift_first, bool inverse) {
  CouplingConstants<T> c;
  c.constant = static_cast<T>(constant);
  c.floor = static_cast<T>(floor);
  c.reciprocal = static_cast<T>(1 / constant);
  c.log_constant = static_cast<T>(::log(constant));
  c.inner = static_cast<T>(1 - 2 * constant);
  c.log_inner = static_cast<T>(::log(1 - 2 * constant));
  c.turn = inverse ? T(-1) : T(1);
  c.inverse = inverse;
  c.adds_first = shift_first != inverse;
  return c;
}

template <class V>
struct Mapped {
  V value, log;  // the log of the derivative
};

template <class V>
struct CouplingGradients {
  V x, shift, scale;
};

// ---- scales: of a raw scale s, what x is multiplied by and the log of that, both turned for an
// ---- inverse; and the derivative of a, which is not turned.

template <class V>
struct Scale {
  V log, factor, slope;
};

template <class V>
struct LogScale {
  V log, slope;
};

template <class T, class V>
FASTZOO_HD Scale<V> scale_of_factor(const CouplingConstants<T>& c, V log, V factor, V slope) {
  return {V(c.turn) * log, c.inverse ? V(1) / factor : factor, slope};
}

struct NoScale {
  static constexpr int kParameters = 1;
  template <class T, class V>
  FASTZOO_HD Scale<V> of(const CouplingConstants<T>&, V) {
    return {V(0), V(1), V(0)};
  }
};

struct ExponentialScale {
  static constexpr int kParameters = 2;
  template <class T, class V>
  FASTZOO_HD Scale<V> of(const CouplingConstants<T>& c, V s) {
    const V log = V(c.turn) * s;
    return {log, wide_exponential(log), V(1)};
  }
};

// e = sigmoid(s + 2) + floor.
struct SigmoidScale {
  static constexpr int kParameters = 2;
  template <class T, class V>
  FASTZOO_HD Scale<V> of(const CouplingConstants<T>& c, V s) {
    const V z = s + V(2);
    const V w = wide_exponential(V(0) - absolute(z));
    const V one = V(1), all = one + w;
    const V sigmoid = select_greater(V(0), z, w, one) / all;
    if (c.floor == T(0)) {
      const V slope = select_greater(V(0), z, one, w) / all;
      return scale_of_factor(c, minimum(z, V(0)) - log_one_plus(w), sigmoid, slope);
    }
    const V e = sigmoid + V(c.floor);
    return scale_of_factor(c, logarithm(e), e, w / (all * all * e));
  }
};

// a = constant tanh(s), whose derivative does not cancel where tanh(s) is close to 1.
struct TanhLog {
  template <class T, class V>
  FASTZOO_HD LogScale<V> of(const CouplingConstants<T>& c, V s) {
    const ExponentialPair<V> e = exponential_pair(V(-2) * absolute(s));
    const V q = V(1) / (V(2) + e.less_one);
    const V size = e.less_one * q;  // -tanh |s|
    const V tanh = select_greater(V(0), s, size, V(0) - size);
    return {V(c.turn * c.constant) * tanh, V(c.constant * 4) * e.value * q * q};
  }
};

// a = constant 0.636 atan(s).
struct ArctangentLog {
  template <class T, class V>
  FASTZOO_HD LogScale<V> of(const CouplingConstants<T>& c, V s) {
    const T bound = c.constant * static_cast<T>(0.636);
    return {V(c.turn * bound) * arctangent(s), V(bound) / fused_multiply_add(s, s, V(1))};
  }
};

// e = softplus(s) + floor. Without a floor e is so close to exp(s) below some s that a is s.
struct SoftplusScale {
  static constexpr int kParameters = 2;
  template <class T, class V>
  FASTZOO_HD Scale<V> of(const CouplingConstants<T>& c, V s) {
    const V zero = V(0), one = V(1);
    const V w = wide_exponential(zero - absolute(s));
    const V e = maximum(s, zero) + log_one_plus(w) + V(c.floor);
    V log = logarithm(e);
    V slope = select_greater(zero, s, w, one) / ((one + w) * e);
    if (c.floor == T(0)) {
      const V low = V(static_cast<T>(sizeof(T) == 4 ? -20 : -40));
      log = select_greater(low, s, s, log);
      slope = select_greater(low, s, one, slope);
    }
    return scale_of_factor(c, log, e, slope);
  }
};

// a = s / (1 + |s / log(constant)|).
struct SoftclipLog {
  template <class T, class V>
  FASTZOO_HD LogScale<V> of(const CouplingConstants<T>& c, V s) {
    const V q = V(c.log_constant) / (V(c.log_constant) - absolute(s));
    return {V(c.turn) * s * q, q * q};
  }
};

// A scale that is the exponential of what Log makes of s.
template <class Log>
struct ExponentialOf {
  static constexpr int kParameters = 2;
  template <class T, class V>
  FASTZOO_HD LogScale<V> log_of(const CouplingConstants<T>& c, V s) {
    return Log::of(c, s);
  }
  template <class V>
  FASTZOO_HD Scale<V> of_log(LogScale<V> scale) {
    return {scale.log, wide_exponential(scale.log), scale.slope};
  }
  template <class T, class V>
  FASTZOO_HD Scale<V> of(const CouplingConstants<T>& c, V s) {
    return of_log(log_of(c, s));
  }
};

// ---- maps: apply() gives the value and the log of the derivative, gradients() the gradients by x,
// ---- t and s, given those by the value and by the log.

template <class Scales>
struct AffineMap {
  static constexpr int kParameters = Scales::kParameters;
  using ScaleOf = Scales;

  template <class T, class V>
  FASTZOO_HD V value(const CouplingConstants<T>& c, V x, V t, V factor) {
    const V shift = V(c.turn) * t;
    if (c.adds_first) return (x + shift) * factor;
    return fused_multiply_add(x, factor, shift);
  }

  template <class T, class V>
  FASTZOO_HD Mapped<V> apply(const CouplingConstants<T>& c, V x, V t, V s) {
    const Scale<V> scale = ScaleOf::of(c, s);
    return {value(c, x, t, scale.factor), scale.log};
  }

  template <class T, class V>
  FASTZOO_HD CouplingGradients<V> gradients(const CouplingConstants<T>& c, V grad, V grad_log, V x,
                                            V t, V s) {
    return gradients_of_scale(c, grad, grad_log, x, t, ScaleOf::of(c, s));
  }

  template <class T, class V>
  FASTZOO_HD CouplingGradients<V> gradients_of_scale(const CouplingConstants<T>& c, V grad,
                                                     V grad_log, V x, V t, Scale<V> scale) {
    const V turn = V(c.turn);
    const V by_x = grad * scale.factor;
    V added = x, by_shift = grad;
    if (c.adds_first) {
      added = fused_multiply_add(turn, t, x);
      by_shift = by_x;
    }
    const V by_log = fused_multiply_add(by_x, added, grad_log);
    return {by_x, turn * by_shift, turn * by_log * scale.slope};
  }
};

// y = x / (1 + |x| / constant); only what is below the constant has an inverse.
struct SoftClipMap {
  static constexpr int kParameters = 0;

  template <class T, class V>
  FASTZOO_HD Mapped<V> apply(const CouplingConstants<T>& c, V x, V, V) {
    const V size = absolute(x);
    if (!c.inverse) {
      const V ratio = size / V(c.constant);
      return {x / (V(1) + ratio), V(-2) * wide_log_one_plus(ratio)};
    }
    const V rest = part(c, size);
    return {x * (V(c.constant) / rest), V(2) * wide_log_one_plus(size / rest)};
  }

  template <class T, class V>
  FASTZOO_HD CouplingGradients<V> gradients(const CouplingConstants<T>& c, V grad, V grad_log, V x,
                                            V, V) {
    const V q = V(c.constant) / part(c, absolute(x));  // the root of the derivative
    const V by_size = V(-2 * c.turn * c.reciprocal) * q * grad_log;
    const V by_log =
        select_greater(x, V(0), by_size, select_greater(V(0), x, V(0) - by_size, V(0)));
    return {fused_multiply_add(grad * q, q, by_log), V(0), V(0)};
  }

 private:
  // constant + |x|; of an inverse constant - |x|, NaN unless that is positive.
  template <class T, class V>
  FASTZOO_HD V part(const CouplingConstants<T>& c, V size) {
    if (!c.inverse) return V(c.constant) + size;
    const V rest = V(c.constant) - size;
    return select_greater(rest, V(0), rest, V(static_cast<T>(__builtin_nan(""))));
  }
};

// y = log(u / (1 - u)) with u = constant + (1 - 2 constant) x.
struct LogitMap {
  static constexpr int kParameters = 0;

  template <class T, class V>
  FASTZOO_HD Mapped<V> apply(const CouplingConstants<T>& c, V x, V, V) {
    if (!c.inverse) {
      const V log_u = logarithm(inside(c, x)), log_rest = logarithm(inside(c, V(1) - x));
      return {log_u - log_rest, V(c.log_inner) - log_u - log_rest};
    }
    const V size = absolute(x);
    const V w = wide_exponential(V(0) - size);
    const V sigmoid = select_greater(V(0), x, w, V(1)) / (V(1) + w);
    return {(sigmoid - V(c.constant)) / V(c.inner),
            V(0) - (V(c.log_inner) + size + V(2) * log_one_plus(w))};
  }

  template <class T, class V>
  FASTZOO_HD CouplingGradients<V> gradients(const CouplingConstants<T>& c, V grad, V grad_log, V x,
                                            V, V) {
    if (!c.inverse) {
      const V u = inside(c, x), rest = inside(c, V(1) - x);
      return {V(c.inner) * fused_multiply_add(grad_log, u - rest, grad) / (u * rest), V(0), V(0)};
    }
    const ExponentialPair<V> e = exponential_pair(V(0) - absolute(x));
    const V q = V(1) / (V(1) + e.value);
    const V size = e.less_one * q;  // -tanh |x / 2|
    const V tanh = select_greater(V(0), x, size, V(0) - size);
    return {grad * (e.value * q * q / V(c.inner)) - grad_log * tanh, V(0), V(0)};
  }

 private:
  template <class T, class V>
  FASTZOO_HD V inside(const CouplingConstants<T>& c, V x) {
    return fused_multiply_add(V(c.inner), x, V(c.constant));
  }
};

// y = x, or constant x where x is negative. NaN has the derivative of what is negative.
struct LeakyReluMap {
  static constexpr int kParameters = 0;

  template <class T, class V>
  FASTZOO_HD Mapped<V> apply(const CouplingConstants<T>& c, V x, V, V) {
    return {by_sign(x, x, slope<V>(c) * x), by_sign(x, V(0), V(c.turn * c.log_constant))};
  }

  template <class T, class V>
  FASTZOO_HD CouplingGradients<V> gradients(const CouplingConstants<T>& c, V grad, V, V x, V, V) {
    return {by_sign(x, grad, slope<V>(c) * grad), V(0), V(0)};
  }

 private:
  template <class V>
  FASTZOO_HD V by_sign(V x, V of_positive, V of_negative) {
    return select_greater(V(0), x, of_negative, select_greater(x, V(-1), of_positive, of_negative));
  }
  template <class V, class T>
  FASTZOO_HD V slope(const CouplingConstants<T>& c) {
    return V(c.inverse ? c.reciprocal : c.constant);
  }
};

// Calls body(Map{}) with the struct of a map. Host only.
template <class Body>
static inline __attribute__((always_inline)) void with_coupling_map(CouplingMap map,
                                                                    const Body& body) {
  switch (map) {
    case CouplingMap::exp:
      return body(AffineMap<ExponentialScale>{});
    case CouplingMap::sigmoid2:
      return body(AffineMap<SigmoidScale>{});
    case CouplingMap::tanh:
      return body(AffineMap<ExponentialOf<TanhLog>>{});
    case CouplingMap::atan:
      return body(AffineMap<ExponentialOf<ArctangentLog>>{});
    case CouplingMap::softplus:
      return body(AffineMap<SoftplusScale>{});
    case CouplingMap::softclip:
      return body(AffineMap<ExponentialOf<SoftclipLog>>{});
    case CouplingMap::additive:
      return body(AffineMap<NoScale>{});
    case CouplingMap::soft_clip:
      return body(SoftClipMap{});
    case CouplingMap::logit:
      return body(LogitMap{});
    case CouplingMap::leaky_relu:
      return body(LeakyReluMap{});
  }
}

}  // namespace fastzoo::math
