// Coupling: each element by itself, and sums of the log-derivatives of each row. The elements of a
// tile that do not lie side by side in memory, or are not of the compute type, are gathered in
// arrays that stay in L1, so that whole vectors are computed whatever the lengths of rows.
#include "coupling.h"

#include <type_traits>

#include "../runtime/convert.h"
#include "../runtime/rows.h"
#include "../runtime/vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::CouplingConstants;

// The rows and columns of a tile, columns being counted from the first that is mapped.
struct Place {
  int64_t row, rows, column, width;

  __attribute__((always_inline)) int64_t count() const { return rows * width; }
};

// A tile's arrays, each of count elements side by side. Those that a map lacks are null.
template <class T>
struct ForwardTile {
  int64_t count;
  const uint8_t* mask;
  const T *x, *shift, *scale;
  T *y, *log;
  bool streams;
};

template <class T>
struct BackwardTile {
  int64_t count;
  const uint8_t* mask;
  const T *grad_y, *grad_log, *x, *shift, *scale;
  T *grad_x, *grad_shift, *grad_scale;
  T *log, *slope;  // room for the scales'
  bool streams;
};

// Access to whole vectors, and to such of which only the first `count` elements exist: store() may
// bypass the caches, keep() does not. What is streamed is aligned.
template <class T>
struct Whole {
  using V = Vec<T>;
  bool streams;

  __attribute__((always_inline)) V load(const T* p) const { return V::load(p); }
  __attribute__((always_inline)) auto mask(const uint8_t* p) const { return load_mask<T>(p); }
  __attribute__((always_inline)) void store(V values, T* p) const {
    if (streams) return stream(values, p);
    values.store(p);
  }
  __attribute__((always_inline)) void keep(V values, T* p) const { values.store(p); }
};

template <class T>
struct Some {
  using V = Vec<T>;
  int64_t count;

  __attribute__((always_inline)) V load(const T* p) const {
    T values[V::size] = {};
    copy_few<kVectorBytes>(p, values, count * sizeof(T));
    return V::load(values);
  }
  __attribute__((always_inline)) auto mask(const uint8_t* p) const {
    uint8_t bytes[V::size] = {};
    copy_few<V::size>(p, bytes, count);
    return load_mask<T>(bytes);
  }
  __attribute__((always_inline)) void store(V values, T* p) const {
    T stored[V::size];
    values.store(stored);
    copy_few<kVectorBytes>(stored, p, count * sizeof(T));
  }
  __attribute__((always_inline)) void keep(V values, T* p) const { store(values, p); }
};

// Calls first(access, i), and then second(access, i), for the elements from i on, vector by vector:
// the one for all vectors of a block before the other. Where both are long chains of steps, the CPU
// so finds more of them to do at a time than where one chain follows the other.
template <class T, class First, class Second>
FASTZOO_INLINE void over_vectors(int64_t count, bool streams, const T* streamed, const First& first,
                                 const Second& second) {
  constexpr int64_t kSize = Vec<T>::size, kBlock = 16 * kSize;
  int64_t head = 0;
  if (streams) {
    const int64_t past = reinterpret_cast<uintptr_t>(streamed) / sizeof(T) % kSize;
    head = past == 0 ? 0 : kSize - past;
    if (head > count) head = count;
  }
  const int64_t end = head + (count - head) / kSize * kSize;
  const int64_t begins[] = {0, end}, counts[] = {head, count - end};
#pragma GCC unroll 1
  for (int i = 0; i < 2; ++i) {
    if (counts[i] == 0) continue;
    first(Some<T>{counts[i]}, begins[i]);
    second(Some<T>{counts[i]}, begins[i]);
  }
  for (int64_t begin = head; begin < end; begin += kBlock) {
    const int64_t stop = begin + kBlock < end ? begin + kBlock : end;
    for (int64_t i = begin; i < stop; i += kSize) first(Whole<T>{streams}, i);
    for (int64_t i = begin; i < stop; i += kSize) second(Whole<T>{streams}, i);
  }
}

// Whether the scale of a map is the exponential of something.
template <class Map, class = void>
struct HasLog : std::false_type {};
template <class Map>
struct HasLog<Map, std::void_t<decltype(&Map::ScaleOf::template of_log<float>)>> : std::true_type {
};

