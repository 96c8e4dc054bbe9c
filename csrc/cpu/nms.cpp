// fastzoo::nms, batched_nms and suppress on the CPU.
#include "kernels/nms.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../torch_abi.h"
#include "runtime/segments.h"

namespace fastzoo::cpu {
namespace {

// Leaves each segment's kept boxes in front of it, and returns how many they are. Segments are
// shared out among threads by the place of their first box: each part has about as many boxes.
std::vector<int64_t> run(void (*kernel)(SuppressArgs&), const SuppressArgs& given,
                         Segments& segments) {
  const int64_t n = segments.size();
  const int64_t count = segments.count();
  std::vector<int64_t> kept(count);
  if (count == 0) return kept;
  constexpr int64_t kWorthAThread = 16384;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t parts = std::min({threads, count, 1 + n / kWorthAThread});
  // The first segment that begins at this place or behind it.
  const auto first_from = [&](int64_t place) {
    const auto begins = segments.begins.begin();
    return std::lower_bound(begins, begins + count, place) - begins;
  };
  std::vector<char> out_of_memory(parts);
  const auto run_part = [&](int64_t part) {
    SuppressArgs args = given;
    const int64_t last = part + 1 == parts ? count : first_from(n * (part + 1) / parts);
    for (int64_t segment = first_from(n * part / parts); segment < last; ++segment) {
      args.order = segments.boxes.data() + segments.begins[segment];
      args.n = segments.begins[segment + 1] - segments.begins[segment];
      kernel(args);
      kept[segment] = args.kept;
    }
    out_of_memory[part] = args.out_of_memory;
  };
  if (parts == 1) {
    run_part(0);
  } else {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) run_part(part);
    });
  }
  for (const char out : out_of_memory) {
    STD_TORCH_CHECK(!out, "nms: out of memory for ", n, " boxes");
  }
  return kept;
}

// All kept boxes by falling score, given those of the segments and the order of all boxes.
void merge(const Segments& segments, const std::vector<int64_t>& kept,
           std::vector<int32_t>& order) {
  std::vector<char> is_kept(order.size());
  for (size_t segment = 0; segment < kept.size(); ++segment) {
    const int32_t* const own = segments.boxes.data() + segments.begins[segment];
    for (int64_t i = 0; i < kept[segment]; ++i) is_kept[own[i]] = 1;
  }
  int64_t count = 0;
  for (const int32_t box : order) {
    // Without a branch, as none could be foreseen.
    order[count] = box;
    count += is_kept[box];
  }
  order.resize(count);
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

// Of the kept boxes, by falling score; `by` (see SuppressArgs) is filled unless it is nullptr.
std::vector<int32_t> run_suppression(const Tensor& boxes, const Tensor& scores, const Tensor* idxs,
                                     double iou_threshold, Measure measure,
                                     std::vector<int32_t>* by) {
  const int64_t n = boxes.size(0);
  // The kernel counts up to four entries a box in 32 bits.
  STD_TORCH_CHECK(n < int64_t{1} << 30, "nms: fewer than 2^30 boxes needed, got ", n);
  const Tensor dense_boxes = torch::stable::contiguous(boxes);
  const Tensor dense_scores = torch::stable::contiguous(scores);
  const Tensor dense_idxs = idxs == nullptr ? dense_scores : torch::stable::contiguous(*idxs);
  const int64_t* const ids =
      idxs == nullptr ? nullptr : static_cast<const int64_t*>(dense_idxs.const_data_ptr());
  std::vector<int32_t> order;
  dispatch_float(boxes.scalar_type(), "nms", [&](auto element) {
    using Element = decltype(element);
    using T = std::conditional_t<std::is_same_v<Element, double>, double, float>;
    order =
        order_by_falling_score<T>(static_cast<const Element*>(dense_scores.const_data_ptr()), n);
    const bool one = ids == nullptr;
    Segments segments = segments_of(one ? std::move(order) : order, ids);
    SuppressArgs args{};
    args.threshold = iou_threshold;
    args.degrees = measure == Measure::rotated_degrees;
    if (by != nullptr) {
      by->resize(n);
      args.by = by->data();
    }
    std::vector<int64_t> kept;
    if (measure == Measure::aligned) {
      std::vector<T> room;
      args.boxes = numbers_as<T, Element>(dense_boxes, room);
      kept = run(std::is_same_v<T, double> ? FASTZOO_SELECT_KERNEL(suppress_double)
                                           : FASTZOO_SELECT_KERNEL(suppress_float),
                 args, segments);
    } else {
      std::vector<double> room;
      args.boxes = numbers_as<double, Element>(dense_boxes, room);
      kept = run(FASTZOO_SELECT_KERNEL(suppress_rotated), args, segments);
    }
    if (one) {
      order = std::move(segments.boxes);
      order.resize(kept.empty() ? 0 : kept[0]);
    } else {
      merge(segments, kept, order);
    }
  });
  return order;
}

Tensor indices(const std::vector<int32_t>& kept, const Tensor& like) {
  const Tensor keep = empty(like, {static_cast<int64_t>(kept.size())}, ScalarType::Long);
  std::copy(kept.begin(), kept.end(), static_cast<int64_t*>(keep.mutable_data_ptr()));
  return keep;
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return indices(run_suppression(boxes, scores, nullptr, iou_threshold, Measure::aligned, nullptr),
                 boxes);
}

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                   double iou_threshold) {
  return indices(run_suppression(boxes, scores, &idxs, iou_threshold, Measure::aligned, nullptr),
                 boxes);
}

std::tuple<Tensor, Tensor> suppress(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                                    double iou_threshold, std::string overlap, bool match) {
  std::vector<int32_t> by;
  const std::vector<int32_t> kept =
      run_suppression(boxes, scores, idxs.size(0) > 0 ? &idxs : nullptr, iou_threshold,
                      parse_overlap(overlap), match ? &by : nullptr);
  const Tensor group = empty(boxes, {match ? boxes.size(0) : 0}, ScalarType::Long);
  if (match) {
    int64_t* const groups = static_cast<int64_t*>(group.mutable_data_ptr());
    std::vector<int32_t> positions(by.size());
    for (size_t i = 0; i < kept.size(); ++i) positions[kept[i]] = static_cast<int32_t>(i);
    for (size_t box = 0; box < by.size(); ++box) groups[box] = positions[by[box]];
  }
  return {indices(kept, boxes), group};
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
