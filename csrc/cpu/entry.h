// What the entries of the CPU operators share.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../torch_abi.h"
#include "runtime/dtype.h"

namespace fastzoo {

inline cpu::Dtype kernel_dtype(ScalarType dtype, const char* op) {
  switch (dtype) {
    case ScalarType::Float:
      return cpu::Dtype::float32;
    case ScalarType::Double:
      return cpu::Dtype::float64;
    case ScalarType::Half:
      return cpu::Dtype::float16;
    case ScalarType::BFloat16:
      return cpu::Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": float, double, half or bfloat16 needed");
  }
}

constexpr int64_t kElementsWorthAThread = 32768;

// What is written goes past the caches where all that is read and written is more than they hold.
constexpr int64_t kStreamedBytes = int64_t{32} << 20;

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// How many threads a number of multiply-adds is worth.
inline int threads_for(int64_t products) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t worth = 1 + products / (8 * kElementsWorthAThread);
  return static_cast<int>(worth < threads ? worth : threads);
}

// Rows of a batch that are taken at once: they stand in memory packed twice, and their gradient is
// summed once for each part.
inline int64_t rows_at_once(int64_t rows, int64_t dims, int parts, int64_t element_size) {
  constexpr int64_t kBytes = int64_t{40} << 20;
  constexpr int64_t kMultiple = 64;
  const int64_t fitting = kBytes / ((2 + parts) * (dims + 16) * element_size);
  const int64_t most = fitting < kMultiple ? kMultiple : fitting / kMultiple * kMultiple;
  return rows < most ? rows : most;
}

inline const void* data_or_null(const Tensor& tensor) {
  return tensor.size(0) > 0 ? tensor.const_data_ptr() : nullptr;
}

inline Tensor empty_if(bool needed, const Tensor& like, std::initializer_list<int64_t> sizes,
                       ScalarType dtype) {
  return needed ? empty(like, sizes, dtype) : empty(like, {0}, dtype);
}

// A large result that is new memory is mapped page by page as it is written, which takes longer
// than the writing; in huge pages, where the system grants them on request, it does not.
inline const Tensor& in_huge_pages(const Tensor& result) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t end = begin + result.numel() * element_size(result.scalar_type());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last > first + kPage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return result;
}

// For what is added to, or set in part.
inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const Tensor tensor = empty(like, sizes, dtype);
  std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * element_size(dtype));
  return tensor;
}

inline Tensor zeros_like(const Tensor& other) {
  const Tensor tensor = torch::stable::empty_like(other);
  std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * element_size(tensor.scalar_type()));
  return tensor;
}

}  // namespace fastzoo
