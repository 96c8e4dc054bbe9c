// fastzoo::neighbour_search and its gradient on the CPU.
#include "kernels/neighbours.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "clouds.h"
#include "entry.h"
#include "runtime/point_blocks.h"

namespace fastzoo {
namespace {

using math::Norm;

// Calls body with each part in [0, parts), on this thread.
const auto kInTurn = [](int64_t parts, const auto& body) {
  for (int64_t part = 0; part < parts; ++part) body(part);
};

// The rows of both sides that are of one cloud.
struct CloudRows {
  int64_t begin1, queries;
  int64_t begin2, points;
};

std::vector<CloudRows> paired_clouds(const char* op, const Tensor& p1, const Tensor& p2,
                                     const Tensor& ranges1, const Tensor& ranges2) {
  constexpr int64_t kMostRows = int64_t{1} << 31;
  STD_TORCH_CHECK(p1.size(0) < kMostRows && p2.size(0) < kMostRows, op, ": more than 2^31 points");
  STD_TORCH_CHECK(ranges1.size(0) == ranges2.size(0), op, ": ", ranges1.size(0), " clouds and ",
                  ranges2.size(0));
  const std::vector<Cloud> clouds1 = clouds_of(ranges1, p1.size(0));
  const std::vector<Cloud> clouds2 = clouds_of(ranges2, p2.size(0));
  std::vector<CloudRows> clouds(clouds1.size());
  for (size_t b = 0; b < clouds.size(); ++b) {
    clouds[b] = {clouds1[b].begin, clouds1[b].size(), clouds2[b].begin, clouds2[b].size()};
  }
  return clouds;
}

Norm norm_of(const char* op, int64_t norm) {
  STD_TORCH_CHECK(norm == 1 || norm == 2, op, ": norm must be 1 or 2, got ", norm);
  return norm == 1 ? Norm::one : Norm::two;
}

// Whether both are the same elements in memory.
bool same(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.size(0) == b.size(0) && a.is_contiguous() &&
         b.is_contiguous();
}

// Calls body(T{}) with the compute type.
template <class Body>
void with_type(cpu::Dtype dtype, const Body& body) {
  if (dtype == cpu::Dtype::float64) return body(double{});
  return body(float{});
}

// Queries of a cloud that are dealt with one after another.
struct Task {
  int64_t cloud, begin, end;
};
constexpr int64_t kTaskQueries = 256;

std::vector<Task> tasks_of(const std::vector<CloudRows>& clouds) {
  std::vector<Task> tasks;
  for (size_t b = 0; b < clouds.size(); ++b) {
    for (int64_t begin = 0; begin < clouds[b].queries; begin += kTaskQueries) {
      const int64_t end = std::min(begin + kTaskQueries, clouds[b].queries);
      tasks.push_back({static_cast<int64_t>(b), begin, end});
    }
  }
  return tasks;
}

// What the search of one cloud reads.
template <class T>
class SearchedCloud {
 public:
  template <class Parallel>
  SearchedCloud(const cpu::NeighbourArgs& args, const CloudRows& rows, const T* queries,
                const T* points, int64_t parts, const Parallel& parallel) {
    const bool self = queries == points && rows.queries == rows.points;
    std::vector<int32_t> point_order;
    if (tree_pays(args, rows)) {
      point_order = cpu::morton_order(points, rows.points, args.dims, parts, parallel);
      if (!self && !point_order.empty()) {
        query_order_ = cpu::morton_order(queries, rows.queries, args.dims, parts, parallel);
        // Where a query is not finite every distance counts, in its own way.
        if (query_order_.empty()) point_order.clear();
      }
    }
    const bool has_tree = !point_order.empty();
    if (has_tree) {
      tree_.emplace(points, rows.points, args.dims, point_order, parts, parallel);
      if (self) query_order_ = std::move(point_order);
    }
    if (!has_tree || args.first) {
      rows_.emplace(points, rows.points, args.dims, std::vector<int32_t>(), parts, parallel);
    }
    kernel_.points = rows.points;
    kernel_.queries = queries;
  }

