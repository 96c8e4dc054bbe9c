// Fewer points for many: farthest point sampling, and the cells of a voxel grid.
// A block samples a cloud; how depends on the cloud's size:
//   farthest_in_registers  few points of few dimensions: a thread has some, and their distances
//   farthest_in_memory     any points: each step goes over them all
//   farthest_by_tree       large clouds: a step goes into the boxes whose farthest point is farther
//                          from the points taken so far than the box is from the new one
// Cells are found by a table of rows, one of each cell:
//   voxel_claim  rows find the place of their cell in the table; the lowest row stays there
//   voxel_lead   the rows that are the first of their cell, to be counted
//   voxel_emit   cells by the number of such rows up to theirs
#include "../math/sampling.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/distance_keys.h"
#include "runtime/point_tree.h"

namespace fastzoo::cuda {
namespace {

using math::Norm;

// Threads of a block, and points of a thread where they are in registers. More points for fewer
// threads are less work that all threads do. The emulator's are few, so that small inputs reach
// every kernel.
#if defined(FASTZOO_EMULATE)
constexpr int kSmallBlock = 32;
constexpr int kLargeBlock = 64;
constexpr int kWideBlock = 64;
constexpr int kFewEach = 2;
constexpr int kManyEach = 4;
#else
constexpr int kSmallBlock = 256;
constexpr int kLargeBlock = 512;
constexpr int kWideBlock = 1024;
constexpr int kFewEach = 4;
constexpr int kManyEach = 16;
#endif

// What is farthest comes first: keys have the bits of distances in falling order.
template <class C>
constexpr DistanceBits<C> kNearestBits = kNoBits<C> / 2;

// Of points that are taken. No distance is less.
template <class C>
constexpr C kTaken = -1;

template <class C>
FASTZOO_DEVICE DistanceKey<C> far_key(C least, uint32_t index) {
  if (least < 0) return no_key<C>();
  return make_key(kNearestBits<C> - math::bits_as<DistanceBits<C>>(least), index);
}
template <class C>
FASTZOO_DEVICE C distance_of(DistanceKey<C> key) {
  return bits_of(key) > kNearestBits<C> ? kTaken<C>
                                        : math::bits_as<C>(kNearestBits<C> - bits_of(key));
}

// The lesser. A distance of NaN is none: so the functions of C have it, which are one instruction.
FASTZOO_DEVICE float nearer(float least, float distance) { return ::fminf(least, distance); }
FASTZOO_DEVICE double nearer(double least, double distance) { return ::fmin(least, distance); }

// Clouds of other sizes than from `above` to `most` are left to other launches.
template <class C>
struct Farthest {
  const C* points;
  Clouds clouds;
  int64_t dims;
  const int64_t* starts;
  const int64_t* counts;
  int64_t k;
  int64_t* chosen;  // [clouds, k]
  int64_t above, most;

