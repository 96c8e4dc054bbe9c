// Rational-quadratic splines: one vector lane an element, whose parameters are turned from rows
// into lanes on their way in, and their gradients back on their way out.
#include "splines.h"

#include "../runtime/convert.h"
#include "../runtime/vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::SplineConvention;
using math::SplineTails;

// ---- parameters of as many elements as a vector has lanes ---------------------------------------

// Parameters that are turned at once, and rows that share a vector.
template <class T>
constexpr int kTurned = Vec<T>::size < 8 ? Vec<T>::size : 8;
template <class T>
constexpr int kAbreast = Vec<T>::size / kTurned<T>;

// The first `count` elements at each of kAbreast places, one behind the other with kTurned lanes
// each; lanes beyond are of no account.
#if defined(__AVX512F__)
FASTZOO_INLINE __m256 load_row(const float* p, int count) {
  if (count == 8) return _mm256_loadu_ps(p);
  return _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << count) - 1), p);
}
template <class Element>
FASTZOO_INLINE __m128i load_row(const Element* p, int count) {
  if (count == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_maskz_loadu_epi16(static_cast<__mmask8>((1u << count) - 1), p);
}
FASTZOO_INLINE Vec<float> load_rows(const float* const (&p)[2], int count) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(load_row(p[0], count)), load_row(p[1], count),
                            1);
}
template <class Element>
FASTZOO_INLINE Vec<float> load_rows(const Element* const (&p)[2], int count) {
  Element both[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(both),
                      _mm256_set_m128i(load_row(p[1], count), load_row(p[0], count)));
  return load_wide(both);
}
FASTZOO_INLINE Vec<double> load_rows(const double* const (&p)[1], int count) {
  if (count == 8) return Vec<double>::load(p[0]);
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p[0]);
}
FASTZOO_INLINE void store_rows(Vec<float> values, float* const (&p)[2], int count) {
  const auto mask = static_cast<__mmask8>((1u << count) - 1);
  _mm256_mask_storeu_ps(p[0], mask, _mm512_castps512_ps256(values.v));
  _mm256_mask_storeu_ps(p[1], mask, _mm512_extractf32x8_ps(values.v, 1));
}
FASTZOO_INLINE void store_rows(Vec<double> values, double* const (&p)[1], int count) {
  _mm512_mask_storeu_pd(p[0], static_cast<__mmask8>((1u << count) - 1), values.v);
}
#elif defined(__AVX2__)
FASTZOO_INLINE Vec<float> load_rows(const float* const (&p)[1], int count) {
  if (count == 8) return Vec<float>::load(p[0]);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p[0], _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}
FASTZOO_INLINE Vec<double> load_rows(const double* const (&p)[1], int count) {
  if (count == 4) return Vec<double>::load(p[0]);
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  return _mm256_maskload_pd(p[0], _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lane));
}
#endif
template <class Element, int kCount>
FASTZOO_INLINE Vec<typename ComputeOf<Element>::type> load_rows(const Element* const (&p)[kCount],
                                                                int count) {
  constexpr int kLanes = kTurned<typename ComputeOf<Element>::type>;
  Element all[kCount * kLanes] = {};
  for (int i = 0; i < kCount; ++i)
    __builtin_memcpy(all + i * kLanes, p[i], sizeof(Element) * count);
  return load_wide(all);
}
template <class Element, int kCount>
FASTZOO_INLINE void store_rows(Vec<typename ComputeOf<Element>::type> values,
                               Element* const (&p)[kCount], int count) {
  using T = typename ComputeOf<Element>::type;
  constexpr int kLanes = kTurned<T>;
  Element all[kCount * kLanes];
  store_narrow(values, all);
  for (int i = 0; i < kCount; ++i)
    __builtin_memcpy(p[i], all + i * kLanes, sizeof(Element) * count);
}

// lines[j] gets parameter j of every element, at data + at[lane]. kCount is their number where it
// is known, else 0.
template <int kCount, class Element, class V>
FASTZOO_INLINE void turn_in(const Element* data, const int64_t* at, int count, V* lines) {
  using T = typename ComputeOf<Element>::type;
  constexpr int kRows = kTurned<T>;
  const int all = kCount > 0 ? kCount : count;
#pragma GCC unroll 4
  for (int first = 0; first < all; first += kRows) {
    const int here = all - first < kRows ? all - first : kRows;
    V rows[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Element* places[kAbreast<T>];
      for (int k = 0; k < kAbreast<T>; ++k) places[k] = data + at[i + k * kRows] + first;
      rows[i] = load_rows(places, here);
    }
    transpose(rows);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      if (i < here) lines[first + i] = rows[i];
    }
  }
}

