// Nearest-codebook lookup: a fast pass of the tile product over packed codes keeps, for each row,
// the few panels of codes that could hold the answer; their codes are then scored ever more
// exactly. csrc/math/vq.h defines the answer and proves the bound.
#include "vq.h"

#include "../runtime/arena.h"
#include "../runtime/tile_product.h"

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

struct Scored {
  double score;
  int64_t code;

  // Ties go to the lower index.
  bool precedes(const Scored& other) const {
    return math::better(score, other.score) ||
           (code < other.code && !math::better(other.score, score));
  }
};

// The k best of what it is shown, a heap whose first is the last of them.
struct Best {
  Scored* heap;
  int64_t k;
  int64_t count = 0;

  void consider(const Scored& scored) {
    if (count < k) {
      int64_t at = count++;
      for (; at > 0 && heap[(at - 1) / 2].precedes(scored); at = (at - 1) / 2) {
        heap[at] = heap[(at - 1) / 2];
      }
      heap[at] = scored;
    } else if (scored.precedes(heap[0])) {
      sink(scored, count);
    }
  }

  // Puts a new one in the place of the first.
  void sink(const Scored& scored, int64_t size) {
    int64_t at = 0;
    for (int64_t child = 1; child < size; child = 2 * at + 1) {
      child += child + 1 < size && heap[child].precedes(heap[child + 1]);
      if (!scored.precedes(heap[child])) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = scored;
  }

  void sort() {
    for (int64_t size = count - 1; size > 0; --size) {
      const Scored last = heap[size];
      heap[size] = heap[0];
      sink(last, size);
    }
  }
};

// The k-th largest of values, which are reordered.
template <class T>
T kth_largest(T* values, int64_t count, int64_t k) {
  int64_t first = 0, last = count - 1;
  while (first < last) {
    const T pivot = values[first + (last - first) / 2];
    int64_t i = first, j = last;
    while (i <= j) {
      while (values[i] > pivot) ++i;
      while (pivot > values[j]) --j;
      if (i > j) break;
      const T swapped = values[i];
      values[i++] = values[j];
      values[j--] = swapped;
    }
    if (k - 1 <= j) {
      last = j;
    } else if (k - 1 >= i) {
      first = i;
    } else {
      break;
    }
  }
  return values[k - 1];
}

// Packs kCount vectors, side by side in lines, as the product sees them.
template <class M, int kCount>
struct Packer {
  using T = typename M::Sum;
  using V = Vec<T>;
  using Word = typename M::Word;
  static constexpr int kSize = V::size;
  static constexpr int kLanes = (kCount + kSize - 1) / kSize * kSize;

  double squares[kLanes];  // of each vector
  double lost[kLanes];     // of what the product does not see of it

  // `count` vectors of `dims` elements, zeros for the others: each the elements, minus the centre
  // where there is one, over its scale where there are scales.
  template <class Element>
  void run(const Element* const* vectors, int64_t count, int64_t dims, const T* centre,
           const double* scales, Word* lines) {
    for (int first = 0; first < kLanes; first += kSize) {
      constexpr int kSums = kSize / Vec<double>::size;
      Vec<double> all[kSums], missing[kSums];
      for (int i = 0; i < kSums; ++i) all[i] = missing[i] = Vec<double>(0.0);
      for (int64_t d = 0; d < dims; d += kSize) {
        V block[kSize];
        const V middle = centre == nullptr ? V(T(0)) : load_some(centre + d, dims - d);
#pragma GCC unroll 16
        for (int i = 0; i < kSize; ++i) {
          block[i] =
              first + i < count ? load_some(vectors[first + i] + d, dims - d) - middle : V(T(0));
        }
        transpose(block);
        if (scales != nullptr) divide(block, scales + first, count - first);
#pragma GCC unroll 16
        for (int i = 0; i < kSize; ++i) add_squares(block[i], all);
        if constexpr (M::kEach == 2) {
#pragma GCC unroll 8
          for (int i = 0; i < kSize; i += 2) {
            if (d + i >= dims) break;
            const V low = M::operand(block[i]), high = M::operand(block[i + 1]);
            add_squares(block[i] - low, missing);
            add_squares(block[i + 1] - high, missing);
            const auto words = M::words(low, high);
            store(&words, first, lines + (d + i) / 2 * kCount);
          }
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < kSize; ++i) {
            if (d + i < dims) store(&block[i], first, lines + (d + i) * kCount);
          }
        }
      }
      for (int i = 0; i < kSums; ++i) {
        all[i].store(squares + first + i * Vec<double>::size);
        missing[i].store(lost + first + i * Vec<double>::size);
      }
    }
  }

