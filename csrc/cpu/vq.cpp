// fastzoo::vq_nearest on the CPU.
#include "kernels/vq.h"

#include <string>
#include <tuple>

#include "entry.h"

namespace fastzoo {
namespace {

using math::Metric;

std::tuple<Tensor, Tensor> vq_nearest(const Tensor& x, const Tensor& codebook, const Tensor& mask,
                                      std::string metric, int64_t k, std::string precision) {
  STD_TORCH_CHECK(mask.numel() == 0 && k == 0 && codebook.dim() == 2, "vq_nearest: not yet");
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor codes = torch::stable::contiguous(codebook);
  const ScalarType compute = compute_dtype(x.scalar_type());
  const int threads = static_cast<int>(torch::stable::get_num_threads());

  cpu::VqArgs args{};
  args.dtype = kernel_dtype(x.scalar_type(), "vq_nearest");
  STD_TORCH_CHECK(math::metric_named(metric.c_str(), args.metric), "vq_nearest: unknown metric ",
                  metric);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<vq_nearest>(m, "vq_nearest");
  implement<vq_nearest>(m, "vq_nearest.cpu");
}

}  // namespace fastzoo
