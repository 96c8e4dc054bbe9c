// Greedy suppression of one set of boxes: nms, batched_nms and suppress are one entry. Many boxes
// in segments are put in order of these first, so that a segment waits for no other.
#include <string>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/falling_order.h"
#include "runtime/kept_list.h"

namespace fastzoo::cuda {
namespace {

constexpr int kThreads = 256;

// How many blocks may wait for one another before an order by segment pays.
#if defined(FASTZOO_EMULATE)
constexpr unsigned kShortChain = 3;
#else
constexpr unsigned kShortChain = 16;
#endif

// One image's boxes by falling score.
struct Sorted {
  static constexpr bool kManyImages = false;

  int64_t n;
  const int64_t* order;
  const int64_t* ids;

  FASTZOO_DEVICE bool exists(int64_t, int64_t position) const { return position < n; }
  FASTZOO_DEVICE int64_t index(int64_t, int64_t position) const { return order[position]; }
  FASTZOO_DEVICE int64_t id(int64_t, int64_t index) const { return ids[index]; }
};

// Corners [n, 4].
template <class T>
struct AlignedBoxes : Sorted {
  using Overlap = AlignedOverlap<ComputeOf<T>>;

  const T* corners;

  FASTZOO_DEVICE typename Overlap::Box read(int64_t, int64_t index) const {
    typename Overlap::Row row;
    for (int i = 0; i < 4; ++i) row[i] = static_cast<ComputeOf<T>>(corners[4 * index + i]);
    return Overlap::box_of(row);
  }
};

// Centres, sides and angle [n, 5].
struct RotatedBoxes : Sorted {
  using Overlap = RotatedOverlap;

  const double* rows;
  bool degrees;

  FASTZOO_DEVICE math::RotatedBox read(int64_t, int64_t index) const {
    const double* row = rows + 5 * index;
    return math::rotated_box(row[0], row[1], row[2], row[3], row[4], degrees);
  }
};

template <class Boxes>
auto keep_kernel(bool gated, bool matched) {
  if (matched) return gated ? nms_keep<Boxes, true, true> : nms_keep<Boxes, false, true>;
  return gated ? nms_keep<Boxes, true, false> : nms_keep<Boxes, false, false>;
}

__global__ void __launch_bounds__(kThreads)
    nms_segments(const int64_t* order, const int64_t* ids, int64_t n, int64_t* segments) {
  const int64_t rank = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (rank < n) segments[rank] = ids[order[rank]];
}

// `places` are how many boxes are kept up to each rank. A suppressor's rank becomes its place.
__global__ void __launch_bounds__(kThreads)
    nms_collect(const int64_t* order, const int64_t* flags, const int64_t* places, int64_t n,
                int64_t* kept, int64_t* suppressors) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  if (flags[i] != 0) kept[places[i] - 1] = order[i];
  if (suppressors != nullptr) suppressors[i] = places[suppressors[i]] - 1;
}

// What suppress() works on.
struct Job {
  const Stream& stream;
  const Sorted& sorted;
  bool gated, match;
  const Tensor& kept;
  const Tensor& group;
};

template <class Boxes>
int64_t keep(const Job& job, const Boxes& boxes, const typename Boxes::Overlap& overlap) {
  const int64_t n = job.sorted.n;
  const KeptMemory<typename Boxes::Overlap> memory(job.kept, n, 1, job.gated);
  KeepTask<Boxes> task{boxes, overlap, n, memory.lists(job.kept)};
  task.group = static_cast<int64_t*>(job.group.mutable_data_ptr());
  task.tickets = memory.tickets();
  job.stream.launch("nms_keep", keep_kernel<Boxes>(job.gated, job.match), blocks_for(n, kKeepBlock),
                    kKeepBlock, task);
  const int64_t word = job.stream.read_back(reinterpret_cast<const int64_t*>(task.lists.word));
  return word & int64_t{kKeptOfWord};
}

template <class Boxes>
int64_t keep_by_segment(const Job& job, const Boxes& boxes,
                        const typename Boxes::Overlap& overlap) {
  const int64_t n = job.sorted.n;
  const unsigned blocks = blocks_for(n, kThreads);
  const auto integers = [&] { return empty(job.kept, {n}, ScalarType::Long); };
  const Tensor segments = integers();
  job.stream.launch("nms_segments", nms_segments, blocks, kThreads, job.sorted.order,
                    job.sorted.ids, n, static_cast<int64_t*>(segments.mutable_data_ptr()));
  const SortedKeys by_segment = sort_rows(segments);
  const Tensor listed = integers(), flags = integers();
  const int64_t* const flag_data = static_cast<const int64_t*>(flags.const_data_ptr());
  int64_t* const suppressors =
      job.match ? static_cast<int64_t*>(job.group.mutable_data_ptr()) : nullptr;

  const unsigned keep_blocks = blocks_for(n, kKeepBlock);
  const KeptMemory<typename Boxes::Overlap> memory(job.kept, n, keep_blocks, false);
  const SegmentTask<Boxes> task{boxes,
                                overlap,
                                n,
                                static_cast<const int64_t*>(by_segment.values.const_data_ptr()),
                                static_cast<const int64_t*>(by_segment.indices.const_data_ptr()),
                                memory.lists(listed),
                                static_cast<int64_t*>(flags.mutable_data_ptr()),
                                suppressors,
                                memory.tickets()};
  job.stream.launch("nms_keep_segments",
                    job.match ? nms_keep_segments<Boxes, true> : nms_keep_segments<Boxes, false>,
                    keep_blocks, kKeepBlock, task);
  const Tensor places = running_sum(flags);
  const int64_t* const place_data = static_cast<const int64_t*>(places.const_data_ptr());
  job.stream.launch("nms_collect", nms_collect, blocks, kThreads, job.sorted.order, flag_data,
                    place_data, n, static_cast<int64_t*>(job.kept.mutable_data_ptr()), suppressors);
  return job.stream.read_back(place_data + n - 1);
}

std::tuple<Tensor, Tensor> suppress(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                                    double iou_threshold, const std::string& overlap, bool match) {
  const bool rotated = overlap != "aligned";
  const bool degrees = overlap == "rotated_degrees";
  STD_TORCH_CHECK(!rotated || degrees || overlap == "rotated",
                  "fastzoo: suppress: overlap aligned, rotated or rotated_degrees expected, got ",
                  overlap);
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(),
                  "fastzoo: nms: fewer than 2^31 boxes expected, got ", n);
  const Tensor kept = empty(boxes, {n}, ScalarType::Long);
  const Tensor group = empty(boxes, {match ? n : 0}, ScalarType::Long);
  if (n == 0) return {kept, group};