  FASTZOO_DEVICE bool takes(int64_t size) const { return size > above && size <= most; }
  FASTZOO_DEVICE int64_t count(int64_t cloud) const {
    const int64_t size = clouds.size(cloud), wanted = counts[cloud];
    const int64_t count = size < k ? size : k;
    return wanted < count ? (wanted < 0 ? 0 : wanted) : count;
  }
  FASTZOO_DEVICE int64_t start(int64_t cloud) const {
    const int64_t last = clouds.size(cloud) - 1, start = starts[cloud];
    return start < 0 ? 0 : start > last ? last : start;
  }
};

template <class C, int kThreads>
using FirstKeys = SharedArray<DistanceKey<C>, 2 * kThreads / kWarpSize>;

// The steps of a block: step(chosen) gives a thread's farthest key once `chosen` is taken.
template <class C, class Step, class Memory>
FASTZOO_DEVICE void take_farthest(const Farthest<C>& task, int64_t cloud, Memory& firsts,
                                  const Step& step) {
  using Key = DistanceKey<C>;
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  int64_t* const out = task.chosen + cloud * task.k;
  const int64_t count = task.count(cloud);
  if (count > 0) {
    int64_t chosen = task.start(cloud);
    for (int64_t i = 0;; ++i) {
      if (thread == 0) out[i] = chosen;
      if (i + 1 == count) break;
      const Key mine = warp_first(step(chosen));
      // Two sets in turn: the next step may write before all have read.
      const int set = i % 2 == 0 ? 0 : warps;
      if (lane == 0) firsts[set + warp] = mine;
      sync_block();
      chosen = index_of(warp_first(lane < warps ? firsts[set + lane] : no_key<C>()));
    }
  }
  for (int64_t i = count + thread; i < task.k; i += blockDim.x) out[i] = -1;
}

// Up to kFewDims dimensions; those that points lack are zeros.
template <class C, int kThreads, int kEach>
__global__ void __launch_bounds__(kThreads, 1) farthest_in_registers(Farthest<C> task) {
  __shared__ FirstKeys<C, kThreads> firsts;
  const int64_t cloud = blockIdx.x;
  const int64_t size = task.clouds.size(cloud);
  if (!task.takes(size)) return;
  const C* const points = task.points + task.clouds.begin(cloud) * task.dims;
  const auto coordinate = [&](int64_t i, int d) {
    return d < task.dims ? points[i * task.dims + d] : C{0};
  };
  C mine[kEach][kFewDims], least[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = static_cast<int>(threadIdx.x) + e * kThreads;
    least[e] = i < size ? kInfinity<C> : kTaken<C>;
#pragma unroll
    for (int d = 0; d < kFewDims; ++d) mine[e][d] = i < size ? coordinate(i, d) : C{0};
  }
  take_farthest(task, cloud, firsts, [&](int64_t chosen) {
    C latest[kFewDims];
#pragma unroll
    for (int d = 0; d < kFewDims; ++d) latest[d] = coordinate(chosen, d);
    const int taken = static_cast<int>(chosen);
    if (taken % kThreads == static_cast<int>(threadIdx.x)) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) least[e] = e == taken / kThreads ? kTaken<C> : least[e];
    }
    C farthest = kTaken<C>;
    int index = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      C distance = math::distance_term<Norm::two>(mine[e][0], latest[0]);
#pragma unroll
      for (int d = 1; d < kFewDims; ++d) {
        distance += math::distance_term<Norm::two>(mine[e][d], latest[d]);
      }
      least[e] = nearer(least[e], distance);
      if (least[e] > farthest) index = static_cast<int>(threadIdx.x) + e * kThreads;
      farthest = math::maximum(farthest, least[e]);
    }
    return far_key(farthest, static_cast<uint32_t>(index));
  });
}

// `columns` are the points by dimension; least [rows] is the kernel's own.
template <class C>
__global__ void __launch_bounds__(kWideBlock, 1)
    farthest_in_memory(Farthest<C> task, const C* columns, C* least) {
  __shared__ FirstKeys<C, kWideBlock> firsts;
  const int64_t cloud = blockIdx.x;
  const int64_t size = task.clouds.size(cloud);
  if (!task.takes(size)) return;
  const int64_t begin = task.clouds.begin(cloud);
  const C* const points = columns + begin;
  C* const distances = least + begin;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) distances[i] = kInfinity<C>;
  take_farthest(task, cloud, firsts, [&](int64_t chosen) {
    C farthest = kTaken<C>;
    int64_t index = 0;
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      C distance = 0;
#pragma unroll 4
      for (int64_t d = 0; d < task.dims; ++d) {
        const C* const column = points + d * task.clouds.rows;
        distance += math::distance_term<Norm::two>(column[i], column[chosen]);
      }
      const C now = i == chosen ? kTaken<C> : nearer(distances[i], distance);
      distances[i] = now;
      if (now > farthest) {
        farthest = now;
        index = i;
      }
    }
    return far_key(farthest, static_cast<uint32_t>(index));
  });
}

// What a tree's groups hold of a sampling: by group of level 0, of level 1, and lists of groups
// that a step goes into.
template <class C>
struct FarthestGroups {
  C* least;                // [groups 0, kWarpSize]
  DistanceKey<C>* points;  // [groups 0]: the farthest point's
  DistanceKey<C>* blocks;  // [groups 1]: likewise
  int32_t* listed_points;  // [groups 0], within the cloud
  int32_t* listed_blocks;  // [groups 1], within the cloud
};

