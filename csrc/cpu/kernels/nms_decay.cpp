// Suppression that lowers scores. Both rules look at one box and those before it, a vector at a
// time; few of them overlap it enough to matter, and only these are divided for and decayed, one
// by one and in their order, so that the result is that of the sequence to the last bit.
#include "nms_decay.h"

#include "../runtime/vec_math.h"

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

// What is known of the limit that an overlap is to exceed: that it is 0, that it is at least 0, or
// nothing.
enum class Limits { zero, positive, any };

// The boxes whose overlap could exceed `limit`. Above 0, an overlap is that of boxes that meet. And
// none exceeds its limit whose intersection is below the product of limit and union: rounding is
// monotone, and the limit a value of T.
template <Limits kLimits, class T>
FASTZOO_INLINE uint32_t could_exceed(const Wide<T>& a, const Wide<T>& b, Vec<T> limit) {
  if (kLimits == Limits::any) return Vec<T>::MaskType::kAll;
  if (kLimits == Limits::zero) {
    return less(maximum(a.x1, b.x1), minimum(a.x2, b.x2)).bits &
           less(maximum(a.y1, b.y1), minimum(a.y2, b.y2)).bits;
  }
  const Vec<T> intersection = math::box_intersection(a, b);
  const Vec<T> product = limit * math::box_union(a, b, intersection);
  return greater(intersection, Vec<T>(T(0))).bits & not_less(intersection, product).bits;
}

