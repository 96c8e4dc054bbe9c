// Boxes of different ids do not meet: each id's are a segment, suppressed by itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "falling_order.h"

namespace fastzoo::cpu {

// The boxes of each segment in turn, in the order given within it.
struct Segments {
  std::vector<int32_t> boxes;
  std::vector<int64_t> begins;  // of each segment, and the end of the last

  int64_t size() const { return begins.back(); }
  int64_t count() const { return static_cast<int64_t>(begins.size()) - 1; }
};

// `own` has the id of each box.
template <class Key>
void sort_by_segment(const std::vector<int64_t>& own, int64_t least, Segments& segments) {
  const int64_t n = static_cast<int64_t>(own.size());
  std::vector<Entry<Key>> entries(n);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = static_cast<uint64_t>(own[i]) - static_cast<uint64_t>(least);
    entries[i] = {static_cast<Key>(key), segments.boxes[i]};
  }
  radix_sort(entries);
  for (int64_t i = 0; i < n; ++i) {
    if (i > 0 && entries[i].key != entries[i - 1].key) segments.begins.push_back(i);
    segments.boxes[i] = entries[i].index;
  }
}

// `ids` are those of all boxes, of which `order` may be some; without ids there is one segment.
// Without boxes there is none.
inline Segments segments_of(std::vector<int32_t> order, const int64_t* ids) {
  Segments segments{std::move(order), {0}};
  const int64_t n = static_cast<int64_t>(segments.boxes.size());
  if (n == 0) return segments;
  if (ids != nullptr) {
    std::vector<int64_t> own(n);
    for (int64_t i = 0; i < n; ++i) own[i] = ids[segments.boxes[i]];
    const auto [least, most] = std::minmax_element(own.begin(), own.end());
    const uint64_t range = static_cast<uint64_t>(*most) - static_cast<uint64_t>(*least);
    if (range >> 32 != 0) {
      sort_by_segment<uint64_t>(own, *least, segments);
    } else if (range > 0) {
      sort_by_segment<uint32_t>(own, *least, segments);
    }
  }
  segments.begins.push_back(n);
  return segments;
}

}  // namespace fastzoo::cpu
