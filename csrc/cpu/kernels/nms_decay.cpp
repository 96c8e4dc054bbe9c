// Suppression that lowers scores. Both rules look at one box and those before it, a vector at a
// time; few of them overlap it enough to matter, and only these are divided for and decayed, one
// by one and in their order, so that the result is that of the sequence to the last bit.
#include "nms_decay.h"

#include "../runtime/vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

template <class T>
using Wide = math::Box<Vec<T>>;

template <class T>
FASTZOO_INLINE Wide<T> box_at(const BoxColumns<T>& boxes, int64_t i) {
  const Vec<T> x1(boxes.x1[i]), y1(boxes.y1[i]), x2(boxes.x2[i]), y2(boxes.y2[i]);
  return {x1, y1, x2, y2, math::box_area(x1, y1, x2, y2)};
}

template <class T>
FASTZOO_INLINE Wide<T> boxes_from(const BoxColumns<T>& boxes, int64_t first) {
  const Vec<T> x1 = Vec<T>::load(boxes.x1 + first), y1 = Vec<T>::load(boxes.y1 + first),
               x2 = Vec<T>::load(boxes.x2 + first), y2 = Vec<T>::load(boxes.y2 + first);
  return {x1, y1, x2, y2, math::box_area(x1, y1, x2, y2)};
}

// Calls hit(i, iou) in rising order for the boxes [begin, end) whose overlap with `box` exceeds
// limit(first), that of the vector of boxes from `first` on; an end to all where it says false.
// kTouching: no limit is below 0, so that boxes which do not intersect are passed over. Of the
// others, none exceeds its limit whose intersection is below the product of limit and union:
// rounding is monotone, and the limit a value of T.
template <bool kTouching, class T, class Limit, class Hit>
FASTZOO_INLINE void each_overlap(const BoxColumns<T>& boxes, int64_t begin, int64_t end,
                                 const Wide<T>& box, const Limit& limit, const Hit& hit) {
  constexpr int kSize = Vec<T>::size;
  for (int64_t first = begin / kSize * kSize; first < end; first += kSize) {
    const Wide<T> others = boxes_from(boxes, first);
    const Vec<T> intersection = math::box_intersection(others, box);
    if (kTouching && !greater(intersection, Vec<T>(T(0))).any()) continue;
    const Vec<T> least = limit(first);
    const Vec<T> whole = math::box_union(others, box, intersection);
    if (kTouching &&
        !(not_less(intersection, least * whole).bits & greater(intersection, Vec<T>(T(0))).bits)) {
      continue;
    }
    const Vec<T> iou = math::box_iou(others, box);
    uint32_t hits = greater(iou, least).bits;
    if (first < begin) hits &= ~0u << (begin - first);
    if (first + kSize > end) hits &= (1u << (end - first)) - 1;
    if (hits == 0) continue;
    T ious[kSize];
    iou.store(ious);
    for (; hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      if (!hit(first + lane, ious[lane])) return;
    }
  }
}

template <class T>
FASTZOO_INLINE bool is_better(const Waiting<T>& a, const Waiting<T>& b) {
  return a.score > b.score || (a.score == b.score && a.position < b.position);
}

// Restores the heap, the best in front, where only the entry at `i` may stand too far in front.
template <class T>
FASTZOO_INLINE void sift_down(Waiting<T>* heap, int64_t n, int64_t i) {
  const Waiting<T> moved = heap[i];
  for (int64_t child = 2 * i + 1; child < n; child = 2 * i + 1) {
    child += child + 1 < n && is_better(heap[child + 1], heap[child]);
    if (!is_better(heap[child], moved)) break;
    heap[i] = heap[child];
    i = child;
  }
  heap[i] = moved;
}

