// fastzoo::pointconv and pointconv_moments on the CPU.
#include "kernels/pointconv.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "entry.h"

namespace fastzoo {
namespace {

// The sums of each unit, one unit after the other, whoever found them.
struct UnitSums {
  std::vector<double> of_units, total;

  UnitSums(int64_t units, int64_t size) : of_units(units * size), total(size) {}
  void add(int64_t units) {
    const int64_t size = static_cast<int64_t>(total.size());
    for (int64_t unit = 0; unit < units; ++unit) {
      for (int64_t i = 0; i < size; ++i) total[i] += of_units[unit * size + i];
    }
  }
  Tensor rounded(const Tensor& like, std::initializer_list<int64_t> sizes, int64_t first) const {
    const Tensor tensor = empty(like, sizes, like.scalar_type());
    dispatch_float(like.scalar_type(), "pointconv", [&](auto element) {
      using T = decltype(element);
      T* const to = static_cast<T*>(tensor.mutable_data_ptr());
      for (int64_t i = 0; i < tensor.numel(); ++i) to[i] = static_cast<T>(total[first + i]);
    });
    return tensor;
  }
};

// What all operators share: the edges and the net, dense, and the memory that kernels work in.
struct EdgeInputs {
  const char* op;
  Tensor xyz, centres, neighbours, net;
  int64_t edges = 0;  // with a neighbour
  int threads = 1;
  Tensor memory, scratch;
  int64_t scratch_bytes = 0;

  EdgeInputs(const char* op, const Tensor& xyz_in, const Tensor& centres_in,
             const Tensor& neighbours_in, const Tensor& net_in, const std::vector<int64_t>& widths,
             cpu::EdgeArgs& args)
      : op(op),
        xyz(torch::stable::contiguous(xyz_in)),
        centres(torch::stable::contiguous(centres_in)),
        neighbours(torch::stable::contiguous(neighbours_in)),
        net(torch::stable::contiguous(net_in)),
        memory(xyz),
        scratch(xyz) {
    args.clouds = xyz.size(0);
    args.points = xyz.size(1);
    args.centres = centres.size(1);
    args.neighbours_each = neighbours.size(2);
    STD_TORCH_CHECK(math::net_layout(xyz.size(2), widths.data(),
                                     static_cast<int64_t>(widths.size()), args.layout),
                    op, ": a net of at most ", math::kNetLayers, " layers of 1 to ",
                    math::kNetWidth, " outputs needed");
    STD_TORCH_CHECK(net.size(0) == args.layout.size, op, ": a net of ", args.layout.size,
                    " parameters needed, got ", net.size(0));
    args.xyz = xyz.const_data_ptr();
    args.centre_xyz = centres.const_data_ptr();
    args.neighbours = static_cast<const int64_t*>(neighbours.const_data_ptr());
    args.net = net.const_data_ptr();
    int64_t highest = -1;
    for (int64_t i = 0; i < neighbours.numel(); ++i) {
      highest = std::max(highest, args.neighbours[i]);
      edges += args.neighbours[i] >= 0;
    }
    STD_TORCH_CHECK(highest < args.points, op, ": neighbours: expected rows below ", args.points,
                    ", got ", highest);
  }

  int64_t all_centres() const { return centres.size(0) * centres.size(1); }

  // `products`: what is multiplied for an edge.
  void allocate(const cpu::PointConvPlan& plan, int64_t products, cpu::EdgeArgs& args) {
    threads = threads_for(neighbours.numel() * products);
    scratch_bytes = plan.scratch_bytes;
    memory = empty(xyz, {plan.bytes}, ScalarType::Byte);
    scratch = empty(xyz, {threads * scratch_bytes}, ScalarType::Byte);
    args.memory = memory.mutable_data_ptr();
  }

