// Farthest points and the cells of a grid. Both decide integers: distances and cells are those of
// csrc/math, rounded operation by operation.
#include "sampling.h"

#include "../../math/sampling.h"
#include "../runtime/vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::Norm;

constexpr int kLanes = kBlockPoints;
static_assert(kFanOut == kLanes, "points of a block and boxes of a group are met alike");

// The greatest lane, in every lane.
template <class T>
FASTZOO_INLINE Vec<T> spread_maximum(Vec<T> a) {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
#pragma GCC unroll 4
  for (int step = Vec<T>::size / 2; step > 0; step /= 2) {
    Indices other;
    for (int i = 0; i < Vec<T>::size; ++i) other[i] = i ^ step;
    a = maximum(a, Vec<T>(__builtin_shuffle(a.v, other)));
  }
  return a;
}

// kDims: the number of dimensions where it is 2 or 3, else 0.
template <class T, int kDims>
struct Farthest {
  using V = Vec<T>;

  // The point that was chosen last: few coordinates stand in registers.
  struct Latest {
    const T* point;
    V coordinates[kDims > 0 ? kDims : 1];

    __attribute__((always_inline)) explicit Latest(const T* point) : point(point) {
      for (int d = 0; d < kDims; ++d) coordinates[d] = V(point[d * kLanes]);
    }
    __attribute__((always_inline)) V operator[](int64_t d) const {
      return kDims > 0 ? coordinates[d] : V(point[d * kLanes]);
    }
  };

  const FarthestArgs<T>& args;
  const PointBlocksView<T>& blocks = args.blocks;
  int32_t latest = args.start;  // its place

  explicit Farthest(const FarthestArgs<T>& args) : args(args) {}

  int64_t dims() const { return kDims > 0 ? kDims : blocks.dims; }

  void run() {
    for (int64_t i = 0;; ++i) {
      args.out[i] = blocks.rows[latest];
      if (i + 1 == args.count) return;
      args.least[latest] = T(-1);
      const Latest point(blocks.block(latest / kLanes) + latest % kLanes);
      if (blocks.levels == 0) {
        latest = lower_all(point);
      } else {
        const int top = blocks.levels - 1;
        lower_group(point, top, 0);
        latest = best_box(top, 0);
      }
    }
  }

  // Lowers what is `least` in a block, and returns the greatest that remains.
  __attribute__((always_inline)) V lower_block(const Latest& point, int64_t block) {
    const T* const points = blocks.block(block);
    T* const least = args.least + block * kLanes;
    V greatest(T(-1));
#pragma GCC unroll 8
    for (int lane = 0; lane < kLanes; lane += V::size) {
      V distance;
      for (int64_t d = 0; d < dims(); ++d) {
        const V term =
            math::distance_term<Norm::two>(V::load(points + d * kLanes + lane), point[d]);
        distance = d == 0 ? term : distance + term;
      }
      const V lowered = minimum(V::load(least + lane), distance);
      lowered.store(least + lane);
      greatest = maximum(greatest, lowered);
    }
    return greatest;
  }

  // The lanes of 16 values that are not less.
  __attribute__((always_inline)) static uint32_t lanes_of(const T* values, V greatest) {
    uint32_t bits = 0;
#pragma GCC unroll 8
    for (int lane = 0; lane < kLanes; lane += V::size) {
      bits |= not_less(V::load(values + lane), greatest).bits << lane;
    }
    return bits;
  }

  // Without boxes: the next place, the points standing in the order of their rows.
  int32_t lower_all(const Latest& point) {
    V greatest(T(-1));
    for (int64_t b = 0; b < blocks.blocks; ++b) greatest = maximum(greatest, lower_block(point, b));
    greatest = spread_maximum(greatest);
    for (int64_t b = 0;; ++b) {
      const uint32_t bits = lanes_of(args.least + b * kLanes, greatest);
      if (bits != 0) return static_cast<int32_t>(b * kLanes + __builtin_ctz(bits));
    }
  }

