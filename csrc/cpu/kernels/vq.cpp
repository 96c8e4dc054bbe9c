// Nearest-codebook lookup: a fast pass of the tile product over packed codes, whose epilogue keeps,
// for each row, every code that could be the answer; those are then scored exactly. csrc/math/vq.h
// defines the answer and proves the bound.
#include "vq.h"

#include "../runtime/convert.h"
#include "../runtime/tile_gemm.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::Metric;

constexpr double kInfinity = __builtin_inf();

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float lowest = -0x1.fffffep127f;
  static constexpr double largest = 0x1.fffffep127;
  static constexpr double smallest = 0x1p-126;
  static constexpr double unit = 0x1p-24;
};
template <>
struct Limits<double> {
  static constexpr double lowest = -0x1.fffffffffffffp1023;
  static constexpr double largest = 0x1.fffffffffffffp1023;
  static constexpr double smallest = 0x1p-1022;
  static constexpr double unit = 0x1p-53;
};

FASTZOO_INLINE double exact_score(Metric metric, double sum, double norm) {
  if (metric == Metric::l2) return -sum;
  return metric == Metric::cosine ? sum / math::maximum(norm, math::kNormFloor) : sum;
}

struct Winner {
  double score;
  int64_t code;

  // Ties go to the lower index.
  void consider(double other, int64_t other_code) {
    const bool wins = code < 0 || math::better(other, score) ||
                      (other_code < code && !math::better(score, other));
    if (!wins) return;
    score = other;
    code = other_code;
  }
};

// The sums of squares of packed rows: lines [depth][kCount].
template <int kCount, class T>
FASTZOO_INLINE void add_squares(const T* lines, int64_t depth, double (&squares)[kCount]) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < kCount; ++i) {
      const double value = lines[k * kCount + i];
      squares[i] += value * value;
    }
  }
}

template <class Element>
struct Codes {
  using T = typename ComputeOf<Element>::type;
  using Gemm = TileGemm<T>;

  const VqArgs& args;
  const Element* codebook = static_cast<const Element*>(args.codebook);
  T* centre = static_cast<T*>(args.centre);
  T* panels = static_cast<T*>(args.panels);
  int64_t panel_size = Gemm::left_panel_size(args.dims);

  const Element* code(int64_t index) const { return codebook + index * args.dims; }
  T* start(int64_t index) const {
    return panels + index / Gemm::kRows * panel_size + index % Gemm::kRows;
  }

  // The mean of the codes, whatever is not finite left out: any vector will do.
  void find_centre(int64_t begin, int64_t end) const {
    constexpr int64_t kBlock = 64;
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = end - first < kBlock ? end - first : kBlock;
      double sums[kBlock] = {};
      for (int64_t row = 0; row < args.codes; ++row) {
        const Element* values = code(row) + first;
        for (int64_t i = 0; i < count; ++i) {
          const double value = widen(values[i]);
          sums[i] += value - value == 0 ? value : 0;
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const T mean = static_cast<T>(sums[i] / static_cast<double>(args.codes));
        centre[first + i] = mean - mean == 0 ? mean : T(0);
      }
    }
  }