// The other way round, for `lanes` elements.
template <int kCount, class Element, class V>
FASTZOO_INLINE void turn_out(const V* lines, int count, Element* data, const int64_t* at,
                             int lanes) {
  using T = typename ComputeOf<Element>::type;
  constexpr int kRows = kTurned<T>;
  const int all = kCount > 0 ? kCount : count;
#pragma GCC unroll 4
  for (int first = 0; first < all; first += kRows) {
    const int here = all - first < kRows ? all - first : kRows;
    V rows[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) rows[i] = i < here ? lines[first + i] : V(T(0));
    transpose(rows);
    // What is beyond the last element goes nowhere.
    Element nowhere[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      Element* places[kAbreast<T>];
      for (int k = 0; k < kAbreast<T>; ++k) {
        const int lane = i + k * kRows;
        places[k] = lane < lanes ? data + at[lane] + first : nowhere;
      }
      store_rows(rows[i], places, here);
    }
  }
}

FASTZOO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How elements of one dtype are read into the type T that they are computed in, and written.
template <class T>
struct Access {
  void (*read_lines)(const void* data, const int64_t* at, int count, Vec<T>* lines);
  void (*write_lines)(const Vec<T>* lines, int count, void* data, const int64_t* at, int lanes);
  void (*read)(const void* from, int64_t first, int64_t count, T* to);
  void (*write)(const T* from, int64_t count, void* to, int64_t first);
  void (*copy)(const void* from, void* to, int64_t first, int64_t count);
  int64_t element_size;
};

template <class Element>
struct Accesses {
  using T = typename ComputeOf<Element>::type;

  // Eight bins with linear tails have code of their own.
  static void read_lines(const void* data, const int64_t* at, int count, Vec<T>* lines) {
    const Element* const elements = static_cast<const Element*>(data);
    if constexpr (sizeof(Element) == 4) {
      if (count == 8) return turn_in<8>(elements, at, 8, lines);
      if (count == 7) return turn_in<7>(elements, at, 7, lines);
    }
    turn_in<0>(elements, at, count, lines);
  }
  static void write_lines(const Vec<T>* lines, int count, void* data, const int64_t* at,
                          int lanes) {
    Element* const elements = static_cast<Element*>(data);
    if constexpr (sizeof(Element) == 4) {
      if (count == 8) return turn_out<8>(lines, 8, elements, at, lanes);
      if (count == 7) return turn_out<7>(lines, 7, elements, at, lanes);
    }
    turn_out<0>(lines, count, elements, at, lanes);
  }
  static void read(const void* from, int64_t first, int64_t count, T* to) {
    const Element* const own = static_cast<const Element*>(from) + first;
    int64_t j = 0;
    for (; j + Vec<T>::size <= count; j += Vec<T>::size) load_wide(own + j).store(to + j);
    for (; j < count; ++j) to[j] = widen(own[j]);
  }
  static void write(const T* from, int64_t count, void* to, int64_t first) {
    Element* const own = static_cast<Element*>(to) + first;
    int64_t j = 0;
    for (; j + Vec<T>::size <= count; j += Vec<T>::size) {
      store_narrow(Vec<T>::load(from + j), own + j);
    }
    for (; j < count; ++j) narrow(from[j], own[j]);
  }
  static void copy(const void* from, void* to, int64_t first, int64_t count) {
    const Element* const own = static_cast<const Element*>(from) + first;
    for (int64_t j = 0; j < count; ++j) static_cast<Element*>(to)[first + j] = own[j];
  }

  static constexpr Access<T> kAccess{read_lines, write_lines, read, write, copy, sizeof(Element)};
};

// ---- a tile -------------------------------------------------------------------------------------

template <class T>
struct Tile {
  using V = Vec<T>;

  const SplineArgs& args;
  const Access<T>& access;
  int64_t row, rows, column, columns;  // columns count from args.begin
  int64_t part;
  int64_t count;

  __attribute__((always_inline)) Tile(const SplineArgs& args, const Access<T>& access,
                                      int64_t index)
      : args(args), access(access) {
    row = index / args.parts_of_row() * args.rows_of_tile();
    rows = smaller(args.rows_of_tile(), args.rows - row);
    part = index % args.parts_of_row();
    column = part * kSplineTile;
    columns = smaller(kSplineTile, args.end - args.begin - column);
    count = rows * columns;
  }

