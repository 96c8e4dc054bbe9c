// Neighbour search: distances of a query to a block of points at a time. Those within the limit
// are appended to a list, which is cut to the k best whenever it is full; that lowers the limit.
// A search of tiles meets every point; one of a tree skips boxes that lie beyond the limit.
// csrc/math/neighbours.h defines the distance and says why skipping is exact.
#include "neighbours.h"

#include <limits>

#include "../runtime/arena.h"
#include "../runtime/lazy_order.h"
#include "../runtime/point_blocks.h"
#include "../runtime/vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::Norm;

template <class T>
constexpr int kVectors = kBlockPoints / Vec<T>::size;  // of a block, along one dimension

// ---- Appending the lanes of a mask -------------------------------------------------------------

// Writes the lanes of the mask side by side, and maybe other values behind them: as many as a
// vector has lanes in all. Returns how many the mask has.
#if defined(__AVX512F__)
FASTZOO_INLINE int append(Mask<16> mask, Vec<float> values, const int32_t* numbers,
                          float* out_values, int32_t* out_numbers) {
  const __mmask16 lanes = static_cast<__mmask16>(mask.bits);
  _mm512_storeu_ps(out_values, _mm512_maskz_compress_ps(lanes, values.v));
  _mm512_storeu_si512(out_numbers, _mm512_maskz_compress_epi32(lanes, _mm512_loadu_si512(numbers)));
  return __builtin_popcount(mask.bits);
}
FASTZOO_INLINE int append(Mask<8> mask, Vec<double> values, const int32_t* numbers,
                          double* out_values, int32_t* out_numbers) {
  const __mmask8 lanes = static_cast<__mmask8>(mask.bits);
  const __m256i wide = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
  _mm512_storeu_pd(out_values, _mm512_maskz_compress_pd(lanes, values.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out_numbers),
                      _mm256_maskz_compress_epi32(lanes, wide));
  return __builtin_popcount(mask.bits);
}
#else
template <class T>
FASTZOO_INLINE int append(Mask<Vec<T>::size> mask, Vec<T> values, const int32_t* numbers,
                          T* out_values, int32_t* out_numbers) {
  int count = 0;
  for (int i = 0; i < Vec<T>::size; ++i) {
    out_values[count] = values[i];
    out_numbers[count] = numbers[i];
    count += static_cast<int>(mask.bits >> i & 1u);
  }
  return count;
}
#if defined(__AVX2__)
// For each mask the lanes that it has, in order, a byte each.
struct LanesOfMask {
  uint64_t lanes[256];
};
constexpr LanesOfMask lanes_of_masks() {
  LanesOfMask table{};
  for (int mask = 0; mask < 256; ++mask) {
    for (uint64_t lane = 0, place = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) table.lanes[mask] |= lane << (8 * place++);
    }
  }
  return table;
}
constexpr LanesOfMask kLanesOfMask = lanes_of_masks();

FASTZOO_INLINE int append(Mask<8> mask, Vec<float> values, const int32_t* numbers,
                          float* out_values, int32_t* out_numbers) {
  const __m128i bytes =
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLanesOfMask.lanes + mask.bits));
  const __m256i lanes = _mm256_cvtepu8_epi32(bytes);
  const __m256i wide = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
  _mm256_storeu_ps(out_values, _mm256_permutevar8x32_ps(values.v, lanes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out_numbers),
                      _mm256_permutevar8x32_epi32(wide, lanes));
  return __builtin_popcount(mask.bits);
}
#endif
#endif

// ---- The k least of many keys ------------------------------------------------------------------

// Distances as numbers, which ascend as they do. No distance has the bits of infinity.
template <class T>
using BitsType = typename BitsOf<T>::Scalar;

// How many of the keys, as wide as T, are at most `most`. Behind them there are greater ones, up
// to a whole vector.
template <class T>
FASTZOO_INLINE int64_t count_at_most(const void* keys, int64_t count, BitsType<T> most) {
  using Keys = typename BitsOf<T>::type;
  const char* const bytes = static_cast<const char*>(keys);
  Keys sums{};
  for (int64_t i = 0; i < count; i += Vec<T>::size) {
    Keys some;
    __builtin_memcpy(&some, bytes + i * sizeof(T), sizeof(Keys));
    sums -= some <= most;
  }
  int64_t sum = 0;
  for (int i = 0; i < Vec<T>::size; ++i) sum += sums[i];
  return sum;
}

