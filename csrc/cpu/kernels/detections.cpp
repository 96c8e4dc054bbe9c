// What a dense detector does after its head. Both operators read their scores once, looking only at
// those that can still be among the best, and order what they find no further than they need.
#include "detections.h"

#include <new>

#include "../runtime/convert.h"
#include "../runtime/kept_boxes.h"
#include "../runtime/lazy_order.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

// Calls visit(i, value) for the values[i] of [begin, end) that are not less than those of the ranks
// that `best` still wants; also for NaN. False where memory ran out.
template <class T, class Element, class Visit>
FASTZOO_INLINE bool scan(const Element* values, int64_t begin, int64_t end, BestRanks<T>& best,
                         const Visit& visit) {
  using V = Vec<T>;
  T least = least_score<T>(best.bound);
  // Several vectors for one branch, as most hold nothing.
  constexpr int kVectors = 4;
  constexpr int kStep = kVectors * V::size;
  int64_t i = begin;
  const auto visit_lanes = [&](uint64_t lanes) {
    const bool fits = best.reserve(kStep);
    for (; fits && lanes != 0; lanes &= lanes - 1) {
      const int64_t lane = i + __builtin_ctzll(lanes);
      visit(lane, widen(values[lane]));
    }
    least = least_score<T>(best.bound);
    return fits;
  };
  for (; i + kStep <= end; i += kStep) {
    uint64_t lanes = 0;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const V vector = load_wide(values + i + j * V::size);
      lanes |= static_cast<uint64_t>(not_less(vector, V(least)).bits) << (j * V::size);
    }
    if (lanes != 0 && !visit_lanes(lanes)) return false;
  }
  for (; i + V::size <= end; i += V::size) {
    const uint64_t lanes = not_less(V(load_wide(values + i)), V(least)).bits;
    if (lanes != 0 && !visit_lanes(lanes)) return false;
  }
  for (; i < end; ++i) {
    if (!(widen(values[i]) < least) && !visit_lanes(1)) return false;
  }
  return true;
}

// The best of all parts of an image.
template <class T>
FASTZOO_INLINE bool merge(const RankList* lists, int64_t parts, BestRanks<T>& best) {
  using Rank = typename RankOf<T>::type;
  for (int64_t part = 0; part < parts; ++part) {
    if (!best.reserve(lists[part].count)) return false;
    const Rank* const ranks = static_cast<const Rank*>(lists[part].ranks);
    for (int64_t i = 0; i < lists[part].count; ++i) best.push(ranks[i]);
  }
  return true;
}

template <class Args>
FASTZOO_INLINE void run_out_of_memory(Args& args) {
  __atomic_store_n(&args.out_of_memory, true, __ATOMIC_RELAXED);
}

// Fills lists with what scan_part(image, part, best) finds.
template <class T, class Args, class ScanPart>
FASTZOO_INLINE void fill_lists(Args& args, int64_t begin, int64_t end, const ScanPart& scan_part) {
  for (int64_t item = begin; item < end; ++item) {
    BestRanks<T> best;
    if (!scan_part(item / args.parts, item % args.parts, best)) return run_out_of_memory(args);
    best.keep_most();
    args.lists[item].count = best.count;
    args.lists[item].ranks = best.release();
  }
}

// ---- multiclass_nms ---------------------------------------------------------------

template <class T>
FASTZOO_INLINE void start_candidates(const MulticlassArgs& args, int64_t most, BestRanks<T>& best) {
  const T threshold = math::round_down<T>(args.score_threshold);
  // Above the threshold is below its first rank. Above NaN is nothing.
  best.start(most, math::is_nan(threshold) ? 0 : rank_of(threshold, 0));
}

// How many candidates are looked for at first: mostly enough.
FASTZOO_INLINE int64_t first_most(const MulticlassArgs& args) {
  const int64_t most = args.max_detections < 256 ? 1024 : 4 * args.max_detections;
  return most < args.pre_top_k ? most : args.pre_top_k;
}

// The best `most` candidates of a part of an image, but none below `after`.
template <class T, class Element>
FASTZOO_INLINE bool scan_scores(const MulticlassArgs& args, int64_t image, int64_t part,
                                int64_t parts, int64_t most, typename RankOf<T>::type after,
                                BestRanks<T>& best) {
  start_candidates(args, most, best);
  const Runs runs = args.runs;
  const Element* const scores =
      static_cast<const Element*>(args.scores) + image * args.score_strides[0];
  const int64_t elements = runs.rows * runs.length;
  int64_t place = elements * part / parts;
  const int64_t last = elements * (part + 1) / parts;
  while (place < last) {
    const int64_t row = place / runs.length;
    const int64_t begin = place - row * runs.length;
    const int64_t rest = last - row * runs.length;
    const int64_t end = rest < runs.length ? rest : runs.length;
    const int64_t first = row * runs.row_step;
    const bool fits =
        scan(scores + row * runs.row_stride, begin, end, best, [&](int64_t i, T score) {
          const auto rank = rank_of(score, first + i * runs.step);
          if (rank < best.bound && rank >= after) best.push(rank);
        });
    if (!fits) return false;
    place += end - begin;
  }
  return true;
}

