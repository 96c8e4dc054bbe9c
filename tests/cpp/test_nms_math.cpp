// The ordering and threshold arithmetic of csrc/math/nms.h.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "../../csrc/math/nms.h"
#include "check.h"

using fastzoo::math::bits_as;
using fastzoo::math::falling_key;
using fastzoo::math::round_down;

namespace {

int failures = 0;

template <class T>
using Limits = std::numeric_limits<T>;

template <class T, class Bits>
T random_bits(std::mt19937_64& random) {
  return bits_as<T>(static_cast<Bits>(random()));
}

void round_down_is_the_largest_not_above(double threshold) {
  const float down = round_down<float>(threshold);
  CHECK(static_cast<double>(down) <= threshold);
  const float above = std::nextafter(down, Limits<float>::infinity());
  CHECK(static_cast<double>(above) > threshold || down == Limits<float>::infinity());
  for (const float overlap : {down, above, std::nextafter(down, -Limits<float>::infinity())}) {
    CHECK((overlap > down) == (static_cast<double>(overlap) > threshold));
  }
}

void test_round_down() {
  const double denormal = Limits<float>::denorm_min();
  for (const double threshold : {0.0,
                                 -0.0,
                                 0.1,
                                 -0.1,
                                 0.25,
                                 0.3,
                                 0.45,
                                 0.5,
                                 0.5000000001,
                                 0.4999999999,
                                 0.7,
                                 0.95,
                                 1.0,
                                 1.1,
                                 denormal,
                                 -denormal,
                                 denormal / 2,
                                 -denormal / 2,
                                 denormal * 1.5,
                                 -denormal * 1.5,
                                 1e-310,
                                 -1e-310,
                                 1e-40,
                                 -1e-40,
                                 0x1.fffffefp-127,
                                 3e38,
                                 -3e38,
                                 1e39,
                                 1e300,
                                 Limits<double>::infinity(),
                                 static_cast<double>(Limits<float>::max())}) {
    round_down_is_the_largest_not_above(threshold);
    CHECK(round_down<double>(threshold) == threshold);
  }
  CHECK(round_down<float>(0.5000000001) == 0.5f);
  CHECK(round_down<float>(0.4999999999) == std::nextafter(0.5f, 0.0f));
  CHECK(round_down<float>(-1e-310) == -Limits<float>::denorm_min());
  CHECK(round_down<float>(1e-310) == 0.0f);
  CHECK(round_down<float>(1e39) == Limits<float>::max());
  CHECK(round_down<float>(-1e39) == -Limits<float>::infinity());
  CHECK(std::isnan(round_down<float>(Limits<double>::quiet_NaN())));
  CHECK(std::isnan(round_down<double>(Limits<double>::quiet_NaN())));

  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(-0.5, 1.5);
  for (int i = 0; i < 1000000; ++i) {
    round_down_is_the_largest_not_above(uniform(random));
    const double any = random_bits<double, uint64_t>(random);
    if (any >= -static_cast<double>(Limits<float>::max())) round_down_is_the_largest_not_above(any);
  }
}

template <class T, class Bits>
void test_falling_key() {
  const T inf = Limits<T>::infinity(), nan = Limits<T>::quiet_NaN();
  const T denormal = Limits<T>::denorm_min();
  const T falling[] = {inf,       Limits<T>::max(),
                       T(2),      T(1),
                       T(0.5),    Limits<T>::min(),
                       denormal,  T(0),
                       -denormal, -Limits<T>::min(),
                       T(-1),     Limits<T>::lowest(),
                       -inf,      nan};
  constexpr int kCount = sizeof(falling) / sizeof(T);
  for (int i = 1; i < kCount; ++i) CHECK(falling_key(falling[i - 1]) < falling_key(falling[i]));
  CHECK(falling_key(T(-0.0)) == falling_key(T(0.0)));

  const Bits all = ~Bits{0};
  CHECK(falling_key(nan) == all);
  CHECK(falling_key(-nan) == all);
  CHECK(falling_key(Limits<T>::signaling_NaN()) == all);
  CHECK(falling_key(-inf) < all);

  std::mt19937_64 random(2);
  for (int i = 0; i < 1000000; ++i) {
    const T a = random_bits<T, Bits>(random);
    const T b = i % 2 == 0 ? random_bits<T, Bits>(random) : std::nextafter(a, inf);
    if (std::isnan(a) || std::isnan(b)) {
      CHECK(!std::isnan(a) || falling_key(a) == all);
      CHECK(!std::isnan(b) || falling_key(b) == all);
      continue;
    }
    CHECK((a > b) == (falling_key(a) < falling_key(b)));
    CHECK((a == b) == (falling_key(a) == falling_key(b)));
  }
}

}  // namespace

int main() {
  test_round_down();
  test_falling_key<float, uint32_t>();
  test_falling_key<double, uint64_t>();
  if (failures == 0) std::puts("ok");
  return failures;
}
