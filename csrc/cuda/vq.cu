// Nearest-codebook lookup. A pass over tiles of products scores every code and keeps, for each row
// and group of codes, the best scores; where these and the bound prove a row's answer it is done,
// and the other rows score exactly what could still win. No N x K matrix is stored.
//   vq_prepare_codes  centred or of unit length, in the parts that the products read
//   vq_prepare_rows   the rows of x likewise, and the bound of a row's scores
//   vq_scan           tiles of scores; a block has some rows and every so many-th group of codes
//   vq_finish         a row's groups put together, exact scores where they are needed, the results
#include "../math/vq.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../torch_abi.h"
#include "runtime/rows.h"
#include "runtime/tile_product.h"

namespace fastzoo::cuda {
namespace {

using math::Metric;
using math::round_up;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPrepareBlocks = 512;  // at most, of codes
constexpr int kGroups = kWarpSize;   // of codes, at most: a lane each
constexpr int kGroupTiles = 4;       // of a group where that makes no more than these
constexpr int kMostNearest = 2 * kWarpSize;
constexpr int kSpare = 4;  // beyond the k scores that are wanted, so that few rows are unproven

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();
template <class C>
constexpr double kSmallest = std::numeric_limits<C>::min();

// What put() says of a coordinate, for the proof: what products do not see of it, and its low part.
struct Kept {
  double lost, low;
};

// float64: nothing is lost.
struct DoublePass {
  using Scheme = FusedScheme<double>;
  using Stored = double;
  using Value = double;
  static constexpr int kPiece = 4;
  static constexpr bool kProves = true;
  static constexpr double kUnit = 0x1p-53;
  static int64_t padded(int64_t dims) { return round_up(dims, Rows<double>::kAligned); }
  static int64_t pitch(int64_t dims) { return padded(dims); }
  FASTZOO_DEVICE static int64_t products(int64_t dims) { return dims; }

  FASTZOO_DEVICE static Kept put(double* row, int64_t d, double value) {
    row[d] = value;
    return {0, 0};
  }
  FASTZOO_DEVICE static Vector<double, kPiece> load(const double* row, int64_t d) {
    return load_vector<kPiece>(row + d);
  }
};

// bfloat16 high and low parts. Products of two low parts are left out.
struct SplitPass {
  using Scheme = SplitScheme;
  using Stored = BFloat16;
  using Value = float;
  static constexpr int kPiece = 8;
  static constexpr bool kProves = true;
  static constexpr double kUnit = 0x1p-22;
  static int64_t padded(int64_t dims) { return round_up(dims, Scheme::kDims); }
  static int64_t pitch(int64_t dims) { return 2 * padded(dims); }
  FASTZOO_DEVICE static int64_t products(int64_t dims) { return 3 * dims; }

  FASTZOO_DEVICE static Kept put(BFloat16* row, int64_t d, float value) {
    const BFloat16 high(value);
    const float rest = value - static_cast<float>(high);
    const BFloat16 low(rest);
    row[Scheme::place(d)] = high;
    row[Scheme::place(d) + Scheme::kDims] = low;
    return {rest - static_cast<float>(low), static_cast<float>(low)};
  }
  // The sum of the parts is exact.
  FASTZOO_DEVICE static Vector<float, kPiece> load(const BFloat16* row, int64_t d) {
    const Vector<BFloat16, kPiece> high = load_vector<kPiece>(row + Scheme::place(d));
    const Vector<BFloat16, kPiece> low =
        load_vector<kPiece>(row + Scheme::place(d) + Scheme::kDims);
    Vector<float, kPiece> sums;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      sums[i] = static_cast<float>(high[i]) + static_cast<float>(low[i]);
    }
    return sums;
  }
};

// Rounded to bfloat16. Its scores are taken as they are.
struct FastPass {
  using Scheme = MmaScheme<MmaType::bfloat16>;
  using Stored = BFloat16;
  using Value = float;
  static constexpr int kPiece = 8;
  static constexpr bool kProves = false;
  static int64_t padded(int64_t dims) { return round_up(dims, Rows<BFloat16>::kAligned); }
  static int64_t pitch(int64_t dims) { return padded(dims); }

