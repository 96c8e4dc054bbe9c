// Nearest-codebook lookup. A tiled fast pass scores every code in the compute type and keeps, for
// each row, the best score and the second best; a row whose winner these two prove is done, and
// the others are scored exactly. No N x K matrix is stored.
#include "../math/vq.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../torch_abi.h"
#include "runtime/launch.h"
#include "runtime/rows.h"

namespace fastzoo::cuda {
namespace {

using math::Metric;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTile = 64;             // rows, and codes, of the fast pass's tile
constexpr int kDepth = 32;            // dimensions of it in shared memory at a time
constexpr int kPitch = kTile + 4;     // of a dimension there: aligned, its stores free of conflicts
constexpr int kSide = 16;             // threads along a side of the tile
constexpr int kEach = kTile / kSide;  // rows, and codes, of a thread
constexpr int kPiece = 4;             // dimensions that a thread loads at once
constexpr int kPrepareBlocks = 512;   // at most

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();
template <class C>
constexpr double kUnit = std::numeric_limits<C>::epsilon() / 2;
template <class C>
constexpr double kSmallest = std::numeric_limits<C>::min();

// What the fast pass sees of a value; centre is null where the metric has none.
template <class T, class C>
FASTZOO_DEVICE C centred(T value, const C* centre, int64_t d) {
  const C converted = static_cast<C>(value);
  return centre == nullptr ? converted : converted - centre[d];
}

// The codebook as the fast pass reads it: centred (l2) or of unit length (cosine), rows padded
// with zeros to `pitch`, and each code's starting score: -|c'|^2/2 (l2), 0, or for a code beyond
// the last -inf. Also the bits of the largest norm. A warp takes every so many-th code.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    vq_prepare(Metric metric, const T* codebook, const C* centre, int64_t codes, int64_t dims,
               int64_t padded_codes, int64_t pitch, C* prepared, C* offsets, uint64_t* norm_bits) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  double largest = 0;
  for (int64_t k = first; k < padded_codes; k += int64_t{gridDim.x} * kWarps) {
    const T* code = codebook + k * dims;
    C* row = prepared + k * pitch;
    const bool exists = k < codes;
    double squares = 0;
    if (exists) {
      for (int64_t d = lane; d < dims; d += kWarpSize) {
        const double c = centred(code[d], centre, d);
        squares += c * c;
      }
    }
    squares = warp_sum(squares);
    const bool scaled = metric == Metric::cosine;
    const double length = math::maximum(__builtin_sqrt(squares), math::kNormFloor);
    double prepared_squares = 0;
#pragma unroll 1  // a division does not gain from it, and its registers would spill
    for (int64_t d = lane; d < pitch; d += kWarpSize) {
      C c = exists && d < dims ? centred(code[d], centre, d) : C{0};
      if (scaled) c = static_cast<C>(c / length);
      row[d] = c;
      prepared_squares += static_cast<double>(c) * c;
    }
    prepared_squares = warp_sum(prepared_squares);
    if (lane == 0) {
      const C start = metric == Metric::l2 ? static_cast<C>(-prepared_squares / 2) : C{0};
      offsets[k] = exists ? start : -kInfinity<C>;
    }
    const double norm = math::norm_above(prepared_squares, dims);
    if (!(norm <= largest)) largest = norm < kInfinity<double> ? norm : kInfinity<double>;
  }
  if (lane == 0) atomic_max(norm_bits, math::bits_as<uint64_t>(largest));
}

// The two highest scores of a row, and a code that has the highest: in a tie any of them, since
// a tie proves nothing.
template <class C>
struct TopTwo {
  C best = -kInfinity<C>;
  C second = -kInfinity<C>;
  int index = 0;

  FASTZOO_DEVICE void add(C score, int i) {
    if (score > best) {
      second = best;
      best = score;
      index = i;
    } else if (score > second) {
      second = score;
    }
  }

  // Afterwards all `width` neighbouring lanes hold what they found together.
  FASTZOO_DEVICE void merge_lanes(int width) {
    for (int flip = width / 2; flip > 0; flip /= 2) {
      const C other_best = shuffle_xor(best, flip);
      const C other_second = shuffle_xor(second, flip);
      merge(other_best, other_second, shuffle_xor(index, flip));
    }
  }