// The boxes kept so far, of each class, or of all together.
template <class T>
class KeptOfClasses {
 public:
  KeptOfClasses(int64_t classes, T threshold)
      : threshold_(threshold),
        classes_(classes),
        kept_(static_cast<KeptBoxes<T>**>(std::calloc(classes + 1, sizeof(KeptBoxes<T>*)))) {}
  ~KeptOfClasses() {
    if (kept_ != nullptr) forget();
    std::free(kept_);
  }
  KeptOfClasses(const KeptOfClasses&) = delete;
  KeptOfClasses& operator=(const KeptOfClasses&) = delete;

  bool out_of_memory() const { return kept_ == nullptr; }

  void forget() {
    for (int64_t i = 0; i < classes_; ++i) {
      if (kept_[i] == nullptr) continue;
      kept_[i]->~KeptBoxes<T>();
      std::free(kept_[i]);
      kept_[i] = nullptr;
    }
  }

  // Those of a class, of which there will be at most `most`; nullptr where memory ran out.
  KeptBoxes<T>* of(int64_t label, int64_t most) {
    if (kept_[label] == nullptr) {
      void* const place = std::malloc(sizeof(KeptBoxes<T>));
      if (place == nullptr) return nullptr;
      kept_[label] = new (place) KeptBoxes<T>(most, threshold_);
    }
    return kept_[label]->out_of_memory() ? nullptr : kept_[label];
  }

 private:
  const T threshold_;
  const int64_t classes_;
  KeptBoxes<T>** const kept_;
};

template <class T, class Element>
struct Multiclass {
  using Rank = typename RankOf<T>::type;

  MulticlassArgs& args;
  const T threshold;
  const bool suppresses;    // no overlap exceeds 1
  const int64_t most_kept;  // of those that suppress each other
  BestRanks<T> best;
  KeptOfClasses<T> kept;
  int64_t* const found;  // of each class

  explicit Multiclass(MulticlassArgs& given)
      : args(given),
        threshold(math::round_down<T>(given.iou_threshold)),
        suppresses(threshold < 1),
        most_kept(limit_of_kept(given)),
        kept(given.class_agnostic ? 1 : given.classes, threshold),
        found(static_cast<int64_t*>(std::calloc(given.classes + 1, sizeof(int64_t)))) {}
  ~Multiclass() { std::free(found); }

  const Element* address(Rank rank) const {
    const int64_t pair = index_of(rank);
    return boxes + pair / args.classes * args.box_strides[1] +
           pair % args.classes * args.box_strides[2];
  }

  // False where memory ran out.
  bool image(int64_t image) {
    if (found == nullptr || kept.out_of_memory()) return false;
    const int64_t limit = args.max_detections;
    scores = static_cast<const Element*>(args.scores) + image * args.score_strides[0];
    boxes = static_cast<const Element*>(args.boxes) + image * args.box_strides[0];
    out_boxes = static_cast<T*>(args.out_boxes) + image * limit * 4;
    out_scores = static_cast<T*>(args.out_scores) + image * limit;
    labels = args.labels + image * limit;
    indices = args.indices + image * limit;
    num = 0;
    kept.forget();
    std::memset(found, 0, args.classes * sizeof(int64_t));

    // Mostly the detections are full, or the candidates exhausted, after the first round.
    int64_t seen = 0;
    int64_t most = first_most(args);
    Rank after = 0;
    while (num < limit && most > 0) {
      if (seen == 0 && args.parts > 1) {
        start_candidates(args, most, best);
        if (!merge(args.lists + image * args.parts, args.parts, best)) return false;
      } else if (!scan_scores<T, Element>(args, image, 0, 1, most, after, best)) {
        return false;
      }
      best.keep_most();
      if (!visit_best()) return false;
      if (best.count < most) break;
      seen += best.count;
      after = best.room[best.count - 1] + 1;  // where the order stands
      const int64_t rest = args.pre_top_k - seen;
      most = 8 * most < rest ? 8 * most : rest;
    }
    args.num[image] = num;
    for (int64_t i = num; i < limit; ++i) {
      for (int k = 0; k < 4; ++k) out_boxes[4 * i + k] = 0;
      out_scores[i] = 0;
      labels[i] = indices[i] = -1;
    }
    return true;
  }

