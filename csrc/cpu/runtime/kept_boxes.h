// The boxes that greedy suppression has kept so far.
//
// A box is tested against those kept that could suppress it, a vector at a time, and joins them if
// none does.
//
// Which could? Say the computed overlap of a and b exceeds t > 0, their areas are normal numbers,
// and u is the unit round-off. Rounding is monotone, so the computed w is at most either computed
// width, h at most either height, and their product at most either area. The union then comes out
// as at least (1 - 3u) (area_a + area_b - intersection). Solved for the intersection, and divided
// by h, which is at most either height, this gives in exact terms
//   w >= t' / (1 + t') (width_a + width_b)  where  t' = t (1 - 16u);  and so for the heights.
// (1) As w <= min(width), the widths differ at most by the factor 1 / t'. So do the heights, and
//     the longer sides.
// (2) The centres' x differ by at most (width_a + width_b) / 2 - w, which is at most
//     reach * width_b  where  reach = (1 - t') / (2 t'),  by putting in (1); and so for y.
// So there is a grid for each power of two (the level) of the longer side, of cells in proportion
// to it. A kept box is entered in the cells of its level within its reach of its centre; a box
// looks into the one cell that holds its centre, in each level that (1) allows. Cells are hashed
// into a table without keys: boxes of cells that share an entry are tested in vain, no more.
#pragma once

#include <cstdlib>

#include "../../math/nms.h"
#include "vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

// Below this threshold a reach holds too many boxes for the grid to pay.
constexpr double kLowestGridThreshold = 1.0 / 16;

// Centres are rounded to double. Where no coordinate is farther from 0 than kFarthest longer sides,
// the two together are off by less than 2^-20 of b's longer side, as a's is at most 16 times that.
// A reach is widened by kSlack of the longer side, which covers this and its own rounding.
constexpr double kFarthest = 0x1p28;
constexpr double kSlack = 0x1p-16;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float smallest_area = 0x1p-120f;  // so that intersections are normal numbers
  static constexpr float largest_area = 0x1.fffffep+127f;
};
template <>
struct Limits<double> {
  static constexpr double smallest_area = 0x1p-1000;
  static constexpr double largest_area = 0x1.fffffffffffffp+1023;
};