template <class Map, class T>
__attribute__((noinline)) void map_tile(const CouplingConstants<T>& constants,
                                        const ForwardTile<T>& tile) {
  using V = Vec<T>;
  const CouplingConstants<T> c = constants;
  const ForwardTile<T> t = tile;
  const V zero(T(0));
  const auto set_log = [&](const auto& access, int64_t i) {
    if constexpr (HasLog<Map>::value) {
      const V log = Map::ScaleOf::log_of(c, access.load(t.scale + i)).log;
      access.keep(select(access.mask(t.mask + i), zero, log), t.log + i);
    }
  };
  const auto set_value = [&](const auto& access, int64_t i) {
    const auto unchanged = access.mask(t.mask + i);
    const V x = access.load(t.x + i);
    const V shift = Map::kParameters > 0 ? access.load(t.shift + i) : zero;
    V y;
    if constexpr (HasLog<Map>::value) {
      const V log = access.load(t.log + i);
      y = Map::value(c, x, shift, Map::ScaleOf::of_log(math::LogScale<V>{log, zero}).factor);
    } else {
      const V scale = Map::kParameters > 1 ? access.load(t.scale + i) : zero;
      const math::Mapped<V> out = Map::apply(c, x, shift, scale);
      access.keep(select(unchanged, zero, out.log), t.log + i);
      y = out.value;
    }
    access.store(select(unchanged, x, y), t.y + i);
  };
  over_vectors<T>(t.count, t.streams, t.y, set_log, set_value);
}

template <class Map, class T>
__attribute__((noinline)) void gradients_of_tile(const CouplingConstants<T>& constants,
                                                 const BackwardTile<T>& tile) {
  using V = Vec<T>;
  const CouplingConstants<T> c = constants;
  const BackwardTile<T> t = tile;
  const V zero(T(0));
  const auto set_log = [&](const auto& access, int64_t i) {
    if constexpr (HasLog<Map>::value) {
      const math::LogScale<V> scale = Map::ScaleOf::log_of(c, access.load(t.scale + i));
      access.keep(scale.log, t.log + i);
      access.keep(scale.slope, t.slope + i);
    }
  };
  const auto set_gradients = [&](const auto& access, int64_t i) {
    const V grad = access.load(t.grad_y + i), grad_log = access.load(t.grad_log + i);
    const V x = access.load(t.x + i);
    const V shift = Map::kParameters > 0 ? access.load(t.shift + i) : zero;
    math::CouplingGradients<V> out;
    if constexpr (HasLog<Map>::value) {
      const math::LogScale<V> scale{access.load(t.log + i), access.load(t.slope + i)};
      out = Map::gradients_of_scale(c, grad, grad_log, x, shift, Map::ScaleOf::of_log(scale));
    } else {
      const V scale = Map::kParameters > 1 ? access.load(t.scale + i) : zero;
      out = Map::gradients(c, grad, grad_log, x, shift, scale);
    }
    const auto unchanged = access.mask(t.mask + i);
    access.store(select(unchanged, grad, out.x), t.grad_x + i);
    if constexpr (Map::kParameters > 0) {
      access.store(select(unchanged, zero, out.shift), t.grad_shift + i);
    }
    if constexpr (Map::kParameters > 1) {
      access.store(select(unchanged, zero, out.scale), t.grad_scale + i);
    }
  };
  over_vectors<T>(t.count, t.streams, t.grad_x, set_log, set_gradients);
}

// Elements [R][m] with strides, in memory.
template <class Element>
struct Strided {
  const Element* data;
  int64_t row, column;
  int64_t size;  // elements from the first to the last

  __attribute__((always_inline)) Strided(const void* data, int64_t row, int64_t column,
                                         int64_t rows, int64_t columns)
      : data(static_cast<const Element*>(data)),
        row(row),
        column(column),
        size((rows - 1) * row + (columns - 1) * column + 1) {}

  // Those of a tile side by side in the compute type: where they are, or gathered in `scratch`,
  // which has room for a vector more.
  template <class T>
  const T* gather(const Place& at, T* scratch) const {
    if constexpr (std::is_same_v<Element, T>) {
      if (column == 1 && (at.rows == 1 || row == at.width)) {
        return data + at.row * row + at.column;
      }
    }
    using V = Vec<T>;
    for (int64_t r = 0; r < at.rows; ++r) {
      const int64_t offset = (at.row + r) * row + at.column * column;
      const Element* const from = data + offset;
      T* const to = scratch + r * at.width;
      // Whole vectors are read and written beyond the row, but not beyond what there is to read;
      // the next row writes over it.
      int64_t i = 0;
      if (column == 1) {
        for (; i < at.width && offset + i + V::size <= size; i += V::size) {
          load_wide(from + i).store(to + i);
        }
      } else if (column == 2) {
        for (; i < at.width && offset + 2 * (i + V::size) <= size; i += V::size) {
          even_elements(load_wide(from + 2 * i), load_wide(from + 2 * i + V::size)).store(to + i);
        }
      }
      for (; i < at.width; ++i) to[i] = widen(from[i * column]);
    }
    return scratch;
  }
};

