// The overlap of rotated boxes, for KeptBoxes. A cheap bound, a vector of kept boxes at a time,
// says which of them the exact overlap is computed with; it never leaves out one that suppresses.
//
// Say the computed overlap of a and b exceeds t >= 0. R is the sum of their radii, A and B are
// their computed areas, u is the unit round-off, and a box's extents are those of the box along the
// axes around it. (1) Their circles touch, as rotated_iou computes it: else it takes the
// intersection to be 0. (2) The computed intersection is at most min(A, B), and the computed union
// at least
//     (1 - 3u) max(A, B): so t max(A, B) <= (1 + 4u) min(A, B), where t is a normal number.
// The rest needs boxes that are `regular`: their area is at least 2^-12 times the square of their
// radius, and their sine and cosine are those of an angle but for 2^-48. The computed corners are
// then off by less than 2^8 u R and the computed intersection, with what its sums add, by less than
// 2^12 u R^2, which is below 2^-27 (A + B) for t >= 1/16, by (2). In exact terms, with t' = t
// (1 - 2^-16), the intersection is thus at least t' / (1 + t') (A + B), and t' A and t' B.
// (3) It is at most what the boxes along the axes around a and b share.
// (4) Along an axis, the length of a's chords across it is concave and symmetric around the centre.
//     Say q <= 1 is the ratio of b's to a's extent. Of a's area no interval of b's extent holds
//     more than the middle one, and this no more than it would of a rhombus: t' <= 1 - (1 - q)^2.
//     So the extents, and the longer ones, differ at most by the factor 1 / (1 - sqrt(1 - t')).
// (5) Say the centres differ by d along an axis, s is b's half extent, and d >= s. What a has
//     beyond d - s and within d + s from its centre is, as its chords shorten outwards, at most the
//     share 2s / (d + s) of half of it: t' A <= A s / (d + s). So d <= (1 / t' - 1) s, or d < s.
#pragma once

#include "../../math/rotated_boxes.h"
#include "kept_boxes.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

// A box and its half extents; infinite ones, which bound nothing, if it is not regular.
struct PlacedBox {
  math::RotatedBox rotated;
  double half_x, half_y;
};

FASTZOO_INLINE PlacedBox load_rotated_box(const double* p, bool degrees) {
  const math::RotatedBox box = math::rotated_box(p[0], p[1], p[2], p[3], p[4], degrees);
  const double norm = box.sine * box.sine + box.cosine * box.cosine - 1;
  const bool regular = norm < 0x1p-48 && norm > -0x1p-48 && box.radius < 0x1p+400 &&
                       box.radius > 0x1p-400 && box.width > 0 && box.height > 0 &&
                       box.area >= 0x1p-12 * box.radius * box.radius;
  if (!regular) return {box, __builtin_huge_val(), __builtin_huge_val()};
  const double sine = math::maximum(box.sine, -box.sine);
  const double cosine = math::maximum(box.cosine, -box.cosine);
  // Widened by more than all roundings up to where they are compared.
  const double slack = 0x1p-20 * box.radius;
  return {box, 0.5 * (box.width * cosine + box.height * sine) + slack,
          0.5 * (box.width * sine + box.height * cosine) + slack};
}

// As of boxes along the axes.
FASTZOO_INLINE bool is_inert(const PlacedBox& box) {
  return !(box.rotated.width > 0 && box.rotated.height > 0 && box.rotated.area > 0 &&
           box.rotated.area <= Limits<double>::largest_area);
}

template <>
class Overlap<math::RotatedBox> {
 public:
  using Box = PlacedBox;
  using V = Vec<double>;
  struct Probe {
    V x, y, half_x, half_y, radius, area;
  };
  static constexpr int kLanes = V::size;
  static constexpr bool kExact = false;

  // Lanes not yet taken have an area of NaN.
  struct Block {
    double x[kLanes], y[kLanes], half_x[kLanes], half_y[kLanes], radius[kLanes], area[kLanes];
  };

  explicit Overlap(double threshold)
      : threshold_(threshold),
        reduced_(threshold * (1 - 0x1p-16)),
        least_ratio_(threshold >= 0x1p-1000 ? threshold : 0),
        least_share_(suits_grid() ? reduced_ / (1 + reduced_) : 0) {}

  bool suits_grid() const { return threshold_ >= kLowestGridThreshold; }

  Bounds bounds() const {
    const double reach = 1 / reduced_ - 1;
    return {0.5 * math::maximum(reach, 1.0), 1 / (1 - math::square_root_of(1 - reduced_))};
  }

  static __attribute__((always_inline)) Place place_of(const Box& box) {
    const math::RotatedBox& rotated = box.rotated;
    const double farthest =
        math::maximum(math::maximum(-rotated.x, rotated.x), math::maximum(-rotated.y, rotated.y));
    Place place;
    place.x = rotated.x;
    place.y = rotated.y;
    place.width = 2 * box.half_x;
    place.height = 2 * box.half_y;
    place.side = math::maximum(place.width, place.height);
    place.level = level_of(place.side);
    place.in_grid = place.side < 0x1p+900 && farthest <= kFarthest * place.side;
    return place;
  }

  static __attribute__((always_inline)) Probe probe(const Box& box) {
    return {V(box.rotated.x), V(box.rotated.y),      V(box.half_x),
            V(box.half_y),    V(box.rotated.radius), V(box.rotated.area)};
  }

  // The lanes that may suppress the box.
  __attribute__((always_inline)) uint32_t suppressing(const Block& block,
                                                      const Probe& probe) const {
    const V zero(0.0);
    const V area = V::load(block.area);
    if (threshold_ < 0) return less(area, zero).bits | less(V(-1.0), area).bits;
    const V dx = V::load(block.x) - probe.x;
    const V dy = V::load(block.y) - probe.y;
    const V reach = V::load(block.radius) + probe.radius;
    const V shared = shared_extent(V::load(block.half_x), probe.half_x, dx) *
                     shared_extent(V::load(block.half_y), probe.half_y, dy);
    return less(zero, area).bits & not_less(reach * reach, dx * dx + dy * dy).bits &
           not_less(minimum(area, probe.area) * V(1 + 0x1p-40),
                    V(least_ratio_) * maximum(area, probe.area))
               .bits &
           not_less(shared, V(least_share_) * (area + probe.area)).bits;
  }

  __attribute__((always_inline)) bool suppresses(const Box& kept, const Box& box) const {
    return math::rotated_iou(kept.rotated, box.rotated) > threshold_;
  }

  static __attribute__((always_inline)) void clear(Block& block) {
    V(__builtin_nan("")).store(block.area);
  }

  static __attribute__((always_inline)) void put(Block& block, int lane, const Box& box) {
    block.x[lane] = box.rotated.x;
    block.y[lane] = box.rotated.y;
    block.half_x[lane] = box.half_x;
    block.half_y[lane] = box.half_y;
    block.radius[lane] = box.rotated.radius;
    block.area[lane] = box.rotated.area;
  }

 private:
  // How much intervals of these half lengths, this far apart, have in common.
  static __attribute__((always_inline)) V shared_extent(V a, V b, V distance) {
    const V apart = maximum(distance, V(0.0) - distance);
    const V smaller = minimum(a, b);
    return maximum(V(0.0), minimum(a + b - apart, smaller + smaller));
  }

  const double threshold_;
  const double reduced_;      // t'
  const double least_ratio_;  // of the areas: t
  const double least_share_;  // of the areas' sum that is shared: t' / (1 + t')
};

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