// What separates the k least of many keys from the others: `below` keys are at most `most`. They
// are k, or less where k ends among several keys of most + 1.
template <class Key>
struct Split {
  Key most;
  int64_t below;
};

// `between(low, high, fraction)` guesses a key. Of the `count` > k keys, as wide as T, none is
// negative and none above `high`.
template <class T, class Between>
FASTZOO_INLINE Split<BitsType<T>> split_keys(const void* keys, int64_t count, int64_t k,
                                             BitsType<T> high, const Between& between) {
  using Key = BitsType<T>;
  constexpr int kGuesses = 6;  // thereafter halves, where the keys are spread unevenly
  Key low = -1;
  int64_t below_low = 0, below_high = count;
  for (int step = 0; high - low > 1; ++step) {
    Key middle = low + (high - low) / 2;
    if (step < kGuesses) {
      const Key guess = between(
          low, high,
          (static_cast<T>(k - below_low) + T(0.5)) / static_cast<T>(below_high - below_low + 1));
      middle = guess <= low ? low + 1 : guess >= high ? high - 1 : guess;
    }
    const int64_t below = count_at_most<T>(keys, count, middle);
    if (below == k) return {middle, k};
    if (below < k) {
      low = middle;
      below_low = below;
    } else {
      high = middle;
      below_high = below;
    }
  }
  return {low, below_low};
}

constexpr int64_t kSortStep = 4 * Vec<double>::size;  // keys that are ranked at once
constexpr int64_t kFewKeys = 4 * kSortStep;

// Sorts a few keys, all different, by counting for each those that are less: without branches.
// Behind them there is room up to a multiple of kSortStep.
FASTZOO_INLINE void sort_few(uint64_t* keys, int64_t count, uint64_t* sorted) {
  using Keys = typename BitsOf<double>::type;  // signed, as instructions compare them
  for (int64_t i = count; i % kSortStep != 0; ++i) keys[i] = ~uint64_t{0} >> 1;
  for (int64_t first = 0; first < count; first += kSortStep) {
    Keys own[4], ranks[4] = {};
    __builtin_memcpy(own, keys + first, sizeof(own));
    for (int64_t j = 0; j < count; ++j) {
      for (int i = 0; i < 4; ++i) ranks[i] -= static_cast<int64_t>(keys[j]) < own[i];
    }
    int64_t places[kSortStep];
    __builtin_memcpy(places, ranks, sizeof(places));
    const int64_t last = count - first < kSortStep ? count - first : kSortStep;
    for (int64_t i = 0; i < last; ++i) sorted[places[i]] = keys[first + i];
  }
}

// ---- The candidates of one query ---------------------------------------------------------------

template <class T>
class Candidates {
 public:
  // (distance, row) as one number; (row, distance) where the first are wanted.
  using Key = typename RankOf<T>::type;

  Candidates() = default;
  // The list is cut when it holds so many that a cut costs little for each. One of the first spares
  // nothing that follows: it is put off longer.
  Candidates(Arena& arena, bool first, int64_t k)
      : first_(first), k_(k), full_(first ? 8 * k + 256 : 2 * k + 64) {
    // A block is added whole, vectors are written whole and keys are sorted in steps.
    const int64_t room = full_ + kBlockPoints + kSortStep;
    distances_ = arena.take<T>(room);
    rows_ = arena.take<int32_t>(room);
    keys_ = arena.take<Key>(room);
    sorted_ = arena.take<Key>(room);
  }

  void start(T limit) {
    count_ = 0;
    met_ = 0;
    limit_ = limit;
  }

  // Only distances up to here count.
  T limit() const { return limit_; }
  int64_t count() const { return count_; }
  // How many were within the limit when they were met.
  int64_t met() const { return met_ + count_; }

  __attribute__((always_inline)) void add(Mask<Vec<T>::size> mask, Vec<T> distances,
                                          const int32_t* rows) {
    count_ += append(mask, distances, rows, distances_ + count_, rows_ + count_);
  }

  // To be asked after each block.
  bool is_full() const { return count_ > full_; }

  // Keeps the k best.
  void cut() {
    if (count_ <= k_) return;
    met_ += count_ - k_;
    if (first_) {
      keep_first();
    } else {
      keep_nearest();
    }
  }

  // Keeps the first k, of a search in the order of the rows.
  __attribute__((always_inline)) void truncate() { count_ = count_ < k_ ? count_ : k_; }

