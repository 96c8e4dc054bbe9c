// The overlap of rotated boxes, in double. Decides keeps: built without contraction, and the same
// operations in the same order as fastzoo/reference/boxes.py has them.
#pragma once

#include "exact.h"
#include "host_device.h"

namespace fastzoo::math {

FASTZOO_HD double square_root_of(double x) {
#if defined(__CUDA_ARCH__)
  return ::sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

// The angle turns x towards y.
struct RotatedBox {
  double x, y, width, height, angle;
  double sine, cosine;
  double radius;  // of the circle around it
  double area;    // NaN where a number of the box is not finite
};

FASTZOO_HD RotatedBox rotated_box(double x, double y, double width, double height, double angle,
                                  bool degrees) {
  const SineCosine turn = exact_sine_cosine(angle, degrees);
  return {x,
          y,
          width,
          height,
          angle,
          turn.sine,
          turn.cosine,
          square_root_of(width * width + height * height) * 0.5,
          width * height + 0 * (x + y + angle)};
}

// A strict order, by which a pair of boxes is put before it is computed with: so that the overlap
// of a with b is that of b with a to the last bit.
FASTZOO_HD bool precedes(const RotatedBox& a, const RotatedBox& b) {
  if (a.width != b.width) return a.width < b.width;
  if (a.height != b.height) return a.height < b.height;
  if (a.angle != b.angle) return a.angle < b.angle;
  if (a.x != b.x) return a.x < b.x;
  return a.y < b.y;
}

// By value: a reference to one of two boxes would put both into a GPU's local memory.
FASTZOO_HD RotatedBox chosen(bool condition, const RotatedBox& a, const RotatedBox& b) {
  return {select(condition, a.x, b.x),           select(condition, a.y, b.y),
          select(condition, a.width, b.width),   select(condition, a.height, b.height),
          select(condition, a.angle, b.angle),   select(condition, a.sine, b.sine),
          select(condition, a.cosine, b.cosine), select(condition, a.radius, b.radius),
          select(condition, a.area, b.area)};
}

FASTZOO_HD double clamp_within(double x, double limit) {
  return maximum(-limit, minimum(x, limit));
}

// The integral over x of y held within +-half_height, along the edge from p to q and within
// +-half_width. Summed over the edges of a polygon it is the area that the polygon shares with the
// box of these halves.
FASTZOO_HD double area_under_edge(double px, double py, double qx, double qy, double half_width,
                                  double half_height) {
  const double x0 = clamp_within(px, half_width);
  const double x1 = clamp_within(qx, half_width);
  if (x0 == x1) return 0;
  const double slope = (qy - py) / (qx - px);
  const double y0 = py + slope * (x0 - px);
  const double y1 = py + slope * (x1 - px);
  const double low = minimum(y0, y1);
  const double high = maximum(y0, y1);
  const double from = clamp_within(low, half_height);
  const double to = clamp_within(high, half_height);
  double mean = (from + to) * 0.5;
  // Where the edge leaves the band, the parts outside count with the band's edge.
  if (from != to) mean = mean + (to - from) * 0.5 * (((high - to) - (from - low)) / (high - low));
  return (x1 - x0) * mean;
}

FASTZOO_HD double rotated_intersection(const RotatedBox& first, const RotatedBox& second) {
  if (!(first.width > 0 && first.height > 0 && second.width > 0 && second.height > 0)) return 0;
  const double apart_x = first.x - second.x;
  const double apart_y = first.y - second.y;
  const double reach = first.radius + second.radius;
  if (apart_x * apart_x + apart_y * apart_y > reach * reach) return 0;
  const bool swapped = precedes(second, first);
  const RotatedBox a = chosen(swapped, second, first);
  const RotatedBox b = chosen(swapped, first, second);
  const double dx = a.x - b.x;
  const double dy = a.y - b.y;
  // The corners of a in the frame in which b lies along the axes. Equal angles turn by nothing,
  // exactly.
  const bool equal = a.angle == b.angle;
  const double sine = equal ? 0 : a.sine * b.cosine - a.cosine * b.sine;
  const double cosine = equal ? 1 : a.cosine * b.cosine + a.sine * b.sine;
  const double x = dx * b.cosine + dy * b.sine;
  const double y = dy * b.cosine - dx * b.sine;
  const double ux = a.width * 0.5 * cosine;
  const double uy = a.width * 0.5 * sine;
  const double vx = -(a.height * 0.5 * sine);
  const double vy = a.height * 0.5 * cosine;
  const double x1 = x - ux - vx, y1 = y - uy - vy;
  const double x2 = x + ux - vx, y2 = y + uy - vy;
  const double x3 = x + ux + vx, y3 = y + uy + vy;
  const double x4 = x - ux + vx, y4 = y - uy + vy;
  const double w = b.width * 0.5;
  const double h = b.height * 0.5;
  const double area =
      -(area_under_edge(x1, y1, x2, y2, w, h) + area_under_edge(x2, y2, x3, y3, w, h) +
        area_under_edge(x3, y3, x4, y4, w, h) + area_under_edge(x4, y4, x1, y1, w, h));
  return maximum(0.0, minimum(area, minimum(a.area, b.area)));
}

// Intersection over union, within [0, 1]. 0/0 and numbers that are not finite give NaN, which
// exceeds no threshold.
FASTZOO_HD double rotated_iou(const RotatedBox& a, const RotatedBox& b) {
  const double inter = rotated_intersection(a, b);
  return inter / (a.area + b.area - inter);
}

}  // namespace fastzoo::math
