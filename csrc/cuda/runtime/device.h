// The kernel vocabulary of runtime.h as nvcc compiles it: thin names for CUDA's own.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace fastzoo::cuda {

constexpr int kManyBlocks = 264;  // two for each unit

FASTZOO_DEVICE void sync_block() { __syncthreads(); }
FASTZOO_DEVICE void sync_warp(uint32_t mask = kWholeWarp) { __syncwarp(mask); }

template <class T>
FASTZOO_DEVICE T shuffle(T value, int source, uint32_t mask = kWholeWarp) {
  return __shfl_sync(mask, value, source);
}
template <class T>
FASTZOO_DEVICE T shuffle_up(T value, int distance, uint32_t mask = kWholeWarp) {
  return __shfl_up_sync(mask, value, distance);
}
template <class T>
FASTZOO_DEVICE T shuffle_down(T value, int distance, uint32_t mask = kWholeWarp) {
  return __shfl_down_sync(mask, value, distance);
}
template <class T>
FASTZOO_DEVICE T shuffle_xor(T value, int flip, uint32_t mask = kWholeWarp) {
  return __shfl_xor_sync(mask, value, flip);
}
FASTZOO_DEVICE uint32_t ballot(bool vote, uint32_t mask = kWholeWarp) {
  return __ballot_sync(mask, vote);
}
FASTZOO_DEVICE bool any(bool vote, uint32_t mask = kWholeWarp) { return __any_sync(mask, vote); }
FASTZOO_DEVICE bool all(bool vote, uint32_t mask = kWholeWarp) { return __all_sync(mask, vote); }
FASTZOO_DEVICE uint32_t warp_min(uint32_t value) { return __reduce_min_sync(kWholeWarp, value); }

// CUDA names its atomics' 64-bit type unsigned long long; uint64_t may be unsigned long.
template <class T>
using AtomicType =
    std::conditional_t<std::is_same_v<T, uint64_t>, unsigned long long, T>;  // NOLINT

template <class T>
FASTZOO_DEVICE T atomic_add(T* address, T value) {
  return atomicAdd(reinterpret_cast<AtomicType<T>*>(address), value);
}
template <class T>
FASTZOO_DEVICE T atomic_max(T* address, T value) {
  return atomicMax(reinterpret_cast<AtomicType<T>*>(address), value);
}
template <class T>
FASTZOO_DEVICE T atomic_exchange(T* address, T value) {
  return atomicExch(reinterpret_cast<AtomicType<T>*>(address), value);
}
template <class T>
FASTZOO_DEVICE T atomic_compare_exchange(T* address, T expected, T value) {
  return atomicCAS(reinterpret_cast<AtomicType<T>*>(address), expected, value);
}
template <class T>
FASTZOO_DEVICE T load_volatile(const T* address) {
  return *static_cast<const volatile T*>(address);
}
FASTZOO_DEVICE void thread_fence() { __threadfence(); }

// Between two looks at memory that another block is to change.
FASTZOO_DEVICE void wait_for_other_block() { __nanosleep(20); }

// One machine word of a vector access.
template <int bytes>
using AccessWord = std::conditional_t<bytes == 4, int, std::conditional_t<bytes == 8, int2, int4>>;

template <int n, class T>
FASTZOO_DEVICE Vector<T, n> load_vector(const T* address) {
  using Word = AccessWord<Vector<T, n>::kBytes>;
  constexpr int kWords = Vector<T, n>::kBytes / sizeof(Word);
  Word words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(address)[i];
  Vector<T, n> vector;
  __builtin_memcpy(&vector, words, sizeof(vector));
  return vector;
}

template <class T, int n>
FASTZOO_DEVICE void store_vector(T* address, const Vector<T, n>& vector) {
  using Word = AccessWord<Vector<T, n>::kBytes>;
  constexpr int kWords = Vector<T, n>::kBytes / sizeof(Word);
  Word words[kWords];
  __builtin_memcpy(words, &vector, sizeof(vector));
#pragma unroll
  for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(address)[i] = words[i];
}

FASTZOO_DEVICE void store_word(int* to, int word) { *to = word; }
FASTZOO_DEVICE void store_word(int2* to, int2 word) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y)
               : "memory");
}
FASTZOO_DEVICE void store_word(int4* to, int4 word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y), "r"(word.z),
                 "r"(word.w)
               : "memory");
}

template <class T, int n>
FASTZOO_DEVICE void store_global(T* address, const Vector<T, n>& vector) {
  using Word = AccessWord<Vector<T, n>::kBytes>;
  constexpr int kWords = Vector<T, n>::kBytes / sizeof(Word);
  Word words[kWords];
  __builtin_memcpy(words, &vector, sizeof(vector));
#pragma unroll
  for (int i = 0; i < kWords; ++i) store_word(reinterpret_cast<Word*>(address) + i, words[i]);
}

FASTZOO_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTZOO_DEVICE double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
FASTZOO_DEVICE float fast_exponential(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 0x1.715476p+0f));  // log2(e)
  return power;
}
FASTZOO_DEVICE double fast_exponential(double x) { return ::exp(x); }
FASTZOO_DEVICE int population_count(uint32_t bits) { return __popc(bits); }
FASTZOO_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

template <MmaType type>
FASTZOO_DEVICE void mma(float (&sums)[4], const Vector<uint32_t, 4>& a, uint32_t b0, uint32_t b1) {
  if constexpr (type == MmaType::bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <class T, int n>
struct SharedArray {
  alignas(16) T values[n];

  FASTZOO_DEVICE T& operator[](int i) { return values[i]; }
  template <int m>
  FASTZOO_DEVICE Vector<T, m> load(int i) const {
    return load_vector<m>(values + i);
  }
  template <int m>
  FASTZOO_DEVICE void store(int i, const Vector<T, m>& vector) {
    store_vector(values + i, vector);
  }
  FASTZOO_DEVICE Vector<uint32_t, 4> load_matrices(int i) const {
    static_assert(sizeof(T) == 2, "load_matrices moves elements of 16 bits");
    Vector<uint32_t, 4> loaded;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(loaded[0]), "=r"(loaded[1]), "=r"(loaded[2]), "=r"(loaded[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(values + i)))
                 : "memory");
    return loaded;
  }
};

template <class Arrays>
FASTZOO_DEVICE Arrays& large_shared() {
  extern __shared__ int4 large_shared_words[];
  return *reinterpret_cast<Arrays*>(large_shared_words);
}

}  // namespace fastzoo::cuda
