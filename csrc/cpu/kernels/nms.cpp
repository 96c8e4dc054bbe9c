// Greedy suppression: boxes come by falling score, and join the kept ones unless one of these
// suppresses them.
#include "nms.h"

#include "../runtime/kept_boxes.h"
#include "../runtime/rotated_overlap.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

template <class T>
struct Boxes {
  static constexpr int kNumbers = 4;
  const T* data;
  explicit Boxes(const SuppressArgs& args) : data(static_cast<const T*>(args.boxes)) {}
  __attribute__((always_inline)) const T* address(int64_t index) const { return data + index * 4; }
  __attribute__((always_inline)) math::Box<T> operator[](int64_t index) const {
    return load_box(address(index));
  }
  T threshold_of(const SuppressArgs& args) const { return math::round_down<T>(args.threshold); }
};

template <>
struct Boxes<math::RotatedBox> {
  const double* data;
  bool degrees;
  explicit Boxes(const SuppressArgs& args)
      : data(static_cast<const double*>(args.boxes)), degrees(args.degrees) {}
  __attribute__((always_inline)) const double* address(int64_t index) const {
    return data + index * 5;
  }
  __attribute__((always_inline)) PlacedBox operator[](int64_t index) const {
    return load_rotated_box(address(index), degrees);
  }
  double threshold_of(const SuppressArgs& args) const { return args.threshold; }
};

template <class T, bool kMatch>
FASTZOO_INLINE void suppress(SuppressArgs& args) {
  const Boxes<T> boxes(args);
  const auto threshold = boxes.threshold_of(args);
  // No overlap exceeds 1, as no union comes out smaller than the intersection.
  if (!(threshold < 1) || args.n <= 1) {
    for (int64_t i = 0; kMatch && i < args.n; ++i) args.by[args.order[i]] = args.order[i];
    args.kept = args.n;
    return;
  }
  using Kept = KeptBoxes<T, kMatch>;
  Kept others(args.n, Overlap<T>(threshold));
  const bool inert_boxes_matter = threshold < 0;
  int32_t kept = 0;
  for (int64_t i = 0; i < args.n; ++i) {
    // The order by score is no order in memory.
    constexpr int64_t kAhead = 8;
    if (i + kAhead < args.n) __builtin_prefetch(boxes.address(args.order[i + kAhead]));
    const int32_t index = args.order[i];
    const auto box = boxes[index];
    int32_t first = Kept::kNone;
    if (inert_boxes_matter || !is_inert(box)) first = others.add_or_find(box, kept);
    if (first == Kept::kNone) args.order[first = kept++] = index;
    if (kMatch) args.by[index] = args.order[first];
  }
  args.kept = kept;
  args.out_of_memory |= others.out_of_memory();
}

template <class T>
FASTZOO_INLINE void suppress(SuppressArgs& args) {
  if (args.by != nullptr) {
    suppress<T, true>(args);
  } else {
    suppress<T, false>(args);
  }
}

}  // namespace

void suppress_float(SuppressArgs& args) { suppress<float>(args); }
void suppress_double(SuppressArgs& args) { suppress<double>(args); }
void suppress_rotated(SuppressArgs& args) { suppress<math::RotatedBox>(args); }

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
