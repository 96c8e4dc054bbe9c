// How a dense detector's output becomes a box. In double, with exact functions: what is kept hangs
// on the last bit. The twin of decode_boxes in fastzoo/reference/detections.py.
#pragma once

#include <cstdint>

#include "exact.h"
#include "host_device.h"

namespace fastzoo::math {

enum class Decode { none, deltas, distances, yolov3, yolov5, yolox };

struct Decoder {
  Decode form;
  double weight_x, weight_y, weight_w, weight_h, clip;  // of deltas
};

// The form of a name, as the operator's schema has it; false where there is none. Host only.
static inline bool decode_named(const char* name, Decode& form) {
  return value_named(name, {"", "deltas", "distances", "yolov3", "yolov5", "yolox"}, form);
}

// Numbers of a prior.
FASTZOO_HD int64_t prior_size(Decode form) {
  switch (form) {
    case Decode::none:
      return 0;
    case Decode::deltas:
      return 4;
    case Decode::distances:
      return 3;
    default:
      return 5;
  }
}

struct Corners {
  double x1, y1, x2, y2;
};

FASTZOO_HD Corners corners_of(double x, double y, double width, double height) {
  return {x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height};
}

// `t` is the head's output, 4 numbers; `prior` those that the form needs.
template <class T, class P>
FASTZOO_HD Corners decode_box(const T* t, const P* prior, const Decoder& decoder) {
  const double t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3];
  switch (decoder.form) {
    case Decode::none:
      return {t0, t1, t2, t3};
    case Decode::distances: {
      const double x = prior[0], y = prior[1], stride = prior[2];
      return {x - t0 * stride, y - t1 * stride, x + t2 * stride, y + t3 * stride};
    }
    case Decode::deltas: {
      const double x1 = prior[0], y1 = prior[1];
      const double width = prior[2] - x1;
      const double height = prior[3] - y1;
      const double x = x1 + 0.5 * width + t0 / decoder.weight_x * width;
      const double y = y1 + 0.5 * height + t1 / decoder.weight_y * height;
      const double log_width = minimum(t2 / decoder.weight_w, decoder.clip);
      const double log_height = minimum(t3 / decoder.weight_h, decoder.clip);
      return corners_of(x, y, width * exact_exponential(log_width),
                        height * exact_exponential(log_height));
    }
    default:
      break;
  }
  const double column = prior[0], row = prior[1], stride = prior[2];
  const double width = prior[3], height = prior[4];
  if (decoder.form == Decode::yolov5) {
    const double twice_width = 2 * exact_sigmoid(t2);
    const double twice_height = 2 * exact_sigmoid(t3);
    return corners_of((2 * exact_sigmoid(t0) - 0.5 + column) * stride,
                      (2 * exact_sigmoid(t1) - 0.5 + row) * stride,
                      width * (twice_width * twice_width), height * (twice_height * twice_height));
  }
  const bool logistic = decoder.form == Decode::yolov3;
  const double x = logistic ? exact_sigmoid(t0) : t0;
  const double y = logistic ? exact_sigmoid(t1) : t1;
  return corners_of((x + column) * stride, (y + row) * stride, width * exact_exponential(t2),
                    height * exact_exponential(t3));
}

}  // namespace fastzoo::math