// A step goes from the boxes of groups of level 1, a thread each, to the boxes of groups of level 0
// in those, a lane each, to the points of these, and back.
template <class C, int kDims>
__global__ void __launch_bounds__(kWideBlock, 1)
    farthest_by_tree(Farthest<C> task, PointTree<C> tree, FarthestGroups<C> groups) {
  using Key = DistanceKey<C>;
  constexpr int kAxes = kDims > 0 ? kDims : kTreeDims;
  constexpr int kWarps = kWideBlock / kWarpSize;
  __shared__ FirstKeys<C, kWideBlock> firsts;
  __shared__ SharedArray<int, 2> listed;
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const CloudGroups cloud = tree.of_cloud(blockIdx.x);
  if (!task.takes(cloud.size)) return;
  const int64_t first_points = cloud.first(0), points = cloud.count(0);
  const int64_t first_blocks = cloud.first(1), blocks = cloud.count(1);
  const int64_t first_tops = cloud.first(2);
  int32_t* const listed_points = groups.listed_points + first_points;
  int32_t* const listed_blocks = groups.listed_blocks + first_blocks;
  Key* const far_points = groups.points + first_points;
  Key* const far_blocks = groups.blocks + first_blocks;
  bool fresh = true;  // nothing is known of any group

  take_farthest(task, cloud.cloud, firsts, [&](int64_t chosen) {
    const int64_t place = tree.places[cloud.begin + chosen];
    C latest[kAxes];
#pragma unroll
    for (int d = 0; d < kAxes; ++d) {
      latest[d] = d < task.dims ? task.points[(cloud.begin + chosen) * task.dims + d] : C{0};
    }
    const auto sum = [&](const auto& term) {
      C total = 0;
#pragma unroll
      for (int d = 0; d < kAxes; ++d) {
        if (kDims > 0 || d < tree.dims) total += term(d);
      }
      return total;
    };
    // That a point of the box may come nearer. NaN is of coordinates that are infinite or NaN
    // themselves, from which none is at a finite distance.
    const auto touches = [&](int64_t group, int level, int64_t member, Key farthest) {
      const C distance = sum([&](int d) {
        const C* bounds = tree.bounds(group, level, d) + member;
        return math::box_distance_term<Norm::two>(latest[d], bounds[0], bounds[kWarpSize]);
      });
      return distance < distance_of<C>(farthest);
    };

    if (thread < 2) listed[thread] = 0;
    sync_block();
    for (int64_t block = thread; block < blocks; block += kWideBlock) {
      if (fresh || block == place / (kWarpSize * kWarpSize) ||
          touches(first_tops + block / kWarpSize, 2, block % kWarpSize, far_blocks[block])) {
        listed_blocks[atomic_add(&listed[0], 1)] = static_cast<int32_t>(block);
      }
    }
    sync_block();
    const int block_count = listed[0];
    for (int at = warp; at < block_count; at += kWarps) {
      const int64_t block = listed_blocks[at], group = block * kWarpSize + lane;
      if (group < points && (fresh || group == place / kWarpSize ||
                             touches(first_blocks + block, 1, lane, far_points[group]))) {
        listed_points[atomic_add(&listed[1], 1)] = static_cast<int32_t>(group);
      }
    }
    sync_block();
    const int point_count = listed[1];
    for (int at = warp; at < point_count; at += kWarps) {
      const int64_t within = listed_points[at], group = first_points + within;
      const C distance = sum([&](int d) {
        return math::distance_term<Norm::two>(tree.coordinate(group, d)[lane], latest[d]);
      });
      const int32_t index = tree.indices[group * kWarpSize + lane];
      C& least = groups.least[group * kWarpSize + lane];
      const C now =
          index < 0 || index == chosen ? kTaken<C> : nearer(fresh ? kInfinity<C> : least, distance);
      least = now;
      const Key farthest = warp_first(far_key(now, static_cast<uint32_t>(index)));
      if (lane == 0) far_points[within] = farthest;
    }
    sync_block();
    for (int at = warp; at < block_count; at += kWarps) {
      const int64_t block = listed_blocks[at], group = block * kWarpSize + lane;
      const Key farthest = warp_first(group < points ? far_points[group] : no_key<C>());
      if (lane == 0) far_blocks[block] = farthest;
    }
    sync_block();
    fresh = false;
    Key farthest = no_key<C>();
    for (int64_t block = thread; block < blocks; block += kWideBlock) {
      const Key key = far_blocks[block];
      if (before(key, farthest)) farthest = key;
    }
    return farthest;
  });
}

