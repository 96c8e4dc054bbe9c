// Greedy suppression of one set of boxes: nms, batched_nms and suppress are one entry.
#include <string>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/falling_order.h"
#include "runtime/kept_list.h"

namespace fastzoo::cuda {
namespace {

// One image's boxes by falling score.
struct Sorted {
  static constexpr bool kManyImages = false;

  int64_t n;
  const int64_t* order;
  const int64_t* ids;

  FASTZOO_DEVICE bool exists(int64_t, int64_t position) const { return position < n; }
  FASTZOO_DEVICE int64_t index(int64_t, int64_t position) const { return order[position]; }
  FASTZOO_DEVICE int64_t id(int64_t, int64_t index) const { return ids[index]; }
};

// Corners [n, 4].
template <class T>
struct AlignedBoxes : Sorted {
  using Overlap = AlignedOverlap<ComputeOf<T>>;

  const T* corners;

  FASTZOO_DEVICE typename Overlap::Box read(int64_t, int64_t index) const {
    typename Overlap::Row row;
    for (int i = 0; i < 4; ++i) row[i] = static_cast<ComputeOf<T>>(corners[4 * index + i]);
    return Overlap::box_of(row);
  }
};

// Centres, sides and angle [n, 5].
struct RotatedBoxes : Sorted {
  using Overlap = RotatedOverlap;

  const double* rows;
  bool degrees;

  FASTZOO_DEVICE math::RotatedBox read(int64_t, int64_t index) const {
    const double* row = rows + 5 * index;
    return math::rotated_box(row[0], row[1], row[2], row[3], row[4], degrees);
  }
};

template <class Boxes>
auto keep_kernel(bool gated, bool matched) {
  if (matched) return gated ? nms_keep<Boxes, true, true> : nms_keep<Boxes, false, true>;
  return gated ? nms_keep<Boxes, true, false> : nms_keep<Boxes, false, false>;
}

std::tuple<Tensor, Tensor> suppress(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                                    double iou_threshold, const std::string& overlap, bool match) {
  const bool rotated = overlap != "aligned";
  const bool degrees = overlap == "rotated_degrees";
  STD_TORCH_CHECK(!rotated || degrees || overlap == "rotated",
                  "fastzoo: suppress: overlap aligned, rotated or rotated_degrees expected, got ",
                  overlap);
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(),
                  "fastzoo: nms: fewer than 2^31 boxes expected, got ", n);
  const Tensor kept = empty(boxes, {n}, ScalarType::Long);
  const Tensor group = empty(boxes, {match ? n : 0}, ScalarType::Long);
  if (n == 0) return {kept, group};

  const Stream stream(boxes);
  const bool gated = idxs.size(0) > 0;
  const Tensor ids = torch::stable::contiguous(idxs);
  const Tensor order = falling_order(stream, scores);
  const Sorted sorted{n, static_cast<const int64_t*>(order.const_data_ptr()),
                      static_cast<const int64_t*>(ids.const_data_ptr())};
  const auto run = [&](const auto& of_type, auto threshold) {
    using Boxes = std::decay_t<decltype(of_type)>;
    const KeptList<Boxes> list(boxes, 1, n, gated);
    KeepTask<Boxes> task{of_type, {threshold}, n};
    task.kept = static_cast<int64_t*>(kept.mutable_data_ptr());
    task.group = static_cast<int64_t*>(group.mutable_data_ptr());
    list.give(task);
    stream.launch("nms_keep", keep_kernel<Boxes>(gated, match), blocks_for(n, kKeepBlock),
                  kKeepBlock, task);
    return stream.read_back(list.words()) & int64_t{kKeptOfWord};
  };

  int64_t count = 0;
  if (rotated) {
    const Tensor rows = torch::stable::contiguous(torch::stable::to(boxes, ScalarType::Double));
    const auto* data = static_cast<const double*>(rows.const_data_ptr());
    count = run(RotatedBoxes{sorted, data, degrees}, iou_threshold);
  } else {
    const Tensor rows = torch::stable::contiguous(boxes);
    dispatch_float(boxes.scalar_type(), "suppress", [&](auto type) {
      using T = decltype(type);
      const auto* data = static_cast<const T*>(rows.const_data_ptr());
      count = run(AlignedBoxes<T>{sorted, data}, math::round_down<ComputeOf<T>>(iou_threshold));
    });
  }
  Tensor whole = kept;
  return {torch::stable::narrow(whole, 0, 0, count), group};
}

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                   double iou_threshold) {
  return std::get<0>(suppress(boxes, scores, idxs, iou_threshold, "aligned", false));
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  const Tensor no_segments = empty(boxes, {0}, ScalarType::Long);
  return batched_nms(boxes, scores, no_segments, iou_threshold);
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::nms>(m, "nms.cuda");
  fastzoo::implement<fastzoo::cuda::batched_nms>(m, "batched_nms.cuda");
  fastzoo::implement<fastzoo::cuda::suppress>(m, "suppress.cuda");
}
