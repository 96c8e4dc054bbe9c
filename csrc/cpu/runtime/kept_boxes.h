// The boxes that greedy suppression has kept so far.
//
// A box is tested against those kept that could suppress it, a vector at a time, and joins them if
// none does. Of a few kept boxes all could; for more there is a grid for each power of two (the
// level) of the longer side, of cells in proportion to it. The overlap says of each box that the
// grid can hold how far off and how many times larger or smaller a box may be that it suppresses.
// A kept box is entered in the cells of its level within its reach of its centre; a box looks into
// the one cell that holds its centre, in each level that the ratio allows. Cells are hashed into a
// table without keys: boxes of cells that share an entry are tested in vain, no more.
#pragma once

#include <cstdlib>

#include "../../math/nms.h"
#include "vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

// Below this threshold a reach holds too many boxes for the grid to pay.
constexpr double kLowestGridThreshold = 1.0 / 16;

// Where no coordinate is farther from 0 than kFarthest longer sides, two centres, rounded to double
// each, are together off by less than 2^-20 of either longer side, as the other is at most 16 times
// that. A reach is widened by kSlack of the longer side, which covers this and its own rounding.
constexpr double kFarthest = 0x1p28;
constexpr double kSlack = 0x1p-16;

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

// Where a box lies in the grid, and the sides of the box along the axes around it. The grid holds
// only boxes for which the overlap's reasoning is valid.
struct Place {
  double x, y, width, height, side;
  int level;
  bool in_grid;
};

// Of boxes that suppress one another at a threshold: along each axis the centres differ by at most
// `reach` times the extent of either, and the longer sides by at most the factor `ratio`.
struct Bounds {
  double reach, ratio;
};

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

// The overlap of boxes along the axes.
//
// Say the computed overlap of a and b exceeds t > 0, their areas are normal numbers, and u is the
// unit round-off. Rounding is monotone, so the computed w is at most either computed width, h at
// most either height, and their product at most either area. The union then comes out as at least
// (1 - 3u) (area_a + area_b - intersection). Solved for the intersection, and divided by h, which
// is at most either height, this gives in exact terms
//   w >= t' / (1 + t') (width_a + width_b)  where  t' = t (1 - 16u);  and so for the heights.
// (1) As w <= min(width), the widths differ at most by the factor 1 / t'. So do the heights, and
//     the longer sides.
// (2) The centres' x differ by at most (width_a + width_b) / 2 - w, which is at most
//     reach * width_b  where  reach = (1 - t') / (2 t'),  by putting in (1); and so for y.
template <class T>
class Overlap {
 public:
  using Box = math::Box<T>;
  using Probe = math::Box<Vec<T>>;
  static constexpr int kLanes = Vec<T>::size;
  // Whether suppressing() is exact, or tells only which kept boxes to ask suppresses() about.
  static constexpr bool kExact = true;

  // Lanes not yet taken hold NaN, which suppresses nothing.
  struct Block {
    T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
  };

  explicit Overlap(T threshold) : threshold_(threshold) {}

  bool suits_grid() const { return threshold_ >= kLowestGridThreshold; }

  Bounds bounds() const {
    const double ratio = 1 / (threshold_ * (1 - 0x1p-20));
    return {0.5 * (ratio - 1), ratio};
  }