// Where a tile's results of the compute type go: [R][row], from column `begin` on.
template <class Element, class T>
struct Output {
  Element* first;  // of the tile
  int64_t row;
  Place at;
  T* tile;
  bool direct;

  __attribute__((always_inline)) Output(void* data, int64_t row, int64_t begin, const Place& at,
                                        T* scratch)
      : first(static_cast<Element*>(data) + at.row * row + begin + at.column),
        row(row),
        at(at),
        tile(scratch),
        direct(false) {
    if constexpr (std::is_same_v<Element, T>) {
      if (at.rows == 1 || row == at.width) {
        direct = true;
        tile = first;
      }
    }
  }

  void finish() const {
    if (direct) return;
    const bool dense = row == at.width;
    const int64_t rows = dense ? 1 : at.rows, width = dense ? at.count() : at.width;
    for (int64_t r = 0; r < rows; ++r) put(tile + r * width, first + r * row, width);
  }

 private:
  FASTZOO_INLINE void put(const T* from, Element* to, int64_t count) {
    using V = Vec<T>;
    if constexpr (std::is_same_v<Element, T>) {
      copy_bytes(from, to, count * sizeof(T));
    } else {
      int64_t i = 0;
      for (; i + V::size <= count; i += V::size) store_narrow(V::load(from + i), to + i);
      Element rest[V::size];
      if (i < count) store_narrow(V::load(from + i), rest);
      copy_few<sizeof(rest)>(rest, to + i, (count - i) * sizeof(Element));
    }
  }
};

template <class Element>
struct Coupling {
  using T = typename ComputeOf<Element>::type;
  static constexpr int64_t kRoom = kCouplingTile + Vec<T>::size;

  struct alignas(kVectorBytes) Scratch {
    T values[10][kRoom];
  };

  const CouplingArgs& args;
  CouplingTiles tiles;
  CouplingConstants<T> constants;
  uint8_t mask[kCouplingTile];  // of a tile of whole rows, where every row has the same or none has

  __attribute__((always_inline)) explicit Coupling(const CouplingArgs& args)
      : args(args),
        tiles(args.tiles()),
        constants(math::coupling_constants<T>(args.constant, args.floor, args.shift_first,
                                              args.inverse)) {
    __builtin_memset(mask, 0, sizeof(mask));
    if (args.mask == nullptr || args.mask_rows || tiles.pieces > 1 || tiles.width == 0) return;
    for (int64_t r = 0; r < tiles.rows_each; ++r) {
      copy_bytes(args.mask, mask + r * tiles.width, tiles.width);
    }
  }

  void forward(int64_t begin, int64_t end, Scratch& scratch) const {
    using Map = void (*)(const CouplingConstants<T>&, const ForwardTile<T>&);
    Map map = nullptr;
    math::with_coupling_map(args.map, [&](auto of) { map = &map_tile<decltype(of), T>; });
    for (int64_t tile = begin; tile < end; ++tile) forward(tile, map, scratch);
  }

  void backward(int64_t begin, int64_t end, Scratch& scratch) const {
    using Map = void (*)(const CouplingConstants<T>&, const BackwardTile<T>&);
    Map map = nullptr;
    math::with_coupling_map(args.map, [&](auto of) { map = &gradients_of_tile<decltype(of), T>; });
    for (int64_t tile = begin; tile < end; ++tile) backward(tile, map, scratch);
  }

 private:
  Place place(int64_t tile) const {
    const int64_t row = tile / tiles.pieces * tiles.rows_each;
    const int64_t column = tile % tiles.pieces * tiles.piece;
    const int64_t rows = tiles.rows - row, width = tiles.width - column;
    return {row, rows < tiles.rows_each ? rows : tiles.rows_each, column,
            width < tiles.piece ? width : tiles.piece};
  }

  const uint8_t* mask_of(const Place& at) const {
    if (args.mask == nullptr) return mask;
    if (args.mask_rows) return args.mask + at.row * tiles.width + at.column;
    return tiles.pieces > 1 ? args.mask + at.column : mask;
  }

  // Of an array [R][n], the mapped columns.
  template <class E>
  Strided<E> mapped(const void* data) const {
    return {static_cast<const E*>(data) + args.begin, args.columns, 1, tiles.rows, tiles.width};
  }

  const T* parameter(const CouplingParameter& p, const Place& at, T* scratch) const {
    if (p.data == nullptr) return nullptr;
    return Strided<Element>(p.data, p.row, p.column, tiles.rows, tiles.width).gather(at, scratch);
  }

