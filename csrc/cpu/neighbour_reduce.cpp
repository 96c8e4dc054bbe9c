// fastzoo::neighbour_reduce and its gradient on the CPU.
#include "kernels/neighbour_reduce.h"

#include <algorithm>
#include <string>
#include <tuple>

#include "entry.h"

namespace fastzoo {
namespace {

struct NeighbourReduceInputs {
  Tensor features, neighbours, weights;
  bool is_maximum;
  cpu::NeighbourReduceArgs args{};

  NeighbourReduceInputs(const char* op, const Tensor& features_in, const Tensor& neighbours_in,
                        const Tensor& weights_in, const std::string& reduce)
      : features(torch::stable::contiguous(features_in)),
        neighbours(torch::stable::contiguous(neighbours_in)),
        weights(torch::stable::contiguous(weights_in)),
        is_maximum(reduce == "max") {
    STD_TORCH_CHECK(is_maximum || reduce == "sum", op, ": reduce must be sum or max, got ", reduce);
    args.dtype = kernel_dtype(features.scalar_type(), op);
    args.clouds = features.size(0);
    args.points = features.size(1);
    args.channels = features.size(2);
    args.centres = neighbours.size(1);
    args.neighbours_each = neighbours.size(2);
    STD_TORCH_CHECK(neighbours.size(0) == args.clouds, op, ": ", args.clouds,
                    " clouds of features and ", neighbours.size(0), " of neighbours");
    STD_TORCH_CHECK(args.points < (int64_t{1} << 31), op, ": ", args.points, " points");
    args.features = features.const_data_ptr();
    args.neighbours = static_cast<const int64_t*>(neighbours.const_data_ptr());
    args.weights = weights.dim() == 3 ? weights.const_data_ptr() : nullptr;
    const int64_t* const end = args.neighbours + neighbours.numel();
    const int64_t* const highest = std::max_element(args.neighbours, end);
    STD_TORCH_CHECK(highest == end || *highest < args.points, op,
                    ": neighbours: expected rows below ", args.points, ", got ", *highest);
  }

  int64_t all_centres() const { return args.clouds * args.centres; }

  // Calls the kernel for `work` things of so many elements each.
  void run(void (*kernel)(const cpu::NeighbourReduceArgs&, int64_t, int64_t), int64_t work,
           int64_t elements) const {
    torch::stable::parallel_for(0, work, 1 + kElementsWorthAThread / std::max<int64_t>(1, elements),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
};

std::tuple<Tensor, Tensor> neighbour_reduce(const Tensor& features, const Tensor& neighbours,
                                            const Tensor& weights, std::string reduce) {
  NeighbourReduceInputs in("neighbour_reduce", features, neighbours, weights, reduce);
  cpu::NeighbourReduceArgs& args = in.args;
  const std::initializer_list<int64_t> sizes = {args.clouds, args.centres, args.channels};
  const Tensor out = empty(in.features, sizes, in.features.scalar_type());
  const Tensor winner = in.is_maximum ? empty(in.features, sizes, ScalarType::Int)
                                      : empty(in.features, {0}, ScalarType::Int);
  args.out = out.mutable_data_ptr();
  args.winner = static_cast<int32_t*>(winner.mutable_data_ptr());
  in.run(in.is_maximum ? FASTZOO_SELECT_KERNEL(neighbour_maximum)
                       : FASTZOO_SELECT_KERNEL(neighbour_sum),
         in.all_centres(), args.neighbours_each * args.channels);
  return {out, winner};
}

std::tuple<Tensor, Tensor> neighbour_reduce_backward(const Tensor& grad, const Tensor& features,
                                                     const Tensor& neighbours,
                                                     const Tensor& weights, const Tensor& winner,
                                                     std::string reduce) {
  NeighbourReduceInputs in("neighbour_reduce_backward", features, neighbours, weights, reduce);
  cpu::NeighbourReduceArgs& args = in.args;
  const ScalarType dtype = in.features.scalar_type(), compute = compute_dtype(dtype);
  const Tensor upstream = torch::stable::contiguous(torch::stable::to(grad, dtype));
  const Tensor won = torch::stable::contiguous(winner);
  args.grad = upstream.const_data_ptr();
  args.winner = const_cast<int32_t*>(static_cast<const int32_t*>(won.const_data_ptr()));
  if (in.is_maximum) {
    const int32_t* const end = args.winner + won.numel();
    const int32_t* const highest = std::max_element<const int32_t*>(args.winner, end);
    STD_TORCH_CHECK(highest == end || *highest < args.points,
                    "neighbour_reduce_backward: winner: expected rows below ", args.points,
                    ", got ", *highest);
  }
  const Tensor grad_weights = torch::stable::empty_like(in.weights);
  const Tensor grad_features = zeros_like(in.features);
  // Gradients of 16 bits are added up in the compute type.
  const bool rounds = dtype != compute;
  const Tensor row_sums =
      rounds ? zeros(in.features, {args.clouds, args.points, args.channels}, compute)
             : grad_features;
  args.row_sums = row_sums.mutable_data_ptr();
  args.grad_features = grad_features.mutable_data_ptr();
  args.grad_weights = grad_weights.mutable_data_ptr();
  const int64_t threads = torch::stable::get_num_threads();
  args.parts = 1 + (threads - 1) / std::max<int64_t>(1, args.clouds);
  const int64_t each = in.is_maximum ? 1 : args.neighbours_each;
  in.run(in.is_maximum ? FASTZOO_SELECT_KERNEL(neighbour_maximum_backward)
                       : FASTZOO_SELECT_KERNEL(neighbour_sum_backward),
         args.clouds * args.parts, args.centres * each * args.channels / args.parts);
  if (rounds) {
    in.run(FASTZOO_SELECT_KERNEL(neighbour_write_features), args.clouds * args.points,
           args.channels);
  }
  if (!in.is_maximum && args.weights != nullptr) {
    in.run(FASTZOO_SELECT_KERNEL(neighbour_sum_backward_weights), in.all_centres(),
           args.neighbours_each * args.channels);
  }
  return {grad_features, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<neighbour_reduce>(m, "neighbour_reduce");
  implement<neighbour_reduce>(m, "neighbour_reduce.cpu");
  implement<neighbour_reduce_backward>(m, "neighbour_reduce_backward");
  implement<neighbour_reduce_backward>(m, "neighbour_reduce_backward.cpu");
}

}  // namespace fastzoo
