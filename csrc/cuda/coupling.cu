// Elementwise bijections with their log-determinants. Nothing but the operands is read, once, and
// what is asked for is written, once.
//   coupling_map       a map or its inverse, and the log-determinants added up
//   coupling_join      the parts of rows that several blocks had
//   coupling_gradient  the gradients of the operands
#include "../math/coupling.h"

#include <algorithm>
#include <string>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/rows.h"

namespace fastzoo::cuda {
namespace {

constexpr int kLogThreads = 8;
constexpr int kThreads = 1 << kLogThreads;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLogWarp = 5;

// A lane goes over a row at most this often, so that no sum in C has more than 1024 terms.
constexpr int kTurns = 16;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Blocks of a multiprocessor, which leaves a thread the registers that it wants.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;

// How many pieces a thread has under way at once.
template <int piece>
constexpr int kEach = piece == 1 ? 2 : 1;

// Parameters of the columns that change; null where the map has none.
template <class T>
struct Strided {
  const T* data;
  int64_t row, column;  // steps
};

// What both kernels read.
template <class T>
struct Operands {
  const T* x;  // [rows, columns]
  Strided<T> shift, scale;
  const T* pairs;  // unless null, where shifts and scales lie one beside the other
  bool scale_first;
  Strided<uint8_t> mask;
  int64_t rows, columns, begin, end;
  int log_lanes;  // of those that share a row; kLogThreads where a block has part of one
};

template <int n, class T>
struct Piece {
  T values[n];
  FASTZOO_DEVICE T& operator[](int i) { return values[i]; }
  FASTZOO_DEVICE const T& operator[](int i) const { return values[i]; }
};

template <int n, class T>
FASTZOO_DEVICE Piece<n, T> load_piece(const T* from) {
  Piece<n, T> piece;
  if constexpr (n * sizeof(T) < 4) {
#pragma unroll
    for (int i = 0; i < n; ++i) piece[i] = from[i];
  } else {
    const Vector<T, n> vector = load_vector<n>(from);
#pragma unroll
    for (int i = 0; i < n; ++i) piece[i] = vector[i];
  }
  return piece;
}

template <int n, class T>
FASTZOO_DEVICE void store_piece(T* to, const Piece<n, T>& piece) {
  if constexpr (n * sizeof(T) < 4) {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = piece[i];
  } else {
    Vector<T, n> vector;
#pragma unroll
    for (int i = 0; i < n; ++i) vector[i] = piece[i];
    store_global(to, vector);
  }
}

template <int n, class T>
FASTZOO_DEVICE Piece<n, T> load_strided(const Strided<T>& in, int64_t row, int64_t column) {
  if (in.data == nullptr) return {};
  return load_piece<n>(in.data + row * in.row + column * in.column);
}

// The pieces of a thread: kEach at a time, of rows that are apart, or of one where it is wide.
template <int piece>
struct Places {
  int64_t row, row_step;
  int64_t column, column_step;
  int64_t turn;  // columns from one time to the next

  template <class T>
  FASTZOO_DEVICE explicit Places(const Operands<T>& in) {
    const int thread = threadIdx.x;
    const int lanes = 1 << in.log_lanes;
    if (in.log_lanes == kLogThreads) {
      row = blockIdx.x;
      row_step = 0;
      column_step = kThreads * piece;
      turn = int64_t{gridDim.y} * kEach<piece> * column_step;
      column = blockIdx.y * (kEach<piece> * column_step) + thread * piece;
    } else {
      row_step = kThreads >> in.log_lanes;
      row = int64_t{blockIdx.x} * kEach<piece> * row_step + (thread >> in.log_lanes);
      column_step = 0;
      turn = lanes * piece;
      column = (thread & (lanes - 1)) * piece;
    }
  }
  FASTZOO_DEVICE int64_t row_of(int i) const { return row + i * row_step; }
  FASTZOO_DEVICE int64_t column_of(int i) const { return column + i * column_step; }
  template <class T>
  FASTZOO_DEVICE bool exists(const Operands<T>& in, int i) const {
    return row_of(i) < in.rows && column_of(i) < in.columns;
  }
};

// What a thread reads of a place; `inside` the columns that change, as its elements are or are not.
template <class Map, class T, int n>
struct Operand {
  Piece<n, T> x, shift, scale;
  Piece<n, uint8_t> mask;
  bool inside;

