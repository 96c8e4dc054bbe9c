// fastzoo::farthest_points and voxel_grid on the CPU.
#include "kernels/sampling.h"

#include <limits>
#include <memory>
#include <tuple>

#include "clouds.h"

namespace fastzoo {
namespace {

using cpu::FarthestArgs;
using cpu::kBlockPoints;
using cpu::kFanOut;
using cpu::PointBlocks;

// Whether boxes save more than the sorting takes: as long as some 250 passes over all points, where
// a step with boxes takes as long as a pass over 2500.
bool worth_boxes(int64_t points, int64_t dims, int64_t count) {
  constexpr int64_t kMostDims = 8;
  return dims <= kMostDims && count * (points - 2500) > 250 * points;
}

// Of one cloud [n, dims], `count` rows from `start` on.
template <class T>
void choose_farthest(const T* points, int64_t n, int64_t dims, int64_t start, int64_t count,
                     int64_t threads, int64_t* out) {
  STD_TORCH_CHECK(n < int64_t{1} << 31, "farthest_points: fewer than 2^31 points needed, got ", n);
  std::vector<int32_t> order;
  if (worth_boxes(n, dims, count)) {
    order = cpu::morton_order(points, n, dims, threads, run_parts);
  }
  const PointBlocks<T> blocks(points, n, dims, order, threads, run_parts);
  FarthestArgs<T> args{};
  args.blocks = blocks.view;
  args.count = count;
  args.out = out;
  args.start = static_cast<int32_t>(
      order.empty() ? start : std::find(order.begin(), order.end(), start) - order.begin());
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  std::vector<T> least(args.blocks.blocks * kBlockPoints, T(-1));
  std::fill(least.begin(), least.begin() + n, kInfinity);
  args.least = least.data();
  std::vector<T> greatest[cpu::PointBlocksView<T>::kMostLevels];
  std::vector<int32_t> farthest[cpu::PointBlocksView<T>::kMostLevels];
  for (int level = 0; level < args.blocks.levels; ++level) {
    const int64_t boxes = args.blocks.box_counts[level];
    const int64_t padded = (boxes + kFanOut - 1) / kFanOut * kFanOut;
    greatest[level].assign(padded, T(-1));
    std::fill(greatest[level].begin(), greatest[level].begin() + boxes, kInfinity);
    farthest[level].assign(padded, 0);
    args.greatest[level] = greatest[level].data();
    args.farthest[level] = farthest[level].data();
  }
  if constexpr (std::is_same_v<T, double>) {
    FASTZOO_SELECT_KERNEL(farthest_points_double)(args);
  } else {
    FASTZOO_SELECT_KERNEL(farthest_points_float)(args);
  }
}

template <class T>
void choose_farthest_of_all(const Tensor& points, const std::vector<Cloud>& clouds,
                            const int64_t* starts, const int64_t* counts, int64_t k, int64_t* out) {
  const int64_t dims = points.size(1);
  const T* const rows = static_cast<const T*>(points.const_data_ptr());
  const int64_t size = static_cast<int64_t>(clouds.size());
  const int64_t threads = threads_for(points.size(0) * dims * k);
  std::fill(out, out + size * k, -1);
  share_out(size, threads, [&](const auto& next) {
    for (int64_t b = next(); b < size; b = next()) {
      const int64_t n = clouds[b].size();
      const int64_t count = std::min({counts[b], n, k});
      if (count <= 0) continue;
      choose_farthest(rows + clouds[b].begin * dims, n, dims,
                      std::clamp<int64_t>(starts[b], 0, n - 1), count,
                      size == 1 ? threads_for_points(n) : 1, out + b * k);
    }
  });
}

Tensor farthest_points(const Tensor& points, const Tensor& ranges, const Tensor& starts,
                       const Tensor& counts, int64_t k) {
  STD_TORCH_CHECK(starts.size(0) == ranges.size(0) && counts.size(0) == ranges.size(0),
                  "farthest_points: a start and a count for each of ", ranges.size(0),
                  " clouds needed");
  const ScalarType compute = compute_dtype(points.scalar_type());
  const Tensor rows = dense_as(points, compute);
  const Tensor dense_starts = torch::stable::contiguous(starts);
  const Tensor dense_counts = torch::stable::contiguous(counts);
  const Tensor out = empty(points, {ranges.size(0), k}, ScalarType::Long);
  const auto run = compute == ScalarType::Double ? choose_farthest_of_all<double>
                                                 : choose_farthest_of_all<float>;
  run(rows, clouds_of(ranges, points.size(0)),
      static_cast<const int64_t*>(dense_starts.const_data_ptr()),
      static_cast<const int64_t*>(dense_counts.const_data_ptr()), k,
      static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

// The voxels of a cloud by their cells: an open table of numbers, where a voxel stands at its hash
// or behind it.
template <class T>
class Voxels {
 public:
  explicit Voxels(int64_t dims) : dims_(dims), slots_(kFirstSlots, Slot{0, kEmpty}) {}

  int64_t count() const { return static_cast<int64_t>(hashes_.size()); }

  void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash & (slots_.size() - 1)]); }