  void pack(int64_t panel) const {
    const int64_t first = panel * Gemm::kRows;
    T* starts = panels + panel * panel_size;
    T* lines = starts + Gemm::kRows;
    double scale[Gemm::kRows];
    const int64_t valid = args.codes - first < Gemm::kRows ? args.codes - first : Gemm::kRows;
    if (args.metric == Metric::cosine) {
      double sums[Gemm::kRows] = {};
      for (int64_t k = 0; k < args.dims; ++k) {
        for (int64_t i = 0; i < valid; ++i) {
          const double value = widen(code(first + i)[k]);
          sums[i] += value * value;
        }
      }
      for (int64_t i = 0; i < valid; ++i) {
        args.norms[first + i] = __builtin_sqrt(sums[i]);
        scale[i] = math::maximum(args.norms[first + i], math::kNormFloor);
      }
    }
    switch (args.metric) {
      case Metric::l2:
        pack_lines<Gemm::kRows>(lines, first, args.codes, args.dims, [&](int64_t row, int64_t k) {
          return static_cast<T>(widen(code(row)[k])) - centre[k];
        });
        break;
      case Metric::cosine:
        pack_lines<Gemm::kRows>(lines, first, args.codes, args.dims, [&](int64_t row, int64_t k) {
          return static_cast<T>(widen(code(row)[k]) / scale[row - first]);
        });
        break;
      case Metric::dot:
        pack_lines<Gemm::kRows>(lines, first, args.codes, args.dims, [&](int64_t row, int64_t k) {
          return static_cast<T>(widen(code(row)[k]));
        });
        break;
    }
    double squares[Gemm::kRows] = {};
    add_squares<Gemm::kRows>(lines, args.dims, squares);
    for (int64_t i = 0; i < Gemm::kRows; ++i) {
      if (i >= valid) {
        starts[i] = -static_cast<T>(kInfinity);
        continue;
      }
      starts[i] = args.metric == Metric::l2 ? static_cast<T>(-squares[i] / 2) : T(0);
      args.squares[first + i] = squares[i];
    }
  }

  bool equal(int64_t a, int64_t b) const {
    for (int64_t k = 0; k < args.dims; ++k) {
      if (!(widen(code(a)[k]) == widen(code(b)[k]))) return false;
    }
    return true;
  }

  // True where an equal code precedes this one: it cannot be the answer. The table holds one code
  // of each kind, found by its square.
  bool repeats(int64_t index, int32_t* table, int64_t table_size) const {
    uint64_t hash = math::bits_as<uint64_t>(args.squares[index]) * 0x9e3779b97f4a7c15u;
    for (hash >>= 20;; ++hash) {
      int32_t& slot = table[hash & static_cast<uint64_t>(table_size - 1)];
      if (slot < 0) {
        slot = static_cast<int32_t>(index);
        return false;
      }
      if (args.squares[slot] == args.squares[index] && equal(slot, index)) return true;
    }
  }

  // The bound grows with the longest code, so a few that are far longer than the rest would make
  // nearly every code a candidate. Returns the square beyond which a code is such an outlier: 2^8
  // to 2^9 times the geometric mean, unless that makes too many.
  double outlier_square() const {
    int64_t exponents = 0;
    int64_t counted = 0;
    for (int64_t index = 0; index < args.codes; ++index) {
      const double square = args.squares[index];
      if (!(square > 0 && square < kInfinity)) continue;
      exponents += static_cast<int64_t>(math::bits_as<uint64_t>(square) >> 52);
      ++counted;
    }
    if (counted == 0) return kInfinity;
    const int64_t exponent = exponents / counted + 9;
    if (exponent >= 2047) return kInfinity;
    const double limit = math::bits_as<double>(static_cast<uint64_t>(exponent) << 52);
    int64_t beyond = 0;
    for (int64_t index = 0; index < args.codes; ++index) beyond += args.squares[index] > limit;
    return beyond <= 1 + args.codes / 256 ? limit : kInfinity;
  }

  // Codes that repeat an earlier one leave the race; outliers and those that are not finite, or
  // whose norm is not, leave it too and are listed, to be scored exactly for every row.
  void select(VqArgs& result, int32_t* table, int64_t table_size) const {
    for (int64_t i = 0; i < table_size; ++i) table[i] = -1;
    result.loose_count = 0;
    double largest_square = 0;
    result.largest_cosine_norm = 0;
    const double limit = outlier_square();
    for (int64_t index = 0; index < args.codes; ++index) {
      const double square = args.squares[index];
      const double cosine_norm = args.metric == Metric::cosine ? args.norms[index] : 0;
      if (!(square <= limit && square < kInfinity && cosine_norm < kInfinity)) {
        args.loose[result.loose_count++] = static_cast<int32_t>(index);
        T* column = start(index);
        for (int64_t k = 0; k <= args.dims; ++k) column[k * Gemm::kRows] = T(0);
        *column = -static_cast<T>(kInfinity);
      } else if (repeats(index, table, table_size)) {
        *start(index) = -static_cast<T>(kInfinity);
      } else {
        largest_square = math::maximum(largest_square, square);
        result.largest_cosine_norm = math::maximum(result.largest_cosine_norm, cosine_norm);
      }
    }
    result.largest_norm = math::norm_above(largest_square, args.dims);
  }
};

