// A product of two operands, a tile at a time, from operands that lie as they are needed elsewhere:
//   tile[m][n] += sum over k of left(m, k) * right[k][n]
// `right` is a panel of lines [depth][kColumns]; the elements of `left` are broadcast one by one,
// so that it needs no packing. Included like vec.h.
#pragma once

#include "convert.h"
#include "vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

// How a step multiplies: an operand is made of words, each holding kEach steps of depth.
template <class T>
struct Multiply {
  using Sum = T;
  using Word = T;
  using Operand = Vec<T>;
  static constexpr int kEach = 1;

  // What the product sees of a value.
  __attribute__((always_inline)) static T operand(T value) { return value; }
  __attribute__((always_inline)) static Operand load(const Word* p) { return Operand::load(p); }
  __attribute__((always_inline)) static Operand broadcast(Word word) { return Operand(word); }
  __attribute__((always_inline)) static Vec<T> add(Operand a, Operand b, Vec<T> sum) {
    return fused_multiply_add(a, b, sum);
  }
};

FASTZOO_INLINE float rounded_to_bfloat16(float value) {
  BFloat16 element;
  narrow(value, element);
  return widen(element);
}

// Operands rounded to bfloat16, summed in float.
#if defined(__AVX512BF16__)
struct MultiplyBFloat16 {
  using Sum = float;
  using Word = uint32_t;  // two elements, the first in the low half
  using Operand = __m512i;
  static constexpr int kEach = 2;

  __attribute__((always_inline)) static Vec<float> operand(Vec<float> values) {
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values.v));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
  }
  // Of operands, one step of depth and the next.
  __attribute__((always_inline)) static Operand words(Vec<float> first, Vec<float> second) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first.v), 16),
                           _mm512_castps_si512(second.v));
  }
  __attribute__((always_inline)) static Operand load(const Word* p) {
    return _mm512_loadu_si512(p);
  }
  __attribute__((always_inline)) static Operand broadcast(Word word) {
    return _mm512_set1_epi32(static_cast<int>(word));
  }
  __attribute__((always_inline)) static Vec<float> add(Operand a, Operand b, Vec<float> sum) {
    return _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#else
struct MultiplyBFloat16 : Multiply<float> {
  __attribute__((always_inline)) static float operand(float value) {
    return rounded_to_bfloat16(value);
  }
};
#endif

// Calls body(Element{}, M{}): elements of a dtype, and how products of them are taken. Those of
// float64 are never rounded.
template <class Body>
FASTZOO_INLINE void with_product(Dtype dtype, bool bfloat16_products, const Body& body) {
  switch (dtype) {
    case Dtype::float64:
      return body(double{}, Multiply<double>{});
    case Dtype::bfloat16:
      return body(BFloat16{}, MultiplyBFloat16{});
    case Dtype::float32:
      if (bfloat16_products) return body(float{}, MultiplyBFloat16{});
      return body(float{}, Multiply<float>{});
    case Dtype::float16:
      if (bfloat16_products) return body(Half{}, MultiplyBFloat16{});
      return body(Half{}, Multiply<float>{});
  }
}

template <class M>
struct TileProduct {
  using T = typename M::Sum;
  using Word = typename M::Word;
  using V = Vec<T>;
  // As many accumulators as leave registers for two vectors of right and one broadcast.
  static constexpr int kRows = kVectorRegisters == 32 ? 12 : 6;
  static constexpr int kColumns = 2 * V::size;
  using Tile = V[kRows][2];

  __attribute__((always_inline)) static void clear(Tile& tile) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) tile[i][0] = tile[i][1] = V(T(0));
  }

  // Every column starts from starts[kRows].
  __attribute__((always_inline)) static void start(const T* starts, Tile& tile) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) tile[i][0] = tile[i][1] = V(starts[i]);
  }

  __attribute__((always_inline)) static void load(const T* from, int64_t stride, Tile& tile) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      tile[i][0] = V::load(from + i * stride);
      tile[i][1] = V::load(from + i * stride + V::size);
    }
  }

  __attribute__((always_inline)) static void store(const Tile& tile, T* to, int64_t stride) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      tile[i][0].store(to + i * stride);
      tile[i][1].store(to + i * stride + V::size);
    }
  }

  // left(m, k) = left[m * stride + k]: rows that lie `stride` words apart.
  __attribute__((always_inline)) static void add_rows(const Word* left, int64_t stride,
                                                      const Word* right, int64_t depth,
                                                      Tile& tile) {
    constexpr int kUnroll = 4;
    // A third of the rows' addresses are kept; the others are one or two strides away.
    const Word* bases[kRows / 3];
    for (int i = 0; i < kRows / 3; ++i) bases[i] = left + 3 * i * stride;
    int64_t k = 0;
    for (; k + kUnroll <= depth; k += kUnroll) {
#pragma GCC unroll 4
      for (int step = 0; step < kUnroll; ++step) {
        add_step([&](int i)
                     __attribute__((always_inline)) { return bases[i / 3][i % 3 * stride + step]; },
                 right + step * kColumns, tile);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows / 3; ++i) bases[i] += kUnroll;
      right += kUnroll * kColumns;
    }
    for (; k < depth; ++k) {
      add_step([&](int i) __attribute__((always_inline)) { return bases[i / 3][i % 3 * stride]; },
               right, tile);
#pragma GCC unroll 4
      for (int i = 0; i < kRows / 3; ++i) ++bases[i];
      right += kColumns;
    }
  }

  // left(m, k) = left[m + k * stride]: columns that lie `stride` words apart.
  __attribute__((always_inline)) static void add_columns(const Word* left, int64_t stride,
                                                         const Word* right, int64_t depth,
                                                         Tile& tile) {
    for (int64_t k = 0; k < depth; ++k) {
      add_step([&](int i) __attribute__((always_inline)) { return left[i]; }, right, tile);
      left += stride;
      right += kColumns;
    }
  }

  template <class Left>
  __attribute__((always_inline)) static void add_step(const Left& left, const Word* right,
                                                      Tile& tile) {
    const auto right0 = M::load(right);
    const auto right1 = M::load(right + V::size);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto broadcast = M::broadcast(left(i));
      tile[i][0] = M::add(broadcast, right0, tile[i][0]);
      tile[i][1] = M::add(broadcast, right1, tile[i][1]);
    }
  }
};

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
