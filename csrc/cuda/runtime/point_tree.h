// A tree of the points of each cloud, for searches that skip most of them. Points stand in Morton
// order; a group of level 0 is kWarpSize consecutive points of one cloud, and a group of level l
// the boxes of as many consecutive groups of level l - 1, so that a warp reads or tests a group at
// once. Groups of the last level have no boxes of their own and are all looked at.
//   tree_bounds   the box of each cloud's finite coordinates
//   tree_keys     what puts rows in Morton order, within the rows of their cloud
//   tree_points   groups of level 0 and their boxes
//   tree_boxes    the boxes of a higher level's groups
#pragma once

#include "../../math/neighbours.h"
#include "clouds.h"
#include "rows.h"
#include "sorted.h"

namespace fastzoo::cuda {

constexpr int kTreeThreads = 256;
constexpr int kTreeWarps = kTreeThreads / kWarpSize;
constexpr int kTreeTop = 3;  // the last level: its groups stand for 2^20 points
constexpr int kTreeDims = 8;
constexpr int kFewDims = 3;
constexpr int kBoundsRows = 16 * kTreeThreads;  // of one block

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

// Where the groups of a cloud are. Every cloud has groups of its own.
struct CloudGroups {
  int64_t cloud;  // -1 for none
  int64_t begin, size;

  FASTZOO_DEVICE static int shift(int level) { return 5 * (level + 1); }
  FASTZOO_DEVICE int64_t first(int level) const { return (begin >> shift(level)) + cloud; }
  FASTZOO_DEVICE int64_t count(int level) const {
    return (size + (int64_t{1} << shift(level)) - 1) >> shift(level);
  }
};

// Points of fewer than kFewDims dimensions get zeros for those they lack, which add nothing to a
// distance.
template <class C>
struct PointTree {
  Clouds clouds;
  int dims;
  C* points;           // [groups, dims, kWarpSize]
  int32_t* indices;    // [groups, kWarpSize], within the cloud; -1 beyond the last point
  int32_t* places;     // [rows]: where in the cloud's Morton order a row stands
  C* boxes[kTreeTop];  // of levels 1 and on: [groups, dims, 2, kWarpSize], lower and upper
  int64_t groups[kTreeTop + 1];

  FASTZOO_DEVICE CloudGroups of_cloud(int64_t cloud) const {
    if (cloud < 0) return {-1, 0, 0};
    return {cloud, clouds.begin(cloud), clouds.size(cloud)};
  }
  // Of the cloud that may have a group.
  FASTZOO_DEVICE CloudGroups of_group(int64_t group, int level) const {
    return of_cloud(clouds.last_at(group, [&](int64_t cloud) {
      return CloudGroups{cloud, clouds.begin(cloud), 0}.first(level);
    }));
  }

  FASTZOO_DEVICE C* coordinate(int64_t group, int d) const {
    return points + (group * dims + d) * kWarpSize;
  }
  // Lower bounds along a dimension; the upper ones follow.
  FASTZOO_DEVICE C* bounds(int64_t group, int level, int d) const {
    return boxes[level - 1] + (group * dims + d) * 2 * kWarpSize;
  }
};

// A coordinate or its negative as a number that rises with it. None is 0, whose coordinate is NaN.
FASTZOO_DEVICE uint64_t rising_bits(double value) {
  const uint64_t bits = math::bits_as<uint64_t>(value);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}
FASTZOO_DEVICE double of_rising_bits(uint64_t bits) {
  return math::bits_as<double>(bits >> 63 ? bits & ~(uint64_t{1} << 63) : ~bits);
}

// bounds [clouds, kFewDims, 2]: the rising bits of the largest negative, and of the largest.
// Several blocks have a cloud, each some of its rows.
template <class C>
__global__ void __launch_bounds__(kTreeThreads)
    tree_bounds(Clouds clouds, const C* points, int64_t dims, int64_t blocks_each,
                uint64_t* bounds) {
  const int64_t cloud = blockIdx.x / blocks_each;
  const int64_t first = blockIdx.x % blocks_each * kBoundsRows;
  const int64_t size = clouds.size(cloud);
  const int64_t last = first + kBoundsRows < size ? first + kBoundsRows : size;
  const C* rows = points + clouds.begin(cloud) * dims;
  for (int d = 0; d < math::morton_axes(dims); ++d) {
    uint64_t largest[2] = {0, 0};
    for (int64_t i = first + threadIdx.x; i < last; i += kTreeThreads) {
      const double value = rows[i * dims + d];
      if (!(math::absolute(value) < kInfinity<double>)) continue;
      for (int side = 0; side < 2; ++side) {
        const uint64_t bits = rising_bits(side == 0 ? -value : value);
        if (bits > largest[side]) largest[side] = bits;
      }
    }
    for (int side = 0; side < 2; ++side) {
      for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
        const uint64_t other = shuffle_xor(largest[side], flip);
        if (other > largest[side]) largest[side] = other;
      }
      if (threadIdx.x % kWarpSize == 0 && largest[side] != 0) {
        atomic_max(bounds + (cloud * kFewDims + d) * 2 + side, largest[side]);
      }
    }
  }
}

