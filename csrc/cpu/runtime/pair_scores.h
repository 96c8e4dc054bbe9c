// The dot products of all pairs of two sets of vectors, a chunk of one set at a time, and the
// products that carry their gradients back. Included like vec.h.
//
// The vectors of one set, `lanes`, stand in the lanes of a SIMD vector, a block of kColumns at a
// time; those of the other, `rows`, come in chunks. The scores of a chunk are
//   scores[block of lanes][row][lane],
// in cache, where the caller turns them into what it wants, or into the gradients V of the scores:
//   gradient of lane n = sum over rows of V w,    gradient of row r = sum over lanes of V x.
#pragma once

#include "arena.h"
#include "tile_product.h"
#include "vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

// Rows of a chunk at most, and bytes of its scores with a group of lanes: they and the chunk stay
// in a small L2.
constexpr int64_t kChunkRows = 192;
constexpr int64_t kScoresBytes = 400 << 10;

// Rows of a chunk where `parts` threads share `rows`: no more than a share.
FASTZOO_INLINE int64_t chunk_rows(int64_t rows, int64_t parts, int64_t multiple) {
  const int64_t share = round_up((rows + parts - 1) / parts, multiple);
  return share < multiple ? multiple : share < kChunkRows ? share : kChunkRows;
}

// The sum of squares of `count` values, a whole number of vectors.
template <class T>
FASTZOO_INLINE T sum_of_squares(const T* values, int64_t count) {
  using V = Vec<T>;
  V sums[4] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
  int64_t k = 0;
  for (; k + 4 * V::size <= count; k += 4 * V::size) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V value = V::load(values + k + i * V::size);
      sums[i] = fused_multiply_add(value, value, sums[i]);
    }
  }
  for (; k < count; k += V::size) {
    const V value = V::load(values + k);
    sums[0] = fused_multiply_add(value, value, sums[0]);
  }
  return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The log of a sum of exponentials that grows by blocks: sum counts in units of exp(highest).
// Raises highest to what `top` adds, and returns what the new exponents are to be taken from:
// highest, or where every exponent is -inf anything finite.
template <class T>
FASTZOO_INLINE Vec<T> raise_highest(T* highest, T* sum, Vec<T> top) {
  using V = Vec<T>;
  const V none(-static_cast<T>(__builtin_inf()));
  const V before = V::load(highest);
  const V after = maximum(before, top);
  const V reference = select(greater(after, none), after, V(T(0)));
  after.store(highest);
  (V::load(sum) * exponential(before - reference)).store(sum);
  return reference;
}

// What log-sum-exps are subtracted from, for an upstream gradient: of an infinite reference nothing
// comes, neither of a gradient of 0 nor of an empty sum.
template <class T>
FASTZOO_INLINE T gradient_reference(T grad, T lse) {
  const T infinity = static_cast<T>(__builtin_inf());
  return grad == 0 || lse == -infinity ? infinity : lse;
}

// For each lane of a block, the row of a chunk that is not to count for it, as bits by row.
struct Marks {
  uint32_t* bits;  // [rows of a chunk], zero between two blocks

  // labels[i] is lane i's row; those outside [first, first + count) are elsewhere.
  template <int kColumns>
  __attribute__((always_inline)) void set(const int64_t* labels, int64_t first,
                                          int64_t count) const {
    for (int i = 0; i < kColumns; ++i) {
      const int64_t row = labels[i] - first;
      if (row >= 0 && row < count) bits[row] |= 1u << i;
    }
  }
  template <int kColumns>
  __attribute__((always_inline)) void clear(const int64_t* labels, int64_t first,
                                            int64_t count) const {
    for (int i = 0; i < kColumns; ++i) {
      const int64_t row = labels[i] - first;
      if (row >= 0 && row < count) bits[row] = 0;
    }
  }
  // Those of the first or the second vector of a block.
  template <class V>
  __attribute__((always_inline)) typename V::MaskType of(int64_t row, int half) const {
    return {bits[row] >> (half * V::size) & V::MaskType::kAll};
  }
};

template <class M>
struct PairScores {
  using Product = TileProduct<M>;
  using T = typename Product::T;
  using Word = typename Product::Word;
  using V = typename Product::V;
  using Tile = typename Product::Tile;
  static constexpr int kRows = Product::kRows;
  static constexpr int kColumns = Product::kColumns;
  static constexpr int kEach = M::kEach;
  static constexpr bool kPairs = kEach == 2;