  cpu::NeighbourCloud kernel_view(T* distances, int64_t* indices) const {
    cpu::NeighbourCloud view = kernel_;
    view.order = query_order_.empty() ? nullptr : query_order_.data();
    view.tree = tree_ ? &tree_->view : nullptr;
    view.rows = rows_ ? &rows_->view : nullptr;
    view.distances = distances;
    view.indices = indices;
    return view;
  }

 private:
  static bool tree_pays(const cpu::NeighbourArgs& args, const CloudRows& rows) {
    constexpr int64_t kLeastPoints = 256;
    constexpr int64_t kLeastQueries = 128;  // else it costs more to build than it saves
    return args.dims <= cpu::kMostTreeDims && rows.points >= kLeastPoints &&
           rows.queries >= kLeastQueries;
  }

  std::vector<int32_t> query_order_;
  std::optional<cpu::PointBlocks<T>> tree_, rows_;
  cpu::NeighbourCloud kernel_{};
};

// Calls body(begin, end) with the rows that are in none of the ascending ranges.
template <class RangeOf, class Body>
void over_gaps(const std::vector<CloudRows>& clouds, int64_t rows, const RangeOf& range_of,
               const Body& body) {
  int64_t next = 0;
  for (const CloudRows& cloud : clouds) {
    const auto [begin, count] = range_of(cloud);
    if (next < begin) body(next, begin);
    next = std::max(next, begin + count);
  }
  if (next < rows) body(next, rows);
}

const auto kQueries = [](const CloudRows& cloud) { return std::pair(cloud.begin1, cloud.queries); };
const auto kPoints = [](const CloudRows& cloud) { return std::pair(cloud.begin2, cloud.points); };

template <class T>
void search(const cpu::NeighbourArgs& args, const std::vector<CloudRows>& clouds, int64_t all_rows,
            const T* p1, const T* p2, T* distances, int64_t* indices) {
  over_gaps(clouds, all_rows, kQueries, [&](int64_t begin, int64_t end) {
    std::fill(distances + begin * args.k, distances + end * args.k, T(0));
    std::fill(indices + begin * args.k, indices + end * args.k, int64_t{-1});
  });
  constexpr int64_t kLargeCloud = 1 << 16;  // built by all threads together
  std::vector<std::optional<SearchedCloud<T>>> searched(clouds.size());
  int64_t pairs = 0, longest = 0;
  for (size_t b = 0; b < clouds.size(); ++b) {
    const CloudRows& rows = clouds[b];
    longest = std::max(longest, rows.points);
    // A tree spares all but so many.
    constexpr int64_t kMetByTree = 1024;
    pairs += rows.queries *
             std::min(rows.points, args.dims > cpu::kMostTreeDims ? rows.points : kMetByTree);
    if (rows.queries == 0 || std::max(rows.points, rows.queries) < kLargeCloud) continue;
    searched[b].emplace(args, rows, p1 + rows.begin1 * args.dims, p2 + rows.begin2 * args.dims,
                        torch::stable::get_num_threads(), run_parts);
  }
  const int64_t threads = threads_for(pairs * args.dims);
  const int64_t cloud_count = static_cast<int64_t>(clouds.size());
  share_out(cloud_count, threads, [&](const auto& next) {
    for (int64_t b = next(); b < cloud_count; b = next()) {
      const CloudRows& rows = clouds[b];
      if (searched[b] || rows.queries == 0) continue;
      searched[b].emplace(args, rows, p1 + rows.begin1 * args.dims, p2 + rows.begin2 * args.dims, 1,
                          kInTurn);
    }
  });

  const std::vector<Task> tasks = tasks_of(clouds);
  int64_t workspace_bytes = 0;
  FASTZOO_SELECT_KERNEL(neighbour_workspace)(args, longest, workspace_bytes);
  const auto kernel = FASTZOO_SELECT_KERNEL(neighbour_search);
  const int64_t task_count = static_cast<int64_t>(tasks.size());
  share_out(task_count, threads, [&](const auto& next) {
    const std::unique_ptr<char[]> workspace(new char[workspace_bytes]);
    for (int64_t i = next(); i < task_count; i = next()) {
      const Task& task = tasks[i];
      const int64_t first = clouds[task.cloud].begin1 * args.k;
      kernel(args, searched[task.cloud]->kernel_view(distances + first, indices + first),
             task.begin, task.end, workspace.get());
    }
  });
}

std::tuple<Tensor, Tensor> neighbour_search(const Tensor& p1, const Tensor& p2,
                                            const Tensor& ranges1, const Tensor& ranges2,
                                            int64_t /*longest*/, int64_t k, double radius,
                                            std::string order, int64_t norm) {
  const char* const op = "neighbour_search";
  STD_TORCH_CHECK(order == "nearest" || order == "first", op,
                  ": order must be nearest or first, got ", order);
  STD_TORCH_CHECK(k >= 1, op, ": k must be positive, got ", k);
  const std::vector<CloudRows> clouds = paired_clouds(op, p1, p2, ranges1, ranges2);
  cpu::NeighbourArgs args{};
  const ScalarType compute = compute_dtype(p1.scalar_type());
  args.dtype = kernel_dtype(compute, op);
  args.norm = norm_of(op, norm);
  args.first = order == "first";
  args.radius = radius;
  args.dims = p1.size(1);
  args.k = k;
  const Tensor queries = dense_as(p1, compute);
  const Tensor points = same(p1, p2) ? queries : dense_as(p2, compute);
  const Tensor distances = empty(p1, {p1.size(0), k}, compute);
  const Tensor indices = empty(p1, {p1.size(0), k}, ScalarType::Long);
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    search(args, clouds, p1.size(0), static_cast<const T*>(queries.const_data_ptr()),
           static_cast<const T*>(points.const_data_ptr()),
           static_cast<T*>(distances.mutable_data_ptr()),
           static_cast<int64_t*>(indices.mutable_data_ptr()));
  });
  return {distances, indices};
}