  // Lowers the boxes of a group that the latest point may lower. Where its distance to a box is not
  // below the greatest of `least` in there, no point's can be.
  void lower_group(const Latest& point, int level, int64_t group) {
    const T* const lowers = blocks.group(level, group);
    const T* const uppers = lowers + dims() * kLanes;
    uint32_t near = 0;
#pragma GCC unroll 8
    for (int lane = 0; lane < kLanes; lane += V::size) {
      V distance;
      for (int64_t d = 0; d < dims(); ++d) {
        const V term = math::box_distance_term<Norm::two>(
            point[d], V::load(lowers + d * kLanes + lane), V::load(uppers + d * kLanes + lane));
        distance = d == 0 ? term : distance + term;
      }
      near |= less(distance, V::load(args.greatest[level] + group * kLanes + lane)).bits << lane;
    }
    // The box that the latest point is in has lost it.
    const int64_t own = latest / kLanes >> 4 * level;
    if (own / kLanes == group) near |= 1u << own % kLanes;
    for (; near != 0; near &= near - 1) {
      const int64_t box = group * kLanes + __builtin_ctz(near);
      if (level == 0) {
        const V greatest = spread_maximum(lower_block(point, box));
        const int64_t first = box * kLanes;
        uint32_t bits = lanes_of(args.least + first, greatest);
        int32_t best = static_cast<int32_t>(first + __builtin_ctz(bits));
        while ((bits &= bits - 1) != 0) {
          best = lower_row(best, static_cast<int32_t>(first + __builtin_ctz(bits)));
        }
        args.greatest[0][box] = greatest[0];
        args.farthest[0][box] = best;
      } else {
        lower_group(point, level - 1, box);
        args.farthest[level][box] = best_box(level - 1, box);
        args.greatest[level][box] = args.least[args.farthest[level][box]];
      }
    }
  }

  // The place in a group of boxes whose `least` is the greatest, the lowest row among equals.
  int32_t best_box(int level, int64_t group) const {
    const T* const values = args.greatest[level] + group * kLanes;
    const int32_t* const places = args.farthest[level] + group * kLanes;
    V greatest(T(-1));
    for (int lane = 0; lane < kLanes; lane += V::size) {
      greatest = maximum(greatest, V::load(values + lane));
    }
    uint32_t bits = lanes_of(values, spread_maximum(greatest));
    int32_t best = places[__builtin_ctz(bits)];
    while ((bits &= bits - 1) != 0) best = lower_row(best, places[__builtin_ctz(bits)]);
    return best;
  }

  int32_t lower_row(int32_t a, int32_t b) const { return blocks.rows[b] < blocks.rows[a] ? b : a; }
};

template <class T>
void farthest_points(const FarthestArgs<T>& args) {
  if (args.blocks.dims == 2) return Farthest<T, 2>(args).run();
  if (args.blocks.dims == 3) return Farthest<T, 3>(args).run();
  Farthest<T, 0>(args).run();
}

template <class T, int kDims>
void find_cells(const CellsArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t dims = kDims > 0 ? kDims : args.dims;
  for (int64_t row = begin; row < end; ++row) {
    const T* const point = args.points + row * dims;
    T* const cells = args.cells + (row - begin) * dims;
    uint64_t hash = 0;
    bool found = true;
    for (int64_t d = 0; d < dims; ++d) {
      cells[d] = math::cell_of(point[d], args.start[d], args.size[d]);
      found &= !math::is_nan(cells[d]);
      hash = math::hash_cell(hash, cells[d]);
    }
    // A hash that happens to be kNoCell gives way.
    args.hashes[row - begin] = !found ? kNoCell : hash == kNoCell ? kNoCell + 1 : hash;
  }
}

template <class T>
void find_cells(const CellsArgs<T>& args, int64_t begin, int64_t end) {
  if (args.dims == 2) return find_cells<T, 2>(args, begin, end);
  if (args.dims == 3) return find_cells<T, 3>(args, begin, end);
  find_cells<T, 0>(args, begin, end);
}

}  // namespace

void farthest_points_float(const FarthestArgs<float>& args) { farthest_points(args); }
void farthest_points_double(const FarthestArgs<double>& args) { farthest_points(args); }
void find_cells_float(const CellsArgs<float>& args, int64_t begin, int64_t end) {
  find_cells(args, begin, end);
}
void find_cells_double(const CellsArgs<double>& args, int64_t begin, int64_t end) {
  find_cells(args, begin, end);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