  // Divides a kernel's work by the threads, each with scratch of its own.
  template <class Args>
  void run(void (*kernel)(const Args&, int64_t, int64_t, void*), const Args& args,
           int64_t work) const {
    const int64_t parts = std::min<int64_t>(threads, work);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        kernel(args, work * part / parts, work * (part + 1) / parts,
               static_cast<char*>(scratch.mutable_data_ptr()) + part * scratch_bytes);
      }
    });
  }

  // Calls body(units) for all centres, as many as are taken at once.
  template <class Body>
  void over_centres(cpu::EdgeArgs& args, const Body& body) const {
    const int64_t at_once = args.count;
    for (; args.first < all_centres(); args.first += at_once) {
      args.count = std::min(at_once, all_centres() - args.first);
      body(units(args));
    }
  }

  static int64_t units(const cpu::EdgeArgs& args) {
    return (args.count + args.unit - 1) / args.unit;
  }

  void add_points(const cpu::EdgeArgs& args) const {
    const auto kernel = FASTZOO_SELECT_KERNEL(pointconv_backward_points);
    const int64_t parts = std::min<int64_t>(threads, args.layout.dims);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      kernel(args, args.layout.dims * begin / parts, args.layout.dims * end / parts);
    });
  }
};

struct PointConvInputs {
  cpu::PointConvArgs args{};
  EdgeInputs edges;
  Tensor features, scale, linear, bias;
  cpu::PointConvPlan plan{};

  PointConvInputs(const char* op, const Tensor& xyz, const Tensor& features_in,
                  const Tensor& centres, const Tensor& neighbours, const Tensor& scale_in,
                  const Tensor& net, const std::vector<int64_t>& widths, const Tensor& linear_in,
                  const Tensor& bias_in)
      : edges(op, xyz, centres, neighbours, net, widths, args),
        features(torch::stable::contiguous(features_in)),
        scale(torch::stable::contiguous(scale_in)),
        linear(torch::stable::contiguous(linear_in)),
        bias(torch::stable::contiguous(bias_in)) {
    args.dtype = kernel_dtype(features.scalar_type(), op);
    args.grouped = features.dim() == 4;
    args.has_linear = linear.dim() == 2;
    args.channels = features.size(features.dim() - 1);
    args.outputs = args.has_linear ? linear.size(0) : args.channels * args.layout.width;
    args.features = features.const_data_ptr();
    args.scale = scale.dim() == 3 ? scale.const_data_ptr() : nullptr;
    args.linear = linear.const_data_ptr();
    args.bias = data_or_null(bias);
  }

  Tensor outputs() const {
    return empty(features, {args.clouds, args.centres, args.outputs}, features.scalar_type());
  }

  void make_plan() {
    FASTZOO_SELECT_KERNEL(pointconv_plan)(args, plan);
    const int64_t outputs = args.has_linear ? args.outputs : 0;
    const int64_t products = args.channels * args.layout.width *
                             (1 + outputs / std::max<int64_t>(1, args.neighbours_each));
    edges.allocate(plan, 32 + products, args);
  }

  // Runs a kernel whose work is `count` things, each divided by rows if there are more threads.
  void run_divided(void (*kernel)(const cpu::PointConvArgs&, int64_t, int64_t, void*),
                   int64_t count) {
    args.parts = static_cast<int>(1 + (edges.threads - 1) / std::max<int64_t>(1, count));
    edges.run(kernel, args, count * args.parts);
  }
};

