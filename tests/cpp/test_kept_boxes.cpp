// KeptBoxes against the greedy loop over all pairs, and the bounds its grid and its filter rest on
// against pairs that are pushed to their limits.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_kept_boxes, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_kept_boxes)

#else

#include <cmath>
#include <cstdlib>

#include "../../csrc/cpu/runtime/kept_boxes.h"
#include "../../csrc/cpu/runtime/rotated_overlap.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::RotatedBox;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  double uniform(double low, double high) {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t bits = (state_ ^ state_ >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    return low + (high - low) * static_cast<double>((bits ^ bits >> 31) >> 11) * 0x1p-53;
  }
  double power(double low, double high) { return std::exp2(uniform(low, high)); }
  int64_t below(int64_t n) { return static_cast<int64_t>(uniform(0, static_cast<double>(n))); }

 private:
  uint64_t state_;
};

constexpr int kFamilies = 8;

// Numbers of a rotated box, of family 1 in degrees.
void draw(Random& random, int family, double extent, double* p) {
  p[0] = random.uniform(0, extent);
  p[1] = random.uniform(0, extent);
  p[2] = random.uniform(4, 40);
  p[3] = random.uniform(4, 40);
  p[4] = random.uniform(-400, 400);
  if (family == 1) {  // overlaps tie with the thresholds
    for (int k = 0; k < 4; ++k) p[k] = std::floor(p[k] / 8) + (k >= 2);
    p[4] = 45 * std::floor(p[4] / 45);
  } else if (family == 2) {
    p[2] *= 20;
    p[3] = random.power(-4, 2);
    p[4] = random.below(2) * random.uniform(-0.1, 0.1);
  } else if (family == 3) {
    const double scale = random.power(-12, 12);
    for (int k = 0; k < 4; ++k) p[k] *= scale;
  } else if (family == 4) {
    p[0] += 1e6;
    p[4] *= random.power(0, 90);  // soon no longer an accurate sine
  } else if (family == 5) {
    const double special[] = {NAN, INFINITY, -INFINITY, 0, -1, 1e-200, 1e200, 1e-310};
    if (random.below(6) == 0) p[random.below(5)] = special[random.below(8)];
  } else if (family == 6) {  // so thin that the computed area they share is noise
    p[2] *= 20;
    p[3] = random.power(-45, -25);
    p[4] = 0.3 + random.below(2) * random.power(-50, -30);
  } else if (family == 7) {  // at the farthest that the grid holds, and beyond
    for (int k = 0; k < 2; ++k) p[k] = 1e6 + p[k] * 1e-4;
    for (int k = 2; k < 4; ++k) p[k] = random.uniform(0.002, 0.006);
  }
}

template <class T>
math::Box<T> box_from(const double* p, bool, math::Box<T>*) {
  const T corners[4] = {static_cast<T>(p[0] - p[2] / 2), static_cast<T>(p[1] - p[3] / 2),
                        static_cast<T>(p[0] + p[2] / 2), static_cast<T>(p[1] + p[3] / 2)};
  return load_box(corners);
}
PlacedBox box_from(const double* p, bool degrees, PlacedBox*) {
  return load_rotated_box(p, degrees);
}

template <class T>
bool exceeds(const math::Box<T>& a, const math::Box<T>& b, double threshold) {
  return static_cast<double>(math::box_iou(a, b)) > threshold;
}
bool exceeds(const PlacedBox& a, const PlacedBox& b, double threshold) {
  return math::rotated_iou(a.rotated, b.rotated) > threshold;
}

template <class T>
T threshold_as(double threshold, const math::Box<T>*) {
  return math::round_down<T>(threshold);
}
double threshold_as(double threshold, const PlacedBox*) { return threshold; }

