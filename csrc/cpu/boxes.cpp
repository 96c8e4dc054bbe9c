#include <tuple>

#include "entry.h"
#include "kernels/boxes.h"

namespace fastzoo::cpu {
namespace {

constexpr int64_t kPairsWorthAThread = 4096;

math::Measure parse_measure(const std::string& name) {
  if (name == "iou") return math::Measure::iou;
  if (name == "giou") return math::Measure::giou;
  if (name == "diou") return math::Measure::diou;
  if (name == "ciou") return math::Measure::ciou;
  STD_TORCH_CHECK(false, "box_overlap: unknown measure ", name);
}

// Contiguous copies of the inputs, and the arguments made of them.
struct Inputs {
  Tensor boxes1, boxes2;
  OverlapArgs args{};

  Inputs(const Tensor& boxes1_in, const Tensor& boxes2_in, const std::string& measure,
         bool pairwise, double eps)
      : boxes1(torch::stable::contiguous(boxes1_in)), boxes2(torch::stable::contiguous(boxes2_in)) {
    args.dtype = kernel_dtype(boxes1.scalar_type(), "box_overlap");
    args.measure = parse_measure(measure);
    args.union_eps = pairwise ? 0 : eps;
    args.eps = eps;
    args.tiles = {boxes1.size(0), boxes2.size(0)};
    args.boxes1 = boxes1.const_data_ptr();
    args.boxes2 = boxes2.const_data_ptr();
  }
};

Tensor empty_overlap(const Tensor& boxes1, const Tensor& boxes2, bool pairwise) {
  const ScalarType dtype = compute_dtype(boxes1.scalar_type());
  return pairwise ? empty(boxes1, {boxes1.size(0), boxes2.size(0)}, dtype)
                  : empty(boxes1, {boxes1.size(0)}, dtype);
}

Tensor box_overlap(const Tensor& boxes1, const Tensor& boxes2, std::string measure, bool pairwise,
                   double eps) {
  Inputs in(boxes1, boxes2, measure, pairwise, eps);
  const Tensor overlap = empty_overlap(boxes1, boxes2, pairwise);
  in.args.overlap = overlap.mutable_data_ptr();
  if (pairwise) {
    const auto kernel = FASTZOO_SELECT_KERNEL(overlap_tiles);
    torch::stable::parallel_for(0, in.args.tiles.count(), 1,
                                [&](int64_t begin, int64_t end) { kernel(in.args, begin, end); });
  } else {
    const auto kernel = FASTZOO_SELECT_KERNEL(overlap_each);
    torch::stable::parallel_for(0, in.args.tiles.n, kPairsWorthAThread,
                                [&](int64_t begin, int64_t end) { kernel(in.args, begin, end); });
  }
  return overlap;
}

std::tuple<Tensor, Tensor> box_overlap_backward(const Tensor& grad, const Tensor& boxes1,
                                                const Tensor& boxes2, std::string measure,
                                                bool pairwise, double eps) {
  Inputs in(boxes1, boxes2, measure, pairwise, eps);
  OverlapArgs& args = in.args;
  const ScalarType dtype = boxes1.scalar_type();
  STD_TORCH_CHECK(grad.scalar_type() == compute_dtype(dtype),
                  "box_overlap_backward: the gradient's dtype is not that of the overlap");
  const Tensor by_overlap = torch::stable::contiguous(grad);
  const int64_t n = args.tiles.n, m = args.tiles.m;
  const Tensor grad1 = empty(boxes1, {n, 4}, dtype);
  const Tensor grad2 = empty(boxes2, {m, 4}, dtype);
  args.grad = by_overlap.const_data_ptr();
  args.grad1 = grad1.mutable_data_ptr();
  args.grad2 = grad2.mutable_data_ptr();
  if (!pairwise) {
    const auto kernel = FASTZOO_SELECT_KERNEL(overlap_each_backward);
    torch::stable::parallel_for(0, n, kPairsWorthAThread / 2,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return {grad1, grad2};
  }
  const Tensor sums1 = empty(boxes1, {args.tiles.across() * n * 4}, compute_dtype(dtype));
  const Tensor sums2 = empty(boxes1, {args.tiles.down() * m * 4}, compute_dtype(dtype));
  args.sums1 = sums1.mutable_data_ptr();
  args.sums2 = sums2.mutable_data_ptr();
  const auto kernel = FASTZOO_SELECT_KERNEL(overlap_tiles_backward);
  torch::stable::parallel_for(0, args.tiles.count(), 1,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  const auto add_up = FASTZOO_SELECT_KERNEL(overlap_sums);
  torch::stable::parallel_for(0, n + m, kPairsWorthAThread,
                              [&](int64_t begin, int64_t end) { add_up(args, begin, end); });
  return {grad1, grad2};
}

Tensor box_iou_rotated(const Tensor& boxes1, const Tensor& boxes2, bool degrees, bool pairwise) {
  const Tensor first = torch::stable::contiguous(boxes1);
  const Tensor second = torch::stable::contiguous(boxes2);
  const Tensor overlap = empty_overlap(boxes1, boxes2, pairwise);
  RotatedArgs args{};
  args.dtype = kernel_dtype(boxes1.scalar_type(), "box_iou_rotated");
  args.degrees = degrees;
  args.tiles = {first.size(0), second.size(0)};
  args.boxes1 = first.const_data_ptr();
  args.boxes2 = second.const_data_ptr();
  args.overlap = overlap.mutable_data_ptr();
  if (pairwise) {
    const auto kernel = FASTZOO_SELECT_KERNEL(rotated_tiles);
    torch::stable::parallel_for(0, args.tiles.count(), 1,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  } else {
    const auto kernel = FASTZOO_SELECT_KERNEL(rotated_each);
    torch::stable::parallel_for(0, args.tiles.n, kPairsWorthAThread / 8,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  return overlap;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<box_overlap>(m, "box_overlap");
  implement<box_overlap>(m, "box_overlap.cpu");
  implement<box_overlap_backward>(m, "box_overlap_backward");
  implement<box_overlap_backward>(m, "box_overlap_backward.cpu");
  implement<box_iou_rotated>(m, "box_iou_rotated");
  implement<box_iou_rotated>(m, "box_iou_rotated.cpu");
}

}  // namespace fastzoo::cpu
