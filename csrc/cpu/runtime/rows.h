// Rows of numbers side by side in memory: copies of few bytes, and sums. Included like vec.h.
#pragma once

#include "vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

// Copies so many bytes, fewer than kMost, a power of two.
template <int64_t kMost>
FASTZOO_INLINE void copy_few(const void* from, void* to, int64_t bytes) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
#pragma GCC unroll 10
  for (int64_t width = kMost / 2; width > 0; width /= 2) {
    if ((bytes & width) == 0) continue;
    __builtin_memcpy(target, source, width);
    source += width;
    target += width;
  }
}

// Shorter than a call of memcpy where the bytes are few.
FASTZOO_INLINE void copy_bytes(const void* from, void* to, int64_t bytes) {
  constexpr int64_t kMany = 512, kBlock = 64;
  if (bytes >= kMany) {
    __builtin_memcpy(to, from, bytes);
    return;
  }
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  for (; bytes >= kBlock; bytes -= kBlock, source += kBlock, target += kBlock) {
    __builtin_memcpy(target, source, kBlock);
  }
  copy_few<kBlock>(source, target, bytes);
}

// Calls visit(row, sum) with the sums of rows of `width` elements that lie side by side; `values`
// has room for a vector more. A row's sum does not depend on the others.
template <class T, class Visit>
FASTZOO_INLINE void sum_rows(const T* values, int64_t rows, int64_t width, const Visit& visit) {
  using V = Vec<T>;
  const int64_t whole = width / V::size * V::size;
  const typename V::MaskType rest{(1u << (width - whole)) - 1};
  const auto lanes = [&](int64_t row) {
    const T* const own = values + row * width;
    V sum = select(rest, V::load(own + whole), V(T(0)));
    for (int64_t i = 0; i < whole; i += V::size) sum = sum + V::load(own + i);
    return sum;
  };
  int64_t row = 0;
  for (; row + V::size <= rows; row += V::size) {
    V sums[V::size];
    for (int i = 0; i < V::size; ++i) sums[i] = lanes(row + i);
    T each[V::size];
    lane_sums(sums).store(each);
    for (int i = 0; i < V::size; ++i) visit(row + i, each[i]);
  }
  for (; row < rows; ++row) visit(row, neighbours_sum(lanes(row)));
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
