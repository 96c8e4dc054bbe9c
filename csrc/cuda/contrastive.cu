// Contrastive losses: each query's score with its positive, and for each query, and each key where
// wanted, the log-sum-exp of its scores. No N x M matrix is stored; rows and columns come from one
// pass over its tiles.
//   contrastive_positives  a query's score with its positive, in double
//   contrastive_scan       tiles of scores, summed as they come; blocks share out the keys
//   combine_log_sums       the shares of a row, and the blocks of a column, put together
#include "../math/contrastive.h"

#include <limits>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/log_sum.h"
#include "runtime/rows.h"
#include "runtime/tile_product.h"

namespace fastzoo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

// A warp a query.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    contrastive_positives(Rows<T> queries, Rows<T> keys, const int64_t* positives, const C* scale,
                          const C* bias, C* scores) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= queries.count) return;
  const int64_t positive = positives[row];
  double score = positive < 0 ? 0 : __builtin_nan("");
  if (positive >= 0 && positive < keys.count) {
    score = *scale * warp_dot(queries, row, keys, positive, lane) + *bias;
  }
  if (lane == 0) scores[row] = static_cast<C>(score);
}

// Sums of each share and row; where wanted, of each block of rows and column.
template <class C>
struct PairSums {
  LogSum<C>* rows;
  LogSum<C>* columns;
};

// Rows of the sigmoid loss are plain sums, and have no columns beside them.
template <class T, class Scheme, bool sigmoid>
__global__ void __launch_bounds__(kTileThreads, Scheme::kBlocksEach)
    contrastive_scan(Rows<T> queries, Rows<T> keys, const typename Scheme::Value* scale_data,
                     const typename Scheme::Value* bias_data, bool exclude_self,
                     PairSums<typename Scheme::Value> out) {
  using C = typename Scheme::Value;
  __shared__ TileSlabs<Scheme> slabs;
  __shared__ SharedArray<C, kTileWarps * kTileColumns> column_largest;
  __shared__ SharedArray<C, kTileWarps * kTileColumns> column_sums;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int64_t first_row = int64_t{blockIdx.x} * Scheme::kRows;
  const int rows = tile_left(queries.count, first_row, Scheme::kRows);
  const C scale = *scale_data;
  const C bias = *bias_data;

  TileProduct<Scheme, T> product(slabs);
  LogSum<C> sums[Scheme::kRowsEach];
  for (int64_t tile = blockIdx.y; tile * kTileColumns < keys.count; tile += gridDim.y) {
    const int64_t first_key = tile * kTileColumns;
    auto z = product.multiply(queries.from(first_row), keys.from(first_key));
    const int left = tile_left(keys.count, first_key, kTileColumns);
#pragma unroll
    for (int i = 0; i < Scheme::kRowsEach; ++i) {
      const int row = Scheme::row(i);
      const int self = exclude_self ? in_tile(first_row + row, first_key, kTileColumns) : -1;
      const int row_left = row < rows ? left : 0;
      C largest = -kInfinity<C>;
#pragma unroll
      for (int j = 0; j < Scheme::kColumnsEach; ++j) {
        const int column = Scheme::column(j);
        const bool counts = column < row_left && column != self;
        z(i, j) = counts ? scale * z(i, j) + bias : -kInfinity<C>;
        largest = math::maximum(largest, z(i, j));
      }
      if constexpr (sigmoid) {
#pragma unroll
        for (int j = 0; j < Scheme::kColumnsEach; ++j) sums[i].sum += math::softplus(z(i, j));
      } else {
        sums[i].raise(row_maximum<Scheme>(largest));
        const C reference = sums[i].reference();
#pragma unroll
        for (int j = 0; j < Scheme::kColumnsEach; ++j) {
          sums[i].sum += fast_exponential(z(i, j) - reference);
        }
      }
    }
    if (sigmoid || out.columns == nullptr) continue;

#pragma unroll
    for (int j = 0; j < Scheme::kColumnsEach; ++j) {
      C largest = z(0, j);
#pragma unroll
      for (int i = 1; i < Scheme::kRowsEach; ++i) largest = math::maximum(largest, z(i, j));
#pragma unroll
      for (int flip = Scheme::kRowLanes; flip < kWarpSize; flip *= 2) {
        largest = math::maximum(largest, shuffle_xor(largest, flip));
      }
      const C reference = LogSum<C>::reference(largest);
      C sum = 0;
#pragma unroll
      for (int i = 0; i < Scheme::kRowsEach; ++i) sum += fast_exponential(z(i, j) - reference);
#pragma unroll
      for (int flip = Scheme::kRowLanes; flip < kWarpSize; flip *= 2) {
        sum += shuffle_xor(sum, flip);
      }
      if (thread % kWarpSize < Scheme::kRowLanes) {
        column_largest[warp * kTileColumns + Scheme::column(j)] = largest;
        column_sums[warp * kTileColumns + Scheme::column(j)] = sum;
      }
    }
    sync_block();
    // The next product's barriers keep the arrays until all of this is read.
    if (thread < left) {
      LogSum<C> column;
#pragma unroll
      for (int other = 0; other < kTileWarps; ++other) {
        const int at = other * kTileColumns + thread;
        column.merge({column_largest[at], column_sums[at]});
      }
      out.columns[blockIdx.x * keys.count + first_key + thread] = column;
    }
  }

#pragma unroll
  for (int i = 0; i < Scheme::kRowsEach; ++i) {
    const C sum = row_sum<Scheme>(sums[i].sum);
    const int row = Scheme::row(i);
    if (thread % Scheme::kRowLanes != 0 || row >= rows) continue;
    out.rows[blockIdx.y * queries.count + first_row + row] = {sums[i].largest, sum};
  }
}

