// Vectors of 32-bit words, as many as a vector of floats has lanes: the twins of the scalar words
// of csrc/math/counter_random.h. Included like vec.h.
#pragma once

#include "../../math/counter_random.h"
#include "vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

struct Words {
  typedef uint32_t Native __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Lower __attribute__((vector_size(kVectorBytes / 2)));
  static constexpr int size = kVectorBytes / 4;

  Native v;

  Words() = default;
  __attribute__((always_inline)) Words(Native native) : v(native) {}
  __attribute__((always_inline)) explicit Words(uint32_t word) : v(word - Native{}) {}

  __attribute__((always_inline)) static Words load(const uint32_t* p) {
    Words r;
    __builtin_memcpy(&r.v, p, sizeof(Native));
    return r;
  }
  __attribute__((always_inline)) void store(uint32_t* p) const {
    __builtin_memcpy(p, &v, sizeof(Native));
  }
  // The lower halves alone.
  __attribute__((always_inline)) static Words load_lower(const uint16_t* p) {
    Lower lower;
    __builtin_memcpy(&lower, p, sizeof(Lower));
    return __builtin_convertvector(lower, Native);
  }
  __attribute__((always_inline)) void store_lower(uint16_t* p) const {
    const Lower lower = __builtin_convertvector(v, Lower);
    __builtin_memcpy(p, &lower, sizeof(Lower));
  }

  friend __attribute__((always_inline)) Words operator+(Words a, Words b) { return a.v + b.v; }
  friend __attribute__((always_inline)) Words operator-(Words a, Words b) { return a.v - b.v; }
  friend __attribute__((always_inline)) Words operator&(Words a, Words b) { return a.v & b.v; }
  friend __attribute__((always_inline)) Words operator|(Words a, Words b) { return a.v | b.v; }
  friend __attribute__((always_inline)) Words operator^(Words a, Words b) { return a.v ^ b.v; }
  friend __attribute__((always_inline)) Words operator<<(Words a, int by) { return a.v << by; }
  friend __attribute__((always_inline)) Words operator>>(Words a, int by) { return a.v >> by; }
};

FASTZOO_INLINE Words bits_of(Vec<float> values) { return (Words::Native)values.v; }
FASTZOO_INLINE Vec<float> float_of_bits(Words bits) { return (Vec<float>::Native)bits.v; }
FASTZOO_INLINE Vec<float> float_of_signed(Words words) {
  return __builtin_convertvector((Words::Signed)words.v, Vec<float>::Native);
}
#if defined(__AVX512F__)
FASTZOO_INLINE Vec<float> float_of(Words words) {
  return __builtin_convertvector(words.v, Vec<float>::Native);
}
#else
// The halves are exact, and so is their product with 2^16: only the sum is rounded.
FASTZOO_INLINE Vec<float> float_of(Words words) {
  return float_of_signed(words >> 16) * Vec<float>(65536.0f) +
         float_of_signed(words & Words(0xffffu));
}
#endif
FASTZOO_INLINE Words truncated(Vec<float> values) {
  return (Words::Native) __builtin_convertvector(values.v, Words::Signed);
}
FASTZOO_INLINE Words shift_right_signed(Words words, int by) {
  return (Words::Native)((Words::Signed)words.v >> by);
}
FASTZOO_INLINE Vec<float> select_nonzero(Words words, Vec<float> a, Vec<float> b) {
  return words.v != 0 ? a.v : b.v;
}
FASTZOO_INLINE Words select_nonzero(Words words, Words a, Words b) {
  return words.v != 0 ? a.v : b.v;
}

// As many words in the lower halves of 64-bit lanes, as CPUs multiply them; the upper halves hold
// anything. Word 2i is in lane i of `even`, word 2i + 1 in lane i of `odd`.
struct WideWords {
  typedef uint64_t Native __attribute__((vector_size(kVectorBytes)));

  Native even, odd;

  WideWords() = default;
  __attribute__((always_inline)) WideWords(Native even, Native odd) : even(even), odd(odd) {}
  __attribute__((always_inline)) explicit WideWords(uint32_t word)
      : even(word - Native{}), odd(word - Native{}) {}

  __attribute__((always_inline)) Words narrow() const {
    return (Words::Native)((even & 0xffffffffu) | (odd << 32));
  }

  friend __attribute__((always_inline)) WideWords operator+(WideWords a, WideWords b) {
    return {a.even + b.even, a.odd + b.odd};
  }
  friend __attribute__((always_inline)) WideWords operator^(WideWords a, WideWords b) {
    return {a.even ^ b.even, a.odd ^ b.odd};
  }
};

FASTZOO_INLINE WideWords::Native multiply_lower(WideWords::Native a, uint32_t by) {
  const WideWords::Native factor = by - WideWords::Native{};
#if defined(__AVX512F__)
  return (WideWords::Native)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
  return (WideWords::Native)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
  return (WideWords::Native)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
  return (a & 0xffffffffu) * factor;
#endif
}
FASTZOO_INLINE void multiply_wide(WideWords a, uint32_t by, WideWords& high, WideWords& low) {
  low = {multiply_lower(a.even, by), multiply_lower(a.odd, by)};
  high = {low.even >> 32, low.odd >> 32};
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
