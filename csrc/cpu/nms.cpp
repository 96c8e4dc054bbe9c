// fastzoo::nms, batched_nms and suppress on the CPU.
#include "kernels/nms.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../torch_abi.h"
#include "runtime/falling_order.h"

namespace fastzoo::cpu {
namespace {

// The ranks of each segment in turn, and where each ends.
struct Segments {
  std::vector<int32_t> ranks;
  std::vector<int64_t> ends;
};

template <class Key>
void sort_by_segment(const std::vector<int32_t>& order, const int64_t* ids, int64_t least,
                     Segments& segments) {
  const int64_t n = static_cast<int64_t>(order.size());
  std::vector<Entry<Key>> entries(n);
  for (int64_t rank = 0; rank < n; ++rank) {
    const uint64_t key = static_cast<uint64_t>(ids[order[rank]]) - static_cast<uint64_t>(least);
    entries[rank] = {static_cast<Key>(key), static_cast<int32_t>(rank)};
  }
  radix_sort(entries);
  for (int64_t i = 0; i < n; ++i) {
    if (i > 0 && entries[i].key != entries[i - 1].key) segments.ends.push_back(i);
    segments.ranks[i] = entries[i].index;
  }
  segments.ends.push_back(n);
}

// Boxes of different ids are of different segments; without ids there is one.
Segments segments_of(const std::vector<int32_t>& order, const int64_t* ids) {
  const int64_t n = static_cast<int64_t>(order.size());
  Segments segments;
  segments.ranks.resize(n);
  if (ids != nullptr && n > 0) {
    const auto [least, most] = std::minmax_element(ids, ids + n);
    const uint64_t range = static_cast<uint64_t>(*most) - static_cast<uint64_t>(*least);
    if (range > 0) {
      if (range >> 32 == 0) {
        sort_by_segment<uint32_t>(order, ids, *least, segments);
      } else {
        sort_by_segment<uint64_t>(order, ids, *least, segments);
      }
      return segments;
    }
  }
  std::iota(segments.ranks.begin(), segments.ranks.end(), 0);
  segments.ends.push_back(n);
  return segments;
}

struct Suppressed {
  std::vector<int32_t> order;  // boxes by rank
  std::vector<int32_t> by;     // see SuppressArgs; -1 elsewhere
};

// Segments are shared out among threads: by the place of their first box, so that each part has
// about as many boxes.
void run(void (*kernel)(SuppressArgs&), const SuppressArgs& given, Segments& segments,
         Suppressed& result) {
  const int64_t n = static_cast<int64_t>(result.order.size());
  const int64_t segment_count = static_cast<int64_t>(segments.ends.size());
  constexpr int64_t kWorthAThread = 16384;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t parts = std::min({threads, segment_count, 1 + n / kWorthAThread});
  std::vector<SuppressArgs> parts_args(parts, given);
  const auto run_part = [&](int64_t part) {
    SuppressArgs& args = parts_args[part];
    args.order = result.order.data();
    args.by = result.by.data();
    const auto first_from = [&](int64_t place) {
      // The first segment that begins at this place or after it.
      return place == 0 ? 0
                        : std::lower_bound(segments.ends.begin(), segments.ends.end(), place) -
                              segments.ends.begin() + 1;
    };
    const int64_t last = std::min(first_from(n * (part + 1) / parts), segment_count);
    for (int64_t segment = first_from(n * part / parts); segment < last; ++segment) {
      const int64_t begin = segment == 0 ? 0 : segments.ends[segment - 1];
      args.ranks = segments.ranks.data() + begin;
      args.n = segments.ends[segment] - begin;
      kernel(args);
    }
  };
  if (parts == 1) {
    run_part(0);
  } else {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) run_part(part);
    });
  }
  for (const SuppressArgs& args : parts_args) {
    STD_TORCH_CHECK(!args.out_of_memory, "nms: out of memory for ", n, " boxes");
  }
}

enum class Measure { aligned, rotated, rotated_degrees };

Measure parse_overlap(const std::string& name) {
  if (name == "aligned") return Measure::aligned;
  if (name == "rotated") return Measure::rotated;
  if (name == "rotated_degrees") return Measure::rotated_degrees;
  STD_TORCH_CHECK(false, "suppress: overlap must be aligned, rotated or rotated_degrees, got ",
                  name);
}

