// What a dense detector does after its head, on the CPU: what the entries hand to the kernels.
#pragma once

#include <cstdint>

#include "../../math/detections.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// Candidates that one part of an image yields. The kernel allocates them, the entry frees them.
struct RankList {
  void* ranks;
  int64_t count;
};

// An image's elements as `rows` runs of `length` neighbours in memory. The elements are numbered,
// and the number of element i of row r is r * row_step + i * step.
struct Runs {
  int64_t rows, length;
  int64_t row_stride;
  int64_t row_step, step;
};

struct MulticlassArgs {
  Dtype dtype;
  int64_t images, locations, classes;
  const void* scores;
  int64_t score_strides[3];  // image, location, class
  Runs runs;                 // of an image's scores, numbered location * classes + class
  const void* boxes;
  int64_t box_strides[4];  // image, location, class, coordinate
  const void* priors;      // [locations][prior_size] of the compute type: float, double for float64
  math::Decoder decoder;
  double score_threshold, iou_threshold;
  int64_t pre_top_k, max_per_class, max_detections;  // always at least 0
  bool class_agnostic;
  int64_t parts;     // of an image, scanned one by one; with 1 multiclass_nms scans by itself
  RankList* lists;   // [images][parts]
  int64_t* num;      // [images]
  void* out_boxes;   // [images][max_detections][4] of the compute type
  void* out_scores;  // [images][max_detections] of the compute type
  int64_t* labels;   // [images][max_detections]
  int64_t* indices;  // [images][max_detections]
  bool out_of_memory;
};

struct PeakArgs {
  Dtype dtype;
  int64_t images, classes, height, width;
  const void* heatmap;
  int64_t reach, top_k;
  int64_t parts;    // of an image
  RankList* lists;  // [images][parts]
  void* scores;     // [images][top_k] of the elements' type
  int64_t* labels;  // and so these
  int64_t* ys;
  int64_t* xs;
  bool out_of_memory;
};

// Fill lists [begin, end).
FASTZOO_DECLARE_KERNEL(multiclass_scan, (MulticlassArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(peak_scan, (PeakArgs&, int64_t begin, int64_t end))
// Images [begin, end).
FASTZOO_DECLARE_KERNEL(multiclass_nms, (MulticlassArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(peak_nms, (PeakArgs&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
