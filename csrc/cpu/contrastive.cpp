// fastzoo::contrastive and its gradient on the CPU.
#include "kernels/contrastive.h"

#include <tuple>

#include "entry.h"

namespace fastzoo {
namespace {

// Contiguous copies of the inputs that both operators share, and the arguments made of them.
struct Inputs {
  Tensor queries, keys, positives, scale, bias;
  cpu::ContrastiveArgs args{};

  Inputs(bool backward, const Tensor& queries_in, const Tensor& keys_in, const Tensor& positives_in,
         const Tensor& scale_in, const Tensor& bias_in, bool exclude_self, bool sigmoid,
         bool bfloat16_products)
      : queries(torch::stable::contiguous(queries_in)),
        keys(torch::stable::contiguous(keys_in)),
        positives(torch::stable::contiguous(positives_in)),
        scale(torch::stable::contiguous(scale_in)),
        bias(torch::stable::contiguous(bias_in)) {
    args.dtype = kernel_dtype(queries.scalar_type(), "contrastive");
    args.backward = backward;
    args.bfloat16_products = bfloat16_products;
    args.exclude_self = exclude_self;
    args.sigmoid = sigmoid;
    args.queries_count = queries.size(0);
    args.keys_count = keys.size(0);
    args.dims = queries.size(1);
    args.queries = queries.const_data_ptr();
    args.keys = keys.const_data_ptr();
    args.positives = static_cast<const int64_t*>(positives.const_data_ptr());
    args.scale = scale.const_data_ptr();
    args.bias = bias.const_data_ptr();
    for (int64_t n = 0; n < args.queries_count; ++n) {
      STD_TORCH_CHECK(args.positives[n] < args.keys_count, "contrastive: positive ",
                      args.positives[n], " of query ", n, " is not below ", args.keys_count,
                      ", the number of keys");
    }
  }

  ScalarType compute() const { return compute_dtype(queries.scalar_type()); }

  void run() {
    const int64_t wanted = args.queries_count * args.keys_count;
    args.parts = threads_for(wanted * (args.dims + 16));
    // Gradients of 16 bits are not added to, so their queries come at once.
    const bool at_once = args.backward && queries.scalar_type() != compute();
    const int64_t range =
        at_once ? args.queries_count
                : rows_at_once(args.queries_count, args.dims, args.parts, element_size(compute()));
    args.count = range;
    cpu::ContrastivePlan plan{};
    const auto make_plan = FASTZOO_SELECT_KERNEL(contrastive_plan);
    make_plan(args, plan);
    if (plan.chunks < args.parts) {
      args.parts = plan.chunks < 1 ? 1 : static_cast<int>(plan.chunks);
      make_plan(args, plan);
    }
    const Tensor memory = empty(queries, {plan.bytes}, ScalarType::Byte);
    args.memory = memory.mutable_data_ptr();
    do {
      const int64_t left = args.queries_count - args.first;
      args.count = left < range ? left : range;
      run_range();
      args.first += args.count;
    } while (args.first < args.queries_count);
  }

  void run_range() const {
    const int64_t grain = 1 + kElementsWorthAThread / (32 * (args.dims + 16));
    cpu::ContrastivePlan plan{};
    FASTZOO_SELECT_KERNEL(contrastive_plan)(args, plan);
    const auto prepare = FASTZOO_SELECT_KERNEL(contrastive_prepare);
    torch::stable::parallel_for(0, plan.blocks, grain,
                                [&](int64_t begin, int64_t end) { prepare(args, begin, end); });
    const auto part = FASTZOO_SELECT_KERNEL(contrastive_part);
    torch::stable::parallel_for(0, args.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) part(args, static_cast<int>(index));
    });
    const auto finish = FASTZOO_SELECT_KERNEL(contrastive_finish);
    torch::stable::parallel_for(0, plan.blocks, grain, [&](int64_t begin, int64_t end) {
      const Tensor sums = empty(queries, {args.dims}, ScalarType::Double);
      finish(args, begin, end, static_cast<double*>(sums.mutable_data_ptr()));
    });
    if (args.needs_scale) FASTZOO_SELECT_KERNEL(contrastive_scalars)(args);
  }
};