// One tile's scores of one row, kept because some of its codes could be the answer.
template <class T>
struct Candidates {
  int32_t code;  // the tile's first
  T top;         // the highest score
  T scores[TileGemm<T>::kRows];
};

// The state of the rows of one block, one slot a row.
template <class Element>
struct Rows {
  using T = typename ComputeOf<Element>::type;
  using V = Vec<T>;
  using Gemm = TileGemm<T>;

  static constexpr int kTiles = 8;  // kept for one row
  static constexpr int64_t kBlockRows = 512;
  static constexpr int64_t kBlockBytes = 512 << 10;
  static constexpr int64_t kAllBlocksBytes = 8 << 20;

  const Codes<Element>& codes;
  int64_t first = 0;  // the block's first row
  T* panels;
  T* best;       // the highest fast score so far; infinite where the fast pass proves nothing
  T* margin;     // twice the bound
  T* threshold;  // best - margin: a code below it cannot be the answer
  int32_t* counts;
  Candidates<T>* candidates;  // [rows][kTiles]
  Winner* winners;            // among the codes already scored exactly

  static int64_t bytes_a_row(const VqArgs& args) {
    return (args.dims + 3) * sizeof(T) + sizeof(int32_t) + kTiles * sizeof(Candidates<T>) +
           sizeof(Winner);
  }

  // A multiple of the panel, small enough for the block to stay in cache.
  static int64_t block_rows(const VqArgs& args) {
    const int64_t share = kAllBlocksBytes / args.threads;
    const int64_t fitting = (share < kBlockBytes ? share : kBlockBytes) / bytes_a_row(args);
    const int64_t rows = fitting < kBlockRows ? fitting : kBlockRows;
    return rows < Gemm::kColumns ? Gemm::kColumns : rows / Gemm::kColumns * Gemm::kColumns;
  }

  static int64_t bytes(const VqArgs& args) { return block_rows(args) * bytes_a_row(args); }

  // Every part is aligned for the next one, as block_rows is a multiple of kColumns.
  Rows(const Codes<Element>& codes, void* workspace) : codes(codes) {
    const int64_t count = block_rows(codes.args);
    char* next = static_cast<char*>(workspace);
    const auto take = [&](int64_t size) {
      char* taken = next;
      next += size;
      return taken;
    };
    panels = reinterpret_cast<T*>(take(count * codes.args.dims * sizeof(T)));
    best = reinterpret_cast<T*>(take(count * sizeof(T)));
    margin = reinterpret_cast<T*>(take(count * sizeof(T)));
    threshold = reinterpret_cast<T*>(take(count * sizeof(T)));
    winners = reinterpret_cast<Winner*>(take(count * sizeof(Winner)));
    candidates = reinterpret_cast<Candidates<T>*>(take(count * kTiles * sizeof(Candidates<T>)));
    counts = reinterpret_cast<int32_t*>(take(count * sizeof(int32_t)));
  }

  const Element* x(int64_t slot) const {
    return static_cast<const Element*>(codes.args.x) + (first + slot) * codes.args.dims;
  }

