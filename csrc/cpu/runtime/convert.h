// Conversion between stored elements and the type they are computed in. Included like vec.h.
#pragma once

#include "dtype.h"
#include "vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

FASTZOO_INLINE float widen(float value) { return value; }
FASTZOO_INLINE double widen(double value) { return value; }

FASTZOO_INLINE float widen(BFloat16 value) {
  return math::bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}

FASTZOO_INLINE float widen(Half value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const bool special = magnitude >= 0x0f800000u;  // infinity or NaN
  // The exponent moves from bias 15 to bias 127 by a product, which is exact for subnormals too.
  const float scaled = math::bits_as<float>(magnitude) * 0x1p112f;
  const uint32_t bits = special ? magnitude | 0x7f800000u : math::bits_as<uint32_t>(scaled);
  return math::bits_as<float>(bits | sign);
#endif
}

// As many elements as a vector has lanes.
FASTZOO_INLINE Vec<float> load_wide(const float* p) { return Vec<float>::load(p); }
FASTZOO_INLINE Vec<double> load_wide(const double* p) { return Vec<double>::load(p); }

#if defined(__AVX512F__)
FASTZOO_INLINE __m256i load_halves(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
FASTZOO_INLINE Vec<float> load_wide(const Half* p) { return _mm512_cvtph_ps(load_halves(p)); }
FASTZOO_INLINE Vec<float> load_wide(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p)), 16));
}
#elif defined(__AVX2__)
FASTZOO_INLINE __m128i load_halves(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
FASTZOO_INLINE Vec<float> load_wide(const Half* p) { return _mm256_cvtph_ps(load_halves(p)); }
FASTZOO_INLINE Vec<float> load_wide(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16));
}
#else
template <class Element>
FASTZOO_INLINE Vec<float> load_wide(const Element* p) {
  Vec<float> values;
  for (int i = 0; i < Vec<float>::size; ++i) values.v[i] = widen(p[i]);
  return values;
}
#endif

// sums += the squares, in double; as many sums as a vector has lanes.
FASTZOO_INLINE void add_squares(Vec<double> values, Vec<double> (&sums)[1]) {
  sums[0] = sums[0] + values * values;
}
FASTZOO_INLINE void add_squares(Vec<float> values, Vec<double> (&sums)[2]) {
  typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    HalfVector half;
    __builtin_memcpy(&half, reinterpret_cast<const char*>(&values.v) + i * sizeof(half),
                     sizeof(half));
    const Vec<double> wide = __builtin_convertvector(half, Vec<double>::Native);
    sums[i] = sums[i] + wide * wide;
  }
}

// narrow(value, element): rounds to float, then to the element; ties to even.
FASTZOO_INLINE void narrow(double value, float& element) { element = static_cast<float>(value); }
FASTZOO_INLINE void narrow(double value, double& element) { element = value; }

FASTZOO_INLINE void narrow(double value, BFloat16& element) {
  const uint32_t bits = math::bits_as<uint32_t>(static_cast<float>(value));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  element.bits = static_cast<uint16_t>((nan ? bits | 0x400000u : rounded) >> 16);
}

