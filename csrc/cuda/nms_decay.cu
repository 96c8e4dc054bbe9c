// Suppression that lowers scores. Boxes stand in memory segment after segment, each by falling
// score, so that a segment is a range and its end holds what cannot be kept. Both rules leave the
// scores as they end up; those above the threshold are sorted once more.
#include <string>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/falling_order.h"

namespace fastzoo::cuda {
namespace {

using math::Box;
using math::Decay;

template <class C>
using Corners = Vector<C, 4>;

template <class C>
FASTZOO_DEVICE Box<C> box_of(const Corners<C>& c) {
  return {c[0], c[1], c[2], c[3], math::box_area(c[0], c[1], c[2], c[3])};
}

constexpr int kEachThreads = 256;  // of kernels with a thread for each box

__global__ void __launch_bounds__(kEachThreads)
    decay_pick(const int64_t* values, const int64_t* order, int64_t n, int64_t* picked) {
  const int64_t i = int64_t{blockIdx.x} * kEachThreads + threadIdx.x;
  if (i < n) picked[i] = values[order[i]];
}

// The boxes as both rules read them, and their segments. C: the type that decides.
template <class C>
struct Sorted {
  int64_t n;
  int64_t* order;   // [n]
  C* corners;       // [n, 4]
  C* scores;        // [n]
  int32_t* begins;  // [n] where the segment of a box begins
  int32_t* ends;    // [n]
  C* lowered;       // [n] in the order given: scores in the end, NaN where not kept
};

// How many of the rising ids lie below one, or not above it.
template <bool kNotAbove>
FASTZOO_DEVICE int64_t count_below(const int64_t* ids, int64_t n, int64_t id) {
  int64_t low = 0;
  int64_t high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ids[middle] < id || (kNotAbove && ids[middle] == id)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
__global__ void __launch_bounds__(kEachThreads)
    decay_gather(const T* boxes, const T* scores, const int64_t* ids, Sorted<ComputeOf<T>> sorted) {
  using C = ComputeOf<T>;
  const int64_t i = int64_t{blockIdx.x} * kEachThreads + threadIdx.x;
  if (i >= sorted.n) return;
  const int64_t index = sorted.order[i];
  Corners<C> corners;
  for (int k = 0; k < 4; ++k) corners[k] = static_cast<C>(boxes[4 * index + k]);
  store_vector(sorted.corners + 4 * i, corners);
  sorted.scores[i] = static_cast<C>(scores[index]);
  sorted.lowered[i] = static_cast<C>(NAN);
  const bool gated = ids != nullptr;
  sorted.begins[i] = gated ? static_cast<int32_t>(count_below<false>(ids, sorted.n, ids[i])) : 0;
  sorted.ends[i] =
      static_cast<int32_t>(gated ? count_below<true>(ids, sorted.n, ids[i]) : sorted.n);
}

struct SoftRule {
  Decay method;
  double iou_threshold, sigma, score_threshold;
  int64_t most;  // at most so many are taken of a segment
};

constexpr int kSoftThreads = 512;
constexpr int kSoftWarps = kSoftThreads / kWarpSize;
constexpr int kSoftShare = 128;  // of the positions: a block takes the segments that begin there

// A candidate to be taken next: of the highest score the lowest index. The tag is the index and,
// below it, the place. A score of 0 stands for none.
template <class C>
struct Candidate {
  C score;
  uint64_t tag;

  FASTZOO_DEVICE bool is_better(const Candidate& other) const {
    return score > other.score || (score == other.score && tag < other.tag);
  }
};

template <class C>
FASTZOO_DEVICE Candidate<C> warp_best(Candidate<C> mine) {
#pragma unroll
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
    const Candidate<C> other{shuffle_xor(mine.score, flip), shuffle_xor(mine.tag, flip)};
    if (other.is_better(mine)) mine = other;
  }
  return mine;
}

// A block takes the boxes of a segment one after another. A thread holds every kSoftThreads-th
// place of it, and fills the place of a box that is taken or lost with the last that it holds.
template <class C>
__global__ void __launch_bounds__(kSoftThreads) soft_nms_take(Sorted<C> sorted, SoftRule rule) {
  // Two of each, in turn: one is written while another warp may still read the one before.
  __shared__ SharedArray<C, 2 * kSoftWarps> warp_scores;
  __shared__ SharedArray<uint64_t, 2 * kSoftWarps> warp_tags;
  __shared__ SharedArray<C, 2 * 4 * kSoftWarps> warp_corners;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const C iou_threshold = math::round_down<C>(rule.iou_threshold);
  // Only a threshold below 0 is exceeded by boxes that do not meet.
  const bool touching = rule.method != Decay::hard || !(iou_threshold < 0);

  const int64_t share = int64_t{blockIdx.x} * kSoftShare;
  const int64_t share_end = share + kSoftShare < sorted.n ? share + kSoftShare : sorted.n;
  int64_t begin = sorted.begins[share] == share ? share : int64_t{sorted.ends[share]};
  int turn = 0;
  while (begin < share_end) {
    const int64_t end = sorted.ends[begin];
    // Those not above the threshold are at the end of the segment, and so of what a thread holds.
    int64_t held_end = begin + thread;
    while (held_end < end && sorted.scores[held_end] > rule.score_threshold) {
      held_end += kSoftThreads;
    }
    Corners<C> taken_corners{};
    int64_t taken_place = -1;
    for (int64_t taken = 0; taken < rule.most; ++taken) {
      const Box<C> last_taken = box_of(taken_corners);
      Candidate<C> best{0, ~uint64_t{0}};
      for (int64_t place = begin + thread; place < held_end;) {
        C score = sorted.scores[place];
        bool lost = place == taken_place;
        if (taken > 0 && !lost) {
          const Box<C> own = box_of(load_vector<4>(sorted.corners + 4 * place));
          const C intersection = math::box_intersection(last_taken, own);
          if (intersection > 0 || !touching) {
            const C iou = intersection / math::box_union(last_taken, own, intersection);
            score = score * math::soft_decay(iou, rule.method, iou_threshold, rule.sigma);
            lost = !(score > rule.score_threshold);
            sorted.scores[place] = score;
          }
        }
        if (lost) {
          held_end -= kSoftThreads;
          sorted.scores[place] = sorted.scores[held_end];
          sorted.order[place] = sorted.order[held_end];
          store_vector(sorted.corners + 4 * place, load_vector<4>(sorted.corners + 4 * held_end));
          if (place == taken_place) {
            taken_place = -1;
          } else if (held_end == taken_place) {
            taken_place = place;
          }
          continue;
        }
        const uint64_t index = static_cast<uint64_t>(sorted.order[place]);
        const Candidate<C> mine{score, index << 32 | static_cast<uint64_t>(place)};
        if (mine.is_better(best)) best = mine;
        place += kSoftThreads;
      }
      // One barrier a turn: each warp leaves its best, and all warps choose among these alike.
      const Candidate<C> of_warp = warp_best(best);
      const int now = turn * kSoftWarps;
      turn ^= 1;
      const int own = now + warp;
      if (of_warp.score > 0 ? best.tag == of_warp.tag : lane == 0) {
        warp_scores[own] = of_warp.score;
        warp_tags[own] = of_warp.tag;
        if (of_warp.score > 0) {
          const int64_t place = static_cast<int64_t>(best.tag & 0xffffffffu);
          warp_corners.store(4 * own, load_vector<4>(sorted.corners + 4 * place));
        }
      }
      sync_block();
      const int other = now + lane % kSoftWarps;
      const Candidate<C> chosen = warp_best(Candidate<C>{warp_scores[other], warp_tags[other]});
      if (!(chosen.score > 0)) break;
      taken_place = static_cast<int64_t>(chosen.tag & 0xffffffffu);
      const int owner = static_cast<int>((taken_place - begin) % kSoftThreads) / kWarpSize;
      taken_corners = warp_corners.template load<4>(4 * (now + owner));
      if (thread == 0) sorted.lowered[chosen.tag >> 32] = chosen.score;
    }
    begin = end;
  }
}

constexpr int kMatrixBlock = 128;

// What the passes of matrix NMS hold of a box, as bits that only rise from 0, in any order: the
// largest overlap with an earlier box, and the least that an earlier one lowers it to.
template <class C>
using CoverBits = std::conditional_t<std::is_same_v<C, double>, uint64_t, uint32_t>;

struct MatrixRule {
  Decay method;
  double sigma;
};

// Of the gaussian method the exponent, at most 0; of the linear one the decay, from 0 to 1.
FASTZOO_DEVICE uint64_t decay_bits(double least, Decay method) {
  return method == Decay::gaussian ? math::bits_as<uint64_t>(0 - least)
                                   : ~math::bits_as<uint64_t>(least);
}
FASTZOO_DEVICE double decay_of_bits(uint64_t bits, Decay method) {
  if (bits == 0) return 1;
  return method == Decay::gaussian ? math::exact_exponential(-math::bits_as<double>(bits))
                                   : math::bits_as<double>(~bits);
}

// A block goes over kMatrixBlock boxes and, tile by tile, those before them; blocks of the same
// boxes share the tiles. First for how much a box is covered (kDecay false), then for its decay:
// an earlier box lowers a score only where it overlaps more than it is covered itself.
template <class C, bool kDecay>
__global__ void __launch_bounds__(kMatrixBlock)
    matrix_nms_pass(Sorted<C> sorted, MatrixRule rule, CoverBits<C>* covers, uint64_t* decays) {
  __shared__ SharedArray<C, 4 * kMatrixBlock> corners;
  __shared__ SharedArray<C, kMatrixBlock> areas;
  __shared__ SharedArray<C, kMatrixBlock> limits;
  const int thread = threadIdx.x;
  // The last boxes have the most before them: they come first.
  const int64_t block = int64_t{gridDim.x} - 1 - blockIdx.x;
  const int64_t row = block * kMatrixBlock + thread;
  Box<C> own{};
  int64_t begin = row;
  if (row < sorted.n) {
    own = box_of(load_vector<4>(sorted.corners + 4 * row));
    begin = sorted.begins[row];
  }
  C cover = 0;
  double least = rule.method == Decay::gaussian ? 0 : 1;
  const int64_t first = sorted.begins[block * kMatrixBlock] / kMatrixBlock;
  for (int64_t tile = first + blockIdx.y; tile <= block; tile += gridDim.y) {
    const int64_t start = tile * kMatrixBlock;
    sync_block();
    if (start + thread < sorted.n) {
      const Corners<C> staged = load_vector<4>(sorted.corners + 4 * (start + thread));
      corners.store(4 * thread, staged);
      areas[thread] = box_of(staged).area;
      if (kDecay) limits[thread] = math::bits_as<C>(covers[start + thread]);
    }
    sync_block();
    const int low = begin > start ? static_cast<int>(begin - start) : 0;
    const int high = row - start < kMatrixBlock ? static_cast<int>(row - start) : kMatrixBlock;
    for (int i = low; i < high; ++i) {
      const Corners<C> c = corners.template load<4>(4 * i);
      const Box<C> other{c[0], c[1], c[2], c[3], areas[i]};
      const C intersection = math::box_intersection(other, own);
      if (!(intersection > 0)) continue;
      const C iou = intersection / math::box_union(other, own, intersection);
      if (!kDecay) {
        cover = math::maximum(cover, iou);
      } else if (iou > limits[i]) {
        least = math::minimum(least, math::matrix_decay(iou, limits[i], rule.method, rule.sigma));
      }
    }
  }
  if (row >= sorted.n) return;
  if (!kDecay) {
    if (cover > 0) atomic_max(covers + row, math::bits_as<CoverBits<C>>(cover));
  } else if (least < (rule.method == Decay::gaussian ? 0 : 1)) {
    atomic_max(decays + row, decay_bits(least, rule.method));
  }
}

template <class C>
__global__ void __launch_bounds__(kEachThreads)
    matrix_nms_lower(Sorted<C> sorted, MatrixRule rule, const uint64_t* decays) {
  const int64_t i = int64_t{blockIdx.x} * kEachThreads + threadIdx.x;
  if (i >= sorted.n) return;
  const C decay = static_cast<C>(decay_of_bits(decays[i], rule.method));
  sorted.lowered[sorted.order[i]] = sorted.scores[i] * decay;
}

// The scores in their order, and how many of them are above the threshold: these are in front.
template <class C>
__global__ void __launch_bounds__(kEachThreads)
    decay_finish(const C* lowered, const int64_t* order, int64_t n, double score_threshold,
                 C* scores, int64_t* count) {
  const int64_t i = int64_t{blockIdx.x} * kEachThreads + threadIdx.x;
  if (i >= n) return;
  const C score = lowered[order[i]];
  scores[i] = score;
  if (score > score_threshold && (i + 1 == n || !(lowered[order[i + 1]] > score_threshold))) {
    *count = i + 1;
  }
}

Decay decay_of(const std::string& method, const char* op) {
  Decay decay;
  STD_TORCH_CHECK(math::decay_named(method.c_str(), decay), "fastzoo: ", op, ": unknown method ",
                  method);
  return decay;
}

int64_t at_most(int64_t max_detections) {
  return max_detections < 0 ? std::numeric_limits<int64_t>::max() : max_detections;
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Sorts, has lower(stream, Sorted<C>{...}) lower the scores, and gives the boxes that are left.
template <class Lower>
std::tuple<Tensor, Tensor> decayed(const char* op, const Tensor& boxes, const Tensor& scores,
                                   const Tensor& idxs, double score_threshold,
                                   int64_t max_detections, const Lower& lower) {
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "fastzoo: ", op,
                  ": fewer than 2^31 boxes expected, got ", n);
  const ScalarType dtype = compute_dtype(boxes.scalar_type());
  const Tensor final_scores = empty(boxes, {n}, dtype);
  if (n == 0) return {empty(boxes, {0}, ScalarType::Long), final_scores};

  const Stream stream(boxes);
  const Tensor rows = torch::stable::contiguous(boxes);
  const Tensor values = torch::stable::contiguous(scores);
  const unsigned blocks = blocks_for(n, kEachThreads);
  const auto pick = [&](const Tensor& from, const Tensor& order) {
    const Tensor picked = empty(boxes, {n}, ScalarType::Long);
    stream.launch("decay_pick", decay_pick, blocks, kEachThreads,
                  static_cast<const int64_t*>(from.const_data_ptr()),
                  static_cast<const int64_t*>(order.const_data_ptr()), n, data_of<int64_t>(picked));
    return picked;
  };
  Tensor order = falling_order(stream, scores);
  Tensor ids;
  const bool gated = idxs.size(0) > 0;
  if (gated) {
    const auto by_segment = sort_rows(pick(torch::stable::contiguous(idxs), order));
    order = pick(order, by_segment.indices);
    ids = by_segment.values;
  }

  const Tensor corners = empty(boxes, {n, 4}, dtype);
  const Tensor sorted_scores = empty(boxes, {n}, dtype);
  const Tensor lowered = empty(boxes, {n}, dtype);
  const Tensor begins = empty(boxes, {2, n}, ScalarType::Int);
  const Tensor count = torch::stable::new_zeros(boxes, {1}, ScalarType::Long);
  Tensor final_order;
  dispatch_float(boxes.scalar_type(), op, [&](auto type) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    const Sorted<C> sorted{n,
                           data_of<int64_t>(order),
                           data_of<C>(corners),
                           data_of<C>(sorted_scores),
                           data_of<int32_t>(begins),
                           data_of<int32_t>(begins) + n,
                           data_of<C>(lowered)};
    stream.launch("decay_gather", decay_gather<T>, blocks, kEachThreads,
                  static_cast<const T*>(rows.const_data_ptr()),
                  static_cast<const T*>(values.const_data_ptr()),
                  gated ? static_cast<const int64_t*>(ids.const_data_ptr()) : nullptr, sorted);
    lower(stream, sorted, gated);
    final_order = falling_order(stream, lowered);
    stream.launch("decay_finish", decay_finish<C>, blocks, kEachThreads,
                  static_cast<const C*>(lowered.const_data_ptr()),
                  static_cast<const int64_t*>(final_order.const_data_ptr()), n, score_threshold,
                  data_of<C>(final_scores), data_of<int64_t>(count));
  });
  const int64_t left = stream.read_back(static_cast<const int64_t*>(count.const_data_ptr()));
  const int64_t most = at_most(max_detections);
  const int64_t kept = left < most ? left : most;
  Tensor all_scores = final_scores;
  return {torch::stable::narrow(final_order, 0, 0, kept),
          torch::stable::narrow(all_scores, 0, 0, kept)};
}

// Segments do not meet, so each is a sequence of its own. Scores fall along it, and of equal ones
// the lower index comes first: the order of falling scores is the sequence of them all.
std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                                    std::string method, double iou_threshold, double sigma,
                                    double score_threshold, int64_t max_detections) {
  const SoftRule rule{decay_of(method, "soft_nms"), iou_threshold, sigma, score_threshold,
                      at_most(max_detections)};
  return decayed("soft_nms", boxes, scores, idxs, score_threshold, max_detections,
                 [&](const Stream& stream, const auto& sorted, bool gated) {
                   using C = std::remove_pointer_t<decltype(sorted.scores)>;
                   const unsigned blocks = gated ? blocks_for(sorted.n, kSoftShare) : 1;
                   stream.launch("soft_nms_take", soft_nms_take<C>, blocks, kSoftThreads, sorted,
                                 rule);
                 });
}

