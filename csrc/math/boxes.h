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

}  // namespace fastzoo::math
