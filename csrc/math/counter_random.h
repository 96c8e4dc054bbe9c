// Random numbers that are functions of a key and a counter, equal bit for bit on every backend:
// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), and normals by
// Box and Muller's transformation in additions, products and one square root of floats, each
// rounded by itself. Words are of type W, that is uint32_t or the CPU's vector of them, floats of
// type F likewise. Built without contraction. fastzoo/reference/counter_random.py is the
// definition.
#pragma once

#include "host_device.h"

namespace fastzoo::math {

// The scalar twins of what the CPU's vectors of words have.
FASTZOO_HD void multiply_wide(uint32_t a, uint32_t by, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * by;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}
FASTZOO_HD uint32_t bits_of(float value) { return bits_as<uint32_t>(value); }
FASTZOO_HD float float_of_bits(uint32_t bits) { return bits_as<float>(bits); }
// To nearest, ties to even.
FASTZOO_HD float float_of(uint32_t word) { return static_cast<float>(word); }
FASTZOO_HD float float_of_signed(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word));
}
// Of a number from 0 to 2^31, towards 0.
FASTZOO_HD uint32_t truncated(float value) { return static_cast<uint32_t>(value); }
FASTZOO_HD uint32_t shift_right_signed(uint32_t word, int by) {
  return static_cast<uint32_t>(static_cast<int32_t>(word) >> by);
}
FASTZOO_HD float select_nonzero(uint32_t word, float a, float b) { return word != 0 ? a : b; }
FASTZOO_HD uint32_t select_nonzero(uint32_t word, uint32_t a, uint32_t b) {
  return word != 0 ? a : b;
}

constexpr int kWordsOfBlock = 4;
// Draws of this bit are of the words that round stochastically.
constexpr uint32_t kRoundingDraw = uint32_t{1} << 31;

// Whose numbers they are: a row of an operator's keys.
struct RandomKey {
  uint32_t seed_low, seed_high, sample;
};
FASTZOO_HD RandomKey random_key(const int64_t* row) {
  const uint64_t seed = static_cast<uint64_t>(row[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(static_cast<uint64_t>(row[1]))};
}

template <class W>
struct RandomBlock {
  W words[kWordsOfBlock];
};

template <class W>
FASTZOO_HD RandomBlock<W> philox(W c0, W c1, W c2, W c3, W key0, W key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 = key0 + W(0x9E3779B9u);
    key1 = key1 + W(0xBB67AE85u);
  }
  return {{c0, c1, c2, c3}};
}

// The words of elements 4 block to 4 block + 3.
FASTZOO_HD RandomBlock<uint32_t> random_block(const RandomKey& key, uint32_t draw, uint64_t block) {
  return philox(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), draw, key.sample,
                key.seed_low, key.seed_high);
}

// log u of a uniform number of (0, 1], as Cephes' logf: 2^e (1 + f) is u, with 1 + f between the
// roots of 1/2 and of 2.
template <class F, class W>
FASTZOO_HD F log_of_uniform(F u) {
  const W bits = bits_of(u);
  const W e = shift_right_signed(bits - W(0x3f3504f3u), 23);
  const F k = float_of_signed(e);
  const F f = float_of_bits(bits - (e << 23)) - F(1.0f);
  const F g = f * f;
  F p(7.0376836292e-2f);
  p = p * f + F(-1.1514610310e-1f);
  p = p * f + F(1.1676998740e-1f);
  p = p * f + F(-1.2420140846e-1f);
  p = p * f + F(1.4249322787e-1f);
  p = p * f + F(-1.6668057665e-1f);
  p = p * f + F(2.0000714765e-1f);
  p = p * f + F(-2.4999993993e-1f);
  p = p * f + F(3.3333331174e-1f);
  F y = (p * f) * g;
  y = y + k * F(-2.12194440e-4f);
  y = y - F(0.5f) * g;
  return (f + y) + k * F(0.693359375f);
}

// Two independent normals of two words: the first has the radius, the second the angle.
template <class F, class W>
FASTZOO_HD void normal_pair(W radius_word, W angle_word, F& first, F& second) {
  const F u = float_of(radius_word) * F(0x1p-32f) + F(0x1p-33f);
  const F twice = F(-2.0f) * log_of_uniform<F, W>(u);
  // Of u = 1 the radius is 0, and not -0.
  const F radius = square_root(select_greater(twice, F(0.0f), twice, F(0.0f)));

  // The angle is a quarter turn q and a rest between -pi/4 and pi/4.
  const W turned = angle_word + W(0x20000000u);  // bits 31 and 30 are q
  const F a = float_of_signed(angle_word - (turned & W(0xc0000000u))) * F(1.4629180792671596e-09f);
  const F h = a * a;
  F sine = F(-1.9515295891e-4f) * h + F(8.3321608736e-3f);
  sine = sine * h - F(1.6666654611e-1f);
  sine = (sine * h) * a + a;
  F cosine = F(2.443315711809948e-5f) * h - F(1.388731625493765e-3f);
  cosine = cosine * h + F(4.166664568298827e-2f);
  cosine = (cosine * h) * h - F(0.5f) * h + F(1.0f);
  const W odd = turned & W(0x40000000u);
  const W sign(0x80000000u);
  const F c = select_nonzero(odd, sine, cosine), s = select_nonzero(odd, cosine, sine);
  first = radius * float_of_bits(bits_of(c) ^ ((turned ^ (turned << 1)) & sign));
  second = radius * float_of_bits(bits_of(s) ^ (turned & sign));
}

template <class F, class W>
FASTZOO_HD void normals_of(const RandomBlock<W>& block, F (&normals)[kWordsOfBlock]) {
  normal_pair(block.words[0], block.words[1], normals[0], normals[1]);
  normal_pair(block.words[2], block.words[3], normals[2], normals[3]);
}

}  // namespace fastzoo::math
