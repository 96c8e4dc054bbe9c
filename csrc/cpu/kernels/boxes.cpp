// Overlaps of boxes, a vector of pairs at a time. Boxes are unpacked into columns on the stack, of
// a run of pairs or of a tile of each with each, and what depends on one box alone is computed
// there, once.
#include "boxes.h"

#include <type_traits>

#include "../../math/rotated_boxes.h"
#include "../runtime/convert.h"
#include "../runtime/vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::Measure;
using math::MeasuredBox;
using math::RotatedBox;

// Up to kMost boxes of kSides numbers, which lie kSides apart in memory.
template <class T, int kSides, int kMost>
struct Columns {
  alignas(64) T at[kSides][kMost];
};

template <class T, int kSides, int kMost>
FASTZOO_INLINE void unpack(Dtype dtype, const void* boxes, int64_t first, int64_t count,
                           Columns<T, kSides, kMost>& columns) {
  with_element(dtype, [&](auto element) {
    const auto* const from = static_cast<const decltype(element)*>(boxes) + first * kSides;
    for (int64_t i = 0; i < count; ++i) {
      for (int k = 0; k < kSides; ++k) {
        columns.at[k][i] = static_cast<T>(widen(from[i * kSides + k]));
      }
    }
  });
  // The last vector may reach past the last box.
  for (int64_t i = count; i % PairTiles::kMultiple != 0; ++i) {
    for (int k = 0; k < kSides; ++k) columns.at[k][i] = 0;
  }
}

template <class T, int kMost, class Element>
FASTZOO_INLINE void pack(const Columns<T, 4, kMost>& columns, int64_t count, Element* boxes) {
  for (int64_t i = 0; i < count; ++i) {
    for (int k = 0; k < 4; ++k) narrow(columns.at[k][i], boxes[4 * i + k]);
  }
}

template <Measure kMeasure, class T, int kMost>
FASTZOO_INLINE MeasuredBox<Vec<T>> boxes_at(const Columns<T, 4, kMost>& columns, int64_t i) {
  using V = Vec<T>;
  return math::measured_box<kMeasure>(V::load(columns.at[0] + i), V::load(columns.at[1] + i),
                                      V::load(columns.at[2] + i), V::load(columns.at[3] + i));
}

// One box in every lane.
template <Measure kMeasure, class T, int kMost>
FASTZOO_INLINE MeasuredBox<Vec<T>> box_everywhere(const Columns<T, 4, kMost>& columns, int64_t i) {
  using V = Vec<T>;
  return math::measured_box<kMeasure>(V(columns.at[0][i]), V(columns.at[1][i]), V(columns.at[2][i]),
                                      V(columns.at[3][i]));
}

template <class T>
FASTZOO_INLINE Vec<T> load_some(const T* from, int64_t count) {
  if (count >= Vec<T>::size) return Vec<T>::load(from);
  T lanes[Vec<T>::size] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return Vec<T>::load(lanes);
}