  FASTZOO_DEVICE static Kept put(BFloat16* row, int64_t d, float value) {
    row[d] = BFloat16(value);
    return {0, 0};
  }
  FASTZOO_DEVICE static Vector<float, kPiece> load(const BFloat16* row, int64_t d) {
    const Vector<BFloat16, kPiece> bits = load_vector<kPiece>(row + d);
    Vector<float, kPiece> values;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) values[i] = static_cast<float>(bits[i]);
    return values;
  }
};

// The codes by groups, of so many codes each, and the length of a row's list of best scores.
struct Groups {
  int count, codes, length;
};

// Head h of x [rows, heads, dims] meets codebook[h] of [heads, codes, dims]. Prepared rows are
// [heads, rows, pitch], prepared codes [heads, codes, pitch].
template <class T, class Pass>
struct Lookup {
  using C = typename Pass::Value;

  Metric metric;
  int64_t rows, heads, codes, dims;
  int64_t padded, pitch;
  Groups groups;
  int k;
  const T* x;
  const T* codebook;
  const C* centre;  // [heads, dims], or null where the metric has none
  typename Pass::Stored* prepared_x;
  typename Pass::Stored* prepared_codes;
  C* starts;        // [heads, codes]: what is added to a code's products
  uint64_t* norms;  // [heads, 2]: bits of the largest norm, and of the largest that codes lose
  double* bounds;   // [heads, rows], where the pass proves

  FASTZOO_DEVICE const T* row(int64_t r, int64_t head) const {
    return x + (r * heads + head) * dims;
  }
  FASTZOO_DEVICE const T* code(int64_t c, int64_t head) const {
    return codebook + (head * codes + c) * dims;
  }
};

struct Squares {
  double kept = 0, lost = 0, low = 0;
};

// By a warp: a row as the products read it, centred or divided by a length.
template <class T, class Pass>
FASTZOO_DEVICE Squares prepare(const Lookup<T, Pass>& lookup, const T* from,
                               const typename Pass::Value* centre, bool scaled, double length,
                               typename Pass::Stored* to) {
  using C = typename Pass::Value;
  Squares sums;
#pragma unroll 1  // a division does not gain from it, and its registers would spill
  for (int64_t d = threadIdx.x % kWarpSize; d < lookup.padded; d += kWarpSize) {
    C value = 0;
    if (d < lookup.dims) {
      value = static_cast<C>(from[d]);
      if (centre != nullptr) value -= centre[d];
      if (scaled) value = static_cast<C>(value / length);
    }
    const Kept kept = Pass::put(to, d, value);
    sums.kept += static_cast<double>(value) * value;
    sums.lost += kept.lost * kept.lost;
    sums.low += kept.low * kept.low;
  }
  return {warp_sum(sums.kept), warp_sum(sums.lost), warp_sum(sums.low)};
}

template <class T, class Pass>
FASTZOO_DEVICE const typename Pass::Value* centre_of(const Lookup<T, Pass>& lookup, int64_t head) {
  return lookup.centre == nullptr ? nullptr : lookup.centre + head * lookup.dims;
}

// A warp takes every so many-th code of the head blockIdx.y.
template <class T, class Pass>
__global__ void __launch_bounds__(kThreads) vq_prepare_codes(Lookup<T, Pass> lookup) {
  using C = typename Pass::Value;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t head = blockIdx.y;
  const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  double largest = 0;
  double largest_lost = 0;
  for (int64_t k = first; k < lookup.codes; k += int64_t{gridDim.x} * kWarps) {
    const T* code = lookup.code(k, head);
    const bool scaled = lookup.metric == Metric::cosine;
    double length = 1;
    if (scaled) {
      double squares = 0;
      for (int64_t d = lane; d < lookup.dims; d += kWarpSize) {
        const double c = static_cast<C>(code[d]);
        squares += c * c;
      }
      length = math::maximum(__builtin_sqrt(warp_sum(squares)), math::kNormFloor);
    }
    const int64_t at = head * lookup.codes + k;
    const Squares squares = prepare(lookup, code, centre_of(lookup, head), scaled, length,
                                    lookup.prepared_codes + at * lookup.pitch);
    if (lane == 0) {
      const bool l2 = lookup.metric == Metric::l2;
      lookup.starts[at] = l2 ? static_cast<C>(-squares.kept / 2) : C{0};
    }
    const double norm = math::norm_above(squares.kept, lookup.dims);
    if (!(norm <= largest)) largest = norm < kInfinity<double> ? norm : kInfinity<double>;
    // A low part is within 2^-8 of its number: so large is the row's, beside the code's.
    const double lost = math::norm_above(squares.lost, lookup.dims) +
                        0x1p-8 * math::norm_above(squares.low, lookup.dims);
    largest_lost = math::maximum(largest_lost, lost);
  }
  if (lane != 0) return;
  atomic_max(lookup.norms + 2 * head, math::bits_as<uint64_t>(largest));
  atomic_max(lookup.norms + 2 * head + 1, math::bits_as<uint64_t>(largest_lost));
}