  int64_t lanes, dims;
  int64_t chunk;  // rows of a chunk at most, a multiple of kRows

  int64_t blocks() const { return (lanes + kColumns - 1) / kColumns; }
  int64_t depth() const { return (dims + kEach - 1) / kEach; }
  int64_t padded_dims() const { return round_up(round_up(dims, kRows), kColumns); }
  // Words from a row of a chunk to the next. The odd cache line keeps rows that are walked in step
  // out of each other's way in the cache.
  int64_t pitch() const { return round_up(padded_dims() / kEach, 16) + 16; }
  int64_t across_pitch() const { return kPairs ? padded_dims() + 16 : pitch(); }
  int64_t dim_panels() const { return (dims + kRows - 1) / kRows; }
  int64_t dim_blocks() const { return (dims + kColumns - 1) / kColumns; }

  // Blocks of lanes whose scores are at hand at once.
  int64_t group_blocks() const {
    const int64_t fitting = kScoresBytes / (chunk * kColumns * static_cast<int64_t>(sizeof(T)));
    const int64_t most = fitting < 1 ? 1 : fitting;
    return most < blocks() ? most : blocks();
  }

  // ---- the lanes, packed once ------------------------------------------------------------------

  // For the scores: [block][depth][kColumns].
  int64_t lanes_size() const { return blocks() * depth() * kColumns; }
  // For the rows' gradient: [block of dimensions][padded lanes / kEach][kColumns].
  int64_t across_size() const { return dim_blocks() * blocks() * kColumns / kEach * kColumns; }

  // value(n, d) is element d of lane n, for n < lanes and d < dims.
  template <class Value>
  void pack_lanes(int64_t block, const Value& value, Word* packed, Word* across) const {
    const int64_t first = block * kColumns;
    Word* const lines = packed + block * depth() * kColumns;
    for (int64_t k = 0; k < depth(); ++k) {
      for (int i = 0; i < kColumns; ++i) {
        lines[k * kColumns + i] = word(first + i < lanes, first + i, k * kEach, 0, 1, value);
      }
    }
    if (across == nullptr) return;
    const int64_t lane_words = blocks() * kColumns / kEach;
    for (int64_t part = 0; part < dim_blocks(); ++part) {
      for (int i = 0; i < kColumns / kEach; ++i) {
        Word* const line = across + (part * lane_words + first / kEach + i) * kColumns;
        for (int j = 0; j < kColumns; ++j) {
          const int64_t d = part * kColumns + j;
          line[j] = word(d < dims, first + i * kEach, d, 1, 0, value);
        }
      }
    }
  }

  // ---- a chunk's workspace ---------------------------------------------------------------------

  struct Chunk {
    Word* natural;  // [chunk][pitch]
    Word* across;   // pairs of neighbouring rows [chunk / 2][across_pitch]; or natural itself
    T* row;         // [padded_dims], one row as it was before it became words
    T* scores;      // [blocks of a group][chunk][kColumns]
    Word* v_lanes;  // V in pairs of lanes [block][chunk][kColumns / 2]; or the scores
    Word* v_rows;   // V in pairs of rows [block][chunk / 2][kColumns]; or the scores
  };

  Chunk take(Arena& arena, int64_t group, bool backward) const {
    Chunk c{};
    c.natural = arena.take<Word>(chunk * pitch());
    c.row = arena.take<T>(padded_dims());
    c.scores = arena.take<T>(group * chunk * kColumns);
    if constexpr (kPairs) {
      if (backward) {
        c.across = arena.take<Word>(chunk / 2 * across_pitch());
        c.v_lanes = arena.take<Word>(group * chunk * kColumns / 2);
        c.v_rows = arena.take<Word>(group * chunk * kColumns / 2);
      }
    } else {
      c.across = c.natural;
      c.v_lanes = c.v_rows = c.scores;
    }
    return c;
  }

  T* scores_of(const Chunk& c, int64_t block_in_group) const {
    return c.scores + block_in_group * chunk * kColumns;
  }