// For positive normal numbers.
FASTZOO_INLINE int level_of(double value) {
  return static_cast<int>(math::bits_as<uint64_t>(value) >> 52) - 1023;
}
FASTZOO_INLINE double power_of_two(int exponent) {
  return math::bits_as<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

FASTZOO_INLINE int64_t floor_of(double value) {
  const int64_t truncated = static_cast<int64_t>(value);
  return truncated - (value < static_cast<double>(truncated));
}

template <class T>
FASTZOO_INLINE math::Box<T> load_box(const T* p) {
  return {p[0], p[1], p[2], p[3], math::box_area(p[0], p[1], p[2], p[3])};
}

// At a threshold of at least 0, such a box neither suppresses nor is suppressed. A side that is
// not positive, or an area of 0, makes every intersection 0 (or NaN); an area that is infinite or
// NaN makes every overlap 0 or NaN.
template <class T>
FASTZOO_INLINE bool is_inert(const math::Box<T>& box) {
  return !(box.x2 > box.x1 && box.y2 > box.y1 && box.area > 0 &&
           box.area <= Limits<T>::largest_area);
}

// Where a box lies in the grid. The grid holds only boxes for which the reasoning above is valid.
struct Place {
  double x, y, width, height, side;
  int level;
  bool in_grid;
};

template <class T>
FASTZOO_INLINE Place place_of(const math::Box<T>& box) {
  const double x1 = box.x1, y1 = box.y1, x2 = box.x2, y2 = box.y2;
  const double farthest = math::maximum(math::maximum(-x1, x2), math::maximum(-y1, y2));
  Place place;
  place.x = (x1 + x2) * 0.5;
  place.y = (y1 + y2) * 0.5;
  place.width = x2 - x1;
  place.height = y2 - y1;
  place.side = math::maximum(place.width, place.height);
  place.level = level_of(place.side);
  place.in_grid = box.area >= Limits<T>::smallest_area && place.side < 0x1p+900 &&
                  farthest <= kFarthest * place.side;
  return place;
}

// As many boxes as a vector has lanes; lanes not yet taken hold NaN, which suppresses nothing.
template <class T>
struct Block {
  static constexpr int size = Vec<T>::size;
  T x1[size], y1[size], x2[size], y2[size], area[size];
};

// A chain of blocks, of which only the newest may have lanes to spare.
struct Cell {
  uint32_t boxes;
  uint32_t newest;
};

template <class T>
class KeptBoxes {
 public:
  KeptBoxes(int64_t n, T threshold) : threshold_(threshold) {
    // A handful of blocks is scanned in less time than it takes to find a cell.
    has_grid_ = threshold >= kLowestGridThreshold && n > 32 * Block<T>::size;
    int64_t cells = 0;
    int64_t most_entries = n;
    if (has_grid_) {
      largest_ratio_ = 1 / (threshold * (1 - 0x1p-20));
      reach_ = 0.5 * (largest_ratio_ - 1);
      // Along an axis a reach is shorter than a cell, so it touches at most two.
      cells_per_side_ = 1 / (4 * (reach_ + 2 * kSlack));
      most_entries = 4 * n;
      int bits = 1;
      while (int64_t{Block<T>::size} << bits < 2 * n) ++bits;
      hash_shift_ = 64 - bits;
      cells = int64_t{1} << bits;
      cells_ = static_cast<Cell*>(std::calloc(cells, sizeof(Cell)));
    }
    // An upper bound; pages that are never touched cost nothing.
    const int64_t most_blocks = most_entries / Block<T>::size + cells + 1;
    next_ = static_cast<uint32_t*>(std::malloc(most_blocks * sizeof(uint32_t)));
    const int64_t bytes = most_blocks * static_cast<int64_t>(sizeof(Block<T>));
    blocks_ = static_cast<Block<T>*>(std::aligned_alloc(kAlignment, round_up(bytes)));
  }
  ~KeptBoxes() {
    std::free(cells_);
    std::free(next_);
    std::free(blocks_);
  }
  KeptBoxes(const KeptBoxes&) = delete;
  KeptBoxes& operator=(const KeptBoxes&) = delete;

  bool out_of_memory() const {
    return (has_grid_ && cells_ == nullptr) || next_ == nullptr || blocks_ == nullptr;
  }

  // Keeps the box and says true, unless a box kept before suppresses it.
  __attribute__((always_inline)) bool add(const math::Box<T>& box) {
    const Wide wide = {Vec<T>(box.x1), Vec<T>(box.y1), Vec<T>(box.x2), Vec<T>(box.y2),
                       Vec<T>(box.area)};
    if (has_grid_) {
      const Place place = place_of(box);
      if (place.in_grid) {
        if (chain_suppresses(outside_grid_, wide) || grid_suppresses(place, wide)) return false;
        enter_in_grid(box, place);
        return true;
      }
    }
    for (uint32_t block = 0; block < block_count_; ++block) {
      if (block_suppresses(block, wide)) return false;
    }
    enter(box, outside_grid_);
    return true;
  }

 private:
  using Wide = math::Box<Vec<T>>;

  static constexpr int64_t kAlignment = 64;
  static int64_t round_up(int64_t bytes) { return (bytes + kAlignment - 1) & -kAlignment; }

  __attribute__((always_inline)) bool block_suppresses(uint32_t index, const Wide& box) const {
    const Block<T>& block = blocks_[index];
    const Wide kept = {Vec<T>::load(block.x1), Vec<T>::load(block.y1), Vec<T>::load(block.x2),
                       Vec<T>::load(block.y2), Vec<T>::load(block.area)};
    return greater(math::box_iou(kept, box), Vec<T>(threshold_)).any();
  }

  __attribute__((always_inline)) bool chain_suppresses(const Cell& cell, const Wide& box) const {
    uint32_t block = cell.newest;
    for (uint32_t boxes = 0; boxes < cell.boxes; boxes += Block<T>::size) {
      if (block_suppresses(block, box)) return true;
      block = next_[block];
    }
    return false;
  }

  __attribute__((always_inline)) bool level_suppresses(int level, const Place& place,
                                                       const Wide& box) const {
    const double scale = cells_per_side_ * power_of_two(-level);
    return chain_suppresses(cell(level, floor_of(place.x * scale), floor_of(place.y * scale)), box);
  }

  __attribute__((always_inline)) bool grid_suppresses(const Place& place, const Wide& box) const {
    // Most boxes that are suppressed are so by one of their own level.
    if (level_suppresses(place.level, place, box)) return true;
    int level = level_of(place.side / largest_ratio_);
    int last = level_of(place.side * largest_ratio_);
    if (level < lowest_level_) level = lowest_level_;
    if (last > highest_level_) last = highest_level_;
    for (; level <= last; ++level) {
      if (level != place.level && level_suppresses(level, place, box)) return true;
    }
    return false;
  }

  __attribute__((always_inline)) void enter_in_grid(const math::Box<T>& box, const Place& place) {
    if (place.level < lowest_level_) lowest_level_ = place.level;
    if (place.level > highest_level_) highest_level_ = place.level;
    const double scale = cells_per_side_ * power_of_two(-place.level);
    const double reach_x = reach_ * place.width + kSlack * place.side;
    const double reach_y = reach_ * place.height + kSlack * place.side;
    const int64_t left = floor_of((place.x - reach_x) * scale);
    const int64_t right = floor_of((place.x + reach_x) * scale);
    const int64_t top = floor_of((place.y - reach_y) * scale);
    const int64_t bottom = floor_of((place.y + reach_y) * scale);
    for (int64_t y = top; y <= bottom; ++y) {
      for (int64_t x = left; x <= right; ++x) enter(box, cell(place.level, x, y));
    }
  }

  __attribute__((always_inline)) Cell& cell(int level, int64_t x, int64_t y) const {
    uint64_t key = static_cast<uint64_t>(x) * 0x9e3779b97f4a7c15u +
                   static_cast<uint64_t>(y) * 0xc2b2ae3d27d4eb4fu +
                   static_cast<uint64_t>(level) * 0x165667b19e3779f9u;
    key ^= key >> 32;
    return cells_[key * 0xd6e8feb86659fd93u >> hash_shift_];
  }

  __attribute__((always_inline)) void enter(const math::Box<T>& box, Cell& cell) {
    const int lane = static_cast<int>(cell.boxes % Block<T>::size);
    if (lane == 0) {
      next_[block_count_] = cell.newest;
      cell.newest = block_count_++;
    }
    ++cell.boxes;
    Block<T>& block = blocks_[cell.newest];
    if (lane == 0) {
      const Vec<T> nan(static_cast<T>(__builtin_nan("")));
      nan.store(block.x1);
      nan.store(block.y1);
      nan.store(block.x2);
      nan.store(block.y2);
      nan.store(block.area);
    }
    block.x1[lane] = box.x1;
    block.y1[lane] = box.y1;
    block.x2[lane] = box.x2;
    block.y2[lane] = box.y2;
    block.area[lane] = box.area;
  }

  const T threshold_;
  bool has_grid_;
  double largest_ratio_ = 0;  // of longer sides: 1 / t'
  double reach_ = 0;
  double cells_per_side_ = 0;  // of length 1, at level 0
  int hash_shift_ = 0;
  int lowest_level_ = 2000;  // entered so far
  int highest_level_ = -2000;
  Cell* cells_ = nullptr;
  Cell outside_grid_ = {0, 0};  // what the grid cannot hold; without a grid, all
  uint32_t block_count_ = 0;
  uint32_t* next_;
  Block<T>* blocks_;
};

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
