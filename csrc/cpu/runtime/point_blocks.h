// The points of a cloud in Morton order, in blocks with boxes, and boxes of boxes: what lets a
// search over a large cloud meet only the points nearby.
//
// PointBlocks is built by an entry; kernels read its `view`, which holds no more than pointers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../../math/neighbours.h"

namespace fastzoo::cpu {

constexpr int kBlockPoints = 16;  // one vector of floats, or a few
constexpr int kFanOut = 16;       // boxes of a group, which are tested together

// Places are points in the order of the blocks: place 16 b + l is lane l of block b.
template <class T>
struct PointBlocksView {
  static constexpr int kMostLevels = 8;

  int64_t points;
  int64_t blocks;
  int64_t dims;
  const T* coordinates;  // [blocks][dims][16]; NaN behind the last point
  const int32_t* rows;   // [blocks * 16]: where the point of a place stood in the cloud

  // Level 0 has a box for each block, level l + 1 one for each group of 16 boxes of level l; the
  // last level is one group. None where the cloud is empty or was not sorted.
  int levels;
  int64_t box_counts[kMostLevels];
  const T* boxes[kMostLevels];  // [groups][2][dims][16]: lower corners, upper corners; or NaN

  __attribute__((always_inline)) const T* block(int64_t index) const {
    return coordinates + index * dims * kBlockPoints;
  }
  __attribute__((always_inline)) const T* group(int level, int64_t index) const {
    return boxes[level] + index * 2 * dims * kFanOut;
  }
};

namespace morton {

// An entry is a point's Morton code above its row.
constexpr int kRowBits = 32;

inline uint32_t code_of(uint64_t entry) { return static_cast<uint32_t>(entry >> kRowBits); }
inline int32_t row_of(uint64_t entry) { return static_cast<int32_t>(entry & 0xffffffffu); }

// Sorts by code, points of one code in the order they stood in. `room` is as large. `parallel`
// calls a body with each part in [0, parts), in any order.
template <class Parallel>
void sort_entries(uint64_t* entries, uint64_t* room, int64_t n, int64_t parts,
                  const Parallel& parallel) {
  constexpr int64_t kFew = 256;
  if (n < kFew) {
    std::sort(entries, entries + n);  // the rows ascend within a code already
    return;
  }
  constexpr int kDigitBits = 10;
  constexpr int kDigits = math::kMortonBits / kDigitBits;
  constexpr int64_t kValues = 1 << kDigitBits;
  std::vector<uint32_t> counts(parts * kValues);
  uint64_t* from = entries;
  uint64_t* to = room;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = kRowBits + digit * kDigitBits;
    parallel(parts, [&](int64_t part) {
      uint32_t* const own = counts.data() + part * kValues;
      std::fill(own, own + kValues, 0);
      for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
        ++own[from[i] >> shift & (kValues - 1)];
      }
    });
    uint32_t next = 0;
    for (int64_t value = 0; value < kValues; ++value) {
      for (int64_t part = 0; part < parts; ++part) {
        next += std::exchange(counts[part * kValues + value], next);
      }
    }
    parallel(parts, [&](int64_t part) {
      uint32_t* const own = counts.data() + part * kValues;
      for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
        to[own[from[i] >> shift & (kValues - 1)]++] = from[i];
      }
    });
    std::swap(from, to);
  }
  if (from != entries) std::copy(from, from + n, entries);
}

// Brings the rows of `entries`, a cloud's or some of it, into Morton order. Their box is the frame
// of the codes. Returns false, with nothing done, where a coordinate is not finite.
template <class T, class Parallel>
bool order_entries(const T* points, int64_t dims, uint64_t* entries, uint64_t* room, int64_t n,
                   int64_t parts, const Parallel& parallel) {
  const int axes = math::morton_axes(dims);
  struct Bounds {
    T lower[3], upper[3];
    bool finite;
  };
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  Bounds all{{kInfinity, kInfinity, kInfinity}, {-kInfinity, -kInfinity, -kInfinity}, true};
  std::vector<Bounds> bounds(parts, all);
  parallel(parts, [&](int64_t part) {
    Bounds own = all;
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
      const T* const point = points + row_of(entries[i]) * dims;
      for (int axis = 0; axis < axes; ++axis) {
        own.lower[axis] = std::min(own.lower[axis], point[axis]);
        own.upper[axis] = std::max(own.upper[axis], point[axis]);
      }
      for (int64_t d = 0; d < dims; ++d) own.finite &= point[d] - point[d] == 0;
    }
    bounds[part] = own;
  });
  for (const Bounds& own : bounds) {
    for (int axis = 0; axis < axes; ++axis) {
      all.lower[axis] = std::min(all.lower[axis], own.lower[axis]);
      all.upper[axis] = std::max(all.upper[axis], own.upper[axis]);
    }
    all.finite &= own.finite;
  }
  if (!all.finite) return false;

  double extent = 0;
  for (int axis = 0; axis < axes; ++axis) {
    extent = std::max(extent, 0.5 * all.upper[axis] - 0.5 * all.lower[axis]);
  }
  const double scale = math::morton_scale(extent, axes);
  parallel(parts, [&](int64_t part) {
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
      const uint32_t row = static_cast<uint32_t>(row_of(entries[i]));
      const uint64_t code = math::morton_code(points + row * dims, all.lower, scale, axes);
      entries[i] = code << kRowBits | row;
    }
  });
  sort_entries(entries, room, n, parts, parallel);

  // A far point leaves the others few cells: runs of one code that fill more than a block are
  // ordered again within their own box. A run of everything is of points that are (almost) one.
  for (int64_t begin = 0; begin < n;) {
    int64_t end = begin + 1;
    while (end < n && code_of(entries[end]) == code_of(entries[begin])) ++end;
    if (end - begin > kBlockPoints && end - begin < n) {
      const int64_t share = 1 + parts * (end - begin) / n;
      order_entries(points, dims, entries + begin, room, end - begin, std::min(parts, share),
                    parallel);
    }
    begin = end;
  }
  return true;
}

}  // namespace morton