  static __attribute__((always_inline)) Place place_of(const Box& box) {
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

  static __attribute__((always_inline)) Probe probe(const Box& box) {
    return {Vec<T>(box.x1), Vec<T>(box.y1), Vec<T>(box.x2), Vec<T>(box.y2), Vec<T>(box.area)};
  }

  __attribute__((always_inline)) uint32_t suppressing(const Block& block,
                                                      const Probe& probe) const {
    const Probe kept = {Vec<T>::load(block.x1), Vec<T>::load(block.y1), Vec<T>::load(block.x2),
                        Vec<T>::load(block.y2), Vec<T>::load(block.area)};
    return greater(math::box_iou(kept, probe), Vec<T>(threshold_)).bits;
  }

  static __attribute__((always_inline)) void clear(Block& block) {
    const Vec<T> nan(static_cast<T>(__builtin_nan("")));
    nan.store(block.x1);
    nan.store(block.y1);
    nan.store(block.x2);
    nan.store(block.y2);
    nan.store(block.area);
  }

  static __attribute__((always_inline)) void put(Block& block, int lane, const Box& box) {
    block.x1[lane] = box.x1;
    block.y1[lane] = box.y1;
    block.x2[lane] = box.x2;
    block.y2[lane] = box.y2;
    block.area[lane] = box.area;
  }

  static Box get(const Block& block, int lane) {
    return {block.x1[lane], block.y1[lane], block.x2[lane], block.y2[lane], block.area[lane]};
  }

 private:
  T threshold_;
};

// T is float or double for boxes along the axes, and RotatedBox (rotated_overlap.h) for others.
// kFirst: of the kept boxes that suppress one, the first is wanted.
template <class T, bool kFirst = false>
class KeptBoxes {
 public:
  using Box = typename Overlap<T>::Box;

  static constexpr int32_t kNone = 0x7fffffff;

  // At most `capacity` boxes will be kept.
  KeptBoxes(int64_t capacity, const Overlap<T>& overlap) : overlap_(overlap), capacity_(capacity) {
    // Few boxes are scanned in less time than it takes to find a cell.
    constexpr int64_t kFew = 8 * kLanes;
    before_grid_ = overlap_.suits_grid() && capacity > kFew ? kFew : capacity;
    allocate(before_grid_ / kLanes + 1);
  }
  KeptBoxes(int64_t capacity, T threshold) : KeptBoxes(capacity, Overlap<T>(threshold)) {}
  ~KeptBoxes() {
    std::free(cells_);
    store_.release();
  }
  KeptBoxes(const KeptBoxes&) = delete;
  KeptBoxes& operator=(const KeptBoxes&) = delete;

  // Where it ran out, the boxes kept since are missing.
  bool out_of_memory() const { return out_of_memory_; }

  // Keeps the box and says true, unless a box kept before suppresses it.
  __attribute__((always_inline)) bool add(const Box& box) {
    return add_or_find(box, count_) == kNone;
  }

  // Keeps the box by this number, which is higher than those before and less than the capacity, and
  // returns kNone; unless a box kept before suppresses it: then, with kFirst, the number of the
  // first that does.
  __attribute__((always_inline)) int32_t add_or_find(const Box& box, int32_t number) {
    const auto probe = Overlap<T>::probe(box);
    if (has_grid_) {
      const Place place = Overlap<T>::place_of(box);
      if (place.in_grid) {
        const int32_t outside = search_chain(outside_grid_, box, probe);
        if (!kFirst && outside != kNone) return outside;
        const int32_t inside = search_grid(place, box, probe);
        const int32_t first = inside < outside ? inside : outside;
        if (first == kNone) enter_in_grid(box, place, number);
        return first;
      }
    }
    const int32_t first = search_all(box, probe);
    if (first != kNone) return first;
    if (count_ == before_grid_) build_grid();
    if (!out_of_memory_) keep(box, number);
    return kNone;
  }

 private:
  using Block = typename Overlap<T>::Block;
  using Probe = typename Overlap<T>::Probe;

  // A chain of blocks, of which only the newest may have lanes to spare.
  struct Cell {
    uint32_t boxes;
    uint32_t newest;
  };

  static constexpr int kLanes = Overlap<T>::kLanes;
  static constexpr bool kNumbered = kFirst || !Overlap<T>::kExact;

  struct Store {
    Block* blocks = nullptr;
    uint32_t* next = nullptr;
    int32_t* numbers = nullptr;  // of the boxes in the lanes of each block
    Box* boxes = nullptr;        // by number

    void release() {
      std::free(blocks);
      std::free(next);
      std::free(numbers);
      std::free(boxes);
    }
  };

