// Margin softmax: the target's score and, over all other classes, the log-sum-exp and the weighted
// sum of their scores. No N x C matrix is stored, but in a copy that is asked for.
//   margin_softmax_factors  one over the norm of each weight row
//   margin_softmax_targets  a row's norm and its score with the label's sub-centres, in double
//   margin_softmax_scan     tiles of scores, summed as they come; blocks share out the classes
//   combine_log_sums        the shares put together
#include "../math/margin_softmax.h"

#include <limits>
#include <string>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/log_sum.h"
#include "runtime/rows.h"
#include "runtime/tile_product.h"

namespace fastzoo::cuda {
namespace {

using math::MarginRule;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

template <class T, class C>
__global__ void __launch_bounds__(kThreads) margin_softmax_factors(Rows<T> weight, C* factors) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= weight.count) return;
  const double squares = warp_dot(weight, row, weight, row, lane);
  if (lane == 0) factors[row] = static_cast<C>(math::inverse_norm(__builtin_sqrt(squares)));
}

// What a target's row gives, [N] each.
template <class C>
struct Targets {
  C* score;
  C* embedding_norm;
  C* weight_norm;
  C* factors;  // of the embedding in its scores
};

// A warp a row.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    margin_softmax_targets(Rows<T> embeddings, Rows<T> weight, const int64_t* labels,
                           int64_t sub_centers, bool normalize_embeddings, bool normalize_weight,
                           Targets<C> out) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= embeddings.count) return;
  const double norm = __builtin_sqrt(warp_dot(embeddings, row, embeddings, row, lane));
  const double factor = normalize_embeddings ? math::inverse_norm(norm) : 1;
  const int64_t label = labels[row];
  double score = label < 0 ? 0 : __builtin_nan("");
  double weight_norm = 0;
  if (label >= 0 && label < weight.count / sub_centers) {
    for (int64_t j = 0; j < sub_centers; ++j) {
      const int64_t center = label * sub_centers + j;
      const double length = __builtin_sqrt(warp_dot(weight, center, weight, center, lane));
      const double u = warp_dot(embeddings, row, weight, center, lane) * factor *
                       (normalize_weight ? math::inverse_norm(length) : 1);
      if (j > 0 && !(u > score) && !math::is_nan(u)) continue;
      score = u;
      weight_norm = length;
    }
  }
  if (lane != 0) return;
  out.score[row] = static_cast<C>(score);
  out.embedding_norm[row] = static_cast<C>(norm);
  out.weight_norm[row] = static_cast<C>(weight_norm);
  out.factors[row] = static_cast<C>(factor);
}

// How products become scores; a null pointer is a term that is not wanted.
template <class C>
struct Negatives {
  const int64_t* labels;
  const C* scale;
  const C* row_factors;
  const C* column_factors;
  const C* threshold;
  const C* hardness;
  const C* class_weight;
  C filter;
  int64_t sub_centers;
};

// What becomes of the scores: of each share and row the sum of exponentials, and where wanted that
// of the scores; where wanted the exponentials themselves [C, N] and what they refer to.
template <class C>
struct NegativeSums {
  LogSum<C>* sums;
  LogSum<C>* totals;
  BFloat16* kept;
  C* kept_max;
};