// A warp a row, of the head blockIdx.y.
template <class T, class Pass>
__global__ void __launch_bounds__(kThreads) vq_prepare_rows(Lookup<T, Pass> lookup) {
  using C = typename Pass::Value;
  const int64_t head = blockIdx.y;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= lookup.rows) return;
  const int64_t at = head * lookup.rows + row;
  const Squares squares = prepare(lookup, lookup.row(row, head), centre_of(lookup, head), false, 1,
                                  lookup.prepared_x + at * lookup.pitch);
  if constexpr (Pass::kProves) {
    if (threadIdx.x % kWarpSize != 0) return;
    const auto norm = [&](double sum) { return math::norm_above(sum, lookup.dims); };
    const uint64_t* of_codes = lookup.norms + 2 * head;
    lookup.bounds[at] =
        math::score_bound(lookup.metric, Pass::products(lookup.dims), norm(squares.kept),
                          math::bits_as<double>(of_codes[0]), norm(squares.lost),
                          math::bits_as<double>(of_codes[1]), Pass::kUnit, kSmallest<C>);
  }
}

// Of a list of the best scores of a row and a group of codes, the highest first. Of equal scores
// any may stand before the others: they prove nothing.
template <class C>
struct Entry {
  C score;
  int code;
};

// The list of two; the second's code is not known.
template <class C>
struct TopTwo {
  C best = -kInfinity<C>;
  C second = -kInfinity<C>;
  int code = 0;

  FASTZOO_DEVICE void add(C score, int i) {
    if (score > best) {
      second = best;
      best = score;
      code = i;
    } else if (score > second) {
      second = score;
    }
  }

  // Afterwards all `width` neighbouring lanes hold what they found together.
  FASTZOO_DEVICE void merge_lanes(int width) {
    for (int flip = width / 2; flip > 0; flip /= 2) {
      const C other_best = shuffle_xor(best, flip);
      const C other_second = shuffle_xor(second, flip);
      const int other_code = shuffle_xor(code, flip);
      code = other_best > best ? other_code : code;
      second = math::maximum(math::minimum(best, other_best), math::maximum(second, other_second));
      best = math::maximum(best, other_best);
    }
  }
};

template <class C>
FASTZOO_DEVICE void insert(Entry<C>* list, int length, C score, int code) {
  int at = length - 1;
  for (; at > 0 && list[at - 1].score < score; --at) list[at] = list[at - 1];
  list[at] = {score, code};
}

