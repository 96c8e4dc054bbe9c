// The vector type of the CPU kernels, one width per instruction set. Included only by files of
// csrc/cpu/kernels and by the runtime headers they use; compiled with FASTZOO_CPU_ISA set to the
// namespace: baseline, avx2, avx512 or avx512_bf16.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../../math/host_device.h"

#define FASTZOO_INLINE static inline __attribute__((always_inline))

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// What a comparison yields: bit i stands for lane i.
template <int kLanes>
struct Mask {
  uint32_t bits;
  static constexpr uint32_t kAll = kLanes == 32 ? 0xffffffffu : (1u << kLanes) - 1;
  bool any() const { return bits != 0; }
};

template <class T>
struct NativeOf;
template <>
struct NativeOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct NativeOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
struct Vec {
  static constexpr int size = kVectorBytes / static_cast<int>(sizeof(T));
  using Native = typename NativeOf<T>::type;
  using MaskType = Mask<size>;

  Native v;

  Vec() = default;
  __attribute__((always_inline)) Vec(Native native) : v(native) {}
  __attribute__((always_inline)) explicit Vec(T scalar) : v(scalar - Native{}) {}

  __attribute__((always_inline)) static Vec load(const T* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof(Native));
    return r;
  }
  __attribute__((always_inline)) void store(T* p) const { __builtin_memcpy(p, &v, sizeof(Native)); }
  __attribute__((always_inline)) T operator[](int lane) const { return v[lane]; }

  friend __attribute__((always_inline)) Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend __attribute__((always_inline)) Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend __attribute__((always_inline)) Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend __attribute__((always_inline)) Vec operator/(Vec a, Vec b) { return a.v / b.v; }
};

// fused_multiply_add: one rounding where the CPU has the instruction, two on the baseline.
// maximum(a, b) is std::max lane by lane: a unless a < b (so a where either is NaN).
// less(a, b), less_equal(a, b): the lanes where a < b holds, or a <= b. Neither holds for NaN.
// not_less(a, b): the lanes where a < b does not hold.
#if defined(__AVX512F__)

FASTZOO_INLINE Vec<float> fused_multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
FASTZOO_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return _mm512_max_ps(b.v, a.v); }
FASTZOO_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) { return _mm512_min_ps(b.v, a.v); }
FASTZOO_INLINE Vec<float>::MaskType less(Vec<float> a, Vec<float> b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
FASTZOO_INLINE Vec<float>::MaskType less_equal(Vec<float> a, Vec<float> b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
}
FASTZOO_INLINE Vec<float>::MaskType not_less(Vec<float> a, Vec<float> b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)};
}
FASTZOO_INLINE Vec<double> fused_multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a.v, b.v, c.v);
}
FASTZOO_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) { return _mm512_max_pd(b.v, a.v); }
FASTZOO_INLINE Vec<double> minimum(Vec<double> a, Vec<double> b) { return _mm512_min_pd(b.v, a.v); }
FASTZOO_INLINE Vec<double>::MaskType less(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)};
}
FASTZOO_INLINE Vec<double>::MaskType less_equal(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)};
}
FASTZOO_INLINE Vec<double>::MaskType not_less(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_NLT_UQ)};
}

#elif defined(__AVX2__)

FASTZOO_INLINE Vec<float> fused_multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a.v, b.v, c.v);
}
FASTZOO_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return _mm256_max_ps(b.v, a.v); }
FASTZOO_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) { return _mm256_min_ps(b.v, a.v); }
FASTZOO_INLINE Vec<float>::MaskType less(Vec<float> a, Vec<float> b) {
  return {static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)))};
}
FASTZOO_INLINE Vec<float>::MaskType less_equal(Vec<float> a, Vec<float> b) {
  return {static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)))};
}
FASTZOO_INLINE Vec<float>::MaskType not_less(Vec<float> a, Vec<float> b) {
  return {static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)))};
}
FASTZOO_INLINE Vec<double> fused_multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a.v, b.v, c.v);
}
FASTZOO_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) { return _mm256_max_pd(b.v, a.v); }
FASTZOO_INLINE Vec<double> minimum(Vec<double> a, Vec<double> b) { return _mm256_min_pd(b.v, a.v); }
FASTZOO_INLINE Vec<double>::MaskType less(Vec<double> a, Vec<double> b) {
  return {static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)))};
}
FASTZOO_INLINE Vec<double>::MaskType less_equal(Vec<double> a, Vec<double> b) {
  return {static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ)))};
}
FASTZOO_INLINE Vec<double>::MaskType not_less(Vec<double> a, Vec<double> b) {
  return {static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_NLT_UQ)))};
}

