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

int64_t grain(int64_t elements) { return 1 + kElementsWorthAThread / elements; }

// A codebook as the kernels want it, and what else a lookup in it needs; serves one after another.
class Lookup {
 public:
  Lookup(const Tensor& like, const cpu::VqArgs& args) : like_(like), args_(args) {
    FASTZOO_SELECT_KERNEL(vq_plan)(args_, plan_);
    // A sample of the rows decides; it must be cheap beside all of them.
    constexpr int64_t kRowsWorthAProbe = 128;
    args_.bfloat16 = plan_.bfloat16 && (args_.fast || args_.rows >= kRowsWorthAProbe);
    const ScalarType compute = compute_dtype(like.scalar_type());
    const bool cosine = args_.metric == Metric::cosine;
    centre_ = empty(like, {args_.dims}, compute);
    squares_ = empty(like, {args_.codes}, ScalarType::Double);
    norms_ = empty(like, {cosine ? args_.codes : 0}, ScalarType::Double);
    lost_ = empty(like, {args_.bfloat16 ? args_.codes : 0}, ScalarType::Double);
    loose_ = empty(like, {args_.codes}, ScalarType::Int);
    table_ = empty(like, {plan_.table_size}, ScalarType::Int);
    args_.centre = centre_.mutable_data_ptr();
    args_.squares = static_cast<double*>(squares_.mutable_data_ptr());
    args_.norms = static_cast<double*>(norms_.mutable_data_ptr());
    args_.lost = static_cast<double*>(lost_.mutable_data_ptr());
    args_.loose = static_cast<int32_t*>(loose_.mutable_data_ptr());
    plan();
  }

  cpu::VqArgs& args() { return args_; }

  void run() {
    if (args_.metric == Metric::l2) {
      const auto kernel = FASTZOO_SELECT_KERNEL(vq_centre);
      torch::stable::parallel_for(0, args_.dims, grain(args_.codes),
                                  [&](int64_t begin, int64_t end) { kernel(args_, begin, end); });
    }
    pack();
    if (args_.bfloat16 && !args_.fast && !pays()) {
      args_.bfloat16 = false;
      plan();
      pack();
    }
    const auto kernel = FASTZOO_SELECT_KERNEL(vq_lookup);
    const int threads = args_.threads;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        kernel(args_, args_.rows * part / threads, args_.rows * (part + 1) / threads,
               workspace(part));
      }
    });
  }

 private:
  void plan() {
    FASTZOO_SELECT_KERNEL(vq_plan)(args_, plan_);
    plan_.workspace_bytes = (plan_.workspace_bytes + 63) / 64 * 64;
    starts_ = empty(like_, {plan_.starts_bytes}, ScalarType::Byte);
    lines_ = empty(like_, {plan_.lines_bytes}, ScalarType::Byte);
    workspace_ = empty(like_, {args_.threads * plan_.workspace_bytes}, ScalarType::Byte);
    args_.starts = starts_.mutable_data_ptr();
    args_.lines = lines_.mutable_data_ptr();
  }

  void pack() {
    const auto kernel = FASTZOO_SELECT_KERNEL(vq_pack);
    torch::stable::parallel_for(0, plan_.code_panels, grain(plan_.lines_bytes / plan_.code_panels),
                                [&](int64_t begin, int64_t end) { kernel(args_, begin, end); });
    FASTZOO_SELECT_KERNEL(vq_select)(args_, static_cast<int32_t*>(table_.mutable_data_ptr()),
                                     plan_.table_size);
  }

  bool pays() {
    bool result = false;
    args_.probing = true;
    FASTZOO_SELECT_KERNEL(vq_probe)(args_, workspace(0), result);
    args_.probing = false;
    return result;
  }

  char* workspace(int64_t part) {
    return static_cast<char*>(workspace_.mutable_data_ptr()) + part * plan_.workspace_bytes;
  }

  const Tensor& like_;
  cpu::VqArgs args_;
  cpu::VqPlan plan_{};
  Tensor centre_, squares_, norms_, lost_, loose_, table_, starts_, lines_, workspace_;
};

std::tuple<Tensor, Tensor> vq_nearest(const Tensor& x, const Tensor& codebook, std::string metric) {
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor codes = torch::stable::contiguous(codebook);
  cpu::VqArgs args{};
  args.dtype = kernel_dtype(x.scalar_type(), "vq_nearest");
  args.metric = parse_metric(metric);
  args.rows = rows.size(0);
  args.codes = codes.size(0);
  args.dims = rows.size(1);
  args.k = 1;
  args.threads = static_cast<int>(torch::stable::get_num_threads());
  STD_TORCH_CHECK(args.codes >= 1 && args.codes < (int64_t{1} << 31) && args.dims >= 1,
                  "vq_nearest: a codebook of ", args.codes, " codes of ", args.dims,
                  " dimensions is out of range");
  const Tensor indices = empty(x, {args.rows}, ScalarType::Long);
  const Tensor distance = empty(x, {args.rows}, compute_dtype(x.scalar_type()));
  if (args.rows == 0) return {distance, indices};
  args.x = rows.const_data_ptr();
  args.x_stride = args.dims;
  args.codebook = codes.const_data_ptr();
  args.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  args.values = distance.mutable_data_ptr();
  args.out_stride = 1;
  Lookup(x, args).run();
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