// A block scores Scheme::kRows rows against every so many-th group of codes, from the group
// blockIdx.y on. several: a row's list has more than two scores and lies in memory; only lanes of
// one warp touch it, in turn.
template <class Pass, bool several>
__global__ void __launch_bounds__(kTileThreads, Pass::Scheme::kBlocksEach)
    vq_scan(Groups groups, Rows<typename Pass::Stored> x, Rows<typename Pass::Stored> codes,
            const typename Pass::Value* starts, const double* bounds,
            Entry<typename Pass::Value>* found) {
  using Scheme = typename Pass::Scheme;
  using C = typename Pass::Value;
  __shared__ TileSlabs<Scheme> slabs;
  // Those of the product under way, and of the one before, which others may still read.
  __shared__ SharedArray<C, 2 * kTileColumns> tile_starts;
  const int thread = threadIdx.x;
  const int turn = thread % Scheme::kRowLanes;
  const int64_t head = blockIdx.z;
  const int64_t first_row = int64_t{blockIdx.x} * Scheme::kRows;
  const int rows = tile_left(x.count, first_row, Scheme::kRows);
  x.data += head * x.count * x.step;
  codes.data += head * codes.count * codes.step;
  starts += head * codes.count;
  bounds += head * x.count + first_row;

  TileProduct<Scheme, typename Pass::Stored> product(slabs);
  int current = 0;
  C floor[Scheme::kRowsEach];  // below it nothing counts any more
#pragma unroll
  for (int i = 0; i < Scheme::kRowsEach; ++i) floor[i] = -kInfinity<C>;
  for (int group = blockIdx.y; group < groups.count; group += gridDim.y) {
    const auto list = [&](int i) {
      const int64_t row = first_row + Scheme::row(i);
      return found + ((head * groups.count + group) * x.count + row) * groups.length;
    };
    TopTwo<C> top[Scheme::kRowsEach];
    if constexpr (several) {
#pragma unroll
      for (int i = 0; i < Scheme::kRowsEach; ++i) {
        if (Scheme::row(i) >= rows) {
          floor[i] = kInfinity<C>;
        } else if (turn == 0) {
          for (int e = 0; e < groups.length; ++e) list(i)[e] = {-kInfinity<C>, 0};
        }
      }
      sync_warp();
    }
    const int64_t begin = int64_t{group} * groups.codes;
    const int64_t end = begin + groups.codes < codes.count ? begin + groups.codes : codes.count;
    for (int64_t first_code = begin; first_code < end; first_code += kTileColumns) {
      if (thread < kTileColumns) {
        const int64_t code = first_code + thread;
        tile_starts[current + thread] = code < end ? starts[code] : -kInfinity<C>;
      }
      auto scores = product.multiply(x.from(first_row), codes.from(first_code));
#pragma unroll
      for (int i = 0; i < Scheme::kRowsEach; ++i) {
        C highest = -kInfinity<C>;
#pragma unroll
        for (int j = 0; j < Scheme::kColumnsEach; ++j) {
          scores(i, j) += tile_starts[current + Scheme::column(j)];
          highest = math::maximum(highest, scores(i, j));
        }
        const auto code = [&](int j) { return static_cast<int>(first_code) + Scheme::column(j); };
        if constexpr (several) {
          if (!any(highest > floor[i])) continue;
          for (int lane = 0; lane < Scheme::kRowLanes; ++lane) {
            if (turn == lane) {
#pragma unroll
              for (int j = 0; j < Scheme::kColumnsEach; ++j) {
                if (!(scores(i, j) > floor[i])) continue;
                insert(list(i), groups.length, scores(i, j), code(j));
                floor[i] = list(i)[groups.length - 1].score;
              }
            }
            sync_warp();
            if (Scheme::row(i) < rows) floor[i] = list(i)[groups.length - 1].score;
          }
        } else {
          if (!(highest > math::maximum(floor[i], top[i].second))) continue;
#pragma unroll
          for (int j = 0; j < Scheme::kColumnsEach; ++j) top[i].add(scores(i, j), code(j));
        }
      }
      current ^= kTileColumns;
    }

    if constexpr (!several) {
#pragma unroll
      for (int i = 0; i < Scheme::kRowsEach; ++i) {
        top[i].merge_lanes(Scheme::kRowLanes);
        if (Scheme::row(i) >= rows) continue;
        // A bound more than is needed, for the rounding of this.
        const C bound = Pass::kProves ? static_cast<C>(3 * bounds[Scheme::row(i)]) : C{0};
        floor[i] = math::maximum(floor[i], top[i].best - bound);
        if (turn > 0) continue;
        list(i)[0] = {top[i].best, top[i].code};
        list(i)[1] = {top[i].second, 0};
      }
    }
  }
}

// A product of the pass as one thread computes it: no further from the exact one.
template <class Pass>
FASTZOO_DEVICE typename Pass::Value product_of_rows(const typename Pass::Stored* a,
                                                    const typename Pass::Stored* b,
                                                    int64_t padded) {
  typename Pass::Value sum = 0;
  for (int64_t d = 0; d < padded; d += Pass::kPiece) {
    const auto left = Pass::load(a, d);
    const auto right = Pass::load(b, d);
#pragma unroll
    for (int i = 0; i < Pass::kPiece; ++i) sum = fused_multiply_add(left[i], right[i], sum);
  }
  return sum;
}

// The k best codes by exact score, ties by lower index, NaN last. Entry e is held by lane
// e % kWarpSize as e / kWarpSize.
class Ranking {
 public:
  FASTZOO_DEVICE explicit Ranking(int k) : last_(k - 1) {}