  FASTZOO_DEVICE void merge(C other_best, C other_second, int other_index) {
    index = other_best > best ? other_index : index;
    second = math::maximum(math::minimum(best, other_best), math::maximum(second, other_second));
    best = math::maximum(best, other_best);
  }
};

// One dimension after the other, each as a row of shared memory.
template <class C>
struct Slab {
  SharedArray<C, kDepth * kPitch> values;

  FASTZOO_DEVICE void put(int column, int depth, const Vector<C, kPiece>& piece) {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) values[(depth + i) * kPitch + column] = piece[i];
  }
  FASTZOO_DEVICE Vector<C, kEach> get(int column, int depth) {
    return values.template load<kEach>(depth * kPitch + column);
  }
};

template <class T, class C>
FASTZOO_DEVICE Vector<C, kPiece> load_row_piece(const T* row, const C* centre, int64_t d,
                                                int64_t dims, bool aligned) {
  Vector<C, kPiece> piece{};
  if (aligned) {
    const Vector<T, kPiece> raw = load_vector<kPiece>(row + d);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) piece[i] = centred(raw[i], centre, d + i);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (d + i < dims) piece[i] = centred(row[d + i], centre, d + i);
    }
  }
  return piece;
}

// A block scores kTile rows against its share of the codes, kTile at a time; a thread holds
// kEach x kEach scores. The codes are shared out along the grid's y. `aligned`: rows of x are whole
// pieces at aligned addresses.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    vq_scan(const T* x, const C* centre, const C* prepared, const C* offsets, int64_t rows,
            int64_t dims, int64_t pitch, int code_tiles, bool aligned, TopTwo<C>* found) {
  __shared__ Slab<C> x_slab;
  __shared__ Slab<C> code_slab;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int my_code = thread % kSide * kEach;
  const int my_row = thread / kSide * kEach;
  const int64_t first_row = int64_t{blockIdx.x} * kTile;

  TopTwo<C> top[kEach];
  for (int tile = blockIdx.y; tile < code_tiles; tile += gridDim.y) {
    const int first_code = tile * kTile;
    C scores[kEach][kEach];
    const Vector<C, kEach> start = load_vector<kEach>(offsets + first_code + my_code);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
#pragma unroll
      for (int c = 0; c < kEach; ++c) scores[r][c] = start[c];
    }

    for (int64_t d0 = 0; d0 < pitch; d0 += kDepth) {
      const int depth = static_cast<int>(pitch - d0 < kDepth ? pitch - d0 : kDepth);
      sync_block();
      // A warp loads two pieces of 16 rows: whole sectors, and stores to 32 different banks.
#pragma unroll
      for (int part = warp; part < kTile / 16 * (kDepth / kPiece / 2); part += kWarps) {
        const int column = part % (kTile / 16) * 16 + lane % 16;
        const int d = (part / (kTile / 16) * 2 + lane / 16) * kPiece;
        if (d >= depth) continue;
        const int64_t row = first_row + column;
        x_slab.put(column, d,
                   row < rows ? load_row_piece(x + row * dims, centre, d0 + d, dims, aligned)
                              : Vector<C, kPiece>{});
        const int64_t code = first_code + column;
        code_slab.put(column, d, load_vector<kPiece>(prepared + code * pitch + d0 + d));
      }
      sync_block();
#pragma unroll 4
      for (int d = 0; d < depth; ++d) {
        const Vector<C, kEach> a = x_slab.get(my_row, d);
        const Vector<C, kEach> b = code_slab.get(my_code, d);
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
#pragma unroll
          for (int c = 0; c < kEach; ++c) {
            scores[r][c] = fused_multiply_add(a[r], b[c], scores[r][c]);
          }
        }
      }
    }

#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      C highest = scores[r][0];
#pragma unroll
      for (int c = 1; c < kEach; ++c) highest = math::maximum(highest, scores[r][c]);
      if (!(highest > top[r].second)) continue;
#pragma unroll
      for (int c = 0; c < kEach; ++c) top[r].add(scores[r][c], first_code + my_code + c);
    }
  }

#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    top[r].merge_lanes(kSide);
    const int64_t row = first_row + my_row + r;
    if (thread % kSide == 0 && row < rows) found[blockIdx.y * rows + row] = top[r];
  }
}

