// Margin softmax: the scores of a chunk of classes stay in cache, where they become log-sum-exps or
// gradients; no matrix of rows by classes is stored.
#include "margin_softmax.h"

#include <initializer_list>
#include <type_traits>

#include "../runtime/pair_scores.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
template <class Element, class M>
struct Margin {
  using Pairs = PairScores<M>;
  using T = typename Pairs::T;
  using V = typename Pairs::V;
  using Word = typename Pairs::Word;
  using Tile = typename Pairs::Tile;
  static constexpr int kColumns = Pairs::kColumns;
  static constexpr int kRows = Pairs::kRows;
  static constexpr T kInf = static_cast<T>(kInfinity);

  const MarginArgs& args;
  const bool backward =
      args.pass == MarginPass::negatives_backward || args.pass == MarginPass::scores_backward;
  const int64_t sub_centers = args.sub_centers;
  const int64_t classes_a_chunk = chunk_classes(args);
  const Pairs pairs{args.count, args.dims, round_up(classes_a_chunk * sub_centers, kRows)};
  const int64_t group = pairs.group_blocks();
  const int64_t padded = pairs.blocks() * kColumns;
  // What depends on a row of the batch, [padded] each; nothing comes of the rows beyond the last.
  struct Lanes {
    T *norm, *inverse, *scale, *threshold, *target;
    int64_t *label, *target_row;
    T *lse, *grad_lse, *grad_total;
  } lanes{};
  Word *packed = nullptr, *across = nullptr;
  // What a part of the classes finds.
  struct Part {
    T *highest, *sum, *total;           // forward: the sum of exp(score - highest)
    T *radial, *grad_scale, *gradient;  // backward
    typename Pairs::Chunk chunk;
    T *inverse, *norm;  // of the weight's rows in the chunk
    T* across_lanes;    // [chunk][V::size]: sums of a row's gradient times its score
    T* along;           // [chunk]: how much of a weight's row is added to its gradient
    Marks excluded;     // the lanes of a block whose label a class is
    T* grad;            // [chunk][kColumns]: gradients of scores, for one block
    T* sums;            // [chunk][dims]: the weight's gradients, where dtype is not their type
  };
  // Classes that share one reference in what is kept.
  static constexpr int64_t kKeptClasses = 64;
  static constexpr bool kDirect = std::is_same_v<Element, T>;
  char* parts = nullptr;
  int64_t part_bytes = 0;
  int64_t bytes = 0;

  static int64_t chunk_classes(const MarginArgs& args) {
    const int64_t most = kChunkRows / args.sub_centers;
    const int64_t share = round_up((args.classes + args.parts - 1) / args.parts, kRows);
    if (args.kept != nullptr || args.saved_kept != nullptr || share > most)
      return most < 1 ? 1 : most;
    return share < 1 ? 1 : share;
  }

  explicit Margin(const MarginArgs& args) : args(args) {
    Arena arena(args.memory);
    packed = arena.take<Word>(pairs.lanes_size());
    if (backward && args.needs_weight) across = arena.take<Word>(pairs.across_size());
    for (T** array : {&lanes.norm, &lanes.inverse, &lanes.scale, &lanes.threshold, &lanes.target}) {
      *array = arena.take<T>(padded);
    }
    lanes.label = arena.take<int64_t>(padded);
    lanes.target_row = arena.take<int64_t>(padded);
    if (args.pass == MarginPass::negatives_backward) {
      for (T** array : {&lanes.lse, &lanes.grad_lse, &lanes.grad_total}) {
        *array = arena.take<T>(padded);
      }
    }
    Arena counter;
    take_part(counter);
    part_bytes = counter.bytes();
    parts = arena.take<char>(part_bytes * args.parts);
    bytes = arena.bytes();
  }

