#include "../math/nms.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../torch_abi.h"
#include "kernels/nms.h"
#include "runtime/falling_order.h"

namespace fastzoo::cpu {
namespace {

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