 private:
  static int64_t limit_of_kept(const MulticlassArgs& args) {
    const int64_t candidates = args.class_agnostic ? args.pre_top_k : args.locations;
    int64_t most = args.max_detections;
    if (args.max_per_class < most) most = args.class_agnostic ? candidates : args.max_per_class;
    return most < candidates ? most : candidates;
  }

  // Goes through the candidates at hand by rising rank, until the detections are full.
  bool visit_best() {
    LazyOrder<Rank> order(best.ranks, best.count, best.room);
    const Rank* const ordered = best.room;
    int64_t settled = 0;
    for (int64_t i = 0; i < best.count && num < args.max_detections; ++i) {
      constexpr int64_t kAhead = 8;
      if (i == settled) {
        settled = order.settle(i);
        for (int64_t k = i; k < settled && k < i + kAhead; ++k) {
          __builtin_prefetch(address(ordered[k]));
        }
      }
      if (i + kAhead < settled) __builtin_prefetch(address(ordered[i + kAhead]));
      if (!visit(index_of(ordered[i]))) return false;
    }
    return true;
  }

  bool visit(int64_t pair) {
    const int64_t place = pair / args.classes;
    const int64_t label = pair % args.classes;
    const bool full = found[label] >= args.max_per_class;
    // Boxes that it could suppress are beyond the limit of their class, too.
    if (full && !args.class_agnostic) return true;
    const math::Box<T> box = decoded(place, label);
    if (suppresses && (threshold < 0 || !is_inert(box))) {
      KeptBoxes<T>* const others = kept.of(args.class_agnostic ? 0 : label, most_kept);
      if (others == nullptr) return false;
      if (!others->add(box)) return true;
    }
    if (full) return true;
    ++found[label];
    T* const corners = out_boxes + 4 * num;
    corners[0] = box.x1;
    corners[1] = box.y1;
    corners[2] = box.x2;
    corners[3] = box.y2;
    out_scores[num] = widen(scores[place * args.score_strides[1] + label * args.score_strides[2]]);
    labels[num] = label;
    indices[num] = place;
    ++num;
    return true;
  }

  math::Box<T> decoded(int64_t place, int64_t label) const {
    const Element* const stored = boxes + place * args.box_strides[1] + label * args.box_strides[2];
    T values[4];
    for (int k = 0; k < 4; ++k) values[k] = widen(stored[k * args.box_strides[3]]);
    const T* const prior =
        static_cast<const T*>(args.priors) + place * math::prior_size(args.decoder.form);
    const math::Corners corners = math::decode_box(values, prior, args.decoder);
    const T rounded[4] = {static_cast<T>(corners.x1), static_cast<T>(corners.y1),
                          static_cast<T>(corners.x2), static_cast<T>(corners.y2)};
    return load_box(rounded);
  }

  // Of the image at hand.
  const Element* scores;
  const Element* boxes;
  T* out_boxes;
  T* out_scores;
  int64_t* labels;
  int64_t* indices;
  int64_t num;
};

// ---- peak_nms ---------------------------------------------------------------

// The window around a place, within a dimension.
struct Window {
  int64_t first, last;
  Window(int64_t place, int64_t reach, int64_t size)
      : first(place < reach ? 0 : place - reach),
        last(size - 1 - place < reach ? size - 1 : place + reach) {}
};

// NaN fails every comparison, and so is no peak, nor is what is around it.
template <class Element>
FASTZOO_INLINE bool is_peak(const PeakArgs& args, const Element* plane, Window ys, int64_t y,
                            int64_t x) {
  const auto value = widen(plane[y * args.width + x]);
  const Window xs(x, args.reach, args.width);
  for (int64_t row = ys.first; row <= ys.last; ++row) {
    for (int64_t k = xs.first; k <= xs.last; ++k) {
      if (!(widen(plane[row * args.width + k]) <= value)) return false;
    }
  }
  return true;
}

// Which of `lanes`, places from x on, are peaks. Their windows have all columns.
template <class T, class Element>
FASTZOO_INLINE uint32_t peaks_among(uint32_t lanes, const PeakArgs& args, const Element* plane,
                                    Window ys, int64_t y, int64_t x) {
  const Vec<T> values = load_wide(plane + y * args.width + x);
  // The scan comes from above: what it has not seen yet is the likelier to be higher.
  for (int64_t row = ys.last; row >= ys.first; --row) {
    const Element* const line = plane + row * args.width + x;
    for (int64_t k = -args.reach; k <= args.reach; ++k) {
      lanes &= less_equal(Vec<T>(load_wide(line + k)), values).bits;
    }
    if (lanes == 0) break;
  }
  return lanes;
}

template <class T>
FASTZOO_INLINE void start_peaks(const PeakArgs& args, BestRanks<T>& best) {
  best.start(args.top_k, rank_of(static_cast<T>(__builtin_nan("")), 0));
}

