// Kernel density: of each query the weighted sum of a profile of the scaled squared distances to
// the points of its cloud. No matrix of pairs is stored, and distances are sums of squared
// differences, so that they do not depend on where the origin is.
//   density_scan       up to three dimensions: tiles of points in shared memory, queries in
//                      registers; blocks share out the tiles
//   density_scan_wide  more dimensions: tiles of distances, made as those of products are
//   density_combine    the shares put together
#include "../math/density.h"

#include <algorithm>
#include <string>

#include "../torch_abi.h"
#include "runtime/rows.h"
#include "runtime/tile_product.h"

namespace fastzoo::cuda {
namespace {

using math::DensityKernel;

constexpr int kThreads = 128;
constexpr int kQueriesEach = 4;
constexpr int kQueries = kThreads * kQueriesEach;
constexpr int kTilePoints = 64;
constexpr int kFewDims = 3;
constexpr int kCombineThreads = 64;

// The rows [begin, end) of one cloud.
struct Range {
  int64_t begin, end;
};

// The clouds of a matrix of rows. They ascend and do not overlap; rows may lie in none.
struct Clouds {
  const int64_t* ranges;  // [count, 2]
  int64_t count;
  int64_t rows;

  FASTZOO_DEVICE Range operator[](int64_t cloud) const {
    return {clamped(ranges[2 * cloud]), clamped(ranges[2 * cloud + 1])};
  }

  // The first cloud that ends beyond a row; count where none does.
  FASTZOO_DEVICE int64_t first_beyond(int64_t row) const {
    int64_t from = 0;
    for (int64_t to = count; from < to;) {
      const int64_t middle = from + (to - from) / 2;
      if ((*this)[middle].end > row) {
        to = middle;
      } else {
        from = middle + 1;
      }
    }
    return from;
  }