  // Writes the results in order. Returns the last one's distance.
  T write(T* distances, int64_t* indices) {
    cut();
    for (int64_t i = 0; i < count_; ++i) {
      const Key bits = math::distance_bits(distances_[i]);
      const Key row = static_cast<uint32_t>(rows_[i]);
      keys_[i] = first_ ? row << kBits | bits : bits << kIndexBits | row;
    }
    const Key* in_order = keys_;
    if constexpr (sizeof(Key) == sizeof(uint64_t)) {
      if (count_ <= kFewKeys) {
        sort_few(keys_, count_, sorted_);
        in_order = sorted_;
      }
    }
    if (in_order == keys_) sort_ranks(keys_, count_, sorted_);
    using Unsigned = decltype(math::distance_bits(T{}));
    for (int64_t i = 0; i < count_; ++i) {
      const Key key = in_order[i];
      distances[i] = math::bits_as<T>(static_cast<Unsigned>(first_ ? key : key >> kIndexBits));
      indices[i] = static_cast<uint32_t>(first_ ? key >> kBits : key);
    }
    return count_ > 0 ? distances[count_ - 1] : T(0);
  }

 private:
  static constexpr int kBits = 8 * sizeof(T);
  static constexpr BitsType<T> kLargest = std::numeric_limits<BitsType<T>>::max();

  void keep_nearest() {
    BitsType<T> high = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const auto bits = static_cast<BitsType<T>>(math::distance_bits(distances_[i]));
      distances_[i] = math::bits_as<T>(bits);  // one NaN for all
      high = bits > high ? bits : high;
    }
    for (int i = 0; i < Vec<T>::size; ++i) distances_[count_ + i] = math::bits_as<T>(kLargest);
    // Such distances are spread about evenly over their values, not over their bits.
    const auto between = [](BitsType<T> low, BitsType<T> most, T fraction) {
      const T from = low < 0 ? T(0) : math::bits_as<T>(low);
      return math::bits_as<BitsType<T>>(from + (math::bits_as<T>(most) - from) * fraction);
    };
    const auto split = split_keys<T>(distances_, count_, k_, high, between);
    if (split.below < k_) {
      keep_tied(split.most, k_ - split.below);
      return;
    }
    // Bits between those of infinity and of NaN are a NaN: infinity stands for them.
    limit_ = math::minimum(static_cast<T>(__builtin_inf()), math::bits_as<T>(split.most));
    const Vec<T> limit(limit_);
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; i += Vec<T>::size) {
      const Vec<T> some = Vec<T>::load(distances_ + i);
      kept += append(less_equal(some, limit), some, rows_ + i, distances_ + kept, rows_ + kept);
    }
    count_ = kept;
  }

  // Keeps the distances up to `most`, and of those next to it the `ties` lowest rows.
  void keep_tied(BitsType<T> most, int64_t ties) {
    const BitsType<T> tied = most + 1;
    int32_t* const rows = reinterpret_cast<int32_t*>(keys_);
    int64_t tied_count = 0;
    for (int64_t i = 0; i < count_; ++i) {
      rows[tied_count] = rows_[i];
      tied_count += math::bits_as<BitsType<T>>(distances_[i]) == tied;
    }
    const int32_t last = last_of_first(rows, tied_count, ties);
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const T distance = distances_[i];
      const int32_t row = rows_[i];
      const auto bits = math::bits_as<BitsType<T>>(distance);
      distances_[kept] = distance;
      rows_[kept] = row;
      kept += bits <= most || (bits == tied && row <= last);
    }
    count_ = kept;
    limit_ = math::bits_as<T>(tied);
  }

  void keep_first() {
    int32_t* const rows = reinterpret_cast<int32_t*>(keys_);
    for (int64_t i = 0; i < count_; ++i) rows[i] = rows_[i];
    const int32_t last = last_of_first(rows, count_, k_);
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const T distance = distances_[i];
      const int32_t row = rows_[i];
      distances_[kept] = distance;
      rows_[kept] = row;
      kept += row <= last;
    }
    count_ = kept;
  }

  // A number that so many of the rows are up to; behind them there is room for a vector.
  static int32_t last_of_first(int32_t* rows, int64_t count, int64_t first) {
    if (first >= count) return std::numeric_limits<int32_t>::max();
    int32_t high = 0;
    for (int64_t i = 0; i < count; ++i) high = rows[i] > high ? rows[i] : high;
    for (int i = 0; i < Vec<float>::size; ++i) {
      rows[count + i] = std::numeric_limits<int32_t>::max();
    }
    const auto between = [](int32_t low, int32_t most, float fraction) {
      return low + static_cast<int32_t>(static_cast<float>(most - low) * fraction);
    };
    return split_keys<float>(rows, count, first, high, between).most;
  }

  bool first_ = false;
  int64_t k_ = 0;
  int64_t full_ = 0;
  T* distances_ = nullptr;
  int32_t* rows_ = nullptr;
  Key* keys_ = nullptr;
  Key* sorted_ = nullptr;
  int64_t count_ = 0;
  int64_t met_ = 0;
  T limit_ = 0;
};