#else

template <class T>
FASTZOO_INLINE Vec<T> fused_multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}

#if defined(__SSE2__)

FASTZOO_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return _mm_max_ps(b.v, a.v); }
FASTZOO_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) { return _mm_min_ps(b.v, a.v); }
FASTZOO_INLINE Vec<float>::MaskType less(Vec<float> a, Vec<float> b) {
  return {static_cast<uint32_t>(_mm_movemask_ps(_mm_cmplt_ps(a.v, b.v)))};
}
FASTZOO_INLINE Vec<float>::MaskType less_equal(Vec<float> a, Vec<float> b) {
  return {static_cast<uint32_t>(_mm_movemask_ps(_mm_cmple_ps(a.v, b.v)))};
}
FASTZOO_INLINE Vec<float>::MaskType not_less(Vec<float> a, Vec<float> b) {
  return {static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnlt_ps(a.v, b.v)))};
}
FASTZOO_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) { return _mm_max_pd(b.v, a.v); }
FASTZOO_INLINE Vec<double> minimum(Vec<double> a, Vec<double> b) { return _mm_min_pd(b.v, a.v); }
FASTZOO_INLINE Vec<double>::MaskType less(Vec<double> a, Vec<double> b) {
  return {static_cast<uint32_t>(_mm_movemask_pd(_mm_cmplt_pd(a.v, b.v)))};
}
FASTZOO_INLINE Vec<double>::MaskType less_equal(Vec<double> a, Vec<double> b) {
  return {static_cast<uint32_t>(_mm_movemask_pd(_mm_cmple_pd(a.v, b.v)))};
}
FASTZOO_INLINE Vec<double>::MaskType not_less(Vec<double> a, Vec<double> b) {
  return {static_cast<uint32_t>(_mm_movemask_pd(_mm_cmpnlt_pd(a.v, b.v)))};
}

#else

template <class T>
FASTZOO_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a.v < b.v ? b.v : a.v;
}
template <class T>
FASTZOO_INLINE Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return b.v < a.v ? b.v : a.v;
}
template <class T>
FASTZOO_INLINE typename Vec<T>::MaskType less(Vec<T> a, Vec<T> b) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec<T>::size; ++i) bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
  return {bits};
}
template <class T>
FASTZOO_INLINE typename Vec<T>::MaskType less_equal(Vec<T> a, Vec<T> b) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec<T>::size; ++i) bits |= static_cast<uint32_t>(a.v[i] <= b.v[i]) << i;
  return {bits};
}
template <class T>
FASTZOO_INLINE typename Vec<T>::MaskType not_less(Vec<T> a, Vec<T> b) {
  return {~less(a, b).bits & Vec<T>::MaskType::kAll};
}

#endif
#endif

// The lanes where a > b holds.
template <class T>
FASTZOO_INLINE typename Vec<T>::MaskType greater(Vec<T> a, Vec<T> b) {
  return less(b, a);
}

// Stores at an aligned address, past the caches; stream_fence() comes before another thread reads.
template <class T>
FASTZOO_INLINE void stream(Vec<T> a, T* p) {
#if defined(__AVX512F__)
  __m512i bits;
  __builtin_memcpy(&bits, &a.v, sizeof(bits));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
#elif defined(__AVX2__)
  __m256i bits;
  __builtin_memcpy(&bits, &a.v, sizeof(bits));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
#elif defined(__SSE2__)
  __m128i bits;
  __builtin_memcpy(&bits, &a.v, sizeof(bits));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
#else
  a.store(p);
#endif
}
FASTZOO_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The lanes whose byte is not 0.
template <class T>
FASTZOO_INLINE typename Vec<T>::MaskType load_mask(const uint8_t* p) {
  constexpr int kSize = Vec<T>::size;
#if defined(__AVX512F__)
  const __m128i bytes = kSize == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                    : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm_test_epi8_mask(bytes, bytes)};
