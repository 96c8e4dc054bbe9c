// The vector type and the element conversions agree with scalar arithmetic, special values
// included.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_vec, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_vec)

#else

#include "../../csrc/cpu/runtime/convert.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

template <class T>
bool same(T a, T b) {
  return math::is_nan(a) ? math::is_nan(b) : __builtin_memcmp(&a, &b, sizeof(T)) == 0;
}

float scalar_fma(float a, float b, float c) {
  return kVectorBytes == 16 ? a * b + c : __builtin_fmaf(a, b, c);
}
double scalar_fma(double a, double b, double c) {
  return kVectorBytes == 16 ? a * b + c : __builtin_fma(a, b, c);
}

template <class T>
void check_arithmetic(int& failures, T smallest) {
  using V = Vec<T>;
  const T infinity = static_cast<T>(__builtin_inf());
  const T nan = static_cast<T>(__builtin_nan(""));
  const T values[] = {T(0),    -T(0),    T(1),     T(-1),     T(0.1),
                      T(-7.3), smallest, infinity, -infinity, nan};
  constexpr int kValues = sizeof(values) / sizeof(T);
  for (int first = 0; first < kValues; ++first) {
    for (int second = 0; second < kValues; ++second) {
      // One odd element ahead, so that loads and stores are misaligned.
      T a[V::size + 1], b[V::size + 1], c[V::size + 1], r[V::size + 1];
      for (int i = 0; i < V::size; ++i) {
        a[i + 1] = values[(first + i) % kValues];
        b[i + 1] = values[(second + 3 * i) % kValues];
        c[i + 1] = values[(first + 7 * i) % kValues];
      }
      const V va = V::load(a + 1), vb = V::load(b + 1), vc = V::load(c + 1);
      const auto check = [&](V result, auto scalar) {
        result.store(r + 1);
        for (int i = 1; i <= V::size; ++i) {
          CHECK(same(r[i], scalar(a[i], b[i], c[i])));
          CHECK(same(result[i - 1], r[i]));
        }
      };
      check(va + vb, [](T x, T y, T) { return x + y; });
      check(va - vb, [](T x, T y, T) { return x - y; });
      check(va * vb, [](T x, T y, T) { return x * y; });
      check(va / vb, [](T x, T y, T) { return x / y; });
      check(fused_multiply_add(va, vb, vc), [](T x, T y, T z) { return scalar_fma(x, y, z); });
      check(maximum(va, vb), [](T x, T y, T) { return math::maximum(x, y); });
      check(minimum(va, vb), [](T x, T y, T) { return math::minimum(x, y); });
      check(V(a[1]), [&](T, T, T) { return a[1]; });
      uint32_t less_bits = 0, less_equal_bits = 0, greater_bits = 0;
      for (int i = 0; i < V::size; ++i) {
        less_bits |= static_cast<uint32_t>(a[i + 1] < b[i + 1]) << i;
        less_equal_bits |= static_cast<uint32_t>(a[i + 1] <= b[i + 1]) << i;
        greater_bits |= static_cast<uint32_t>(a[i + 1] > b[i + 1]) << i;
      }
      CHECK(less(va, vb).bits == less_bits);
      CHECK(less_equal(va, vb).bits == less_equal_bits);
      CHECK(greater(va, vb).bits == greater_bits);
      CHECK(not_less(va, vb).bits == (~less_bits & V::MaskType::kAll));
      CHECK(less(va, vb).any() == (less_bits != 0));
    }
  }
}

