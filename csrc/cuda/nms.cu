// Non-maximum suppression without an n x n mask: the kept list grows. A block owns kBlock boxes
// in falling order of score. It tests them against the kept list as earlier blocks extend it;
// when the last of these is done it settles its own boxes and appends what it keeps.
#include "../math/nms.h"

#include "../torch_abi.h"
#include "runtime/falling_order.h"

namespace fastzoo::cuda {
namespace {

using math::Box;

constexpr int kBlock = 128;
constexpr int kWords = kBlock / 32;  // of a bit for each box of a block

// The corners of a box as one row of memory.
template <class C>
using Corners = Vector<C, 4>;

template <class C>
FASTZOO_DEVICE Box<C> box_of(const Corners<C>& c) {
  return {c[0], c[1], c[2], c[3], math::box_area(c[0], c[1], c[2], c[3])};
}

// What the blocks tell one another, in memory that starts as zero.
struct Progress {
  uint64_t done_and_kept;  // blocks done << 32 | boxes kept
  uint64_t tickets;        // taken so far
};

// Boxes of a block in shared memory.
template <class C>
struct Stage {
  SharedArray<C, 4 * kBlock> corners;
  SharedArray<C, kBlock> areas;

  FASTZOO_DEVICE void put(int i, const Box<C>& box) {
    corners.store(4 * i, Corners<C>{{box.x1, box.y1, box.x2, box.y2}});
    areas[i] = box.area;
  }
  FASTZOO_DEVICE Box<C> get(int i) {
    const Corners<C> c = corners.template load<4>(4 * i);
    return {c[0], c[1], c[2], c[3], areas[i]};
  }
};

// T: the boxes' type, C: the type that decides. Blocks take their place in the order from a
// ticket, so that a block only waits for blocks that already run.
template <class T, class C>
__global__ void __launch_bounds__(kBlock)
    nms_keep(const T* boxes, const int64_t* order, int64_t n, C threshold, C* kept_corners,
             int64_t* kept, Progress* progress) {
  __shared__ Stage<C> stage;
  __shared__ SharedArray<uint64_t, 1> announced;
  __shared__ SharedArray<uint32_t, kWords> undecided_words;
  __shared__ SharedArray<uint32_t, kWords> kept_words;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;

  if (thread == 0) announced[0] = atomic_add(&progress->tickets, uint64_t{1});
  sync_block();
  const uint64_t ticket = announced[0];
  const int64_t position = static_cast<int64_t>(ticket) * kBlock + thread;
  int64_t index = 0;
  Box<C> own{};
  bool undecided = position < n;
  if (undecided) {
    index = order[position];
    Corners<C> c;
    for (int i = 0; i < 4; ++i) c[i] = static_cast<C>(boxes[4 * index + i]);
    own = box_of(c);
  }

  // Which earlier boxes of this block overlap mine.
  stage.put(thread, own);
  sync_block();
  uint32_t overlaps[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    overlaps[w] = 0;
    if (w > warp) continue;
    for (int i = 0; i < kWarpSize; ++i) {
      const int other = w * kWarpSize + i;
      const bool overlap = math::box_iou(stage.get(other), own) > threshold;
      overlaps[w] |= static_cast<uint32_t>(overlap && other < thread) << i;
    }
  }

  // Test against the kept list until all earlier blocks are done with it.
  uint64_t tested = 0;
  for (bool my_turn = false; !my_turn;) {
    sync_block();
    if (thread == 0) {
      uint64_t now = load_volatile(&progress->done_and_kept);
      while (now >> 32 != ticket && (now & 0xffffffff) == tested) {
        wait_for_other_block();
        now = load_volatile(&progress->done_and_kept);
      }
      thread_fence();  // what the list holds is read after the word that announced it
      announced[0] = now;
    }
    sync_block();
    const uint64_t now = announced[0];
    my_turn = now >> 32 == ticket;
    const uint64_t total = now & 0xffffffff;
    for (; tested < total; tested += kBlock) {
      const int count = static_cast<int>(total - tested < kBlock ? total - tested : kBlock);
      if (thread < count) {
        stage.put(thread, box_of(load_vector<4>(kept_corners + 4 * (tested + thread))));
      }
      sync_block();
      if (any(undecided)) {
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
          if (math::box_iou(stage.get(i), own) > threshold) undecided = false;
        }
      }
      sync_block();
    }
    tested = total;
  }

  // Settle this block's boxes, all at once: one is dropped when an earlier one that overlaps it
  // is kept, and kept when all of those are dropped. Each round settles at least the first.
  bool keep = false;
  uint32_t undecided_word = ballot(undecided);
  uint32_t kept_word = 0;
  int rank = 0;
  int count = 0;
  for (bool settled = false; !settled;) {
    if (lane == 0) {
      undecided_words[warp] = undecided_word;
      kept_words[warp] = kept_word;
    }
    sync_block();
    uint32_t blocked_by_kept = 0;
    uint32_t blocked_by_undecided = 0;
    uint32_t left = 0;
    rank = 0;
    count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t kept_here = kept_words[w];
      blocked_by_kept |= overlaps[w] & kept_here;
      blocked_by_undecided |= overlaps[w] & undecided_words[w];
      left |= undecided_words[w];
      const uint32_t earlier = w < warp ? ~0u : w > warp ? 0u : (1u << lane) - 1;
      rank += population_count(kept_here & earlier);
      count += population_count(kept_here);
    }
    settled = left == 0;
    if (undecided && blocked_by_kept != 0) {
      undecided = false;
    } else if (undecided && blocked_by_undecided == 0) {
      undecided = false;
      keep = true;
    }
    undecided_word = ballot(undecided);
    kept_word = ballot(keep);
    sync_block();
  }

  const uint64_t before = tested;
  if (keep) {
    store_vector(kept_corners + 4 * (before + rank), Corners<C>{{own.x1, own.y1, own.x2, own.y2}});
    kept[before + rank] = index;
  }
  sync_block();
  if (thread == 0) {
    thread_fence();  // the list is written before the word that announces it
    atomic_exchange(&progress->done_and_kept, (ticket + 1) << 32 | (before + count));
  }
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(),
                  "fastzoo: nms: fewer than 2^31 boxes expected, got ", n);
  const Tensor kept = empty(boxes, {n}, ScalarType::Long);
  if (n == 0) return kept;
  const Tensor rows = torch::stable::contiguous(boxes);
  const Stream stream(boxes);
  const Tensor progress = torch::stable::new_zeros(
      boxes, {static_cast<int64_t>(sizeof(Progress) / sizeof(int64_t))}, ScalarType::Long);
  const Tensor order = falling_order(stream, scores);
  const Tensor kept_corners = empty(boxes, {n, 4}, compute_dtype(boxes.scalar_type()));

  dispatch_float(boxes.scalar_type(), "nms", [&](auto type) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    stream.launch("nms_keep", nms_keep<T, C>, blocks_for(n, kBlock), kBlock,
                  static_cast<const T*>(rows.const_data_ptr()),
                  static_cast<const int64_t*>(order.const_data_ptr()), n,
                  math::round_down<C>(iou_threshold),
                  static_cast<C*>(kept_corners.mutable_data_ptr()),
                  static_cast<int64_t*>(kept.mutable_data_ptr()),
                  static_cast<Progress*>(progress.mutable_data_ptr()));
  });
  const int64_t done_and_kept =
      stream.read_back(static_cast<const int64_t*>(progress.const_data_ptr()));
  Tensor whole = kept;
  return torch::stable::narrow(whole, 0, 0, done_and_kept & 0xffffffff);
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::nms>(m, "nms.cuda");
}