  // Where each of a vector's elements from `first` on has its parameters. The last element stands
  // in for those that are missing.
  __attribute__((always_inline)) void places(const SplineLines& lines, int64_t first,
                                             int64_t* at) const {
    if (lines.row == lines.column * (args.end - args.begin) || rows == 1) {
      const int64_t from = row * lines.row + column * lines.column;
      for (int lane = 0; lane < V::size; ++lane) {
        at[lane] = from + smaller(first + lane, count - 1) * lines.column;
      }
      return;
    }
    int64_t i = first / columns, j = first % columns;
#pragma GCC unroll 1
    for (int lane = 0; lane < V::size; ++lane) {
      at[lane] = (row + i) * lines.row + (column + j) * lines.column;
      if (first + lane + 1 >= count) continue;
      if (++j == columns) ++i, j = 0;
    }
  }

  __attribute__((always_inline)) void read_lines(const SplineLines& from, int64_t first, int many,
                                                 V* lines) const {
    int64_t at[V::size];
    places(from, first, at);
    // What comes soon; the many short rows are not foreseen by the CPU.
    constexpr int64_t kAhead = 4 * V::size;
    const char* const soon =
        static_cast<const char*>(from.data) + kAhead * from.column * access.element_size;
    for (int lane = 0; lane < V::size; ++lane) {
      __builtin_prefetch(soon + at[lane] * access.element_size);
    }
    access.read_lines(from.data, at, many, lines);
  }
  __attribute__((always_inline)) void write_lines(const V* lines, int64_t first, int many,
                                                  const SplineLines& to) const {
    int64_t at[V::size];
    places(to, first, at);
    access.write_lines(lines, many, to.data, at, static_cast<int>(smaller(V::size, count - first)));
  }

  // Of a tensor like x, where the tile's elements of a row begin.
  int64_t begin_of(int64_t i) const { return (row + i) * args.columns + args.begin + column; }

  bool all_columns() const { return columns == args.columns; }

  // The tile's elements of such a tensor, one behind the other, and zeros up to a whole vector.
  void read(const void* from, T* to) const {
    if (all_columns()) {
      access.read(from, begin_of(0), count, to);
    } else {
      for (int64_t i = 0; i < rows; ++i) access.read(from, begin_of(i), columns, to + i * columns);
    }
    pad(to);
  }
  void pad(T* values) const {
    for (int64_t i = count; i < round_up(count, V::size); ++i) values[i] = T(0);
  }

  // Back, with the other columns as they are in `rest`.
  void write(const T* from, const void* rest, void* to) const {
    if (all_columns()) return access.write(from, count, to, begin_of(0));
    for (int64_t i = 0; i < rows; ++i) {
      access.write(from + i * columns, columns, to, begin_of(i));
      if (part > 0) continue;
      const int64_t begin = (row + i) * args.columns;
      access.copy(rest, to, begin, args.begin);
      access.copy(rest, to, begin + args.end, args.columns - args.end);
    }
  }

  void write_logdet(const T* from) const {
    T* const to = static_cast<T*>(args.logdet);
    const int64_t parts = args.parts_of_row();
    for (int64_t i = 0; i < rows; ++i) {
      const T* const own = from + i * columns;
      if (args.sum_logdet) {
        if (parts == 1) {
          to[row + i] = sum_of(own);
        } else {
          args.parts[(row + i) * parts + part] = sum_of(own);
        }
        continue;
      }
      for (int64_t j = 0; j < columns; ++j) to[begin_of(i) + j] = own[j];
      if (part > 0) continue;
      const int64_t begin = (row + i) * args.columns;
      for (int64_t j = 0; j < args.begin; ++j) to[begin + j] = T(0);
      for (int64_t j = args.end; j < args.columns; ++j) to[begin + j] = T(0);
    }
  }

  T sum_of(const T* values) const {
    V sums(T(0));
    int64_t j = 0;
    for (; j + V::size <= columns; j += V::size) sums = sums + V::load(values + j);
    T sum = j > 0 ? lane_sum(sums) : T(0);
    for (; j < columns; ++j) sum += values[j];
    return sum;
  }

  void read_grad_logdet(T* to) const {
    const T* const from = static_cast<const T*>(args.grad_logdet);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        to[i * columns + j] = args.sum_logdet ? from[row + i] : from[begin_of(i) + j];
      }
    }
    pad(to);
  }
};

// ---- the splines of a vector's lanes ------------------------------------------------------------

template <class T, SplineConvention kConvention, int kBins, bool kInverse>
struct Splines {
  using V = Vec<T>;
  static constexpr bool kClips = kConvention == SplineConvention::zuko;
  static constexpr int kRoom = kBins > 0 ? kBins : kMostSplineBins;

