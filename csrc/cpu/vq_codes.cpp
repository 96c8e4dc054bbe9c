// fastzoo::vq_statistics and the gradients of the lookup on the CPU: what sums over the rows of
// each code.
#include "kernels/vq_codes.h"

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "entry.h"

namespace fastzoo {
namespace {

// How many threads such work is worth.
int64_t parts_of(int64_t elements, int64_t worth_a_thread) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::min(threads, 1 + elements / worth_a_thread);
}

// Rows in the order of their codes, divided into parts.
struct RowsByCode {
  std::unique_ptr<int64_t[]> order;
  std::vector<int64_t> begins;  // [codes + 1] where the rows of a code begin in order
  std::vector<cpu::VqPart> parts;
  std::unique_ptr<double[]> partials;

  // A counting sort: the rows of a code stay in ascending order, for any number of threads.
  RowsByCode(const char* op, const Tensor& indices, int64_t codes, int64_t dims)
      : order(new int64_t[indices.size(0)]), begins(codes + 1) {
    const int64_t rows = indices.size(0);
    const int64_t* const codes_of = static_cast<const int64_t*>(indices.const_data_ptr());
    // Each range of rows counts by itself; their counts together are no more than the rows.
    const int64_t ranges = parts_of(rows, std::max(kElementsWorthAThread, codes));
    const int64_t stride = codes + 1;  // rows without a code come last
    std::vector<int64_t> counts(ranges * stride);
    std::vector<int64_t> wrong(ranges, rows);
    const auto over_ranges = [&](const auto& body) {
      torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
        for (int64_t range = begin; range < end; ++range) {
          body(range, rows * range / ranges, rows * (range + 1) / ranges);
        }
      });
    };
    const auto place_of = [&](int64_t code) { return code < 0 ? codes : code; };
    over_ranges([&](int64_t range, int64_t begin, int64_t end) {
      int64_t* const own = counts.data() + range * stride;
      for (int64_t row = begin; row < end; ++row) {
        if (codes_of[row] >= codes) {
          wrong[range] = row;
          return;
        }
        ++own[place_of(codes_of[row])];
      }
    });
    for (const int64_t row : wrong) {
      STD_TORCH_CHECK(row == rows, op, ": index ", codes_of[row], " is out of range");
    }
    int64_t next = 0;
    for (int64_t code = 0; code <= codes; ++code) {
      begins[code] = next;
      for (int64_t range = 0; range < ranges; ++range) {
        int64_t& count = counts[range * stride + code];
        next += std::exchange(count, next);
      }
    }
    over_ranges([&](int64_t range, int64_t begin, int64_t end) {
      int64_t* const own = counts.data() + range * stride;
      for (int64_t row = begin; row < end; ++row) order[own[place_of(codes_of[row])]++] = row;
    });
    divide(codes, dims);
  }

  void divide(int64_t codes, int64_t dims) {
    constexpr int64_t kPartRows = 1024;
    int64_t slots = 0;
    parts.reserve(codes + begins[codes] / kPartRows);
    for (int64_t code = 0; code < codes; ++code) {
      const int64_t end = begins[code + 1];
      const bool whole = end - begins[code] <= kPartRows;
      int64_t begin = begins[code];
      do {
        const int64_t stop = std::min(begin + kPartRows, end);
        parts.push_back({code, begin, stop, whole ? -1 : slots++});
        begin = stop;
      } while (begin < end);
    }
    if (slots > 0) partials.reset(new double[slots * dims]);
  }

  void fill(cpu::VqCodesArgs& args) const {
    args.order = order.get();
    args.parts = parts.data();
    args.partials = partials.get();
  }

  // Runs the kernel on all parts and joins those of one code. Threads get parts of about as many
  // rows.
  template <class Args>
  void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args) const {
    const int64_t count = static_cast<int64_t>(parts.size());
    const int64_t work = args.rows + count;
    const int64_t threads = parts_of(work * args.dims, kElementsWorthAThread);
    const auto first_of = [&](int64_t thread) {
      const auto found =
          std::partition_point(parts.begin(), parts.end(), [&](const cpu::VqPart& part) {
            return part.begin + (&part - parts.data()) < work * thread / threads;
          });
      return thread == threads ? count : found - parts.begin();
    };
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      kernel(args, first_of(begin), first_of(end));
    });
    if (partials != nullptr) FASTZOO_SELECT_KERNEL(vq_join_parts)(args, 0, count);
  }
};

std::tuple<Tensor, Tensor> vq_statistics(const Tensor& x, const Tensor& indices, int64_t codes) {
  const ScalarType compute = compute_dtype(x.scalar_type());
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor chosen = torch::stable::contiguous(indices);

  cpu::VqCodesArgs args{};
  args.dtype = kernel_dtype(x.scalar_type(), "vq_statistics");
  args.sums_dtype = kernel_dtype(compute, "vq_statistics");
  args.rows = rows.size(0);
  args.dims = rows.size(1);
  const Tensor counts = empty(x, {codes}, compute);
  const Tensor sums = empty(x, {codes, args.dims}, compute);
  const RowsByCode by_code("vq_statistics", chosen, codes, args.dims);
  by_code.fill(args);
  args.x = rows.const_data_ptr();
  args.sums = sums.mutable_data_ptr();
  by_code.run(FASTZOO_SELECT_KERNEL(vq_sum_rows), args);
  dispatch_float(compute, "vq_statistics", [&](auto element) {
    using T = decltype(element);
    T* const out = static_cast<T*>(counts.mutable_data_ptr());
    for (int64_t code = 0; code < codes; ++code) {
      out[code] = static_cast<T>(by_code.begins[code + 1] - by_code.begins[code]);
    }
  });
  return {counts, sums};
}