// The greatest distance within the radius.
template <class T>
FASTZOO_INLINE T limit_of_radius(const NeighbourArgs& args) {
  if (!math::radius_limits(args.radius)) return static_cast<T>(__builtin_inf());
  const T limit = math::radius_limit<T>(args.norm, args.radius);
  if (!(limit > 0)) return T(-1);
  return math::bits_as<T>(math::bits_as<BitsType<T>>(limit) - 1);
}

// Results of a query, and padding behind them.
template <class T>
struct Results {
  T* distances;
  int64_t* indices;

  Results(const NeighbourArgs& args, const NeighbourCloud& cloud, int64_t query)
      : distances(static_cast<T*>(cloud.distances) + query * args.k),
        indices(cloud.indices + query * args.k) {}

  T write(Candidates<T>& candidates, int64_t k) {
    const T last = candidates.write(distances, indices);
    for (int64_t i = candidates.count(); i < k; ++i) {
      distances[i] = 0;
      indices[i] = -1;
    }
    return last;
  }
};

FASTZOO_INLINE int64_t query_at(const NeighbourCloud& cloud, int64_t place) {
  return cloud.order == nullptr ? place : cloud.order[place];
}

FASTZOO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Every pair --------------------------------------------------------------------------------

template <class T>
constexpr int kTileQueries = 8 / kVectors<T> > 1 ? 8 / kVectors<T> : 1;

// The distances of queries, [dims][kTileQueries], to the points of a block.
template <class T, Norm kNorm>
FASTZOO_INLINE void tile_distances(const T* queries, const T* block, int64_t dims,
                                   Vec<T> (&sums)[kTileQueries<T>][kVectors<T>]) {
  const auto term = [&](int64_t d, int q, int v) __attribute__((always_inline)) {
    const Vec<T> points = Vec<T>::load(block + d * kBlockPoints + v * Vec<T>::size);
    return math::distance_term<kNorm>(Vec<T>(queries[d * kTileQueries<T> + q]), points);
  };
  for (int q = 0; q < kTileQueries<T>; ++q) {
    for (int v = 0; v < kVectors<T>; ++v) sums[q][v] = term(0, q, v);
  }
  for (int64_t d = 1; d < dims; ++d) {
    for (int q = 0; q < kTileQueries<T>; ++q) {
      for (int v = 0; v < kVectors<T>; ++v) sums[q][v] = sums[q][v] + term(d, q, v);
    }
  }
}

