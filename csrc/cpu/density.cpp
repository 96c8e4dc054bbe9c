// fastzoo::kernel_density and its gradients on the CPU.
#include "kernels/density.h"

#include <memory>
#include <string>
#include <tuple>

#include "clouds.h"
#include "runtime/point_blocks.h"

namespace fastzoo {
namespace {

using cpu::DensityArgs;
using cpu::DensitySum;
using cpu::DensityTask;
using cpu::kDensityPanel;

// The points of one side in panels.
struct Panels {
  std::vector<int64_t> rows;    // see DensitySide
  std::vector<int64_t> begins;  // [clouds + 1]: the first panel of each cloud

  int64_t count() const { return begins.back(); }

  explicit Panels(const std::vector<Cloud>& clouds) : begins{0} {
    for (const Cloud& cloud : clouds) {
      begins.push_back(count() + (cloud.size() + kDensityPanel - 1) / kDensityPanel);
    }
    rows.assign(count() * kDensityPanel, -1);
    for (size_t b = 0; b < clouds.size(); ++b) {
      int64_t* const own = rows.data() + begins[b] * kDensityPanel;
      for (int64_t i = 0; i < clouds[b].size(); ++i) own[i] = clouds[b].begin + i;
    }
  }

  // Brings near points of a cloud together.
  template <class T>
  void sort(int64_t b, const Cloud& cloud, const T* points, int64_t dims) {
    const std::vector<int32_t> order =
        cpu::morton_order(points + cloud.begin * dims, cloud.size(), dims,
                          threads_for_points(cloud.size()), run_parts);
    int64_t* const own = rows.data() + begins[b] * kDensityPanel;
    for (size_t i = 0; i < order.size(); ++i) own[i] = cloud.begin + order[i];
  }
};

// Whether a cloud is so large and wide that many pairs are beyond the kernel's reach.
template <class T>
bool is_wide(const Cloud& cloud, const T* points, const T* scale, int64_t dims, T reach) {
  constexpr int64_t kLarge = 2048;
  constexpr T kWide = 2;  // the square of an extent, in reaches
  if (dims > cpu::kDensityBoxDims || cloud.size() < kLarge) return false;
  const T least = *std::min_element(scale + cloud.begin, scale + cloud.end);
  for (int64_t d = 0; d < dims; ++d) {
    T lowest = points[cloud.begin * dims + d], highest = lowest;
    for (int64_t row = cloud.begin; row < cloud.end; ++row) {
      lowest = std::min(lowest, points[row * dims + d]);
      highest = std::max(highest, points[row * dims + d]);
    }
    if (least * (highest - lowest) * (highest - lowest) > kWide * reach) return true;
  }
  return false;
}

// Arguments that a density and its gradients share, and the panels of both sides.
struct Pairs {
  ScalarType compute;
  Tensor queries, points, scale, weight;
  std::vector<Cloud> query_clouds, point_clouds;
  Panels query_panels, point_panels;
  DensityArgs args{};
  bool wide = false;
  int64_t threads = 1;

  Pairs(const Tensor& queries, const Tensor& points, const Tensor& scale, const Tensor& weight,
        const Tensor& ranges1, const Tensor& ranges2, const std::string& kernel)
      : compute(compute_dtype(points.scalar_type())),
        queries(dense_as(queries, compute)),
        points(dense_as(points, compute)),
        scale(dense_as(scale, compute)),
        weight(dense_as(weight, compute)),
        query_clouds(clouds_of(ranges1, queries.size(0))),
        point_clouds(clouds_of(ranges2, points.size(0))),
        query_panels(query_clouds),
        point_panels(point_clouds) {
    STD_TORCH_CHECK(math::density_kernel_named(kernel.c_str(), args.kernel),
                    "kernel_density: unknown kernel ", kernel);
    STD_TORCH_CHECK(query_clouds.size() == point_clouds.size(),
                    "kernel_density: ", query_clouds.size(), " clouds of queries and ",
                    point_clouds.size());
    args.dims = points.size(1);
    args.scale = this->scale.const_data_ptr();
    args.weight = this->weight.const_data_ptr();
    int64_t products = 0;
    for (size_t b = 0; b < point_clouds.size(); ++b) {
      products += query_clouds[b].size() * point_clouds[b].size() * (args.dims + 8);
    }
    threads = threads_for(products);
    if (compute == ScalarType::Double) {
      sort<double>();
    } else {
      sort<float>();
    }
  }

  template <class T>
  void sort() {
    const T* const p1 = static_cast<const T*>(queries.const_data_ptr());
    const T* const p2 = static_cast<const T*>(points.const_data_ptr());
    const T* const scales = static_cast<const T*>(scale.const_data_ptr());
    const T reach = math::density_reach<T>(args.kernel);
    for (size_t b = 0; b < point_clouds.size(); ++b) {
      if (!is_wide(point_clouds[b], p2, scales, args.dims, reach)) continue;
      wide = true;
      point_panels.sort(b, point_clouds[b], p2, args.dims);
      if (p1 == p2 && query_clouds[b].begin == point_clouds[b].begin &&
          query_clouds[b].end == point_clouds[b].end) {
        std::copy(point_panels.rows.begin() + point_panels.begins[b] * kDensityPanel,
                  point_panels.rows.begin() + point_panels.begins[b + 1] * kDensityPanel,
                  query_panels.rows.begin() + query_panels.begins[b] * kDensityPanel);
      } else {
        query_panels.sort(b, query_clouds[b], p1, args.dims);
      }
    }
  }