// The fast score of one code, by one thread.
template <class T, class C>
FASTZOO_DEVICE C fast_score(const T* row, const C* centre, const C* code, C start, int64_t dims,
                            int64_t pitch, bool aligned) {
  C score = start;
  for (int64_t d = 0; d < pitch; d += kPiece) {
    const Vector<C, kPiece> a = load_row_piece(row, centre, d, dims, aligned);
    const Vector<C, kPiece> b = load_vector<kPiece>(code + d);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) score = fused_multiply_add(a[i], b[i], score);
  }
  return score;
}

// A warp a row: accepts the fast pass's winner where the bound proves it, otherwise scores
// exactly every code that the bound does not rule out; then d of the winner.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    vq_finish(Metric metric, const T* x, const T* codebook, const C* centre, const C* prepared,
              const C* offsets, const uint64_t* norm_bits, const TopTwo<C>* found, int shares,
              int64_t rows, int64_t codes, int64_t dims, int64_t pitch, bool aligned,
              int64_t* indices, C* distances) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  const T* values = x + row * dims;
  const auto x_at = [&](int64_t d) { return static_cast<double>(static_cast<C>(values[d])); };
  const auto code_at = [&](int64_t k) {
    return [code = codebook + k * dims](int64_t d) {
      return static_cast<double>(static_cast<C>(code[d]));
    };
  };

  TopTwo<C> top;
  if (lane < shares) top = found[lane * rows + row];
  top.merge_lanes(kWarpSize);
  double squares = 0;
  for (int64_t d = lane; d < dims; d += kWarpSize) {
    const double value = centred(values[d], centre, d);
    squares += value * value;
  }
  const double bound =
      math::score_bound(metric, dims, math::norm_above(warp_sum(squares), dims),
                        math::bits_as<double>(*norm_bits), 0, 0, kUnit<C>, kSmallest<C>);
  const double needed = top.best < kInfinity<C> ? top.best - 2 * bound : -kInfinity<double>;

  int64_t winner = top.index;
  if (!(top.second < needed)) {
    double winning = 0;
    winner = codes;  // none yet
    for (int64_t k = lane; k < codes; k += kWarpSize) {
      const C fast =
          fast_score(values, centre, prepared + k * pitch, offsets[k], dims, pitch, aligned);
      if (fast < needed) continue;
      const double score = math::exact_score(metric, x_at, code_at(k), dims);
      if (winner == codes || math::better(score, winning)) {
        winning = score;
        winner = k;
      }
    }
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
      const double other = shuffle_xor(winning, flip);
      const int64_t other_winner = shuffle_xor(winner, flip);
      const bool tie = !math::better(winning, other) && other_winner < winner;
      if (other_winner == codes) continue;
      if (winner == codes || math::better(other, winning) || tie) {
        winning = other;
        winner = other_winner;
      }
    }
  }

  const auto code = code_at(winner);
  double sum = 0;
  double x_squares = 0;
  double code_squares = 0;
  for (int64_t d = lane; d < dims; d += kWarpSize) {
    const double a = x_at(d);
    const double b = code(d);
    sum += math::score_term(metric, a, b);
    x_squares += a * a;
    code_squares += b * b;
  }
  sum = warp_sum(sum);
  if (metric == Metric::cosine) {
    sum /= math::maximum(__builtin_sqrt(warp_sum(code_squares)), math::kNormFloor) *
           math::maximum(__builtin_sqrt(warp_sum(x_squares)), math::kNormFloor);
  }
  if (lane == 0) {
    indices[row] = winner;
    distances[row] = static_cast<C>(sum);
  }
}

Metric metric_of(const std::string& name) {
  if (name == "l2") return Metric::l2;
  if (name == "cosine") return Metric::cosine;
  if (name == "dot") return Metric::dot;
  STD_TORCH_CHECK(false, "fastzoo: vq_nearest: metric l2, cosine or dot expected, got ", name);
}