// kAll: at first every distance counts, NaN too.
template <class T, Norm kNorm, bool kAll>
void search_tiles(const NeighbourArgs& args, const NeighbourCloud& cloud, int64_t begin,
                  int64_t end, Arena arena) {
  constexpr int kQueries = kTileQueries<T>;
  const auto& points = *static_cast<const PointBlocksView<T>*>(cloud.rows);
  const T* const all_queries = static_cast<const T*>(cloud.queries);
  const int64_t k = least(args.k, points.points);
  const T limit = limit_of_radius<T>(args);
  T* const queries = arena.take<T>(args.dims * kQueries);
  Candidates<T> candidates[kQueries];
  for (Candidates<T>& own : candidates) own = Candidates<T>(arena, args.first, k);
  for (int64_t place = begin; place < end; place += kQueries) {
    for (int q = 0; q < kQueries; ++q) {
      const T* const query = all_queries + query_at(cloud, least(place + q, end - 1)) * args.dims;
      for (int64_t d = 0; d < args.dims; ++d) queries[d * kQueries + q] = query[d];
      candidates[q].start(limit);
    }
    for (int64_t b = 0; b < points.blocks; ++b) {
      Vec<T> distances[kQueries][kVectors<T>];
      tile_distances<T, kNorm>(queries, points.block(b), args.dims, distances);
      const int64_t left = points.points - b * kBlockPoints;
      const uint32_t valid = left >= kBlockPoints ? 0xffffu : (1u << left) - 1;
      int64_t found = 0;
      for (int q = 0; q < kQueries; ++q) {
        Candidates<T>& own = candidates[q];
        const Vec<T> own_limit(own.limit());
        for (int v = 0; v < kVectors<T>; ++v) {
          const Vec<T> some = distances[q][v];
          auto mask = kAll ? not_less(own_limit, some) : less_equal(some, own_limit);
          mask.bits &= valid >> v * Vec<T>::size;
          if (mask.any()) own.add(mask, some, points.rows + b * kBlockPoints + v * Vec<T>::size);
        }
        if (args.first) {
          own.truncate();
          found += own.count();
        } else if (own.is_full()) {
          own.cut();
        }
      }
      if (args.first && found == kQueries * k) break;
    }
    for (int q = 0; q < least(kQueries, end - place); ++q) {
      Results<T>(args, cloud, query_at(cloud, place + q)).write(candidates[q], args.k);
    }
  }
}

// ---- A tree of boxes ---------------------------------------------------------------------------

template <class T, Norm kNorm, int kDims>
class TreeSearch {
 public:
  TreeSearch(const NeighbourArgs& args, const NeighbourCloud& cloud, Arena arena)
      : args_(args),
        tree_(*static_cast<const PointBlocksView<T>*>(cloud.tree)),
        rows_(static_cast<const PointBlocksView<T>*>(cloud.rows)),
        k_(least(args.k, tree_.points)),
        widest_(limit_of_radius<T>(args)),
        candidates_(arena, args.first, k_) {
    for (auto& previous : previous_) {
      for (V& lanes : previous) lanes = V(T(0));
    }
    for (V& lanes : reach_) lanes = V(static_cast<T>(__builtin_inf()));
  }

  void search(const T* query, Results<T> results) {
    for (int64_t d = 0; d < dims(); ++d) query_[d] = V(query[d]);
    if (args_.first && scan_pays()) {
      scan();
    } else {
      candidates_.start(args_.first ? widest_ : math::minimum(widest_, bound_by_previous()));
      visit(tree_.levels - 1, 0);
      within_ = candidates_.met();
    }
    const T last = results.write(candidates_, args_.k);
    if (!args_.first) {
      remember(candidates_.count() == k_ ? side(last) : static_cast<T>(__builtin_inf()));
    }
  }

 private:
  using V = Vec<T>;

  int64_t dims() const { return kDims > 0 ? kDims : args_.dims; }

  // Adds the points of a block within the limit.
  __attribute__((always_inline)) void meet(const T* block, const int32_t* rows) {
    const V limit(candidates_.limit());
    V sums[kVectors<T>];
    for (int v = 0; v < kVectors<T>; ++v) {
      for (int64_t d = 0; d < dims(); ++d) {
        const V points = V::load(block + d * kBlockPoints + v * V::size);
        const V term = math::distance_term<kNorm>(query_[d], points);
        sums[v] = d == 0 ? term : sums[v] + term;
      }
    }
    for (int v = 0; v < kVectors<T>; ++v) {
      candidates_.add(less_equal(sums[v], limit), sums[v], rows + v * V::size);
    }
  }

  // Of the boxes of a group, those within the limit.
  __attribute__((always_inline)) uint32_t near_boxes(const T* group, T* distances) const {
    const V limit(candidates_.limit());
    uint32_t near = 0;
    for (int v = 0; v < kVectors<T>; ++v) {
      V sum;
      for (int64_t d = 0; d < dims(); ++d) {
        const V lower = V::load(group + d * kFanOut + v * V::size);
        const V upper = V::load(group + (dims() + d) * kFanOut + v * V::size);
        const V term = math::box_distance_term<kNorm>(query_[d], lower, upper);
        sum = d == 0 ? term : sum + term;
      }
      sum.store(distances + v * V::size);
      near |= less_equal(sum, limit).bits << v * V::size;
    }
    return near;
  }