  const SplineArgs& args;
  const Access<T>& access;
  const int bins = kBins > 0 ? kBins : args.bins;
  const int derivatives = math::spline_derivatives(args.tails, bins);
  const math::SplineBox<T> box =
      math::spline_box<T>(args.convention, args.bins, args.left, args.right, args.bottom, args.top,
                          args.min_width, args.min_height, args.min_derivative);

  // Of one vector of elements.
  struct Lines {
    V widths[kRoom], heights[kRoom];
    V knots[kRoom + 1];  // their derivatives
    V width_sum, height_sum;

    // From the first knot that has a derivative of its own.
    __attribute__((always_inline)) V* own_knots(SplineTails tails) {
      return knots + (tails == SplineTails::linear ? 1 : 0);
    }
  };

  // Vectors that go through each stage together: a stage is one long chain, and those of several
  // vectors overlap.
  static constexpr int kAtOnce = kBins > 0 ? 8 : 2;

  __attribute__((always_inline)) static int vectors_from(const Tile<T>& tile, int64_t first) {
    return static_cast<int>(smaller(kAtOnce, (tile.count - first + V::size - 1) / V::size));
  }

  __attribute__((always_inline)) void read(const Tile<T>& tile, int64_t first, Lines& lines) const {
    lines.knots[0] = lines.knots[bins] = V(T(0));
    tile.read_lines(args.widths, first, bins, lines.widths);
    tile.read_lines(args.heights, first, bins, lines.heights);
    tile.read_lines(args.derivatives, first, derivatives, lines.own_knots(args.tails));
    if (args.tails == SplineTails::circular) lines.knots[bins] = lines.knots[0];
  }

  // Leaves the exponentials of widths and heights in their place.
  __attribute__((always_inline)) math::SplineBin<V> bin_of(Lines& lines, V at) const {
    lines.width_sum =
        math::spline_exponentials<kConvention, kBins, T, V>(box.x, bins, lines.widths);
    lines.height_sum =
        math::spline_exponentials<kConvention, kBins, T, V>(box.y, bins, lines.heights);
    return math::spline_bin<kBins, kInverse>(box, bins, lines.widths, lines.width_sum,
                                             lines.heights, lines.height_sum, lines.knots, at);
  }

  void forward(int64_t index) const {
    const Tile<T> tile(args, access, index);
    alignas(kVectorBytes) T at[kSplineTile], value[kSplineTile], log_slope[kSplineTile];
    tile.read(args.x, at);
    for (int64_t first = 0; first < tile.count; first += kAtOnce * V::size) {
      math::SplineBin<V> found[kAtOnce];
      const int many = vectors_from(tile, first);
      for (int i = 0; i < many; ++i) {
        Lines lines;
        read(tile, first + i * V::size, lines);
        found[i] = bin_of(lines, V::load(at + first + i * V::size));
      }
      for (int i = 0; i < many; ++i) {
        const int64_t place = first + i * V::size;
        const V own = V::load(at + place);
        math::SplineBin<V> bin = found[i];
        math::spline_finish_bin<kConvention>(box, args.tails, bins, bin);
        const math::SplinePoint<V> point = math::spline_point<kInverse, T>(bin, own);
        const math::SplineValue<V> result =
            math::spline_value<kInverse>(box, args.tails, bin, point, own);
        result.value.store(value + place);
        result.log_slope.store(log_slope + place);
      }
    }
    tile.write(value, args.x, args.y);
    tile.write_logdet(log_slope);
  }

  void backward(int64_t index) const {
    const Tile<T> tile(args, access, index);
    alignas(kVectorBytes) T at[kSplineTile], by_value[kSplineTile], by_log[kSplineTile];
    tile.read(args.x, at);
    tile.read(args.grad_y, by_value);
    tile.read_grad_logdet(by_log);
    for (int64_t first = 0; first < tile.count; first += V::size) {
      Lines lines;
      read(tile, first, lines);
      gradients(lines, V::load(at + first), V::load(by_value + first), V::load(by_log + first))
          .store(at + first);
      tile.write_lines(lines.widths, first, bins, args.grad_widths);
      tile.write_lines(lines.heights, first, bins, args.grad_heights);
      tile.write_lines(lines.own_knots(args.tails), first, derivatives, args.grad_derivatives);
    }
    tile.write(at, args.grad_y, args.grad_x);
  }