template <class T>
FASTZOO_INLINE void store_some(Vec<T> value, T* to, int64_t count) {
  if (count >= Vec<T>::size) return value.store(to);
  T lanes[Vec<T>::size];
  value.store(lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// Calls body(T{}, constant of the measure).
template <class Body>
FASTZOO_INLINE void with_measure(const OverlapArgs& args, const Body& body) {
  const auto typed = [&](auto measure) {
    if (args.dtype == Dtype::float64) {
      body(double{}, measure);
    } else {
      body(float{}, measure);
    }
  };
  switch (args.measure) {
    case Measure::iou:
      return typed(std::integral_constant<Measure, Measure::iou>{});
    case Measure::giou:
      return typed(std::integral_constant<Measure, Measure::giou>{});
    case Measure::diou:
      return typed(std::integral_constant<Measure, Measure::diou>{});
    case Measure::ciou:
      return typed(std::integral_constant<Measure, Measure::ciou>{});
  }
}

constexpr int64_t kRun = 256;

// Calls body(first, count) for runs of up to kRun.
template <class Body>
FASTZOO_INLINE void for_runs(int64_t begin, int64_t end, const Body& body) {
  for (int64_t first = begin; first < end; first += kRun) {
    body(first, end - first < kRun ? end - first : kRun);
  }
}

template <class V>
FASTZOO_INLINE math::Epsilon<V> epsilon_of(const OverlapArgs& args) {
  using T = decltype(V()[0]);
  return {V(static_cast<T>(args.union_eps)), V(static_cast<T>(args.eps))};
}

template <Measure kMeasure, class T>
void each(const OverlapArgs& args, int64_t first, int64_t count) {
  using V = Vec<T>;
  const math::Epsilon<V> eps = epsilon_of<V>(args);
  Columns<T, 4, kRun> a, b;
  unpack(args.dtype, args.boxes1, first, count, a);
  unpack(args.dtype, args.boxes2, first, count, b);
  T* const overlap = static_cast<T*>(args.overlap) + first;
  for (int64_t i = 0; i < count; i += V::size) {
    const auto result =
        math::box_overlap<kMeasure>(boxes_at<kMeasure>(a, i), boxes_at<kMeasure>(b, i), eps);
    store_some(result.value, overlap + i, count - i);
  }
}

template <Measure kMeasure, class T>
void each_backward(const OverlapArgs& args, int64_t first, int64_t count) {
  using V = Vec<T>;
  const math::Epsilon<V> eps = epsilon_of<V>(args);
  Columns<T, 4, kRun> a, b;
  unpack(args.dtype, args.boxes1, first, count, a);
  unpack(args.dtype, args.boxes2, first, count, b);
  const T* const grad = static_cast<const T*>(args.grad) + first;
  for (int64_t i = 0; i < count; i += V::size) {
    const auto result = math::box_overlap_gradients<kMeasure>(
        boxes_at<kMeasure>(a, i), boxes_at<kMeasure>(b, i), eps, load_some(grad + i, count - i));
    for (int k = 0; k < 4; ++k) {
      result.first[k].store(a.at[k] + i);
      result.second[k].store(b.at[k] + i);
    }
  }
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    pack(a, count, static_cast<Element*>(args.grad1) + 4 * first);
    pack(b, count, static_cast<Element*>(args.grad2) + 4 * first);
  });
}

// What a tile covers of the pairs.
struct Tile {
  int64_t down, across;  // its place
  int64_t first_row, rows;
  int64_t first_column, columns;
};

FASTZOO_INLINE Tile tile_of(const PairTiles& tiles, int64_t index) {
  const auto part = [](int64_t place, int64_t size, int64_t total) {
    const int64_t left = total - place * size;
    return left < 0 ? 0 : left < size ? left : size;
  };
  Tile tile;
  tile.down = index % tiles.down();
  tile.across = index / tiles.down();
  tile.first_row = tile.down * tiles.rows();
  tile.rows = part(tile.down, tiles.rows(), tiles.n);
  tile.first_column = tile.across * tiles.columns();
  tile.columns = part(tile.across, tiles.columns(), tiles.m);
  return tile;
}

// The boxes of a tile: those of its columns in vectors.
template <Measure kMeasure, class T>
struct TileBoxes {
  Columns<T, 4, PairTiles::kRows> rows;
  MeasuredBox<Vec<T>> columns[PairTiles::kColumns / Vec<T>::size];
};

template <Measure kMeasure, class T>
FASTZOO_INLINE void unpack(const OverlapArgs& args, const Tile& tile,
                           TileBoxes<kMeasure, T>& boxes) {
  unpack(args.dtype, args.boxes1, tile.first_row, tile.rows, boxes.rows);
  Columns<T, 4, PairTiles::kColumns> columns;
  unpack(args.dtype, args.boxes2, tile.first_column, tile.columns, columns);
  for (int64_t j = 0; j < tile.columns; j += Vec<T>::size) {
    boxes.columns[j / Vec<T>::size] = boxes_at<kMeasure>(columns, j);
  }
}

template <Measure kMeasure, class T>
void pairs(const OverlapArgs& args, const Tile& tile) {
  using V = Vec<T>;
  const math::Epsilon<V> eps = epsilon_of<V>(args);
  TileBoxes<kMeasure, T> boxes;
  unpack(args, tile, boxes);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const MeasuredBox<V> row = box_everywhere<kMeasure>(boxes.rows, i);
    T* const overlap =
        static_cast<T*>(args.overlap) + (tile.first_row + i) * args.tiles.m + tile.first_column;
    for (int64_t j = 0; j < tile.columns; j += V::size) {
      const auto result = math::box_overlap<kMeasure>(row, boxes.columns[j / V::size], eps);
      store_some(result.value, overlap + j, tile.columns - j);
    }
  }
}