  // Calls body(first, count) for the unchanged columns of a tile's rows, from `first` of [R][n] on.
  template <class Body>
  void over_unchanged(const Place& at, const Body& body) const {
    if (at.column != 0) return;
    for (int64_t row = at.row; row < at.row + at.rows; ++row) {
      if (args.begin > 0) body(row * args.columns, args.begin);
      if (args.end < args.columns) body(row * args.columns + args.end, args.columns - args.end);
    }
  }

  void copy_unchanged(const void* from, void* to, const Place& at) const {
    over_unchanged(at, [&](int64_t first, int64_t count) {
      copy_bytes(static_cast<const Element*>(from) + first, static_cast<Element*>(to) + first,
                 count * sizeof(Element));
    });
  }

  template <class Map>
  void forward(int64_t tile, Map map, Scratch& scratch) const {
    const Place at = place(tile);
    auto& room = scratch.values;
    const Output<Element, T> y(args.y, args.columns, args.begin, at, room[3]);
    T* log = room[4];
    const bool whole = !args.sum_logdet;
    const Output<T, T> each(args.logdet, whole ? args.columns : 0, whole ? args.begin : 0, at, log);
    if (whole) log = each.tile;
    map(constants, {at.count(), mask_of(at), mapped<Element>(args.x).gather(at, room[0]),
                    parameter(args.shift, at, room[1]), parameter(args.scale, at, room[2]), y.tile,
                    log, args.streams && y.direct});
    y.finish();
    copy_unchanged(args.x, args.y, at);
    T* const logdet = static_cast<T*>(args.logdet);
    if (whole) {
      each.finish();
      over_unchanged(at, [&](int64_t first, int64_t count) {
        __builtin_memset(logdet + first, 0, count * sizeof(T));
      });
      return;
    }
    sum_rows(log, at.rows, at.width, [&](int64_t row, T sum) {
      if (args.parts != nullptr) {
        args.parts[tile] = sum;
      } else {
        logdet[at.row + row] = sum;
      }
    });
  }

  template <class Map>
  void backward(int64_t tile, Map map, Scratch& scratch) const {
    const Place at = place(tile);
    auto& room = scratch.values;
    const Output<Element, T> by_x(args.grad_x, args.columns, args.begin, at, room[5]);
    const Output<Element, T> by_shift(args.grad_shift, tiles.width, 0, at, room[6]);
    const Output<Element, T> by_scale(args.grad_scale, tiles.width, 0, at, room[7]);
    const auto address = [](const auto& output) {
      return reinterpret_cast<uintptr_t>(output.tile) % kVectorBytes;
    };
    const bool alike = (args.grad_shift == nullptr || address(by_shift) == address(by_x)) &&
                       (args.grad_scale == nullptr || address(by_scale) == address(by_x));
    map(constants,
        {at.count(), mask_of(at), mapped<Element>(args.grad_y).gather(at, room[0]),
         grad_log(at, room[1]), mapped<Element>(args.x).gather(at, room[2]),
         parameter(args.shift, at, room[3]), parameter(args.scale, at, room[4]), by_x.tile,
         by_shift.tile, by_scale.tile, room[8], room[9], args.streams && by_x.direct && alike});
    by_x.finish();
    copy_unchanged(args.grad_y, args.grad_x, at);
    if (args.grad_shift != nullptr) by_shift.finish();
    if (args.grad_scale != nullptr) by_scale.finish();
  }

  const T* grad_log(const Place& at, T* scratch) const {
    if (!args.sum_logdet) return mapped<T>(args.grad_logdet).gather(at, scratch);
    const T* const grad = static_cast<const T*>(args.grad_logdet) + at.row;
    for (int64_t r = 0; r < at.rows; ++r) {
      for (int64_t i = 0; i < at.width; i += Vec<T>::size) {
        Vec<T>(grad[r]).store(scratch + r * at.width + i);
      }
    }
    return scratch;
  }
};

}  // namespace

#define FASTZOO_DEFINE_COUPLING(name, method)                       \
  void name(const CouplingArgs& args, int64_t begin, int64_t end) { \
    with_element(args.dtype, [&](auto element) {                    \
      using Kernel = Coupling<decltype(element)>;                   \
      typename Kernel::Scratch scratch;                             \
      Kernel(args).method(begin, end, scratch);                     \
    });                                                             \
    if (args.streams) stream_fence();                               \
  }

FASTZOO_DEFINE_COUPLING(coupling_forward, forward)
FASTZOO_DEFINE_COUPLING(coupling_backward, backward)

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
