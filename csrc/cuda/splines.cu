// Rational-quadratic splines with their log-determinants. A block has a tile of elements, whose
// parameters pass through shared memory: they lie one element's behind the other's, so that what is
// read and written there is whole accesses, and each thread then has those of one element.
//   splines_map       the splines or their inverses, and the log-determinants added up
//   splines_join      rows that several tiles had
//   splines_gradient  the gradients of the operands
//   splines_pass      the columns that are passed on as they are
#include "../math/splines.h"

#include <algorithm>
#include <string>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/rows.h"

namespace fastzoo::cuda {
namespace {

using math::SplineConvention;
using math::SplineTails;

constexpr int kThreads = 128;
constexpr int kLogWarp = 5;
constexpr int kTunedBins = 8;
constexpr int kTileUnit = 8;  // elements of a tile are a multiple, so that it begins at 16 bytes

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T_, SplineConvention kConvention_, int kBins_, bool kInverse_>
struct Scheme {
  using T = T_;
  using C = ComputeOf<T>;
  static constexpr SplineConvention kConvention = kConvention_;
  static constexpr int kBins = kBins_;  // 0: as many as there are
  static constexpr bool kInverse = kInverse_;
  static constexpr bool kClips = kConvention == SplineConvention::zuko;
  // In shared memory, of a tile.
  static constexpr int kValues =
      kBins > 0 ? kThreads * (3 * kBins + 1) : 44 * 1024 / static_cast<int>(sizeof(C));
};

// Some parameters of each element, or their gradients: `count` of them, from `place` on among all.
struct Part {
  int count, place;
  uint32_t over;  // 2^31 / count

  FASTZOO_DEVICE int element_of(int i) const {
    return static_cast<int>(static_cast<uint64_t>(i) * over >> 31);
  }
};
template <class T>
struct Parameters : Part {
  const T* data;
  int64_t row, column;  // steps
  bool flat;            // elements follow one another, from 16 bytes on
};
template <class T>
struct Gradients : Part {
  T* data;
};

constexpr int kParts = 3;

// The columns that change, as elements one behind the other.
struct Elements {
  int64_t rows, columns, begin, changing;
  int tile;       // elements
  int log_lanes;  // of those that add up a row of a tile

  FASTZOO_DEVICE int64_t first() const { return int64_t{blockIdx.x} * tile; }
  FASTZOO_DEVICE int in_tile() const {
    const int64_t left = rows * changing - first();
    return left < tile ? static_cast<int>(left) : tile;
  }
};

template <class S>
struct Splines {
  using T = typename S::T;
  using C = typename S::C;

  Elements elements;
  math::SplineBox<C> box;
  SplineTails tails;
  int bins;
  int pitch;  // in shared memory, from an element's parameters to the next: odd, for the banks
  const T* x;
  Parameters<T> parameters[kParts];
};

// What threads share of a tile.
template <class S>
struct TileArrays {
  using C = typename S::C;
  SharedArray<C, S::kValues> values;
  SharedArray<int64_t, kThreads> rows;
  SharedArray<int64_t, kThreads> columns;  // among those that change
};

// The place of the thread's own element.
struct Place {
  bool exists;
  int64_t row, column, in_x;