Tensor mean_of_rows(const Tensor& codebook, ScalarType dtype) {
  using torch::stable::detail::from;
  const std::vector<int64_t> rows{0};
  std::array<StableIValue, 4> stack{
      from(codebook), from(std::optional<torch::headeronly::IntHeaderOnlyArrayRef>(rows)),
      from(false), from(std::optional<ScalarType>(dtype))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mean", "dim", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

std::tuple<Tensor, Tensor> vq_nearest(const Tensor& x, const Tensor& codebook, const Tensor& mask,
                                      const std::string& metric_name, int64_t k,
                                      const std::string& precision) {
  STD_TORCH_CHECK(mask.numel() == 0 && k == 0 && codebook.dim() == 2, "vq_nearest: not yet");
  const Metric metric = metric_of(metric_name);
  const int64_t rows = x.size(0);
  const int64_t dims = x.size(1);
  const int64_t codes = codebook.size(0);
  const int64_t padded_codes = round_up(codes, kTile);
  const int64_t pitch = round_up(dims, kPiece);
  STD_TORCH_CHECK(padded_codes <= std::numeric_limits<int32_t>::max(),
                  "fastzoo: vq_nearest: fewer than 2^31 codes expected, got ", codes);
  const ScalarType compute = compute_dtype(x.scalar_type());
  const Tensor indices = empty(x, {rows}, ScalarType::Long);
  const Tensor distances = empty(x, {rows}, compute);
  if (rows == 0) return {distances, indices};

  const Stream stream(x);
  const Tensor values = torch::stable::contiguous(x);
  const Tensor book = torch::stable::contiguous(codebook);
  const Tensor prepared = empty(x, {padded_codes, pitch}, compute);
  const Tensor offsets = empty(x, {padded_codes}, compute);
  const Tensor norm_bits = torch::stable::new_zeros(x, {1}, ScalarType::Long);
  const unsigned row_blocks = blocks_for(rows, kTile);
  const int code_tiles = static_cast<int>(padded_codes / kTile);
  const int wanted_shares = static_cast<int>((kManyBlocks + row_blocks - 1) / row_blocks);
  const int shares = std::min({wanted_shares, code_tiles, kWarpSize});
  const bool has_centre = metric == Metric::l2;
  const Tensor mean = has_centre ? mean_of_rows(book, compute) : empty(x, {0}, compute);

  dispatch_float(x.scalar_type(), "vq_nearest", [&](auto type) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    const T* x_data = static_cast<const T*>(values.const_data_ptr());
    const T* codebook_data = static_cast<const T*>(book.const_data_ptr());
    const C* centre = has_centre ? static_cast<const C*>(mean.const_data_ptr()) : nullptr;
    C* prepared_data = static_cast<C*>(prepared.mutable_data_ptr());
    C* offsets_data = static_cast<C*>(offsets.mutable_data_ptr());
    const Tensor found =
        empty(x, {shares, rows, static_cast<int64_t>(sizeof(TopTwo<C>))}, ScalarType::Byte);
    TopTwo<C>* found_data = static_cast<TopTwo<C>*>(found.mutable_data_ptr());
    uint64_t* norm_data = static_cast<uint64_t*>(norm_bits.mutable_data_ptr());
    const bool aligned =
        dims == pitch && reinterpret_cast<uintptr_t>(x_data) % Vector<T, kPiece>::kAlignment == 0;

    const unsigned prepare_blocks = blocks_for(padded_codes, kWarps);
    stream.launch("vq_prepare", vq_prepare<T, C>,
                  prepare_blocks < kPrepareBlocks ? prepare_blocks : kPrepareBlocks, kThreads,
                  metric, codebook_data, centre, codes, dims, padded_codes, pitch, prepared_data,
                  offsets_data, norm_data);
    stream.launch("vq_scan", vq_scan<T, C>, dim3(row_blocks, shares), kThreads, x_data, centre,
                  prepared_data, offsets_data, rows, dims, pitch, code_tiles, aligned, found_data);
    stream.launch("vq_finish", vq_finish<T, C>, blocks_for(rows, kWarps), kThreads, metric, x_data,
                  codebook_data, centre, prepared_data, offsets_data, norm_data, found_data, shares,
                  rows, codes, dims, pitch, aligned,
                  static_cast<int64_t*>(indices.mutable_data_ptr()),
                  static_cast<C*>(distances.mutable_data_ptr()));
  });
  return {distances, indices};
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::vq_nearest>(m, "vq_nearest.cuda");
}
