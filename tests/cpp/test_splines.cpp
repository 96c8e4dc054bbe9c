// Rational-quadratic splines on vectors: gradients against differences of the values, the inverse
// against the forward map, and what holds exactly at ends and knots.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_splines, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_splines)

#else

#include <math.h>

#include "../../csrc/cpu/runtime/vec_math.h"
#include "../../csrc/math/splines.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::SplineConvention;
using math::SplineTails;

constexpr int kMost = 3 * 8 + 1;

// Roughly normal, the same for the same seed.
struct Numbers {
  uint64_t state;

  double next() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<double>(state >> 11) * 0x1p-53;
    }
    return sum - 6;
  }
};

template <class T>
struct Result {
  Vec<T> value, log_slope;
  Vec<T> by_at;
  Vec<T> by_raw[kMost];
  math::SplineBin<Vec<T> > bin;
};

// kBins as the kernels have it; raw parameters: widths, heights, derivatives.
template <class T, SplineConvention kConvention, int kBins, bool kInverse>
Result<T> spline(const math::SplineBox<T>& box, SplineTails tails, int bins, const Vec<T>* raw,
                 Vec<T> at, Vec<T> by_value, Vec<T> by_log) {
  using V = Vec<T>;
  V widths[8], heights[8], knots[9];
  for (int j = 0; j < bins; ++j) {
    widths[j] = raw[j];
    heights[j] = raw[bins + j];
  }
  for (int k = 0; k <= bins; ++k) {
    const int own = math::spline_derivative_of(tails, bins, k);
    knots[k] = own < 0 ? V(T(0)) : raw[2 * bins + own];
  }
  const V width_sum = math::spline_exponentials<kConvention, kBins, T, V>(box.x, bins, widths);
  const V height_sum = math::spline_exponentials<kConvention, kBins, T, V>(box.y, bins, heights);
  auto bin = math::spline_bin<kBins, kInverse>(box, bins, widths, width_sum, heights, height_sum,
                                               knots, at);
  const V slope0 = math::spline_derivative_slope<kConvention>(box, bin.d0);
  const V slope1 = math::spline_derivative_slope<kConvention>(box, bin.d1);
  math::spline_finish_bin<kConvention>(box, tails, bins, bin);
  const auto point = math::spline_point<kInverse, T>(bin, at);
  const auto found = math::spline_value<kInverse>(box, tails, bin, point, at);
  const auto by = math::spline_adjoint<kInverse, T>(bin, point, by_value, by_log);
  const auto by_widths = math::spline_spread<T>(box.x, bin, bin.x, bins, width_sum, by.x0, by.x1);
  const auto by_heights = math::spline_spread<T>(box.y, bin, bin.y, bins, height_sum, by.y0, by.y1);
  Result<T> result{found.value, found.log_slope, by.at, {}, bin};
  for (V& gradient : result.by_raw) gradient = V(T(0));
  for (int j = 0; j < bins; ++j) {
    result.by_raw[j] = math::spline_spread_to<T>(by_widths, j, widths[j]);
    result.by_raw[bins + j] = math::spline_spread_to<T>(by_heights, j, heights[j]);
    if (kConvention == SplineConvention::nflows) continue;
    const V own = math::spline_clip_slope(box.x.clip, raw[j]);
    const V above = math::spline_clip_slope(box.y.clip, raw[bins + j]);
    result.by_raw[j] = result.by_raw[j] * own;
    result.by_raw[bins + j] = result.by_raw[bins + j] * above;
  }
  for (int k = 0; k <= bins; ++k) {
    const int own = math::spline_derivative_of(tails, bins, k);
    if (own < 0) continue;
    V& gradient = result.by_raw[2 * bins + own];
    gradient = gradient + math::spline_knot_gradient<T>(bin, k, by.d0 * slope0, by.d1 * slope1);
  }
  return result;
}

template <class T, SplineConvention kConvention>
math::SplineBox<T> box_of(int bins) {
  return math::spline_box<T>(kConvention, bins, -5, 5, -5, 5, 1e-3, 1e-3, 1e-3);
}

template <SplineConvention kConvention, int kBins, bool kInverse>
double worst_gradient(SplineTails tails, int bins) {
  using V = Vec<double>;
  const auto box = box_of<double, kConvention>(bins);
  const int count = 2 * bins + math::spline_derivatives(tails, bins);
  Numbers numbers{7};
  double worst = 0;
  for (int round = 0; round < 20; ++round) {
    V raw[kMost + 1];  // and where the spline is evaluated
    for (int i = 0; i <= count; ++i) {
      for (int lane = 0; lane < V::size; ++lane) raw[i].v[lane] = numbers.next();
    }
    const V by_value(numbers.next()), by_log(numbers.next());
    const auto total = [&](const V* given) {
      const auto r = spline<double, kConvention, kBins, kInverse>(box, tails, bins, given,
                                                                  given[count], by_value, by_log);
      return by_value * r.value + by_log * r.log_slope;
    };
    const auto result = spline<double, kConvention, kBins, kInverse>(box, tails, bins, raw,
                                                                     raw[count], by_value, by_log);
    for (int i = 0; i <= count; ++i) {
      const V before = raw[i], step(1e-6);
      raw[i] = before + step;
      const V above = total(raw);
      raw[i] = before - step;
      const V below = total(raw);
      raw[i] = before;
      const V gradient = i < count ? result.by_raw[i] : result.by_at;
      for (int lane = 0; lane < V::size; ++lane) {
        const double wanted = (above[lane] - below[lane]) / 2e-6;
        const double error = fabs(gradient[lane] - wanted) / (1 + fabs(wanted));
        if (!(error <= worst)) worst = error;
      }
    }
  }
  return worst;
}