  Part take_part(Arena& arena) const {
    Part part{};
    if (backward) {
      part.radial = arena.take<T>(padded);
      part.grad_scale = arena.take<T>(padded);
      part.gradient = arena.take<T>(args.needs_embeddings ? pairs.sums_size() : 0);
    } else {
      part.highest = arena.take<T>(padded);
      part.sum = arena.take<T>(padded);
      part.total = arena.take<T>(padded);
    }
    part.chunk = pairs.take(arena, group, backward);
    part.inverse = arena.take<T>(pairs.chunk);
    part.norm = arena.take<T>(pairs.chunk);
    part.excluded.bits = arena.take<uint32_t>(classes_a_chunk);
    if (backward) {
      part.across_lanes = arena.take<T>(pairs.chunk * V::size);
      part.along = arena.take<T>(pairs.chunk);
      if (args.pass == MarginPass::scores_backward) {
        part.grad = arena.take<T>(classes_a_chunk * kColumns);
      }
      if (!kDirect) part.sums = arena.take<T>(pairs.chunk * args.dims);
    }
    return part;
  }

  Part part_of(int index) const {
    Arena arena(parts + index * part_bytes);
    return take_part(arena);
  }

  int64_t chunks() const { return (args.classes + classes_a_chunk - 1) / classes_a_chunk; }

  // n counts in the range of rows at hand.
  const Element* embedding(int64_t n) const {
    return static_cast<const Element*>(args.embeddings) + (args.first + n) * args.dims;
  }
  // How many lanes of the block from n on exist.
  int64_t lanes_from(int64_t n) const {
    return args.count - n < kColumns ? args.count - n : kColumns;
  }
  const Element* weight(int64_t row) const {
    return static_cast<const Element*>(args.weight) + row * args.dims;
  }
  T of_row(const void* array, int64_t n) const {
    return static_cast<const T*>(array)[args.first + n];
  }
  void set_row(T value, void* array, int64_t n) const {
    static_cast<T*>(array)[args.first + n] = value;
  }

  T norm_of(const Element* row) const {
    return static_cast<T>(__builtin_sqrt(wide_sum(args.dims, [&](int64_t d) {
      const double value = widen(row[d]);
      return value * value;
    })));
  }
  static T inverse_of(bool normalize, T norm) {
    return normalize ? static_cast<T>(math::inverse_norm(norm)) : T(1);
  }

  // ---- before the classes ----------------------------------------------------------------------

  void prepare(int64_t block) const {
    pairs.pack_lanes(
        block, [&](int64_t n, int64_t d) { return static_cast<T>(widen(embedding(n)[d])); }, packed,
        across);
    for (int64_t n = block * kColumns; n < (block + 1) * kColumns; ++n) {
      lanes.label[n] = lanes.target_row[n] = -1;
      lanes.norm[n] = lanes.inverse[n] = lanes.scale[n] = lanes.target[n] = T(0);
      lanes.threshold[n] = kInf;
      if (args.pass == MarginPass::negatives_backward) {
        lanes.lse[n] = kInf;
        lanes.grad_lse[n] = lanes.grad_total[n] = T(0);
      }
      if (n < args.count) prepare_row(n);
    }
  }

  void prepare_row(int64_t n) const {
    const T norm = norm_of(embedding(n));
    lanes.norm[n] = norm;
    lanes.inverse[n] = inverse_of(args.normalize_embeddings, norm);
    lanes.scale[n] = of_row(args.scale, n);
    if (args.threshold != nullptr) lanes.threshold[n] = of_row(args.threshold, n);
    lanes.label[n] = args.labels[args.first + n];
    T weight_norm = T(0);
    if (lanes.label[n] >= 0) {
      double best = 0;
      for (int64_t j = 0; j < sub_centers; ++j) {
        const int64_t row = lanes.label[n] * sub_centers + j;
        const T row_norm = norm_of(weight(row));
        const double dot = wide_sum(args.dims, [&](int64_t d) {
          return static_cast<double>(widen(embedding(n)[d])) * widen(weight(row)[d]);
        });
        const double u = dot * lanes.inverse[n] * inverse_of(args.normalize_weight, row_norm);
        if (j > 0 && !(u > best)) continue;
        best = u;
        lanes.target_row[n] = row;
        weight_norm = row_norm;
      }
      lanes.target[n] = static_cast<T>(best);
    }
    if (!backward) {
      set_row(lanes.target[n], args.target, n);
      set_row(norm, args.embedding_norm, n);
      set_row(weight_norm, args.weight_norm, n);
    }
    if (args.pass == MarginPass::negatives_backward) {
      lanes.grad_lse[n] = of_row(args.grad_lse, n);
      lanes.grad_total[n] = of_row(args.grad_total, n);
      lanes.lse[n] = gradient_reference(lanes.grad_lse[n], of_row(args.saved_lse, n));
    }
  }