 private:
  FASTZOO_DEVICE int64_t clamped(int64_t row) const {
    return row < 0 ? 0 : row > rows ? rows : row;
  }
};

template <class C>
struct Density {
  Rows<C> queries, points;
  Clouds of_queries, of_points;
  const C* scale;
  const C* weight;
  C* parts;  // [shares, queries]
};

template <class C>
FASTZOO_DEVICE C square(C x) {
  return x * x;
}

template <DensityKernel kernel, class C>
FASTZOO_DEVICE C profile(C u) {
  if constexpr (kernel == DensityKernel::gaussian) {
    return fast_exponential(-u);  // its error in u is less than that of the distance
  } else {
    return math::density_profile<kernel>(u);
  }
}

// A block has kQueries queries, which may be of several clouds, and every gridDim.y-th tile of
// points of each. A tile's terms are added up in C, and tiles in double.
template <DensityKernel kernel, class C>
__global__ void __launch_bounds__(kThreads) density_scan(Density<C> density) {
  constexpr int kPiece = 4;  // points
  // Those of the tile under way, and of the one before, which others may still read.
  __shared__ SharedArray<C, 2 * kFewDims * kTilePoints> coordinates;
  __shared__ SharedArray<C, 2 * kTilePoints> scales;
  __shared__ SharedArray<C, 2 * kTilePoints> weights;
  const int thread = threadIdx.x;
  const int64_t dims = density.queries.dims;
  const Clouds& of_queries = density.of_queries;
  const int64_t block_begin = int64_t{blockIdx.x} * kQueries;
  const int64_t block_end =
      of_queries.rows < block_begin + kQueries ? of_queries.rows : block_begin + kQueries;
  // A warp has neighbours, so that it need not look at the clouds of others.
  const int64_t warp_begin = block_begin + thread / kWarpSize * kWarpSize * kQueriesEach;
  const auto row = [&](int i) { return warp_begin + i * kWarpSize + thread % kWarpSize; };

  C query[kQueriesEach][kFewDims] = {};
  double sums[kQueriesEach] = {};
#pragma unroll
  for (int i = 0; i < kQueriesEach; ++i) {
#pragma unroll
    for (int d = 0; d < kFewDims; ++d) {
      if (row(i) < block_end && d < dims) {
        query[i][d] = density.queries.data[row(i) * dims + d];
      }
    }
  }

  int current = 0;
  for (int64_t cloud = of_queries.first_beyond(block_begin); cloud < of_queries.count; ++cloud) {
    const Range own = of_queries[cloud];
    if (own.begin >= block_end) break;
    if (own.begin >= own.end) continue;
    const Range points = density.of_points[cloud];
    const bool warp_has_some =
        own.begin < warp_begin + kWarpSize * kQueriesEach && own.end > warp_begin;
    for (int64_t first = points.begin + int64_t{blockIdx.y} * kTilePoints; first < points.end;
         first += int64_t{gridDim.y} * kTilePoints) {
      if (thread < kTilePoints) {
        // Beyond the last point it stands again, without weight: a term of no other value.
        const bool exists = first + thread < points.end;
        const int64_t point = exists ? first + thread : points.end - 1;
#pragma unroll
        for (int d = 0; d < kFewDims; ++d) {
          coordinates[(current * kFewDims + d) * kTilePoints + thread] =
              d < dims ? density.points.data[point * dims + d] : C{0};
        }
        scales[current * kTilePoints + thread] = density.scale[point];
        weights[current * kTilePoints + thread] = exists ? density.weight[point] : C{0};
      }
      sync_block();
      if (warp_has_some) {
        C tile_sums[kQueriesEach] = {};
        const int left = tile_left(points.end, first, kTilePoints);
#pragma unroll 1
        for (int p = 0; p < left; p += kPiece) {
          Vector<C, kPiece> point[kFewDims];
#pragma unroll
          for (int d = 0; d < kFewDims; ++d) {
            point[d] =
                coordinates.template load<kPiece>((current * kFewDims + d) * kTilePoints + p);
          }
          const auto scale = scales.template load<kPiece>(current * kTilePoints + p);
          const auto weight = weights.template load<kPiece>(current * kTilePoints + p);
#pragma unroll
          for (int i = 0; i < kQueriesEach; ++i) {
#pragma unroll
            for (int j = 0; j < kPiece; ++j) {
              C distance = square(query[i][0] - point[0][j]);
#pragma unroll
              for (int d = 1; d < kFewDims; ++d) distance += square(query[i][d] - point[d][j]);
              tile_sums[i] =
                  fused_multiply_add(weight[j], profile<kernel>(scale[j] * distance), tile_sums[i]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kQueriesEach; ++i) {
          if (row(i) >= own.begin && row(i) < own.end) sums[i] += tile_sums[i];
        }
      }
      current ^= 1;
    }
  }

#pragma unroll
  for (int i = 0; i < kQueriesEach; ++i) {
    if (row(i) >= block_end) continue;
    density.parts[blockIdx.y * of_queries.rows + row(i)] = static_cast<C>(sums[i]);
  }
}

// What FusedScheme makes for products, for squared distances.
template <class C>
struct DistanceScheme : FusedScheme<C> {
  template <class Left, class Right>
  FASTZOO_DEVICE static void multiply_add(Left& left, Right& right,
                                          typename FusedScheme<C>::Products& distances) {
    FusedScheme<C>::accumulate(left, right, distances,
                               [](C a, C b, C sum) { return sum + square(a - b); });
  }
};

template <DensityKernel kernel, class C>
__global__ void __launch_bounds__(kTileThreads, DistanceScheme<C>::kBlocksEach)
    density_scan_wide(Density<C> density) {
  using Scheme = DistanceScheme<C>;
  __shared__ TileSlabs<Scheme> slabs;
  // Those of the tile under way, and of the one before, which others may still read.
  __shared__ SharedArray<C, 2 * kTileColumns> scales;
  __shared__ SharedArray<C, 2 * kTileColumns> weights;
  const int thread = threadIdx.x;
  const Clouds& of_queries = density.of_queries;
  const int64_t first_row = int64_t{blockIdx.x} * Scheme::kRows;
  const Rows<C> queries = density.queries.from(first_row);

  TileProduct<Scheme, C> product(slabs);
  double sums[Scheme::kRowsEach] = {};
  int current = 0;
  for (int64_t cloud = of_queries.first_beyond(first_row); cloud < of_queries.count; ++cloud) {
    const Range own = of_queries[cloud];
    if (own.begin >= first_row + Scheme::kRows) break;
    if (own.begin >= own.end) continue;
    const Range points = density.of_points[cloud];
    for (int64_t first = points.begin + int64_t{blockIdx.y} * kTileColumns; first < points.end;
         first += int64_t{gridDim.y} * kTileColumns) {
      const int left = tile_left(points.end, first, kTileColumns);
      if (thread < kTileColumns) {
        scales[current + thread] = thread < left ? density.scale[first + thread] : C{0};
        weights[current + thread] = thread < left ? density.weight[first + thread] : C{0};
      }
      Rows<C> tile = density.points.from(first);
      tile.count = left;
      auto distances = product.multiply(queries, tile);
#pragma unroll
      for (int i = 0; i < Scheme::kRowsEach; ++i) {
        const int64_t row = first_row + Scheme::row(i);
        C sum = 0;
#pragma unroll
        for (int j = 0; j < Scheme::kColumnsEach; ++j) {
          const int column = Scheme::column(j);
          if (column >= left) continue;
          const C u = scales[current + column] * distances(i, j);
          sum = fused_multiply_add(weights[current + column], profile<kernel>(u), sum);
        }
        if (row >= own.begin && row < own.end) sums[i] += sum;
      }
      current ^= kTileColumns;
    }
  }

#pragma unroll
  for (int i = 0; i < Scheme::kRowsEach; ++i) {
    const double sum = row_sum<Scheme>(sums[i]);
    const int64_t row = first_row + Scheme::row(i);
    if (thread % Scheme::kRowLanes != 0 || row >= of_queries.rows) continue;
    density.parts[blockIdx.y * of_queries.rows + row] = static_cast<C>(sum);
  }
}

template <class C>
__global__ void __launch_bounds__(kCombineThreads)
    density_combine(const C* parts, int64_t shares, int64_t queries, C* out) {
  const int64_t query = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  if (query >= queries) return;
  double sum = 0;
#pragma unroll 8
  for (int64_t share = 0; share < shares; ++share) sum += parts[share * queries + query];
  out[query] = static_cast<C>(sum);
}

// Calls body(std::integral_constant<DensityKernel, kernel>{}).
template <class Body>
void dispatch_kernel(const std::string& name, const Body& body) {
  DensityKernel kernel{};
  STD_TORCH_CHECK(math::density_kernel_named(name.c_str(), kernel),
                  "fastzoo: kernel_density: kernel gaussian, epanechnikov or tophat expected, got ",
                  name);
  switch (kernel) {
    case DensityKernel::gaussian:
      return body(std::integral_constant<DensityKernel, DensityKernel::gaussian>{});
    case DensityKernel::epanechnikov:
      return body(std::integral_constant<DensityKernel, DensityKernel::epanechnikov>{});
    case DensityKernel::tophat:
      return body(std::integral_constant<DensityKernel, DensityKernel::tophat>{});
  }
}

template <class C>
void sum_profiles(const Tensor& queries, const Tensor& points, const Tensor& scale,
                  const Tensor& weight, const Tensor& ranges1, const Tensor& ranges2,
                  int64_t longest, const std::string& kernel_name, const Tensor& out) {
  const auto data = [](const Tensor& tensor) {
    return static_cast<const C*>(tensor.const_data_ptr());
  };
  const auto clouds = [](const Tensor& ranges, int64_t rows) {
    return Clouds{static_cast<const int64_t*>(ranges.const_data_ptr()), ranges.size(0), rows};
  };
  const int64_t rows = queries.size(0);
  const bool wide = queries.size(1) > kFewDims;
  const unsigned row_blocks = blocks_for(rows, wide ? DistanceScheme<C>::kRows : int64_t{kQueries});
  const unsigned tiles = blocks_for(longest, wide ? kTileColumns : kTilePoints);
  // A block that is not wide has half the threads.
  const unsigned wanted = wide ? kManyBlocks : 2 * kManyBlocks;
  const unsigned shares =
      std::clamp((wanted + row_blocks - 1) / row_blocks, 1u, std::max(tiles, 1u));
  const Tensor parts = shares == 1 ? out : empty(out, {shares, rows}, out.scalar_type());
  const Density<C> density{rows_of<C>(queries),
                           rows_of<C>(points),
                           clouds(ranges1, rows),
                           clouds(ranges2, points.size(0)),
                           data(scale),
                           data(weight),
                           static_cast<C*>(parts.mutable_data_ptr())};

  const Stream stream(out);
  dispatch_kernel(kernel_name, [&](auto kernel) {
    const dim3 grid(row_blocks, shares);
    if (wide) {
      stream.launch("density_scan_wide", density_scan_wide<kernel.value, C>, grid, kTileThreads,
                    density);
    } else {
      stream.launch("density_scan", density_scan<kernel.value, C>, grid, kThreads, density);
    }
  });
  if (shares == 1) return;
  stream.launch("density_combine", density_combine<C>, blocks_for(rows, kCombineThreads),
                kCombineThreads, data(parts), shares, rows,
                static_cast<C*>(out.mutable_data_ptr()));
}

Tensor kernel_density(const Tensor& queries, const Tensor& points, const Tensor& scale,
                      const Tensor& weight, const Tensor& ranges1, const Tensor& ranges2,
                      int64_t longest, const std::string& kernel) {
  using torch::stable::contiguous;
  const ScalarType compute = compute_dtype(queries.scalar_type());
  const Tensor out = empty(queries, {queries.size(0)}, compute);
  if (out.numel() == 0) return out;
  const auto widened = [&](const Tensor& rows) {
    return contiguous(torch::stable::to(rows, compute));
  };
  const Tensor q = widened(queries), p = widened(points), s = contiguous(scale),
               w = contiguous(weight), of_queries = contiguous(ranges1),
               of_points = contiguous(ranges2);
  const auto sum = compute == ScalarType::Double ? sum_profiles<double> : sum_profiles<float>;
  sum(q, p, s, w, of_queries, of_points, longest, kernel, out);
  return out;
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::kernel_density>(m, "kernel_density.cuda");
}