 private:
  template <class Element>
  __attribute__((always_inline)) static V load_some(const Element* from, int64_t left) {
    if (left >= kSize) return load_wide(from);
    T values[kSize];
    for (int i = 0; i < kSize; ++i) values[i] = i < left ? static_cast<T>(widen(from[i])) : T(0);
    return V::load(values);
  }

  static void divide(V (&block)[kSize], const double* scales, int64_t count) {
    for (int i = 0; i < kSize; ++i) {
      T values[kSize];
      block[i].store(values);
      for (int j = 0; j < kSize && j < count; ++j)
        values[j] = static_cast<T>(values[j] / scales[j]);
      block[i] = V::load(values);
    }
  }

  __attribute__((always_inline)) static void store(const void* words, int first, Word* line) {
    constexpr int kLast = kCount % kSize == 0 ? kSize : kCount % kSize;
    if (first + kSize <= kCount) {
      __builtin_memcpy(line + first, words, kSize * sizeof(Word));
    } else {
      __builtin_memcpy(line + first, words, kLast * sizeof(Word));
    }
  }
};

template <class Element, class M>
struct Codes {
  using Product = TileProduct<M>;
  using T = typename Product::T;
  using Word = typename Product::Word;
  static constexpr int kRows = Product::kRows;
  static constexpr bool kRounds = M::kEach == 2;  // whether products see values rounded

  const VqArgs& args;
  const Element* codebook = static_cast<const Element*>(args.codebook);
  T* centre = static_cast<T*>(args.centre);
  T* starts = static_cast<T*>(args.starts);
  Word* lines = static_cast<Word*>(args.lines);
  int64_t depth = (args.dims + M::kEach - 1) / M::kEach;
  int64_t panels = (args.codes + kRows - 1) / kRows;

  const Element* code(int64_t index) const { return codebook + index * args.dims; }
  Word* panel(int64_t index) const { return lines + index * depth * kRows; }
  Word* column(int64_t index) const { return panel(index / kRows) + index % kRows; }

