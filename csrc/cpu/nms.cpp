#include "../math/nms.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../torch_abi.h"
#include "kernels/nms.h"

namespace fastzoo::cpu {
namespace {

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

void run(NmsArgs<float>& args) { FASTZOO_SELECT_KERNEL(nms_float)(args); }
void run(NmsArgs<double>& args) { FASTZOO_SELECT_KERNEL(nms_double)(args); }

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  const int64_t n = boxes.size(0);
  // The kernel counts up to four entries a box in 32 bits.
  STD_TORCH_CHECK(n < int64_t{1} << 30, "nms: fewer than 2^30 boxes needed, got ", n);
  const Tensor dense_boxes = torch::stable::contiguous(boxes);
  const Tensor dense_scores = torch::stable::contiguous(scores);
  Tensor kept;
  dispatch_float(boxes.scalar_type(), "nms", [&](auto element) {
    using Element = decltype(element);
    using T = std::conditional_t<std::is_same_v<Element, double>, double, float>;
    std::vector<int32_t> order =
        order_by_falling_score<T>(static_cast<const Element*>(dense_scores.const_data_ptr()), n);
    const Element* const given = static_cast<const Element*>(dense_boxes.const_data_ptr());
    std::vector<T> converted;
    NmsArgs<T> args;
    if constexpr (std::is_same_v<Element, T>) {
      args.boxes = given;
    } else {
      converted.assign(given, given + 4 * n);
      args.boxes = converted.data();
    }
    args.n = n;
    args.threshold = math::round_down<T>(iou_threshold);
    args.order = order.data();
    run(args);
    STD_TORCH_CHECK(args.kept >= 0, "nms: out of memory for ", n, " boxes");
    kept = empty(boxes, {args.kept}, ScalarType::Long);
    std::copy_n(order.data(), args.kept, static_cast<int64_t*>(kept.mutable_data_ptr()));
  });
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<nms>(m, "nms");
  implement<nms>(m, "nms.cpu");
}

}  // namespace fastzoo::cpu