// The numbers of a contiguous tensor [N, M] of elements as T, in `room` where they are not.
template <class T, class Element>
const T* numbers_as(const Tensor& tensor, std::vector<T>& room) {
  const Element* const given = static_cast<const Element*>(tensor.const_data_ptr());
  if constexpr (std::is_same_v<Element, T>) {
    return given;
  } else {
    room.assign(given, given + tensor.size(0) * tensor.size(1));
    return room.data();
  }
}

Suppressed run_suppression(const Tensor& boxes, const Tensor& scores, const Tensor* idxs,
                           double iou_threshold, Measure measure, bool match) {
  const int64_t n = boxes.size(0);
  // The kernel counts up to four entries a box in 32 bits.
  STD_TORCH_CHECK(n < int64_t{1} << 30, "nms: fewer than 2^30 boxes needed, got ", n);
  const Tensor dense_boxes = torch::stable::contiguous(boxes);
  const Tensor dense_scores = torch::stable::contiguous(scores);
  const Tensor dense_idxs = idxs == nullptr ? dense_scores : torch::stable::contiguous(*idxs);
  const int64_t* const ids =
      idxs == nullptr ? nullptr : static_cast<const int64_t*>(dense_idxs.const_data_ptr());
  Suppressed result;
  dispatch_float(boxes.scalar_type(), "nms", [&](auto element) {
    using Element = decltype(element);
    using T = std::conditional_t<std::is_same_v<Element, double>, double, float>;
    result.order =
        order_by_falling_score<T>(static_cast<const Element*>(dense_scores.const_data_ptr()), n);
    result.by.assign(n, -1);
    Segments segments = segments_of(result.order, ids);
    SuppressArgs args{};
    args.threshold = iou_threshold;
    args.degrees = measure == Measure::rotated_degrees;
    args.match = match;
    if (measure == Measure::aligned) {
      std::vector<T> room;
      args.boxes = numbers_as<T, Element>(dense_boxes, room);
      run(std::is_same_v<T, double> ? FASTZOO_SELECT_KERNEL(suppress_double)
                                    : FASTZOO_SELECT_KERNEL(suppress_float),
          args, segments, result);
    } else {
      std::vector<double> room;
      args.boxes = numbers_as<double, Element>(dense_boxes, room);
      run(FASTZOO_SELECT_KERNEL(suppress_rotated), args, segments, result);
    }
  });
  return result;
}

Tensor keep_of(const Suppressed& result, const Tensor& boxes) {
  const int32_t n = static_cast<int32_t>(result.order.size());
  std::vector<int32_t> kept(n);
  int64_t count = 0;
  for (int32_t rank = 0; rank < n; ++rank) {
    // Without a branch, as none could be foreseen.
    kept[count] = result.order[rank];
    count += result.by[rank] == rank;
  }
  const Tensor keep = empty(boxes, {count}, ScalarType::Long);
  std::copy_n(kept.data(), count, static_cast<int64_t*>(keep.mutable_data_ptr()));
  return keep;
}

Tensor group_of(const Suppressed& result, const Tensor& boxes) {
  const int32_t n = static_cast<int32_t>(result.order.size());
  const Tensor group = empty(boxes, {n}, ScalarType::Long);
  int64_t* const out = static_cast<int64_t*>(group.mutable_data_ptr());
  std::vector<int32_t> positions(n);  // of the kept ones, by rank
  int32_t kept = 0;
  for (int32_t rank = 0; rank < n; ++rank) {
    const int32_t by = result.by[rank];
    if (by == rank) positions[rank] = kept++;
    out[result.order[rank]] = positions[by];
  }
  return group;
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return keep_of(run_suppression(boxes, scores, nullptr, iou_threshold, Measure::aligned, false),
                 boxes);
}

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                   double iou_threshold) {
  return keep_of(run_suppression(boxes, scores, &idxs, iou_threshold, Measure::aligned, false),
                 boxes);
}

std::tuple<Tensor, Tensor> suppress(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                                    double iou_threshold, std::string overlap, bool match) {
  const Suppressed result = run_suppression(boxes, scores, idxs.size(0) > 0 ? &idxs : nullptr,
                                            iou_threshold, parse_overlap(overlap), match);
  return {keep_of(result, boxes),
          match ? group_of(result, boxes) : empty(boxes, {0}, ScalarType::Long)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<nms>(m, "nms");
  implement<nms>(m, "nms.cpu");
  implement<batched_nms>(m, "batched_nms");
  implement<batched_nms>(m, "batched_nms.cpu");
  implement<suppress>(m, "suppress");
  implement<suppress>(m, "suppress.cpu");
}

}  // namespace fastzoo::cpu