  // Bytes of starts and lines. Both are read a vector at a time, beyond the end of the last panel.
  int64_t starts_bytes() const {
    return panels * kRows * static_cast<int64_t>(sizeof(T)) + kVectorBytes;
  }
  int64_t lines_bytes() const {
    return panels * depth * kRows * static_cast<int64_t>(sizeof(Word)) + kVectorBytes;
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

  void pack(int64_t index) const {
    const int64_t first = index * kRows;
    const int64_t valid = args.codes - first < kRows ? args.codes - first : kRows;
    if (args.metric == Metric::cosine) {
      double sums[kRows] = {};
      for (int64_t k = 0; k < args.dims; ++k) {
        for (int64_t i = 0; i < valid; ++i) {
          const double value = widen(code(first + i)[k]);
          sums[i] += value * value;
        }
      }
      for (int64_t i = 0; i < valid; ++i) args.norms[first + i] = __builtin_sqrt(sums[i]);
    }
    const Element* vectors[kRows];
    double scales[kRows];
    for (int64_t i = 0; i < valid; ++i) {
      vectors[i] = code(first + i);
      if (args.metric == Metric::cosine) {
        scales[i] = math::maximum(args.norms[first + i], math::kNormFloor);
      }
    }
    Packer<M, kRows> packer;
    packer.run(vectors, valid, args.dims, args.metric == Metric::l2 ? centre : nullptr,
               args.metric == Metric::cosine ? scales : nullptr, panel(index));
    for (int64_t i = 0; i < valid; ++i) {
      starts[first + i] = args.metric == Metric::l2 ? static_cast<T>(-packer.squares[i] / 2) : T(0);
      args.squares[first + i] = packer.squares[i];
      if constexpr (kRounds) args.lost[first + i] = packer.lost[i];
    }
    for (int64_t i = valid; i < kRows; ++i) drop(first + i);
  }

  // Takes a code, or the place of one, out of the race.
  void drop(int64_t index) const {
    for (int64_t k = 0; k < depth; ++k) column(index)[k * kRows] = Word(0);
    starts[index] = -static_cast<T>(kInfinity);
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

  // Where one answer is wanted, codes that repeat an earlier one leave the race. Outliers and those
  // that are not finite, or whose norm is not, leave it too and are listed, to be scored exactly
  // for every row.
  void select(VqArgs& result, int32_t* table, int64_t table_size) const {
    for (int64_t i = 0; i < table_size; ++i) table[i] = -1;
    result.loose_count = 0;
    double largest_square = 0, largest_lost = 0;
    result.largest_cosine_norm = 0;
    const double limit = outlier_square();
    for (int64_t index = 0; index < args.codes; ++index) {
      const double square = args.squares[index];
      const double cosine_norm = args.metric == Metric::cosine ? args.norms[index] : 0;
      if (!(square <= limit && square < kInfinity && cosine_norm < kInfinity)) {
        args.loose[result.loose_count++] = static_cast<int32_t>(index);
        drop(index);
      } else if (args.k == 1 && repeats(index, table, table_size)) {
        drop(index);
      } else {
        largest_square = math::maximum(largest_square, square);
        if constexpr (kRounds) largest_lost = math::maximum(largest_lost, args.lost[index]);
        result.largest_cosine_norm = math::maximum(result.largest_cosine_norm, cosine_norm);
      }
    }
    result.largest_norm = math::norm_above(largest_square, args.dims);
    result.largest_lost = kRounds ? math::norm_above(largest_lost, args.dims) : 0;
  }
};

// The state of the rows of one block, one slot a row.
template <class Element, class M>
struct Rows {
  using Product = TileProduct<M>;
  using T = typename Product::T;
  using Word = typename Product::Word;
  using V = typename Product::V;
  static constexpr int kRows = Product::kRows;
  static constexpr int kColumns = Product::kColumns;
  static constexpr bool kRounds = Codes<Element, M>::kRounds;

  static constexpr int kKept = 16;  // panels listed for one row
  static constexpr int64_t kMostRows = 512;
  static constexpr int64_t kRowsBytes = 512 << 10;
  static constexpr int64_t kAllRowsBytes = 8 << 20;
  // Code panels that are met again by every panel of rows stay in a half of a small L2, and the log
  // of their tiles beside them.
  static constexpr int64_t kCodesBytes = 448 << 10;
  static constexpr int64_t kMostLogged = 512;

  // A panel of codes that could hold the answer, and its highest score.
  struct Kept {
    int32_t panel;
    T top;
  };

  const Codes<Element, M>& codes;
  const VqArgs& args = codes.args;
  const int64_t depth = codes.depth;

  int64_t* row;       // that stands in a slot
  Word* panels;       // [block / kColumns][depth][kColumns]
  T* best;            // the highest score so far; infinite where the fast pass proves nothing
  T* margin;          // twice the bound
  T* threshold;       // best - margin: a code below it cannot be the answer
  double* norm;       // |x'|
  int32_t* counts;    // of kept
  Kept* kept;         // [block][kKept]
  Scored* winners;    // among the codes already scored exactly
  T* log;             // [panels of a block of codes][kColumns]: the highest score of each tile
  T* tops;            // for more than one answer: [codes], scores in any order
  int32_t* several;   // likewise: [codes], those that could be answers
  T* several_scores;  // [codes]
  Scored* chosen;     // [k]

  static int64_t block_codes(const Codes<Element, M>& codes) {
    if (codes.args.k > 1) return codes.panels;
    const int64_t fitting =
        kCodesBytes / ((codes.depth + 1) * kRows * static_cast<int64_t>(sizeof(Word)));
    const int64_t most = fitting < kMostLogged ? fitting : kMostLogged;
    return most < 1 ? 1 : most < codes.panels ? most : codes.panels;
  }

  // A multiple of the panel, small enough for the block to stay in cache.
  static int64_t block_rows(const Codes<Element, M>& codes) {
    if (codes.args.k > 1) return kColumns;
    const int64_t bytes = codes.depth * sizeof(Word) + kKept * sizeof(Kept) + sizeof(Scored) +
                          sizeof(int64_t) + 3 * sizeof(T) + sizeof(double) + sizeof(int32_t);
    const int64_t share = kAllRowsBytes / codes.args.threads;
    const int64_t fitting = (share < kRowsBytes ? share : kRowsBytes) / bytes;
    const int64_t rows = fitting < kMostRows ? fitting : kMostRows;
    return rows < kColumns ? kColumns : rows / kColumns * kColumns;
  }

  Rows(const Codes<Element, M>& codes, Arena& arena) : codes(codes) {
    const int64_t count = block_rows(codes);
    row = arena.take<int64_t>(count);
    panels = arena.take<Word>(count * depth);
    best = arena.take<T>(count);
    margin = arena.take<T>(count);
    threshold = arena.take<T>(count);
    norm = arena.take<double>(count);
    counts = arena.take<int32_t>(count);
    kept = arena.take<Kept>(count * kKept);
    winners = arena.take<Scored>(count);
    log = arena.take<T>(block_codes(codes) * kColumns);
    if (args.k > 1) {
      tops = arena.take<T>(args.codes);
      several = arena.take<int32_t>(args.codes);
      several_scores = arena.take<T>(args.codes);
      chosen = arena.take<Scored>(args.k);
    }
  }

  const Element* x_of(int64_t index) const {
    return static_cast<const Element*>(args.x) + index * args.x_stride;
  }
  const Element* x(int64_t slot) const { return x_of(row[slot]); }
  Word* column(int64_t slot) const {
    return panels + slot / kColumns * depth * kColumns + slot % kColumns;
  }

  void begin(int64_t count) const {
    for (int64_t slot = 0; slot < count; slot += kColumns) {
      const int64_t valid = count - slot < kColumns ? count - slot : kColumns;
      const Element* vectors[kColumns];
      for (int64_t i = 0; i < valid; ++i) vectors[i] = x(slot + i);
      Packer<M, kColumns> packer;
      packer.run(vectors, valid, args.dims, args.metric == Metric::l2 ? codes.centre : nullptr,
                 nullptr, column(slot));
      for (int64_t i = 0; i < kColumns; ++i) {
        if (i >= valid || !set_margin(slot + i, packer.squares[i], packer.lost[i])) {
          leave_unproven(slot + i);
        }
        counts[slot + i] = 0;
        winners[slot + i] = {0, -1};
      }
    }
  }

  void leave_unproven(int64_t slot) const {
    for (int64_t k = 0; k < depth; ++k) column(slot)[k * kColumns] = Word(0);
    best[slot] = threshold[slot] = static_cast<T>(kInfinity);
    margin[slot] = T(0);
  }
  bool unproven(int64_t slot) const { return best[slot] == static_cast<T>(kInfinity); }

  // False where the fast pass proves nothing: values that are not finite, or sums that could
  // overflow.
  bool set_margin(int64_t slot, double squares, double lost) const {
    const double a = math::norm_above(squares, args.dims);
    const double b = args.largest_norm;
    const double a_lost = kRounds ? math::norm_above(lost, args.dims) : 0;
    const double bound = math::score_bound(args.metric, args.dims, a, b, a_lost, args.largest_lost,
                                           Limits<T>::unit, Limits<T>::smallest);
    const double size = args.metric == Metric::l2 ? (a + b) * (a + b) / 2 : a * b;
    // The subtraction best - margin rounds too; size bounds both of its ends.
    const double wanted = (2 * bound + 2 * Limits<T>::unit * (size + 2 * bound)) * (1 + 0x1p-20);
    const double limit = Limits<T>::largest / 4;
    if (!(size < limit && wanted < limit && a * args.largest_cosine_norm < limit)) return false;
    best[slot] = threshold[slot] = Limits<T>::lowest;
    margin[slot] = args.fast ? T(0) : static_cast<T>(wanted);
    norm[slot] = a;
    return true;
  }

  // How far apart scores summed in double, in any order, must be for the definition's to differ
  // likewise; a score of l2 is twice what the bound speaks of.
  double near_margin(int64_t slot) const {
    return (args.metric == Metric::l2 ? 4 : 2) *
           math::score_bound(args.metric, args.dims, norm[slot], args.largest_norm, 0, 0,
                             Limits<double>::unit, Limits<double>::smallest);
  }

  // The highest score of a tile for each row.
  __attribute__((always_inline)) static void highest_of(const typename Product::Tile& tile,
                                                        V (&top)[2]) {
    static_assert(kRows % 3 == 0, "three chains, so that none is long");
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      V chains[3] = {tile[0][j], tile[1][j], tile[2][j]};
#pragma GCC unroll 16
      for (int i = 3; i < kRows; ++i) chains[i % 3] = maximum(chains[i % 3], tile[i][j]);
      top[j] = maximum(maximum(chains[0], chains[1]), chains[2]);
    }
  }

  // Scores a panel of rows with a block of codes: logs the highest of each tile, and raises best
  // and threshold by them.
  void multiply(int64_t slot, int64_t first, int64_t count) const {
    V highest[2] = {V::load(best + slot), V::load(best + slot + V::size)};
    for (int64_t i = 0; i < count; ++i) {
      typename Product::Tile tile;
      Product::start(codes.starts + (first + i) * kRows, tile);
      Product::add_columns(codes.panel(first + i), kRows, panels + slot * depth, depth, tile);
      V top[2];
      highest_of(tile, top);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        top[j].store(log + i * kColumns + j * V::size);
        highest[j] = maximum(highest[j], top[j]);
      }
    }
    for (int j = 0; j < 2; ++j) {
      const int64_t lane = slot + j * V::size;
      highest[j].store(best + lane);
      // Codes out of the race score -inf and stay below the lowest finite number.
      maximum(V(Limits<T>::lowest), highest[j] - V::load(margin + lane)).store(threshold + lane);
    }
  }