template <Measure kMeasure, class T>
void pairs_backward(const OverlapArgs& args, const Tile& tile) {
  using V = Vec<T>;
  const V zero(T(0));
  const math::Epsilon<V> eps = epsilon_of<V>(args);
  TileBoxes<kMeasure, T> boxes;
  unpack(args, tile, boxes);
  T* const row_sums =
      static_cast<T*>(args.sums1) + 4 * (tile.across * args.tiles.n + tile.first_row);
  Columns<T, 4, PairTiles::kColumns> column_sums = {};
  for (int64_t i = 0; i < tile.rows; ++i) {
    const MeasuredBox<V> row = box_everywhere<kMeasure>(boxes.rows, i);
    const T* const grad =
        static_cast<const T*>(args.grad) + (tile.first_row + i) * args.tiles.m + tile.first_column;
    V sums[4] = {zero, zero, zero, zero};
    for (int64_t j = 0; j < tile.columns; j += V::size) {
      const int64_t left = tile.columns - j;
      const auto result = math::box_overlap_gradients<kMeasure>(row, boxes.columns[j / V::size],
                                                                eps, load_some(grad + j, left));
      for (int k = 0; k < 4; ++k) {
        const V first = left >= V::size
                            ? result.first[k]
                            : select(Mask<V::size>{(1u << left) - 1}, result.first[k], zero);
        sums[k] = sums[k] + first;
        T* const column_sum = column_sums.at[k] + j;
        (V::load(column_sum) + result.second[k]).store(column_sum);
      }
    }
    for (int k = 0; k < 4; ++k) row_sums[4 * i + k] = lane_sum(sums[k]);
  }
  pack(column_sums, tile.columns,
       static_cast<T*>(args.sums2) + 4 * (tile.down * args.tiles.m + tile.first_column));
}

// Adds up, of `count` boxes from `first` on, what `parts` tiles left of each.
template <class T, class Element>
void add_up(const T* sums, int64_t parts, int64_t boxes, int64_t first, int64_t count,
            Element* out) {
  T total[4 * kRun] = {};
  for (int64_t part = 0; part < parts; ++part) {
    const T* const from = sums + 4 * (part * boxes + first);
    for (int64_t i = 0; i < 4 * count; ++i) total[i] += from[i];
  }
  for (int64_t i = 0; i < 4 * count; ++i) narrow(total[i], out[4 * first + i]);
}

// Boxes of a tile's rows or columns with their sines and radii, and in columns what tells boxes
// that lie apart.
template <int kMost>
struct RotatedBoxes {
  RotatedBox at[kMost];
  Columns<double, 4, kMost> outline;  // x, y, radius, area
};

template <int kMost>
FASTZOO_INLINE void unpack(const RotatedArgs& args, const void* boxes, int64_t first, int64_t count,
                           RotatedBoxes<kMost>& rotated) {
  Columns<double, 5, kMost> columns;
  unpack(args.dtype, boxes, first, count, columns);
  constexpr int64_t kMultiple = PairTiles::kMultiple;
  for (int64_t i = 0; i < (count + kMultiple - 1) / kMultiple * kMultiple; ++i) {
    const RotatedBox box = math::rotated_box(columns.at[0][i], columns.at[1][i], columns.at[2][i],
                                             columns.at[3][i], columns.at[4][i], args.degrees);
    rotated.at[i] = box;
    rotated.outline.at[0][i] = box.x;
    rotated.outline.at[1][i] = box.y;
    rotated.outline.at[2][i] = box.radius;
    rotated.outline.at[3][i] = box.area;
  }
}

