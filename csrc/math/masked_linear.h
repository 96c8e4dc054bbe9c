// Masked-autoregressive transforms: a net, the maps that it steers, and what the inverse solves in
// which step. The net's units come in the order of the steps that they belong to. Its parameters
// lie in one array: of each layer the weight [out][in], then the bias [out]. T is float or double;
// V is T, or a vector of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "contrastive.h"
#include "coupling.h"
#include "splines.h"

namespace fastzoo::math {

constexpr int kMaskedLayers = 16;  // at most

struct MaskedLayer {
  int64_t in, out;
  int64_t weight, bias;  // where they begin
};

struct MaskedLayout {
  int layers;
  int64_t features;
  int64_t units;  // of all hidden layers
  int64_t size;
  MaskedLayer layer[kMaskedLayers];
};

// False where the net has no layer, too many of them, or a layer without units. Host only.
static inline bool masked_layout(const int64_t* widths, int64_t count, MaskedLayout& layout) {
  constexpr int64_t kMost = int64_t{1} << 24;
  if (count < 2 || count > kMaskedLayers + 1) return false;
  layout = {};
  for (int64_t i = 0; i < count; ++i) {
    if (widths[i] < 1 || widths[i] > kMost) return false;
  }
  layout.layers = static_cast<int>(count - 1);
  layout.features = widths[0];
  for (int i = 0; i < layout.layers; ++i) {
    const int64_t in = widths[i], out = widths[i + 1];
    const int64_t bias = layout.size + in * out;
    layout.layer[i] = {in, out, layout.size, bias};
    layout.size = bias + out;
    if (i + 1 < layout.layers) layout.units += out;
  }
  return true;
}

// Which units belong to which step. Layer 0 is the features.
struct MaskedSteps {
  const int64_t* starts;  // [layers + 1][count + 1]
  int64_t count;
};

FASTZOO_HD int64_t step_begin(const MaskedSteps& steps, int layer, int64_t step) {
  return steps.starts[layer * (steps.count + 1) + step];
}

// A unit reads the first so many of the layer before: features of earlier steps, or units up to its
// own step.
FASTZOO_HD int64_t step_inputs(const MaskedSteps& steps, int layer, int64_t step) {
  return step_begin(steps, layer - 1, layer == 1 ? step : step + 1);
}

// Whether every layer's steps follow one another from its first unit to its last, the last layer
// having as many units for each feature. Host only.
static inline bool masked_steps_fit(const MaskedSteps& steps, const MaskedLayout& layout,
                                    int64_t parameters) {
  for (int l = 0; l <= layout.layers; ++l) {
    const int64_t units = l == 0 ? layout.features : layout.layer[l - 1].out;
    if (step_begin(steps, l, 0) != 0 || step_begin(steps, l, steps.count) != units) return false;
    for (int64_t s = 0; s < steps.count; ++s) {
      if (step_begin(steps, l, s + 1) < step_begin(steps, l, s)) return false;
    }
  }
  for (int64_t s = 0; s <= steps.count; ++s) {
    if (step_begin(steps, layout.layers, s) != parameters * step_begin(steps, 0, s)) return false;
  }
  return true;
}

enum class Activation : int { relu = 0, tanh = 1, elu = 2, silu = 3, leaky_relu = 4, gelu = 5 };

// False where none has the name. Host only.
static inline bool activation_named(const char* name, Activation& activation) {
  return value_named(name, {"relu", "tanh", "elu", "silu", "leaky_relu", "gelu"}, activation);
}

// terms[0] + terms[1] t + ...
template <class T, int kCount, class V>
FASTZOO_HD V polynomial(const T (&terms)[kCount], V t) {
  V sum(terms[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) sum = fused_multiply_add(sum, t, V(terms[i]));
  return sum;
}

// The standard normal distribution's mass beyond |x|. exp(a^2) erfc(a) is t P(t) with
// t = 1 / (1 + s a); P by Chebyshev interpolation, relatively within 1e-8 for float and 3e-16.
template <class T, class V>
FASTZOO_HD V normal_tail(V x) {
  const T s = static_cast<T>(sizeof(T) == 4 ? 0.4 : 0.3);
  const V scale(s * static_cast<T>(0.70710678118654752440));
  const V t = V(T(1)) / fused_multiply_add(scale, absolute(x), V(T(1)));
  const V half = V(T(0.5)) * t * exponential(V(T(-0.5)) * x * x);
  if constexpr (sizeof(T) == 4) {
    constexpr float kTerms[] = {0.225675836f,  0.225676313f,  0.207600728f,   0.171890572f,
                                0.118095122f,  0.0871206447f, -0.0537931658f, 0.146803245f,
                                -0.243041739f, 0.143841073f,  -0.0298686288f};
    return half * polynomial(kTerms, t);
  } else {
    constexpr double kTerms[] = {
        0.169256875064326928,    0.169256875064282513,  0.161640315694234745,
        0.146407196385380035,    0.124585774512808303,  0.0982320000471824318,
        0.0702076344470599774,   0.0436029282378974385, 0.0221584599294523609,
        0.00228073037423657209,  0.0135832402647551274, -0.0651766433966982677,
        0.166242888666050974,    -0.385852933707162908, 0.687505643285040564,
        -0.957085945939342196,   1.03594220535362687,   -0.841507166782199972,
        0.495378057193807957,    -0.203774785474784026, 0.0553918447021664329,
        -0.00891528770220063961, 0.00064009378007875973};
    return half * polynomial(kTerms, t);
  }
}

template <class T, class V>
FASTZOO_HD V activate(Activation activation, V x) {
  const V zero(T(0));
  switch (activation) {
    case Activation::relu:
      return maximum(x, zero);
    case Activation::tanh: {
      const V less_one = exponential_pair(V(T(-2)) * absolute(x)).less_one;
      const V size = less_one / (V(T(-2)) - less_one);
      return select_greater(zero, x, zero - size, size);
    }
    case Activation::elu:
      return select_greater(zero, x, exponential_pair(minimum(x, zero)).less_one, x);
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::leaky_relu:
      return select_greater(zero, x, V(static_cast<T>(0.01)) * x, x);
    case Activation::gelu: {
      const V tail = normal_tail<T>(x);
      return x * select_greater(x, zero, V(T(1)) - tail, tail);
    }
  }
  return x;
}

// What makes y of x, a feature at a time.
struct MaskedMap {
  bool spline;
  CouplingMap coupling;
  SplineConvention convention;
  int bins;
  int parameters;  // of a feature
  double constant, floor;
};

// False where no map has the name, or a map without parameters, or there are too few bins. Host
// only.
static inline bool masked_map_named(const char* name, int64_t bins, double constant, double floor,
                                    MaskedMap& map) {
  constexpr int64_t kMost = int64_t{1} << 20;
  map = {};
  map.constant = constant;
  map.floor = floor;
  map.spline = spline_convention_named(name, map.convention);
  if (map.spline) {
    if (bins < 1 || bins > kMost) return false;
    map.bins = static_cast<int>(bins);
    map.parameters = 2 * map.bins + spline_derivatives(SplineTails::linear, map.bins);
    return true;
  }
  map.parameters = 2;
  return coupling_map_named(name, map.coupling) && map.coupling <= CouplingMap::softclip;
}

// What is the same for every feature. Host only.
template <class T>
struct MaskedConstants {
  CouplingConstants<T> coupling;
  SplineBox<T> box;
  int bins;
};
template <class T>
static inline MaskedConstants<T> masked_constants(const MaskedMap& map) {
  const double c = map.constant, floor = map.floor;
  if (map.spline) {
    return {
        {}, spline_box<T>(map.convention, map.bins, -c, c, -c, c, floor, floor, floor), map.bins};
  }
  return {coupling_constants<T>(c, floor, false, true), {}, 0};
}

// Inverses of a feature y, whose parameters lie in a line: line[i] converts to V and can be set,
// and line + i begins i later.
template <class Map>
struct AffineInverse {
  template <class T, class V, class Line>
  FASTZOO_HD Mapped<V> of(const MaskedConstants<T>& constants, V y, const Line& line) {
    return Map::apply(constants.coupling, y, V(line[0]), V(line[1]));
  }
};

// Raw derivatives by knot; those at the ends count for nothing.
template <class V, class Line>
struct InnerKnots {
  Line raw;
  int bins;

  FASTZOO_HD_MEMBER V operator[](int knot) const {
    const int at = spline_derivative_of(SplineTails::linear, bins, knot);
    return at < 0 ? V(0) : V(raw[at]);
  }
};

// Uses up the parameters. kBins is the number of bins where it is known, else 0.
template <SplineConvention kConvention, int kBins>
struct SplineInverse {
  template <class T, class V, class Line>
  FASTZOO_HD Mapped<V> of(const MaskedConstants<T>& constants, V y, const Line& line) {
    constexpr SplineTails kTails = SplineTails::linear;
    const SplineBox<T>& box = constants.box;
    const int bins = kBins > 0 ? kBins : constants.bins;
    Line widths = line, heights = line + bins;
    const V width_sum = spline_exponentials<kConvention, kBins, T, V>(box.x, bins, widths);
    const V height_sum = spline_exponentials<kConvention, kBins, T, V>(box.y, bins, heights);
    const InnerKnots<V, Line> derivatives{line + 2 * bins, bins};
    SplineBin<V> bin =
        spline_bin<kBins, true>(box, bins, widths, width_sum, heights, height_sum, derivatives, y);
    spline_finish_bin<kConvention>(box, kTails, bins, bin);
    const SplinePoint<V> point = spline_point<true, T>(bin, y);
    const SplineValue<V> x = spline_value<true>(box, kTails, bin, point, y);
    return {x.value, x.log_slope};
  }
};

// Calls body(Inverse{}) with the struct of a map; kKnownBins is a number of bins that has its own.
// Host only.
template <int kKnownBins, class Body>
static inline __attribute__((always_inline)) void with_masked_inverse(const MaskedMap& map,
                                                                      const Body& body) {
  if (!map.spline) {
    return with_coupling_map(map.coupling, [&](auto coupling) __attribute__((always_inline)) {
      if constexpr (decltype(coupling)::kParameters == 2) body(AffineInverse<decltype(coupling)>{});
    });
  }
  const auto with_bins = [&](auto convention) __attribute__((always_inline)) {
    if (map.bins == kKnownBins) return body(SplineInverse<convention.value, kKnownBins>{});
    body(SplineInverse<convention.value, 0>{});
  };
  if (map.convention == SplineConvention::zuko) {
    return with_bins(std::integral_constant<SplineConvention, SplineConvention::zuko>{});
  }
  with_bins(std::integral_constant<SplineConvention, SplineConvention::nflows>{});
}

}  // namespace fastzoo::math
