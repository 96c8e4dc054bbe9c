// Overlaps of boxes. Each with each in tiles: a thread has a column's box, and a block's threads go
// through the tile's rows together, which stand in shared memory with all that depends on one box
// alone. Gradients are summed within a tile, and then over the tiles.
#include "../math/boxes.h"

#include <string>
#include <tuple>
#include <type_traits>

#include "../math/rotated_boxes.h"
#include "../torch_abi.h"
#include "runtime/rows.h"

namespace fastzoo::cuda {
namespace {

using math::Measure;
using math::MeasuredBox;
using math::RotatedBox;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTileRows = 64;
constexpr int kTileColumns = kThreads;

// Boxes [count, 4].
template <class T>
struct Boxes {
  const T* data;
  int64_t count;
  bool aligned;  // rows can be read as vectors

  template <Measure kMeasure>
  FASTZOO_DEVICE MeasuredBox<ComputeOf<T>> get(int64_t i) const {
    using C = ComputeOf<T>;
    Vector<T, 4> corners;
    if (aligned) {
      corners = load_vector<4>(data + 4 * i);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) corners[k] = data[4 * i + k];
    }
    return math::measured_box<kMeasure>(static_cast<C>(corners[0]), static_cast<C>(corners[1]),
                                        static_cast<C>(corners[2]), static_cast<C>(corners[3]));
  }
};

template <class T>
Boxes<T> boxes_of(const Tensor& boxes) {
  const T* data = static_cast<const T*>(boxes.const_data_ptr());
  return {data, boxes.size(0), reinterpret_cast<uintptr_t>(data) % Vector<T, 4>::kAlignment == 0};
}

// Where a block's tile lies; the tiles of a row follow one another.
struct TilePlace {
  int64_t down, across;

  FASTZOO_DEVICE int64_t first_row() const { return down * kTileRows; }
  FASTZOO_DEVICE int64_t column() const { return across * kTileColumns + threadIdx.x; }
};

FASTZOO_HD int64_t tiles_of(int64_t boxes, int size) { return (boxes + size - 1) / size; }

FASTZOO_DEVICE TilePlace tile_place(int64_t columns) {
  const int64_t across = tiles_of(columns, kTileColumns);
  const int64_t index = blockIdx.x;
  return {index / across, index % across};
}

FASTZOO_DEVICE int rows_of_tile(int64_t first_row, int64_t rows) {
  return static_cast<int>(rows - first_row < kTileRows ? rows - first_row : kTileRows);
}

// The boxes of a tile's rows in shared memory.
template <class C>
struct RowBoxes {
  SharedArray<C, 4 * kTileRows> corners;
  SharedArray<C, 4 * kTileRows> rest;

  FASTZOO_DEVICE void put(int i, const MeasuredBox<C>& box) {
    corners.store(4 * i, Vector<C, 4>{{box.x1, box.y1, box.x2, box.y2}});
    rest.store(4 * i,
               Vector<C, 4>{{box.area, box.aspect, box.aspect_by_width, box.aspect_by_height}});
  }
  FASTZOO_DEVICE MeasuredBox<C> get(int i) {
    const Vector<C, 4> c = corners.template load<4>(4 * i);
    const Vector<C, 4> r = rest.template load<4>(4 * i);
    return {{c[0], c[1], c[2], c[3], r[0]}, c[2] - c[0], c[3] - c[1], r[1], r[2], r[3]};
  }
};

template <Measure kMeasure, class T, class C>
__global__ void __launch_bounds__(kThreads)
    overlap_each(Boxes<T> boxes1, Boxes<T> boxes2, math::Epsilon<C> eps, C* overlap) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= boxes1.count) return;
  overlap[i] = math::box_overlap<kMeasure>(boxes1.template get<kMeasure>(i),
                                           boxes2.template get<kMeasure>(i), eps)
                   .value;
}

template <class T, class C>
FASTZOO_DEVICE void store_gradient(T* to, const C (&gradient)[4]) {
  Vector<T, 4> row;
#pragma unroll
  for (int k = 0; k < 4; ++k) row[k] = static_cast<T>(gradient[k]);
  store_vector(to, row);
}

template <Measure kMeasure, class T, class C>
__global__ void __launch_bounds__(kThreads, 1)
    overlap_each_backward(const C* grad, Boxes<T> boxes1, Boxes<T> boxes2, math::Epsilon<C> eps,
                          T* grad1, T* grad2) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= boxes1.count) return;
  const auto result = math::box_overlap_gradients<kMeasure>(
      boxes1.template get<kMeasure>(i), boxes2.template get<kMeasure>(i), eps, grad[i]);
  store_gradient(grad1 + 4 * i, result.first);
  store_gradient(grad2 + 4 * i, result.second);
}