  // Lists what the thresholds leave of the log of a block.
  void scan(int64_t slot, int64_t first, int64_t count) const {
    const V limits[2] = {V::load(threshold + slot), V::load(threshold + slot + V::size)};
    for (int64_t i = 0; i < count; ++i) {
      const T* const top = log + i * kColumns;
      const uint32_t hits = not_less(V::load(top), limits[0]).bits |
                            not_less(V::load(top + V::size), limits[1]).bits << V::size;
      if (__builtin_expect(hits != 0, 0)) keep(slot, static_cast<int32_t>(first + i), hits, top);
    }
  }

  __attribute__((noinline)) void keep(int64_t slot, int32_t panel, uint32_t hits,
                                      const T* top) const {
    for (; hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      int32_t& count = counts[slot + lane];
      if (count == kKept && !make_room(slot + lane)) continue;
      kept[(slot + lane) * kKept + count++] = {panel, top[lane]};
    }
  }

  // False where a probe, which only counts, has counted all it can.
  bool make_room(int64_t slot) const {
    prune(slot);
    if (counts[slot] < kKept) return true;
    if (args.probing) return false;
    int32_t survivors[kKept * kRows];
    decide(slot, survivors, survive(slot, survivors));
    counts[slot] = 0;
    return true;
  }

  void prune(int64_t slot) const {
    Kept* const list = kept + slot * kKept;
    int32_t left = 0;
    for (int32_t i = 0; i < counts[slot]; ++i) {
      if (!(list[i].top < threshold[slot])) list[left++] = list[i];
    }
    counts[slot] = left;
  }