  // ---- a part of the classes -------------------------------------------------------------------

  // The chunk at hand: classes [first_class, first_class + classes).
  struct Range {
    int64_t first_class, classes, first_row, rows;
  };

  void run(int index) const {
    const Part part = part_of(index);
    if (backward) {
      for (int64_t n = 0; n < padded; ++n) part.radial[n] = part.grad_scale[n] = T(0);
      const int64_t size = args.needs_embeddings ? pairs.sums_size() : 0;
      for (int64_t i = 0; i < size; ++i) part.gradient[i] = T(0);
    } else {
      for (int64_t n = 0; n < padded; ++n) {
        part.highest[n] = -kInf;
        part.sum[n] = part.total[n] = T(0);
      }
    }
    for (int64_t c = 0; c < classes_a_chunk; ++c) part.excluded.bits[c] = 0;
    const bool plain = args.threshold == nullptr && !(args.interclass_filter > 0);
    const int64_t last = chunks() * (index + 1) / args.parts;
    for (int64_t chunk = chunks() * index / args.parts; chunk < last; ++chunk) {
      Range range;
      range.first_class = chunk * classes_a_chunk;
      const int64_t left = args.classes - range.first_class;
      range.classes = left < classes_a_chunk ? left : classes_a_chunk;
      range.first_row = range.first_class * sub_centers;
      range.rows = range.classes * sub_centers;
      pairs.pack_rows(part.chunk, weight(range.first_row), range.rows, [&](int64_t r, T squares) {
        part.norm[r] = square_root(squares);
        part.inverse[r] = inverse_of(args.normalize_weight, part.norm[r]);
      });
      for (int64_t first = 0; first < pairs.blocks(); first += group) {
        const int64_t count = pairs.blocks() - first < group ? pairs.blocks() - first : group;
        if (args.saved_kept == nullptr) {
          pairs.multiply(part.chunk, range.rows, packed, first, count);
        }
        if (plain) {
          meet<true>(part, range, first, count);
        } else {
          meet<false>(part, range, first, count);
        }
      }
      if (backward && args.needs_weight) {
        if (args.saved_kept != nullptr) straighten(part, range);
        if (!kDirect) narrow_sums(part, range);
      }
    }
  }

  template <bool kPlain>
  void meet(const Part& part, const Range& range, int64_t first, int64_t count) const {
    if (backward) {
      for (int64_t i = 0; i < range.rows * V::size; ++i) part.across_lanes[i] = T(0);
    }
    for (int64_t block = 0; block < count; ++block) {
      const int64_t n = (first + block) * kColumns;
      T* const scores = pairs.scores_of(part.chunk, block);
      part.excluded.template set<kColumns>(lanes.label + n, range.first_class, range.classes);
      switch (args.pass) {
        case MarginPass::negatives:
          find_exponentials<kPlain>(part, range, n, scores);
          break;
        case MarginPass::scores:
          write_scores<kPlain>(part, range, n, scores);
          break;
        case MarginPass::negatives_backward:
          if (args.saved_kept != nullptr) {
            restore_gradients(part, range, n, scores);
          } else {
            find_gradients<kPlain, false>(part, range, n, scores);
          }
          break;
        case MarginPass::scores_backward:
          read_gradients(part, range, n);
          find_gradients<kPlain, true>(part, range, n, scores);
          break;
      }
      part.excluded.template clear<kColumns>(lanes.label + n, range.first_class, range.classes);
    }
    if (backward) carry_back(part, range, first, count);
  }