template <class C>
class FarthestLaunches {
 public:
  FarthestLaunches(const Stream& stream, const Farthest<C>& task) : stream_(stream), task_(task) {}

  // For clouds of up to `most` points that none before took.
  template <class... Parameters>
  void add(const char* name, void (*kernel)(Farthest<C>, Parameters...), int threads, int64_t most,
           std::common_type_t<Parameters>... arguments) {
    task_.above = task_.most;
    task_.most = most;
    if (task_.above < task_.clouds.rows) {
      stream_.launch(name, kernel, blocks_for(task_.clouds.count, 1), threads, task_, arguments...);
    }
  }
  bool done() const { return task_.most >= task_.clouds.rows; }

 private:
  const Stream& stream_;
  Farthest<C> task_;
};

template <class C>
void launch_by_tree(const Stream& stream, FarthestLaunches<C>& launches, const Tensor& points,
                    const Clouds& clouds) {
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  const PointTreeMemory<C> memory = build_tree<C>(stream, points, clouds, clouds.rows);
  const PointTree<C>& tree = memory.tree;
  const auto keys = [&](int level) {
    return empty(points, {tree.groups[level], static_cast<int64_t>(sizeof(DistanceKey<C>))},
                 ScalarType::Byte);
  };
  const auto list = [&](int level) { return empty(points, {tree.groups[level]}, ScalarType::Int); };
  const Tensor least = empty(points, {tree.groups[0], kWarpSize}, points.scalar_type());
  const Tensor far_points = keys(0), far_blocks = keys(1);
  const Tensor listed_points = list(0), listed_blocks = list(1);
  const FarthestGroups<C> groups{static_cast<C*>(least.mutable_data_ptr()),
                                 static_cast<DistanceKey<C>*>(far_points.mutable_data_ptr()),
                                 static_cast<DistanceKey<C>*>(far_blocks.mutable_data_ptr()),
                                 static_cast<int32_t*>(listed_points.mutable_data_ptr()),
                                 static_cast<int32_t*>(listed_blocks.mutable_data_ptr())};
  const auto kernel =
      points.size(1) <= kFewDims ? farthest_by_tree<C, kFewDims> : farthest_by_tree<C, 0>;
  launches.add("farthest_by_tree", kernel, kWideBlock, kAny, tree, groups);
}

template <class C>
void launch_farthest(const Stream& stream, const Farthest<C>& task, const Tensor& points) {
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  // A thread of a large block has room for as many floats, but not doubles.
  constexpr bool kLarge = sizeof(C) == sizeof(float);
  constexpr int64_t kMostInRegisters = (kLarge ? kLargeBlock : kSmallBlock) * kManyEach;
  const int64_t dims = task.dims;
  FarthestLaunches<C> launches(stream, task);
  if (dims <= kFewDims) {
    launches.add("farthest_in_registers", farthest_in_registers<C, kSmallBlock, kFewEach>,
                 kSmallBlock, kSmallBlock * kFewEach);
    launches.add("farthest_in_registers", farthest_in_registers<C, kSmallBlock, kManyEach>,
                 kSmallBlock, kSmallBlock * kManyEach);
    if constexpr (kLarge) {
      launches.add("farthest_in_registers", farthest_in_registers<C, kLargeBlock, kManyEach>,
                   kLargeBlock, kMostInRegisters);
    }
    if (launches.done()) return;
  }
  // How large clouds are only the device knows. A tree pays where the mean one is large.
  if (dims <= kTreeDims && task.clouds.rows > task.clouds.count * kMostInRegisters) {
    return launch_by_tree(stream, launches, points, task.clouds);
  }
  Tensor whole = points;
  const Tensor columns = torch::stable::contiguous(torch::stable::transpose(whole, 0, 1));
  const Tensor least = empty(points, {task.clouds.rows}, points.scalar_type());
  launches.add("farthest_in_memory", farthest_in_memory<C>,
               task.clouds.rows > kSmallBlock * kFewEach ? kWideBlock : kSmallBlock, kAny,
               static_cast<const C*>(columns.const_data_ptr()),
               static_cast<C*>(least.mutable_data_ptr()));
}