  static constexpr int kScored = (kRows + V::size - 1) / V::size * V::size;

  // The scores of a row with the codes of a panel, the same bits as in the tile.
  __attribute__((always_inline)) void score(int64_t slot, int64_t panel,
                                            T (&scores)[kScored]) const {
    const Word* words = column(slot);
    const Word* lines = codes.panel(panel);
    V sums[kScored / V::size];
    for (int i = 0; i < kScored / V::size; ++i) {
      sums[i] = V::load(codes.starts + panel * kRows + i * V::size);
    }
    for (int64_t k = 0; k < depth; ++k) {
      const auto word = M::broadcast(words[k * kColumns]);
      for (int i = 0; i < kScored / V::size; ++i) {
        sums[i] = M::add(M::load(lines + k * kRows + i * V::size), word, sums[i]);
      }
    }
    for (int i = 0; i < kScored / V::size; ++i) sums[i].store(scores + i * V::size);
  }

  // The codes that the threshold leaves, in ascending order.
  int survive(int64_t slot, int32_t* survivors) const {
    prune(slot);
    int count = 0;
    for (int32_t i = 0; i < counts[slot]; ++i) {
      const int32_t panel = kept[slot * kKept + i].panel;
      T scores[kScored];
      score(slot, panel, scores);
      for (int j = 0; j < kRows; ++j) {
        survivors[count] = panel * kRows + j;
        count += !(scores[j] < threshold[slot]);
      }
    }
    return count;
  }