// Where the forward map and its inverse meet, in float: round trips, the sum of log-derivatives,
// and what is not finite.
struct Trips {
  double distance = 0, log_sum = 0;
  int not_finite = 0, knots_missed = 0, ends_missed = 0;
};

template <SplineConvention kConvention>
Trips round_trips(double size) {
  using V = Vec<float>;
  constexpr int kBins = 8;
  const auto box = box_of<float, kConvention>(kBins);
  const SplineTails tails = SplineTails::linear;
  const V zero(0.f);
  Numbers numbers{3};
  Trips trips;
  const auto both_ways = [&](const V* raw, V at, const auto& visit) {
    const auto there =
        spline<float, kConvention, kBins, false>(box, tails, kBins, raw, at, zero, zero);
    const auto back =
        spline<float, kConvention, kBins, true>(box, tails, kBins, raw, there.value, zero, zero);
    for (int lane = 0; lane < V::size; ++lane) {
      const float sum = there.log_slope[lane] + back.log_slope[lane];
      trips.not_finite += !(fabsf(there.value[lane]) < 30 && fabsf(back.value[lane]) < 30 &&
                            fabsf(there.log_slope[lane]) < 60 && fabsf(sum) < 60);
      visit(lane, there, back, sum);
    }
    return there;
  };
  for (int round = 0; round < 500; ++round) {
    V raw[kMost], at;
    for (V& parameter : raw) {
      for (int lane = 0; lane < V::size; ++lane) {
        parameter.v[lane] = static_cast<float>(size * numbers.next());
      }
    }
    for (int lane = 0; lane < V::size; ++lane) at.v[lane] = static_cast<float>(2 * numbers.next());
    // Where the map is flat a y of type float does not tell its x.
    const auto measure = [&](int lane, const auto& there, const auto& back, float sum) {
      if (there.log_slope[lane] < -3) return;
      trips.distance = fmax(trips.distance, fabs(back.value[lane] - at[lane]));
      trips.log_sum = fmax(trips.log_sum, fabs(sum));
    };
    const auto found = both_ways(raw, at, measure);
    both_ways(raw, found.bin.x.low, [&](int lane, const auto& there, const auto& back, float) {
      trips.knots_missed += there.value[lane] != found.bin.y.low[lane];
      trips.knots_missed += back.value[lane] != found.bin.x.low[lane];
    });
    for (const float end : {-5.f, 5.f}) {
      both_ways(raw, V(end), [&](int lane, const auto& there, const auto& back, float) {
        trips.ends_missed += there.value[lane] != end || back.value[lane] != end;
      });
    }
  }
  return trips;
}

template <SplineConvention kConvention>
void check_convention(int& failures) {
  for (const SplineTails tails : {SplineTails::linear, SplineTails::circular, SplineTails::none}) {
    // Differences of steps of 1e-6 are good to about 1e-9, times the curvature.
    CHECK((worst_gradient<kConvention, 8, false>(tails, 8)) < 1e-5);
    CHECK((worst_gradient<kConvention, 8, true>(tails, 8)) < 1e-5);
    CHECK((worst_gradient<kConvention, 0, false>(tails, 3)) < 1e-5);
    CHECK((worst_gradient<kConvention, 0, true>(tails, 3)) < 1e-5);
    CHECK((worst_gradient<kConvention, 0, true>(tails, 1)) < 1e-5);
  }
  const Trips usual = round_trips<kConvention>(0.5);
  CHECK(usual.distance < 1e-5);
  CHECK(usual.log_sum < 1e-4);
  for (const double size : {0.5, 50., 1e4}) {
    const Trips trips = round_trips<kConvention>(size);
    CHECK(trips.not_finite == 0);
    CHECK(trips.knots_missed == 0);
    CHECK(trips.ends_missed == 0);
  }

  // Beyond the box the identity, or NaN; of NaN a NaN.
  using V = Vec<float>;
  const auto box = box_of<float, kConvention>(8);
  V raw[kMost];
  for (V& parameter : raw) parameter = V(0.3f);
  const V one(1.f);
  for (const float at : {-5.0001f, 7.f, -__builtin_inff(), __builtin_nanf("")}) {
    const auto linear =
        spline<float, kConvention, 8, false>(box, SplineTails::linear, 8, raw, V(at), one, one);
    CHECK(linear.value[0] == at || math::is_nan(at));
    CHECK(math::is_nan(linear.value[0]) == math::is_nan(at));
    CHECK(linear.log_slope[0] == 0);
    const auto none =
        spline<float, kConvention, 8, false>(box, SplineTails::none, 8, raw, V(at), one, one);
    CHECK(math::is_nan(none.value[0]) && math::is_nan(none.log_slope[0]));
  }
}

}  // namespace

void check_splines(int& failures) {
  check_convention<SplineConvention::nflows>(failures);
  check_convention<SplineConvention::zuko>(failures);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