Tensor farthest_points(const Tensor& points, const Tensor& ranges, const Tensor& starts,
                       const Tensor& counts, int64_t k) {
  using torch::stable::contiguous;
  STD_TORCH_CHECK(points.size(0) <= std::numeric_limits<int32_t>::max(),
                  "fastzoo: farthest_points: fewer than 2^31 points expected, got ",
                  points.size(0));
  const int64_t clouds = ranges.size(0);
  const Tensor chosen = empty(points, {clouds, k}, ScalarType::Long);
  if (clouds == 0 || k == 0) return chosen;

  const Stream stream(points);
  const ScalarType compute = compute_dtype(points.scalar_type());
  const Tensor rows = contiguous(torch::stable::to(points, compute));
  const Tensor of_clouds = contiguous(ranges);
  const Tensor first = contiguous(starts), wanted = contiguous(counts);
  const auto run = [&](auto type) {
    using C = decltype(type);
    launch_farthest<C>(
        stream,
        {static_cast<const C*>(rows.const_data_ptr()), clouds_of(of_clouds, rows.size(0)),
         rows.size(1), static_cast<const int64_t*>(first.const_data_ptr()),
         static_cast<const int64_t*>(wanted.const_data_ptr()), k,
         static_cast<int64_t*>(chosen.mutable_data_ptr()), -1, -1},
        rows);
  };
  if (compute == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return chosen;
}

// ---- voxels
// --------------------------------------------------------------------------------------

constexpr int kThreads = 256;

// The table has, of each cell, rows - the lowest row of it that came by: 0 is empty, and the
// largest is the lowest row.
template <class C>
struct Voxels {
  const C* points;
  Clouds clouds;
  int64_t dims;
  const C* size;
  const C* start;
  uint32_t* table;
  uint64_t mask;     // of a place in the table
  int64_t* places;   // [rows]: that of a row's cell; -1 for a row of none
  int64_t* leading;  // [rows]: 1 where a row is the first of its cell, else 0
  int64_t* voxels;   // [rows]
  int64_t* first;    // [rows]

  FASTZOO_DEVICE C cell(int64_t row, int64_t d) const {
    return math::cell_of(points[row * dims + d], start[d], size[d]);
  }
  FASTZOO_DEVICE int64_t row_at(uint32_t entry) const { return clouds.rows - entry; }
  FASTZOO_DEVICE bool same(int64_t a, int64_t b, int64_t cloud) const {
    if (b < clouds.begin(cloud) || b >= clouds.end(cloud)) return false;
    for (int64_t d = 0; d < dims; ++d) {
      if (cell(a, d) != cell(b, d)) return false;
    }
    return true;
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads) voxel_claim(Voxels<C> grid) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= grid.clouds.rows) return;
  const int64_t cloud = grid.clouds.of_row(row);
  bool valid = cloud >= 0;
  uint64_t hash = math::add_to_hash(0, static_cast<uint64_t>(cloud));
  for (int64_t d = 0; valid && d < grid.dims; ++d) {
    const C cell = grid.cell(row, d);
    valid = !math::is_nan(cell);
    hash = math::hash_cell(hash, cell);
  }
  if (!valid) {
    grid.places[row] = -1;
    return;
  }
  const uint32_t mine = static_cast<uint32_t>(grid.clouds.rows - row);
  uint64_t place = hash & grid.mask;
  for (;; place = (place + 1) & grid.mask) {
    uint32_t* const entry = grid.table + place;
    uint32_t held = load_volatile(entry);
    if (held == 0) held = atomic_compare_exchange(entry, 0u, mine);
    if (held == 0) break;
    if (grid.same(row, grid.row_at(held), cloud)) {
      if (held < mine) atomic_max(entry, mine);
      break;
    }
  }
  grid.places[row] = static_cast<int64_t>(place);
}