  // The sum of a code's score in double, in any order.
  double near_sum(int64_t slot, int64_t code) const {
    const Element* const a = x(slot);
    const Element* const b = codes.code(code);
    if (args.metric == Metric::l2) {
      return wide_sum(args.dims, [&](int64_t k) {
        return math::score_term(Metric::l2, widen(a[k]), widen(b[k]));
      });
    }
    return wide_sum(args.dims, [&](int64_t k) {
      return math::score_term(Metric::dot, widen(a[k]), widen(b[k]));
    });
  }

  double norm_of(int64_t code) const {
    return args.metric == Metric::cosine ? args.norms[code] : 1;
  }

  // Finds the winner of the survivors and of what won before: sums in double, in any order, leave
  // few of which the definition's are needed.
  void decide(int64_t slot, int32_t* survivors, int count) const {
    if (count > 1) {
      double scores[kKept * kRows];
      double highest = -kInfinity;
      for (int i = 0; i < count; ++i) {
        scores[i] = exact_score(args.metric, near_sum(slot, survivors[i]), norm_of(survivors[i]));
        highest = math::maximum(highest, scores[i]);
      }
      const double limit = highest - near_margin(slot);
      int left = 0;
      for (int i = 0; i < count; ++i) {
        if (!(scores[i] < limit)) survivors[left++] = survivors[i];
      }
      count = left;
    }
    consider(slot, count, [&](int64_t i) { return survivors[i]; }, winner(slot));
  }