  void begin(int64_t count) const {
    const VqArgs& args = codes.args;
    for (int64_t column = 0; column < count; column += Gemm::kColumns) {
      T* lines = panels + column * args.dims;
      if (args.metric == Metric::l2) {
        pack_lines<Gemm::kColumns>(lines, column, count, args.dims, [&](int64_t slot, int64_t k) {
          return static_cast<T>(widen(x(slot)[k])) - codes.centre[k];
        });
      } else {
        pack_lines<Gemm::kColumns>(lines, column, count, args.dims, [&](int64_t slot, int64_t k) {
          return static_cast<T>(widen(x(slot)[k]));
        });
      }
      double squares[Gemm::kColumns] = {};
      add_squares<Gemm::kColumns>(lines, args.dims, squares);
      for (int i = 0; i < Gemm::kColumns; ++i) {
        const bool proves = column + i < count && set_margin(column + i, squares[i]);
        if (!proves) {
          best[column + i] = threshold[column + i] = static_cast<T>(kInfinity);
          margin[column + i] = T(0);
          for (int64_t k = 0; k < args.dims; ++k) lines[k * Gemm::kColumns + i] = T(0);
        }
        counts[column + i] = 0;
        winners[column + i] = {0, -1};
      }
    }
  }

  // False where the fast pass proves nothing: values that are not finite, or sums that could
  // overflow.
  bool set_margin(int64_t slot, double square) const {
    const VqArgs& args = codes.args;
    const double a = math::norm_above(square, args.dims);
    const double b = args.largest_norm;
    const double bound =
        math::score_bound(args.metric, args.dims, a, b, 0, 0, Limits<T>::unit, Limits<T>::smallest);
    const double size = args.metric == Metric::l2 ? (a + b) * (a + b) / 2 : a * b;
    // The subtraction best - margin rounds too; size bounds both of its ends.
    const double wanted = (2 * bound + 2 * Limits<T>::unit * (size + 2 * bound)) * (1 + 0x1p-20);
    const double limit = Limits<T>::largest / 4;
    if (!(size < limit && wanted < limit && a * args.largest_cosine_norm < limit)) return false;
    best[slot] = threshold[slot] = Limits<T>::lowest;
    margin[slot] = static_cast<T>(wanted);
    return true;
  }

  // The first codes are met twice. A row's early tiles nearly all beat its best so far, each for
  // the price of a mispredicted branch; this many, met without a branch, spare more of that than
  // they cost.
  static int64_t seeds(const VqArgs& args) {
    const int64_t panels = 256 / args.dims;
    const int64_t most = Gemm::left_panels(args.codes) / 8;
    return (panels < most ? panels : most) * Gemm::kRows;
  }