  // Takes `count` rows in, zeros after them, and calls visit(row, sum of its squares) for each.
  template <class Element, class Visit>
  __attribute__((always_inline)) void pack_rows(const Chunk& c, const Element* rows, int64_t count,
                                                const Visit& visit) const {
    const int64_t stride = pitch();
    const int64_t width = padded_dims();
    for (int64_t r = 0; r < round_up(count, kRows); ++r) {
      Word* const words = c.natural + r * stride;
      if (r >= count) {
        for (int64_t k = 0; k < stride; ++k) words[k] = Word(0);
        continue;
      }
      const Element* const row = rows + r * dims;
      T* values = c.row;
      if constexpr (!kPairs) values = words;
      for (int64_t d = 0; d < dims; ++d) values[d] = widen(row[d]);
      for (int64_t d = dims; d < width; ++d) values[d] = T(0);
      visit(r, sum_of_squares(values, round_up(dims, V::size)));
      narrow_row(values, words);
    }
    if constexpr (kPairs) {
      if (c.across == nullptr) return;
      for (int64_t r = 0; r < round_up(count, kRows); r += 2) {
        const uint16_t* const low = reinterpret_cast<const uint16_t*>(c.natural + r * stride);
        const uint16_t* const high = low + 2 * stride;
        Word* const words = c.across + r / 2 * across_pitch();
        for (int64_t d = 0; d < width; ++d) {
          words[d] = low[d] | static_cast<uint32_t>(high[d]) << 16;
        }
      }
    }
  }

  // ---- the products ----------------------------------------------------------------------------

  // The scores of `count` rows with the lanes of `group` blocks from `first` on.
  __attribute__((always_inline)) void multiply(const Chunk& c, int64_t count, const Word* packed,
                                               int64_t first, int64_t group) const {
    for (int64_t block = 0; block < group; ++block) {
      for (int64_t r = 0; r < count; r += kRows) {
        Tile tile;
        Product::clear(tile);
        Product::add_rows(c.natural + r * pitch(), pitch(),
                          packed + (first + block) * depth() * kColumns, depth(), tile);
        Product::store(tile, scores_of(c, block) + r * kColumns, kColumns);
      }
    }
  }

  // Before the two products below: the V that were written over the scores, as the words that they
  // multiply. Rows from count on are made zero.
  __attribute__((always_inline)) void finish_gradients(const Chunk& c, int64_t count,
                                                       int64_t group) const {
    for (int64_t block = 0; block < group; ++block) {
      T* const v = scores_of(c, block);
      for (int64_t i = count * kColumns; i < round_up(count, kRows) * kColumns; ++i) v[i] = T(0);
      if constexpr (kPairs) narrow_gradients(c, block, count);
    }
  }

  // sums [lane block][dim_panels() * kRows][kColumns] += V w.
  __attribute__((always_inline)) void add_lane_gradients(const Chunk& c, int64_t count,
                                                         int64_t first, int64_t group,
                                                         T* sums) const {
    for (int64_t block = 0; block < group; ++block) {
      const Word* const right = c.v_rows + block * (chunk / kEach) * kColumns;
      for (int64_t panel = 0; panel < dim_panels(); ++panel) {
        T* const at = sums + ((first + block) * dim_panels() + panel) * kRows * kColumns;
        Tile tile;
        Product::load(at, kColumns, tile);
        Product::add_columns(c.across + panel * kRows, across_pitch(), right,
                             (count + kEach - 1) / kEach, tile);
        Product::store(tile, at, kColumns);
      }
    }
  }

  // visit(row, dimension, tile) for each tile of the rows' gradients: sums of V x over the lanes of
  // the group.
  template <class Visit>
  __attribute__((always_inline)) void row_gradients(const Chunk& c, int64_t count,
                                                    const Word* across, int64_t first,
                                                    int64_t group, const Visit& visit) const {
    const int64_t lane_words = blocks() * kColumns / kEach;
    for (int64_t part = 0; part < dim_blocks(); ++part) {
      const Word* const right = across + (part * lane_words + first * kColumns / kEach) * kColumns;
      for (int64_t r = 0; r < count; r += kRows) {
        Tile tile;
        Product::clear(tile);
        for (int64_t block = 0; block < group; ++block) {
          Product::add_rows(c.v_lanes + (block * chunk + r) * (kColumns / kEach), kColumns / kEach,
                            right + block * (kColumns / kEach) * kColumns, kColumns / kEach, tile);
        }
        visit(r, part * kColumns, tile);
      }
    }
  }