template <Measure kMeasure, class T, class C>
__global__ void __launch_bounds__(kThreads)
    overlap_pairs(Boxes<T> boxes1, Boxes<T> boxes2, math::Epsilon<C> eps, C* overlap) {
  __shared__ RowBoxes<C> row_boxes;
  const int thread = threadIdx.x;
  const TilePlace place = tile_place(boxes2.count);
  const int64_t first_row = place.first_row();
  const int64_t column = place.column();
  const int rows = rows_of_tile(first_row, boxes1.count);
  if (thread < rows) row_boxes.put(thread, boxes1.template get<kMeasure>(first_row + thread));
  sync_block();
  if (column >= boxes2.count) return;
  const MeasuredBox<C> own = boxes2.template get<kMeasure>(column);
#pragma unroll 4
  for (int i = 0; i < rows; ++i) {
    overlap[(first_row + i) * boxes2.count + column] =
        math::box_overlap<kMeasure>(row_boxes.get(i), own, eps).value;
  }
}

// The sums over a warp of four values: lanes 8 k to 8 k + 7 get that of value k.
template <class C>
FASTZOO_DEVICE C warp_sums(const C (&values)[4], int lane) {
  const bool upper = (lane & 16) != 0;
  const bool odd = (lane & 8) != 0;
  const C even_kept =
      (upper ? values[2] : values[0]) + shuffle_xor(upper ? values[0] : values[2], 16);
  const C odd_kept =
      (upper ? values[3] : values[1]) + shuffle_xor(upper ? values[1] : values[3], 16);
  C sum = (odd ? odd_kept : even_kept) + shuffle_xor(odd ? even_kept : odd_kept, 8);
  for (int flip = 4; flip > 0; flip /= 2) sum += shuffle_xor(sum, flip);
  return sum;
}

// sums1: [tiles across, n, 4], sums2: [tiles down, m, 4], of one tile each.
template <Measure kMeasure, class T, class C>
__global__ void __launch_bounds__(kThreads)
    overlap_pairs_backward(const C* grad, Boxes<T> boxes1, Boxes<T> boxes2, math::Epsilon<C> eps,
                           C* sums1, C* sums2) {
  __shared__ RowBoxes<C> row_boxes;
  __shared__ SharedArray<C, kWarps * kTileRows * 4> row_sums;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const TilePlace place = tile_place(boxes2.count);
  const int64_t first_row = place.first_row();
  const int64_t column = place.column();
  const bool exists = column < boxes2.count;
  const int rows = rows_of_tile(first_row, boxes1.count);
  if (thread < rows) row_boxes.put(thread, boxes1.template get<kMeasure>(first_row + thread));
  sync_block();
  MeasuredBox<C> own{};
  if (exists) own = boxes2.template get<kMeasure>(column);
  C column_sums[4] = {};
  for (int i = 0; i < rows; ++i) {
    math::BoxGradients<C> result{};
    if (exists) {
      result = math::box_overlap_gradients<kMeasure>(row_boxes.get(i), own, eps,
                                                     grad[(first_row + i) * boxes2.count + column]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) column_sums[k] += result.second[k];
    const C sum = warp_sums(result.first, lane);
    if (lane % 8 == 0) row_sums[(warp * kTileRows + i) * 4 + lane / 8] = sum;
  }
  sync_block();
  if (thread < 4 * rows) {
    C sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += row_sums[w * kTileRows * 4 + thread];
    sums1[4 * (place.across * boxes1.count + first_row) + thread] = sum;
  }
  if (exists) store_gradient(sums2 + 4 * (place.down * boxes2.count + column), column_sums);
}

// Adds up what the tiles left of each of `count` numbers.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    overlap_sums(const C* sums, int64_t tiles, int64_t count, T* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  C sum = 0;
#pragma unroll 8
  for (int64_t tile = 0; tile < tiles; ++tile) sum += sums[tile * count + i];
  out[i] = static_cast<T>(sum);
}

// Boxes [count, 5].
template <class T>
FASTZOO_DEVICE RotatedBox rotated_box_at(const T* boxes, int64_t i, bool degrees) {
  double numbers[5];
#pragma unroll
  for (int k = 0; k < 5; ++k) numbers[k] = static_cast<double>(boxes[5 * i + k]);
  return math::rotated_box(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], degrees);
}

template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    rotated_each(const T* boxes1, const T* boxes2, int64_t count, bool degrees, C* overlap) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  overlap[i] = static_cast<C>(
      math::rotated_iou(rotated_box_at(boxes1, i, degrees), rotated_box_at(boxes2, i, degrees)));
}