  // The highest score of a tile for each row.
  __attribute__((always_inline)) static void highest_of(const typename Gemm::Tile& tile,
                                                        V (&top)[2]) {
    static_assert(Gemm::kRows % 3 == 0, "three chains, so that none is long");
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      V chains[3] = {tile[0][j], tile[1][j], tile[2][j]};
#pragma GCC unroll 16
      for (int i = 3; i < Gemm::kRows; ++i) chains[i % 3] = maximum(chains[i % 3], tile[i][j]);
      top[j] = maximum(maximum(chains[0], chains[1]), chains[2]);
    }
  }

  __attribute__((always_inline)) void raise(int64_t slot, const V (&top)[2]) const {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int64_t lane = slot + j * V::size;
      const V highest = maximum(V::load(best + lane), top[j]);
      highest.store(best + lane);
      // Codes out of the race score -inf and stay below the lowest finite number.
      maximum(V(Limits<T>::lowest), highest - V::load(margin + lane)).store(threshold + lane);
    }
  }

  // The epilogue of the seeds.
  __attribute__((always_inline)) void seed(int64_t slot, const typename Gemm::Tile& tile) const {
    V top[2];
    highest_of(tile, top);
    raise(slot, top);
  }

  // The epilogue: most tiles hold nothing that could be an answer, and cost one branch.
  __attribute__((always_inline)) void meet(int64_t code, int64_t slot,
                                           const typename Gemm::Tile& tile) const {
    V top[2];
    highest_of(tile, top);
    const uint32_t hits = not_less(top[0], V::load(threshold + slot)).bits |
                          not_less(top[1], V::load(threshold + slot + V::size)).bits << V::size;
    if (__builtin_expect(hits == 0, 1)) return;
    raise(slot, top);
    alignas(kVectorBytes) T scores[Gemm::kRows + 1][Gemm::kColumns];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 16
      for (int i = 0; i < Gemm::kRows; ++i) tile[i][j].store(scores[i] + j * V::size);
      top[j].store(scores[Gemm::kRows] + j * V::size);
    }
    keep(code, slot, hits, scores);
  }

  __attribute__((noinline)) void keep(int64_t code, int64_t slot, uint32_t hits,
                                      const T (*scores)[Gemm::kColumns]) const {
    for (; hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      Candidates<T>* const list = candidates + (slot + lane) * kTiles;
      int32_t& count = counts[slot + lane];
      // As a rule the new best beats the one before it, and the list stays short.
      count -= count > 0 && list[count - 1].top < threshold[slot + lane];
      if (count == kTiles) make_room(slot + lane);
      Candidates<T>& kept = list[count++];
      kept.code = static_cast<int32_t>(code);
      kept.top = scores[Gemm::kRows][lane];
      for (int i = 0; i < Gemm::kRows; ++i) kept.scores[i] = scores[i][lane];
    }
  }

  void make_room(int64_t slot) const {
    Candidates<T>* const list = candidates + slot * kTiles;
    int kept = 0;
    for (int i = 0; i < counts[slot]; ++i) {
      if (!(list[i].top < threshold[slot])) list[kept++] = list[i];
    }
    counts[slot] = kept;
    if (kept < kTiles) return;
    int32_t survivors[kTiles * Gemm::kRows + 1];
    settle(slot, survivors, survive(slot, survivors));
  }

  // The codes that the threshold leaves, in ascending order.
  int survive(int64_t slot, int32_t* survivors) const {
    int count = 0;
    for (int t = 0; t < counts[slot]; ++t) {
      const Candidates<T>& tile = candidates[slot * kTiles + t];
      for (int i = 0; i < Gemm::kRows; ++i) {
        survivors[count] = tile.code + i;
        count += !(tile.scores[i] < threshold[slot]);
      }
    }
    return count;
  }

  // Scores the survivors exactly and keeps the winner alone.
  void settle(int64_t slot, const int32_t* survivors, int count) const {
    consider(slot, count, [&](int64_t i) { return survivors[i]; });
    counts[slot] = 0;
  }

  // Scores index(0) .. index(count - 1) exactly; a few at once, as each sum is one long chain.
  template <class Index>
  void consider(int64_t slot, int64_t count, const Index& index) const {
    constexpr int kAtOnce = 4;
    const VqArgs& args = codes.args;
    const Element* values = x(slot);
    for (int64_t i = 0; i < count; i += kAtOnce) {
      const Element* others[kAtOnce];
      for (int j = 0; j < kAtOnce; ++j) {
        others[j] = codes.code(index(i + j < count ? i + j : i));
      }
      double sums[kAtOnce] = {};
      for (int64_t k = 0; k < args.dims; ++k) {
        const double value = widen(values[k]);
        for (int j = 0; j < kAtOnce; ++j) {
          sums[j] += math::score_term(args.metric, value, widen(others[j][k]));
        }
      }
      for (int j = 0; j < kAtOnce && i + j < count; ++j) {
        const int64_t code = index(i + j);
        const double norm = args.metric == Metric::cosine ? args.norms[code] : 1;
        winners[slot].consider(exact_score(args.metric, sums[j], norm), code);
      }
    }
  }

  int64_t answer(int64_t slot) const {
    const VqArgs& args = codes.args;
    if (best[slot] == static_cast<T>(kInfinity)) {
      consider(slot, args.codes, [](int64_t i) { return i; });
      return winners[slot].code;
    }
    int32_t survivors[kTiles * Gemm::kRows + 1];
    const int count = survive(slot, survivors);
    if (count == 1 && winners[slot].code < 0 && args.loose_count == 0) return survivors[0];
    settle(slot, survivors, count);
    consider(slot, args.loose_count, [&](int64_t i) { return args.loose[i]; });
    return winners[slot].code;
  }

  T distance(int64_t slot, int64_t index) const {
    const VqArgs& args = codes.args;
    const Element* a = x(slot);
    const Element* b = codes.code(index);
    if (args.metric == Metric::l2) {
      return static_cast<T>(wide_sum(args.dims, [&](int64_t k) {
        return math::score_term(Metric::l2, widen(a[k]), widen(b[k]));
      }));
    }
    const double sum = wide_sum(args.dims, [&](int64_t k) {
      return math::score_term(Metric::dot, widen(a[k]), widen(b[k]));
    });
    if (args.metric == Metric::dot) return static_cast<T>(sum);
    const double square = wide_sum(args.dims, [&](int64_t k) {
      const double value = widen(a[k]);
      return value * value;
    });
    return static_cast<T>(sum / (math::maximum(args.norms[index], math::kNormFloor) *
                                 math::maximum(__builtin_sqrt(square), math::kNormFloor)));
  }
};