  const Stream stream(boxes);
  const bool gated = idxs.size(0) > 0;
  const Tensor ids = torch::stable::contiguous(idxs);
  const Tensor order = falling_order(stream, scores);
  const Sorted sorted{n, static_cast<const int64_t*>(order.const_data_ptr()),
                      static_cast<const int64_t*>(ids.const_data_ptr())};
  const Job job{stream, sorted, gated, match, kept, group};
  const auto run = [&](const auto& of_type, auto threshold) {
    return gated && blocks_for(n, kKeepBlock) > kShortChain
               ? keep_by_segment(job, of_type, {threshold})
               : keep(job, of_type, {threshold});
  };

  int64_t count = 0;
  if (rotated) {
    const Tensor rows = torch::stable::contiguous(torch::stable::to(boxes, ScalarType::Double));
    const auto* data = static_cast<const double*>(rows.const_data_ptr());
    count = run(RotatedBoxes{sorted, data, degrees}, iou_threshold);
  } else {
    const Tensor rows = torch::stable::contiguous(boxes);
    dispatch_float(boxes.scalar_type(), "suppress", [&](auto type) {
      using T = decltype(type);
      const auto* data = static_cast<const T*>(rows.const_data_ptr());
      count = run(AlignedBoxes<T>{sorted, data}, math::round_down<ComputeOf<T>>(iou_threshold));
    });
  }
  Tensor whole = kept;
  return {torch::stable::narrow(whole, 0, 0, count), group};
}

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                   double iou_threshold) {
  return std::get<0>(suppress(boxes, scores, idxs, iou_threshold, "aligned", false));
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  const Tensor no_segments = empty(boxes, {0}, ScalarType::Long);
  return batched_nms(boxes, scores, no_segments, iou_threshold);
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::nms>(m, "nms.cuda");
  fastzoo::implement<fastzoo::cuda::batched_nms>(m, "batched_nms.cuda");
  fastzoo::implement<fastzoo::cuda::suppress>(m, "suppress.cuda");
}