  // Scores index(0) .. index(count - 1) by the definition; a few at once, as each sum is one long
  // chain.
  template <class Index, class Visit>
  void consider(int64_t slot, int64_t count, const Index& index, const Visit& visit) const {
    constexpr int kAtOnce = 4;
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
        visit(Scored{exact_score(args.metric, sums[j], norm_of(code)), code});
      }
    }
  }

  auto winner(int64_t slot) const {
    return [this, slot](const Scored& scored) {
      Scored& winner = winners[slot];
      if (winner.code < 0 || scored.precedes(winner)) winner = scored;
    };
  }

  int64_t answer(int64_t slot) const {
    const auto every = [](int64_t i) { return i; };
    if (unproven(slot)) {
      consider(slot, args.codes, every, winner(slot));
      return winners[slot].code;
    }
    int32_t survivors[kKept * kRows];
    int count = survive(slot, survivors);
    if (args.fast && count > 1) count = 1;
    const bool alone = winners[slot].code < 0 && args.loose_count == 0;
    if (count == 1 && alone) return survivors[0];
    decide(slot, survivors, count);
    consider(slot, args.loose_count, [&](int64_t i) { return args.loose[i]; }, winner(slot));
    return winners[slot].code;
  }

  // The k best of a row whose block of codes is all of them; into chosen.
  void answer_several(int64_t slot) const {
    Best best_ones{chosen, args.k};
    const auto visit = [&](const Scored& scored) { best_ones.consider(scored); };
    if (unproven(slot)) {
      consider(slot, args.codes, [](int64_t i) { return i; }, visit);
    } else {
      for (int64_t i = 0; i < codes.panels; ++i) tops[i] = log[i * kColumns + slot];
      T limit = below_kth(slot, codes.panels);
      int64_t count = 0;
      for (int64_t i = 0; i < codes.panels; ++i) {
        if (log[i * kColumns + slot] < limit) continue;
        T scores[kScored];
        score(slot, i, scores);
        for (int j = 0; j < kRows; ++j) {
          if (scores[j] < limit) continue;
          several[count] = static_cast<int32_t>(i * kRows + j);
          several_scores[count] = tops[count] = scores[j];
          ++count;
        }
      }
      limit = below_kth(slot, count);
      int64_t left = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (!(several_scores[i] < limit)) several[left++] = several[i];
      }
      consider(slot, left, [&](int64_t i) { return several[i]; }, visit);
      consider(slot, args.loose_count, [&](int64_t i) { return args.loose[i]; }, visit);
    }
    best_ones.sort();
  }

  // Of `count` scores in tops, of as many codes: below what a code cannot be among the k best.
  T below_kth(int64_t slot, int64_t count) const {
    if (count < args.k) return Limits<T>::lowest;
    return math::maximum(Limits<T>::lowest, kth_largest(tops, count, args.k) - margin[slot]);
  }

  T distance(int64_t slot, int64_t code) const {
    const double sum = near_sum(slot, code);
    if (args.metric != Metric::cosine) return static_cast<T>(sum);
    const Element* const a = x(slot);
    const double square = wide_sum(args.dims, [&](int64_t k) {
      const double value = widen(a[k]);
      return value * value;
    });
    return static_cast<T>(sum / (math::maximum(args.norms[code], math::kNormFloor) *
                                 math::maximum(__builtin_sqrt(square), math::kNormFloor)));
  }

  // ---- what is written
  // ---------------------------------------------------------------------------

  int64_t* index_at(int64_t index) const { return args.indices + index * args.out_stride; }
  T* value_at(int64_t index) const {
    return static_cast<T*>(args.values) + index * args.out_stride;
  }

  void write(int64_t slot) const {
    const int64_t* const found = index_at(row[slot]);
    T* const value = value_at(row[slot]);
    if (args.quantized == nullptr) {
      for (int64_t i = 0; i < args.k; ++i) value[i] = distance(slot, found[i]);
      return;
    }
    const Element* const a = x(slot);
    const Element* const b = codes.code(*found);
    copy(b, row[slot]);
    *value = static_cast<T>(args.loss_weight * wide_sum(args.dims, [&](int64_t k) {
                              return math::score_term(Metric::l2, widen(a[k]), widen(b[k]));
                            }));
  }

  void write_masked(int64_t index) const {
    for (int64_t i = 0; i < args.k; ++i) {
      index_at(index)[i] = -1;
      value_at(index)[i] = T(0);
    }
    if (args.quantized != nullptr) copy(x_of(index), index);
  }

  void copy(const Element* from, int64_t index) const {
    Element* const to = static_cast<Element*>(args.quantized) + index * args.x_stride;
    for (int64_t k = 0; k < args.dims; ++k) to[k] = from[k];
  }
};

template <class Element, class M>
void lookup(const VqArgs& args, int64_t begin, int64_t end, void* workspace) {
  const Codes<Element, M> codes{args};
  Arena arena(workspace);
  const Rows<Element, M> rows(codes, arena);
  constexpr int kColumns = Rows<Element, M>::kColumns;
  const int64_t block = Rows<Element, M>::block_rows(codes);
  const int64_t logged = Rows<Element, M>::block_codes(codes);
  while (begin < end) {
    int64_t count = 0;
    for (; begin < end && count < block; ++begin) {
      if (args.mask == nullptr || args.mask[begin]) {
        rows.row[count++] = begin;
      } else {
        rows.write_masked(begin);
      }
    }
    rows.begin(count);
    for (int64_t first = 0; first < codes.panels; first += logged) {
      const int64_t left = codes.panels - first;
      for (int64_t slot = 0; slot < count; slot += kColumns) {
        rows.multiply(slot, first, left < logged ? left : logged);
        if (args.k == 1) rows.scan(slot, first, left < logged ? left : logged);
      }
    }
    for (int64_t slot = 0; slot < count; ++slot) {
      int64_t* const indices = rows.index_at(rows.row[slot]);
      if (args.k == 1) {
        *indices = rows.answer(slot);
        // The codes lie all over the codebook: fetch them before they are wanted.
        __builtin_prefetch(codes.code(*indices));
      } else {
        rows.answer_several(slot);
        for (int64_t i = 0; i < args.k; ++i) indices[i] = rows.chosen[i].code;
      }
    }
    for (int64_t slot = 0; slot < count; ++slot) rows.write(slot);
  }
}

