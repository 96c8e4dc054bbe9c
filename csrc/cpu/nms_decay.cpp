#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../torch_abi.h"
#include "kernels/nms_decay.h"
#include "runtime/segments.h"

namespace fastzoo::cpu {
namespace {

constexpr int64_t kOverlapsWorthAThread = 1 << 18;

void run(const SoftNmsArgs<float>& args) { FASTZOO_SELECT_KERNEL(soft_nms_float)(args); }
void run(const SoftNmsArgs<double>& args) { FASTZOO_SELECT_KERNEL(soft_nms_double)(args); }

auto cover_kernel(float) { return FASTZOO_SELECT_KERNEL(matrix_nms_cover_float); }
auto cover_kernel(double) { return FASTZOO_SELECT_KERNEL(matrix_nms_cover_double); }
auto decay_kernel(float) { return FASTZOO_SELECT_KERNEL(matrix_nms_decay_float); }
auto decay_kernel(double) { return FASTZOO_SELECT_KERNEL(matrix_nms_decay_double); }

math::Decay decay_of(const std::string& method, const char* op) {
  math::Decay decay;
  STD_TORCH_CHECK(math::decay_named(method.c_str(), decay), op, ": unknown method ", method);
  return decay;
}

// Four columns for n boxes, each at a multiple of a vector's size.
Tensor column_memory(const Tensor& like, int64_t n) {
  const int64_t room = (n + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
  return empty(like, {4, room}, compute_dtype(like.scalar_type()));
}

template <class T>
BoxColumns<T> columns_in(const Tensor& memory, int64_t begin = 0) {
  T* const first = static_cast<T*>(memory.mutable_data_ptr()) + begin;
  const int64_t room = memory.size(1);
  return {first, first + room, first + 2 * room, first + 3 * room};
}

// Runs a kernel over all rows. Later rows have more boxes before them: each piece of work is a
// tile and the one as far from the other end.
template <class Kernel, class T>
void over_rows(Kernel* kernel, const MatrixNmsArgs<T>& args) {
  constexpr int64_t kRows = 64;
  const int64_t tiles = (args.n + kRows - 1) / kRows;
  const auto run_tile = [&](int64_t tile) {
    kernel(args, tile * kRows, std::min((tile + 1) * kRows, args.n));
  };
  const int64_t grain = 1 + kOverlapsWorthAThread / (kRows * (args.n + 1));
  torch::stable::parallel_for(0, (tiles + 1) / 2, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      run_tile(tile);
      if (tiles - 1 - tile != tile) run_tile(tiles - 1 - tile);
    }
  });
}

template <class T, class Element>
void gather(const Element* rows, const std::vector<int32_t>& boxes, const BoxColumns<T>& columns) {
  for (size_t i = 0; i < boxes.size(); ++i) {
    const Element* const row = rows + 4 * static_cast<int64_t>(boxes[i]);
    columns.x1[i] = static_cast<T>(row[0]);
    columns.y1[i] = static_cast<T>(row[1]);
    columns.x2[i] = static_cast<T>(row[2]);
    columns.y2[i] = static_cast<T>(row[3]);
  }
}

using Kept = std::tuple<Tensor, Tensor>;

// The boxes whose lowered score is above the threshold, by that score.
template <class T>
Kept best_of(const Tensor& boxes, const std::vector<T>& lowered, double score_threshold,
             int64_t most) {
  const int64_t n = static_cast<int64_t>(lowered.size());
  const std::vector<int32_t> order = order_by_falling_score<T>(lowered.data(), n);
  const int64_t kept =
      std::partition_point(order.begin(), order.begin() + std::min(n, most),
                           [&](int32_t i) { return lowered[i] > score_threshold; }) -
      order.begin();
  const Tensor keep = empty(boxes, {kept}, ScalarType::Long);
  const Tensor scores = empty(boxes, {kept}, compute_dtype(boxes.scalar_type()));
  int64_t* const to_keep = static_cast<int64_t*>(keep.mutable_data_ptr());
  T* const to_scores = static_cast<T*>(scores.mutable_data_ptr());
  for (int64_t i = 0; i < kept; ++i) {
    to_keep[i] = order[i];
    to_scores[i] = lowered[order[i]];
  }
  return {keep, scores};
}

int64_t at_most(int64_t max_detections) {
  return max_detections < 0 ? std::numeric_limits<int64_t>::max() : max_detections;
}

// What both rules are handed: the dense inputs, in the types of the boxes and of the computation.
template <class Body>
Kept with_types(const char* op, const Tensor& boxes, const Tensor& scores, const Body& body) {
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(n < int64_t{1} << 31, op, ": fewer than 2^31 boxes needed, got ", n);
  const Tensor rows = torch::stable::contiguous(boxes);
  const Tensor values = torch::stable::contiguous(scores);
  Kept result;
  dispatch_float(boxes.scalar_type(), op, [&](auto element) {
    using Element = decltype(element);
    using T = std::conditional_t<std::is_same_v<Element, double>, double, float>;
    result = body(T{}, static_cast<const Element*>(rows.const_data_ptr()),
                  static_cast<const Element*>(values.const_data_ptr()));
  });
  return result;
}

// The boxes whose score could be above the threshold in the end, those of a segment together and
// by falling score. A decay lies between 0 and 1: a score that is not above a threshold of at
// least 0 stays so.
template <class T, class Element>
Segments candidates(const Element* scores, const Tensor& idxs, int64_t n, double score_threshold) {
  std::vector<int32_t> order = order_by_falling_score<T>(scores, n);
  const double least =
      score_threshold >= 0 ? score_threshold : -std::numeric_limits<double>::infinity();
  const auto end = std::partition_point(
      order.begin(), order.end(), [&](int32_t i) { return static_cast<T>(scores[i]) > least; });
  order.erase(end, order.end());
  const Tensor ids = torch::stable::contiguous(idxs);
  return segments_of(std::move(order), idxs.size(0) == 0
                                           ? nullptr
                                           : static_cast<const int64_t*>(ids.const_data_ptr()));
}

// Segments do not meet, so each is a sequence of its own. Scores fall along it, and of equal ones
// the lower index comes first: the order of falling scores is the sequence of them all.
Kept soft_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, std::string method,
              double iou_threshold, double sigma, double score_threshold, int64_t max_detections) {
  return with_types("soft_nms", boxes, scores, [&](auto type, auto* rows, auto* values) {
    using T = decltype(type);
    const Segments segments = candidates<T>(values, idxs, boxes.size(0), score_threshold);
    const Tensor columns = column_memory(boxes, segments.size());
    gather(rows, segments.boxes, columns_in<T>(columns));
    std::vector<T> taken_at(segments.size());
    for (int64_t i = 0; i < segments.size(); ++i) {
      taken_at[i] = static_cast<T>(values[segments.boxes[i]]);
    }
    torch::stable::parallel_for(0, segments.count(), 1, [&](int64_t first, int64_t last) {
      for (int64_t segment = first; segment < last; ++segment) {
        const int64_t begin = segments.begins[segment];
        const int64_t n = segments.begins[segment + 1] - begin;
        const Tensor taken = column_memory(boxes, n);
        const Tensor waiting = column_memory(boxes, n);
        std::vector<T> waiting_scores(waiting.size(1));
        std::vector<int32_t> waiting_positions(n);
        SoftNmsArgs<T> args;
        args.boxes = columns_in<T>(columns, begin);
        args.indices = segments.boxes.data() + begin;
        args.scores = taken_at.data() + begin;
        args.n = n;
        args.most = at_most(max_detections);
        args.method = decay_of(method, "soft_nms");
        args.iou_threshold = math::round_down<T>(iou_threshold);
        args.sigma = sigma;
        args.score_threshold = score_threshold;
        args.taken = columns_in<T>(taken);
        args.waiting = columns_in<T>(waiting);
        args.waiting_scores = waiting_scores.data();
        args.waiting_positions = waiting_positions.data();
        run(args);
      }
    });
    std::vector<T> lowered(boxes.size(0), std::numeric_limits<T>::quiet_NaN());
    for (int64_t i = 0; i < segments.size(); ++i) lowered[segments.boxes[i]] = taken_at[i];
    return best_of(boxes, lowered, score_threshold, at_most(max_detections));
  });
}

