// The bits of a distance and the index of its point, ordered by the bits and then by the index: one
// number for float, a pair for double.
#pragma once

#include "../../math/neighbours.h"
#include "launch.h"

namespace fastzoo::cuda {

struct alignas(16) WideKey {
  uint64_t bits;
  uint32_t index;
};

template <class C>
using DistanceBits = std::conditional_t<std::is_same_v<C, double>, uint64_t, uint32_t>;
template <class C>
using DistanceKey = std::conditional_t<std::is_same_v<C, double>, WideKey, uint64_t>;

// Those of nothing: after all others.
template <class C>
constexpr DistanceBits<C> kNoBits = std::numeric_limits<DistanceBits<C>>::max();
constexpr uint32_t kNoIndex = 0xffffffffu;

FASTZOO_HD uint64_t make_key(uint32_t bits, uint32_t index) {
  return static_cast<uint64_t>(bits) << 32 | index;
}
FASTZOO_HD WideKey make_key(uint64_t bits, uint32_t index) { return {bits, index}; }

template <class C>
FASTZOO_HD DistanceKey<C> no_key() {
  return make_key(kNoBits<C>, kNoIndex);
}

FASTZOO_HD uint32_t bits_of(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
FASTZOO_HD uint64_t bits_of(WideKey key) { return key.bits; }
FASTZOO_HD uint32_t index_of(uint64_t key) { return static_cast<uint32_t>(key); }
FASTZOO_HD uint32_t index_of(WideKey key) { return key.index; }

FASTZOO_HD bool before(uint64_t a, uint64_t b) { return a < b; }
FASTZOO_HD bool before(WideKey a, WideKey b) {
  return a.bits < b.bits || (a.bits == b.bits && a.index < b.index);
}

FASTZOO_DEVICE uint64_t shuffle_key(uint64_t key, int source) { return shuffle(key, source); }
FASTZOO_DEVICE WideKey shuffle_key(WideKey key, int source) {
  return {shuffle(key.bits, source), shuffle(key.index, source)};
}

// The first of a warp's keys, or the least of its bits.
FASTZOO_DEVICE uint64_t warp_first(uint64_t key) {
  const uint32_t bits = warp_min(bits_of(key));
  return make_key(bits, warp_min(bits_of(key) == bits ? index_of(key) : kNoIndex));
}
FASTZOO_DEVICE WideKey warp_first(WideKey key) {
  const int lane = threadIdx.x % kWarpSize;
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
    const WideKey other = shuffle_key(key, lane ^ flip);
    if (before(other, key)) key = other;
  }
  return key;
}
FASTZOO_DEVICE uint32_t warp_least(uint32_t bits) { return warp_min(bits); }
FASTZOO_DEVICE uint64_t warp_least(uint64_t bits) {
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
    const uint64_t other = shuffle_xor(bits, flip);
    if (other < bits) bits = other;
  }
  return bits;
}

}  // namespace fastzoo::cuda
