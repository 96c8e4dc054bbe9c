// The plain greedy loop over boxes sorted by score, as torchvision's CPU kernel runs it: one
// thread, one pair of boxes at a time, the threshold compared in double.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

namespace {

template <class T>
at::Tensor greedy(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold) {
  const at::Tensor columns = boxes.t().contiguous();
  const at::Tensor areas = (columns[2] - columns[0]) * (columns[3] - columns[1]);
  const at::Tensor order =
      std::get<1>(scores.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true));
  const int64_t n = boxes.size(0);
  at::Tensor suppressed = at::zeros({n}, boxes.options().dtype(at::kByte));
  at::Tensor keep = at::empty({n}, boxes.options().dtype(at::kLong));

  const T* const x1 = columns.const_data_ptr<T>();
  const T* const y1 = x1 + n;
  const T* const x2 = y1 + n;
  const T* const y2 = x2 + n;
  const T* const area = areas.const_data_ptr<T>();
  const int64_t* const by_score = order.const_data_ptr<int64_t>();
  uint8_t* const is_suppressed = suppressed.mutable_data_ptr<uint8_t>();
  int64_t* const kept = keep.mutable_data_ptr<int64_t>();

  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t a = by_score[i];
    if (is_suppressed[a]) continue;
    kept[count++] = a;
    for (int64_t j = i + 1; j < n; ++j) {
      const int64_t b = by_score[j];
      if (is_suppressed[b]) continue;
      const T w = std::max(T(0), std::min(x2[a], x2[b]) - std::max(x1[a], x1[b]));
      const T h = std::max(T(0), std::min(y2[a], y2[b]) - std::max(y1[a], y1[b]));
      const T intersection = w * h;
      const T overlap = intersection / (area[a] + area[b] - intersection);
      if (overlap > iou_threshold) is_suppressed[b] = 1;
    }
  }
  return keep.narrow(0, 0, count);
}

at::Tensor scalar_nms(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold) {
  return boxes.scalar_type() == at::kDouble ? greedy<double>(boxes, scores, iou_threshold)
                                            : greedy<float>(boxes, scores, iou_threshold);
}

}  // namespace

TORCH_LIBRARY(fastzoo_peers, m) {
  m.def("scalar_nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor", &scalar_nms);
}