  FASTZOO_DEVICE int code(int e) const {
    return e < kWarpSize ? shuffle(codes_[0], e) : shuffle(codes_[1], e - kWarpSize);
  }

  // Each lane brings a code, or none.
  FASTZOO_DEVICE void add(bool valid, double score, int code) {
    const int lane = threadIdx.x % kWarpSize;
    for (;;) {
      const bool low = last_ < kWarpSize;
      const double worst = shuffle(low ? scores_[0] : scores_[1], last_ % kWarpSize);
      const int worst_code = shuffle(low ? codes_[0] : codes_[1], last_ % kWarpSize);
      const uint32_t waiting = ballot(valid && ahead(score, code, worst, worst_code));
      if (waiting == 0) return;
      const int next = population_count((waiting & (~waiting + 1)) - 1);
      insert(lane, shuffle(score, next), shuffle(code, next));
      valid = valid && lane != next;
    }
  }

 private:
  static constexpr int kNone = std::numeric_limits<int>::max();

  FASTZOO_DEVICE static bool ahead(double a, int a_code, double b, int b_code) {
    return math::better(a, b) || (!math::better(b, a) && a_code < b_code);
  }

  FASTZOO_DEVICE void insert(int lane, double score, int code) {
    int place = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      place += population_count(ballot(ahead(scores_[i], codes_[i], score, code)));
    }
    const double carried_score = shuffle(scores_[0], kWarpSize - 1);
    const int carried_code = shuffle(codes_[0], kWarpSize - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      double before_score = shuffle_up(scores_[i], 1);
      int before_code = shuffle_up(codes_[i], 1);
      if (i == 1 && lane == 0) {
        before_score = carried_score;
        before_code = carried_code;
      }
      const int e = i * kWarpSize + lane;
      if (e == place) {
        scores_[i] = score;
        codes_[i] = code;
      } else if (e > place) {
        scores_[i] = before_score;
        codes_[i] = before_code;
      }
    }
  }

  const int last_;
  double scores_[2] = {__builtin_nan(""), __builtin_nan("")};
  int codes_[2] = {kNone, kNone};
};

// What becomes of a row: of each of its k codes the index, and d; where `quantized` is not null
// the code itself, and d is `weight` times the squared distance.
template <class T, class C>
struct Results {
  const bool* mask;  // or null
  int64_t* indices;
  C* d;
  T* quantized;
  double weight;
};

template <class T, class Pass>
FASTZOO_DEVICE void write(const Lookup<T, Pass>& lookup, const T* x, const T* code, bool measured,
                          int64_t index, int64_t at,
                          const Results<T, typename Pass::Value>& results) {
  using C = typename Pass::Value;
  const int lane = threadIdx.x % kWarpSize;
  const bool quantizes = results.quantized != nullptr;
  const Metric metric = quantizes ? Metric::l2 : lookup.metric;
  double sum = 0;
  double x_squares = 0;
  double code_squares = 0;
  for (int64_t d = lane; d < lookup.dims; d += kWarpSize) {
    const double a = static_cast<C>(x[d]);
    const double b = static_cast<C>(code[d]);
    sum += math::score_term(metric, a, b);
    x_squares += a * a;
    code_squares += b * b;
    if (quantizes) results.quantized[at * lookup.dims + d] = code[d];
  }
  sum = warp_sum(sum);
  if (metric == Metric::cosine) {
    sum /= math::maximum(__builtin_sqrt(warp_sum(code_squares)), math::kNormFloor) *
           math::maximum(__builtin_sqrt(warp_sum(x_squares)), math::kNormFloor);
  }
  if (lane != 0) return;
  results.indices[at] = index;
  results.d[at] = measured ? static_cast<C>(results.weight * sum) : C{0};
}