template <class T>
void rotated_pairs(const RotatedArgs& args, const Tile& tile) {
  using V = Vec<double>;
  RotatedBoxes<PairTiles::kRows> rows;
  RotatedBoxes<PairTiles::kColumns> columns;
  unpack(args, args.boxes1, tile.first_row, tile.rows, rows);
  unpack(args, args.boxes2, tile.first_column, tile.columns, columns);
  const auto& [x, y, radius, area] = columns.outline.at;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const RotatedBox& row = rows.at[i];
    alignas(64) double line[PairTiles::kColumns];
    for (int64_t j = 0; j < tile.columns; j += V::size) {
      const V dx = V(row.x) - V::load(x + j);
      const V dy = V(row.y) - V::load(y + j);
      const V reach = V(row.radius) + V::load(radius + j);
      const uint32_t apart = greater(dx * dx + dy * dy, reach * reach).bits;
      (V(0.0) / (V(row.area) + V::load(area + j))).store(line + j);
      for (uint32_t close = ~apart & Mask<V::size>::kAll; close != 0; close &= close - 1) {
        const int64_t lane = j + __builtin_ctz(close);
        line[lane] = math::rotated_iou(row, columns.at[lane]);
      }
    }
    T* const overlap =
        static_cast<T*>(args.overlap) + (tile.first_row + i) * args.tiles.m + tile.first_column;
    for (int64_t j = 0; j < tile.columns; ++j) overlap[j] = static_cast<T>(line[j]);
  }
}

template <class T>
void rotated_run(const RotatedArgs& args, int64_t first, int64_t count) {
  RotatedBoxes<kRun> a, b;
  unpack(args, args.boxes1, first, count, a);
  unpack(args, args.boxes2, first, count, b);
  T* const overlap = static_cast<T*>(args.overlap) + first;
  for (int64_t i = 0; i < count; ++i) {
    overlap[i] = static_cast<T>(math::rotated_iou(a.at[i], b.at[i]));
  }
}

}  // namespace

void overlap_each(const OverlapArgs& args, int64_t begin, int64_t end) {
  with_measure(args, [&](auto type, auto measure) {
    for_runs(begin, end, [&](int64_t first, int64_t count) {
      each<measure(), decltype(type)>(args, first, count);
    });
  });
}

void overlap_each_backward(const OverlapArgs& args, int64_t begin, int64_t end) {
  with_measure(args, [&](auto type, auto measure) {
    for_runs(begin, end, [&](int64_t first, int64_t count) {
      each_backward<measure(), decltype(type)>(args, first, count);
    });
  });
}

void overlap_tiles(const OverlapArgs& args, int64_t begin, int64_t end) {
  with_measure(args, [&](auto type, auto measure) {
    for (int64_t index = begin; index < end; ++index) {
      pairs<measure(), decltype(type)>(args, tile_of(args.tiles, index));
    }
  });
}

void overlap_tiles_backward(const OverlapArgs& args, int64_t begin, int64_t end) {
  with_measure(args, [&](auto type, auto measure) {
    for (int64_t index = begin; index < end; ++index) {
      pairs_backward<measure(), decltype(type)>(args, tile_of(args.tiles, index));
    }
  });
}

void overlap_sums(const OverlapArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    const PairTiles& tiles = args.tiles;
    for_runs(begin < tiles.n ? begin : tiles.n, end < tiles.n ? end : tiles.n,
             [&](int64_t first, int64_t count) {
               add_up(static_cast<const T*>(args.sums1), tiles.across(), tiles.n, first, count,
                      static_cast<Element*>(args.grad1));
             });
    for_runs(begin < tiles.n ? 0 : begin - tiles.n, end - tiles.n,
             [&](int64_t first, int64_t count) {
               add_up(static_cast<const T*>(args.sums2), tiles.down(), tiles.m, first, count,
                      static_cast<Element*>(args.grad2));
             });
  });
}

void rotated_each(const RotatedArgs& args, int64_t begin, int64_t end) {
  for_runs(begin, end, [&](int64_t first, int64_t count) {
    if (args.dtype == Dtype::float64) {
      rotated_run<double>(args, first, count);
    } else {
      rotated_run<float>(args, first, count);
    }
  });
}

void rotated_tiles(const RotatedArgs& args, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(args.tiles, index);
    if (args.dtype == Dtype::float64) {
      rotated_pairs<double>(args, tile);
    } else {
      rotated_pairs<float>(args, tile);
    }
  }
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
