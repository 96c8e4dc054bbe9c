// The counter's words against the known answers of Philox, the normals against the formula in long
// double, of vectors and of scalars bit for bit; stochastic rounding's mean; clamps and weights.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_ode_step, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_ode_step)

#else

#include <math.h>

#include <utility>
#include <vector>

#include "../../csrc/cpu/runtime/convert.h"
#include "../../csrc/cpu/runtime/counter_random.h"
#include "../../csrc/math/ode_step.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::RandomBlock;

// The answers that come with the authors' Random123.
struct Answer {
  uint32_t counter[4], key[2], words[4];
};
constexpr Answer kAnswers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};

void check_answers(int& failures) {
  for (const Answer& answer : kAnswers) {
    const auto& c = answer.counter;
    const RandomBlock<uint32_t> one =
        math::philox(c[0], c[1], c[2], c[3], answer.key[0], answer.key[1]);
    const RandomBlock<WideWords> many =
        math::philox(WideWords(c[0]), WideWords(c[1]), WideWords(c[2]), WideWords(c[3]),
                     WideWords(answer.key[0]), WideWords(answer.key[1]));
    for (int i = 0; i < 4; ++i) {
      CHECK(one.words[i] == answer.words[i]);
      uint32_t words[Words::size];
      many.words[i].narrow().store(words);
      for (const uint32_t word : words) CHECK(word == answer.words[i]);
    }
  }
}

// One by one, of element `i` of a row.
uint32_t word_of(const int64_t* key, uint32_t draw, int64_t i) {
  return math::random_block(math::random_key(key), draw, i / 4).words[i % 4];
}
float normal_of(const int64_t* key, uint32_t draw, int64_t i) {
  float normals[4];
  math::normals_of(math::random_block(math::random_key(key), draw, i / 4), normals);
  return normals[i % 4];
}

void check_rows(int& failures) {
  const int64_t keys[][2] = {
      {5, 0}, {-1, -1}, {int64_t{1} << 62, int64_t{1} << 33}, {7, 3}, {8, 4}};
  constexpr int64_t kRows = sizeof(keys) / sizeof(keys[0]);
  // Blocks are numbered beyond 32 bits.
  const int64_t begin = (int64_t{1} << 34) - 64;
  for (const int64_t width : {1, 2, 3, 4, 5, 8, 37, 128, 300}) {
    const auto draw = [](int64_t row) { return static_cast<uint32_t>(row) | math::kRoundingDraw; };
    std::vector<uint32_t> words(kRows * width + kRandomAtOnce);
    std::vector<float> normals(kRows * width + kRandomAtOnce);
    random_of_rows(keys[0], draw, kRows, width, words.data());
    random_of_rows(keys[0], draw, kRows, width, normals.data());
    bool alike = true;
    for (int64_t i = 0; i < kRows * width; ++i) {
      const int64_t row = i / width, column = i % width;
      alike = alike && words[i] == word_of(keys[row], draw(row), column);
      const float normal = normal_of(keys[row], draw(row), column);
      alike = alike && math::bits_of(normals[i]) == math::bits_of(normal);
    }
    CHECK(alike);
    random_of_row(keys[2], 9, begin, width, words.data());
    random_of_row(keys[2], 9, begin, width, normals.data());
    for (int64_t i = 0; i < width; ++i) {
      alike = alike && words[i] == word_of(keys[2], 9, begin + i);
      const float normal = normal_of(keys[2], 9, begin + i);
      alike = alike && math::bits_of(normals[i]) == math::bits_of(normal);
    }
    CHECK(alike);
  }
}