  void visit(int level, int64_t index) {
    T distances[kFanOut];
    uint32_t near = near_boxes(tree_.group(level, index), distances);
    if (level == 0) {
      for (; near != 0; near &= near - 1) {
        const int64_t block = index * kFanOut + __builtin_ctz(near);
        meet(tree_.block(block), tree_.rows + block * kBlockPoints);
        if (candidates_.is_full()) candidates_.cut();
      }
      return;
    }
    while (near != 0) {
      int nearest = __builtin_ctz(near);
      for (uint32_t others = near & (near - 1); others != 0; others &= others - 1) {
        const int other = __builtin_ctz(others);
        nearest = distances[other] < distances[nearest] ? other : nearest;
      }
      if (distances[nearest] > candidates_.limit()) return;
      near &= ~(1u << nearest);
      visit(level - 1, index * kFanOut + nearest);
    }
  }

  // Where the k nearest lie at most, by those of the queries before: no farther than from the other
  // query and from there to this one. Both distances are rounded, relatively by less than 2^-18
  // and absolutely, where they underflow, by less than the smallest normal number.
  T bound_by_previous() const {
    V least(static_cast<T>(__builtin_inf()));
    for (int v = 0; v < kVectors<T>; ++v) {
      V apart;
      for (int64_t d = 0; d < dims(); ++d) {
        const V term = math::distance_term<kNorm>(query_[d], previous_[d][v]);
        apart = d == 0 ? term : apart + term;
      }
      least = minimum(least, side(apart) + reach_[v]);
    }
    const T sum = lane_minimum(least);
    return (kNorm == Norm::one ? sum : sum * sum) * (T(1) + T(0x1p-16));
  }

  // Of a distance at most, as a length that can be added to others.
  template <class W>
  __attribute__((always_inline)) static W side(W distance) {
    const W above = distance + W(std::numeric_limits<T>::min());
    if constexpr (kNorm == Norm::one) {
      return above;
    } else {
      return square_root(above);
    }
  }

  // Whole vectors are stored: a load of one that was stored in pieces would have to wait.
  void remember(T reach) {
    const uint32_t place = 1u << searched_++ % kBlockPoints;
    for (int v = 0; v < kVectors<T>; ++v) {
      const typename V::MaskType lane{place >> v * V::size & V::MaskType::kAll};
      for (int64_t d = 0; d < dims(); ++d) {
        previous_[d][v] = select(lane, query_[d], previous_[d][v]);
      }
      reach_[v] = select(lane, V(reach), reach_[v]);
    }
  }

  // Whether a ball is so full that its first k points are sooner found in the order of the rows.
  // It is taken to hold as many as the previous one.
  bool scan_pays() const {
    const int64_t points_met = within_ > k_ ? tree_.points / within_ * k_ : tree_.points;
    constexpr int64_t kTreeCost = 1024;  // in points met
    return points_met < kTreeCost + 4 * within_;
  }

  void scan() {
    candidates_.start(widest_);
    int64_t block = 0;
    for (; block < rows_->blocks && candidates_.count() < k_; ++block) {
      meet(rows_->block(block), rows_->rows + block * kBlockPoints);
    }
    within_ = candidates_.count();
    candidates_.truncate();
    if (block > 0) within_ = within_ * rows_->blocks / block;
  }

  const NeighbourArgs& args_;
  const PointBlocksView<T>& tree_;
  const PointBlocksView<T>* rows_;
  int64_t k_;
  T widest_;
  Candidates<T> candidates_;
  V query_[kDims > 0 ? kDims : kMostTreeDims];
  // The queries before this one, and how far off the last of their nearest lies.
  V previous_[kDims > 0 ? kDims : kMostTreeDims][kVectors<T>];
  V reach_[kVectors<T>];
  int64_t searched_ = 0;
  int64_t within_ = 0;  // of the previous ball, about
};

template <class T, Norm kNorm, int kDims>
void search_tree(const NeighbourArgs& args, const NeighbourCloud& cloud, int64_t begin, int64_t end,
                 Arena arena) {
  TreeSearch<T, kNorm, kDims> search(args, cloud, arena);
  for (int64_t place = begin; place < end; ++place) {
    const int64_t query = query_at(cloud, place);
    search.search(static_cast<const T*>(cloud.queries) + query * args.dims,
                  Results<T>(args, cloud, query));
  }
}