  FASTZOO_DEVICE explicit Place(const Elements& elements) {
    const int64_t element = elements.first() + threadIdx.x;
    exists = static_cast<int>(threadIdx.x) < elements.in_tile();
    row = exists ? element / elements.changing : 0;
    column = exists ? element - row * elements.changing : 0;
    in_x = row * elements.columns + elements.begin + column;
  }
};

// From memory to the tile. As many accesses as a thread has of K = 8 in float are under way at
// once.
template <class S>
FASTZOO_DEVICE void read_part(const Splines<S>& in, const Parameters<typename S::T>& part,
                              TileArrays<S>& tile) {
  using T = typename S::T;
  using C = typename S::C;
  constexpr int n = kVector<T>;
  constexpr int kBatch = n == 8 ? 3 : 6;
  const int thread = threadIdx.x;
  const int total = in.elements.in_tile() * part.count;
  if (!part.flat) {
#pragma unroll 4
    for (int i = thread; i < total; i += kThreads) {
      const int element = part.element_of(i), own = i - element * part.count;
      const int64_t from = tile.rows[element] * part.row + tile.columns[element] * part.column;
      tile.values[element * in.pitch + part.place + own] = static_cast<C>(part.data[from + own]);
    }
    return;
  }
  const T* from = part.data + in.elements.first() * part.count;
  for (int batch = thread * n; batch < total; batch += kBatch * kThreads * n) {
    Vector<T, n> pieces[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = batch + b * kThreads * n;
      pieces[b] = {};
      if (i + n <= total) {
        pieces[b] = load_vector<n>(from + i);
      } else {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (i + j < total) pieces[b][j] = from[i + j];
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = batch + b * kThreads * n;
      if (in.pitch == part.count && i + n <= total) {
        Vector<C, n> wide;
#pragma unroll
        for (int j = 0; j < n; ++j) wide[j] = static_cast<C>(pieces[b][j]);
        tile.values.store(i, wide);
        continue;
      }
      int element = part.element_of(i), own = i - element * part.count;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (i + j < total) {
          tile.values[element * in.pitch + part.place + own] = static_cast<C>(pieces[b][j]);
        }
        if (++own == part.count) ++element, own = 0;
      }
    }
  }
}

// All threads call it. The tile is whole when it returns.
template <class S>
FASTZOO_DEVICE void read_tile(const Splines<S>& in, const Place& place, TileArrays<S>& tile) {
  tile.rows[threadIdx.x] = place.row;
  tile.columns[threadIdx.x] = place.column;
  bool flat = true;
#pragma unroll
  for (int p = 0; p < kParts; ++p) flat = flat && in.parameters[p].flat;
  if (!flat) sync_block();
#pragma unroll 1
  for (int p = 0; p < kParts; ++p) {
    if (in.parameters[p].count > 0) read_part(in, in.parameters[p], tile);
  }
  sync_block();
}

template <class S>
FASTZOO_DEVICE void write_part(const Splines<S>& in, const Gradients<typename S::T>& part,
                               TileArrays<S>& tile) {
  using T = typename S::T;
  using C = typename S::C;
  constexpr int n = kVector<T>;
  const int total = in.elements.in_tile() * part.count;
  T* to = part.data + in.elements.first() * part.count;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x) * n; i < total; i += kThreads * n) {
    Vector<T, n> piece;
    if (in.pitch == part.count && i + n <= total) {
      const auto wide = tile.values.template load<n>(i);
#pragma unroll
      for (int j = 0; j < n; ++j) piece[j] = static_cast<T>(wide[j]);
    } else {
      int element = part.element_of(i), own = i - element * part.count;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        piece[j] = static_cast<T>(i + j < total ? tile.values[element * in.pitch + part.place + own]
                                                : C{0});
        if (++own == part.count) ++element, own = 0;
      }
    }
    if (i + n <= total) {
      store_global(to + i, piece);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (i + j < total) to[i + j] = piece[j];
      }
    }
  }
}

// The raw sizes of an element's bins, then what becomes of them: in registers, or from `at` on in
// shared memory.
template <class C, int kBins, class Values>
struct Sizes {
  C sizes[kBins];

  FASTZOO_DEVICE Sizes(Values& values, int raw, int, int) {
#pragma unroll
    for (int j = 0; j < kBins; ++j) sizes[j] = values[raw + j];
  }
  FASTZOO_DEVICE C& operator[](int j) { return sizes[j]; }
  FASTZOO_DEVICE const C& operator[](int j) const { return sizes[j]; }
};
template <class C, class Values>
struct Sizes<C, 0, Values> {
  Values& values;
  int at;

  FASTZOO_DEVICE Sizes(Values& values, int raw, int at, int bins) : values(values), at(at) {
    if (raw == at) return;
    for (int j = 0; j < bins; ++j) values[at + j] = values[raw + j];
  }
  FASTZOO_DEVICE C& operator[](int j) const { return values[at + j]; }
};

// An element's bin, whose derivatives are taken once it is known.
template <class S>
struct Located {
  using C = typename S::C;
  using OwnSizes = Sizes<C, S::kBins, SharedArray<C, S::kValues>>;
  struct NoDerivatives {
    FASTZOO_DEVICE C operator[](int) const { return C{0}; }
  };

