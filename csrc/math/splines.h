// Rational-quadratic splines: from an element's raw parameters to its bin, from there to the value
// or its inverse with the log-derivative, and the adjoints of both. T is float or double; V is T,
// or a vector of them, one lane an element. What is indexed by bins or knots is a Line: an array of
// V, or anything with operator[](int). fastzoo/reference/splines.py defines the map.
#pragma once

#include "contrastive.h"
#include "host_device.h"

namespace fastzoo::math {

enum class SplineConvention : int { nflows = 0, zuko = 1 };
enum class SplineTails : int { linear = 0, circular = 1, none = 2 };

// False where none has the name. Host only.
static inline bool spline_convention_named(const char* name, SplineConvention& convention) {
  return value_named(name, {"nflows", "zuko"}, convention);
}
static inline bool spline_tails_named(const char* name, SplineTails& tails) {
  return value_named(name, {"linear", "circular", "none"}, tails);
}

// Raw derivatives of an element with so many bins.
FASTZOO_HD constexpr int spline_derivatives(SplineTails tails, int bins) {
  return tails == SplineTails::linear ? bins - 1 : tails == SplineTails::circular ? bins : bins + 1;
}

// The raw derivative that knot k has; -1 where it has none and its derivative is 1.
FASTZOO_HD constexpr int spline_derivative_of(SplineTails tails, int bins, int knot) {
  if (tails == SplineTails::circular) return knot == bins ? 0 : knot;
  if (tails == SplineTails::none) return knot;
  return knot == 0 || knot == bins ? -1 : knot - 1;
}

// How the side of the box is cut: bin j takes least + share (softmax of the raw sizes)_j.
template <class T>
struct SplineAxis {
  T low, high;
  T before, beyond;  // the numbers next to them outside
  T least, share;
  T clip;  // zuko's raw size u counts as u / (1 + clip |u|)
};

template <class T>
struct SplineBox {
  SplineAxis<T> x, y;
  T least_derivative;  // nflows
  T clip;              // zuko, of derivatives
};

static inline float next_number(float a, int direction) {
  return ::nextafterf(a, direction * __builtin_huge_valf());
}
static inline double next_number(double a, int direction) {
  return ::nextafter(a, direction * __builtin_huge_val());
}

// The minima of zuko are its slope. Host only.
template <class T>
static inline SplineBox<T> spline_box(SplineConvention convention, int bins, double left,
                                      double right, double bottom, double top, double min_width,
                                      double min_height, double min_derivative) {
  const bool zuko = convention == SplineConvention::zuko;
  const auto axis = [&](double low, double high, double minimum) {
    const double least = zuko ? 0 : minimum * (high - low);
    return SplineAxis<T>{static_cast<T>(low),
                         static_cast<T>(high),
                         next_number(static_cast<T>(low), -1),
                         next_number(static_cast<T>(high), 1),
                         static_cast<T>(least),
                         static_cast<T>(high - low - bins * least),
                         static_cast<T>(zuko ? 2 / __builtin_fabs(__builtin_log(minimum)) : 0)};
  };
  return {axis(left, right, min_width), axis(bottom, top, min_height),
          static_cast<T>(zuko ? 0 : min_derivative),
          static_cast<T>(zuko ? 1 / __builtin_fabs(__builtin_log(min_derivative)) : 0)};
}

// Calls body(i) for i from 0 on. kCount is how often where it is known, else 0.
template <int kCount, class Body>
FASTZOO_HD void spline_loop(int count, const Body& body) {
  if constexpr (kCount > 0) {
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 8
#endif
    for (int i = 0; i < kCount; ++i) body(i);
  } else {
    for (int i = 0; i < count; ++i) body(i);
  }
}

// u / (1 + clip |u|), and its derivative.
template <class T, class V>
FASTZOO_HD V spline_clip(T clip, V u) {
  return u / (V(T(1)) + V(clip) * absolute(u));
}
template <class T, class V>
FASTZOO_HD V spline_clip_slope(T clip, V u) {
  const V inverse = V(T(1)) / (V(T(1)) + V(clip) * absolute(u));
  return inverse * inverse;
}

// Of the raw sizes of bins, in `line`, the exponentials that their shares are proportional to, in
// their place; returns their sum. kBins is the number of bins where it is known, else 0.
template <SplineConvention kConvention, int kBins, class T, class V, class Line>
FASTZOO_HD V spline_exponentials(const SplineAxis<T>& axis, int bins, Line& line) {
  V sum(T(0)), highest = line[0];
  if constexpr (kConvention == SplineConvention::nflows) {
    spline_loop<kBins>(bins, [&](int j) { highest = maximum(highest, V(line[j])); });
  }
  spline_loop<kBins>(bins, [&](int j) {
    // What zuko clips is bounded already.
    const V raw = line[j];
    const V e = exponential(kConvention == SplineConvention::zuko ? spline_clip(axis.clip, raw)
                                                                  : raw - highest);
    sum = sum + e;
    line[j] = e;
  });
  return sum;
}

template <SplineConvention kConvention, class T, class V>
FASTZOO_HD V spline_derivative(const SplineBox<T>& box, V raw) {
  if constexpr (kConvention == SplineConvention::zuko) {
    return exponential(spline_clip(box.clip, raw));
  } else {
    return V(box.least_derivative) + softplus(raw);
  }
}

// Its derivative by what is raw.
template <SplineConvention kConvention, class T, class V>
FASTZOO_HD V spline_derivative_slope(const SplineBox<T>& box, V raw) {
  if constexpr (kConvention == SplineConvention::zuko) {
    return exponential(spline_clip(box.clip, raw)) * spline_clip_slope(box.clip, raw);
  } else {
    return sigmoid(raw);
  }
}

// The bin of an element along one side: the knots at its ends, and the sums of the exponentials
// up to them.
template <class V>
struct SplineSide {
  V low, high;
  V sum_low, sum_high;
};

template <class V>
struct SplineBin {
  V index;
  SplineSide<V> x, y;
  V d0, d1;  // derivatives at its ends; raw where spline_bin() leaves them
};

// `later` where its lower knot is not above `at`, else `bin`.
template <class V>
FASTZOO_HD SplineSide<V> spline_later(V knot, V at, const SplineSide<V>& side,
                                      const SplineSide<V>& later) {
  return {select_greater(knot, at, side.low, later.low),
          select_greater(knot, at, side.high, later.high),
          select_greater(knot, at, side.sum_low, later.sum_low),
          select_greater(knot, at, side.sum_high, later.sum_high)};
}
template <class V>
FASTZOO_HD SplineBin<V> spline_later(V knot, V at, const SplineBin<V>& bin,
                                     const SplineBin<V>& later) {
  return {select_greater(knot, at, bin.index, later.index), spline_later(knot, at, bin.x, later.x),
          spline_later(knot, at, bin.y, later.y), select_greater(knot, at, bin.d0, later.d0),
          select_greater(knot, at, bin.d1, later.d1)};
}

// The last bin whose lower knot is not above `at`, by x or, for the inverse, by y. Sizes are what
// spline_exponentials() leaves with its sums; derivatives are raw and of all bins + 1 knots.
template <int kBins, bool kInverse, class T, class V, class Sizes, class Derivatives>
FASTZOO_HD SplineBin<V> spline_bin(const SplineBox<T>& box, int bins, const Sizes& widths,
                                   V width_sum, const Sizes& heights, V height_sum,
                                   const Derivatives& derivatives, V at) {
  const int count = kBins > 0 ? kBins : bins;
  const V x_share = V(box.x.share) / width_sum;
  const V y_share = V(box.y.share) / height_sum;
  SplineBin<V> bin{};
  V x(box.x.low), y(box.y.low), x_sum(T(0)), y_sum(T(0));
  spline_loop<kBins>(bins, [&](int j) {
    const T through = static_cast<T>(j + 1);
    const bool last = j + 1 == count;
    const V x_through = x_sum + V(widths[j]);
    const V y_through = y_sum + V(heights[j]);
    const V x_next =
        last ? V(box.x.high) : V(box.x.low + through * box.x.least) + x_share * x_through;
    const V y_next =
        last ? V(box.y.high) : V(box.y.low + through * box.y.least) + y_share * y_through;
    const SplineBin<V> own{V(static_cast<T>(j)),
                           {x, x_next, x_sum, x_through},
                           {y, y_next, y_sum, y_through},
                           derivatives[j],
                           derivatives[j + 1]};
    bin = j == 0 ? own : spline_later(kInverse ? y : x, at, bin, own);
    x = x_next;
    y = y_next;
    x_sum = x_through;
    y_sum = y_through;
  });
  return bin;
}

// `inner` where the bin's lower (upper) knot is not at an end of the box, else `end`.
template <class T, class V>
FASTZOO_HD V spline_lower_end(const SplineBin<V>& bin, V end, V inner) {
  return select_greater(V(T(0.5)), bin.index, end, inner);
}
template <class T, class V>
FASTZOO_HD V spline_upper_end(const SplineBin<V>& bin, int bins, V end, V inner) {
  return select_greater(bin.index, V(static_cast<T>(bins) - T(1.5)), end, inner);
}

// From raw derivatives to derivatives.
template <SplineConvention kConvention, class T, class V>
FASTZOO_HD void spline_finish_bin(const SplineBox<T>& box, SplineTails tails, int bins,
                                  SplineBin<V>& bin) {
  bin.d0 = spline_derivative<kConvention>(box, bin.d0);
  bin.d1 = spline_derivative<kConvention>(box, bin.d1);
  if (tails != SplineTails::linear) return;
  bin.d0 = spline_lower_end<T>(bin, V(T(1)), bin.d0);
  bin.d1 = spline_upper_end<T>(bin, bins, V(T(1)), bin.d1);
}

// Where in its bin an element is, theta from 0 to 1, and what its value and slope are made of.
template <class V>
struct SplinePoint {
  V theta, q;   // q = theta (1 - theta)
  V w, h, s;    // the bin's sides, and s = h / w
  V beta, den;  // d0 + d1 - 2 s; s + beta q
  V a, e;       // (y - y0) / h = a / den; dy/dx = (s / den)^2 e
};

template <class T, class V>
FASTZOO_HD void spline_place(const SplineBin<V>& bin, V theta, SplinePoint<V>& point) {
  const V rest = V(T(1)) - theta;
  const V square = theta * theta;
  point.theta = theta;
  point.q = theta * rest;
  point.den = fused_multiply_add(point.beta, point.q, point.s);
  point.a = fused_multiply_add(point.s, square, bin.d0 * point.q);
  point.e = fused_multiply_add(
      bin.d1, square, fused_multiply_add(point.s + point.s, point.q, bin.d0 * (rest * rest)));
}

template <class T, class V>
FASTZOO_HD V spline_within_one(V theta) {
  return minimum(maximum(theta, V(T(0))), V(T(1)));
}

// `inner` where theta is below 1, else the end itself. A NaN stays one.
template <class T, class V>
FASTZOO_HD V spline_pin(V theta, V inner, V end) {
  return select_greater(V(T(1)), theta, minimum(inner, end), end * theta);
}

// The point of an element at x (inverse: at y).
template <bool kInverse, class T, class V>
FASTZOO_HD SplinePoint<V> spline_point(const SplineBin<V>& bin, V at) {
  SplinePoint<V> point;
  point.w = bin.x.high - bin.x.low;
  point.h = bin.y.high - bin.y.low;
  point.s = point.h / point.w;
  point.beta = (bin.d0 - point.s) + (bin.d1 - point.s);
  if constexpr (kInverse) {
    // The root of a quadratic, from the end of the bin that makes it a quotient of sums; the
    // discriminant is a sum too.
    const V g = spline_within_one<T>((at - bin.y.low) / point.h), rest = V(T(1)) - g;
    const V lean = rest * bin.d0 - g * bin.d1, zero(T(0));
    const V twice = point.s + point.s;
    const V root = square_root(fused_multiply_add(twice * twice, g * rest, lean * lean));
    const V own = twice * select_greater(zero, lean, rest, g);
    const V from_end = own / (absolute(lean) + own + root);
    const V theta = select_greater(zero, lean, V(T(1)) - from_end, from_end);
    spline_place<T>(bin, select_greater(V(T(1)), g, theta, g), point);
  } else {
    spline_place<T>(bin, spline_within_one<T>((at - bin.x.low) / point.w), point);
  }
  return point;
}

template <class V>
struct SplineValue {
  V value, log_slope;  // log_slope: log |d value / d at|
};

// `inside` where `at` is in the box, else `outside`, as a NaN is.
template <class T, class V>
FASTZOO_HD V spline_inside(const SplineAxis<T>& axis, V at, V inside, V outside) {
  return select_greater(at, V(axis.before), select_greater(V(axis.beyond), at, inside, outside),
                        outside);
}

// y of a point, or x for the inverse; beyond the box what the tails say.
template <bool kInverse, class T, class V>
FASTZOO_HD SplineValue<V> spline_value(const SplineBox<T>& box, SplineTails tails,
                                       const SplineBin<V>& bin, const SplinePoint<V>& point, V at) {
  const V ratio = point.s / point.den;
  const V log_slope = logarithm(ratio * ratio * point.e);
  const bool none = tails == SplineTails::none;
  const V nan(static_cast<T>(__builtin_nan("")));
  const SplineAxis<T>& axis = kInverse ? box.y : box.x;
  const V value =
      kInverse
          ? spline_pin<T>(point.theta, bin.x.low + point.theta * point.w, bin.x.high)
          : spline_pin<T>(point.theta, bin.y.low + point.h * (point.a / point.den), bin.y.high);
  return {
      spline_inside(axis, at, value, none ? nan : at),
      spline_inside(axis, at, kInverse ? V(T(0)) - log_slope : log_slope, none ? nan : V(T(0)))};
}

// Gradients by what a point is made of; those of derivatives are by the derivatives themselves.
template <class V>
struct SplineAdjoint {
  V at;
  V x0, x1, y0, y1, d0, d1;
};

// Given those by y and by log dy/dx; `at` is x.
template <class T, class V>
FASTZOO_HD SplineAdjoint<V> spline_adjoint_forward(const SplineBin<V>& bin,
                                                   const SplinePoint<V>& point, V by_y, V by_log) {
  const V one(T(1));
  const V rest = one - point.theta;
  const V square = point.theta * point.theta;
  const V over_den = one / point.den;
  const V over_w = one / point.w;
  const V twice_log = by_log + by_log;
  const V by_num = by_y * over_den;
  const V by_a = by_num * point.h;
  const V by_den = V(T(0)) - over_den * fused_multiply_add(by_a, point.a, twice_log);
  const V by_e = by_log / point.e;
  const V by_beta = by_den * point.q;
  const V by_e_s = by_e + by_e;
  V by_s = fused_multiply_add(by_a, square, twice_log / point.s);
  by_s = by_s + by_den - (by_beta + by_beta);
  by_s = fused_multiply_add(by_e_s, point.q, by_s);
  V by_q = fused_multiply_add(by_a, bin.d0, by_den * point.beta);
  by_q = fused_multiply_add(by_e_s, point.s, by_q);
  V by_theta = by_a * point.s * (point.theta + point.theta);
  by_theta = fused_multiply_add(by_e_s, bin.d1 * point.theta - bin.d0 * rest, by_theta);
  by_theta = fused_multiply_add(by_q, rest - point.theta, by_theta);

  const V by_h = fused_multiply_add(by_s, over_w, by_num * point.a);
  const V by_x = by_theta * over_w;
  const V by_w = V(T(0)) - over_w * fused_multiply_add(by_s, point.s, by_theta * point.theta);
  SplineAdjoint<V> adjoint;
  adjoint.at = by_x;
  adjoint.x1 = by_w;
  adjoint.x0 = V(T(0)) - by_x - by_w;
  adjoint.y1 = by_h;
  adjoint.y0 = by_y - by_h;
  adjoint.d0 = fused_multiply_add(by_a, point.q, fused_multiply_add(by_e, rest * rest, by_beta));
  adjoint.d1 = fused_multiply_add(by_e, square, by_beta);
  return adjoint;
}

// Given those by the value and by the log-derivative of the direction at hand.
template <bool kInverse, class T, class V>
FASTZOO_HD SplineAdjoint<V> spline_adjoint(const SplineBin<V>& bin, const SplinePoint<V>& point,
                                           V by_value, V by_log) {
  if constexpr (!kInverse) return spline_adjoint_forward<T>(bin, point, by_value, by_log);
  // x = f^-1(y): dx = (dy - f_p dp) / f', and the log-derivative is that of f at x, negative.
  const V ratio = point.s / point.den;
  const V slope = ratio * ratio * point.e;
  const V rest = V(T(1)) - point.theta;
  const V turn = rest - point.theta;
  const V two_beta = point.beta + point.beta;
  V by_theta = fused_multiply_add(point.s, turn, bin.d1 * point.theta - bin.d0 * rest);
  by_theta = (by_theta + by_theta) / point.e - two_beta * turn / point.den;
  const V by_y = (by_value - by_log * by_theta / point.w) / slope;
  SplineAdjoint<V> adjoint =
      spline_adjoint_forward<T>(bin, point, V(T(0)) - by_y, V(T(0)) - by_log);
  adjoint.at = by_y;
  return adjoint;
}

// From gradients by the knots of one side to those by the raw sizes of all bins.
template <class V>
struct SplineSpread {
  V index;
  V below, own, above;  // the gradient of a bin below the element's, of its own, of one above
};

// The ends of the box move nothing.
template <class T, class V>
FASTZOO_HD SplineSpread<V> spline_spread(const SplineAxis<T>& axis, const SplineBin<V>& bin,
                                         const SplineSide<V>& side, int bins, V sum, V by_low,
                                         V by_high) {
  by_high = spline_upper_end<T>(bin, bins, V(T(0)), by_high);
  const V over_sum = V(T(1)) / sum;
  const V mean = over_sum * fused_multiply_add(by_low, side.sum_low, by_high * side.sum_high);
  const V factor = V(axis.share) * over_sum;
  return {bin.index, factor * (by_low + by_high - mean), factor * (by_high - mean),
          V(T(0)) - factor * mean};
}

// The gradient by the size of bin j before its exponential, which is given.
template <class T, class V>
FASTZOO_HD V spline_spread_to(const SplineSpread<V>& spread, int j, V exponential_of_j) {
  const V at(static_cast<T>(j));
  return exponential_of_j *
         select_greater(spread.index, at, spread.below,
                        select_greater(at, spread.index, spread.above, spread.own));
}

// The gradient by the raw derivative of a knot, given those by the two at the ends of the bin.
template <class T, class V>
FASTZOO_HD V spline_knot_gradient(const SplineBin<V>& bin, int knot, V by_d0, V by_d1) {
  const V zero(T(0));
  const T at = static_cast<T>(knot);
  const V upper = select_greater(bin.index, V(at - T(1.5)), by_d1, zero);
  const V lower = select_greater(bin.index, V(at - T(0.5)), by_d0, upper);
  return select_greater(bin.index, V(at + T(0.5)), zero, lower);
}

}  // namespace fastzoo::math