std::tuple<Tensor, Tensor, Tensor> contrastive(const Tensor& queries, const Tensor& keys,
                                               const Tensor& positives, const Tensor& scale,
                                               const Tensor& bias, bool exclude_self, bool columns,
                                               bool sigmoid, bool bfloat16_products) {
  Inputs in(false, queries, keys, positives, scale, bias, exclude_self, sigmoid, bfloat16_products);
  in.args.columns = columns;
  const Tensor positive = empty(queries, {in.args.queries_count}, in.compute());
  const Tensor row = empty(queries, {in.args.queries_count}, in.compute());
  const Tensor column = empty_if(columns, queries, {in.args.keys_count}, in.compute());
  const Tensor column_sum = empty_if(columns, queries, {in.args.keys_count}, in.compute());
  in.args.positive = positive.mutable_data_ptr();
  in.args.row = row.mutable_data_ptr();
  in.args.column = column.mutable_data_ptr();
  in.args.column_sum = column_sum.mutable_data_ptr();
  in.run();
  return {positive, row, column};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_backward(
    const Tensor& grad_positive, const Tensor& grad_row, const Tensor& grad_column,
    const Tensor& queries, const Tensor& keys, const Tensor& positives, const Tensor& scale,
    const Tensor& bias, const Tensor& row, const Tensor& column, bool exclude_self, bool sigmoid,
    bool bfloat16_products, bool needs_queries, bool needs_keys, bool needs_scale) {
  Inputs in(true, queries, keys, positives, scale, bias, exclude_self, sigmoid, bfloat16_products);
  const Tensor by_positive = torch::stable::contiguous(grad_positive);
  const Tensor by_row = torch::stable::contiguous(grad_row);
  const Tensor by_column = torch::stable::contiguous(grad_column);
  const Tensor saved_row = torch::stable::contiguous(row);
  const Tensor saved_column = torch::stable::contiguous(column);
  cpu::ContrastiveArgs& args = in.args;
  args.needs_queries = needs_queries;
  args.needs_keys = needs_keys;
  args.needs_scale = needs_scale;
  args.grad_positive = by_positive.const_data_ptr();
  args.grad_row = by_row.const_data_ptr();
  args.grad_column = saved_column.size(0) > 0 ? data_or_null(by_column) : nullptr;
  args.saved_row = saved_row.const_data_ptr();
  args.saved_column = saved_column.const_data_ptr();
  const ScalarType dtype = queries.scalar_type();
  const Tensor grad_queries =
      empty_if(needs_queries, queries, {args.queries_count, args.dims}, dtype);
  const Tensor grad_keys = empty_if(needs_keys, queries, {args.keys_count, args.dims}, dtype);
  const Tensor grad_scale = empty_if(needs_scale, queries, {1}, in.compute());
  const Tensor grad_bias = empty_if(needs_scale, queries, {1}, in.compute());
  if (args.queries_count == 0) torch::stable::zero_(const_cast<Tensor&>(grad_keys));
  const Tensor grad_scalars = torch::stable::new_zeros(queries, {2}, ScalarType::Double);
  args.grad_queries = grad_queries.mutable_data_ptr();
  args.grad_keys = grad_keys.mutable_data_ptr();
  args.grad_scalars = static_cast<double*>(grad_scalars.mutable_data_ptr());
  args.grad_scale = grad_scale.mutable_data_ptr();
  args.grad_bias = grad_bias.mutable_data_ptr();
  in.run();
  return {grad_queries, grad_keys, grad_scale, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<contrastive>(m, "contrastive");
  implement<contrastive>(m, "contrastive.cpu");
  implement<contrastive_backward>(m, "contrastive_backward");
  implement<contrastive_backward>(m, "contrastive_backward.cpu");
}

}  // namespace fastzoo
