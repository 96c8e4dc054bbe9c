// The order in which suppression visits boxes: by falling score, ties by lower index, NaN last.
#pragma once

#include "../../math/nms.h"
#include "rows.h"
#include "sorted.h"

namespace fastzoo::cuda {

constexpr int kKeyThreads = 256;

// math::falling_key with the order of signed integers, which torch sorts.
FASTZOO_DEVICE int32_t signed_falling_key(float score) {
  return static_cast<int32_t>(math::falling_key(score) ^ 0x80000000u);
}
FASTZOO_DEVICE int64_t signed_falling_key(double score) {
  return static_cast<int64_t>(math::falling_key(score) ^ 0x8000000000000000ull);
}

template <class C>
using FallingKey = std::conditional_t<std::is_same_v<C, double>, int64_t, int32_t>;

template <class T>
__global__ void __launch_bounds__(kKeyThreads)
    falling_keys(const T* scores, int64_t n, FallingKey<ComputeOf<T>>* keys) {
  const int64_t i = int64_t{blockIdx.x} * kKeyThreads + threadIdx.x;
  if (i < n) keys[i] = signed_falling_key(static_cast<ComputeOf<T>>(scores[i]));
}

// int64 indices of scores [n], n > 0.
inline Tensor falling_order(const Stream& stream, const Tensor& scores) {
  const int64_t n = scores.size(0);
  const Tensor values = torch::stable::contiguous(scores);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  const Tensor keys = empty(scores, {n}, wide ? ScalarType::Long : ScalarType::Int);
  dispatch_float(scores.scalar_type(), "falling_order", [&](auto type) {
    using T = decltype(type);
    stream.launch("falling_keys", falling_keys<T>, blocks_for(n, kKeyThreads), kKeyThreads,
                  static_cast<const T*>(values.const_data_ptr()), n,
                  static_cast<FallingKey<ComputeOf<T>>*>(keys.mutable_data_ptr()));
  });
  return sort_rows(keys).indices;
}

}  // namespace fastzoo::cuda