  // From what is raw to the gradients by it, in its place; returns the gradient by `at`.
  __attribute__((always_inline)) V gradients(Lines& lines, V at, V by_value, V by_log) const {
    [[maybe_unused]] V raw_widths[kRoom], raw_heights[kRoom];
    if constexpr (kClips) {
      math::spline_loop<kBins>(bins, [&](int j) {
        raw_widths[j] = lines.widths[j];
        raw_heights[j] = lines.heights[j];
      });
    }
    math::SplineBin<V> bin = bin_of(lines, at);
    const V slope0 = math::spline_derivative_slope<kConvention>(box, bin.d0);
    const V slope1 = math::spline_derivative_slope<kConvention>(box, bin.d1);
    math::spline_finish_bin<kConvention>(box, args.tails, bins, bin);
    const math::SplinePoint<V> point = math::spline_point<kInverse, T>(bin, at);
    const math::SplineAdjoint<V> by =
        math::spline_adjoint<kInverse, T>(bin, point, by_value, by_log);
    const math::SplineSpread<V> by_widths =
        math::spline_spread<T>(box.x, bin, bin.x, bins, lines.width_sum, by.x0, by.x1);
    const math::SplineSpread<V> by_heights =
        math::spline_spread<T>(box.y, bin, bin.y, bins, lines.height_sum, by.y0, by.y1);
    const math::SplineAxis<T>& axis = kInverse ? box.y : box.x;
    const V zero(T(0));
    const auto inside = [&](V value) { return math::spline_inside<T>(axis, at, value, zero); };
    math::spline_loop<kBins>(bins, [&](int j) {
      V by_width = math::spline_spread_to<T>(by_widths, j, lines.widths[j]);
      V by_height = math::spline_spread_to<T>(by_heights, j, lines.heights[j]);
      if constexpr (kClips) {
        by_width = by_width * math::spline_clip_slope(box.x.clip, raw_widths[j]);
        by_height = by_height * math::spline_clip_slope(box.y.clip, raw_heights[j]);
      }
      lines.widths[j] = inside(by_width);
      lines.heights[j] = inside(by_height);
    });
    const V by_d0 = inside(by.d0 * slope0), by_d1 = inside(by.d1 * slope1);
    for (int k = 0; k <= bins; ++k) {
      lines.knots[k] = math::spline_knot_gradient<T>(bin, k, by_d0, by_d1);
    }
    if (args.tails == SplineTails::circular) lines.knots[0] = lines.knots[0] + lines.knots[bins];
    return math::spline_inside<T>(axis, at, by.at,
                                  args.tails == SplineTails::none ? zero : by_value);
  }
};

// ---- which of them ------------------------------------------------------------------------------

template <class T, SplineConvention kConvention, int kBins, class Body>
void with_direction(const SplineArgs& args, const Access<T>& access, const Body& body) {
  if (args.inverse) return body(Splines<T, kConvention, kBins, true>{args, access});
  body(Splines<T, kConvention, kBins, false>{args, access});
}

template <class T, SplineConvention kConvention, class Body>
void with_bins(const SplineArgs& args, const Access<T>& access, const Body& body) {
  if constexpr (sizeof(T) == 4) {
    if (args.bins == 8) return with_direction<T, kConvention, 8>(args, access, body);
  }
  with_direction<T, kConvention, 0>(args, access, body);
}

template <class T, class Body>
void with_access(const SplineArgs& args, const Access<T>& access, const Body& body) {
  if (args.convention == SplineConvention::zuko) {
    return with_bins<T, SplineConvention::zuko>(args, access, body);
  }
  with_bins<T, SplineConvention::nflows>(args, access, body);
}

// Calls body(splines).
template <class Body>
void with_splines(const SplineArgs& args, const Body& body) {
  switch (args.dtype) {
    case Dtype::float32:
      return with_access(args, Accesses<float>::kAccess, body);
    case Dtype::float16:
      return with_access(args, Accesses<Half>::kAccess, body);
    case Dtype::bfloat16:
      return with_access(args, Accesses<BFloat16>::kAccess, body);
    case Dtype::float64:
      return with_access(args, Accesses<double>::kAccess, body);
  }
}

}  // namespace

void splines_forward(const SplineArgs& args, int64_t first, int64_t last) {
  with_splines(args, [&](const auto& splines) {
    for (int64_t tile = first; tile < last; ++tile) splines.forward(tile);
  });
}

void splines_backward(const SplineArgs& args, int64_t first, int64_t last) {
  with_splines(args, [&](const auto& splines) {
    for (int64_t tile = first; tile < last; ++tile) splines.backward(tile);
  });
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