  FASTZOO_DEVICE void load(const Operands<T>& in, int64_t row, int64_t column) {
    x = load_piece<n>(in.x + row * in.columns + column);
    inside = column >= in.begin && column < in.end;
    shift = scale = {};
    mask = {};
    if (!inside) return;
    const int64_t own = column - in.begin;
    if (Map::kParameters > 1 && n > 1 && in.pairs != nullptr) {
      const auto pairs = load_piece<2 * n>(in.pairs + row * in.shift.row + 2 * own);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        shift[i] = in.scale_first ? pairs[2 * i + 1] : pairs[2 * i];
        scale[i] = in.scale_first ? pairs[2 * i] : pairs[2 * i + 1];
      }
    } else {
      if constexpr (Map::kParameters > 0) shift = load_strided<n>(in.shift, row, own);
      if constexpr (Map::kParameters > 1) scale = load_strided<n>(in.scale, row, own);
    }
    mask = load_strided<n>(in.mask, row, own);
  }
};

// What coupling_map writes; `logdet` is [rows, columns], or the sums of each row's parts
// [rows, gridDim.y].
template <class T>
struct Images {
  T* y;
  ComputeOf<T>* logdet;
  bool sums;
};

template <class Map, class T, int n>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    coupling_map(math::CouplingConstants<ComputeOf<T>> constants, Operands<T> in, Images<T> out) {
  using C = ComputeOf<T>;
  __shared__ SharedArray<C, kWarps> parts;
  const Places<n> places(in);
  const int thread = threadIdx.x;
  C sums[kEach<n>] = {};
  for (Places<n> at = places; at.column < in.columns; at.column += at.turn) {
    Operand<Map, T, n> operands[kEach<n>]{};
#pragma unroll
    for (int i = 0; i < kEach<n>; ++i) {
      if (at.exists(in, i)) operands[i].load(in, at.row_of(i), at.column_of(i));
    }
#pragma unroll
    for (int i = 0; i < kEach<n>; ++i) {
      if (!at.exists(in, i)) continue;
      const Operand<Map, T, n>& own = operands[i];
      Piece<n, T> y = own.x;
      Piece<n, C> logs{};
      if (own.inside) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const auto mapped =
              Map::apply(constants, static_cast<C>(own.x[j]), static_cast<C>(own.shift[j]),
                         static_cast<C>(own.scale[j]));
          const bool changes = own.mask[j] == 0;
          y[j] = changes ? static_cast<T>(mapped.value) : own.x[j];
          logs[j] = changes ? mapped.log : C{0};
        }
      }
      const int64_t place = at.row_of(i) * in.columns + at.column_of(i);
      store_piece(out.y + place, y);
      if (!out.sums) {
        store_piece(out.logdet + place, logs);
        continue;
      }
#pragma unroll
      for (int j = 0; j < n; ++j) sums[i] += logs[j];
    }
  }
  if (!out.sums) return;

  if (in.log_lanes < kLogThreads) {
    const int lanes = 1 << in.log_lanes;
#pragma unroll
    for (int i = 0; i < kEach<n>; ++i) {
      for (int flip = lanes / 2; flip > 0; flip /= 2) sums[i] += shuffle_xor(sums[i], flip);
      if ((thread & (lanes - 1)) == 0 && places.row_of(i) < in.rows) {
        out.logdet[places.row_of(i)] = sums[i];
      }
    }
    return;
  }
#pragma unroll
  for (int i = 1; i < kEach<n>; ++i) sums[0] += sums[i];
  const C sum = block_sum(sums[0], parts);
  if (thread == 0) out.logdet[places.row * gridDim.y + blockIdx.y] = sum;
}

// A block a row of parts.
template <class C>
__global__ void __launch_bounds__(kThreads)
    coupling_join(const C* parts, int64_t count, C* logdet) {
  __shared__ SharedArray<double, kWarps> sums;
  const int64_t row = blockIdx.x;
  double sum = 0;
#pragma unroll 8
  for (int64_t part = threadIdx.x; part < count; part += kThreads) sum += parts[row * count + part];
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) logdet[row] = static_cast<C>(sum);
}

template <class T>
struct Gradients {
  const T* y;
  const ComputeOf<T>* logdet;
  bool sums;  // logdet is of rows, not of elements
  T* x;
  T* shift;  // dense, of the columns that change
  T* scale;
};