  // Upper bounds; pages that are never touched cost nothing.
  void allocate(int64_t blocks) {
    constexpr int64_t kAlignment = 64;
    const int64_t bytes = blocks * static_cast<int64_t>(sizeof(Block));
    store_ = Store();
    store_.blocks =
        static_cast<Block*>(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) & -kAlignment));
    store_.next = static_cast<uint32_t*>(std::malloc(blocks * sizeof(uint32_t)));
    out_of_memory_ = store_.blocks == nullptr || store_.next == nullptr;
    if (kNumbered) {
      store_.numbers = static_cast<int32_t*>(std::malloc(blocks * kLanes * sizeof(int32_t)));
      out_of_memory_ |= store_.numbers == nullptr;
    }
    if (!Overlap<T>::kExact) {
      store_.boxes = static_cast<Box*>(std::malloc((capacity_ + 1) * sizeof(Box)));
      out_of_memory_ |= store_.boxes == nullptr;
    }
  }

  __attribute__((noinline)) void build_grid() {
    const Bounds bounds = overlap_.bounds();
    ratio_ = bounds.ratio;
    reach_ = bounds.reach;
    // Along an axis a reach is shorter than a cell, so it touches at most two.
    cells_per_side_ = 1 / (4 * (reach_ + 2 * kSlack));
    int bits = 1;
    while (int64_t{kLanes} << bits < 2 * capacity_) ++bits;
    hash_shift_ = 64 - bits;
    const int64_t cells = int64_t{1} << bits;
    cells_ = static_cast<Cell*>(std::calloc(cells, sizeof(Cell)));
    Store few = store_;
    allocate(4 * capacity_ / kLanes + cells + 1);
    out_of_memory_ |= cells_ == nullptr;
    has_grid_ = !out_of_memory_;
    if (has_grid_) {
      // Up to here all boxes are in one chain, one after another.
      const int32_t count = count_;
      count_ = 0;
      block_count_ = 0;
      outside_grid_ = {0, 0};
      for (int32_t i = 0; i < count; ++i) {
        const int32_t number = kNumbered ? few.numbers[i] : i;
        if constexpr (Overlap<T>::kExact) {
          keep(Overlap<T>::get(few.blocks[i / kLanes], i % kLanes), number);
        } else {
          keep(few.boxes[number], number);
        }
      }
    }
    few.release();
  }

  __attribute__((always_inline)) void keep(const Box& box, int32_t number) {
    if (has_grid_) {
      const Place place = Overlap<T>::place_of(box);
      if (place.in_grid) return enter_in_grid(box, place, number);
    }
    ++count_;
    if (!Overlap<T>::kExact) store_.boxes[number] = box;
    enter(box, outside_grid_, number);
  }

  // The lowest of these bits is the first lane that suppresses the box; 0 where none does.
  __attribute__((always_inline)) uint32_t search_block(uint32_t block, const Box& box,
                                                       const Probe& probe) const {
    uint32_t lanes = overlap_.suppressing(store_.blocks[block], probe);
    if constexpr (!Overlap<T>::kExact) {
      while (lanes != 0 && !overlap_.suppresses(store_.boxes[number_of(block, lanes)], box)) {
        lanes &= lanes - 1;
      }
    }
    return lanes;
  }

  __attribute__((always_inline)) int32_t number_of(uint32_t block, uint32_t lanes) const {
    return kNumbered ? store_.numbers[int64_t{block} * kLanes + __builtin_ctz(lanes)] : 0;
  }

  // Each search returns the number of the first box that suppresses, or kNone.

  __attribute__((always_inline)) int32_t search_all(const Box& box, const Probe& probe) const {
    int32_t first = kNone;
    for (uint32_t block = 0; block < block_count_; ++block) {
      const uint32_t lanes = search_block(block, box, probe);
      if (lanes == 0) continue;
      const int32_t number = number_of(block, lanes);
      if (!kFirst || !has_grid_) return number;
      first = number < first ? number : first;
    }
    return first;
  }

  __attribute__((always_inline)) int32_t search_chain(const Cell& cell, const Box& box,
                                                      const Probe& probe) const {
    int32_t first = kNone;
    uint32_t block = cell.newest;
    for (uint32_t boxes = 0; boxes < cell.boxes; boxes += kLanes) {
      const uint32_t lanes = search_block(block, box, probe);
      if (lanes != 0) {
        first = number_of(block, lanes);
        if (!kFirst) return first;
      }
      block = store_.next[block];
    }
    return first;
  }

  __attribute__((always_inline)) int32_t search_level(int level, const Place& place, const Box& box,
                                                      const Probe& probe) const {
    const double scale = cells_per_side_ * power_of_two(-level);
    return search_chain(cell(level, floor_of(place.x * scale), floor_of(place.y * scale)), box,
                        probe);
  }

  __attribute__((always_inline)) int32_t search_grid(const Place& place, const Box& box,
                                                     const Probe& probe) const {
    // Most boxes that are suppressed are so by one of their own level.
    int32_t first = search_level(place.level, place, box, probe);
    if (!kFirst && first != kNone) return first;
    int level = level_of(place.side / ratio_);
    int last = level_of(place.side * ratio_);
    if (level < lowest_level_) level = lowest_level_;
    if (last > highest_level_) last = highest_level_;
    for (; level <= last; ++level) {
      if (level == place.level) continue;
      const int32_t number = search_level(level, place, box, probe);
      if (!kFirst && number != kNone) return number;
      first = number < first ? number : first;
    }
    return first;
  }

  __attribute__((always_inline)) void enter_in_grid(const Box& box, const Place& place,
                                                    int32_t number) {
    ++count_;
    if (place.level < lowest_level_) lowest_level_ = place.level;
    if (place.level > highest_level_) highest_level_ = place.level;
    if (!Overlap<T>::kExact) store_.boxes[number] = box;
    const double scale = cells_per_side_ * power_of_two(-place.level);
    const double reach_x = reach_ * place.width + kSlack * place.side;
    const double reach_y = reach_ * place.height + kSlack * place.side;
    const int64_t left = floor_of((place.x - reach_x) * scale);
    const int64_t right = floor_of((place.x + reach_x) * scale);
    const int64_t top = floor_of((place.y - reach_y) * scale);
    const int64_t bottom = floor_of((place.y + reach_y) * scale);
    for (int64_t y = top; y <= bottom; ++y) {
      for (int64_t x = left; x <= right; ++x) enter(box, cell(place.level, x, y), number);
    }
  }

  __attribute__((always_inline)) Cell& cell(int level, int64_t x, int64_t y) const {
    uint64_t key = static_cast<uint64_t>(x) * 0x9e3779b97f4a7c15u +
                   static_cast<uint64_t>(y) * 0xc2b2ae3d27d4eb4fu +
                   static_cast<uint64_t>(level) * 0x165667b19e3779f9u;
    key ^= key >> 32;
    return cells_[key * 0xd6e8feb86659fd93u >> hash_shift_];
  }

  __attribute__((always_inline)) void enter(const Box& box, Cell& cell, int32_t number) {
    const int lane = static_cast<int>(cell.boxes % kLanes);
    if (lane == 0) {
      store_.next[block_count_] = cell.newest;
      cell.newest = block_count_++;
      Overlap<T>::clear(store_.blocks[cell.newest]);
    }
    ++cell.boxes;
    Overlap<T>::put(store_.blocks[cell.newest], lane, box);
    if (kNumbered) store_.numbers[int64_t{cell.newest} * kLanes + lane] = number;
  }

  const Overlap<T> overlap_;
  const int64_t capacity_;
  int64_t before_grid_;  // so many boxes are kept without one
  bool has_grid_ = false;
  bool out_of_memory_ = false;
  double ratio_ = 0;
  double reach_ = 0;
  double cells_per_side_ = 0;  // of length 1, at level 0
  int hash_shift_ = 0;
  int lowest_level_ = 2000;  // entered so far
  int highest_level_ = -2000;
  Cell* cells_ = nullptr;
  Cell outside_grid_ = {0, 0};  // what the grid cannot hold; without a grid, all
  int32_t count_ = 0;
  uint32_t block_count_ = 0;
  Store store_;
};

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
