// Kernel density: of each query the weighted sum of a profile of the scaled squared distances to
// the points of its cloud. No matrix of pairs is stored, and distances are sums of squared
// differences, so that they do not depend on where the origin is.
//   density_boxes      of many points in Morton order: where the tiles are
//   density_scan       up to three dimensions: tiles of points in shared memory, queries in
//                      registers; blocks share out the tiles, and skip those whose terms are zero
//   density_scan_wide  more dimensions: tiles of distances, made as those of products are
//   density_combine    the shares put together
#include "../math/density.h"

#include <algorithm>
#include <string>

#include "../torch_abi.h"
#include "runtime/clouds.h"
#include "runtime/point_tree.h"
#include "runtime/rows.h"
#include "runtime/tile_product.h"

namespace fastzoo::cuda {
namespace {

using math::DensityKernel;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kQueriesEach = 4;
constexpr int kWarpQueries = kWarpSize * kQueriesEach;
constexpr int kQueries = kThreads * kQueriesEach;
constexpr int kTilePoints = 64;
constexpr int kCombineThreads = 64;

template <class C>
struct Box {
  C lower[kFewDims], upper[kFewDims];
};

// Of a tile of points, and their least scale; that is negative where no term may be left out.
template <class C>
struct TileBox {
  Box<C> box;
  C scale;
};

template <class C>
struct Density {
  Rows<C> queries, points;
  Clouds of_queries, of_points;
  const C* scale;
  const C* weight;
  // Null where rows stay as they are and every tile counts.
  const int64_t* query_order;
  const int64_t* point_order;
  TileBox<C>* boxes;
  C* parts;  // [shares, queries]

  FASTZOO_DEVICE int64_t query_at(int64_t place) const {
    return query_order == nullptr ? place : query_order[place];
  }
  FASTZOO_DEVICE int64_t point_at(int64_t place) const {
    return point_order == nullptr ? place : point_order[place];
  }
  // Every cloud has tiles of its own.
  FASTZOO_DEVICE int64_t first_tile(int64_t cloud) const {
    return of_points.begin(cloud) / kTilePoints + cloud;
  }
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

template <class C>
FASTZOO_DEVICE Box<C> empty_box() {
  Box<C> box;
#pragma unroll
  for (int d = 0; d < kFewDims; ++d) {
    box.lower[d] = kInfinity<C>;
    box.upper[d] = -kInfinity<C>;
  }
  return box;
}

// A NaN is anywhere.
template <class C>
FASTZOO_DEVICE void add_to_box(Box<C>& box, int d, C coordinate) {
  const bool nan = math::is_nan(coordinate);
  box.lower[d] = math::minimum(box.lower[d], nan ? -kInfinity<C> : coordinate);
  box.upper[d] = math::maximum(box.upper[d], nan ? kInfinity<C> : coordinate);
}

template <class C>
FASTZOO_DEVICE void join_lanes(Box<C>& box) {
#pragma unroll
  for (int d = 0; d < kFewDims; ++d) {
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
      box.lower[d] = math::minimum(box.lower[d], shuffle_xor(box.lower[d], flip));
      box.upper[d] = math::maximum(box.upper[d], shuffle_xor(box.upper[d], flip));
    }
  }
}

// Not above that of any pair of the boxes: every operation rounds monotonously.
template <class C>
FASTZOO_DEVICE C least_distance(const Box<C>& a, const Box<C>& b) {
  C distance = 0;
#pragma unroll
  for (int d = 0; d < kFewDims; ++d) {
    C gap = 0;
    if (a.lower[d] - b.upper[d] > gap) gap = a.lower[d] - b.upper[d];
    if (b.lower[d] - a.upper[d] > gap) gap = b.lower[d] - a.upper[d];
    distance += square(gap);
  }
  return distance;
}

// A warp a tile.
template <class C>
__global__ void __launch_bounds__(kThreads) density_boxes(Density<C> density, int64_t tiles) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t tile = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (tile >= tiles) return;
  const Clouds& clouds = density.of_points;
  const int64_t cloud = clouds.last_at(tile, [&](int64_t c) { return density.first_tile(c); });
  if (cloud < 0) return;
  const int64_t first = clouds.begin(cloud) + (tile - density.first_tile(cloud)) * kTilePoints;
  const int64_t dims = density.points.dims;
  const int left = tile_left(clouds.end(cloud), first, kTilePoints);
  TileBox<C> found{empty_box<C>(), kInfinity<C>};
  bool vanishes = true;
  for (int i = lane; i < left; i += kWarpSize) {
    const int64_t point = density.point_at(first + i);
    for (int d = 0; d < kFewDims; ++d) {
      add_to_box(found.box, d, d < dims ? density.points.data[point * dims + d] : C{0});
    }
    const C scale = density.scale[point];
    // Of an infinite weight, a term of profile 0 is a NaN.
    vanishes = vanishes && scale >= 0 && density.weight[point] - density.weight[point] == 0;
    found.scale = math::minimum(found.scale, scale);
  }
  join_lanes(found.box);
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
    found.scale = math::minimum(found.scale, shuffle_xor(found.scale, flip));
  }
  if (!all(vanishes)) found.scale = -1;
  if (lane == 0) density.boxes[tile] = found;
}