  int widths, heights, derivatives;  // where the raw ones begin
  OwnSizes width_sizes, height_sizes;
  C width_sum, height_sum;
  math::SplineBin<C> bin;
  int lower, upper;  // which derivatives it has; -1 for none
  C lower_raw, upper_raw;

  // Where `keeps`, raw sizes stay as they are.
  FASTZOO_DEVICE Located(const Splines<S>& in, SharedArray<C, S::kValues>& values, bool keeps, C at)
      : widths(static_cast<int>(threadIdx.x) * in.pitch),
        heights(widths + in.bins),
        derivatives(heights + in.bins),
        width_sizes(values, widths, keeps ? exponentials(in) : widths, in.bins),
        height_sizes(values, heights, keeps ? exponentials(in) + in.bins : heights, in.bins) {
    constexpr int kBins = S::kBins;
    width_sum =
        math::spline_exponentials<S::kConvention, kBins, C, C>(in.box.x, in.bins, width_sizes);
    height_sum =
        math::spline_exponentials<S::kConvention, kBins, C, C>(in.box.y, in.bins, height_sizes);
    bin = math::spline_bin<kBins, S::kInverse>(in.box, in.bins, width_sizes, width_sum,
                                               height_sizes, height_sum, NoDerivatives{}, at);
    const int index = static_cast<int>(bin.index);
    lower = math::spline_derivative_of(in.tails, in.bins, index);
    upper = math::spline_derivative_of(in.tails, in.bins, index + 1);
    lower_raw = lower < 0 ? C{0} : values[derivatives + lower];
    upper_raw = upper < 0 ? C{0} : values[derivatives + upper];
    bin.d0 = lower_raw;
    bin.d1 = upper_raw;
    math::spline_finish_bin<S::kConvention>(in.box, in.tails, in.bins, bin);
  }

 private:
  FASTZOO_DEVICE int exponentials(const Splines<S>& in) const {
    return derivatives + math::spline_derivatives(in.tails, in.bins);
  }
};

// What splines_map writes. `logdet` is of elements, or of rows; then `parts` has, of each tile,
// what belongs to a row that began before it and to one that goes on after it.
template <class T>
struct Images {
  T* y;
  ComputeOf<T>* logdet;
  ComputeOf<T>* parts;
  bool sums;
};