FASTZOO_INLINE void narrow(double value, Half& element) {
#if defined(__F16C__)
  element.bits =
      static_cast<uint16_t>(_cvtss_sh(static_cast<float>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = math::bits_as<uint32_t>(static_cast<float>(value));
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // from 65520 on: infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
    half = math::bits_as<uint32_t>(math::bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  element.bits = static_cast<uint16_t>(sign | half);
#endif
}

// As many elements as a vector of doubles has lanes, and back: rounded to float, then to the
// element.
#if defined(__AVX512F__)
FASTZOO_INLINE __m256 load_few(const float* p) { return _mm256_loadu_ps(p); }
FASTZOO_INLINE __m128i load_few_halves(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
FASTZOO_INLINE __m256 load_few(const Half* p) { return _mm256_cvtph_ps(load_few_halves(p)); }
FASTZOO_INLINE __m256 load_few(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_few_halves(p)), 16));
}
template <class Element>
FASTZOO_INLINE Vec<double> load_doubles(const Element* p) {
  return _mm512_cvtps_pd(load_few(p));
}
FASTZOO_INLINE void narrow(Vec<double> values, float* p) {
  _mm256_storeu_ps(p, _mm512_cvtpd_ps(values.v));
}
FASTZOO_INLINE void narrow(Vec<double> values, Half* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(_mm512_cvtpd_ps(values.v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
FASTZOO_INLINE __m128 load_few(const float* p) { return _mm_loadu_ps(p); }
FASTZOO_INLINE __m128i load_few_halves(const void* p) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}
FASTZOO_INLINE __m128 load_few(const Half* p) { return _mm_cvtph_ps(load_few_halves(p)); }
FASTZOO_INLINE __m128 load_few(const BFloat16* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(load_few_halves(p)), 16));
}
template <class Element>
FASTZOO_INLINE Vec<double> load_doubles(const Element* p) {
  return _mm256_cvtps_pd(load_few(p));
}
FASTZOO_INLINE void narrow(Vec<double> values, float* p) {
  _mm_storeu_ps(p, _mm256_cvtpd_ps(values.v));
}
FASTZOO_INLINE void narrow(Vec<double> values, Half* p) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                   _mm_cvtps_ph(_mm256_cvtpd_ps(values.v), _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class Element>
FASTZOO_INLINE Vec<double> load_doubles(const Element* p) {
  Vec<double> values;
  for (int i = 0; i < Vec<double>::size; ++i) values.v[i] = widen(p[i]);
  return values;
}
#endif
FASTZOO_INLINE Vec<double> load_doubles(const double* p) { return Vec<double>::load(p); }

template <class Element>
FASTZOO_INLINE void narrow(Vec<double> values, Element* p) {
  for (int i = 0; i < Vec<double>::size; ++i) narrow(values.v[i], p[i]);
}
FASTZOO_INLINE void narrow(Vec<double> values, double* p) { values.store(p); }

// As many elements as a vector has lanes, in the type that they are computed in, and back.
FASTZOO_INLINE void store_narrow(Vec<float> values, float* p) { values.store(p); }
FASTZOO_INLINE void store_narrow(Vec<double> values, double* p) { values.store(p); }
FASTZOO_INLINE void store_narrow(Vec<float> values, BFloat16* p) {
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Elements __attribute__((vector_size(kVectorBytes / 2)));
  Words bits;
  __builtin_memcpy(&bits, &values.v, sizeof(bits));
  const Words nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const Words rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const Words chosen = (nan & (bits | 0x400000u)) | (~nan & rounded);
  const Elements elements = __builtin_convertvector(chosen >> 16, Elements);
  __builtin_memcpy(p, &elements, sizeof(elements));
}
#if defined(__AVX512F__)
FASTZOO_INLINE void store_narrow(Vec<float> values, Half* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(values.v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
FASTZOO_INLINE void store_narrow(Vec<float> values, Half* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(values.v, _MM_FROUND_TO_NEAREST_INT));
}
#else
FASTZOO_INLINE void store_narrow(Vec<float> values, Half* p) {
  for (int i = 0; i < Vec<float>::size; ++i) narrow(values.v[i], p[i]);
}
#endif

// Calls body(Element{}) with the C++ type of a dtype.
template <class Body>
FASTZOO_INLINE void with_element(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float{});
    case Dtype::float64:
      return body(double{});
    case Dtype::float16:
      return body(Half{});
    case Dtype::bfloat16:
      return body(BFloat16{});
  }
}

// A double sum over terms whose order is free: eight running sums, so that it is as wide as any
// vector.
template <class Term>
FASTZOO_INLINE double wide_sum(int64_t count, const Term& term) {
  constexpr int kWidth = 8;
  double sums[kWidth] = {};
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    for (int i = 0; i < kWidth; ++i) sums[i] += term(k + i);
  }
  for (; k < count; ++k) sums[0] += term(k);
  for (int i = 1; i < kWidth; ++i) sums[0] += sums[i];
  return sums[0];
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
