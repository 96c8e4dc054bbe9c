// Rows of a matrix as kernels read them, and sums over one row by one warp.
#pragma once

#include "launch.h"

namespace fastzoo::cuda {

template <class T>
using ComputeOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
FASTZOO_DEVICE T warp_sum(T value) {
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) value += shuffle_xor(value, flip);
  return value;
}

// Of a whole block of so many warps, all of whose threads call it; the first thread gets it.
template <class T, int warps>
FASTZOO_DEVICE T block_sum(T value, SharedArray<T, warps>& parts) {
  const T sum = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = sum;
  sync_block();
  T total = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 0; warp < warps; ++warp) total += parts[warp];
  }
  return total;
}

template <class T>
struct Rows {
  static constexpr int kAligned = 8;  // elements

  const T* data;
  int64_t count;
  int64_t step;  // elements from a row to the next
  int64_t dims;
  bool aligned;  // rows are whole pieces of kAligned elements at addresses that are multiples of 16

  FASTZOO_DEVICE Rows from(int64_t first) const {
    return {data + first * step, count - first, step, dims, aligned};
  }

  // n elements of a row from dimension d on; zeros beyond either end.
  template <int n>
  FASTZOO_DEVICE Vector<T, n> load(int64_t row, int64_t d) const {
    static_assert(kAligned % n == 0, "a piece divides an aligned one");
    Vector<T, n> piece{};
    if (row >= count || d >= dims) return piece;
    const T* from = data + row * step + d;
    if (aligned) return load_vector<n>(from);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (d + i < dims) piece[i] = from[i];
    }
    return piece;
  }
};

// Rows of a contiguous tensor.
template <class T>
Rows<T> rows_of(const Tensor& matrix) {
  const T* data = static_cast<const T*>(matrix.const_data_ptr());
  const int64_t dims = matrix.size(1);
  const bool aligned = dims % Rows<T>::kAligned == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data, matrix.size(0), dims, dims, aligned};
}

// The dot product of two rows, in double; all lanes get it.
template <class T>
FASTZOO_DEVICE double warp_dot(const Rows<T>& a, int64_t a_row, const Rows<T>& b, int64_t b_row,
                               int lane) {
  constexpr int kPiece = 16 / sizeof(T);
  double sum = 0;
  for (int64_t d = lane * kPiece; d < a.dims; d += kWarpSize * kPiece) {
    const Vector<T, kPiece> left = a.template load<kPiece>(a_row, d);
    const Vector<T, kPiece> right = b.template load<kPiece>(b_row, d);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      sum += static_cast<double>(left[i]) * static_cast<double>(right[i]);
    }
  }
  return warp_sum(sum);
}

}  // namespace fastzoo::cuda