// A warp a row, of the head blockIdx.y; a lane a group.
template <class T, class Pass>
__global__ void __launch_bounds__(kThreads, 3)
    vq_finish(Lookup<T, Pass> lookup, const Entry<typename Pass::Value>* found,
              Results<T, typename Pass::Value> results) {
  using C = typename Pass::Value;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t head = blockIdx.y;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= lookup.rows) return;
  const int64_t first_result = (row * lookup.heads + head) * lookup.k;
  const T* x = lookup.row(row, head);
  if (results.mask != nullptr && !results.mask[row]) {
    for (int e = 0; e < lookup.k; ++e) write(lookup, x, x, false, -1, first_result + e, results);
    return;
  }
  const auto list = [&](int group) {
    return found +
           ((head * lookup.groups.count + group) * lookup.rows + row) * lookup.groups.length;
  };
  const bool has_group = lane < lookup.groups.count;

  // The k-th highest of all that the groups hold: k codes reach it.
  C reached = 0;
  int taken = 0;
  for (int e = 0; e < lookup.k; ++e) {
    const bool more = has_group && taken < lookup.groups.length;
    const C own = more ? list(lane)[taken].score : -kInfinity<C>;
    reached = own;
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
      reached = math::maximum(reached, shuffle_xor(reached, flip));
    }
    const uint32_t at_it = ballot(more && own == reached);
    taken += (at_it & (~at_it + 1)) == 1u << lane;
  }
  const bool finite = reached > -kInfinity<C> && reached < kInfinity<C>;
  const bool settled = finite && !Pass::kProves;
  const double bound = Pass::kProves ? lookup.bounds[head * lookup.rows + row] : 0;
  const double needed = finite ? reached - 2 * bound : -kInfinity<double>;

  // Of a group whose list ends below what is needed, the list has all candidates.
  const bool open = has_group && !settled && !(list(lane)[lookup.groups.length - 1].score < needed);
  const int most = !has_group || open ? 0 : settled ? lookup.k : lookup.groups.length;
  int listed = 0;
  while (listed < most && list(lane)[listed].score >= needed) ++listed;
  const uint32_t open_groups = ballot(open);
  const uint32_t groups_listed = ballot(listed > 0);

  if (lookup.k == 1 && open_groups == 0 && population_count(groups_listed) == 1) {
    const int group = population_count(groups_listed - 1);
    const int code = list(group)[0].code;
    write(lookup, x, lookup.code(code, head), true, code, first_result, results);
    return;
  }
  const auto x_at = [&](int64_t d) { return static_cast<double>(static_cast<C>(x[d])); };
  const auto* prepared_x = lookup.prepared_x + (head * lookup.rows + row) * lookup.pitch;
  Ranking ranking(lookup.k);
  for (int group = 0; group < lookup.groups.count; ++group) {
    const bool all = open_groups >> group & 1;
    const int64_t first = int64_t{group} * lookup.groups.codes;
    const int64_t left = lookup.codes - first;
    const int size = left < lookup.groups.codes ? static_cast<int>(left) : lookup.groups.codes;
    const int count = all ? size : shuffle(listed, group);
    for (int base = 0; base < count; base += kWarpSize) {
      const int i = base + lane;
      bool valid = i < count;
      int code = 0;
      double score = 0;
      if (valid) code = all ? static_cast<int>(first) + i : list(group)[i].code;
      const int64_t at = head * lookup.codes + code;
      if (valid && all) {
        const C fast = product_of_rows<Pass>(prepared_x, lookup.prepared_codes + at * lookup.pitch,
                                             lookup.padded);
        valid = !(fast + lookup.starts[at] < needed);
      }
      if (valid) {
        const T* values = lookup.codebook + at * lookup.dims;
        const auto code_at = [&](int64_t d) {
          return static_cast<double>(static_cast<C>(values[d]));
        };
        score = math::exact_score(lookup.metric, x_at, code_at, lookup.dims);
      }
      ranking.add(valid, score, code);
    }
  }
  for (int e = 0; e < lookup.k; ++e) {
    // Fewer than k would mean a bound that does not hold: nothing may be read from beyond the
    // codes.
    const int found_code = ranking.code(e);
    const int code = found_code < lookup.codes ? found_code : 0;
    write(lookup, x, lookup.code(code, head), true, code, first_result + e, results);
  }
}

Metric metric_of(const std::string& name) {
  Metric metric{};
  STD_TORCH_CHECK(math::metric_named(name.c_str(), metric),
                  "fastzoo: vq_nearest: metric l2, cosine or dot expected, got ", name);
  return metric;
}

