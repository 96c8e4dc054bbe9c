// Margin softmax: the margins' rules for the target's cosine, with their derivatives, in double;
// and what the scores of the other classes become. fastzoo/reference/margin_softmax.py defines
// both.
#pragma once

#include "host_device.h"

namespace fastzoo::math {

enum class MarginRule : int {
  shift = 0,
  arcface = 1,
  easy = 2,
  unguarded = 3,
  clip = 4,
  combined = 5,
  psi = 6
};

// In derivatives a sine is held above this, so that they are finite at cosines of +-1.
constexpr double kSineFloor = 0x1p-12;
// AdaFace's angles end here.
constexpr double kAngleEdge = 1e-3;
constexpr double kPi = 3.14159265358979323846;

struct MarginSlopes {
  double cosine, m1, m2;  // that to m3 is -1 for every rule
};

// (-1)^k for a whole number k.
FASTZOO_HD double alternating(double k) { return k - 2 * floor(k / 2) == 0 ? 1 : -1; }

// The Chebyshev polynomials T_m(c) and U_{m-1}(c), and how many multiples of pi / m lie below the
// angle whose cosine is c.
struct Chebyshev {
  double value, slope, k;
};

FASTZOO_HD Chebyshev chebyshev(double c, double m) {
  double before = 1, value = c;
  double slope_before = 0, slope = 1;
  double k = 0;
  for (double degree = 2; degree <= m; degree += 1) {
    const double next = 2 * c * value - before;
    before = value;
    value = next;
    const double slope_next = 2 * c * slope - slope_before;
    slope_before = slope;
    slope = slope_next;
    k += c < cos((degree - 1) * kPi / m) ? 1 : 0;
  }
  return {value, slope, k};
}

// The margin's value for a target's cosine. Beyond +-1, by rounding, the cosine counts as +-1.
FASTZOO_HD double margin_target(MarginRule rule, double cosine, double m1, double m2, double m3) {
  if (rule == MarginRule::shift) return cosine - m3;
  const double c = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
  if (rule == MarginRule::psi) {
    const Chebyshev t = chebyshev(c, m1);
    return (m2 * c + alternating(t.k) * t.value - 2 * t.k) / (1 + m2) - m3;
  }
  const double sine = sqrt((1 - c) * (1 + c));
  if (rule == MarginRule::combined) {
    const double angle = m1 * atan2(sine, c) + m2;
    const double k = maximum(0.0, floor(angle / kPi));
    return alternating(k) * cos(angle) - 2 * k - m3;
  }
  const double m_cosine = cos(m2), m_sine = sin(m2);
  const double shifted = c * m_cosine - sine * m_sine - m3;
  switch (rule) {
    case MarginRule::arcface:
      return c > -m_cosine ? shifted : c - m2 * m_sine - m3;
    case MarginRule::easy:
      return c > 0 ? shifted : c - m3;
    case MarginRule::clip: {
      const double angle = acos(c) + m2;
      if (angle < kAngleEdge) return cos(kAngleEdge) - m3;
      return angle > kPi - kAngleEdge ? -cos(kAngleEdge) - m3 : shifted;
    }
    default:
      return shifted;
  }
}

// Its derivatives, bounded everywhere; that of clamping a cosine counts as 1.
FASTZOO_HD MarginSlopes margin_target_slopes(MarginRule rule, double cosine, double m1, double m2) {
  if (rule == MarginRule::shift) return {1, 0, 0};
  const double c = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
  if (rule == MarginRule::psi) {
    const Chebyshev t = chebyshev(c, m1);
    return {(m2 + alternating(t.k) * m1 * t.slope) / (1 + m2), 0, 0};
  }
  const double sine = sqrt((1 - c) * (1 + c));
  const double floored = maximum(sine, kSineFloor);
  if (rule == MarginRule::combined) {
    const double theta = atan2(sine, c);
    const double angle = m1 * theta + m2;
    const double by_angle = -alternating(maximum(0.0, floor(angle / kPi))) * sin(angle);
    return {-by_angle * m1 / floored, by_angle * theta, by_angle};
  }
  const double m_cosine = cos(m2), m_sine = sin(m2);
  const MarginSlopes shifted{m_cosine + c * m_sine / floored, 0, -c * m_sine - sine * m_cosine};
  switch (rule) {
    case MarginRule::arcface:
      return c > -m_cosine ? shifted : MarginSlopes{1, 0, -(m_sine + m2 * m_cosine)};
    case MarginRule::easy:
      return c > 0 ? shifted : MarginSlopes{1, 0, 0};
    case MarginRule::clip: {
      const double angle = acos(c) + m2;
      const bool moves = angle > kAngleEdge && angle < kPi - kAngleEdge;
      return moves ? shifted : MarginSlopes{0, 0, 0};
    }
    default:
      return shifted;
  }
}

// What normalises a vector of this norm; 0 for one too short to have a direction.
FASTZOO_HD double inverse_norm(double norm) { return norm <= kNormFloor ? 0 : 1 / norm; }

// What the score u of a class that is not the target becomes, and its derivative. Above the
// threshold it is hard, u (hardness + u); above the filter it is 0, whatever else it is. Where a
// rule is not wanted, its limit is infinity. T is float, double, or a vector of them.
template <class T>
FASTZOO_HD T negative_value(T u, T threshold, T hardness, T filter) {
  const T hardened = select(greater(u, threshold), u * (hardness + u), u);
  return select(greater(u, filter), T(0), hardened);
}

template <class T>
FASTZOO_HD T negative_slope(T u, T threshold, T hardness, T filter) {
  const T hardened = select(greater(u, threshold), hardness + (u + u), T(1));
  return select(greater(u, filter), T(0), hardened);
}

}  // namespace fastzoo::math
