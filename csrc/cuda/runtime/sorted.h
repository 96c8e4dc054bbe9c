// Sorting and running sums by torch's own operators, and looking up in what is sorted.
#pragma once

#include <array>
#include <optional>

#include "launch.h"

namespace fastzoo::cuda {

// Values and indices.
struct SortedKeys {
  Tensor values, indices;
};

// Along the last dimension, rising; equal keys by lower index.
inline SortedKeys sort_rows(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{-1}),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// How much each element and those before it add up to.
inline Tensor running_sum(const Tensor& flags) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(flags), from(int64_t{0}),
                                    from(std::optional<ScalarType>())};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The first of rising ids [from, to) that is not below `id`.
template <class Id>
FASTZOO_DEVICE int64_t first_of_segment(const Id* ids, int64_t from, int64_t to, int64_t id) {
  while (from < to) {
    const int64_t middle = from + (to - from) / 2;
    if (ids[middle] < id) {
      from = middle + 1;
    } else {
      to = middle;
    }
  }
  return from;
}

}  // namespace fastzoo::cuda