// The value of a finite element, from the definition of its fields.
double by_fields(uint16_t bits, int mantissa_bits, int bias) {
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double magnitude = exponent == 0 ? __builtin_ldexp(mantissa, 1 - bias - mantissa_bits)
                                         : __builtin_ldexp(mantissa + (1 << mantissa_bits),
                                                           exponent - bias - mantissa_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <class Element>
void check_conversion(int& failures, int mantissa_bits, int bias) {
  const uint16_t infinity = static_cast<uint16_t>(0x7fff >> mantissa_bits << mantissa_bits);
  Element narrowed;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const Element element{static_cast<uint16_t>(bits)};
    const int magnitude = bits & 0x7fff;
    narrow(widen(element), narrowed);
    if (magnitude > infinity) {
      CHECK(math::is_nan(widen(element)) && math::is_nan(widen(narrowed)));
      continue;
    }
    CHECK(narrowed.bits == bits);
    if (magnitude == infinity) {
      CHECK(widen(element) == (bits & 0x8000 ? -__builtin_inff() : __builtin_inff()));
      continue;
    }
    const double value = by_fields(element.bits, mantissa_bits, bias);
    CHECK(widen(element) == static_cast<float>(value));
    // Half way to the next element, and just beside it. Beyond the largest finite element stands
    // what would follow it, and the result is infinity.
    const double next = by_fields(static_cast<uint16_t>(bits + 1), mantissa_bits, bias);
    const float middle = static_cast<float>((value + next) / 2);
    narrow(middle, narrowed);
    CHECK(narrowed.bits == bits + (bits & 1));
    narrow(__builtin_nextafterf(middle, static_cast<float>(value)), narrowed);
    CHECK(narrowed.bits == bits);
    narrow(__builtin_nextafterf(middle, static_cast<float>(next)), narrowed);
    CHECK(narrowed.bits == bits + 1);
  }
  // Vectors of elements, from any address.
  constexpr int kSize = Vec<float>::size;
  Element elements[kSize + 1];
  for (int bits = 0; bits < 0x10000; bits += kSize) {
    for (int i = 0; i < kSize; ++i) elements[i + 1].bits = static_cast<uint16_t>(bits + i);
    const Vec<float> wide = load_wide(elements + 1);
    for (int i = 0; i < kSize; ++i) CHECK(same(wide[i], widen(elements[i + 1])));
  }
  // And to any address, rounded as a number by itself is: every element, and what is between them.
  for (int bits = 0; bits < 0x10000; bits += kSize) {
    for (const uint32_t beyond : {0u, 1u, 0x800u, 0x1000u, 0x1001u, 0x8000u, 0x18000u}) {
      float values[kSize];
      for (int i = 0; i < kSize; ++i) {
        const Element element{static_cast<uint16_t>(bits + i)};
        values[i] = math::bits_as<float>(math::bits_as<uint32_t>(widen(element)) + beyond);
      }
      store_narrow(Vec<float>::load(values), elements + 1);
      for (int i = 0; i < kSize; ++i) {
        narrow(values[i], narrowed);
        CHECK(elements[i + 1].bits == narrowed.bits);
      }
    }
  }
}

template <class T>
void check_transpose(int& failures) {
  constexpr int kSize = Vec<T>::size;
  T values[kSize][kSize];
  Vec<T> rows[kSize];
  for (int i = 0; i < kSize; ++i) {
    for (int j = 0; j < kSize; ++j) values[i][j] = static_cast<T>(i * kSize + j);
    rows[i] = Vec<T>::load(values[i]);
  }
  transpose(rows);
  bool equal = true;
  for (int i = 0; i < kSize; ++i) {
    for (int j = 0; j < kSize; ++j) equal = equal && rows[i][j] == values[j][i];
  }
  CHECK(equal);

  for (int i = 0; i < kSize; ++i) rows[i] = Vec<T>::load(values[i]);
  const Vec<T> totals = lane_sums(rows);
  for (int i = 0; i < kSize; ++i) CHECK(totals[i] == kSize * kSize * i + kSize * (kSize - 1) / 2);

  for (int i = 0; i < kSize; ++i) rows[i] = Vec<T>::load(values[i]) / Vec<T>(T(3));
  T each[kSize];
  for (int i = 0; i < kSize; ++i) each[i] = neighbours_sum(rows[i]);
  const Vec<T> thirds = lane_sums(rows);
  for (int i = 0; i < kSize; ++i) CHECK(thirds[i] == each[i]);
  const Vec<T> even = even_elements(Vec<T>::load(values[0]), Vec<T>::load(values[1]));
  for (int i = 0; i < kSize; ++i) CHECK(even[i] == 2 * i);
  alignas(kVectorBytes) T streamed[kSize];
  stream(Vec<T>::load(values[1]), streamed);
  stream_fence();
  for (int i = 0; i < kSize; ++i) CHECK(streamed[i] == kSize + i);
  uint8_t bytes[kSize + 1] = {};
  for (int i = 0; i < kSize; ++i) {
    bytes[i + 1] = static_cast<uint8_t>(1 << i % 8);
    CHECK(load_mask<T>(bytes + 1).bits == (uint64_t{2} << i) - 1);
  }

  constexpr int kSums = kSize / Vec<double>::size;
  Vec<double> sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Vec<double>(1.0);
  add_squares(Vec<T>::load(values[0]), sums);
  for (int i = 0; i < kSize; ++i) {
    CHECK(sums[i / Vec<double>::size][i % Vec<double>::size] == 1 + i * i);
  }
}

}  // namespace

void check_vec(int& failures) {
  check_transpose<float>(failures);
  check_transpose<double>(failures);
  check_arithmetic<float>(failures, 0x1p-149f);
  check_arithmetic<double>(failures, 0x1p-1074);
  check_conversion<Half>(failures, 10, 15);
  check_conversion<BFloat16>(failures, 7, 127);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
