// fastzoo::coupling and its gradient on the CPU.
#include "kernels/coupling.h"

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>

#include "entry.h"

namespace fastzoo {
namespace {

struct CouplingInputs {
  Tensor x, shift, scale, mask;
  ScalarType dtype;
  bool has_shift = false, has_scale = false;
  cpu::CouplingArgs args{};

  CouplingInputs(const char* op, const Tensor& x_in, const Tensor& shift_in, const Tensor& scale_in,
                 const Tensor& mask_in, int64_t begin, int64_t end, const std::string& map,
                 double constant, double floor, bool shift_first, bool inverse, bool sum_logdet)
      : x(torch::stable::contiguous(x_in)),
        shift(shift_in),
        scale(scale_in),
        mask(torch::stable::contiguous(mask_in)),
        dtype(x.scalar_type()) {
    args.dtype = kernel_dtype(dtype, op);
    STD_TORCH_CHECK(math::coupling_map_named(map.c_str(), args.map), op, ": unknown map ", map);
    args.constant = constant;
    args.floor = floor;
    args.shift_first = shift_first;
    args.inverse = inverse;
    args.sum_logdet = sum_logdet;
    args.rows = x.size(0);
    args.columns = x.size(1);
    args.begin = begin;
    args.end = end;
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= args.columns, op, ": columns ", begin,
                    " to ", end, " of ", args.columns);
    math::with_coupling_map(args.map, [&](auto map) {
      has_shift = decltype(map)::kParameters > 0;
      has_scale = decltype(map)::kParameters > 1;
    });
    args.shift = parameter(op, shift, has_shift);
    args.scale = parameter(op, scale, has_scale);
    args.x = x.const_data_ptr();
    if (mask.numel() > 0) {
      args.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
      args.mask_rows = mask.dim() == 2;
      const bool fits =
          mask.size(mask.dim() - 1) == width() && (!args.mask_rows || mask.size(0) == args.rows);
      STD_TORCH_CHECK(fits, op, ": the mask does not fit ", args.rows, " rows of ", width());
    }
  }

  int64_t width() const { return args.end - args.begin; }

  // Calls the kernel for all tiles; it reads and writes so many arrays like x.
  void run(void (*kernel)(const cpu::CouplingArgs&, int64_t, int64_t), int64_t arrays) {
    const int64_t elements = args.rows * args.columns;
    args.streams = arrays * elements * element_size(dtype) >= kStreamedBytes;
    const int64_t tiles = args.tiles().count();
    const int64_t each = 1 + elements / std::max<int64_t>(1, tiles);
    torch::stable::parallel_for(0, tiles, 1 + kElementsWorthAThread / 2 / each,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

 private:
  cpu::CouplingParameter parameter(const char* op, const Tensor& tensor, bool needed) const {
    if (!needed) return {nullptr, 0, 0};
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == args.rows && tensor.size(1) == width(),
                    op, ": shift and scale must have ", args.rows, " rows of ", width());
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, op,
                    ": shift and scale must have the dtype of x");
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
  }
};

std::tuple<Tensor, Tensor> coupling(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                    const Tensor& mask, int64_t begin, int64_t end, std::string map,
                                    double constant, double floor, bool shift_first, bool inverse,
                                    bool sum_logdet) {
  CouplingInputs in("coupling", x, shift, scale, mask, begin, end, map, constant, floor,
                    shift_first, inverse, sum_logdet);
  cpu::CouplingArgs& args = in.args;
  const ScalarType compute = compute_dtype(in.dtype);
  const Tensor y = torch::stable::empty_like(in.x);
  const Tensor logdet = sum_logdet ? empty(in.x, {args.rows}, compute)
                                   : empty(in.x, {args.rows, args.columns}, compute);
  args.y = in_huge_pages(y).mutable_data_ptr();
  args.logdet = in_huge_pages(logdet).mutable_data_ptr();
  const int64_t pieces = args.tiles().pieces;
  std::unique_ptr<double[]> parts;
  if (sum_logdet && pieces > 1) parts.reset(new double[args.rows * pieces]);
  args.parts = parts.get();
  in.run(FASTZOO_SELECT_KERNEL(coupling_forward), 2 + in.has_shift + in.has_scale);
  for (int64_t row = 0; parts != nullptr && row < args.rows; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < pieces; ++i) sum += parts[row * pieces + i];
    if (compute == ScalarType::Double) {
      static_cast<double*>(args.logdet)[row] = sum;
    } else {
      static_cast<float*>(args.logdet)[row] = static_cast<float>(sum);
    }
  }
  return {y, logdet};
}

std::tuple<Tensor, Tensor, Tensor> coupling_backward(
    const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Tensor& shift,
    const Tensor& scale, const Tensor& mask, int64_t begin, int64_t end, std::string map,
    double constant, double floor, bool shift_first, bool inverse, bool sum_logdet) {
  CouplingInputs in("coupling_backward", x, shift, scale, mask, begin, end, map, constant, floor,
                    shift_first, inverse, sum_logdet);
  cpu::CouplingArgs& args = in.args;
  const Tensor by_y = torch::stable::contiguous(torch::stable::to(grad_y, in.dtype));
  const Tensor by_logdet =
      torch::stable::contiguous(torch::stable::to(grad_logdet, compute_dtype(in.dtype)));
  const Tensor grad_x = torch::stable::empty_like(in.x);
  const Tensor grad_shift = empty_if(in.has_shift, in.x, {args.rows, in.width()}, in.dtype);
  const Tensor grad_scale = empty_if(in.has_scale, in.x, {args.rows, in.width()}, in.dtype);
  args.grad_y = by_y.const_data_ptr();
  args.grad_logdet = by_logdet.const_data_ptr();
  args.grad_x = in_huge_pages(grad_x).mutable_data_ptr();
  args.grad_shift = in.has_shift ? in_huge_pages(grad_shift).mutable_data_ptr() : nullptr;
  args.grad_scale = in.has_scale ? in_huge_pages(grad_scale).mutable_data_ptr() : nullptr;
  in.run(FASTZOO_SELECT_KERNEL(coupling_backward), 3 + 2 * (in.has_shift + in.has_scale));
  return {grad_x, grad_shift, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<coupling>(m, "coupling");
  implement<coupling>(m, "coupling.cpu");
  implement<coupling_backward>(m, "coupling_backward");
  implement<coupling_backward>(m, "coupling_backward.cpu");
}

}  // namespace fastzoo