std::tuple<Tensor, Tensor, Tensor> contrastive(const Tensor& queries, const Tensor& keys,
                                               const Tensor& positives, const Tensor& scale,
                                               const Tensor& bias, bool exclude_self, bool columns,
                                               bool sigmoid, bool bfloat16_products) {
  using torch::stable::contiguous;
  STD_TORCH_CHECK(!(sigmoid && columns), "fastzoo: contrastive: sigmoid has no columns");
  const int64_t rows = queries.size(0);
  const int64_t count = keys.size(0);
  const ScalarType compute = compute_dtype(queries.scalar_type());
  const Tensor positive = empty(queries, {rows}, compute);
  const Tensor row = empty(queries, {rows}, compute);
  const Tensor column = empty(queries, {columns ? count : 0}, compute);
  const bool column_work = columns && count > 0;
  if (rows == 0 && !column_work) return {positive, row, column};

  const Stream stream(queries);
  const Tensor q = contiguous(queries), k = contiguous(keys), p = contiguous(positives);
  dispatch_products(q.scalar_type(), bfloat16_products, "contrastive", [&](auto type, auto scheme) {
    using T = decltype(type);
    using Scheme = decltype(scheme);
    using C = typename Scheme::Value;
    const Rows<T> left = rows_of<T>(q);
    const Rows<T> right = rows_of<T>(k);
    const C* scale_data = static_cast<const C*>(scale.const_data_ptr());
    const C* bias_data = static_cast<const C*>(bias.const_data_ptr());
    const dim3 grid = tile_grid<Scheme>(rows, count);
    const Tensor row_sums = empty_log_sums<C>(q, grid.y, rows);
    const Tensor column_sums = empty_log_sums<C>(q, rows > 0 && column_work ? grid.x : 0, count);
    if (rows > 0) {
      stream.launch("contrastive_positives", contrastive_positives<T, C>, blocks_for(rows, kWarps),
                    kThreads, left, right, static_cast<const int64_t*>(p.const_data_ptr()),
                    scale_data, bias_data, static_cast<C*>(positive.mutable_data_ptr()));
      stream.launch(
          "contrastive_scan",
          sigmoid ? contrastive_scan<T, Scheme, true> : contrastive_scan<T, Scheme, false>, grid,
          kTileThreads, left, right, scale_data, bias_data, exclude_self,
          PairSums<C>{
              static_cast<LogSum<C>*>(row_sums.mutable_data_ptr()),
              column_work ? static_cast<LogSum<C>*>(column_sums.mutable_data_ptr()) : nullptr});
      launch_combine<C>(stream, row_sums, sigmoid, row);
    }
    if (column_work) launch_combine<C>(stream, column_sums, false, column);
  });
  return {positive, row, column};
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::contrastive>(m, "contrastive.cuda");
}