// Calls hit(i, iou) in rising order for the boxes [begin, end) whose overlap with `box` exceeds
// limit(first), that of the vector of boxes from `first` on; until it says false.
template <Limits kLimits, class T, class Limit, class Hit>
FASTZOO_INLINE void each_overlap(const BoxColumns<T>& boxes, int64_t begin, int64_t end,
                                 const Wide<T>& box, const Limit& limit, const Hit& hit) {
  constexpr int kSize = Vec<T>::size;
  for (int64_t first = begin / kSize * kSize; first < end; first += kSize) {
    const Wide<T> others = boxes_from(boxes, first);
    const Vec<T> least = limit(first);
    uint32_t hits = could_exceed<kLimits>(others, box, least);
    if (hits == 0) continue;
    const Vec<T> iou = math::box_iou(others, box);
    hits &= greater(iou, least).bits;
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

// Calls lower(i, decay) in rising order for the boxes [0, n) whose scores an overlap with `box`
// lowers, until it says false. Exponentials are computed for many at a time, and wait for that.
template <Limits kLimits, class T, class Lower>
FASTZOO_INLINE void each_decay(const SoftNmsArgs<T>& args, T limit, const BoxColumns<T>& boxes,
                               int64_t n, const Wide<T>& box, const Lower& lower) {
  const auto limit_of = [&](int64_t) { return Vec<T>(limit); };
  if (args.method != math::Decay::gaussian) {
    each_overlap<kLimits>(boxes, 0, n, box, limit_of, [&](int64_t i, T iou) {
      return lower(i, math::soft_decay(iou, args.method, args.iou_threshold, args.sigma));
    });
    return;
  }
  constexpr int kSize = Vec<double>::size;
  constexpr int kRoom = 32;
  int64_t places[kRoom];
  double overlaps[kRoom] = {};
  int count = 0;
  const auto lower_all = [&] {
    for (int first = 0; first < count; first += kSize) {
      const Vec<double> iou = Vec<double>::load(overlaps + first);
      math::gaussian_decay(iou, Vec<double>(args.sigma)).store(overlaps + first);
    }
    bool more = true;
    for (int i = 0; more && i < count; ++i) more = lower(places[i], static_cast<T>(overlaps[i]));
    count = 0;
    return more;
  };
  each_overlap<kLimits>(boxes, 0, n, box, limit_of, [&](int64_t i, T iou) {
    places[count] = i;
    overlaps[count] = iou;
    return ++count < kRoom || lower_all();
  });
  if (count > 0) lower_all();
}

template <class T>
FASTZOO_INLINE void copy_box(const BoxColumns<T>& from, int64_t i, const BoxColumns<T>& to,
                             int64_t j) {
  to.x1[j] = from.x1[i];
  to.y1[j] = from.y1[i];
  to.x2[j] = from.x2[i];
  to.y2[j] = from.y2[i];
}

// The boxes that were looked at and not taken yet, with their scores as they now are. A score of
// 0 says that the box will not be taken.
template <class T>
class Waiting {
 public:
  explicit Waiting(const SoftNmsArgs<T>& args) : args_(args) {}

  struct Best {
    int64_t slot;
    T score;
  };

  // Score 0 where there is none.
  __attribute__((always_inline)) Best best() const {
    constexpr int kSize = Vec<T>::size;
    Vec<T> highest(T(0));
    for (int64_t first = 0; first < count_; first += kSize) {
      highest = maximum(highest, Vec<T>::load(args_.waiting_scores + first));
    }
    Best best = {0, lane_maximum(highest)};
    if (best.score == 0) return best;
    best.slot = -1;
    for (int64_t first = 0; first < count_; first += kSize) {
      const Vec<T> scores = Vec<T>::load(args_.waiting_scores + first);
      uint32_t equal = not_less(scores, Vec<T>(best.score)).bits;
      for (; equal != 0; equal &= equal - 1) {
        const int64_t slot = first + __builtin_ctz(equal);
        if (best.slot < 0 || index(slot) < index(best.slot)) best.slot = slot;
      }
    }
    return best;
  }

  __attribute__((always_inline)) bool is_better(const Best& a, const Best& b) const {
    return a.score > b.score || (a.score == b.score && index(a.slot) < index(b.slot));
  }

  __attribute__((always_inline)) Best add(int64_t position, T score) {
    copy_box(args_.boxes, position, args_.waiting, count_);
    args_.waiting_scores[count_] = score;
    args_.waiting_positions[count_] = static_cast<int32_t>(position);
    return {count_++, score};
  }

  __attribute__((always_inline)) int64_t position(int64_t slot) const {
    return args_.waiting_positions[slot];
  }

  // The last one takes its slot.
  __attribute__((always_inline)) void remove(int64_t slot) {
    move(--count_, slot);
    args_.waiting_scores[count_] = 0;
  }

  template <Limits kLimits>
  __attribute__((always_inline)) void lower(const Wide<T>& taken, T limit) {
    each_decay<kLimits>(args_, limit, args_.waiting, count_, taken, [&](int64_t slot, T decay) {
      T& score = args_.waiting_scores[slot];
      if (score == 0) return true;
      score = score * decay;
      if (!(score > args_.score_threshold)) {
        score = 0;
        ++lost_;
      }
      return true;
    });
    if (8 * lost_ > count_) drop_lost();
  }

 private:
  int32_t index(int64_t slot) const { return args_.indices[args_.waiting_positions[slot]]; }

  __attribute__((always_inline)) void move(int64_t from, int64_t to) {
    copy_box(args_.waiting, from, args_.waiting, to);
    args_.waiting_scores[to] = args_.waiting_scores[from];
    args_.waiting_positions[to] = args_.waiting_positions[from];
  }

  __attribute__((always_inline)) void drop_lost() {
    for (int64_t slot = 0; slot < count_;) {
      if (args_.waiting_scores[slot] == 0) {
        remove(slot);
      } else {
        ++slot;
      }
    }
    lost_ = 0;
  }

  const SoftNmsArgs<T>& args_;
  int64_t count_ = 0;
  int64_t lost_ = 0;
};

// A score as it was given is an upper bound, as no decay exceeds 1. So a box is looked at once its
// score is not below the best of those that wait; it then is lowered by all that were taken
// before, and waits, lowered by each one taken after.
template <Limits kLimits, class T>
FASTZOO_INLINE void soft_nms(const SoftNmsArgs<T>& args, T limit) {
  Waiting<T> waiting(args);
  int64_t next = 0;
  for (int64_t taken = 0; taken < args.most; ++taken) {
    auto best = waiting.best();
    for (; next < args.n && args.scores[next] >= best.score; ++next) {
      T score = args.scores[next];
      args.scores[next] = static_cast<T>(__builtin_nan(""));
      each_decay<kLimits>(args, limit, args.taken, taken, box_at(args.boxes, next),
                          [&](int64_t, T decay) {
                            score = score * decay;
                            return score > args.score_threshold;
                          });
      if (!(score > args.score_threshold)) continue;
      const auto added = waiting.add(next, score);
      if (best.score == 0 || waiting.is_better(added, best)) best = added;
    }
    if (best.score == 0) break;
    const int64_t position = waiting.position(best.slot);
    args.scores[position] = best.score;
    copy_box(args.boxes, position, args.taken, taken);
    waiting.remove(best.slot);
    waiting.template lower<kLimits>(box_at(args.boxes, position), limit);
  }
  // Where `most` ended it, the rest was never looked at.
  for (; next < args.n; ++next) args.scores[next] = static_cast<T>(__builtin_nan(""));
}

template <class T>
FASTZOO_INLINE void soft_nms(const SoftNmsArgs<T>& args) {
  // What overlaps no more than this is not lowered.
  switch (args.method) {
    case math::Decay::gaussian:
      return soft_nms<Limits::zero>(args, T(0));
    case math::Decay::linear:
      return soft_nms<Limits::positive>(args, math::maximum(args.iou_threshold, T(0)));
    case math::Decay::hard:
      if (args.iou_threshold < 0) return soft_nms<Limits::any>(args, args.iou_threshold);
      return soft_nms<Limits::positive>(args, args.iou_threshold);
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
      each_overlap<Limits::positive>(
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