template <class C>
__global__ void __launch_bounds__(kThreads) voxel_lead(Voxels<C> grid) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= grid.clouds.rows) return;
  const int64_t place = grid.places[row];
  grid.leading[row] = place >= 0 && grid.row_at(grid.table[place]) == row;
}

// `numbers` are how many cells begin up to each row.
template <class C>
__global__ void __launch_bounds__(kThreads) voxel_emit(Voxels<C> grid, const int64_t* numbers) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t rows = grid.clouds.rows;
  if (row >= rows) return;
  const int64_t place = grid.places[row];
  grid.voxels[row] = place < 0 ? -1 : numbers[grid.row_at(grid.table[place])] - 1;
  if (grid.leading[row] != 0) grid.first[numbers[row] - 1] = row;
  if (row >= numbers[rows - 1]) grid.first[row] = -1;
}

std::tuple<Tensor, Tensor> voxel_grid(const Tensor& points, const Tensor& ranges,
                                      const Tensor& size, const Tensor& start) {
  using torch::stable::contiguous;
  const int64_t rows = points.size(0);
  STD_TORCH_CHECK(rows <= std::numeric_limits<int32_t>::max(),
                  "fastzoo: voxel_grid: fewer than 2^31 points expected, got ", rows);
  const Tensor voxels = empty(points, {rows}, ScalarType::Long);
  const Tensor first = empty(points, {rows}, ScalarType::Long);
  if (rows == 0) return {voxels, first};

  const Stream stream(points);
  const ScalarType compute = compute_dtype(points.scalar_type());
  const Tensor values = contiguous(torch::stable::to(points, compute));
  const Tensor sizes = contiguous(torch::stable::to(size, compute));
  const Tensor starts = contiguous(torch::stable::to(start, compute));
  const Tensor of_clouds = contiguous(ranges);
  int64_t entries = 2;
  while (entries < 2 * rows) entries *= 2;
  const Tensor table = torch::stable::new_zeros(points, {entries}, ScalarType::Int);
  const Tensor places = empty(points, {rows}, ScalarType::Long);
  const Tensor leading = empty(points, {rows}, ScalarType::Long);
  const auto run = [&](auto type) {
    using C = decltype(type);
    const Voxels<C> grid{static_cast<const C*>(values.const_data_ptr()),
                         clouds_of(of_clouds, rows),
                         points.size(1),
                         static_cast<const C*>(sizes.const_data_ptr()),
                         static_cast<const C*>(starts.const_data_ptr()),
                         static_cast<uint32_t*>(table.mutable_data_ptr()),
                         static_cast<uint64_t>(entries - 1),
                         static_cast<int64_t*>(places.mutable_data_ptr()),
                         static_cast<int64_t*>(leading.mutable_data_ptr()),
                         static_cast<int64_t*>(voxels.mutable_data_ptr()),
                         static_cast<int64_t*>(first.mutable_data_ptr())};
    const unsigned blocks = blocks_for(rows, kThreads);
    stream.launch("voxel_claim", voxel_claim<C>, blocks, kThreads, grid);
    stream.launch("voxel_lead", voxel_lead<C>, blocks, kThreads, grid);
    const Tensor numbers = running_sum(leading);
    stream.launch("voxel_emit", voxel_emit<C>, blocks, kThreads, grid,
                  static_cast<const int64_t*>(numbers.const_data_ptr()));
  };
  if (compute == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {voxels, first};
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::farthest_points>(m, "farthest_points.cuda");
  fastzoo::implement<fastzoo::cuda::voxel_grid>(m, "voxel_grid.cuda");
}