template <bool kTouching, class T>
FASTZOO_INLINE void soft_nms(const SoftNmsArgs<T>& args, T limit) {
  Waiting<T>* const waiting = args.waiting;
  int64_t left = args.n;
  for (int64_t i = 0; i < left; ++i) {
    waiting[i] = {args.scores[i], static_cast<int32_t>(i), 0};
    args.scores[i] = static_cast<T>(__builtin_nan(""));
  }
  for (int64_t i = left / 2; i-- > 0;) sift_down(waiting, left, i);

  for (int64_t taken = 0; left > 0 && taken < args.most;) {
    Waiting<T>& best = waiting[0];
    const int64_t position = best.position;
    const T bound = best.score;
    T score = bound;
    each_overlap<kTouching>(
        args.taken, best.seen, taken, box_at(args.boxes, position),
        [&](int64_t) { return Vec<T>(limit); },
        [&](int64_t, T iou) {
          score = score * math::soft_decay(iou, args.method, args.iou_threshold, args.sigma);
          return score > args.score_threshold;
        });
    if (score == bound) {
      args.scores[position] = score;
      args.taken.x1[taken] = args.boxes.x1[position];
      args.taken.y1[taken] = args.boxes.y1[position];
      args.taken.x2[taken] = args.boxes.x2[position];
      args.taken.y2[taken] = args.boxes.y2[position];
      ++taken;
    }
    if (score < bound && score > args.score_threshold) {
      best.score = score;
      best.seen = static_cast<int32_t>(taken);
    } else {
      best = waiting[--left];
    }
    sift_down(waiting, left, 0);
  }
}

template <class T>
FASTZOO_INLINE void soft_nms(const SoftNmsArgs<T>& args) {
  // What overlaps no more than this is not lowered.
  switch (args.method) {
    case math::Decay::gaussian:
      return soft_nms<true>(args, T(0));
    case math::Decay::linear:
      return soft_nms<true>(args, math::maximum(args.iou_threshold, T(0)));
    case math::Decay::hard:
      if (args.iou_threshold < 0) return soft_nms<false>(args, args.iou_threshold);
      return soft_nms<true>(args, args.iou_threshold);
  }
}

// Calls hit(row, i, iou) as each_overlap does for every row of [begin, end) and the boxes before
// it in its segment. A tile of boxes stays in the cache for a group of rows.
template <class T, class Limit, class Hit>
FASTZOO_INLINE void each_overlap_before(const MatrixNmsArgs<T>& args, int64_t begin, int64_t end,
                                        const Limit& limit, const Hit& hit) {
  constexpr int64_t kTile = 1024;
  for (int64_t tile = args.segments[begin]; tile < end; tile += kTile) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = tile < args.segments[row] ? args.segments[row] : tile;
      const int64_t to = tile + kTile < row ? tile + kTile : row;
      if (from >= to) continue;
      each_overlap<true>(
          args.boxes, from, to, box_at(args.boxes, row),
          [&](int64_t first) { return limit(row, first); },
          [&](int64_t i, T iou) {
            hit(row, i, iou);
            return true;
          });
    }
  }
}

template <class T>
FASTZOO_INLINE void cover(const MatrixNmsArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) args.covered[row] = 0;
  each_overlap_before(
      args, begin, end, [&](int64_t row, int64_t) { return Vec<T>(args.covered[row]); },
      [&](int64_t row, int64_t, T iou) {
        args.covered[row] = math::maximum(args.covered[row], iou);
      });
}

// An earlier box lowers a score only where it overlaps more than it is covered itself.
template <class T>
FASTZOO_INLINE void decay(const MatrixNmsArgs<T>& args, int64_t begin, int64_t end) {
  const bool gaussian = args.method == math::Decay::gaussian;
  for (int64_t row = begin; row < end; ++row) args.decays[row] = gaussian ? 0 : 1;
  each_overlap_before(
      args, begin, end, [&](int64_t, int64_t first) { return Vec<T>::load(args.covered + first); },
      [&](int64_t row, int64_t i, T iou) {
        const double lowered = math::matrix_decay(iou, args.covered[i], args.method, args.sigma);
        args.decays[row] = math::minimum(args.decays[row], lowered);
      });
  if (!gaussian) return;
  for (int64_t row = begin; row < end; ++row) {
    args.decays[row] = math::exact_exponential(args.decays[row]);
  }
}

}  // namespace

void soft_nms_float(const SoftNmsArgs<float>& args) { soft_nms(args); }
void soft_nms_double(const SoftNmsArgs<double>& args) { soft_nms(args); }
void matrix_nms_cover_float(const MatrixNmsArgs<float>& args, int64_t begin, int64_t end) {
  cover(args, begin, end);
}
void matrix_nms_cover_double(const MatrixNmsArgs<double>& args, int64_t begin, int64_t end) {
  cover(args, begin, end);
}
void matrix_nms_decay_float(const MatrixNmsArgs<float>& args, int64_t begin, int64_t end) {
  decay(args, begin, end);
}
void matrix_nms_decay_double(const MatrixNmsArgs<double>& args, int64_t begin, int64_t end) {
  decay(args, begin, end);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