// The rows of a cloud [n, dims] in Morton order; empty where a coordinate is not finite.
// `parallel(parts, body)` calls body with each part in [0, parts), in any order.
template <class T, class Parallel>
std::vector<int32_t> morton_order(const T* points, int64_t n, int64_t dims, int64_t parts,
                                  const Parallel& parallel) {
  const std::unique_ptr<uint64_t[]> entries(new uint64_t[2 * n]);
  for (int64_t i = 0; i < n; ++i) entries[i] = static_cast<uint64_t>(i);
  std::vector<int32_t> order;
  if (!morton::order_entries(points, dims, entries.get(), entries.get() + n, n, parts, parallel)) {
    return order;
  }
  order.resize(n);
  for (int64_t i = 0; i < n; ++i) order[i] = morton::row_of(entries[i]);
  return order;
}

template <class T>
class PointBlocks {
 public:
  // Of a cloud [n, dims], in the given order and with boxes; or in the order of the rows and
  // without boxes, where `order` is empty. n < 2^31.
  template <class Parallel>
  PointBlocks(const T* points, int64_t n, int64_t dims, const std::vector<int32_t>& order,
              int64_t parts, const Parallel& parallel)
      : view{} {
    const int64_t blocks = (n + kBlockPoints - 1) / kBlockPoints;
    coordinates_.reset(new T[blocks * dims * kBlockPoints]);
    rows_.reset(new int32_t[blocks * kBlockPoints]);
    view.points = n;
    view.blocks = blocks;
    view.dims = dims;
    view.coordinates = coordinates_.get();
    view.rows = rows_.get();
    parallel(parts, [&](int64_t part) {
      for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
        fill_block(points, order, b);
      }
    });
    if (order.empty()) return;
    int64_t count = blocks;
    do {
      const int level = view.levels++;
      const int64_t groups = (count + kFanOut - 1) / kFanOut;
      boxes_[level].reset(new T[groups * 2 * dims * kFanOut]);
      view.boxes[level] = boxes_[level].get();
      view.box_counts[level] = count;
      const int64_t shares = level == 0 ? parts : 1;
      parallel(shares, [&](int64_t part) {
        for (int64_t g = groups * part / shares; g < groups * (part + 1) / shares; ++g) {
          fill_group(level, g);
        }
      });
      count = groups;
    } while (count > 1);
  }

  PointBlocksView<T> view;

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

  void fill_block(const T* points, const std::vector<int32_t>& order, int64_t block) {
    T* const out = coordinates_.get() + block * view.dims * kBlockPoints;
    for (int lane = 0; lane < kBlockPoints; ++lane) {
      const int64_t place = block * kBlockPoints + lane;
      if (place >= view.points) {
        rows_[place] = -1;
        for (int64_t d = 0; d < view.dims; ++d) out[d * kBlockPoints + lane] = kNan;
        continue;
      }
      const int64_t row = order.empty() ? place : order[place];
      rows_[place] = static_cast<int32_t>(row);
      const T* const point = points + row * view.dims;
      for (int64_t d = 0; d < view.dims; ++d) out[d * kBlockPoints + lane] = point[d];
    }
  }

  // The least and the greatest of 16 values each; a NaN counts for nothing.
  static void bounds_of(const T* lower_values, const T* upper_values, T& lower, T& upper) {
    lower = kInfinity;
    upper = -kInfinity;
    for (int i = 0; i < kFanOut; ++i) lower = math::minimum(lower, lower_values[i]);
    for (int i = 0; i < kFanOut; ++i) upper = math::maximum(upper, upper_values[i]);
  }

  void fill_group(int level, int64_t group) {
    T* const lowers = boxes_[level].get() + group * 2 * view.dims * kFanOut;
    T* const uppers = lowers + view.dims * kFanOut;
    for (int lane = 0; lane < kFanOut; ++lane) {
      const int64_t box = group * kFanOut + lane;
      for (int64_t d = 0; d < view.dims; ++d) {
        T& lower = lowers[d * kFanOut + lane];
        T& upper = uppers[d * kFanOut + lane];
        if (box >= view.box_counts[level]) {
          lower = upper = kNan;
          continue;
        }
        const T* const values =
            (level == 0 ? view.block(box) : view.group(level - 1, box)) + d * kFanOut;
        bounds_of(values, level == 0 ? values : values + view.dims * kFanOut, lower, upper);
      }
    }
  }

  std::unique_ptr<T[]> coordinates_;
  std::unique_ptr<int32_t[]> rows_;
  std::unique_ptr<T[]> boxes_[PointBlocksView<T>::kMostLevels];
};

}  // namespace fastzoo::cpu
