// Boxes and how much they overlap. What decides a keep is built without contraction everywhere, so
// that every backend takes the same decision to the last bit.
#pragma once

#include "host_device.h"

namespace fastzoo::math {

// V is a scalar or the CPU's vector type.
template <class V>
struct Box {
  V x1, y1, x2, y2, area;
};

template <class V>
FASTZOO_HD V box_area(V x1, V y1, V x2, V y2) {
  return (x2 - x1) * (y2 - y1);
}

template <class V>
FASTZOO_HD V box_intersection(const Box<V>& a, const Box<V>& b) {
  const V zero = V(0);
  const V w = maximum(zero, minimum(a.x2, b.x2) - maximum(a.x1, b.x1));
  const V h = maximum(zero, minimum(a.y2, b.y2) - maximum(a.y1, b.y1));
  return w * h;
}

template <class V>
FASTZOO_HD V box_union(const Box<V>& a, const Box<V>& b, V intersection) {
  return a.area + b.area - intersection;
}

// Intersection over union. 0/0 and NaN give NaN, which exceeds no threshold.
template <class V>
FASTZOO_HD V box_iou(const Box<V>& a, const Box<V>& b) {
  const V inter = box_intersection(a, b);
  return inter / box_union(a, b, inter);
}

// How two boxes overlap: each measure is the one before it, or the first, less a penalty.
enum class Measure : int { iou, giou, diou, ciou };

// A box, and what its overlaps need of it alone.
template <class V>
struct MeasuredBox : Box<V> {
  V width, height;
  V aspect;                             // the arctangent of width / height
  V aspect_by_width, aspect_by_height;  // its derivatives
};

template <Measure kMeasure, class V>
FASTZOO_HD MeasuredBox<V> measured_box(V x1, V y1, V x2, V y2) {
  MeasuredBox<V> box{
      {x1, y1, x2, y2, box_area(x1, y1, x2, y2)}, x2 - x1, y2 - y1, V(0), V(0), V(0)};
  if (kMeasure == Measure::ciou) {
    const V square = box.width * box.width + box.height * box.height;
    box.aspect = arctangent(box.width / box.height);
    box.aspect_by_width = box.height / square;
    box.aspect_by_height = V(0) - box.width / square;
  }
  return box;
}

// What is added to denominators: to the union, and to all others.
template <class V>
struct Epsilon {
  V of_union, elsewhere;
};

// A measure, and the terms of it that its gradient needs; those of other measures are not set.
template <class V>
struct BoxOverlap {
  V value;
  V union_area;  // with eps, as all denominators are
  V iou;
  V hull_width, hull_height;  // of the box around both
  V hull;                     // its area (giou) or its diagonal's square
  V dx, dy;                   // between the centres
  V distance;                 // their distance's square, over the diagonal's
  V turn;                     // the difference of the aspects
  V alpha;                    // the weight of its square
};

// Brings the square of two boxes' difference in aspect into [0, 1].
constexpr double kAspectScale = 4 / (3.14159265358979323846 * 3.14159265358979323846);

template <Measure kMeasure, class V>
FASTZOO_HD BoxOverlap<V> box_overlap(const MeasuredBox<V>& a, const MeasuredBox<V>& b,
                                     const Epsilon<V>& eps) {
  BoxOverlap<V> o;
  const V inter = box_intersection(a, b);
  const V whole = box_union(a, b, inter);
  o.union_area = whole + eps.of_union;
  o.iou = inter / o.union_area;
  o.value = o.iou;
  if (kMeasure == Measure::iou) return o;

  o.hull_width = maximum(a.x2, b.x2) - minimum(a.x1, b.x1);
  o.hull_height = maximum(a.y2, b.y2) - minimum(a.y1, b.y1);
  if (kMeasure == Measure::giou) {
    const V hull = o.hull_width * o.hull_height;
    o.hull = hull + eps.elsewhere;
    o.value = o.iou - (hull - whole) / o.hull;
    return o;
  }

  const V half = V(0.5);
  o.hull = o.hull_width * o.hull_width + o.hull_height * o.hull_height + eps.elsewhere;
  o.dx = (a.x1 + a.x2) * half - (b.x1 + b.x2) * half;
  o.dy = (a.y1 + a.y2) * half - (b.y1 + b.y2) * half;
  o.distance = (o.dx * o.dx + o.dy * o.dy) / o.hull;
  o.value = o.iou - o.distance;
  if (kMeasure == Measure::diou) return o;

  o.turn = b.aspect - a.aspect;
  const V v = V(kAspectScale) * (o.turn * o.turn);
  o.alpha = v / (V(1) - o.iou + v + eps.elsewhere);
  o.value = o.value - o.alpha * v;
  return o;
}

// Of the ends of two boxes along an axis.
template <class V>
struct EndGradients {
  V low1, high1, low2, high2;
};

// The shared side goes from the larger low end to the smaller high end, the hull between the
// others; equal ends have half of each. `by_own` is the gradient of a box's own side.
template <class V>
FASTZOO_HD EndGradients<V> end_gradients(V low1, V high1, V low2, V high2, V by_shared, V by_hull,
                                         V by_own1, V by_own2, V by_centre) {
  const V half = (by_shared + by_hull) * V(0.5);
  const V from1 = select_greater(low1, low2, by_shared, select_greater(low2, low1, by_hull, half));
  const V from2 = select_greater(low2, low1, by_shared, select_greater(low1, low2, by_hull, half));
  const V to1 =
      select_greater(high2, high1, by_shared, select_greater(high1, high2, by_hull, half));
  const V to2 =
      select_greater(high1, high2, by_shared, select_greater(high2, high1, by_hull, half));
  return {by_centre - from1 - by_own1, by_centre + to1 + by_own1,
          V(0) - by_centre - from2 - by_own2, to2 + by_own2 - by_centre};
}

template <class V>
struct BoxGradients {
  V first[4], second[4];  // x1, y1, x2, y2
};

// The gradients of both boxes, `grad` being that of the measure.
template <Measure kMeasure, class V>
FASTZOO_HD BoxGradients<V> box_overlap_gradients(const MeasuredBox<V>& a, const MeasuredBox<V>& b,
                                                 const Epsilon<V>& eps, V grad) {
  const V zero = V(0);
  const BoxOverlap<V> o = box_overlap<kMeasure>(a, b, eps);
  const V over_union = grad / o.union_area;
  V by_union = zero - over_union * o.iou;
  V by_hull_width = zero, by_hull_height = zero;
  V by_dx = zero, by_dy = zero;  // half of it, for each end
  if (kMeasure == Measure::giou) {
    const V over_hull = grad / o.hull;
    by_union = by_union + over_hull;
    const V whole = box_union(a, b, box_intersection(a, b));
    const V shrinking = zero - over_hull * ((whole + eps.elsewhere) / o.hull);
    by_hull_width = shrinking * o.hull_height;
    by_hull_height = shrinking * o.hull_width;
  } else if (kMeasure != Measure::iou) {
    const V over_diagonal = grad / o.hull;
    const V growing = V(2) * over_diagonal * o.distance;
    by_hull_width = growing * o.hull_width;
    by_hull_height = growing * o.hull_height;
    by_dx = zero - over_diagonal * o.dx;
    by_dy = zero - over_diagonal * o.dy;
  }
  const V by_intersection = over_union - by_union;
  // A shared side of 0 has the gradient of a positive one, as clamp(min=0) does.
  const V width = minimum(a.x2, b.x2) - maximum(a.x1, b.x1);
  const V height = minimum(a.y2, b.y2) - maximum(a.y1, b.y1);
  const V by_shared_width =
      select_greater(zero, width, zero, by_intersection * maximum(zero, height));
  const V by_shared_height =
      select_greater(zero, height, zero, by_intersection * maximum(zero, width));
  V by_width1 = by_union * a.height, by_height1 = by_union * a.width;
  V by_width2 = by_union * b.height, by_height2 = by_union * b.width;
  if (kMeasure == Measure::ciou) {
    // alpha is held constant, as in the paper.
    const V by_turn = V(-2 * kAspectScale) * (grad * o.alpha * o.turn);
    by_width1 = by_width1 - by_turn * a.aspect_by_width;
    by_height1 = by_height1 - by_turn * a.aspect_by_height;
    by_width2 = by_width2 + by_turn * b.aspect_by_width;
    by_height2 = by_height2 + by_turn * b.aspect_by_height;
  }
  const EndGradients<V> x = end_gradients(a.x1, a.x2, b.x1, b.x2, by_shared_width, by_hull_width,
                                          by_width1, by_width2, by_dx);
  const EndGradients<V> y = end_gradients(a.y1, a.y2, b.y1, b.y2, by_shared_height, by_hull_height,
                                          by_height1, by_height2, by_dy);
  return {{x.low1, y.low1, x.high1, y.high1}, {x.low2, y.low2, x.high2, y.high2}};
}

}  // namespace fastzoo::math