template <class T>
void check_decisions(int& failures, int family, int64_t n, double threshold, double extent,
                     uint64_t seed) {
  using Box = typename Overlap<T>::Box;
  Box* const kept = static_cast<Box*>(std::malloc(n * sizeof(Box)));
  int64_t count = 0;
  const Overlap<T> overlap(threshold_as(threshold, kept));
  KeptBoxes<T> any(n, overlap);
  KeptBoxes<T, true> first(n, overlap);
  Random random(seed);
  bool same = true;
  for (int64_t i = 0; i < n; ++i) {
    double p[5];
    draw(random, family, extent, p);
    const Box box = box_from(p, family == 1, kept);
    // The caller keeps such boxes without asking.
    if (threshold >= 0 && is_inert(box)) {
      for (int64_t k = 0; k < count; ++k) same &= !exceeds(kept[k], box, threshold);
      continue;
    }
    int32_t expected = KeptBoxes<T>::kNone;
    for (int64_t k = count - 1; k >= 0; --k) {
      if (exceeds(kept[k], box, threshold)) expected = static_cast<int32_t>(k);
    }
    same &= first.add_or_find(box, static_cast<int32_t>(count)) == expected;
    same &= any.add(box) == (expected == KeptBoxes<T>::kNone);
    if (expected == KeptBoxes<T>::kNone) kept[count++] = box;
  }
  CHECK(same);
  if (!same) std::printf("family %d, %d boxes, threshold %g\n", family, int(n), threshold);
  CHECK(!any.out_of_memory() && !first.out_of_memory());
  std::free(kept);
}

// Pairs of rotated boxes, changed at random as long as they overlap by more than the threshold and
// a quantity that is bounded grows.
void check_bounds(int& failures, double threshold) {
  const Overlap<RotatedBox> overlap(threshold);
  const Bounds bounds = overlap.bounds();
  Random random(static_cast<uint64_t>(threshold * 1000));
  double farthest[2] = {0, 0};
  for (int start = 0; start < 60; ++start) {
    const int wanted = start % 2;
    const double shape = random.power(-6, 0);
    double a[5] = {0, 0, 8, 8 * shape, random.uniform(-90, 90)};
    double b[5] = {0, 0, a[2], a[3], a[4]};
    double best = 0;
    for (int step = 0; step < 1500; ++step) {
      double tried_a[5], tried_b[5];
      const double size = random.power(-20, 0);
      for (int k = 0; k < 5; ++k) {
        const double scale = k == 4 ? 90 : k < 2 ? 8 : a[k];
        const double scale_b = k == 4 ? 90 : k < 2 ? 8 : b[k];
        tried_a[k] = a[k] + (k >= 2) * random.uniform(-size, size) * scale;
        tried_b[k] = b[k] + random.uniform(-size, size) * scale_b;
      }
      const PlacedBox first = load_rotated_box(tried_a, true);
      const PlacedBox second = load_rotated_box(tried_b, true);
      if (is_inert(first) || is_inert(second) || !exceeds(first, second, threshold)) continue;
      Overlap<RotatedBox>::Block block;
      Overlap<RotatedBox>::clear(block);
      Overlap<RotatedBox>::put(block, 0, first);
      CHECK(overlap.suppressing(block, Overlap<RotatedBox>::probe(second)) == 1);
      const Place placed_a = Overlap<RotatedBox>::place_of(first);
      const Place placed_b = Overlap<RotatedBox>::place_of(second);
      if (!placed_a.in_grid || !placed_b.in_grid) continue;
      const double share = std::fabs(placed_a.x - placed_b.x) / (bounds.reach * placed_b.width);
      const double ratio = placed_a.side / placed_b.side / bounds.ratio;
      CHECK(share < 1 + 1e-5 && ratio < 1);
      const double value = wanted == 0 ? share : ratio;
      if (value < best) continue;
      best = value;
      for (int k = 0; k < 5; ++k) {
        a[k] = tried_a[k];
        b[k] = tried_b[k];
      }
    }
    farthest[wanted] = math::maximum(farthest[wanted], best);
  }
  // The search comes near enough to see a bound that is too tight. Above 1/2 the reach is generous.
  CHECK((farthest[0] > 0.7 || threshold > 0.5) && farthest[1] > 0.45);
}

template <class T>
void check_type(int& failures) {
  uint64_t seed = 0;
  for (int family = 0; family < kFamilies; ++family) {
    for (const double threshold : {0.5, 0.3, 1.0 / 3, 0.0625, 0.05, 0.0, 0.8, 0.97, -0.1}) {
      check_decisions<T>(failures, family, 1500, threshold, family == 2 ? 2000 : 300, ++seed);
      check_decisions<T>(failures, family, 150, threshold, 60, ++seed);
    }
  }
}

}  // namespace

void check_kept_boxes(int& failures) {
  check_type<float>(failures);
  check_type<double>(failures);
  check_type<RotatedBox>(failures);
  for (const double threshold : {0.07, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9}) {
    check_bounds(failures, threshold);
  }
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