template <class Element>
void lookup(const VqArgs& args, int64_t begin, int64_t end, void* workspace) {
  using T = typename ComputeOf<Element>::type;
  using Gemm = TileGemm<T>;
  const Codes<Element> codes{args};
  Rows<Element> rows(codes, workspace);
  const int64_t block = Rows<Element>::block_rows(args);
  for (rows.first = begin; rows.first < end; rows.first += block) {
    const int64_t count = end - rows.first < block ? end - rows.first : block;
    rows.begin(count);
    Gemm::run(codes.panels, Rows<Element>::seeds(args), rows.panels, count, args.dims,
              [&rows](int64_t, int64_t slot, const typename Gemm::Tile& tile)
                  __attribute__((always_inline)) { rows.seed(slot, tile); });
    Gemm::run(codes.panels, args.codes, rows.panels, count, args.dims,
              [&rows](int64_t code, int64_t slot, const typename Gemm::Tile& tile)
                  __attribute__((always_inline)) { rows.meet(code, slot, tile); });
    int64_t* const indices = args.indices + rows.first;
    for (int64_t slot = 0; slot < count; ++slot) {
      indices[slot] = rows.answer(slot);
      // The codes lie all over the codebook: fetch them before the distances want them.
      __builtin_prefetch(codes.code(indices[slot]));
    }
    T* const distances = static_cast<T*>(args.distance) + rows.first;
    for (int64_t slot = 0; slot < count; ++slot) {
      distances[slot] = rows.distance(slot, indices[slot]);
    }
  }
}

// The gradient of d by one side, u, where v is the other. For l2 the difference is taken first, or
// an offset of both sides would cancel late.
struct Slope {
  Metric metric;
  double weight;
  double shrink;

  double at(double u, double v) const {
    switch (metric) {
      case Metric::l2:
        return weight * (v - u);
      case Metric::dot:
        return weight * v;
      case Metric::cosine:
        break;
    }
    return weight * v - shrink * u;
  }
};