template <class Map, class T, int n>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    coupling_gradient(math::CouplingConstants<ComputeOf<T>> constants, Operands<T> in,
                      Gradients<T> grads) {
  using C = ComputeOf<T>;
  const Places<n> places(in);
  for (Places<n> at = places; at.column < in.columns; at.column += at.turn) {
    Operand<Map, T, n> operands[kEach<n>]{};
    Piece<n, T> by_y[kEach<n>]{};
    Piece<n, C> by_log[kEach<n>]{};
#pragma unroll
    for (int i = 0; i < kEach<n>; ++i) {
      if (!at.exists(in, i)) continue;
      const int64_t place = at.row_of(i) * in.columns + at.column_of(i);
      operands[i].load(in, at.row_of(i), at.column_of(i));
      by_y[i] = load_piece<n>(grads.y + place);
      if (grads.sums) {
        const C of_row = grads.logdet[at.row_of(i)];
#pragma unroll
        for (int j = 0; j < n; ++j) by_log[i][j] = of_row;
      } else {
        by_log[i] = load_piece<n>(grads.logdet + place);
      }
    }
#pragma unroll
    for (int i = 0; i < kEach<n>; ++i) {
      if (!at.exists(in, i)) continue;
      const Operand<Map, T, n>& own = operands[i];
      const int64_t row = at.row_of(i), column = at.column_of(i);
      Piece<n, T> by_x = by_y[i];
      if (own.inside) {
        Piece<n, T> by_shift{}, by_scale{};
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const auto gradients = Map::gradients(
              constants, static_cast<C>(by_y[i][j]), by_log[i][j], static_cast<C>(own.x[j]),
              static_cast<C>(own.shift[j]), static_cast<C>(own.scale[j]));
          const bool changes = own.mask[j] == 0;
          by_x[j] = changes ? static_cast<T>(gradients.x) : by_y[i][j];
          by_shift[j] = static_cast<T>(changes ? gradients.shift : C{0});
          by_scale[j] = static_cast<T>(changes ? gradients.scale : C{0});
        }
        const int64_t parameter = row * (in.end - in.begin) + column - in.begin;
        if constexpr (Map::kParameters > 0) store_piece(grads.shift + parameter, by_shift);
        if constexpr (Map::kParameters > 1) store_piece(grads.scale + parameter, by_scale);
      }
      store_piece(grads.x + row * in.columns + column, by_x);
    }
  }
}

// ---- the operators ------------------------------------------------------------------------------

template <class T>
Strided<T> strided(const Tensor& tensor) {
  const T* data = optional_data<const T>(tensor);
  if (data == nullptr) return {nullptr, 0, 0};
  return {data, tensor.dim() == 2 ? tensor.stride(0) : 0, tensor.stride(-1)};
}

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Whether n neighbouring elements are one access, wherever they begin at a multiple of n.
template <class T>
bool in_vectors(const Strided<T>& in, int n) {
  return in.data == nullptr || (in.column == 1 && in.row % n == 0 &&
                                reinterpret_cast<uintptr_t>(in.data) % (n * sizeof(T)) == 0);
}
template <class T>
bool in_vectors(const Operands<T>& in) {
  constexpr int n = kVector<T>;
  const bool parameters = in.pairs == nullptr
                              ? in_vectors(in.shift, n) && in_vectors(in.scale, n)
                              : in_vectors(Strided<T>{in.pairs, in.shift.row, 1}, n);
  return in.columns % n == 0 && in.begin % n == 0 && in.end % n == 0 && parameters &&
         in_vectors(Strided<T>{in.x, in.columns, 1}, n) && in_vectors(in.mask, n);
}

// The first of both, where one is beside the other: as [R, m, 2] has them.
template <class T>
const T* pairs_of(const Strided<T>& shift, const Strided<T>& scale) {
  const bool alike = shift.row == scale.row && shift.column == 2 && scale.column == 2;
  if (!alike || (scale.data != shift.data + 1 && shift.data != scale.data + 1)) return nullptr;
  return std::min(shift.data, scale.data);
}

// The fewest lanes that reach over a row; a block where a warp would go over it often.
int log_lanes_for(int64_t pieces) {
  if (pieces > kWarpSize * kTurns / 2) return kLogThreads;
  int log = 0;
  while (log < kLogWarp && int64_t{1} << log < pieces) ++log;
  return log;
}

// A row's parts, no longer than kTurns allows and enough of them for all units.
dim3 grid_for(int64_t rows, int64_t pieces, int each, int log_lanes) {
  if (log_lanes < kLogThreads) return dim3(blocks_for(rows, int64_t{each} * kThreads >> log_lanes));
  const int64_t turns = (pieces + each * kThreads - 1) / (each * kThreads);
  const int64_t wanted = (32 * kManyBlocks + rows - 1) / rows;
  const int64_t parts = std::max((turns + kTurns - 1) / kTurns, std::min(turns, wanted));
  return dim3(blocks_for(rows, 1), static_cast<unsigned>(std::min(parts, int64_t{65535})));
}

