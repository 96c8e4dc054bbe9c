// The order in which suppression visits boxes: by falling score, ties by lower index, NaN last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../math/nms.h"

namespace fastzoo::cpu {

template <class Key>
struct Entry {
  Key key;
  int32_t index;
};

// Least significant digit first, which keeps the order of equal keys.
template <class Key>
void radix_sort(std::vector<Entry<Key>>& entries) {
  constexpr int kDigits = sizeof(Key);
  uint32_t counts[kDigits][256] = {};
  for (const Entry<Key>& entry : entries) {
    for (int digit = 0; digit < kDigits; ++digit) ++counts[digit][entry.key >> (8 * digit) & 255];
  }
  std::vector<Entry<Key>> other(entries.size());
  for (int digit = 0; digit < kDigits; ++digit) {
    uint32_t* const start = counts[digit];
    if (start[entries[0].key >> (8 * digit) & 255] == entries.size()) continue;
    uint32_t sum = 0;
    for (int value = 0; value < 256; ++value) {
      const uint32_t count = start[value];
      start[value] = sum;
      sum += count;
    }
    for (const Entry<Key>& entry : entries) other[start[entry.key >> (8 * digit) & 255]++] = entry;
    entries.swap(other);
  }
}

template <class T, class Scores>
std::vector<int32_t> order_by_falling_score(const Scores* scores, int64_t n) {
  using Key = decltype(math::falling_key(T{}));
  std::vector<Entry<Key>> entries(n);
  for (int64_t i = 0; i < n; ++i) {
    entries[i] = {math::falling_key(static_cast<T>(scores[i])), static_cast<int32_t>(i)};
  }
  constexpr int64_t kFew = 256;
  if (n < kFew) {
    std::sort(entries.begin(), entries.end(), [](const Entry<Key>& a, const Entry<Key>& b) {
      return a.key != b.key ? a.key < b.key : a.index < b.index;
    });
  } else {
    radix_sort(entries);
  }
  std::vector<int32_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = entries[i].index;
  return order;
}

}  // namespace fastzoo::cpu