struct RotatedRows {
  static constexpr int kNumbers = 10;
  SharedArray<double, kNumbers * kTileRows> numbers;

  FASTZOO_DEVICE void put(int i, const RotatedBox& box) {
    numbers.store(kNumbers * i, Vector<double, 2>{{box.x, box.y}});
    numbers.store(kNumbers * i + 2, Vector<double, 2>{{box.width, box.height}});
    numbers.store(kNumbers * i + 4, Vector<double, 2>{{box.angle, box.sine}});
    numbers.store(kNumbers * i + 6, Vector<double, 2>{{box.cosine, box.radius}});
    numbers[kNumbers * i + 8] = box.area;
  }
  FASTZOO_DEVICE RotatedBox get(int i) {
    const Vector<double, 2> centre = numbers.load<2>(kNumbers * i);
    const Vector<double, 2> sides = numbers.load<2>(kNumbers * i + 2);
    const Vector<double, 2> turn = numbers.load<2>(kNumbers * i + 4);
    const Vector<double, 2> rest = numbers.load<2>(kNumbers * i + 6);
    const Vector<double, 2> area = numbers.load<2>(kNumbers * i + 8);
    return {centre[0], centre[1], sides[0], sides[1], turn[0], turn[1], rest[0], rest[1], area[0]};
  }
};

template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    rotated_pairs(const T* boxes1, int64_t n, const T* boxes2, int64_t m, bool degrees,
                  C* overlap) {
  __shared__ RotatedRows row_boxes;
  const int thread = threadIdx.x;
  const TilePlace place = tile_place(m);
  const int64_t first_row = place.first_row();
  const int64_t column = place.column();
  const int rows = rows_of_tile(first_row, n);
  if (thread < rows) row_boxes.put(thread, rotated_box_at(boxes1, first_row + thread, degrees));
  sync_block();
  if (column >= m) return;
  const RotatedBox own = rotated_box_at(boxes2, column, degrees);
  for (int i = 0; i < rows; ++i) {
    overlap[(first_row + i) * m + column] =
        static_cast<C>(math::rotated_iou(row_boxes.get(i), own));
  }
}

// Calls body(T{}, constant of the measure).
template <class Body>
void dispatch(ScalarType dtype, const std::string& name, const Body& body) {
  dispatch_float(dtype, "box_overlap", [&](auto type) {
    if (name == "iou") return body(type, std::integral_constant<Measure, Measure::iou>{});
    if (name == "giou") return body(type, std::integral_constant<Measure, Measure::giou>{});
    if (name == "diou") return body(type, std::integral_constant<Measure, Measure::diou>{});
    if (name == "ciou") return body(type, std::integral_constant<Measure, Measure::ciou>{});
    STD_TORCH_CHECK(false, "fastzoo: box_overlap: unknown measure ", name);
  });
}

unsigned tiles_for(int64_t n, int64_t m) {
  return blocks_for(tiles_of(n, kTileRows) * tiles_of(m, kTileColumns), 1);
}

Tensor empty_overlap(const Tensor& boxes1, const Tensor& boxes2, bool pairwise) {
  const ScalarType dtype = compute_dtype(boxes1.scalar_type());
  return pairwise ? empty(boxes1, {boxes1.size(0), boxes2.size(0)}, dtype)
                  : empty(boxes1, {boxes1.size(0)}, dtype);
}

template <class C>
math::Epsilon<C> epsilon_of(bool pairwise, double eps) {
  return {static_cast<C>(pairwise ? 0 : eps), static_cast<C>(eps)};
}

Tensor box_overlap(const Tensor& boxes1, const Tensor& boxes2, std::string measure, bool pairwise,
                   double eps) {
  const Tensor overlap = empty_overlap(boxes1, boxes2, pairwise);
  const int64_t n = boxes1.size(0), m = boxes2.size(0);
  if (n == 0 || m == 0) return overlap;
  const Tensor first = torch::stable::contiguous(boxes1);
  const Tensor second = torch::stable::contiguous(boxes2);
  const Stream stream(boxes1);
  dispatch(boxes1.scalar_type(), measure, [&](auto type, auto constant) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    constexpr Measure kMeasure = decltype(constant)::value;
    C* const out = static_cast<C*>(overlap.mutable_data_ptr());
    if (pairwise) {
      stream.launch("overlap_pairs", overlap_pairs<kMeasure, T, C>, tiles_for(n, m), kThreads,
                    boxes_of<T>(first), boxes_of<T>(second), epsilon_of<C>(pairwise, eps), out);
    } else {
      stream.launch("overlap_each", overlap_each<kMeasure, T, C>, blocks_for(n, kThreads), kThreads,
                    boxes_of<T>(first), boxes_of<T>(second), epsilon_of<C>(pairwise, eps), out);
    }
  });
  return overlap;
}