// Gradients of the distance between a row and its code, for both sides at once: `own` is the side
// that is differentiated. For l2, 2 g (own - other).
template <class Element>
Slope slope(const VqBackwardArgs& args, double grad, const Element* own, const Element* other) {
  switch (args.metric) {
    case Metric::l2:
      return {Metric::l2, -2 * grad, 0};
    case Metric::dot:
      return {Metric::dot, grad, 0};
    case Metric::cosine:
      break;
  }
  double dot = 0, own_square = 0, other_square = 0;
  dot = wide_sum(args.dims, [&](int64_t k) {
    return math::score_term(Metric::dot, widen(own[k]), widen(other[k]));
  });
  own_square = wide_sum(args.dims, [&](int64_t k) {
    const double value = widen(own[k]);
    return value * value;
  });
  other_square = wide_sum(args.dims, [&](int64_t k) {
    const double value = widen(other[k]);
    return value * value;
  });
  const double own_norm = __builtin_sqrt(own_square);
  const double own_floored = math::maximum(own_norm, math::kNormFloor);
  const double both = own_floored * math::maximum(__builtin_sqrt(other_square), math::kNormFloor);
  // Where the floor rules, the norm is a constant.
  const double shrink = own_norm > math::kNormFloor ? dot / both / own_square : 0;
  return {Metric::cosine, grad / both, grad * shrink};
}

}  // namespace

void vq_plan(const VqArgs& args, VqPlan& plan) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using Gemm = typename Codes<Element>::Gemm;
    plan.code_panels = Gemm::left_panels(args.codes);
    plan.panels_bytes = plan.code_panels * Gemm::left_panel_size(args.dims) *
                        static_cast<int64_t>(sizeof(typename Codes<Element>::T));
    plan.workspace_bytes = Rows<Element>::bytes(args);
  });
  plan.table_size = 4;
  while (plan.table_size < 4 * args.codes) plan.table_size *= 2;
}

void vq_centre(const VqArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype,
               [&](auto element) { Codes<decltype(element)>{args}.find_centre(begin, end); });
}

void vq_pack(const VqArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    const Codes<decltype(element)> codes{args};
    for (int64_t panel = begin; panel < end; ++panel) codes.pack(panel);
  });
}

void vq_select(VqArgs& args, int32_t* table, int64_t table_size) {
  with_element(args.dtype, [&](auto element) {
    Codes<decltype(element)>{args}.select(args, table, table_size);
  });
}

void vq_lookup(const VqArgs& args, int64_t begin, int64_t end, void* workspace) {
  with_element(args.dtype,
               [&](auto element) { lookup<decltype(element)>(args, begin, end, workspace); });
}

void vq_backward_x(const VqBackwardArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    const int64_t dims = args.dims;
    for (int64_t row = begin; row < end; ++row) {
      const Element* x = static_cast<const Element*>(args.x) + row * dims;
      const Element* code = static_cast<const Element*>(args.codebook) + args.indices[row] * dims;
      const Slope by_x = slope(args, static_cast<const T*>(args.grad)[row], x, code);
      Element* grad_x = static_cast<Element*>(args.grad_x) + row * dims;
      for (int64_t k = 0; k < dims; ++k) {
        narrow(by_x.at(widen(x[k]), widen(code[k])), grad_x[k]);
      }
    }
  });
}

void vq_backward_codebook(const VqBackwardArgs& args, int64_t begin, int64_t end, double* sums) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    const int64_t dims = args.dims;
    for (int64_t index = begin; index < end; ++index) {
      const Element* code = static_cast<const Element*>(args.codebook) + index * dims;
      for (int64_t k = 0; k < dims; ++k) sums[k] = 0;
      for (int64_t i = args.code_begins[index]; i < args.code_begins[index + 1]; ++i) {
        const int64_t row = args.order[i];
        const Element* x = static_cast<const Element*>(args.x) + row * dims;
        const Slope by_code = slope(args, static_cast<const T*>(args.grad)[row], code, x);
        for (int64_t k = 0; k < dims; ++k) {
          sums[k] += by_code.at(widen(code[k]), widen(x[k]));
        }
      }
      Element* grad_code = static_cast<Element*>(args.grad_codebook) + index * dims;
      for (int64_t k = 0; k < dims; ++k) narrow(sums[k], grad_code[k]);
    }
  });
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