std::tuple<Tensor, Tensor> matrix_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                                      std::string method, double sigma, double score_threshold,
                                      int64_t max_detections) {
  const MatrixRule rule{decay_of(method, "matrix_nms"), sigma};
  return decayed(
      "matrix_nms", boxes, scores, idxs, score_threshold, max_detections,
      [&](const Stream& stream, const auto& sorted, bool) {
        using C = std::remove_pointer_t<decltype(sorted.scores)>;
        const int64_t n = sorted.n;
        const Tensor bits = torch::stable::new_zeros(boxes, {2, n}, ScalarType::Long);
        CoverBits<C>* const covers = reinterpret_cast<CoverBits<C>*>(data_of<int64_t>(bits));
        uint64_t* const decays = reinterpret_cast<uint64_t*>(data_of<int64_t>(bits) + n);
        const unsigned rows = blocks_for(n, kMatrixBlock);
        // Enough blocks to keep the device busy, each with a tile or more.
        const unsigned wanted = (4 * kManyBlocks + rows - 1) / rows;
        const dim3 grid(rows, wanted < rows ? wanted : rows);
        stream.launch("matrix_nms_cover", matrix_nms_pass<C, false>, grid, kMatrixBlock, sorted,
                      rule, covers, decays);
        stream.launch("matrix_nms_decay", matrix_nms_pass<C, true>, grid, kMatrixBlock, sorted,
                      rule, covers, decays);
        stream.launch("matrix_nms_lower", matrix_nms_lower<C>, blocks_for(n, kEachThreads),
                      kEachThreads, sorted, rule, static_cast<const uint64_t*>(decays));
      });
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::soft_nms>(m, "soft_nms.cuda");
  fastzoo::implement<fastzoo::cuda::matrix_nms>(m, "matrix_nms.cuda");
}