  // What a block needs of its lanes and of the rule, in vectors.
  struct Rule {
    V inverse[2], scale[2], threshold[2];
    V hardness, filter;
  };

  __attribute__((always_inline)) Rule rule_of(int64_t n) const {
    Rule rule;
    for (int h = 0; h < 2; ++h) {
      rule.inverse[h] = V::load(lanes.inverse + n + h * V::size);
      rule.scale[h] = V::load(lanes.scale + n + h * V::size);
      rule.threshold[h] = V::load(lanes.threshold + n + h * V::size);
    }
    rule.hardness = V(args.hardness != nullptr ? static_cast<const T*>(args.hardness)[0] : T(0));
    const bool filters = args.interclass_filter > 0;
    rule.filter = V(filters ? static_cast<T>(args.interclass_filter) : kInf);
    return rule;
  }

  // The score u of a class, and which of its sub-centres has it.
  __attribute__((always_inline)) void class_score(const Part& part, const Rule& rule,
                                                  const T* scores, int64_t c, V (&u)[2],
                                                  V (&winner)[2]) const {
    const int64_t r = c * sub_centers;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const T* const at = scores + r * kColumns + h * V::size;
      u[h] = V::load(at) * V(part.inverse[r]);
      winner[h] = V(T(0));
      for (int64_t j = 1; j < sub_centers; ++j) {
        const V other = V::load(at + j * kColumns) * V(part.inverse[r + j]);
        const auto wins = greater(other, u[h]);
        u[h] = select(wins, other, u[h]);
        winner[h] = select(wins, V(static_cast<T>(j)), winner[h]);
      }
      u[h] = u[h] * rule.inverse[h];
    }
  }

  template <bool kPlain>
  __attribute__((always_inline)) static V changed(const Rule& rule, V u, int h) {
    if constexpr (kPlain) return u;
    return math::negative_value(u, rule.threshold[h], rule.hardness, rule.filter);
  }

  template <bool kPlain>
  void find_exponentials(const Part& part, const Range& range, int64_t n, T* scores) const {
    const Rule rule = rule_of(n);
    const T* const weights = static_cast<const T*>(args.class_weight);
    V top[2] = {V(-kInf), V(-kInf)};
    V total[2] = {V(T(0)), V(T(0))};
    for (int64_t c = 0; c < range.classes; ++c) {
      V u[2], winner[2];
      class_score(part, rule, scores, c, u, winner);
      const V factor(weights != nullptr ? weights[range.first_class + c] : T(1));
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const V z = rule.scale[h] * changed<kPlain>(rule, u[h], h);
        const V others = select(part.excluded.template of<V>(c, h), V(-kInf), z);
        others.store(scores + c * kColumns + h * V::size);
        top[h] = maximum(top[h], others);
        if (args.with_total) {
          total[h] = fused_multiply_add(
              factor, select(part.excluded.template of<V>(c, h), V(T(0)), z), total[h]);
        }
      }
    }
    V reference[2], sum[2];
    for (int h = 0; h < 2; ++h) {
      const int64_t at = n + h * V::size;
      reference[h] = raise_highest(part.highest + at, part.sum + at, top[h]);
      sum[h] = V(T(0));
      (V::load(part.total + at) + total[h]).store(part.total + at);
    }
    for (int64_t c = 0; c < range.classes; ++c) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        T* const at = scores + c * kColumns + h * V::size;
        const V exponent = exponential(V::load(at) - reference[h]);
        sum[h] = sum[h] + exponent;
        if (args.kept != nullptr) exponent.store(at);
      }
    }
    if (args.kept != nullptr) keep(range, n, scores, reference);
    for (int h = 0; h < 2; ++h) {
      T* const sums = part.sum + n + h * V::size;
      (V::load(sums) + sum[h]).store(sums);
    }
  }

  void keep(const Range& range, int64_t n, const T* exponents, const V (&reference)[2]) const {
    for (int64_t c = 0; c < range.classes; ++c) {
      BFloat16 rounded[kColumns];
      for (int i = 0; i < kColumns; ++i) narrow(exponents[c * kColumns + i], rounded[i]);
      uint16_t* const out = args.kept + (range.first_class + c) * args.rows + args.first + n;
      __builtin_memcpy(out, rounded, static_cast<size_t>(lanes_from(n)) * sizeof(BFloat16));
    }
    T references[kColumns];
    for (int h = 0; h < 2; ++h) reference[h].store(references + h * V::size);
    for (int64_t c = 0; c < range.classes; c += kKeptClasses) {
      const int64_t line = (range.first_class + c) / kKeptClasses * args.rows;
      for (int64_t i = 0; i < lanes_from(n); ++i) {
        set_row(references[i], args.kept_max, line + n + i);
      }
    }
  }

  template <bool kPlain>
  void write_scores(const Part& part, const Range& range, int64_t n, T* scores) const {
    const Rule rule = rule_of(n);
    for (int64_t c = 0; c < range.classes; ++c) {
      V u[2], winner[2];
      class_score(part, rule, scores, c, u, winner);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const V value =
            select(part.excluded.template of<V>(c, h), u[h], changed<kPlain>(rule, u[h], h));
        (rule.scale[h] * value).store(scores + c * kColumns + h * V::size);
      }
    }
    for (int64_t i = 0; i < lanes_from(n); ++i) {
      T* const out =
          static_cast<T*>(args.scores) + (args.first + n + i) * args.classes + range.first_class;
      for (int64_t c = 0; c < range.classes; ++c) out[c] = scores[c * kColumns + i];
    }
  }

  void read_gradients(const Part& part, const Range& range, int64_t n) const {
    for (int64_t i = 0; i < kColumns; ++i) {
      const bool inside = i < lanes_from(n);
      const int64_t at = (args.first + n + i) * args.classes + range.first_class;
      for (int64_t c = 0; c < range.classes; ++c) {
        part.grad[c * kColumns + i] =
            inside ? static_cast<const T*>(args.grad_scores)[at + c] : T(0);
      }
    }
  }

  // Writes the gradients of the dot products over the scores, from the exponentials that the
  // forward kept.
  void restore_gradients(const Part& part, const Range& range, int64_t n, T* scores) const {
    T factor[kColumns];
    const int64_t count = lanes_from(n);
    for (int64_t c = 0; c < range.classes; ++c) {
      if (c % kKeptClasses == 0) {
        const int64_t line = (range.first_class + c) / kKeptClasses * args.rows;
        for (int64_t i = 0; i < kColumns; ++i) {
          if (i >= count) {
            factor[i] = T(0);
            continue;
          }
          const T share =
              math::exponential(of_row(args.saved_kept_max, line + n + i) - lanes.lse[n + i]);
          factor[i] = share * lanes.grad_lse[n + i] * lanes.scale[n + i] * lanes.inverse[n + i];
        }
      }
      BFloat16 kept[kColumns];
      const uint16_t* const in =
          args.saved_kept + (range.first_class + c) * args.rows + args.first + n;
      for (int i = 0; i < kColumns; ++i) kept[i].bits = 0;
      __builtin_memcpy(kept, in, static_cast<size_t>(count) * sizeof(BFloat16));
      for (int i = 0; i < kColumns; ++i) {
        scores[c * kColumns + i] = widen(kept[i]) * (factor[i] * part.inverse[c]);
      }
    }
  }

  // Writes the gradients of the dot products over the scores.
  template <bool kPlain, bool kGiven>
  void find_gradients(const Part& part, const Range& range, int64_t n, T* scores) const {
    const Rule rule = rule_of(n);
    const T* const weights = static_cast<const T*>(args.class_weight);
    V lse[2], grad_lse[2], grad_total[2], radial[2], grad_scale[2];
    for (int h = 0; h < 2; ++h) {
      if constexpr (!kGiven) {
        lse[h] = V::load(lanes.lse + n + h * V::size);
        grad_lse[h] = V::load(lanes.grad_lse + n + h * V::size);
        grad_total[h] = V::load(lanes.grad_total + n + h * V::size);
      }
      radial[h] = grad_scale[h] = V(T(0));
    }
    for (int64_t c = 0; c < range.classes; ++c) {
      V u[2], winner[2];
      class_score(part, rule, scores, c, u, winner);
      const V factor(!kGiven && weights != nullptr ? weights[range.first_class + c] : T(1));
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const V value = changed<kPlain>(rule, u[h], h);
        V dz;
        if constexpr (kGiven) {
          dz = V::load(part.grad + c * kColumns + h * V::size);
        } else {
          const V p = exponential(fused_multiply_add(rule.scale[h], value, V(T(0)) - lse[h]));
          dz = fused_multiply_add(grad_lse[h], p, grad_total[h] * factor);
        }
        dz = select(part.excluded.template of<V>(c, h), V(T(0)), dz);
        grad_scale[h] = fused_multiply_add(dz, value, grad_scale[h]);
        V du = dz * rule.scale[h];
        if constexpr (!kPlain) {
          du = du * math::negative_slope(u[h], rule.threshold[h], rule.hardness, rule.filter);
        }
        const V along = du * u[h];
        radial[h] = radial[h] + along;
        const V v = du * rule.inverse[h];
        for (int64_t j = 0; j < sub_centers; ++j) {
          const int64_t r = c * sub_centers + j;
          T* const sums = part.across_lanes + r * V::size;
          V own = v, own_along = along;
          if (sub_centers > 1) {
            const V index(static_cast<T>(j));
            const auto loses =
                Mask<V::size>{less(winner[h], index).bits | greater(winner[h], index).bits};
            own = select(loses, V(T(0)), own);
            own_along = select(loses, V(T(0)), own_along);
          }
          (own * V(part.inverse[r])).store(scores + r * kColumns + h * V::size);
          (V::load(sums) + own_along).store(sums);
        }
      }
    }
    for (int h = 0; h < 2; ++h) {
      T* const radials = part.radial + n + h * V::size;
      T* const grad_scales = part.grad_scale + n + h * V::size;
      (V::load(radials) + radial[h]).store(radials);
      (V::load(grad_scales) + grad_scale[h]).store(grad_scales);
    }
  }

  // The targets' own gradients join the others; then the products.
  void carry_back(const Part& part, const Range& range, int64_t first, int64_t count) const {
    if (!args.needs_embeddings && !args.needs_weight) return;
    for (int64_t r = 0; r < range.rows; ++r) {
      part.along[r] = lane_sum(V::load(part.across_lanes + r * V::size));
    }
    const int64_t end = (first + count) * kColumns;
    for (int64_t n = first * kColumns; n < end; ++n) {
      const int64_t r = lanes.target_row[n] - range.first_row;
      if (r < 0 || r >= range.rows) continue;
      const T grad = of_row(args.grad_target, n);
      T* const scores = pairs.scores_of(part.chunk, n / kColumns - first);
      scores[r * kColumns + n % kColumns] = grad * lanes.inverse[n] * part.inverse[r];
      part.along[r] += grad * lanes.target[n];
    }
    for (int64_t r = 0; r < range.rows; ++r) {
      part.along[r] = -shrink(args.normalize_weight, part.inverse[r]) * part.along[r];
    }
    for (int64_t n = first * kColumns; n < end; ++n) {
      const int64_t r = lanes.target_row[n] - range.first_row;
      if (r < 0 || r >= range.rows || !(part.norm[r] > 0)) continue;
      part.along[r] += of_row(args.grad_weight_norm, n) / part.norm[r];
    }
    pairs.finish_gradients(part.chunk, range.rows, count);
    if (args.needs_embeddings) {
      pairs.add_lane_gradients(part.chunk, range.rows, first, count, part.gradient);
    }
    if (!args.needs_weight) return;
    const Element* const rows = weight(range.first_row);
    T* const sums = sums_of(part, range);
    const bool starts = first == 0 && args.first == 0;
    // The scores are not known from what was kept: the part along a row is taken out afterwards.
    const T* const along = args.saved_kept == nullptr ? part.along : nullptr;
    pairs.row_gradients(part.chunk, range.rows, across, first, count,
                        [&](int64_t r, int64_t d, const Tile& tile) __attribute__((always_inline)) {
                          pairs.add_tile(tile, r, range.rows, d, starts, along, rows, sums);
                        });
  }

  // The chunk's gradients of the weight in the compute type.
  T* sums_of(const Part& part, const Range& range) const {
    if constexpr (kDirect) {
      return static_cast<T*>(args.grad_weight) + range.first_row * args.dims;
    } else {
      return part.sums;
    }
  }

  // Takes what lies along a row out of its gradient, for the rows whose norm divides, and adds what
  // the gradients of the norms put there.
  void straighten(const Part& part, const Range& range) const {
    for (int64_t r = 0; r < range.rows; ++r) part.along[r] = T(0);
    for (int64_t n = 0; n < args.count; ++n) {
      const int64_t r = lanes.target_row[n] - range.first_row;
      if (r < 0 || r >= range.rows || !(part.norm[r] > 0)) continue;
      part.along[r] += of_row(args.grad_weight_norm, n) / part.norm[r];
    }
    T* const sums = sums_of(part, range);
    for (int64_t r = 0; r < range.rows; ++r) {
      const Element* const row = weight(range.first_row + r);
      T* const sum = sums + r * args.dims;
      const double dot = wide_sum(
          args.dims, [&](int64_t d) { return static_cast<double>(sum[d]) * widen(row[d]); });
      const T share =
          part.along[r] - static_cast<T>(dot) * shrink(args.normalize_weight, part.inverse[r]);
      for (int64_t d = 0; d < args.dims; ++d) sum[d] += share * static_cast<T>(widen(row[d]));
    }
  }

  // What a gradient along a row is multiplied by where the row was divided by its norm.
  static T shrink(bool normalize, T inverse) { return normalize ? inverse * inverse : T(0); }

  void narrow_sums(const Part& part, const Range& range) const {
    Element* const out = static_cast<Element*>(args.grad_weight) + range.first_row * args.dims;
    for (int64_t i = 0; i < range.rows * args.dims; ++i) narrow(part.sums[i], out[i]);
  }

  // ---- after the classes -----------------------------------------------------------------------

  void finish(int64_t block, double* sums) const {
    const int64_t first = block * kColumns;
    for (int64_t n = first; n < first + lanes_from(first); ++n) {
      if (backward) {
        finish_gradients(n, sums);
      } else {
        finish_lse(n);
      }
    }
  }

  void finish_lse(int64_t n) const {
    double highest = -kInfinity, sum = 0, total = 0;
    for (int index = 0; index < args.parts; ++index) {
      highest = math::maximum(highest, static_cast<double>(part_of(index).highest[n]));
    }
    const double reference = highest > -kInfinity ? highest : 0;
    for (int index = 0; index < args.parts; ++index) {
      const Part part = part_of(index);
      const double share = ::exp(static_cast<double>(part.highest[n]) - reference);
      sum += static_cast<double>(part.sum[n]) * share;
      total += static_cast<double>(part.total[n]);
    }
    set_row(static_cast<T>(reference + ::log(sum)), args.lse, n);
    set_row(static_cast<T>(total), args.total, n);
  }

  void finish_gradients(int64_t n, double* sums) const {
    double radial = 0, grad_scale = 0;
    for (int index = 0; index < args.parts; ++index) {
      const Part part = part_of(index);
      radial += static_cast<double>(part.radial[n]);
      grad_scale += static_cast<double>(part.grad_scale[n]);
    }
    if (args.needs_scale) set_row(static_cast<T>(grad_scale), args.grad_scale, n);
    if (!args.needs_embeddings) return;
    if (lanes.target_row[n] >= 0) {
      radial += static_cast<double>(of_row(args.grad_target, n)) * lanes.target[n];
    }
    for (int64_t d = 0; d < args.dims; ++d) sums[d] = 0;
    for (int index = 0; index < args.parts; ++index) {
      pairs.collect(part_of(index).gradient, n, sums);
    }
    if (args.saved_kept != nullptr) {
      radial = wide_sum(args.dims, [&](int64_t d) { return sums[d] * widen(embedding(n)[d]); });
    }
    const double norm = lanes.norm[n];
    double along = -radial * shrink(args.normalize_embeddings, lanes.inverse[n]);
    if (norm > 0) along += static_cast<double>(of_row(args.grad_embedding_norm, n)) / norm;
    for (int64_t d = 0; d < args.dims; ++d) sums[d] += along * widen(embedding(n)[d]);
    Element* const out = static_cast<Element*>(args.grad_embeddings) + (args.first + n) * args.dims;
    for (int64_t d = 0; d < args.dims; ++d) narrow(sums[d], out[d]);
  }
};