template <class T, class C>
void launch_sums(const Stream& stream, const Tensor& sums, int64_t tiles, const Tensor& grad) {
  const int64_t count = 4 * grad.size(0);
  if (count == 0) return;
  stream.launch("overlap_sums", overlap_sums<T, C>, blocks_for(count, kThreads), kThreads,
                static_cast<const C*>(sums.const_data_ptr()), tiles, count,
                static_cast<T*>(grad.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor> box_overlap_backward(const Tensor& grad, const Tensor& boxes1,
                                                const Tensor& boxes2, std::string measure,
                                                bool pairwise, double eps) {
  const ScalarType dtype = boxes1.scalar_type();
  STD_TORCH_CHECK(grad.scalar_type() == compute_dtype(dtype),
                  "fastzoo: box_overlap_backward: the gradient's dtype is not the overlap's");
  const int64_t n = boxes1.size(0), m = boxes2.size(0);
  const Tensor grad1 = empty(boxes1, {n, 4}, dtype);
  const Tensor grad2 = empty(boxes2, {m, 4}, dtype);
  const Tensor by_overlap = torch::stable::contiguous(grad);
  const Tensor first = torch::stable::contiguous(boxes1);
  const Tensor second = torch::stable::contiguous(boxes2);
  const Stream stream(boxes1);
  dispatch(dtype, measure, [&](auto type, auto constant) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    constexpr Measure kMeasure = decltype(constant)::value;
    const C* const values = static_cast<const C*>(by_overlap.const_data_ptr());
    if (!pairwise) {
      if (n == 0) return;
      stream.launch(
          "overlap_each_backward", overlap_each_backward<kMeasure, T, C>, blocks_for(n, kThreads),
          kThreads, values, boxes_of<T>(first), boxes_of<T>(second), epsilon_of<C>(pairwise, eps),
          static_cast<T*>(grad1.mutable_data_ptr()), static_cast<T*>(grad2.mutable_data_ptr()));
      return;
    }
    const int64_t across = tiles_of(m, kTileColumns), down = tiles_of(n, kTileRows);
    const Tensor sums1 = empty(boxes1, {across, n, 4}, compute_dtype(dtype));
    const Tensor sums2 = empty(boxes1, {down, m, 4}, compute_dtype(dtype));
    if (n > 0 && m > 0) {
      stream.launch("overlap_pairs_backward", overlap_pairs_backward<kMeasure, T, C>,
                    tiles_for(n, m), kThreads, values, boxes_of<T>(first), boxes_of<T>(second),
                    epsilon_of<C>(pairwise, eps), static_cast<C*>(sums1.mutable_data_ptr()),
                    static_cast<C*>(sums2.mutable_data_ptr()));
    }
    launch_sums<T, C>(stream, sums1, across, grad1);
    launch_sums<T, C>(stream, sums2, down, grad2);
  });
  return {grad1, grad2};
}

Tensor box_iou_rotated(const Tensor& boxes1, const Tensor& boxes2, bool degrees, bool pairwise) {
  const Tensor overlap = empty_overlap(boxes1, boxes2, pairwise);
  const int64_t n = boxes1.size(0), m = boxes2.size(0);
  if (n == 0 || m == 0) return overlap;
  const Tensor first = torch::stable::contiguous(boxes1);
  const Tensor second = torch::stable::contiguous(boxes2);
  const Stream stream(boxes1);
  dispatch_float(boxes1.scalar_type(), "box_iou_rotated", [&](auto type) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    const T* const a = static_cast<const T*>(first.const_data_ptr());
    const T* const b = static_cast<const T*>(second.const_data_ptr());
    C* const out = static_cast<C*>(overlap.mutable_data_ptr());
    if (pairwise) {
      stream.launch("rotated_pairs", rotated_pairs<T, C>, tiles_for(n, m), kThreads, a, n, b, m,
                    degrees, out);
    } else {
      stream.launch("rotated_each", rotated_each<T, C>, blocks_for(n, kThreads), kThreads, a, b, n,
                    degrees, out);
    }
  });
  return overlap;
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::box_overlap>(m, "box_overlap.cuda");
  fastzoo::implement<fastzoo::cuda::box_overlap_backward>(m, "box_overlap_backward.cuda");
  fastzoo::implement<fastzoo::cuda::box_iou_rotated>(m, "box_iou_rotated.cuda");
}