// Whether candidates by rounded products pay: what a few rows from all over the batch would list,
// beside what the products save.
template <class Element, class M>
bool pays(const VqArgs& args, void* workspace) {
  const Codes<Element, M> codes{args};
  Arena arena(workspace);
  const Rows<Element, M> rows(codes, arena);
  constexpr int kColumns = Rows<Element, M>::kColumns;
  constexpr int kKept = Rows<Element, M>::kKept;
  const int64_t logged = Rows<Element, M>::block_codes(codes);
  int64_t count = 0;
  for (int64_t i = 0; i < kColumns; ++i) {
    const int64_t row = args.rows * (2 * i + 1) / (2 * kColumns);
    if (args.mask == nullptr || args.mask[row]) rows.row[count++] = row;
  }
  if (count == 0) return true;
  rows.begin(count);
  for (int64_t first = 0; first < codes.panels; first += logged) {
    const int64_t left = codes.panels - first;
    rows.multiply(0, first, left < logged ? left : logged);
    rows.scan(0, first, left < logged ? left : logged);
  }
  // Beyond the one panel and the one code that any products would leave.
  int64_t listed = -count, survivors = -count;
  for (int64_t slot = 0; slot < count; ++slot) {
    int32_t list[kKept * Codes<Element, M>::kRows];
    survivors += rows.unproven(slot) ? args.codes : rows.survive(slot, list);
    listed += rows.counts[slot];
  }
  // In cycles: measured for a panel and for a code; of the products, half of two a cycle and lane.
  const int64_t cost = listed * (30 + 2 * args.dims) + survivors * (30 + args.dims / 2);
  return cost < count * args.codes * args.dims / 80;
}

#if defined(__AVX512BF16__)
constexpr bool kHasBFloat16 = true;
#else
constexpr bool kHasBFloat16 = false;
#endif

// Calls body(Element{}, M{}): elements of a dtype, and how their candidates are found.
template <class Body>
FASTZOO_INLINE void with_candidates(const VqArgs& args, const Body& body) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (kHasBFloat16 && sizeof(typename ComputeOf<Element>::type) == sizeof(float)) {
      if (args.bfloat16) return body(element, MultiplyBFloat16{});
    }
    return body(element, Multiply<typename ComputeOf<Element>::type>{});
  });
}

}  // namespace

void vq_plan(const VqArgs& args, VqPlan& plan) {
  // Below that the products are not what takes the time.
  constexpr int64_t kDimsWorthIt = 4;
  plan.bfloat16 = kHasBFloat16 && args.dtype != Dtype::float64 && args.dims >= kDimsWorthIt;
  plan.table_size = 4;
  while (args.k == 1 && plan.table_size < 4 * args.codes) plan.table_size *= 2;
  with_candidates(args, [&](auto element, auto multiply) {
    const Codes<decltype(element), decltype(multiply)> codes{args};
    plan.code_panels = codes.panels;
    plan.starts_bytes = codes.starts_bytes();
    plan.lines_bytes = codes.lines_bytes();
    Arena arena;
    Rows<decltype(element), decltype(multiply)>(codes, arena);
    plan.workspace_bytes = arena.bytes();
  });
}

void vq_centre(const VqArgs& args, int64_t begin, int64_t end) {
  with_candidates(args, [&](auto element, auto multiply) {
    Codes<decltype(element), decltype(multiply)>{args}.find_centre(begin, end);
  });
}

void vq_pack(const VqArgs& args, int64_t begin, int64_t end) {
  with_candidates(args, [&](auto element, auto multiply) {
    const Codes<decltype(element), decltype(multiply)> codes{args};
    for (int64_t panel = begin; panel < end; ++panel) codes.pack(panel);
  });
}

void vq_select(VqArgs& args, int32_t* table, int64_t table_size) {
  with_candidates(args, [&](auto element, auto multiply) {
    Codes<decltype(element), decltype(multiply)>{args}.select(args, table, table_size);
  });
}

void vq_probe(const VqArgs& args, void* workspace, bool& result) {
  with_candidates(args, [&](auto element, auto multiply) {
    result = pays<decltype(element), decltype(multiply)>(args, workspace);
  });
}

void vq_lookup(const VqArgs& args, int64_t begin, int64_t end, void* workspace) {
  with_candidates(args, [&](auto element, auto multiply) {
    lookup<decltype(element), decltype(multiply)>(args, begin, end, workspace);
  });
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