// Calls body(Map{}, T{}, std::integral_constant<int, n>{}, operands, grid). `aligned`: whether what
// else is read is.
template <class Body>
void dispatch(const std::string& name, const Tensor& x, const Tensor& shift, const Tensor& scale,
              const Tensor& mask, int64_t begin, int64_t end, bool aligned, const Body& body) {
  math::CouplingMap map{};
  STD_TORCH_CHECK(math::coupling_map_named(name.c_str(), map), "fastzoo: coupling: unknown map ",
                  name);
  dispatch_float(x.scalar_type(), "coupling", [&](auto type) {
    using T = decltype(type);
    Operands<T> in{static_cast<const T*>(x.const_data_ptr()),
                   strided<T>(shift),
                   strided<T>(scale),
                   nullptr,
                   false,
                   {},
                   x.size(0),
                   x.size(1),
                   begin,
                   end,
                   0};
    in.pairs = pairs_of(in.shift, in.scale);
    in.scale_first = in.pairs == in.scale.data;
    const Strided<bool> masks = strided<bool>(mask);
    in.mask = {reinterpret_cast<const uint8_t*>(masks.data), masks.row, masks.column};
    math::with_coupling_map(map, [&](auto functor) {
      const auto launch = [&](auto piece) {
        constexpr int n = decltype(piece)::value;
        const int64_t pieces = (in.columns + n - 1) / n;
        in.log_lanes = log_lanes_for(pieces);
        body(functor, type, piece, in, grid_for(in.rows, pieces, kEach<n>, in.log_lanes));
      };
      if (aligned && in_vectors(in)) {
        launch(std::integral_constant<int, kVector<T>>{});
      } else {
        launch(std::integral_constant<int, 1>{});
      }
    });
  });
}

std::tuple<Tensor, Tensor> coupling(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                    const Tensor& mask, int64_t begin, int64_t end,
                                    const std::string& map, double constant, double floor,
                                    bool shift_first, bool inverse, bool sum_logdet) {
  const ScalarType compute = compute_dtype(x.scalar_type());
  const int64_t rows = x.size(0), columns = x.size(1);
  const Tensor y = empty(x, {rows, columns}, x.scalar_type());
  const Tensor logdet = sum_logdet ? empty(x, {rows}, compute) : empty(x, {rows, columns}, compute);
  if (logdet.numel() == 0) return {y, logdet};
  const Tensor dense = torch::stable::contiguous(x);
  const Stream stream(x);
  dispatch(map, dense, shift, scale, mask, begin, end, true,
           [&](auto functor, auto type, auto piece, const auto& in, dim3 grid) {
             using T = decltype(type);
             using C = ComputeOf<T>;
             const bool joins = sum_logdet && grid.y > 1;
             const Tensor parts = joins ? empty(logdet, {rows, int64_t{grid.y}}, compute) : logdet;
             const Images<T> out{static_cast<T*>(y.mutable_data_ptr()),
                                 static_cast<C*>(parts.mutable_data_ptr()), sum_logdet};
             stream.launch(
                 "coupling_map", coupling_map<decltype(functor), T, decltype(piece)::value>, grid,
                 kThreads, math::coupling_constants<C>(constant, floor, shift_first, inverse), in,
                 out);
             if (!joins) return;
             stream.launch("coupling_join", coupling_join<C>, blocks_for(rows, 1), kThreads,
                           static_cast<const C*>(parts.const_data_ptr()), int64_t{grid.y},
                           static_cast<C*>(logdet.mutable_data_ptr()));
           });
  return {y, logdet};
}

std::tuple<Tensor, Tensor, Tensor> coupling_backward(
    const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Tensor& shift,
    const Tensor& scale, const Tensor& mask, int64_t begin, int64_t end, const std::string& map,
    double constant, double floor, bool shift_first, bool inverse, bool sum_logdet) {
  using torch::stable::contiguous;
  const auto grad_of = [&](const Tensor& parameter) {
    return parameter.dim() == 2 ? empty(x, {parameter.size(0), parameter.size(1)}, x.scalar_type())
                                : empty(x, {0}, x.scalar_type());
  };
  const Tensor grad_x = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  const Tensor grad_shift = grad_of(shift), grad_scale = grad_of(scale);
  if (x.numel() == 0) return {grad_x, grad_shift, grad_scale};
  const Tensor dense = contiguous(x), by_y = contiguous(grad_y), by_log = contiguous(grad_logdet);
  const Stream stream(x);
  const bool aligned = is_aligned(by_y) && is_aligned(by_log);
  dispatch(map, dense, shift, scale, mask, begin, end, aligned,
           [&](auto functor, auto type, auto piece, const auto& in, dim3 grid) {
             using T = decltype(type);
             using C = ComputeOf<T>;
             const Gradients<T> grads{static_cast<const T*>(by_y.const_data_ptr()),
                                      static_cast<const C*>(by_log.const_data_ptr()),
                                      sum_logdet,
                                      static_cast<T*>(grad_x.mutable_data_ptr()),
                                      optional_data<T>(grad_shift),
                                      optional_data<T>(grad_scale)};
             stream.launch(
                 "coupling_gradient",
                 coupling_gradient<decltype(functor), T, decltype(piece)::value>, grid, kThreads,
                 math::coupling_constants<C>(constant, floor, shift_first, inverse), in, grads);
           });
  return {grad_x, grad_shift, grad_scale};
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::coupling>(m, "coupling.cuda");
  fastzoo::implement<fastzoo::cuda::coupling_backward>(m, "coupling_backward.cuda");
}