// Blocks of a multiprocessor; a double's exponential wants more registers.
template <class C>
constexpr int kScanBlocks = sizeof(C) == 4 ? 4 : 3;

// A block has kQueries queries, which may be of several clouds, and every gridDim.y-th tile of
// points of each. A tile's terms are added up in C, and tiles in double.
template <DensityKernel kernel, class C>
__global__ void __launch_bounds__(kThreads, kScanBlocks<C>) density_scan(Density<C> density) {
  constexpr int kPiece = 16 / sizeof(C);  // points
  // Those of the tile under way, and of the one before, which others may still read.
  __shared__ SharedArray<C, 2 * kFewDims * kTilePoints> coordinates;
  __shared__ SharedArray<C, 2 * kTilePoints> scales;
  __shared__ SharedArray<C, 2 * kTilePoints> weights;
  __shared__ SharedArray<Box<C>, kWarps> query_boxes;
  // Of kThreads tiles: which are near, and of each the warps that it is near to.
  __shared__ SharedArray<uint32_t, kWarps> near_tiles;
  __shared__ SharedArray<uint32_t, kThreads> near_warps;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int64_t dims = density.queries.dims;
  const C reach = math::density_reach<C>(kernel);
  const Clouds& of_queries = density.of_queries;
  const int64_t block_begin = int64_t{blockIdx.x} * kQueries;
  const int64_t block_end =
      of_queries.rows < block_begin + kQueries ? of_queries.rows : block_begin + kQueries;
  // A warp has neighbours, so that it need not look at what is far from them.
  const int64_t warp_begin = block_begin + warp * kWarpQueries;
  const auto place = [&](int i) { return warp_begin + i * kWarpSize + thread % kWarpSize; };

  C query[kQueriesEach][kFewDims] = {};
  double sums[kQueriesEach] = {};
  Box<C> box = empty_box<C>();
#pragma unroll
  for (int i = 0; i < kQueriesEach; ++i) {
    if (place(i) >= block_end) continue;
    const int64_t row = density.query_at(place(i));
#pragma unroll
    for (int d = 0; d < kFewDims; ++d) {
      if (d < dims) query[i][d] = density.queries.data[row * dims + d];
      add_to_box(box, d, query[i][d]);
    }
  }
  if (density.boxes != nullptr) {
    join_lanes(box);
    if (thread % kWarpSize == 0) query_boxes[warp] = box;
  }

  int current = 0;
  for (int64_t cloud = of_queries.last_from(block_begin); cloud < of_queries.count; ++cloud) {
    if (cloud < 0 || of_queries.end(cloud) <= block_begin) continue;
    const int64_t own_begin = of_queries.begin(cloud), own_end = of_queries.end(cloud);
    if (own_begin >= block_end) break;
    const int64_t begin = density.of_points.begin(cloud), end = density.of_points.end(cloud);
    const bool warp_has_some = own_begin < warp_begin + kWarpQueries && own_end > warp_begin;
    const int64_t tiles = (end - begin + kTilePoints - 1) / kTilePoints;
    for (int64_t base = blockIdx.y; base < tiles; base += int64_t{gridDim.y} * kThreads) {
      const int64_t own_tile = base + int64_t{gridDim.y} * thread;
      sync_block();
      uint32_t near = own_tile < tiles ? (1u << kWarps) - 1 : 0;
      if (near != 0 && density.boxes != nullptr) {
        const TileBox<C> tile = density.boxes[density.first_tile(cloud) + own_tile];
        for (int w = 0; w < kWarps; ++w) {
          const Box<C> queries = query_boxes[w];
          if (tile.scale * least_distance(queries, tile.box) > reach) near &= ~(1u << w);
        }
      }
      near_warps[thread] = near;
      const uint32_t some = ballot(near != 0);
      if (thread % kWarpSize == 0) near_tiles[warp] = some;
      sync_block();

      for (int word = 0; word < kWarps; ++word) {
        for (uint32_t rest = near_tiles[word]; rest != 0; rest &= rest - 1) {
          const int turn = word * kWarpSize + lowest_bit(rest);
          const int64_t first = begin + (base + int64_t{gridDim.y} * turn) * kTilePoints;
          if (thread < kTilePoints) {
            // Beyond the last point it stands again, without weight: a term of no other value.
            const bool exists = first + thread < end;
            const int64_t point = density.point_at(exists ? first + thread : end - 1);
#pragma unroll
            for (int d = 0; d < kFewDims; ++d) {
              coordinates[(current * kFewDims + d) * kTilePoints + thread] =
                  d < dims ? density.points.data[point * dims + d] : C{0};
            }
            scales[current * kTilePoints + thread] = density.scale[point];
            weights[current * kTilePoints + thread] = exists ? density.weight[point] : C{0};
          }
          sync_block();
          if (warp_has_some && (near_warps[turn] >> warp & 1) != 0) {
            C tile_sums[kQueriesEach] = {};
            const int left = tile_left(end, first, kTilePoints);
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
                  tile_sums[i] = fused_multiply_add(weight[j], profile<kernel>(scale[j] * distance),
                                                    tile_sums[i]);
                }
              }
            }
#pragma unroll
            for (int i = 0; i < kQueriesEach; ++i) {
              if (place(i) >= own_begin && place(i) < own_end) sums[i] += tile_sums[i];
            }
          }
          current ^= 1;
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kQueriesEach; ++i) {
    if (place(i) >= block_end) continue;
    density.parts[blockIdx.y * of_queries.rows + density.query_at(place(i))] =
        static_cast<C>(sums[i]);
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
  for (int64_t cloud = of_queries.last_from(first_row); cloud < of_queries.count; ++cloud) {
    if (cloud < 0 || of_queries.end(cloud) <= first_row) continue;
    const int64_t own_begin = of_queries.begin(cloud), own_end = of_queries.end(cloud);
    if (own_begin >= first_row + Scheme::kRows) break;
    const int64_t end = density.of_points.end(cloud);
    for (int64_t first = density.of_points.begin(cloud) + int64_t{blockIdx.y} * kTileColumns;
         first < end; first += int64_t{gridDim.y} * kTileColumns) {
      const int left = tile_left(end, first, kTileColumns);
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
        if (row >= own_begin && row < own_end) sums[i] += sum;
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
  const int64_t rows = queries.size(0);
  const bool wide = queries.size(1) > kFewDims;
  const unsigned row_blocks = blocks_for(rows, wide ? DistanceScheme<C>::kRows : int64_t{kQueries});
  const unsigned tiles = blocks_for(longest, wide ? kTileColumns : kTilePoints);
  // A block that is not wide has half the threads.
  const unsigned wanted = wide ? kManyBlocks : 2 * kManyBlocks;
  const unsigned shares =
      std::clamp((wanted + row_blocks - 1) / row_blocks, 1u, std::max(tiles, 1u));
  const Tensor parts = shares == 1 ? out : empty(out, {shares, rows}, out.scalar_type());
  const Stream stream(out);
  Density<C> density{rows_of<C>(queries),
                     rows_of<C>(points),
                     clouds_of(ranges1, rows),
                     clouds_of(ranges2, points.size(0)),
                     data(scale),
                     data(weight),
                     nullptr,
                     nullptr,
                     nullptr,
                     static_cast<C*>(parts.mutable_data_ptr())};
  // Beside so many pairs, putting them in order costs little even where all of them count.
  Tensor query_order, point_order, boxes;
  if (!wide && int64_t{2} * row_blocks * tiles >= int64_t{kManyBlocks} * kManyBlocks) {
    const int64_t box_count = points.size(0) / kTilePoints + density.of_points.count;
    const bool same = queries.const_data_ptr() == points.const_data_ptr() &&
                      ranges1.const_data_ptr() == ranges2.const_data_ptr();
    point_order = morton_order<C>(stream, points, density.of_points, longest);
    query_order =
        same ? point_order : morton_order<C>(stream, queries, density.of_queries, longest);
    boxes = empty(out, {box_count, static_cast<int64_t>(sizeof(TileBox<C>))}, ScalarType::Byte);
    density.point_order = static_cast<const int64_t*>(point_order.const_data_ptr());
    density.query_order = static_cast<const int64_t*>(query_order.const_data_ptr());
    density.boxes = static_cast<TileBox<C>*>(boxes.mutable_data_ptr());
    stream.launch("density_boxes", density_boxes<C>, blocks_for(box_count, kWarps), kThreads,
                  density, box_count);
  }
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