  // Fills `out`, whose rows that no task owns stay as they are.
  void run(DensitySum sum, const Tensor& out) {
    if (compute == ScalarType::Double) {
      run<double>(sum, out, FASTZOO_SELECT_KERNEL(density_pack_double),
                  FASTZOO_SELECT_KERNEL(density_run_double));
    } else {
      run<float>(sum, out, FASTZOO_SELECT_KERNEL(density_pack_float),
                 FASTZOO_SELECT_KERNEL(density_run_float));
    }
  }

 private:
  template <class T>
  void run(DensitySum sum, const Tensor& out, void (*pack)(const DensityArgs&, int64_t, int64_t),
           void (*run_task)(const DensityArgs&, const DensityTask&, void*)) {
    const bool by_points = sum == DensitySum::by_points;
    const Panels& owners = by_points ? point_panels : query_panels;
    const Panels& stream = by_points ? query_panels : point_panels;
    const std::vector<Cloud>& clouds = by_points ? point_clouds : query_clouds;
    const void* const p1 = queries.const_data_ptr();
    const void* const p2 = points.const_data_ptr();
    args.sum = sum;
    args.owners = {by_points ? p2 : p1, owners.rows.data()};
    args.stream = {by_points ? p1 : p2, stream.rows.data()};
    args.panels = stream.count();
    args.out = out.mutable_data_ptr();
    // New memory is left as it is, for the threads to touch first.
    const std::unique_ptr<T[]> lines(new T[args.panels * args.lines_of_panel() * kDensityPanel]);
    const std::unique_ptr<T[]> boxes(wide ? new T[args.panels * (2 * args.dims + 1) + kDensityPanel]
                                          : nullptr);
    args.lines = lines.get();
    args.boxes = boxes.get();
    torch::stable::parallel_for(0, args.panels, 1024,
                                [&](int64_t begin, int64_t end) { pack(args, begin, end); });

    std::vector<DensityTask> tasks;
    int64_t most_panels = 0;
    for (size_t b = 0; b < clouds.size(); ++b) {
      const int64_t begin = owners.begins[b] * kDensityPanel;
      const int64_t end = begin + clouds[b].size();
      most_panels = std::max(most_panels, stream.begins[b + 1] - stream.begins[b]);
      for (int64_t first = begin; first < end; first += cpu::density_owners(args.dims)) {
        tasks.push_back({first, std::min(first + cpu::density_owners(args.dims), end),
                         stream.begins[b], stream.begins[b + 1]});
      }
    }
    const int64_t bytes = cpu::DensityScratch<T>(nullptr, args.dims, most_panels).arena.bytes();
    share_out(tasks.size(), threads, [&](const auto& next) {
      const std::unique_ptr<double[]> scratch(new double[bytes / sizeof(double)]);
      for (size_t i = next(); i < tasks.size(); i = next()) {
        run_task(args, tasks[i], scratch.get());
      }
    });
  }
};

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = empty(like, sizes, dtype);
  return torch::stable::zero_(tensor);
}

Tensor kernel_density(const Tensor& queries, const Tensor& points, const Tensor& scale,
                      const Tensor& weight, const Tensor& ranges1, const Tensor& ranges2,
                      int64_t /*longest*/, std::string kernel) {
  Pairs pairs(queries, points, scale, weight, ranges1, ranges2, kernel);
  const Tensor out = zeros(queries, {queries.size(0)}, pairs.compute);
  pairs.run(DensitySum::values, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kernel_density_backward(
    const Tensor& grad, const Tensor& queries, const Tensor& points, const Tensor& scale,
    const Tensor& weight, const Tensor& ranges1, const Tensor& ranges2, int64_t /*longest1*/,
    int64_t /*longest2*/, std::string kernel) {
  Pairs pairs(queries, points, scale, weight, ranges1, ranges2, kernel);
  const Tensor dense_grad = dense_as(grad, pairs.compute);
  const int64_t dims = points.size(1);
  const Tensor grad_queries = zeros(queries, {queries.size(0), dims}, pairs.compute);
  const Tensor grad_points = zeros(points, {points.size(0), dims}, pairs.compute);
  const Tensor grad_scale = zeros(points, {points.size(0)}, pairs.compute);
  const Tensor grad_weight = zeros(points, {points.size(0)}, pairs.compute);
  pairs.args.grad = dense_grad.const_data_ptr();
  pairs.args.grad_scale = grad_scale.mutable_data_ptr();
  pairs.args.grad_weight = grad_weight.mutable_data_ptr();
  pairs.run(DensitySum::by_queries, grad_queries);
  pairs.run(DensitySum::by_points, grad_points);
  return {torch::stable::to(grad_queries, queries.scalar_type()),
          torch::stable::to(grad_points, points.scalar_type()), grad_scale, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<kernel_density>(m, "kernel_density");
  implement<kernel_density>(m, "kernel_density.cpu");
  implement<kernel_density_backward>(m, "kernel_density_backward");
  implement<kernel_density_backward>(m, "kernel_density_backward.cpu");
}

}  // namespace fastzoo
