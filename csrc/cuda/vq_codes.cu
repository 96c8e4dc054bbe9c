// Statistics by code: how many rows have it, and their sum. Rows are brought into order of their
// code by a stable sort, so that a code's rows are a segment, in rising order.
//   vq_sum_parts  parts of kPart positions that lie within one segment: long segments share out
//   vq_sum_codes  a code's parts, and the rows before and after them
#include <algorithm>
#include <limits>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/rows.h"
#include "runtime/sorted.h"

namespace fastzoo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPart = 128;

// Rows by position in the order of their codes. A thread has one dimension of one item of a block:
// `width` neighbouring threads have an item, and the grid's y goes over the rest of the dimensions.
template <class T>
struct SortedRows {
  const T* x;
  const int32_t* codes;  // by position, rising
  const int64_t* order;  // by position: the row
  int64_t count, dims;
  int width;

  FASTZOO_DEVICE int64_t item() const {
    return int64_t{blockIdx.x} * (kThreads / width) + static_cast<int>(threadIdx.x) / width;
  }
  FASTZOO_DEVICE int64_t dimension() const {
    return int64_t{blockIdx.y} * width + static_cast<int>(threadIdx.x) % width;
  }

  FASTZOO_DEVICE void add(int64_t begin, int64_t end, int64_t d, double& sum) const {
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i) {
      sum += static_cast<double>(static_cast<ComputeOf<T>>(x[order[i] * dims + d]));
    }
  }
};

// partial [parts, dims]; parts of several codes are left as they are.
template <class T>
__global__ void __launch_bounds__(kThreads) vq_sum_parts(SortedRows<T> rows, double* partial) {
  const int64_t begin = rows.item() * kPart;
  const int64_t end = begin + kPart;
  const int64_t d = rows.dimension();
  if (end > rows.count || d >= rows.dims || rows.codes[begin] != rows.codes[end - 1]) return;
  double sum = 0;
  rows.add(begin, end, d, sum);
  partial[rows.item() * rows.dims + d] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    vq_sum_codes(SortedRows<T> rows, const double* partial, int64_t codes, ComputeOf<T>* counts,
                 ComputeOf<T>* sums) {
  using C = ComputeOf<T>;
  const int64_t code = rows.item();
  const int64_t d = rows.dimension();
  if (code >= codes || d >= rows.dims) return;
  const int64_t begin = first_of_segment(rows.codes, 0, rows.count, code);
  const int64_t end = first_of_segment(rows.codes, begin, rows.count, code + 1);
  if (d == 0) counts[code] = static_cast<C>(end - begin);

  const int64_t first_part = (begin + kPart - 1) / kPart;
  const int64_t parts_end = end / kPart;
  double sum = 0;
  rows.add(begin, first_part * kPart < end ? first_part * kPart : end, d, sum);
#pragma unroll 4
  for (int64_t part = first_part; part < parts_end; ++part) sum += partial[part * rows.dims + d];
  if (first_part <= parts_end) rows.add(parts_end * kPart, end, d, sum);
  sums[code * rows.dims + d] = static_cast<C>(sum);
}

std::tuple<Tensor, Tensor> vq_statistics(const Tensor& x, const Tensor& indices, int64_t codes) {
  STD_TORCH_CHECK(codes < std::numeric_limits<int32_t>::max(),
                  "fastzoo: vq_statistics: fewer than 2^31 codes expected, got ", codes);
  const int64_t count = x.size(0);
  const int64_t dims = x.size(1);
  const ScalarType compute = compute_dtype(x.scalar_type());
  const Tensor counts = empty(x, {codes}, compute);
  const Tensor sums = empty(x, {codes, dims}, compute);
  if (codes == 0 || dims == 0) return {counts, sums};

  const Stream stream(x);
  const Tensor values = torch::stable::contiguous(x);
  const SortedKeys sorted = sort_rows(torch::stable::to(indices, ScalarType::Int));
  const Tensor partial = empty(x, {count / kPart, dims}, ScalarType::Double);
  int width = 1;
  while (width < dims && width < kThreads) width *= 2;
  dispatch_float(x.scalar_type(), "vq_statistics", [&](auto type) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    const SortedRows<T> rows{static_cast<const T*>(values.const_data_ptr()),
                             static_cast<const int32_t*>(sorted.values.const_data_ptr()),
                             static_cast<const int64_t*>(sorted.indices.const_data_ptr()),
                             count,
                             dims,
                             width};
    double* partial_data = static_cast<double*>(partial.mutable_data_ptr());
    const auto grid = [&](int64_t items) {
      return dim3(blocks_for(items, kThreads / width), blocks_for(dims, width));
    };
    if (count >= kPart) {
      stream.launch("vq_sum_parts", vq_sum_parts<T>, grid(count / kPart), kThreads, rows,
                    partial_data);
    }
    stream.launch("vq_sum_codes", vq_sum_codes<T>, grid(codes), kThreads, rows, partial_data, codes,
                  static_cast<C*>(counts.mutable_data_ptr()),
                  static_cast<C*>(sums.mutable_data_ptr()));
  });
  return {counts, sums};
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::vq_statistics>(m, "vq_statistics.cuda");
}
