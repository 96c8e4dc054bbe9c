// What CUDA kernels are written with. Compiled by nvcc these are CUDA's own facilities; compiled
// by a C++ compiler with -DFASTZOO_EMULATE (g++ -x c++ kernel.cu) they run on the host, checked.
// Kernels use these names and never a raw intrinsic:
//   __global__, __launch_bounds__, threadIdx, blockIdx, blockDim, gridDim
//   __shared__ SharedArray<T, n> a;     a[i], a.load<m>(i), a.store(i, vector)
//   large_shared<Arrays>(): a struct of such arrays, of up to kLargeShared bytes where a kernel may
//     declare 48 KiB; Stream::launch_large<Arrays> makes the room
//   sync_block(), sync_warp(mask)
//   shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, any, all     (value, ..., mask)
//   warp_min(x): the least of a whole warp's 32-bit numbers
//   atomic_add, atomic_max, atomic_exchange, atomic_compare_exchange(address, expected, value)
//   load_volatile, thread_fence, wait_for_other_block
//   load_vector<n>(p), store_vector(p, vector): whole 16-byte (or one 4- or 8-byte) accesses
//   store_global(p, vector): store_vector to global memory, which the compiler may not split
//   fused_multiply_add, population_count, lowest_bit(bits): its place, of bits that are not 0
//   fast_exponential(x): of a float relatively within 2^-22 + |x| 2^-23, and 0 below 2^-126
//   kManyBlocks: as many as keep a large device busy
//   a.load_matrices(i), mma<type>(sums, a, b): products of small matrices, by the whole warp
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

// What every GPU has that runs the code of one of our architectures, and what a large one has.
constexpr int kCommonShared = 99 * 1024;
constexpr int kLargeShared = 163 * 1024;

// n elements that one access moves: 4 bytes, 8, 16, or a few times 16.
template <class T, int n>
struct Vector {
  static constexpr int kBytes = n * static_cast<int>(sizeof(T));
  static constexpr int kAlignment = kBytes < 16 ? kBytes : 16;
  static_assert(kBytes == 4 || kBytes == 8 || kBytes % 16 == 0,
                "a vector access moves 4, 8 or whole 16 bytes");

  alignas(kAlignment) T values[n];

  FASTZOO_DEVICE T& operator[](int i) { return values[i]; }
  FASTZOO_DEVICE const T& operator[](int i) const { return values[i]; }
};

// What the 16 bits of an operand of mma() are.
enum class MmaType { float16, bfloat16 };

// What lanes hold of the matrices. A register has two neighbouring elements, the lower bits first:
//   load_matrices(i): four 8 x 8 matrices of 16-bit elements; lanes 8 m to 8 m + 7 give where the
//     rows of matrix m begin. Of matrix m a lane gets, as register m, elements 2 (lane % 4) and
//     the next of row lane / 4.
//   mma(sums, a, b): sums[16, 8] += a[16, 16] b[8, 16]^T, summed in fp32. With row = lane / 4 and
//     pair = 2 (lane % 4), a lane holds
//       a     (row, pair), (row + 8, pair), (row, pair + 8), (row + 8, pair + 8), a pair each
//       b     (row, pair), (row, pair + 8), a pair each
//       sums  (row, pair), (row, pair + 1), (row + 8, pair), (row + 8, pair + 1)
//     so that the four 8 x 8 matrices of a, down first, and the two of b, are as loaded.

}  // namespace fastzoo::cuda

#if defined(FASTZOO_EMULATE)
#include "emulator.h"
#else
#include "device.h"
#endif
