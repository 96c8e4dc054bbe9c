// Greedy suppression. Boxes come by falling score; each is tested against the boxes kept so far
// that could suppress it, a vector at a time, and joins them if none does.
//
// Which kept boxes could? Let the computed overlap of a and b exceed t, with areas that are
// normal numbers, and let u be the unit round-off. Rounding is monotone, so the computed
// intersection is at most either computed area, w at most either width and h at most either
// height. The union then comes out at least (1 - 3u) max(area), so the intersection is at least
// t (1 - 5u) max(area), and since h <= min(height), exactly taken
//   w >= t' max(width)  with  t' = t (1 - 16u),  and the same for the heights.  Hence:
// (1) the longer sides of a and b differ by at most the factor 1/t';
// (2) the centres differ by at most (width_a + width_b)/2 - t' max(width) in x. Given width_b this
//     is largest at width_a = width_b, or for t' < 1/2 at width_a = width_b / t':
//     reach * width_b  with  reach = (1 - t') max(1, 1 / (2 t')).
// So a kept box enters every cell within its reach of its centre, in a grid whose cells grow with
// the power of two (the level) of its longer side; and a box looks into the one cell that holds
// its centre, in each level that (1) allows. Cells are hashed into a table without keys: those
// that share an entry are tested together, which costs time and changes no answer.
#include "nms.h"

#include <cstdlib>

#include "../../math/nms.h"
#include "../runtime/vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

// Below this threshold a reach covers too many boxes for a grid to pay.
constexpr double kLowestGridThreshold = 1.0 / 16;

// Centres are rounded to double: with coordinates at most kFarthest longer sides away from 0, by
// less than 2^-20 of b's longer side together (a's is at most 16 times b's). kSlack of it covers
// that, and the rounding of the ends of the reach.
constexpr double kFarthest = 0x1p28;
constexpr double kSlack = 0x1p-16;

// How many cells a reach covers at most, along an axis.
#ifndef CA
#define CA 2
#endif
#ifndef GN
#define GN 32
#endif
constexpr int kCellsAcross = CA;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float smallest_area = 0x1p-120f;  // times kLowestGridThreshold is normal
  static constexpr float largest_area = 0x1.fffffep+127f;
};
template <>
struct Limits<double> {
  static constexpr double smallest_area = 0x1p-1000;
  static constexpr double largest_area = 0x1.fffffffffffffp+1023;
};