Tensor mean_of_codes(const Tensor& codebook, ScalarType dtype) {
  using torch::stable::detail::from;
  const std::vector<int64_t> codes{-2};
  std::array<StableIValue, 4> stack{
      from(codebook), from(std::optional<torch::headeronly::IntHeaderOnlyArrayRef>(codes)),
      from(false), from(std::optional<ScalarType>(dtype))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mean", "dim", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The operators' common part: k codes of each row, into results that are contiguous.
template <class T, class Pass>
void look_up(const Tensor& x, const Tensor& codebook, Metric metric, int64_t k,
             const Results<T, typename Pass::Value>& results) {
  using C = typename Pass::Value;
  using Scheme = typename Pass::Scheme;
  using Stored = typename Pass::Stored;
  const bool several = k > 1;
  Lookup<T, Pass> lookup{metric, x.size(0)};
  const int64_t rows = lookup.rows;
  const int64_t heads = lookup.heads = x.dim() == 3 ? x.size(1) : 1;
  const int64_t codes = lookup.codes = codebook.size(-2);
  const int64_t dims = lookup.dims = x.size(-1);
  STD_TORCH_CHECK(codes < std::numeric_limits<int32_t>::max() - kTileColumns,
                  "fastzoo: vq_nearest: fewer than 2^31 codes expected, got ", codes);
  STD_TORCH_CHECK(heads < (1 << 16), "fastzoo: vq_nearest: fewer than 65536 heads expected, got ",
                  heads);
  lookup.padded = Pass::padded(dims);
  const int64_t pitch = lookup.pitch = Pass::pitch(dims);
  lookup.k = static_cast<int>(k);

  const unsigned row_blocks = blocks_for(rows, Scheme::kRows);
  const int64_t tiles = blocks_for(codes, kTileColumns);
  const int64_t to_fill = (kManyBlocks + row_blocks * heads - 1) / (row_blocks * heads);
  const int64_t shares = std::min({to_fill, tiles, int64_t{kGroups}});
  const int64_t to_rescore_few =
      several ? 1 : std::min((tiles + kGroupTiles - 1) / kGroupTiles, int64_t{kGroups});
  Groups& groups = lookup.groups;
  groups.codes =
      static_cast<int>(blocks_for(tiles, std::max(shares, to_rescore_few))) * kTileColumns;
  groups.count = static_cast<int>(blocks_for(codes, groups.codes));
  groups.length = several ? lookup.k + kSpare : 2;

  const Stream stream(x);
  const auto data = [](const Tensor& tensor, auto type) {
    return static_cast<decltype(type)*>(tensor.mutable_data_ptr());
  };
  const auto bytes = [&](int64_t n, size_t each) {
    return empty(x, {n, static_cast<int64_t>(each)}, ScalarType::Byte);
  };
  const Tensor values = torch::stable::contiguous(x);
  const Tensor book = torch::stable::contiguous(codebook);
  const Tensor prepared_x = bytes(heads * rows * pitch, sizeof(Stored));
  const Tensor prepared_codes = bytes(heads * codes * pitch, sizeof(Stored));
  const Tensor starts = bytes(heads * codes, sizeof(C));
  const Tensor norms = torch::stable::new_zeros(x, {heads, 2}, ScalarType::Long);
  const Tensor bounds = empty(x, {heads, rows}, ScalarType::Double);
  const Tensor found = bytes(heads * groups.count * rows * groups.length, sizeof(Entry<C>));
  const bool has_centre = metric == Metric::l2;
  const ScalarType compute = compute_dtype(x.scalar_type());
  const Tensor mean = has_centre ? mean_of_codes(book, compute) : empty(x, {0}, compute);
  lookup.x = data(values, T{});
  lookup.codebook = data(book, T{});
  lookup.centre = has_centre ? data(mean, C{}) : nullptr;
  lookup.prepared_x = data(prepared_x, Stored{});
  lookup.prepared_codes = data(prepared_codes, Stored{});
  lookup.starts = data(starts, C{});
  lookup.norms = data(norms, uint64_t{});
  lookup.bounds = data(bounds, double{});

  const unsigned heads_grid = static_cast<unsigned>(heads);
  const unsigned code_blocks = std::min<unsigned>(blocks_for(codes, kWarps), kPrepareBlocks);
  stream.launch("vq_prepare_codes", vq_prepare_codes<T, Pass>, dim3(code_blocks, heads_grid),
                kThreads, lookup);
  const dim3 warp_a_row(blocks_for(rows, kWarps), heads_grid);
  stream.launch("vq_prepare_rows", vq_prepare_rows<T, Pass>, warp_a_row, kThreads, lookup);
  Entry<C>* found_data = data(found, Entry<C>{});
  stream.launch("vq_scan", several ? vq_scan<Pass, true> : vq_scan<Pass, false>,
                dim3(row_blocks, std::min<unsigned>(shares, groups.count), heads_grid),
                kTileThreads, groups, Rows<Stored>{lookup.prepared_x, rows, pitch, pitch, true},
                Rows<Stored>{lookup.prepared_codes, codes, pitch, pitch, true}, lookup.starts,
                lookup.bounds, found_data);
  stream.launch("vq_finish", vq_finish<T, Pass>, warp_a_row, kThreads, lookup, found_data, results);
}

// Calls body(T{}, Pass{}).
template <class Body>
void dispatch_pass(ScalarType dtype, const std::string& precision, const Body& body) {
  STD_TORCH_CHECK(precision == "exact" || precision == "fast",
                  "fastzoo: vq_nearest: precision exact or fast expected, got ", precision);
  dispatch_float(dtype, "vq_nearest", [&](auto value) {
    if constexpr (std::is_same_v<decltype(value), double>) {
      body(value, DoublePass{});
    } else if (precision == "fast") {
      body(value, FastPass{});
    } else {
      body(value, SplitPass{});
    }
  });
}

// Those of x, with another last one; without it where that is 0.
std::vector<int64_t> sizes_like(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  if (last > 0) sizes.push_back(last);
  return sizes;
}

std::tuple<Tensor, Tensor> vq_nearest(const Tensor& x, const Tensor& codebook, const Tensor& mask,
                                      const std::string& metric_name, int64_t k,
                                      const std::string& precision) {
  using torch::stable::new_empty;
  const Metric metric = metric_of(metric_name);
  STD_TORCH_CHECK(k <= kMostNearest, "fastzoo: vq_nearest: k of at most ", kMostNearest,
                  " expected, got ", k);
  const std::vector<int64_t> sizes = sizes_like(x, k);
  const Tensor indices = new_empty(x, sizes, ScalarType::Long);
  const Tensor d = new_empty(x, sizes, compute_dtype(x.scalar_type()));
  if (indices.numel() == 0) return {d, indices};
  const Tensor kept = torch::stable::contiguous(mask);
  dispatch_pass(x.scalar_type(), precision, [&](auto type, auto pass) {
    using T = decltype(type);
    using Pass = decltype(pass);
    using C = typename Pass::Value;
    look_up<T, Pass>(x, codebook, metric, std::max(k, int64_t{1}),
                     Results<T, C>{optional_data<const bool>(kept), optional_data<int64_t>(indices),
                                   optional_data<C>(d), nullptr, 1});
  });
  return {d, indices};
}

std::tuple<Tensor, Tensor, Tensor> vq_quantize(const Tensor& x, const Tensor& codebook,
                                               const Tensor& mask, const std::string& metric_name,
                                               const std::string& precision,
                                               [[maybe_unused]] const std::string& estimator,
                                               double codebook_weight, double beta) {
  using torch::stable::new_empty;
  const Metric metric = metric_of(metric_name);
  const std::vector<int64_t> sizes = sizes_like(x, 0);
  const Tensor indices = new_empty(x, sizes, ScalarType::Long);
  const Tensor losses = new_empty(x, sizes, compute_dtype(x.scalar_type()));
  const Tensor quantized = new_empty(x, sizes_like(x, x.size(-1)), x.scalar_type());
  if (indices.numel() == 0) return {quantized, losses, indices};
  const Tensor kept = torch::stable::contiguous(mask);
  dispatch_pass(x.scalar_type(), precision, [&](auto type, auto pass) {
    using T = decltype(type);
    using Pass = decltype(pass);
    using C = typename Pass::Value;
    look_up<T, Pass>(x, codebook, metric, 1,
                     Results<T, C>{optional_data<const bool>(kept), optional_data<int64_t>(indices),
                                   optional_data<C>(losses), optional_data<T>(quantized),
                                   codebook_weight + beta});
  });
  return {quantized, losses, indices};
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::vq_nearest>(m, "vq_nearest.cuda");
  fastzoo::implement<fastzoo::cuda::vq_quantize>(m, "vq_quantize.cuda");
}