// What both gradients begin with: contiguous inputs, and rows in the order of their codes.
template <class Args>
struct Backward {
  const char* op;
  ScalarType dtype;
  Tensor rows, codes, chosen;
  Tensor grad_x, grad_codebook;
  Args args{};

  Backward(const char* op, const Tensor& x, const Tensor& codebook, const Tensor& indices,
           bool wants_codebook)
      : op(op),
        dtype(x.scalar_type()),
        rows(torch::stable::contiguous(x)),
        codes(torch::stable::contiguous(codebook)),
        chosen(torch::stable::contiguous(indices)),
        grad_x(empty(x, {x.size(0), x.size(1)}, dtype)),
        grad_codebook(empty(x, {wants_codebook ? codebook.size(0) : 0, x.size(1)}, dtype)) {
    args.dtype = args.sums_dtype = kernel_dtype(dtype, op);
    args.rows = x.size(0);
    args.dims = x.size(1);
    args.x = rows.const_data_ptr();
    args.codebook = codes.const_data_ptr();
    args.indices = static_cast<const int64_t*>(chosen.const_data_ptr());
    args.grad_x = grad_x.mutable_data_ptr();
    args.sums = grad_codebook.mutable_data_ptr();
  }

  template <class Kernel>
  void by_x(Kernel* kernel) const {
    const int64_t* const end = args.indices + args.rows;
    const int64_t* const highest = std::max_element(args.indices, end);
    STD_TORCH_CHECK(highest == end || *highest < codes.size(0), op, ": index ", *highest,
                    " is out of range");
    torch::stable::parallel_for(0, args.rows, 1 + kElementsWorthAThread / args.dims,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  template <class Kernel>
  void by_codebook(Kernel* kernel) {
    const RowsByCode by_code(op, chosen, codes.size(0), args.dims);
    by_code.fill(args);
    by_code.run(kernel, args);
  }
};

std::tuple<Tensor, Tensor> vq_nearest_backward(const Tensor& grad_d, const Tensor& x,
                                               const Tensor& codebook, const Tensor& indices,
                                               std::string metric) {
  Backward<cpu::VqNearestBackwardArgs> backward("vq_nearest_backward", x, codebook, indices, true);
  cpu::VqNearestBackwardArgs& args = backward.args;
  STD_TORCH_CHECK(math::metric_named(metric.c_str(), args.metric),
                  "vq_nearest_backward: unknown metric ", metric);
  const Tensor upstream =
      torch::stable::contiguous(torch::stable::to(grad_d, compute_dtype(backward.dtype)));
  args.grad = upstream.const_data_ptr();
  const bool cosine = args.metric == math::Metric::cosine;
  const std::unique_ptr<double[]> slopes(cosine ? new double[2 * args.rows] : nullptr);
  args.slopes = slopes.get();
  backward.by_x(FASTZOO_SELECT_KERNEL(vq_nearest_backward_x));
  backward.by_codebook(FASTZOO_SELECT_KERNEL(vq_nearest_backward_codebook));
  return {backward.grad_x, backward.grad_codebook};
}

std::tuple<Tensor, Tensor> vq_quantize_backward(const Tensor& grad_quantized,
                                                const Tensor& grad_losses, const Tensor& x,
                                                const Tensor& codebook, const Tensor& indices,
                                                std::string estimator, double codebook_weight,
                                                double beta, bool wants_codebook) {
  Backward<cpu::VqQuantizeBackwardArgs> backward("vq_quantize_backward", x, codebook, indices,
                                                 wants_codebook);
  cpu::VqQuantizeBackwardArgs& args = backward.args;
  STD_TORCH_CHECK(math::estimator_named(estimator.c_str(), args.estimator),
                  "vq_quantize_backward: unknown estimator ", estimator);
  const Tensor by_quantized =
      torch::stable::contiguous(torch::stable::to(grad_quantized, backward.dtype));
  const Tensor by_losses =
      torch::stable::contiguous(torch::stable::to(grad_losses, compute_dtype(backward.dtype)));
  args.grad_quantized = by_quantized.const_data_ptr();
  args.grad_losses = by_losses.const_data_ptr();
  args.codebook_weight = codebook_weight;
  args.beta = beta;
  backward.by_x(FASTZOO_SELECT_KERNEL(vq_quantize_backward_x));
  if (wants_codebook) backward.by_codebook(FASTZOO_SELECT_KERNEL(vq_quantize_backward_codebook));
  return {backward.grad_x, backward.grad_codebook};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<vq_statistics>(m, "vq_statistics");
  implement<vq_statistics>(m, "vq_statistics.cpu");
  implement<vq_nearest_backward>(m, "vq_nearest_backward");
  implement<vq_nearest_backward>(m, "vq_nearest_backward.cpu");
  implement<vq_quantize_backward>(m, "vq_quantize_backward");
  implement<vq_quantize_backward>(m, "vq_quantize_backward.cpu");
}

}  // namespace fastzoo