// The points, in ranges whose gradients are each summed by one thread: it looks at every pair of
// the cloud, so that they are no more than there are threads, unless the sums want too much room.
std::vector<Task> point_tasks_of(const std::vector<CloudRows>& clouds, int64_t dims,
                                 int64_t threads) {
  constexpr int64_t kMostSums = 1 << 22;
  int64_t all_queries = 0;
  for (const CloudRows& cloud : clouds) all_queries += cloud.queries;
  std::vector<Task> tasks;
  for (size_t b = 0; b < clouds.size(); ++b) {
    const CloudRows& cloud = clouds[b];
    const int64_t by_work = threads * cloud.queries / std::max(all_queries, int64_t{1});
    const int64_t by_room = cloud.points * dims / kMostSums;
    const int64_t count = 1 + std::max(by_work - 1, by_room);
    for (int64_t i = 0; i < count; ++i) {
      tasks.push_back(
          {static_cast<int64_t>(b), cloud.points * i / count, cloud.points * (i + 1) / count});
    }
  }
  return tasks;
}

template <class T>
void sum_gradients(const cpu::NeighbourBackwardArgs& args, const std::vector<CloudRows>& clouds,
                   const T* grad, const T* p1, const T* p2, const int64_t* indices, T* grad_p1,
                   T* grad_p2) {
  const auto kernel_view = [&](const CloudRows& cloud) {
    const int64_t first1 = cloud.begin1 * args.dims, first2 = cloud.begin2 * args.dims;
    return cpu::NeighbourBackwardCloud{cloud.queries,
                                       cloud.points,
                                       p1 + first1,
                                       p2 + first2,
                                       grad + cloud.begin1 * args.k,
                                       indices + cloud.begin1 * args.k,
                                       grad_p1 + first1,
                                       grad_p2 + first2};
  };
  const std::vector<Task> tasks = tasks_of(clouds);
  const int64_t pairs = static_cast<int64_t>(tasks.size()) * kTaskQueries * args.k;
  const int64_t threads = threads_for(pairs * args.dims);
  const auto kernel_p1 = FASTZOO_SELECT_KERNEL(neighbour_backward_p1);
  const int64_t task_count = static_cast<int64_t>(tasks.size());
  share_out(task_count, threads, [&](const auto& next) {
    std::vector<double> sums(args.dims);
    for (int64_t i = next(); i < task_count; i = next()) {
      const Task& task = tasks[i];
      kernel_p1(args, kernel_view(clouds[task.cloud]), task.begin, task.end, sums.data());
    }
  });
  const std::vector<Task> point_tasks = point_tasks_of(clouds, args.dims, threads);
  const auto kernel_p2 = FASTZOO_SELECT_KERNEL(neighbour_backward_p2);
  const int64_t point_task_count = static_cast<int64_t>(point_tasks.size());
  share_out(point_task_count, threads, [&](const auto& next) {
    std::vector<int32_t> pairs_of_query(args.k);
    for (int64_t i = next(); i < point_task_count; i = next()) {
      const Task& task = point_tasks[i];
      const std::unique_ptr<double[]> sums(new double[(task.end - task.begin) * args.dims]);
      kernel_p2(args, kernel_view(clouds[task.cloud]), task.begin, task.end, sums.get(),
                pairs_of_query.data());
    }
  });
}