Kept matrix_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, std::string method,
                double sigma, double score_threshold, int64_t max_detections) {
  return with_types("matrix_nms", boxes, scores, [&](auto type, auto* rows, auto* values) {
    using T = decltype(type);
    const Segments segments = candidates<T>(values, idxs, boxes.size(0), score_threshold);
    const int64_t count = segments.size();
    const Tensor columns = column_memory(boxes, count);
    gather(rows, segments.boxes, columns_in<T>(columns));
    std::vector<int32_t> begin_of(count);
    for (int64_t segment = 0; segment < segments.count(); ++segment) {
      const int64_t begin = segments.begins[segment];
      std::fill(begin_of.begin() + begin, begin_of.begin() + segments.begins[segment + 1],
                static_cast<int32_t>(begin));
    }
    std::vector<T> covered(columns.size(1));
    std::vector<double> decays(count);
    MatrixNmsArgs<T> args;
    args.boxes = columns_in<T>(columns);
    args.segments = begin_of.data();
    args.covered = covered.data();
    args.decays = decays.data();
    args.n = count;
    args.method = decay_of(method, "matrix_nms");
    args.sigma = sigma;
    over_rows(cover_kernel(T{}), args);
    over_rows(decay_kernel(T{}), args);
    std::vector<T> lowered(boxes.size(0), std::numeric_limits<T>::quiet_NaN());
    for (int64_t i = 0; i < count; ++i) {
      const int32_t box = segments.boxes[i];
      lowered[box] = static_cast<T>(values[box]) * static_cast<T>(decays[i]);
    }
    return best_of(boxes, lowered, score_threshold, at_most(max_detections));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<soft_nms>(m, "soft_nms");
  implement<soft_nms>(m, "soft_nms.cpu");
  implement<matrix_nms>(m, "matrix_nms");
  implement<matrix_nms>(m, "matrix_nms.cpu");
}

}  // namespace fastzoo::cpu