#elif defined(__SSE2__)
  __m128i bytes = _mm_setzero_si128();
  __builtin_memcpy(&bytes, p, kSize);
  const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
  return {~static_cast<uint32_t>(zeros) & Vec<T>::MaskType::kAll};
#else
  uint32_t bits = 0;
  for (int i = 0; i < kSize; ++i) bits |= static_cast<uint32_t>(p[i] != 0) << i;
  return {bits};
#endif
}

// Over the lanes, always in the same order.
template <class T>
FASTZOO_INLINE T lane_sum(Vec<T> a) {
  T sums[Vec<T>::size];
  a.store(sums);
  for (int width = Vec<T>::size / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}
template <class T>
FASTZOO_INLINE T lane_maximum(Vec<T> a) {
  T highest = a[0];
  for (int i = 1; i < Vec<T>::size; ++i) highest = math::maximum(highest, a[i]);
  return highest;
}
template <class T>
FASTZOO_INLINE T lane_minimum(Vec<T> a) {
  T least[Vec<T>::size];
  a.store(least);
  for (int width = Vec<T>::size / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) least[i] = math::minimum(least[i], least[i + width]);
  }
  return least[0];
}

// Of two vectors, pieces of kStep elements change places: the odd ones of a and the even ones of
// b.
template <int kStep, class T, int... kLane>
FASTZOO_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kSize = Vec<T>::size;
  const typename Vec<T>::Native a_before = a.v, b_before = b.v;
  // Indices count the elements of both, those of b from kSize on.
  a.v = __builtin_shufflevector(a_before, b_before,
                                ((kLane & kStep) == 0 ? kLane : kSize + kLane - kStep)...);
  b.v = __builtin_shufflevector(a_before, b_before,
                                ((kLane & kStep) == 0 ? kLane + kStep : kSize + kLane)...);
}
template <int kStep, class T>
FASTZOO_INLINE void exchange(Vec<T>& a, Vec<T>& b) {
  exchange<kStep>(a, b, std::make_integer_sequence<int, Vec<T>::size>{});
}

// Element j of row i becomes element i of row j. With fewer rows than lanes, each piece of as many
// lanes is turned on its own.
template <int kStep = 1, class T, int kRows>
FASTZOO_INLINE void transpose(Vec<T> (&rows)[kRows]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if ((i & kStep) == 0) exchange<kStep>(rows[i], rows[i + kStep]);
  }
  if constexpr (2 * kStep < kRows) transpose<2 * kStep>(rows);
}

// Every second element of both, from the first on.
template <class T>
FASTZOO_INLINE Vec<T> even_elements(Vec<T> a, Vec<T> b) {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  Indices even;
#pragma GCC unroll 16
  for (int i = 0; i < Vec<T>::size; ++i) even[i] = 2 * i;
  return __builtin_shuffle(a.v, b.v, even);
}

// The sum over the lanes, as lane_sums() adds it: neighbours first.
template <class T>
FASTZOO_INLINE T neighbours_sum(Vec<T> a) {
  constexpr int kSize = Vec<T>::size;
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
#pragma GCC unroll 4
  for (int step = 1; step < kSize; step *= 2) {
    Indices other;
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) other[i] = i ^ step;
    a.v = a.v + __builtin_shuffle(a.v, other);
  }
  return a[0];
}

// Element i is the sum over the lanes of row i. The rows are used up.
template <int kStep = 1, class T>
FASTZOO_INLINE Vec<T> lane_sums(Vec<T> (&rows)[Vec<T>::size]) {
#pragma GCC unroll 16
  for (int i = 0; i < Vec<T>::size; i += 2 * kStep) {
    exchange<kStep>(rows[i], rows[i + kStep]);
    rows[i] = rows[i] + rows[i + kStep];
  }
  if constexpr (2 * kStep < Vec<T>::size) return lane_sums<2 * kStep>(rows);
  return rows[0];
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