Tensor pointconv(const Tensor& xyz, const Tensor& features, const Tensor& centres,
                 const Tensor& neighbours, const Tensor& scale, const Tensor& net,
                 std::vector<int64_t> widths, const Tensor& linear, const Tensor& bias) {
  PointConvInputs in("pointconv", xyz, features, centres, neighbours, scale, net, widths, linear,
                     bias);
  const Tensor out = in.outputs();
  if (out.numel() == 0) return out;
  in.args.out = out.mutable_data_ptr();
  in.make_plan();
  in.edges.over_centres(in.args, [&](int64_t units) {
    in.edges.run(FASTZOO_SELECT_KERNEL(pointconv_sum), in.args, units);
    if (in.args.has_linear) {
      in.run_divided(FASTZOO_SELECT_KERNEL(pointconv_output), in.plan.output_panels);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pointconv_backward(
    const Tensor& grad, const Tensor& xyz, const Tensor& features, const Tensor& centres,
    const Tensor& neighbours, const Tensor& scale, const Tensor& net, std::vector<int64_t> widths,
    const Tensor& linear, const Tensor& bias, bool wants_coordinates) {
  PointConvInputs in("pointconv_backward", xyz, features, centres, neighbours, scale, net, widths,
                     linear, bias);
  cpu::PointConvArgs& args = in.args;
  const EdgeInputs& edges = in.edges;
  const ScalarType dtype = in.features.scalar_type(), compute = edges.xyz.scalar_type();
  const Tensor upstream = torch::stable::contiguous(torch::stable::to(grad, dtype));

  const Tensor none = empty(edges.xyz, {0}, compute);
  const Tensor grad_xyz = wants_coordinates ? zeros_like(edges.xyz) : none;
  const Tensor grad_centres = wants_coordinates ? zeros_like(edges.centres) : none;
  const Tensor grad_features = zeros_like(in.features);
  const Tensor grad_scale = zeros_like(in.scale);
  const Tensor grad_linear = zeros_like(in.linear);
  const Tensor grad_bias = zeros_like(in.bias);
  if (upstream.numel() == 0) {
    return {grad_xyz,    grad_features, grad_centres, grad_scale, zeros_like(edges.net),
            grad_linear, grad_bias};
  }

  args.grad = upstream.const_data_ptr();
  args.wants_coordinates = wants_coordinates;
  in.make_plan();
  UnitSums net_sums(EdgeInputs::units(args), args.layout.size);
  UnitSums bias_sums(0, args.outputs);
  // Where gradients of 16 bits are added to, they are of the compute type.
  const bool rounds = dtype != compute && !args.grouped;
  const Tensor row_sums =
      rounds ? zeros(edges.xyz, {args.clouds, args.points, args.channels}, compute) : grad_features;
  const Tensor linear_sums = zeros(edges.xyz, {args.has_linear ? in.plan.linear_sums : 0}, compute);
  args.net_sums = net_sums.of_units.data();
  args.bias_sums = bias_sums.total.data();
  args.grad_xyz = grad_xyz.mutable_data_ptr();
  args.grad_centres = grad_centres.mutable_data_ptr();
  args.row_sums = row_sums.mutable_data_ptr();
  args.grad_features = grad_features.mutable_data_ptr();
  args.grad_scale = grad_scale.mutable_data_ptr();
  args.linear_sums = linear_sums.mutable_data_ptr();
  args.grad_linear = grad_linear.mutable_data_ptr();

  edges.over_centres(args, [&](int64_t units) {
    edges.run(FASTZOO_SELECT_KERNEL(pointconv_sum), args, units);
    if (args.has_linear) {
      in.run_divided(FASTZOO_SELECT_KERNEL(pointconv_backward_sums), in.plan.channel_vectors);
      edges.run(FASTZOO_SELECT_KERNEL(pointconv_backward_linear), args, in.plan.linear_panels);
      if (args.bias != nullptr) {
        edges.run(FASTZOO_SELECT_KERNEL(pointconv_backward_bias), args, args.outputs);
      }
    }
    const int64_t last_cloud = (args.first + args.count - 1) / args.centres;
    const int64_t clouds = last_cloud - args.first / args.centres + 1;
    edges.run(FASTZOO_SELECT_KERNEL(pointconv_backward_features), args,
              clouds * in.plan.channel_pairs);
    edges.run(FASTZOO_SELECT_KERNEL(pointconv_backward_edges), args, units);
    net_sums.add(units);
    if (wants_coordinates) edges.add_points(args);
  });
  if (rounds) {
    edges.run(FASTZOO_SELECT_KERNEL(pointconv_write_features), args, args.clouds * args.points);
  }
  if (args.has_linear) edges.run(FASTZOO_SELECT_KERNEL(pointconv_write_linear), args, args.outputs);
  if (args.bias != nullptr) {
    dispatch_float(dtype, "pointconv_backward", [&](auto element) {
      using T = decltype(element);
      T* const to = static_cast<T*>(grad_bias.mutable_data_ptr());
      for (int64_t o = 0; o < args.outputs; ++o) to[o] = static_cast<T>(bias_sums.total[o]);
    });
  }
  return {grad_xyz,
          grad_features,
          grad_centres,
          grad_scale,
          net_sums.rounded(edges.net, {args.layout.size}, 0),
          grad_linear,
          grad_bias};
}

std::tuple<Tensor, Tensor> pointconv_moments(const Tensor& xyz, const Tensor& centres,
                                             const Tensor& neighbours, const Tensor& net,
                                             std::vector<int64_t> widths) {
  cpu::MomentsArgs args{};
  EdgeInputs edges("pointconv_moments", xyz, centres, neighbours, net, widths, args);
  args.dtype = kernel_dtype(edges.xyz.scalar_type(), "pointconv_moments");
  const int64_t width = args.layout.width;
  if (edges.edges == 0) {
    return {zeros(edges.xyz, {width}, edges.xyz.scalar_type()),
            zeros(edges.xyz, {width, width}, edges.xyz.scalar_type())};
  }
  cpu::PointConvPlan plan{};
  FASTZOO_SELECT_KERNEL(pointconv_moments_plan)(args, plan);
  edges.allocate(plan, args.layout.size + width * width, args);
  UnitSums sums(EdgeInputs::units(args), width + width * width);
  args.sums = sums.of_units.data();
  edges.over_centres(args, [&](int64_t units) {
    edges.run(FASTZOO_SELECT_KERNEL(pointconv_moments_sum), args, units);
    sums.add(units);
  });
  double* const means = sums.total.data();
  const double count = static_cast<double>(edges.edges);
  for (int64_t i = 0; i < width; ++i) means[i] /= count;
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      double& product = means[width + i * width + j];
      product = product / count - means[i] * means[j];
    }
  }
  return {sums.rounded(edges.xyz, {width}, 0), sums.rounded(edges.xyz, {width, width}, width)};
}

std::tuple<Tensor, Tensor, Tensor> pointconv_moments_backward(
    const Tensor& grad_mean, const Tensor& grad_covariance, const Tensor& mean, const Tensor& xyz,
    const Tensor& centres, const Tensor& neighbours, const Tensor& net, std::vector<int64_t> widths,
    bool wants_coordinates) {
  cpu::MomentsArgs args{};
  EdgeInputs edges("pointconv_moments_backward", xyz, centres, neighbours, net, widths, args);
  const ScalarType compute = edges.xyz.scalar_type();
  args.dtype = kernel_dtype(compute, "pointconv_moments_backward");
  const Tensor none = empty(edges.xyz, {0}, compute);
  const Tensor grad_xyz = wants_coordinates ? zeros_like(edges.xyz) : none;
  const Tensor grad_centres = wants_coordinates ? zeros_like(edges.centres) : none;
  if (edges.edges == 0) return {grad_xyz, grad_centres, zeros_like(edges.net)};

  const auto dense = [&](const Tensor& tensor) {
    return torch::stable::contiguous(torch::stable::to(tensor, compute));
  };
  const int64_t width = args.layout.width;
  const Tensor means = dense(mean), by_mean = dense(grad_mean),
               by_covariance = dense(grad_covariance);
  const Tensor slope = empty(edges.xyz, {width, width}, compute);
  dispatch_float(compute, "pointconv_moments_backward", [&](auto element) {
    using T = decltype(element);
    const T* const from = static_cast<const T*>(by_covariance.const_data_ptr());
    T* const to = static_cast<T*>(slope.mutable_data_ptr());
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t j = 0; j < width; ++j)
        to[i * width + j] = from[i * width + j] + from[j * width + i];
    }
  });
  args.mean = means.const_data_ptr();
  args.grad_mean = by_mean.const_data_ptr();
  args.slope = slope.const_data_ptr();
  args.edges = static_cast<double>(edges.edges);
  args.wants_coordinates = wants_coordinates;
  cpu::PointConvPlan plan{};
  FASTZOO_SELECT_KERNEL(pointconv_moments_plan)(args, plan);
  edges.allocate(plan, 3 * args.layout.size + width * width, args);
  UnitSums net_sums(EdgeInputs::units(args), args.layout.size);
  args.net_sums = net_sums.of_units.data();
  args.grad_xyz = grad_xyz.mutable_data_ptr();
  args.grad_centres = grad_centres.mutable_data_ptr();
  edges.over_centres(args, [&](int64_t units) {
    edges.run(FASTZOO_SELECT_KERNEL(pointconv_moments_backward), args, units);
    net_sums.add(units);
    if (wants_coordinates) edges.add_points(args);
  });
  return {grad_xyz, grad_centres, net_sums.rounded(edges.net, {args.layout.size}, 0)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<pointconv>(m, "pointconv");
  implement<pointconv>(m, "pointconv.cpu");
  implement<pointconv_backward>(m, "pointconv_backward");
  implement<pointconv_backward>(m, "pointconv_backward.cpu");
  implement<pointconv_moments>(m, "pointconv_moments");
  implement<pointconv_moments>(m, "pointconv_moments.cpu");
  implement<pointconv_moments_backward>(m, "pointconv_moments_backward");
  implement<pointconv_moments_backward>(m, "pointconv_moments_backward.cpu");
}

}  // namespace fastzoo