template <class T, Norm kNorm>
void search_cloud(const NeighbourArgs& args, const NeighbourCloud& cloud, int64_t begin,
                  int64_t end, Arena arena) {
  if (cloud.tree == nullptr) {
    if (math::radius_limits(args.radius)) {
      return search_tiles<T, kNorm, false>(args, cloud, begin, end, arena);
    }
    return search_tiles<T, kNorm, true>(args, cloud, begin, end, arena);
  }
  switch (args.dims) {
    case 2:
      return search_tree<T, kNorm, 2>(args, cloud, begin, end, arena);
    case 3:
      return search_tree<T, kNorm, 3>(args, cloud, begin, end, arena);
    default:
      return search_tree<T, kNorm, 0>(args, cloud, begin, end, arena);
  }
}

// Calls body(T{}) with the compute type.
template <class Body>
FASTZOO_INLINE void with_compute_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::float64) return body(double{});
  return body(float{});
}

// ---- Gradients ---------------------------------------------------------------------------------

// What a pair adds to the gradient of its query for one dimension.
FASTZOO_INLINE double pull(Norm norm, double grad, double a, double b) {
  if (norm == Norm::two) return 2 * grad * (a - b);
  return a > b ? grad : a < b ? -grad : 0.0;
}

}  // namespace

void neighbour_workspace(const NeighbourArgs& args, int64_t points, int64_t& bytes) {
  with_compute_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Arena arena;
    arena.take<T>(args.dims * kTileQueries<T>);
    for (int q = 0; q < kTileQueries<T>; ++q) {
      Candidates<T>(arena, args.first, least(args.k, points));
    }
    bytes = arena.bytes();
  });
}

void neighbour_search(const NeighbourArgs& args, const NeighbourCloud& cloud, int64_t begin,
                      int64_t end, void* workspace) {
  with_compute_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.norm == Norm::one) {
      return search_cloud<T, Norm::one>(args, cloud, begin, end, Arena(workspace));
    }
    return search_cloud<T, Norm::two>(args, cloud, begin, end, Arena(workspace));
  });
}

void neighbour_backward_p1(const NeighbourBackwardArgs& args, const NeighbourBackwardCloud& cloud,
                           int64_t begin, int64_t end, double* sums) {
  with_compute_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = begin; i < end; ++i) {
      const T* const query = static_cast<const T*>(cloud.p1) + i * args.dims;
      for (int64_t d = 0; d < args.dims; ++d) sums[d] = 0;
      for (int64_t pair = i * args.k; pair < (i + 1) * args.k; ++pair) {
        const int64_t index = cloud.indices[pair];
        if (index < 0 || index >= cloud.points) continue;
        const T* const point = static_cast<const T*>(cloud.p2) + index * args.dims;
        const double grad = static_cast<const T*>(cloud.grad)[pair];
        for (int64_t d = 0; d < args.dims; ++d) {
          sums[d] += pull(args.norm, grad, query[d], point[d]);
        }
      }
      T* const out = static_cast<T*>(cloud.grad_p1) + i * args.dims;
      for (int64_t d = 0; d < args.dims; ++d) out[d] = static_cast<T>(sums[d]);
    }
  });
}

void neighbour_backward_p2(const NeighbourBackwardArgs& args, const NeighbourBackwardCloud& cloud,
                           int64_t begin, int64_t end, double* sums, int32_t* pairs) {
  with_compute_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < (end - begin) * args.dims; ++i) sums[i] = 0;
    for (int64_t i = 0; i < cloud.queries; ++i) {
      const int64_t* const indices = cloud.indices + i * args.k;
      // Which pairs end here follows no pattern: they are listed without a branch.
      int64_t count = 0;
      for (int64_t j = 0; j < args.k; ++j) {
        pairs[count] = static_cast<int32_t>(j);
        count += indices[j] >= begin && indices[j] < end;
      }
      const T* const query = static_cast<const T*>(cloud.p1) + i * args.dims;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t index = indices[pairs[j]];
        const T* const point = static_cast<const T*>(cloud.p2) + index * args.dims;
        const double grad = static_cast<const T*>(cloud.grad)[i * args.k + pairs[j]];
        double* const own = sums + (index - begin) * args.dims;
        for (int64_t d = 0; d < args.dims; ++d) {
          own[d] -= pull(args.norm, grad, query[d], point[d]);
        }
      }
    }
    T* const out = static_cast<T*>(cloud.grad_p2) + begin * args.dims;
    for (int64_t i = 0; i < (end - begin) * args.dims; ++i) out[i] = static_cast<T>(sums[i]);
  });
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