// Of pairs of words the normals' largest error in units of their last place; the uniform number is
// the float that the definition makes of its word.
void check_normals(int& failures) {
  constexpr int64_t kCount = 1 << 18;
  const long double turn = 2 * acosl(-1.0L) * 0x1p-32L;
  const int64_t key[] = {1, 2};
  double worst = 0;
  bool alike = true;
  const uint32_t edges[] = {0,          1,          0x1fffffff, 0x20000000, 0x20000001,
                            0x40000000, 0x5fffffff, 0x7fffffff, 0x80000000, 0xe0000000,
                            0xffffff7f, 0xffffff80, ~0u};
  constexpr int64_t kEdges = sizeof(edges) / sizeof(edges[0]);
  for (int64_t i = 0; i < kCount; i += Words::size) {
    uint32_t first[Words::size], second[Words::size];
    for (int64_t j = 0; j < Words::size; ++j) {
      const RandomBlock<uint32_t> block = math::random_block(math::random_key(key), 3, i + j);
      first[j] = i + j < kEdges * kEdges ? edges[(i + j) / kEdges] : block.words[0];
      second[j] = i + j < kEdges * kEdges ? edges[(i + j) % kEdges] : block.words[1];
    }
    Vec<float> z0, z1;
    math::normal_pair(Words::load(first), Words::load(second), z0, z1);
    for (int j = 0; j < Words::size; ++j) {
      float one, other;
      math::normal_pair(first[j], second[j], one, other);
      alike = alike && math::bits_of(one) == math::bits_of(z0[j]) &&
              math::bits_of(other) == math::bits_of(z1[j]);
      const float u = static_cast<float>(first[j]) * 0x1p-32f + 0x1p-33f;
      const long double radius = sqrtl(-2 * logl(u));
      // Of whole quarters the sine or the cosine is 0, which acosl(-1) is too coarse to give.
      const uint32_t quarter = second[j] & 0x3fffffffu;
      const uint32_t odd = second[j] >> 30 & 1u;
      const long double cosine = quarter == 0 && odd != 0 ? 0 : cosl(turn * second[j]);
      const long double sine = quarter == 0 && odd == 0 ? 0 : sinl(turn * second[j]);
      for (const auto& [got, wanted] : {std::pair<float, long double>{one, radius * cosine},
                                        std::pair<float, long double>{other, radius * sine}}) {
        const long double unit = ldexpl(1, ilogbf(got == 0 ? 0x1p-126f : got) - 23);
        const double error = static_cast<double>(fabsl(got - wanted) / unit);
        if (!(error <= worst)) worst = error;
      }
    }
  }
  std::printf("normals: within %.2f units in the last place\n", worst);
  CHECK(alike);
  CHECK(worst < 4);
}

void check_conversions(int& failures) {
  const uint32_t words[] = {0,          1,          0xffffff,   0x1000001,  0x1000003, 0x7fffffc0,
                            0x80000080, 0x80000180, 0xffffff7f, 0xffffff80, ~0u};
  for (const uint32_t word : words) {
    CHECK(float_of(Words(word))[0] == static_cast<float>(word));
    CHECK(float_of_signed(Words(word))[0] == static_cast<float>(static_cast<int32_t>(word)));
  }
}

struct ToBFloat16 {
  using Element = BFloat16;
  static uint32_t nearest(float value) {
    BFloat16 element;
    narrow(static_cast<double>(value), element);
    return element.bits;
  }
  template <class F, class W>
  static W round(F value, W word, W nearest) {
    return math::stochastic_bfloat16(value, word, nearest);
  }
};
struct ToHalf {
  using Element = Half;
  static uint32_t nearest(float value) {
    Half element;
    narrow(static_cast<double>(value), element);
    return element.bits;
  }
  template <class F, class W>
  static W round(F value, W word, W nearest) {
    return math::stochastic_half(value, word, nearest);
  }
};

// The element that a word rounds to, of a scalar; the vector's must be the same.
template <class To>
typename To::Element rounded(float value, uint32_t word, int& failures) {
  const uint32_t nearest = To::nearest(value);
  const uint32_t bits = To::round(value, word, nearest);
  uint32_t all[Words::size];
  To::round(Vec<float>(value), Words(word), Words(nearest)).store(all);
  CHECK(all[0] == bits && all[Words::size - 1] == bits);
  return {static_cast<uint16_t>(bits)};
}

// Every word of `bits` bits, or each 2^skip-th of them, is as likely: the mean is the value.
template <class To>
void check_mean(float value, int bits, int skip, int& failures) {
  const int64_t count = int64_t{1} << (bits - skip);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    // The words' upper bits count for nothing.
    const uint32_t word =
        static_cast<uint32_t>(i << skip) | (bits < 24 ? 0xab000000u : 0x5a000000u);
    sum += widen(rounded<To>(value, word, failures));
  }
  const double step = widen(rounded<To>(value, 0xffffff, failures)) -
                      static_cast<double>(widen(rounded<To>(value, 0, failures)));
  CHECK(fabs(step) > 0);
  CHECK(fabs(sum / static_cast<double>(count) - value) <= fabs(step) * ldexp(1, skip - bits));
}

