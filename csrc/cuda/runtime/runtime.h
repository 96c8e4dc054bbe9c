// What CUDA kernels are written with. Compiled by nvcc these are CUDA's own facilities; compiled
// by a C++ compiler with -DFASTZOO_EMULATE (g++ -x c++ kernel.cu) they run on the host, checked.
// Kernels use these names and never a raw intrinsic:
//   __global__, __launch_bounds__, threadIdx, blockIdx, blockDim, gridDim
//   __shared__ SharedArray<T, n> a;     a[i], a.load<m>(i), a.store(i, vector)
//   sync_block(), sync_warp(mask)
//   shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, any, all     (value, ..., mask)
//   atomic_add, atomic_max, atomic_exchange, load_volatile, thread_fence, wait_for_other_block
//   load_vector<n>(p), store_vector(p, vector): whole 16-byte (or one 8-byte) accesses
//   fused_multiply_add, population_count
#pragma once

#include <cstdint>

#if defined(FASTZOO_EMULATE)
#define FASTZOO_DEVICE inline __attribute__((always_inline))
#else
#define FASTZOO_DEVICE __device__ __forceinline__
#endif

namespace fastzoo::cuda {

constexpr int kWarpSize = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;

// n elements that one access moves: 8 bytes, or 16, or a few times 16.
template <class T, int n>
struct Vector {
  static constexpr int kBytes = n * static_cast<int>(sizeof(T));
  static constexpr int kAlignment = kBytes < 16 ? kBytes : 16;
  static_assert(kBytes == 8 || kBytes % 16 == 0, "a vector access moves 8 or whole 16 bytes");

  alignas(kAlignment) T values[n];

  FASTZOO_DEVICE T& operator[](int i) { return values[i]; }
  FASTZOO_DEVICE const T& operator[](int i) const { return values[i]; }
};

}  // namespace fastzoo::cuda

#if defined(FASTZOO_EMULATE)
#include "emulator.h"
#else
#include "device.h"
#endif