template <class Body>
FASTZOO_INLINE void with_margin(const MarginArgs& args, const Body& body) {
  with_product(args.dtype, args.bfloat16_products, [&](auto element, auto multiply) {
    body(Margin<decltype(element), decltype(multiply)>(args));
  });
}

}  // namespace

void margin_plan(const MarginArgs& args, MarginPlan& plan) {
  with_margin(args, [&](const auto& margin) {
    plan.bytes = margin.bytes;
    plan.blocks = margin.pairs.blocks();
    plan.chunks = margin.chunks();
  });
}

void margin_prepare(const MarginArgs& args, int64_t begin, int64_t end) {
  with_margin(args, [&](const auto& margin) {
    for (int64_t block = begin; block < end; ++block) margin.prepare(block);
  });
}

void margin_part(const MarginArgs& args, int part) {
  with_margin(args, [&](const auto& margin) { margin.run(part); });
}

void margin_finish(const MarginArgs& args, int64_t begin, int64_t end, double* sums) {
  with_margin(args, [&](const auto& margin) {
    for (int64_t block = begin; block < end; ++block) margin.finish(block, sums);
  });
}

template <class T>
static void target_rows(const MarginTargetArgs& args, int64_t begin, int64_t end) {
  const auto in = [](const void* array, int64_t n) {
    return static_cast<double>(static_cast<const T*>(array)[n]);
  };
  const auto out = [](double value, void* array, int64_t n) {
    static_cast<T*>(array)[n] = static_cast<T>(value);
  };
  for (int64_t n = begin; n < end; ++n) {
    const double cosine = in(args.cosine, n), m1 = in(args.m1, n), m2 = in(args.m2, n);
    if (args.grad == nullptr) {
      out(math::margin_target(args.rule, cosine, m1, m2, in(args.m3, n)), args.value, n);
      continue;
    }
    const math::MarginSlopes slopes = math::margin_target_slopes(args.rule, cosine, m1, m2);
    const double grad = in(args.grad, n);
    out(grad * slopes.cosine, args.grad_cosine, n);
    out(grad * slopes.m1, args.grad_m1, n);
    out(grad * slopes.m2, args.grad_m2, n);
    out(-grad, args.grad_m3, n);
  }
}

void margin_target(const MarginTargetArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == Dtype::float64) {
    target_rows<double>(args, begin, end);
  } else {
    target_rows<float>(args, begin, end);
  }
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