// Rows that are whole in the tile are done.
template <class S>
FASTZOO_DEVICE void add_up(const Elements& elements, TileArrays<S>& tile,
                           const Images<typename S::T>& out,
                           SharedArray<typename S::C, kThreads>& logs) {
  using C = typename S::C;
  const int thread = threadIdx.x;
  const int lanes = 1 << elements.log_lanes, lane = thread & (lanes - 1);
  const int count = elements.in_tile();
  const int64_t first_row = tile.rows[0], before = tile.columns[0];
  const int segments = static_cast<int>(tile.rows[count - 1] - first_row) + 1;
  for (int first = 0; first < segments; first += kThreads >> elements.log_lanes) {
    const int segment = first + (thread >> elements.log_lanes);
    const int64_t from = segment * elements.changing - before, to = from + elements.changing;
    C sum = 0;
    if (segment < segments) {
      const int end = to < count ? static_cast<int>(to) : count;
      for (int i = (from > 0 ? static_cast<int>(from) : 0) + lane; i < end; i += lanes) {
        sum += logs[i];
      }
    }
    for (int flip = lanes / 2; flip > 0; flip /= 2) sum += shuffle_xor(sum, flip);
    if (segment >= segments || lane != 0) continue;
    if (from >= 0 && to <= count) {
      out.logdet[first_row + segment] = sum;
    } else {
      out.parts[2 * int64_t{blockIdx.x} + (from >= 0 ? 1 : 0)] = sum;
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::kBins > 0 ? 7 : 4)
    splines_map(Splines<S> in, Images<typename S::T> out) {
  using T = typename S::T;
  using C = typename S::C;
  __shared__ TileArrays<S> tile;
  __shared__ SharedArray<C, kThreads> logs;
  const Place place(in.elements);
  const C at = place.exists ? static_cast<C>(in.x[place.in_x]) : C{0};
  read_tile(in, place, tile);
  if (place.exists) {
    const Located<S> located(in, tile.values, false, at);
    const auto point = math::spline_point<S::kInverse, C>(located.bin, at);
    const auto found = math::spline_value<S::kInverse>(in.box, in.tails, located.bin, point, at);
    out.y[place.in_x] = static_cast<T>(found.value);
    if (out.sums) {
      logs[threadIdx.x] = found.log_slope;
    } else {
      out.logdet[place.in_x] = found.log_slope;
    }
  }
  if (!out.sums) return;
  sync_block();
  add_up<S>(in.elements, tile, out, logs);
}

constexpr int kJoinThreads = 256;

// Of rows that are not whole in one tile. A thread a row, or a block.
template <class C>
__global__ void __launch_bounds__(kJoinThreads)
    splines_join(Elements elements, bool by_block, const C* parts, C* logdet) {
  __shared__ SharedArray<double, kJoinThreads / kWarpSize> sums;
  const int64_t row = by_block ? blockIdx.x : int64_t{blockIdx.x} * kJoinThreads + threadIdx.x;
  if (row >= elements.rows) return;
  const int64_t begin = row * elements.changing;
  const int64_t first = begin / elements.tile;
  const int64_t last = (begin + elements.changing - 1) / elements.tile;
  if (first == last) return;
  double sum = 0;
#pragma unroll 8
  for (int64_t tile = first + 1 + (by_block ? threadIdx.x : 0); tile <= last;
       tile += by_block ? kJoinThreads : 1) {
    sum += parts[2 * tile];
  }
  if (by_block) sum = block_sum(sum, sums);
  if (!by_block || threadIdx.x == 0) logdet[row] = static_cast<C>(parts[2 * first + 1] + sum);
}

template <class T>
struct Slopes {
  const T* y;
  const ComputeOf<T>* logdet;
  bool sums;  // logdet is of rows, not of elements
  T* x;
  Gradients<T> parameters[kParts];
};

template <class S>
__global__ void __launch_bounds__(kThreads, S::kBins > 0 ? 6 : 4)
    splines_gradient(Splines<S> in, Slopes<typename S::T> grads) {
  using T = typename S::T;
  using C = typename S::C;
  __shared__ TileArrays<S> tile;
  const Place place(in.elements);
  C at = 0, by_value = 0, by_log = 0;
  if (place.exists) {
    at = static_cast<C>(in.x[place.in_x]);
    by_value = static_cast<C>(grads.y[place.in_x]);
    by_log = grads.logdet[grads.sums ? place.row : place.in_x];
  }
  read_tile(in, place, tile);
  if (place.exists) {
    auto& values = tile.values;
    const Located<S> located(in, values, S::kClips, at);
    const math::SplineBin<C>& bin = located.bin;
    const C lower = math::spline_derivative_slope<S::kConvention>(in.box, located.lower_raw);
    const C upper = math::spline_derivative_slope<S::kConvention>(in.box, located.upper_raw);
    const auto point = math::spline_point<S::kInverse, C>(bin, at);
    const auto by = math::spline_adjoint<S::kInverse, C>(bin, point, by_value, by_log);
    const auto by_widths =
        math::spline_spread<C>(in.box.x, bin, bin.x, in.bins, located.width_sum, by.x0, by.x1);
    const auto by_heights =
        math::spline_spread<C>(in.box.y, bin, bin.y, in.bins, located.height_sum, by.y0, by.y1);
    const math::SplineAxis<C>& axis = S::kInverse ? in.box.y : in.box.x;
    const auto inside = [&](C value) { return math::spline_inside<C>(axis, at, value, C{0}); };
    math::spline_loop<S::kBins>(in.bins, [&](int j) {
      C by_width = math::spline_spread_to<C>(by_widths, j, located.width_sizes[j]);
      C by_height = math::spline_spread_to<C>(by_heights, j, located.height_sizes[j]);
      if constexpr (S::kClips) {
        by_width *= math::spline_clip_slope(in.box.x.clip, values[located.widths + j]);
        by_height *= math::spline_clip_slope(in.box.y.clip, values[located.heights + j]);
      }
      values[located.widths + j] = inside(by_width);
      values[located.heights + j] = inside(by_height);
    });
    const int derivatives = math::spline_derivatives(in.tails, in.bins);
    for (int j = 0; j < derivatives; ++j) values[located.derivatives + j] = 0;
    if (located.lower >= 0) values[located.derivatives + located.lower] = inside(by.d0 * lower);
    if (located.upper >= 0) values[located.derivatives + located.upper] += inside(by.d1 * upper);
    const C outside = in.tails == SplineTails::none ? C{0} : by_value;
    grads.x[place.in_x] = static_cast<T>(math::spline_inside<C>(axis, at, by.at, outside));
  }
  sync_block();
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    if (grads.parameters[p].count > 0) write_part(in, grads.parameters[p], tile);
  }
}

constexpr int kPassThreads = 256;

// `logs`, of elements, may be null.
template <class T>
__global__ void __launch_bounds__(kPassThreads)
    splines_pass(Elements elements, const T* from, T* to, ComputeOf<T>* logs) {
  const int64_t i = int64_t{blockIdx.x} * kPassThreads + threadIdx.x;
  const int64_t passing = elements.columns - elements.changing;
  const int64_t row = i / passing, own = i - row * passing;
  if (row >= elements.rows) return;
  const int64_t column = own < elements.begin ? own : own + elements.changing;
  const int64_t at = row * elements.columns + column;
  to[at] = from[at];
  if (logs != nullptr) logs[at] = 0;
}

// ---- the operators ------------------------------------------------------------------------------

// What both operators are told.
struct Call {
  const Tensor& x;
  const Tensor& widths;
  const Tensor& heights;
  const Tensor& derivatives;
  int64_t begin, end, bins;
  double left, right, bottom, top, min_width, min_height, min_derivative;
  const std::string& convention;
  const std::string& tails;
  bool inverse;

  bool packed() const { return heights.dim() != 3; }
  Elements elements() const { return {x.size(0), x.size(1), begin, end - begin, 0, 0}; }
};

void set_part(Part& part, int64_t count, int64_t place) {
  part.count = static_cast<int>(count);
  part.place = static_cast<int>(place);
  part.over = count > 0 ? static_cast<uint32_t>((uint64_t{1} << 31) / count) + 1 : 0;
}

template <class T>
void set_parameters(Parameters<T>& part, const Tensor& tensor, const Elements& elements,
                    int64_t count, int64_t place) {
  set_part(part, count, place);
  part.data = static_cast<const T*>(tensor.const_data_ptr());
  part.row = tensor.stride(0);
  part.column = tensor.stride(1);
  part.flat = (elements.changing == 1 || part.column == count) &&
              (elements.rows == 1 || part.row == elements.changing * count) &&
              reinterpret_cast<uintptr_t>(part.data) % 16 == 0;
}

// Parameters that are slices of one tensor that has them side by side are read as that is.
template <class T>
void set_all_parameters(Parameters<T> (&parts)[kParts], const Call& call, int64_t derivatives) {
  const Elements elements = call.elements();
  const int64_t bins = call.bins, all = 2 * bins + derivatives;
  for (Parameters<T>& part : parts) part = {{}, nullptr, 0, 0, true};
  const auto data = [](const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
  };
  const auto follows = [&](const Tensor& tensor, int64_t place) {
    return data(tensor) == data(call.widths) + place && tensor.stride(0) == call.widths.stride(0) &&
           tensor.stride(1) == call.widths.stride(1);
  };
  if (call.packed() || (follows(call.heights, bins) && follows(call.derivatives, 2 * bins))) {
    return set_parameters(parts[0], call.widths, elements, all, 0);
  }
  set_parameters(parts[0], call.widths, elements, bins, 0);
  set_parameters(parts[1], call.heights, elements, bins, bins);
  if (derivatives > 0) {
    set_parameters(parts[2], call.derivatives, elements, derivatives, 2 * bins);
  }
}

// Calls body(splines, Scheme{}) with a Splines<Scheme>. `keeps`: raw sizes are wanted once more.
template <class Body>
void dispatch(const Call& call, bool keeps, const Body& body) {
  SplineConvention convention{};
  SplineTails tails{};
  STD_TORCH_CHECK(math::spline_convention_named(call.convention.c_str(), convention),
                  "fastzoo: rational_quadratic_spline: unknown convention ", call.convention);
  STD_TORCH_CHECK(math::spline_tails_named(call.tails.c_str(), tails),
                  "fastzoo: rational_quadratic_spline: unknown tails ", call.tails);
  const int bins = static_cast<int>(call.bins);
  const int derivatives = math::spline_derivatives(tails, bins);
  const auto with = [&](auto scheme) {
    using S = decltype(scheme);
    using T = typename S::T;
    const bool doubles = keeps && S::kClips && S::kBins == 0;
    const int64_t pitch = (2 * call.bins + derivatives + (doubles ? 2 * call.bins : 0)) | 1;
    const int64_t fitting = S::kValues / pitch / kTileUnit * kTileUnit;
    STD_TORCH_CHECK(fitting > 0, "fastzoo: rational_quadratic_spline: fewer bins expected than ",
                    call.bins);
    Splines<S> in{call.elements(),
                  math::spline_box<typename S::C>(convention, bins, call.left, call.right,
                                                  call.bottom, call.top, call.min_width,
                                                  call.min_height, call.min_derivative),
                  tails,
                  bins,
                  static_cast<int>(pitch),
                  static_cast<const T*>(call.x.const_data_ptr()),
                  {}};
    Elements& elements = in.elements;
    elements.tile = static_cast<int>(std::min(fitting, int64_t{kThreads}));
    while (elements.log_lanes < kLogWarp && 1 << elements.log_lanes < elements.changing) {
      ++elements.log_lanes;
    }
    set_all_parameters(in.parameters, call, derivatives);
    body(in, scheme);
  };
  const auto with_direction = [&](auto type, auto convention_of, auto bins_of) {
    using T = decltype(type);
    constexpr SplineConvention kConvention = decltype(convention_of)::value;
    constexpr int kBins = decltype(bins_of)::value;
    if (call.inverse) return with(Scheme<T, kConvention, kBins, true>{});
    with(Scheme<T, kConvention, kBins, false>{});
  };
  const auto with_bins = [&](auto type, auto convention_of) {
    if constexpr (!std::is_same_v<decltype(type), double>) {
      if (bins == kTunedBins) {
        return with_direction(type, convention_of, std::integral_constant<int, kTunedBins>{});
      }
    }
    with_direction(type, convention_of, std::integral_constant<int, 0>{});
  };
  dispatch_float(call.x.scalar_type(), "rational_quadratic_spline", [&](auto type) {
    constexpr auto kNflows = SplineConvention::nflows, kZuko = SplineConvention::zuko;
    if (convention == kZuko) {
      return with_bins(type, std::integral_constant<SplineConvention, kZuko>{});
    }
    with_bins(type, std::integral_constant<SplineConvention, kNflows>{});
  });
}

template <class T>
void pass(const Stream& stream, const Elements& elements, const T* from, T* to,
          ComputeOf<T>* logs) {
  const int64_t passing = elements.rows * (elements.columns - elements.changing);
  if (passing == 0) return;
  stream.launch("splines_pass", splines_pass<T>, blocks_for(passing, kPassThreads), kPassThreads,
                elements, from, to, logs);
}

std::tuple<Tensor, Tensor> rational_quadratic_spline(
    const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
    int64_t begin, int64_t end, int64_t bins, double left, double right, double bottom, double top,
    double min_width, double min_height, double min_derivative, const std::string& convention,
    const std::string& tails, bool inverse, bool sum_logdet) {
  const ScalarType compute = compute_dtype(x.scalar_type());
  const int64_t rows = x.size(0), columns = x.size(1), changing = rows * (end - begin);
  const Tensor y = empty(x, {rows, columns}, x.scalar_type());
  const Tensor like = empty(x, {0}, compute);
  const Tensor logdet = !sum_logdet     ? empty(x, {rows, columns}, compute)
                        : changing == 0 ? torch::stable::new_zeros(like, {rows})
                                        : empty(x, {rows}, compute);
  if (x.numel() == 0) return {y, logdet};
  const Tensor dense = torch::stable::contiguous(x);
  const Stream stream(x);
  const Call call{dense,      widths,         heights,    derivatives, begin,  end,
                  bins,       left,           right,      bottom,      top,    min_width,
                  min_height, min_derivative, convention, tails,       inverse};
  dispatch(call, false, [&](const auto& in, auto scheme) {
    using S = decltype(scheme);
    using T = typename S::T;
    using C = typename S::C;
    const Elements& elements = in.elements;
    Images<T> out{static_cast<T*>(y.mutable_data_ptr()), static_cast<C*>(logdet.mutable_data_ptr()),
                  nullptr, sum_logdet};
    pass(stream, elements, in.x, out.y, sum_logdet ? nullptr : out.logdet);
    if (changing == 0) return;
    const unsigned tiles = blocks_for(changing, elements.tile);
    const bool joins = sum_logdet && elements.tile % elements.changing != 0;
    const Tensor parts = empty(like, {joins ? int64_t{tiles} : 0, 2}, compute);
    out.parts = optional_data<C>(parts);
    stream.launch("splines_map", splines_map<S>, tiles, kThreads, in, out);
    if (!joins) return;
    const bool by_block = elements.changing > 8 * elements.tile;
    stream.launch("splines_join", splines_join<C>, blocks_for(rows, by_block ? 1 : kJoinThreads),
                  kJoinThreads, elements, by_block, out.parts, out.logdet);
  });
  return {y, logdet};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rational_quadratic_spline_backward(
    const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Tensor& widths,
    const Tensor& heights, const Tensor& derivatives, int64_t begin, int64_t end, int64_t bins,
    double left, double right, double bottom, double top, double min_width, double min_height,
    double min_derivative, const std::string& convention, const std::string& tails, bool inverse,
    bool sum_logdet) {
  using torch::stable::contiguous;
  const auto grad_of = [&](const Tensor& parameter) {
    return parameter.dim() == 3
               ? empty(x, {parameter.size(0), parameter.size(1), parameter.size(2)},
                       x.scalar_type())
               : empty(x, {0}, x.scalar_type());
  };
  const Tensor grad_x = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  const Tensor grads[kParts] = {grad_of(widths), grad_of(heights), grad_of(derivatives)};
  const auto results = std::make_tuple(grad_x, grads[0], grads[1], grads[2]);
  if (x.numel() == 0) return results;
  const Tensor dense = contiguous(x), by_y = contiguous(grad_y), by_log = contiguous(grad_logdet);
  const Stream stream(x);
  const Call call{dense,      widths,         heights,    derivatives, begin,  end,
                  bins,       left,           right,      bottom,      top,    min_width,
                  min_height, min_derivative, convention, tails,       inverse};
  dispatch(call, true, [&](const auto& in, auto scheme) {
    using S = decltype(scheme);
    using T = typename S::T;
    using C = typename S::C;
    const Elements& elements = in.elements;
    Slopes<T> slopes{static_cast<const T*>(by_y.const_data_ptr()),
                     static_cast<const C*>(by_log.const_data_ptr()),
                     sum_logdet,
                     static_cast<T*>(grad_x.mutable_data_ptr()),
                     {}};
    int64_t place = 0;
    for (int p = 0; p < kParts; ++p) {
      const int64_t count = grads[p].dim() == 3 ? grads[p].size(2) : 0;
      set_part(slopes.parameters[p], count, place);
      slopes.parameters[p].data = optional_data<T>(grads[p]);
      place += count;
    }
    pass<T>(stream, elements, slopes.y, slopes.x, nullptr);
    if (elements.rows * elements.changing == 0) return;
    stream.launch("splines_gradient", splines_gradient<S>,
                  blocks_for(elements.rows * elements.changing, elements.tile), kThreads, in,
                  slopes);
  });
  return results;
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  using namespace fastzoo::cuda;
  fastzoo::implement<rational_quadratic_spline>(m, "rational_quadratic_spline.cuda");
  fastzoo::implement<rational_quadratic_spline_backward>(m,
                                                         "rational_quadratic_spline_backward.cuda");
}
