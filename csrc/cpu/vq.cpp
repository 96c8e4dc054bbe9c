// fastzoo::vq_nearest and its gradient on the CPU.
#include "kernels/vq.h"

#include <string>
#include <tuple>

#include "entry.h"

namespace fastzoo {
namespace {

using math::Metric;

Metric parse_metric(const std::string& name) {
  if (name == "l2") return Metric::l2;
  if (name == "cosine") return Metric::cosine;
  if (name == "dot") return Metric::dot;
  STD_TORCH_CHECK(false, "vq_nearest: metric must be l2, cosine or dot, got ", name);
}

std::tuple<Tensor, Tensor> vq_nearest(const Tensor& x, const Tensor& codebook, const Tensor& mask,
                                      std::string metric, int64_t k, std::string precision) {
  STD_TORCH_CHECK(mask.numel() == 0 && k == 0 && codebook.dim() == 2, "vq_nearest: not yet");
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor codes = torch::stable::contiguous(codebook);
  const ScalarType compute = compute_dtype(x.scalar_type());
  const int threads = static_cast<int>(torch::stable::get_num_threads());

  cpu::VqArgs args{};
  args.dtype = kernel_dtype(x.scalar_type(), "vq_nearest");
  args.metric = parse_metric(metric);
  args.rows = rows.size(0);
  args.codes = codes.size(0);
  args.dims = rows.size(1);
  args.threads = threads;
  STD_TORCH_CHECK(args.codes >= 1 && args.codes < (int64_t{1} << 31) && args.dims >= 1,
                  "vq_nearest: a codebook of ", args.codes, " codes of ", args.dims,
                  " dimensions is out of range");
  const Tensor indices = empty(x, {args.rows}, ScalarType::Long);
  const Tensor distance = empty(x, {args.rows}, compute);
  if (args.rows == 0) return {distance, indices};

  cpu::VqPlan plan{};
  FASTZOO_SELECT_KERNEL(vq_plan)(args, plan);
  const bool cosine = args.metric == Metric::cosine;
  const Tensor centre = empty(x, {args.dims}, compute);
  const Tensor panels = empty(x, {plan.panels_bytes}, ScalarType::Byte);
  const Tensor squares = empty(x, {args.codes}, ScalarType::Double);
  const Tensor norms = empty(x, {cosine ? args.codes : 0}, ScalarType::Double);
  const Tensor loose = empty(x, {args.codes}, ScalarType::Int);
  args.x = rows.const_data_ptr();
  args.codebook = codes.const_data_ptr();
  args.centre = centre.mutable_data_ptr();
  args.panels = panels.mutable_data_ptr();
  args.squares = static_cast<double*>(squares.mutable_data_ptr());
  args.norms = static_cast<double*>(norms.mutable_data_ptr());
  args.loose = static_cast<int32_t*>(loose.mutable_data_ptr());
  args.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  args.distance = distance.mutable_data_ptr();

  const auto grain = [](int64_t elements) { return 1 + kElementsWorthAThread / elements; };
  if (args.metric == Metric::l2) {
    const auto kernel = FASTZOO_SELECT_KERNEL(vq_centre);
    torch::stable::parallel_for(0, args.dims, grain(args.codes),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  {
    const auto kernel = FASTZOO_SELECT_KERNEL(vq_pack);
    torch::stable::parallel_for(0, plan.code_panels, grain(plan.panels_bytes / plan.code_panels),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  {
    const Tensor table = empty(x, {plan.table_size}, ScalarType::Int);
    FASTZOO_SELECT_KERNEL(vq_select)(args, static_cast<int32_t*>(table.mutable_data_ptr()),
                                     plan.table_size);
  }

  const int64_t workspace_bytes = (plan.workspace_bytes + 63) / 64 * 64;
  const Tensor workspace = empty(x, {threads * workspace_bytes}, ScalarType::Byte);
  char* const spaces = static_cast<char*>(workspace.mutable_data_ptr());
  const auto kernel = FASTZOO_SELECT_KERNEL(vq_lookup);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      kernel(args, args.rows * part / threads, args.rows * (part + 1) / threads,
             spaces + part * workspace_bytes);
    }
  });
  return {distance, indices};
}

std::tuple<Tensor, Tensor> vq_nearest_backward(const Tensor& grad, const Tensor& x,
                                               const Tensor& codebook, const Tensor& indices,
                                               std::string metric) {
  const ScalarType dtype = x.scalar_type();
  const Tensor upstream = torch::stable::contiguous(torch::stable::to(grad, compute_dtype(dtype)));
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor codes = torch::stable::contiguous(codebook);
  const Tensor chosen = torch::stable::contiguous(indices);

  cpu::VqBackwardArgs args{};
  args.dtype = kernel_dtype(dtype, "vq_nearest");
  args.metric = parse_metric(metric);
  args.rows = rows.size(0);
  args.codes = codes.size(0);
  args.dims = rows.size(1);
  const Tensor grad_x = empty(x, {args.rows, args.dims}, dtype);
  const Tensor grad_codebook = empty(x, {args.codes, args.dims}, dtype);
  const Tensor begins_tensor = torch::stable::new_zeros(x, {args.codes + 1}, ScalarType::Long);
  const Tensor order_tensor = empty(x, {args.rows}, ScalarType::Long);

  // A counting sort keeps the rows of one code in ascending order: the same sums on any number of
  // threads.
  const int64_t* codes_of = static_cast<const int64_t*>(chosen.const_data_ptr());
  int64_t* begins = static_cast<int64_t*>(begins_tensor.mutable_data_ptr());
  int64_t* order = static_cast<int64_t*>(order_tensor.mutable_data_ptr());
  for (int64_t row = 0; row < args.rows; ++row) {
    STD_TORCH_CHECK(codes_of[row] >= 0 && codes_of[row] < args.codes, "vq_nearest_backward: index ",
                    codes_of[row], " is out of range");
    ++begins[codes_of[row]];
  }
  for (int64_t code = 1; code <= args.codes; ++code) begins[code] += begins[code - 1];
  for (int64_t row = args.rows - 1; row >= 0; --row) order[--begins[codes_of[row]]] = row;

  args.grad = upstream.const_data_ptr();
  args.x = rows.const_data_ptr();
  args.codebook = codes.const_data_ptr();
  args.indices = codes_of;
  args.code_begins = begins;
  args.order = order;
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_codebook = grad_codebook.mutable_data_ptr();

  const auto by_x = FASTZOO_SELECT_KERNEL(vq_backward_x);
  torch::stable::parallel_for(0, args.rows, 256,
                              [&](int64_t begin, int64_t end) { by_x(args, begin, end); });
  const auto by_codebook = FASTZOO_SELECT_KERNEL(vq_backward_codebook);
  torch::stable::parallel_for(0, args.codes, 256, [&](int64_t begin, int64_t end) {
    const Tensor sums = empty(x, {args.dims}, ScalarType::Double);
    by_codebook(args, begin, end, static_cast<double*>(sums.mutable_data_ptr()));
  });
  return {grad_x, grad_codebook};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<vq_nearest>(m, "vq_nearest");
  implement<vq_nearest>(m, "vq_nearest.cpu");
  implement<vq_nearest_backward>(m, "vq_nearest_backward");
  implement<vq_nearest_backward>(m, "vq_nearest_backward.cpu");
}

}  // namespace fastzoo