// `weight` is the first sub-centre of each class; where they have `several`, the best one's score
// is held beside the product under way.
template <class T, class Scheme, bool several>
__global__ void __launch_bounds__(kTileThreads, several ? 1 : Scheme::kBlocksEach)
    margin_softmax_scan(Rows<T> embeddings, Rows<T> weight,
                        Negatives<typename Scheme::Value> scores,
                        NegativeSums<typename Scheme::Value> out) {
  using C = typename Scheme::Value;
  __shared__ TileSlabs<Scheme> slabs;
  __shared__ SharedArray<C, Scheme::kRows> scales;
  __shared__ SharedArray<C, Scheme::kRows> row_factors;
  __shared__ SharedArray<C, Scheme::kRows> thresholds;
  __shared__ SharedArray<int64_t, Scheme::kRows> labels;
  // A row's is touched by its first lane alone.
  __shared__ SharedArray<C, Scheme::kRows> totals;
  // Those of the product under way, and of the one before, which others may still read.
  __shared__ SharedArray<C, 2 * kTileColumns> column_factors;
  const int thread = threadIdx.x;
  const int64_t rows = embeddings.count;
  const int64_t classes = weight.count;
  const int64_t first_row = int64_t{blockIdx.x} * Scheme::kRows;
  const C hardness = scores.hardness == nullptr ? C{0} : *scores.hardness;

  if (thread < Scheme::kRows) {
    const int64_t row = first_row + thread;
    const bool exists = row < rows;
    const bool hardens = exists && scores.threshold != nullptr;
    scales[thread] = exists ? scores.scale[row] : C{0};
    row_factors[thread] = exists ? scores.row_factors[row] : C{0};
    thresholds[thread] = hardens ? scores.threshold[row] : kInfinity<C>;
    labels[thread] = exists ? scores.labels[row] : -1;
  }

  TileProduct<Scheme, T> product(slabs);
  LogSum<C> sums[Scheme::kRowsEach];
  const bool first_lane = thread % Scheme::kRowLanes == 0;
#pragma unroll
  for (int i = 0; i < Scheme::kRowsEach; ++i) {
    if (first_lane) totals[Scheme::row(i)] = 0;
  }
  int current = 0;
  for (int64_t tile = blockIdx.y; tile * kTileColumns < classes; tile += gridDim.y) {
    const int64_t first_class = tile * kTileColumns;
    typename TileProduct<Scheme, T>::Products best;
    for (int64_t j = 0; j < (several ? scores.sub_centers : 1); ++j) {
      if (thread < kTileColumns) {
        const int64_t c = first_class + thread;
        const bool scaled = scores.column_factors != nullptr && c < classes;
        column_factors[current + thread] =
            scaled ? scores.column_factors[c * scores.sub_centers + j] : C{1};
      }
      Rows<T> centers = weight;
      centers.data += j * embeddings.dims;
      auto dots = product.multiply(embeddings.from(first_row), centers.from(first_class));
#pragma unroll
      for (int i = 0; i < Scheme::kRowsEach; ++i) {
        const C row_factor = row_factors[Scheme::row(i)];
#pragma unroll
        for (int c = 0; c < Scheme::kColumnsEach; ++c) {
          const C u = dots(i, c) * row_factor * column_factors[current + Scheme::column(c)];
          if (!several || j == 0 || u > best(i, c) || math::is_nan(u)) best(i, c) = u;
        }
      }
      current ^= kTileColumns;
    }

    const int left = tile_left(classes, first_class, kTileColumns);
#pragma unroll
    for (int i = 0; i < Scheme::kRowsEach; ++i) {
      const int tile_row = Scheme::row(i);
      const int64_t row = first_row + tile_row;
      const int own = in_tile(labels[tile_row], first_class, kTileColumns);
      const C scale = scales[tile_row];
      const C threshold = thresholds[tile_row];
      C largest = -kInfinity<C>;
#pragma unroll
      for (int c = 0; c < Scheme::kColumnsEach; ++c) {
        const int column = Scheme::column(c);
        const C z = scale * math::negative_value(best(i, c), threshold, hardness, scores.filter);
        best(i, c) = column < left && column != own ? z : -kInfinity<C>;
        largest = math::maximum(largest, best(i, c));
      }
      if (out.totals != nullptr) {
        C total = 0;
#pragma unroll
        for (int c = 0; c < Scheme::kColumnsEach; ++c) {
          const int column = Scheme::column(c);
          if (column >= left || column == own) continue;
          const C* by_class = scores.class_weight;
          total += by_class == nullptr ? best(i, c) : by_class[first_class + column] * best(i, c);
        }
        total = row_sum<Scheme>(total);
        if (first_lane) totals[tile_row] += total;
      }
      sums[i].raise(row_maximum<Scheme>(largest));
      const C reference = sums[i].reference();
#pragma unroll
      for (int c = 0; c < Scheme::kColumnsEach; ++c) {
        best(i, c) = fast_exponential(best(i, c) - reference);
        sums[i].sum += best(i, c);
      }
      if (out.kept == nullptr || row >= rows) continue;
#pragma unroll
      for (int c = 0; c < Scheme::kColumnsEach; ++c) {
        const int column = Scheme::column(c);
        if (column >= left) continue;
        out.kept[(first_class + column) * rows + row] = BFloat16(static_cast<float>(best(i, c)));
      }
      if (first_lane) out.kept_max[tile * rows + row] = sums[i].largest;
    }
  }

#pragma unroll
  for (int i = 0; i < Scheme::kRowsEach; ++i) {
    const C sum = row_sum<Scheme>(sums[i].sum);
    const int64_t row = first_row + Scheme::row(i);
    if (!first_lane || row >= rows) continue;
    const int64_t part = blockIdx.y * rows + row;
    out.sums[part] = {sums[i].largest, sum};
    if (out.totals != nullptr) out.totals[part] = {LogSum<C>::kNothing, totals[Scheme::row(i)]};
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> margin_softmax_negatives(
    const Tensor& embeddings, const Tensor& weight, const Tensor& labels, const Tensor& scale,
    const Tensor& threshold, const Tensor& hardness, const Tensor& class_weight,
    double interclass_filter, int64_t sub_centers, bool normalize_embeddings, bool normalize_weight,
    bool bfloat16_products, bool with_total, bool keep) {
  using torch::stable::contiguous;
  const int64_t rows = embeddings.size(0);
  const int64_t classes = weight.size(0) / sub_centers;
  const int64_t tiles = (classes + kTileColumns - 1) / kTileColumns;
  const ScalarType compute = compute_dtype(embeddings.scalar_type());
  const auto of_rows = [&] { return empty(embeddings, {rows}, compute); };
  const Tensor target = of_rows(), lse = of_rows(), embedding_norm = of_rows(),
               weight_norm = of_rows(), row_factors = of_rows();
  const Tensor total = with_total ? of_rows() : torch::stable::new_zeros(lse, {rows});
  const Tensor kept = keep ? empty(embeddings, {classes, rows}, ScalarType::BFloat16)
                           : empty(embeddings, {0}, ScalarType::BFloat16);
  const Tensor kept_max =
      keep ? empty(embeddings, {tiles, rows}, compute) : empty(embeddings, {0}, compute);
  const auto results =
      std::make_tuple(target, lse, total, embedding_norm, weight_norm, kept, kept_max);
  if (rows == 0) return results;

  const Stream stream(embeddings);
  const Tensor x = contiguous(embeddings), w = contiguous(weight), y = contiguous(labels),
               s = contiguous(scale), t = contiguous(threshold), k = contiguous(class_weight);
  const Tensor column_factors = empty(embeddings, {normalize_weight ? weight.size(0) : 0}, compute);
  dispatch_products(
      x.scalar_type(), bfloat16_products, "margin_softmax_negatives", [&](auto type, auto scheme) {
        using T = decltype(type);
        using Scheme = decltype(scheme);
        using C = typename Scheme::Value;
        const auto data = [](const Tensor& tensor) {
          return static_cast<C*>(tensor.mutable_data_ptr());
        };
        const Rows<T> left = rows_of<T>(x);
        const Rows<T> right = rows_of<T>(w);
        const int64_t* label_data = static_cast<const int64_t*>(y.const_data_ptr());

        if (column_factors.numel() > 0) {
          stream.launch("margin_softmax_factors", margin_softmax_factors<T, C>,
                        blocks_for(right.count, kWarps), kThreads, right, data(column_factors));
        }
        stream.launch(
            "margin_softmax_targets", margin_softmax_targets<T, C>, blocks_for(rows, kWarps),
            kThreads, left, right, label_data, sub_centers, normalize_embeddings, normalize_weight,
            Targets<C>{data(target), data(embedding_norm), data(weight_norm), data(row_factors)});

        const dim3 grid = tile_grid<Scheme>(rows, classes);
        const Tensor sums = empty_log_sums<C>(x, grid.y, rows);
        const Tensor totals = empty_log_sums<C>(x, with_total ? grid.y : 0, rows);
        const Negatives<C> scores{
            label_data,
            optional_data<const C>(s),
            optional_data<const C>(row_factors),
            optional_data<const C>(column_factors),
            optional_data<const C>(t),
            optional_data<const C>(hardness),
            optional_data<const C>(k),
            interclass_filter > 0 ? static_cast<C>(interclass_filter) : kInfinity<C>,
            sub_centers};
        const auto sums_data = [&](const Tensor& parts) {
          return static_cast<LogSum<C>*>(parts.mutable_data_ptr());
        };
        const NegativeSums<C> out{sums_data(sums), with_total ? sums_data(totals) : nullptr,
                                  keep ? static_cast<BFloat16*>(kept.mutable_data_ptr()) : nullptr,
                                  data(kept_max)};
        const Rows<T> first_centers{right.data, classes, sub_centers * right.dims, right.dims,
                                    right.aligned};
        stream.launch("margin_softmax_scan",
                      sub_centers > 1 ? margin_softmax_scan<T, Scheme, true>
                                      : margin_softmax_scan<T, Scheme, false>,
                      grid, kTileThreads, left, first_centers, scores, out);
        launch_combine<C>(stream, sums, false, lse);
        if (with_total) launch_combine<C>(stream, totals, true, total);
      });
  return results;
}

MarginRule rule_of(const std::string& name) {
  if (name == "shift") return MarginRule::shift;
  if (name == "arcface") return MarginRule::arcface;
  if (name == "easy") return MarginRule::easy;
  if (name == "unguarded") return MarginRule::unguarded;
  if (name == "clip") return MarginRule::clip;
  if (name == "combined") return MarginRule::combined;
  if (name == "psi") return MarginRule::psi;
  STD_TORCH_CHECK(false, "fastzoo: margin_softmax_target: unknown rule ", name);
}

// A rule's arguments, [N] each.
template <class C>
struct MarginArguments {
  const C *cosine, *m1, *m2, *m3;
};

template <class C>
__global__ void __launch_bounds__(kThreads)
    margin_softmax_target_values(MarginRule rule, MarginArguments<C> in, int64_t count, C* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  out[i] = static_cast<C>(math::margin_target(rule, in.cosine[i], in.m1[i], in.m2[i], in.m3[i]));
}

template <class C>
struct MarginGradients {
  C *cosine, *m1, *m2, *m3;
};

template <class C>
__global__ void __launch_bounds__(kThreads)
    margin_softmax_target_slopes(MarginRule rule, const C* grad, MarginArguments<C> in,
                                 int64_t count, MarginGradients<C> out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const double g = grad[i];
  const auto slopes = math::margin_target_slopes(rule, in.cosine[i], in.m1[i], in.m2[i]);
  out.cosine[i] = static_cast<C>(g * slopes.cosine);
  out.m1[i] = static_cast<C>(g * slopes.m1);
  out.m2[i] = static_cast<C>(g * slopes.m2);
  out.m3[i] = static_cast<C>(-g);
}

template <class Body>
void dispatch_compute(ScalarType dtype, const Body& body) {
  dtype == ScalarType::Double ? body(double{}) : body(float{});
}

Tensor margin_softmax_target(const Tensor& cosine, const Tensor& m1, const Tensor& m2,
                             const Tensor& m3, const std::string& rule_name) {
  using torch::stable::contiguous;
  const MarginRule rule = rule_of(rule_name);
  const int64_t count = cosine.numel();
  const Tensor result = empty(cosine, {count}, cosine.scalar_type());
  if (count == 0) return result;
  const Stream stream(cosine);
  const Tensor c = contiguous(cosine), a = contiguous(m1), b = contiguous(m2), d = contiguous(m3);
  dispatch_compute(cosine.scalar_type(), [&](auto type) {
    using C = decltype(type);
    const auto data = [](const Tensor& t) { return static_cast<const C*>(t.const_data_ptr()); };
    stream.launch("margin_softmax_target", margin_softmax_target_values<C>,
                  blocks_for(count, kThreads), kThreads, rule,
                  MarginArguments<C>{data(c), data(a), data(b), data(d)}, count,
                  static_cast<C*>(result.mutable_data_ptr()));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> margin_softmax_target_backward(
    const Tensor& grad, const Tensor& cosine, const Tensor& m1, const Tensor& m2, const Tensor& m3,
    const std::string& rule_name) {
  using torch::stable::contiguous;
  const MarginRule rule = rule_of(rule_name);
  const int64_t count = cosine.numel();
  const auto result = [&] { return empty(cosine, {count}, cosine.scalar_type()); };
  const Tensor by_c = result(), by_m1 = result(), by_m2 = result(), by_m3 = result();
  const auto results = std::make_tuple(by_c, by_m1, by_m2, by_m3);
  if (count == 0) return results;
  const Stream stream(cosine);
  const Tensor g = contiguous(grad), c = contiguous(cosine), a = contiguous(m1), b = contiguous(m2),
               d = contiguous(m3);
  dispatch_compute(cosine.scalar_type(), [&](auto type) {
    using C = decltype(type);
    const auto data = [](const Tensor& t) { return static_cast<C*>(t.mutable_data_ptr()); };
    stream.launch("margin_softmax_target_backward", margin_softmax_target_slopes<C>,
                  blocks_for(count, kThreads), kThreads, rule, data(g),
                  MarginArguments<C>{data(c), data(a), data(b), data(d)}, count,
                  MarginGradients<C>{data(by_c), data(by_m1), data(by_m2), data(by_m3)});
  });
  return results;
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  using namespace fastzoo::cuda;
  fastzoo::implement<margin_softmax_negatives>(m, "margin_softmax_negatives.cuda");
  fastzoo::implement<margin_softmax_target>(m, "margin_softmax_target.cuda");
  fastzoo::implement<margin_softmax_target_backward>(m, "margin_softmax_target_backward.cuda");
}