void check_rounding(int& failures) {
  for (const float value : {1.2345678f, -3.1415927f, 1e-30f, -6.0e20f}) {
    check_mean<ToBFloat16>(value, 16, 0, failures);
  }
  for (const float value : {1.2345678f, -3.1415927f, 6.2e-5f, 60001.5f}) {
    check_mean<ToHalf>(value, 13, 0, failures);
  }
  for (const float value : {6.0e-5f, -1.0e-5f, 1.0e-8f, -3.3e-7f}) {
    check_mean<ToHalf>(value, 24, 12, failures);
  }
  const float infinity = __builtin_inff();
  // Not all ones: added to a subnormal half in floats, they are rounded to a whole step.
  for (const uint32_t word : {0u, 0xfffff000u, 0x12345fffu}) {
    // What has no rest stays, zeros keep their sign.
    for (const float value : {1.0f, -0.0f, 0.0f, 0x1p-24f, -0x1p-14f, 65504.0f, infinity}) {
      const bool fits = value != 65504.0f;  // which bfloat16 has not
      CHECK(!fits || widen(rounded<ToBFloat16>(value, word, failures)) == value);
      const Half half = rounded<ToHalf>(value, word, failures);
      CHECK(widen(half) == value && (half.bits >> 15 != 0) == (signbit(value) != 0));
    }
    CHECK(math::is_nan(widen(rounded<ToHalf>(__builtin_nanf(""), word, failures))));
    CHECK(math::is_nan(widen(rounded<ToBFloat16>(__builtin_nanf(""), word, failures))));
    CHECK(
        math::is_nan(widen(rounded<ToBFloat16>(math::float_of_bits(0x7fffffffu), word, failures))));
    CHECK(widen(rounded<ToHalf>(65510.0f, word, failures)) == 65504);
    CHECK(widen(rounded<ToHalf>(65520.0f, word, failures)) == infinity);
    CHECK(widen(rounded<ToHalf>(-1e9f, word, failures)) == -infinity);
  }
}

template <class V, class T>
void check_weights(int& failures, T (*lane)(V)) {
  const V inf(static_cast<T>(__builtin_inf())), nan(static_cast<T>(__builtin_nan("")));
  const V two(T(2)), one(T(1)), zero(T(0));
  CHECK(lane(math::add_weighted(zero, inf, two)) == 2);
  CHECK(lane(math::add_weighted(zero, nan, two)) == 2);
  CHECK(lane(math::add_weighted(two, one, two)) == 4);
  CHECK(math::is_nan(lane(math::add_weighted(nan, one, two))));
  CHECK(lane(math::clamp_to(two, one)) == 1 && lane(math::clamp_to(zero - two, one)) == -1);
  CHECK(lane(math::clamp_to(one, inf)) == 1 && math::is_nan(lane(math::clamp_to(nan, one))));
  CHECK(lane(math::thresholded(one, two)) == T(0.5) && lane(math::thresholded(inf, two)) == 1);
  CHECK(lane(math::error_scale(one, zero - two, two, one)) == 5);
  CHECK(math::is_nan(lane(math::error_scale(one, nan, two, one))));
  CHECK(math::is_nan(lane(math::error_scale(nan, one, two, one))));
}

}  // namespace

void check_ode_step(int& failures) {
  check_answers(failures);
  check_rows(failures);
  check_normals(failures);
  check_conversions(failures);
  check_rounding(failures);
  check_weights<float, float>(failures, [](float v) { return v; });
  check_weights<double, double>(failures, [](double v) { return v; });
  check_weights<Vec<float>, float>(failures, [](Vec<float> v) { return v[Vec<float>::size - 1]; });
  check_weights<Vec<double>, double>(failures,
                                     [](Vec<double> v) { return v[Vec<double>::size - 1]; });
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