  // sums[row][dims] = (first ? 0 : sums) + tile + along[row] * rows, for the rows below `count` and
  // the dimensions that exist; without `along`, its product is left out.
  template <class Element>
  __attribute__((always_inline)) void add_tile(const Tile& tile, int64_t row, int64_t count,
                                               int64_t d, bool first, const T* along,
                                               const Element* rows, T* sums) const {
    if constexpr (sizeof(Element) == sizeof(T)) {
      if (row + kRows <= count && d + kColumns <= dims) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const int64_t at = (row + i) * dims + d;
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            V sum = tile[i][h];
            if (along != nullptr) {
              sum = fused_multiply_add(V(along[row + i]), V::load(rows + at + h * V::size), sum);
            }
            if (!first) sum = sum + V::load(sums + at + h * V::size);
            sum.store(sums + at + h * V::size);
          }
        }
        return;
      }
    }
    alignas(kVectorBytes) T stored[kRows][kColumns];
    Product::store(tile, stored[0], kColumns);
    const int64_t height = count - row < kRows ? count - row : kRows;
    const int64_t width = dims - d < kColumns ? dims - d : kColumns;
    for (int64_t i = 0; i < height; ++i) {
      const int64_t at = (row + i) * dims + d;
      const T share = along != nullptr ? along[row + i] : T(0);
      for (int64_t j = 0; j < width; ++j) {
        T sum = stored[i][j];
        if (along != nullptr) sum += share * static_cast<T>(widen(rows[at + j]));
        sums[at + j] = first ? sum : sums[at + j] + sum;
      }
    }
  }

  // total[dims] += a lane's gradient in the sums of add_lane_gradients.
  void collect(const T* sums, int64_t lane, double* total) const {
    const T* const from =
        sums + lane / kColumns * dim_panels() * kRows * kColumns + lane % kColumns;
    for (int64_t d = 0; d < dims; ++d) total[d] += from[d * kColumns];
  }
  int64_t sums_size() const { return blocks() * dim_panels() * kRows * kColumns; }

 private:
  template <class Value>
  __attribute__((always_inline)) Word word(bool inside, int64_t n, int64_t d, int64_t next_n,
                                           int64_t next_d, const Value& value) const {
    if (!inside || n >= lanes) return Word(0);
    if constexpr (kPairs) {
      const bool second = n + next_n < lanes && d + next_d < dims;
      BFloat16 low, high;
      narrow(value(n, d), low);
      narrow(second ? value(n + next_n, d + next_d) : 0, high);
      return low.bits | static_cast<uint32_t>(high.bits) << 16;
    } else {
      return M::operand(value(n, d));
    }
  }

  __attribute__((always_inline)) void narrow_row(const T* values, Word* words) const {
    const int64_t width = padded_dims();
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
      for (int64_t d = 0; d < width; d += 32) {
        const __m512bh both =
            _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + d + 16), _mm512_loadu_ps(values + d));
        _mm512_storeu_si512(words + d / 2, reinterpret_cast<__m512i>(both));
      }
#endif
    } else {
      for (int64_t d = 0; d < width; ++d) words[d] = M::operand(values[d]);
    }
  }

  __attribute__((always_inline)) void narrow_gradients(const Chunk& c, int64_t block,
                                                       int64_t count) const {
#if defined(__AVX512BF16__)
    const T* v = scores_of(c, block);
    Word* by_lanes = c.v_lanes + block * chunk * (kColumns / 2);
    Word* by_rows = c.v_rows + block * (chunk / 2) * kColumns;
    for (int64_t r = 0; r < round_up(count, kRows); r += 2) {
      const auto pairs = [](const T* at) {
        return reinterpret_cast<__m512i>(
            _mm512_cvtne2ps_pbh(_mm512_loadu_ps(at + 16), _mm512_loadu_ps(at)));
      };
      const auto single = [](const T* at) {
        return _mm512_cvtepu16_epi32(
            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(at))));
      };
      _mm512_storeu_si512(by_lanes, pairs(v));
      _mm512_storeu_si512(by_lanes + 16, pairs(v + 32));
      for (int half = 0; half < 2; ++half) {
        const __m512i low = single(v + half * 16), high = single(v + 32 + half * 16);
        _mm512_storeu_si512(by_rows + half * 16, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
      v += 64;
      by_lanes += 32;
      by_rows += 32;
    }
#endif
  }
};

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