  // The number of a cell, the next one if it is new.
  int32_t find_or_add(uint64_t hash, const T* cell) {
    uint64_t at = hash & (slots_.size() - 1);
    for (; slots_[at].voxel != kEmpty; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at].tag == tag_of(hash) && is_cell(slots_[at].voxel, cell))
        return slots_[at].voxel;
    }
    const int32_t voxel = static_cast<int32_t>(count());
    slots_[at] = {tag_of(hash), voxel};
    hashes_.push_back(hash);
    cells_.insert(cells_.end(), cell, cell + dims_);
    if (2 * hashes_.size() > slots_.size()) grow();
    return voxel;
  }

 private:
  static constexpr int32_t kEmpty = -1;
  static constexpr int64_t kFirstSlots = 256;

  struct Slot {
    uint32_t tag;
    int32_t voxel;
  };

  // The bits that do not choose the slot, as long as there are few slots.
  static uint32_t tag_of(uint64_t hash) { return static_cast<uint32_t>(hash >> 32); }

  bool is_cell(int32_t voxel, const T* cell) const {
    return std::equal(cell, cell + dims_, cells_.data() + voxel * dims_);
  }

  void grow() {
    slots_.assign(2 * slots_.size(), Slot{0, kEmpty});
    for (size_t voxel = 0; voxel < hashes_.size(); ++voxel) {
      uint64_t at = hashes_[voxel] & (slots_.size() - 1);
      while (slots_[at].voxel != kEmpty) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = {tag_of(hashes_[voxel]), static_cast<int32_t>(voxel)};
    }
  }

  int64_t dims_;
  std::vector<Slot> slots_;  // a power of two
  std::vector<uint64_t> hashes_;
  std::vector<T> cells_;
};

// Numbers the voxels of a cloud from 0, in `voxels` [rows], and lists their first rows from
// first[cloud.begin] on. Returns how many there are.
template <class T>
int64_t number_voxels(const cpu::CellsArgs<T>& given, const Cloud& cloud, int64_t* voxels,
                      int64_t* first) {
  STD_TORCH_CHECK(cloud.size() < int64_t{1} << 31,
                  "voxel_grid: fewer than 2^31 points needed, got ", cloud.size());
  constexpr int64_t kAtOnce = 65536;  // rows whose cells are found before they are looked up
  constexpr int64_t kAhead = 16;
  constexpr int64_t kWorthAThread = 8192;
  const int64_t step = std::min(kAtOnce, cloud.size());
  const std::unique_ptr<T[]> cells(new T[step * given.dims]);
  const std::unique_ptr<uint64_t[]> hashes(new uint64_t[step]);
  Voxels<T> found(given.dims);
  for (int64_t begin = cloud.begin; begin < cloud.end; begin += step) {
    const int64_t count = std::min(step, cloud.end - begin);
    torch::stable::parallel_for(0, count, kWorthAThread, [&](int64_t from, int64_t to) {
      cpu::CellsArgs<T> args = given;
      args.cells = cells.get() + from * args.dims;
      args.hashes = hashes.get() + from;
      if constexpr (std::is_same_v<T, double>) {
        FASTZOO_SELECT_KERNEL(find_cells_double)(args, begin + from, begin + to);
      } else {
        FASTZOO_SELECT_KERNEL(find_cells_float)(args, begin + from, begin + to);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) found.prefetch(hashes[i + kAhead]);
      if (hashes[i] == cpu::kNoCell) continue;
      const int64_t before = found.count();
      const int64_t voxel = found.find_or_add(hashes[i], cells.get() + i * given.dims);
      voxels[begin + i] = voxel;
      if (voxel == before) first[cloud.begin + voxel] = begin + i;
    }
  }
  return found.count();
}

template <class T>
void number_all_voxels(const cpu::CellsArgs<T>& args, const std::vector<Cloud>& clouds,
                       int64_t rows, int64_t* voxels, int64_t* first) {
  const int64_t size = static_cast<int64_t>(clouds.size());
  std::fill(voxels, voxels + rows, -1);
  std::fill(first, first + rows, -1);
  std::vector<int64_t> counts(size);
  share_out(size, threads_for(rows * args.dims * 64), [&](const auto& next) {
    for (int64_t b = next(); b < size; b = next()) {
      counts[b] = number_voxels(args, clouds[b], voxels, first);
    }
  });
  // Those of later clouds follow those of earlier ones.
  int64_t before = 0;
  for (int64_t b = 0; b < size; ++b) {
    const Cloud& cloud = clouds[b];
    if (before < cloud.begin) {
      std::copy_n(first + cloud.begin, counts[b], first + before);
      std::fill(first + std::max(before + counts[b], cloud.begin), first + cloud.begin + counts[b],
                -1);
    }
    for (int64_t row = cloud.begin; before > 0 && row < cloud.end; ++row) {
      voxels[row] += voxels[row] < 0 ? 0 : before;
    }
    before += counts[b];
  }
}

std::tuple<Tensor, Tensor> voxel_grid(const Tensor& points, const Tensor& ranges,
                                      const Tensor& size, const Tensor& start) {
  const ScalarType compute = compute_dtype(points.scalar_type());
  const Tensor rows = dense_as(points, compute);
  const Tensor dense_size = dense_as(size, compute);
  const Tensor dense_start = dense_as(start, compute);
  const Tensor voxels = empty(points, {points.size(0)}, ScalarType::Long);
  const Tensor first = empty(points, {points.size(0)}, ScalarType::Long);
  const std::vector<Cloud> clouds = clouds_of(ranges, points.size(0));
  dispatch_float(compute, "voxel_grid", [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      cpu::CellsArgs<T> args{};
      args.points = static_cast<const T*>(rows.const_data_ptr());
      args.start = static_cast<const T*>(dense_start.const_data_ptr());
      args.size = static_cast<const T*>(dense_size.const_data_ptr());
      args.dims = points.size(1);
      number_all_voxels(args, clouds, points.size(0),
                        static_cast<int64_t*>(voxels.mutable_data_ptr()),
                        static_cast<int64_t*>(first.mutable_data_ptr()));
    }
  });
  return {voxels, first};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<farthest_points>(m, "farthest_points");
  implement<farthest_points>(m, "farthest_points.cpu");
  implement<voxel_grid>(m, "voxel_grid");
  implement<voxel_grid>(m, "voxel_grid.cpu");
}

}  // namespace fastzoo