template <class T, class Element>
FASTZOO_INLINE bool scan_heatmap(const PeakArgs& args, int64_t image, int64_t part,
                                 BestRanks<T>& best) {
  using V = Vec<T>;
  start_peaks(args, best);
  const int64_t rows = args.classes * args.height;
  const Element* const heatmap =
      static_cast<const Element*>(args.heatmap) + image * rows * args.width;
  const int64_t last = rows * (part + 1) / args.parts;
  T least = least_score<T>(best.bound);
  // The columns whose windows are whole, if they fill a vector.
  const bool has_inner = args.reach < args.width && args.width - 2 * args.reach >= V::size;
  const int64_t inner_begin = has_inner ? args.reach : args.width;
  const int64_t inner_end = has_inner ? args.width - args.reach : args.width;
  for (int64_t line = rows * part / args.parts; line < last; ++line) {
    const int64_t y = line % args.height;
    const Window ys(y, args.reach, args.height);
    const int64_t begin = line * args.width;
    const Element* const values = heatmap + begin;
    const Element* const plane = values - y * args.width;
    const auto add = [&](uint32_t lanes, int64_t x) {
      if (!best.reserve(V::size)) return false;
      for (; lanes != 0; lanes &= lanes - 1) {
        const int64_t place = x + __builtin_ctz(lanes);
        const auto rank = rank_of(widen(values[place]), begin + place);
        if (rank < best.bound) best.push(rank);
      }
      least = least_score<T>(best.bound);
      return true;
    };
    for (int64_t x = 0; x < args.width; ++x) {
      if (x == inner_begin) x = inner_end;
      if (x == args.width) break;
      if (widen(values[x]) < least || !is_peak(args, plane, ys, y, x)) continue;
      if (!add(1, x)) return false;
    }
    for (int64_t x = inner_begin; x < inner_end; x += V::size) {
      uint32_t lanes = V::MaskType::kAll;
      int64_t from = x;
      if (x + V::size > inner_end) {
        // The last vector lies over the one before it.
        from = inner_end - V::size;
        lanes = lanes << (x - from) & V::MaskType::kAll;
      }
      lanes &= not_less(V(load_wide(values + from)), V(least)).bits;
      if (lanes == 0) continue;
      lanes = peaks_among<T>(lanes, args, plane, ys, y, from);
      if (lanes != 0 && !add(lanes, from)) return false;
    }
  }
  return true;
}

template <class T, class Element>
FASTZOO_INLINE bool write_peaks(const PeakArgs& args, int64_t image, BestRanks<T>& best) {
  if (args.parts == 1) {
    if (!scan_heatmap<T, Element>(args, image, 0, best)) return false;
  } else {
    start_peaks(args, best);
    if (!merge(args.lists + image * args.parts, args.parts, best)) return false;
  }
  best.keep_most();
  sort_ranks(best.ranks, best.count, best.room);
  const int64_t plane = args.height * args.width;
  const Element* const heatmap =
      static_cast<const Element*>(args.heatmap) + image * args.classes * plane;
  Element* const scores = static_cast<Element*>(args.scores) + image * args.top_k;
  int64_t* const labels = args.labels + image * args.top_k;
  int64_t* const ys = args.ys + image * args.top_k;
  int64_t* const xs = args.xs + image * args.top_k;
  for (int64_t i = 0; i < best.count; ++i) {
    const int64_t cell = index_of(best.ranks[i]);
    scores[i] = heatmap[cell];
    labels[i] = cell / plane;
    ys[i] = cell / args.width % args.height;
    xs[i] = cell % args.width;
  }
  for (int64_t i = best.count; i < args.top_k; ++i) {
    scores[i] = Element{};
    labels[i] = ys[i] = xs[i] = -1;
  }
  return true;
}

}  // namespace

void multiclass_scan(MulticlassArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    fill_lists<T>(args, begin, end, [&](int64_t image, int64_t part, BestRanks<T>& best) {
      return scan_scores<T, Element>(args, image, part, args.parts, first_most(args), 0, best);
    });
  });
}

void multiclass_nms(MulticlassArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    Multiclass<typename ComputeOf<Element>::type, Element> multiclass(args);
    for (int64_t image = begin; image < end; ++image) {
      if (!multiclass.image(image)) return run_out_of_memory(args);
    }
  });
}

void peak_scan(PeakArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    fill_lists<T>(args, begin, end, [&](int64_t image, int64_t part, BestRanks<T>& best) {
      return scan_heatmap<T, Element>(args, image, part, best);
    });
  });
}

void peak_nms(PeakArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    BestRanks<T> best;
    for (int64_t image = begin; image < end; ++image) {
      if (!write_peaks<T, Element>(args, image, best)) return run_out_of_memory(args);
    }
  });
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