std::tuple<Tensor, Tensor> neighbour_search_backward(const Tensor& grad_dists, const Tensor& p1,
                                                     const Tensor& p2, const Tensor& ranges1,
                                                     const Tensor& ranges2, int64_t /*longest*/,
                                                     const Tensor& indices, int64_t norm) {
  const char* const op = "neighbour_search_backward";
  const std::vector<CloudRows> clouds = paired_clouds(op, p1, p2, ranges1, ranges2);
  const ScalarType compute = compute_dtype(p1.scalar_type());
  cpu::NeighbourBackwardArgs args{};
  args.dtype = kernel_dtype(compute, op);
  args.norm = norm_of(op, norm);
  args.dims = p1.size(1);
  args.k = indices.size(1);
  const Tensor queries = dense_as(p1, compute);
  const Tensor points = dense_as(p2, compute);
  const Tensor grad = dense_as(grad_dists, compute);
  const Tensor chosen = torch::stable::contiguous(indices);
  const Tensor grad_p1 = empty(p1, {p1.size(0), args.dims}, compute);
  const Tensor grad_p2 = empty(p2, {p2.size(0), args.dims}, compute);
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    T* const out1 = static_cast<T*>(grad_p1.mutable_data_ptr());
    T* const out2 = static_cast<T*>(grad_p2.mutable_data_ptr());
    over_gaps(clouds, p1.size(0), kQueries, [&](int64_t begin, int64_t end) {
      std::fill(out1 + begin * args.dims, out1 + end * args.dims, T(0));
    });
    over_gaps(clouds, p2.size(0), kPoints, [&](int64_t begin, int64_t end) {
      std::fill(out2 + begin * args.dims, out2 + end * args.dims, T(0));
    });
    sum_gradients(args, clouds, static_cast<const T*>(grad.const_data_ptr()),
                  static_cast<const T*>(queries.const_data_ptr()),
                  static_cast<const T*>(points.const_data_ptr()),
                  static_cast<const int64_t*>(chosen.const_data_ptr()), out1, out2);
  });
  return {torch::stable::to(grad_p1, p1.scalar_type()),
          torch::stable::to(grad_p2, p2.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<neighbour_search>(m, "neighbour_search");
  implement<neighbour_search>(m, "neighbour_search.cpu");
  implement<neighbour_search_backward>(m, "neighbour_search_backward");
  implement<neighbour_search_backward>(m, "neighbour_search_backward.cpu");
}

}  // namespace fastzoo