// Sorting by these leaves each cloud, and the rows between clouds, where they are. Keys have the
// first `code_bits` bits of a Morton code.
template <class C>
__global__ void __launch_bounds__(kTreeThreads)
    tree_keys(Clouds clouds, const C* points, int64_t dims, const uint64_t* bounds, int code_bits,
              int32_t* keys) {
  const int64_t row = int64_t{blockIdx.x} * kTreeThreads + threadIdx.x;
  if (row >= clouds.rows) return;
  const int64_t cloud = clouds.last_from(row);
  if (cloud < 0 || row >= clouds.end(cloud)) {
    keys[row] = static_cast<int32_t>((2 * cloud + 2) << code_bits);
    return;
  }
  const int axes = math::morton_axes(dims);
  C point[kFewDims], lowest[kFewDims];
  double extent = 0;
  for (int d = 0; d < kFewDims; ++d) {
    if (d >= axes) break;
    const double lower = -of_rising_bits(bounds[(cloud * kFewDims + d) * 2]);
    const double upper = of_rising_bits(bounds[(cloud * kFewDims + d) * 2 + 1]);
    extent = math::maximum(extent, 0.5 * upper - 0.5 * lower);
    point[d] = points[row * dims + d];
    lowest[d] = static_cast<C>(lower);
  }
  const uint32_t code = math::morton_code(point, lowest, math::morton_scale(extent, axes), axes);
  keys[row] =
      static_cast<int32_t>((2 * cloud + 1) << code_bits | code >> (math::kMortonBits - code_bits));
}

// By a warp, a member of the group a lane: the box of all members along a dimension.
template <class C>
FASTZOO_DEVICE void put_box(const PointTree<C>& tree, const CloudGroups& cloud, int64_t group,
                            int level, int d, C lower, C upper) {
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
    lower = math::minimum(lower, shuffle_xor(lower, flip));
    upper = math::maximum(upper, shuffle_xor(upper, flip));
  }
  if (threadIdx.x % kWarpSize != 0) return;
  const int64_t within = group - cloud.first(level);
  C* to =
      tree.bounds(cloud.first(level + 1) + within / kWarpSize, level + 1, d) + within % kWarpSize;
  to[0] = lower;
  to[kWarpSize] = upper;
}

// NaN bounds nothing: minimum and maximum keep their first argument.
template <class C>
__global__ void __launch_bounds__(kTreeThreads)
    tree_points(PointTree<C> tree, const C* points, int64_t dims, const int64_t* order) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t group = int64_t{blockIdx.x} * kTreeWarps + threadIdx.x / kWarpSize;
  const CloudGroups cloud = tree.of_group(group, 0);
  const int64_t first = (group - cloud.first(0)) * kWarpSize;
  if (first >= cloud.size) return;
  const int64_t place = first + lane;
  const bool exists = place < cloud.size;
  const int64_t row = exists ? order[cloud.begin + place] : 0;
  tree.indices[group * kWarpSize + lane] = exists ? static_cast<int32_t>(row - cloud.begin) : -1;
  if (exists) tree.places[row] = static_cast<int32_t>(place);
  for (int d = 0; d < tree.dims; ++d) {
    const C value = exists && d < dims ? points[row * dims + d] : C{0};
    tree.coordinate(group, d)[lane] = value;
    put_box(tree, cloud, group, 0, d, math::minimum(kInfinity<C>, exists ? value : kInfinity<C>),
            math::maximum(-kInfinity<C>, exists ? value : -kInfinity<C>));
  }
}

template <class C, int level>
__global__ void __launch_bounds__(kTreeThreads) tree_boxes(PointTree<C> tree) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t group = int64_t{blockIdx.x} * kTreeWarps + threadIdx.x / kWarpSize;
  const CloudGroups cloud = tree.of_group(group, level);
  const int64_t first = (group - cloud.first(level)) * kWarpSize;
  const int64_t members = cloud.count(level - 1);
  if (first >= members) return;
  const bool exists = first + lane < members;
  for (int d = 0; d < tree.dims; ++d) {
    const C* bounds = tree.bounds(group, level, d) + lane;
    put_box(tree, cloud, group, level, d, exists ? bounds[0] : kInfinity<C>,
            exists ? bounds[kWarpSize] : -kInfinity<C>);
  }
}

