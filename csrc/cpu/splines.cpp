// fastzoo::rational_quadratic_spline and its gradient on the CPU.
#include "kernels/splines.h"

#include <memory>
#include <string>
#include <tuple>

#include "entry.h"

namespace fastzoo {
namespace {

using cpu::SplineArgs;
using cpu::SplineLines;

constexpr const char* kName = "rational_quadratic_spline";

// Arguments that the spline and its gradient share. Parameters are read where they are.
struct SplineInputs {
  Tensor x, widths, heights, derivatives;
  bool packed;
  SplineArgs args{};

  static Tensor with_dense_lines(const Tensor& lines) {
    const bool dense = lines.dim() < 3 || lines.size(2) < 2 || lines.stride(2) == 1;
    return dense ? lines : torch::stable::contiguous(lines);
  }

  SplineInputs(const Tensor& x_in, const Tensor& widths_in, const Tensor& heights_in,
               const Tensor& derivatives_in, int64_t begin, int64_t end, int64_t bins, double left,
               double right, double bottom, double top, double min_width, double min_height,
               double min_derivative, const std::string& convention, const std::string& tails,
               bool inverse, bool sum_logdet)
      : x(torch::stable::contiguous(x_in)),
        widths(with_dense_lines(widths_in)),
        heights(with_dense_lines(heights_in)),
        derivatives(with_dense_lines(derivatives_in)),
        packed(heights_in.dim() < 3) {
    STD_TORCH_CHECK(math::spline_convention_named(convention.c_str(), args.convention), kName,
                    ": unknown convention ", convention);
    STD_TORCH_CHECK(math::spline_tails_named(tails.c_str(), args.tails), kName, ": unknown tails ",
                    tails);
    STD_TORCH_CHECK(bins >= 1 && bins <= cpu::kMostSplineBins, kName, ": 1 to ",
                    cpu::kMostSplineBins, " bins needed, got ", bins);
    args.dtype = kernel_dtype(x.scalar_type(), kName);
    args.inverse = inverse;
    args.sum_logdet = sum_logdet;
    args.bins = static_cast<int>(bins);
    args.rows = x.size(0);
    args.columns = x.size(1);
    args.begin = begin;
    args.end = end;
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= args.columns, kName, ": columns ", begin,
                    " to ", end, " of ", args.columns);
    args.left = left;
    args.right = right;
    args.bottom = bottom;
    args.top = top;
    args.min_width = min_width;
    args.min_height = min_height;
    args.min_derivative = min_derivative;
    args.x = x.const_data_ptr();
    const int64_t knots = math::spline_derivatives(args.tails, args.bins);
    args.widths = lines_of(widths, packed ? 2 * bins + knots : bins);
    if (packed) {
      args.heights = behind(args.widths, bins);
      args.derivatives = behind(args.widths, 2 * bins);
    } else {
      args.heights = lines_of(heights, bins);
      args.derivatives = lines_of(derivatives, knots);
    }
  }

  SplineLines lines_of(const Tensor& lines, int64_t count) const {
    STD_TORCH_CHECK(lines.scalar_type() == x.scalar_type(), kName,
                    ": parameters of the dtype of x needed");
    STD_TORCH_CHECK(lines.dim() == 3 && lines.size(0) == args.rows &&
                        lines.size(1) == args.end - args.begin && lines.size(2) == count,
                    kName, ": ", count, " parameters of each element needed");
    return {const_cast<void*>(lines.const_data_ptr()), lines.stride(0), lines.stride(1)};
  }

  SplineLines behind(const SplineLines& lines, int64_t offset) const {
    return {static_cast<char*>(lines.data) + offset * element_size(x.scalar_type()), lines.row,
            lines.column};
  }

  // New and dense.
  Tensor like(const Tensor& lines) const {
    if (lines.dim() < 3) return empty(x, {0}, x.scalar_type());
    return empty(x, {lines.size(0), lines.size(1), lines.size(2)}, x.scalar_type());
  }