// Powers of two. All that is placed in the grid lies well within their range.
FASTZOO_INLINE int level_of(double value) {
  return static_cast<int>(math::bits_as<uint64_t>(value) >> 52 & 0x7ff) - 1023;
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

// With a threshold of at least 0 such a box neither suppresses nor is suppressed. A side that is
// not positive, or an area of 0, makes every intersection 0 (or NaN); an infinite or NaN area
// makes every overlap 0 or NaN.
template <class T>
FASTZOO_INLINE bool is_inert(const math::Box<T>& box) {
  return !(box.x2 > box.x1 && box.y2 > box.y1 && box.area > 0 &&
           box.area <= Limits<T>::largest_area);
}

struct Place {
  double x, y, width, height, side;
  int level;
  bool valid;
};

template <class T>
FASTZOO_INLINE Place place_of(const math::Box<T>& box) {
  Place place;
  const double x1 = box.x1, y1 = box.y1, x2 = box.x2, y2 = box.y2;
  place.x = (x1 + x2) * 0.5;
  place.y = (y1 + y2) * 0.5;
  place.width = x2 - x1;
  place.height = y2 - y1;
  place.side = math::maximum(place.width, place.height);
  place.level = level_of(place.side);
  const double farthest = math::maximum(math::maximum(-x1, x2), math::maximum(-y1, y2));
  place.valid = box.area >= Limits<T>::smallest_area && farthest <= kFarthest * place.side &&
                place.side < 0x1p+900;
  return place;
}

struct Cell {
  uint32_t boxes;
  uint32_t newest;  // block
};

// Blocks of one vector's width of kept boxes; the blocks of a cell are chained.
template <class T>
struct Block {
  static constexpr int size = Vec<T>::size;
  T x1[size], y1[size], x2[size], y2[size], area[size];
};

template <class T>
class Kept {
 public:
  Kept(int64_t n, T threshold) : threshold_(threshold) {
    use_grid_ = threshold >= kLowestGridThreshold && n > GN * Block<T>::size;
    int64_t cells = 1;
    int bits = 0;
    int64_t most_blocks = n / Block<T>::size + 1;
    if (use_grid_) {
      const double t = threshold * (1 - 0x1p-10);
      side_ratio_ = t;
      reach_ = (1 - t) * math::maximum(1.0, 0.5 / t);
      cells_per_side_ = (kCellsAcross - 1) / (4 * (reach_ + 2 * kSlack));
      while (cells * 2 < n) cells *= 2, ++bits;
      hash_shift_ = 64 - bits;
      most_blocks = kCellsAcross * kCellsAcross * n / Block<T>::size + cells + 1;
    }
    cells_ = static_cast<Cell*>(std::calloc(cells, sizeof(Cell)));
    next_ = static_cast<uint32_t*>(std::malloc(most_blocks * sizeof(uint32_t)));
    blocks_ = static_cast<Block<T>*>(std::aligned_alloc(64, round_up(most_blocks * sizeof(Block<T>))));
  }
  ~Kept() {
    std::free(cells_);
    std::free(next_);
    std::free(blocks_);
  }
  Kept(const Kept&) = delete;

  bool allocated() const { return cells_ != nullptr && next_ != nullptr && blocks_ != nullptr; }

  // Keeps the box, unless one kept before suppresses it.
  __attribute__((always_inline)) bool add(const math::Box<T>& box) {
    const math::Box<Vec<T>> wide = {Vec<T>(box.x1), Vec<T>(box.y1), Vec<T>(box.x2), Vec<T>(box.y2),
                                    Vec<T>(box.area)};
    if (use_grid_) {
      const Place place = place_of(box);
      if (place.valid) {
        if (suppressed_near(place, wide)) return false;
        insert_near(place, box);
        return true;
      }
    }
    for (uint32_t i = 0; i < block_count_; ++i) {
      if (suppresses(i, wide)) return false;
    }
    insert(unplaced_, box);
    return true;
  }

 private:
  static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

  __attribute__((always_inline)) bool suppresses(uint32_t block, const math::Box<Vec<T>>& box) const {
    const Block<T>& b = blocks_[block];
    const math::Box<Vec<T>> kept = {Vec<T>::load(b.x1), Vec<T>::load(b.y1), Vec<T>::load(b.x2),
                                    Vec<T>::load(b.y2), Vec<T>::load(b.area)};
    return greater(math::box_iou(kept, box), Vec<T>(threshold_)).any();
  }

  __attribute__((always_inline)) bool suppresses(const Cell& cell, const math::Box<Vec<T>>& box) const {
    uint32_t block = cell.newest;
    for (uint32_t boxes = 0; boxes < cell.boxes; boxes += Block<T>::size) {
      if (suppresses(block, box)) return true;
      block = next_[block];
    }
    return false;
  }

  __attribute__((always_inline)) bool suppressed_near(const Place& place, const math::Box<Vec<T>>& box) const {
    if (suppresses(unplaced_, box)) return true;
    int low = level_of(place.side * side_ratio_);
    int high = level_of(place.side / side_ratio_);
    if (low < lowest_level_) low = lowest_level_;
    if (high > highest_level_) high = highest_level_;
    for (int level = low; level <= high; ++level) {
      const double scale = cells_per_side_ * power_of_two(-level);
      if (suppresses(cell(level, floor_of(place.x * scale), floor_of(place.y * scale)), box)) {
        return true;
      }
    }
    return false;
  }

  __attribute__((always_inline)) void insert_near(const Place& place, const math::Box<T>& box) {
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
      for (int64_t x = left; x <= right; ++x) insert(cell(place.level, x, y), box);
    }
  }

  __attribute__((always_inline)) Cell& cell(int level, int64_t x, int64_t y) const {
    uint64_t key = static_cast<uint64_t>(x) * 0x9e3779b97f4a7c15u +
                   static_cast<uint64_t>(y) * 0xc2b2ae3d27d4eb4fu +
                   static_cast<uint64_t>(level) * 0x165667b19e3779f9u;
    key ^= key >> 32;
    return cells_[key * 0xd6e8feb86659fd93u >> hash_shift_];
  }

  __attribute__((always_inline)) void insert(Cell& cell, const math::Box<T>& box) {
    const int lane = static_cast<int>(cell.boxes % Block<T>::size);
    if (lane == 0) {
      const Vec<T> nan(static_cast<T>(__builtin_nan("")));
      Block<T>& fresh = blocks_[block_count_];
      nan.store(fresh.x1);
      nan.store(fresh.y1);
      nan.store(fresh.x2);
      nan.store(fresh.y2);
      nan.store(fresh.area);
      next_[block_count_] = cell.newest;
      cell.newest = block_count_++;
    }
    ++cell.boxes;
    Block<T>& block = blocks_[cell.newest];
    block.x1[lane] = box.x1;
    block.y1[lane] = box.y1;
    block.x2[lane] = box.x2;
    block.y2[lane] = box.y2;
    block.area[lane] = box.area;
  }

  const T threshold_;
  bool use_grid_;
  double side_ratio_ = 0;
  double reach_ = 0;
  double cells_per_side_ = 0;  // of 1 at level 0
  int hash_shift_ = 0;
  int lowest_level_ = 2000;
  int highest_level_ = -2000;
  Cell unplaced_ = {0, 0};  // boxes that the grid cannot hold, or all where there is none
  Cell* cells_;
  uint32_t* next_;
  Block<T>* blocks_;
  uint32_t block_count_ = 0;
};

template <class T>
FASTZOO_INLINE void nms(NmsArgs<T>& args) {
  // No overlap exceeds 1: the union comes out at least as large as the intersection.
  if (!(args.threshold < 1)) {
    args.kept = args.n;
    return;
  }
  Kept<T> kept(args.n, args.threshold);
  if (!kept.allocated()) {
    args.kept = -1;
    return;
  }
  const bool inert_matters = args.threshold < 0;
  args.kept = 0;
  for (int64_t i = 0; i < args.n; ++i) {
    const int32_t index = args.order[i];
    const math::Box<T> box = load_box(args.boxes + static_cast<int64_t>(index) * 4);
    if ((is_inert(box) && !inert_matters) || kept.add(box)) args.order[args.kept++] = index;
  }
}

}  // namespace

void nms_float(NmsArgs<float>& args) { nms(args); }
void nms_double(NmsArgs<double>& args) { nms(args); }

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