// A tree and the memory that it lies in.
template <class C>
struct PointTreeMemory {
  Tensor order, points, indices, places;
  Tensor boxes[kTreeTop];
  PointTree<C> tree;

  const int64_t* row_at() const { return static_cast<const int64_t*>(order.const_data_ptr()); }
};

// Which of points [rows, dims], rows > 0, stands at each place when every cloud is in Morton order;
// rows of no cloud stay where they are. `longest` is the size of no smaller a cloud than the
// largest.
template <class C>
Tensor morton_order(const Stream& stream, const Tensor& points, const Clouds& clouds,
                    int64_t longest) {
  const int64_t dims = points.size(1);
  const C* data = static_cast<const C*>(points.const_data_ptr());
  const Tensor bounds =
      torch::stable::new_zeros(points, {clouds.count, kFewDims, 2}, ScalarType::Long);
  uint64_t* bound_data = static_cast<uint64_t*>(bounds.mutable_data_ptr());
  const int64_t blocks_each = blocks_for(longest < 1 ? 1 : longest, kBoundsRows);
  stream.launch("tree_bounds", tree_bounds<C>, blocks_for(clouds.count * blocks_each, 1),
                kTreeThreads, clouds, data, dims, blocks_each, bound_data);
  STD_TORCH_CHECK(clouds.count < 1 << 30, "fastzoo: fewer than 2^30 clouds expected, got ",
                  clouds.count);
  int code_bits = math::kMortonBits;  // keys of 32 bits are sorted faster than those of 64
  while ((2 * clouds.count + 1) << code_bits > int64_t{1} << 31) --code_bits;
  const Tensor keys = empty(points, {clouds.rows}, ScalarType::Int);
  stream.launch("tree_keys", tree_keys<C>, blocks_for(clouds.rows, kTreeThreads), kTreeThreads,
                clouds, data, dims, bound_data, code_bits,
                static_cast<int32_t*>(keys.mutable_data_ptr()));
  return sort_rows(keys).indices;
}

// Of points as above, of up to kTreeDims dimensions.
template <class C>
PointTreeMemory<C> build_tree(const Stream& stream, const Tensor& points, const Clouds& clouds,
                              int64_t longest) {
  const int64_t dims = points.size(1);
  const int64_t tree_dims = dims < kFewDims ? kFewDims : dims;
  const C* data = static_cast<const C*>(points.const_data_ptr());

  PointTreeMemory<C> memory;
  memory.order = morton_order<C>(stream, points, clouds, longest);
  PointTree<C>& tree = memory.tree;
  tree.clouds = clouds;
  tree.dims = static_cast<int>(tree_dims);
  for (int level = 0; level <= kTreeTop; ++level) {
    tree.groups[level] = (clouds.rows >> 5 * (level + 1)) + clouds.count;
  }
  const ScalarType compute = points.scalar_type();
  memory.points = empty(points, {tree.groups[0], tree_dims, kWarpSize}, compute);
  memory.indices = empty(points, {tree.groups[0], kWarpSize}, ScalarType::Int);
  memory.places = empty(points, {clouds.rows}, ScalarType::Int);
  tree.points = static_cast<C*>(memory.points.mutable_data_ptr());
  tree.indices = static_cast<int32_t*>(memory.indices.mutable_data_ptr());
  tree.places = static_cast<int32_t*>(memory.places.mutable_data_ptr());
  for (int level = 1; level <= kTreeTop; ++level) {
    Tensor& boxes = memory.boxes[level - 1];
    boxes = empty(points, {tree.groups[level], tree_dims, 2, kWarpSize}, compute);
    tree.boxes[level - 1] = static_cast<C*>(boxes.mutable_data_ptr());
  }
  stream.launch("tree_points", tree_points<C>, blocks_for(tree.groups[0], kTreeWarps), kTreeThreads,
                tree, data, dims, memory.row_at());
  static_assert(kTreeTop == 3, "boxes of levels 1 and 2 make those of 2 and 3");
  stream.launch("tree_boxes", tree_boxes<C, 1>, blocks_for(tree.groups[1], kTreeWarps),
                kTreeThreads, tree);
  stream.launch("tree_boxes", tree_boxes<C, 2>, blocks_for(tree.groups[2], kTreeWarps),
                kTreeThreads, tree);
  return memory;
}

}  // namespace fastzoo::cuda