  void run(void (*kernel)(const SplineArgs&, int64_t, int64_t)) const {
    constexpr int64_t kTilesWorthAThread = 4;
    torch::stable::parallel_for(0, args.tiles(), kTilesWorthAThread,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
};

std::tuple<Tensor, Tensor> rational_quadratic_spline(
    const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
    int64_t begin, int64_t end, int64_t bins, double left, double right, double bottom, double top,
    double min_width, double min_height, double min_derivative, std::string convention,
    std::string tails, bool inverse, bool sum_logdet) {
  SplineInputs in(x, widths, heights, derivatives, begin, end, bins, left, right, bottom, top,
                  min_width, min_height, min_derivative, convention, tails, inverse, sum_logdet);
  const ScalarType compute = compute_dtype(x.scalar_type());
  const int64_t rows = in.args.rows, parts = in.args.parts_of_row();
  const Tensor y = empty(x, {rows, in.args.columns}, x.scalar_type());
  const Tensor logdet =
      sum_logdet ? empty(x, {rows}, compute) : empty(x, {rows, in.args.columns}, compute);
  const bool joins = sum_logdet && parts > 1;
  const std::unique_ptr<double[]> sums(joins ? new double[rows * parts] : nullptr);
  in.args.y = y.mutable_data_ptr();
  in.args.logdet = logdet.mutable_data_ptr();
  in.args.parts = sums.get();
  in.run(FASTZOO_SELECT_KERNEL(splines_forward));
  if (joins) {
    dispatch_float(compute, kName, [&](auto number) {
      using T = decltype(number);
      for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += sums[row * parts + part];
        static_cast<T*>(in.args.logdet)[row] = static_cast<T>(sum);
      }
    });
  }
  return {y, logdet};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rational_quadratic_spline_backward(
    const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Tensor& widths,
    const Tensor& heights, const Tensor& derivatives, int64_t begin, int64_t end, int64_t bins,
    double left, double right, double bottom, double top, double min_width, double min_height,
    double min_derivative, std::string convention, std::string tails, bool inverse,
    bool sum_logdet) {
  SplineInputs in(x, widths, heights, derivatives, begin, end, bins, left, right, bottom, top,
                  min_width, min_height, min_derivative, convention, tails, inverse, sum_logdet);
  const Tensor by_y = torch::stable::contiguous(grad_y);
  const Tensor by_logdet = torch::stable::contiguous(grad_logdet);
  const Tensor grad_x = empty(x, {in.args.rows, in.args.columns}, x.scalar_type());
  const Tensor grad_widths = in.like(widths), grad_heights = in.like(heights),
               grad_derivatives = in.like(derivatives);
  in.args.grad_y = by_y.const_data_ptr();
  in.args.grad_logdet = by_logdet.const_data_ptr();
  in.args.grad_x = grad_x.mutable_data_ptr();
  in.args.grad_widths = in.lines_of(grad_widths, grad_widths.size(2));
  if (in.packed) {
    in.args.grad_heights = in.behind(in.args.grad_widths, bins);
    in.args.grad_derivatives = in.behind(in.args.grad_widths, 2 * bins);
  } else {
    in.args.grad_heights = in.lines_of(grad_heights, bins);
    in.args.grad_derivatives = in.lines_of(grad_derivatives, grad_derivatives.size(2));
  }
  in.run(FASTZOO_SELECT_KERNEL(splines_backward));
  return {grad_x, grad_widths, grad_heights, grad_derivatives};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<rational_quadratic_spline>(m, "rational_quadratic_spline");
  implement<rational_quadratic_spline>(m, "rational_quadratic_spline.cpu");
  implement<rational_quadratic_spline_backward>(m, "rational_quadratic_spline_backward");
  implement<rational_quadratic_spline_backward>(m, "rational_quadratic_spline_backward.cpu");
}

}  // namespace fastzoo
