// fastzoo::autoregressive_inverse on the CPU.
#include "kernels/masked_linear.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "entry.h"

namespace fastzoo {
namespace {

std::tuple<Tensor, Tensor> autoregressive_inverse(const Tensor& y, const Tensor& first,
                                                  const Tensor& net, std::vector<int64_t> widths,
                                                  const Tensor& starts, std::string activation,
                                                  std::string map, int64_t bins, double constant,
                                                  double floor) {
  using torch::stable::contiguous;
  const ScalarType compute = compute_dtype(y.scalar_type());
  const auto dense = [&](const Tensor& tensor) {
    return contiguous(torch::stable::to(tensor, compute));
  };
  cpu::MaskedArgs args{};
  args.dtype = kernel_dtype(compute, "autoregressive_inverse");
  STD_TORCH_CHECK(
      math::masked_layout(widths.data(), static_cast<int64_t>(widths.size()), args.layout),
      "autoregressive_inverse: widths of the features and 1 to ", math::kMaskedLayers,
      " layers needed, each at least 1");
  STD_TORCH_CHECK(math::activation_named(activation.c_str(), args.activation),
                  "autoregressive_inverse: unknown activation ", activation);
  STD_TORCH_CHECK(math::masked_map_named(map.c_str(), bins, constant, floor, args.map),
                  "autoregressive_inverse: unknown map ", map, " of ", bins, " bins");
  const math::MaskedLayout& layout = args.layout;
  STD_TORCH_CHECK(y.dim() == 2 && y.size(1) == layout.features && net.numel() == layout.size,
                  "autoregressive_inverse: y of ", layout.features, " features and a net of ",
                  layout.size, " parameters needed");
  STD_TORCH_CHECK(
      first.numel() == 0 ||
          (first.dim() == 2 && first.size(0) == y.size(0) && first.size(1) == layout.layer[0].out),
      "autoregressive_inverse: first of ", y.size(0), " x ", layout.layer[0].out, " needed");
  const Tensor own_starts = contiguous(starts);
  STD_TORCH_CHECK(starts.dim() == 2 && starts.size(0) == layout.layers + 1 && starts.size(1) > 1,
                  "autoregressive_inverse: starts of ", layout.layers + 1, " layers needed");
  args.steps = {static_cast<const int64_t*>(own_starts.const_data_ptr()), starts.size(1) - 1};
  STD_TORCH_CHECK(math::masked_steps_fit(args.steps, layout, args.map.parameters),
                  "autoregressive_inverse: starts must rise from 0 to the units of each layer, the "
                  "last with ",
                  args.map.parameters, " a feature");

  const Tensor own_y = dense(y), own_net = dense(net), own_first = dense(first);
  args.batch = y.size(0);
  const Tensor x = empty(y, {args.batch, layout.features}, compute);
  const Tensor logdet = empty(y, {args.batch}, compute);
  if (args.batch > 0) {
    args.net = own_net.const_data_ptr();
    args.first = first.numel() > 0 ? own_first.const_data_ptr() : nullptr;
    args.y = own_y.const_data_ptr();
    args.x = x.mutable_data_ptr();
    args.logdet = logdet.mutable_data_ptr();
    const int64_t threads = threads_for(args.batch * layout.size);
    cpu::MaskedPlan plan{};
    FASTZOO_SELECT_KERNEL(masked_linear_plan)(args, threads, plan);
    const int64_t parts = std::min(threads, plan.tiles);
    const Tensor scratch = empty(y, {parts, plan.scratch_bytes}, ScalarType::Byte);
    char* const memory = static_cast<char*>(scratch.mutable_data_ptr());
    const auto run = FASTZOO_SELECT_KERNEL(autoregressive_inverse);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        run(args, plan, part * plan.tiles / parts, (part + 1) * plan.tiles / parts,
            memory + part * plan.scratch_bytes);
      }
    });
  }
  return {torch::stable::to(x, y.scalar_type()), logdet};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<autoregressive_inverse>(m, "autoregressive_inverse");
  implement<autoregressive_inverse>(m, "autoregressive_inverse.cpu");
}

}  // namespace fastzoo
