// Greedy suppression without an n x n mask: the kept list grows. A block owns kKeepBlock boxes in
// falling order of score. It tests them against the kept list as earlier blocks extend it; when
// the last of these is done it settles its own boxes and appends what it keeps.
#pragma once

#include "../../math/nms.h"
#include "../../math/rotated_boxes.h"
#include "rows.h"

namespace fastzoo::cuda {

constexpr int kKeepBlock = 128;
constexpr int kKeepWords = kKeepBlock / 32;  // of a bit for each box of a block

// An overlap says which row of numbers of a box the kept list holds, how boxes lie in shared
// memory, and when one suppresses another.

// Boxes along the axes, compared in C.
template <class C>
struct AlignedOverlap {
  using Value = C;
  using Box = math::Box<C>;
  static constexpr int kNumbers = 4;
  static constexpr int kUnroll = 4;
  using Row = Vector<C, kNumbers>;

  C threshold;

  FASTZOO_DEVICE static Row row_of(const Box& box) { return {{box.x1, box.y1, box.x2, box.y2}}; }
  FASTZOO_DEVICE static Box box_of(const Row& row) {
    return {row[0], row[1], row[2], row[3], math::box_area(row[0], row[1], row[2], row[3])};
  }
  FASTZOO_DEVICE bool suppresses(const Box& a, const Box& b) const {
    return math::box_iou(a, b) > threshold;
  }

  struct Stage {
    SharedArray<C, 4 * kKeepBlock> corners;
    SharedArray<C, kKeepBlock> areas;

    FASTZOO_DEVICE void put(int i, const Box& box) {
      corners.store(4 * i, row_of(box));
      areas[i] = box.area;
    }
    FASTZOO_DEVICE Box get(int i) {
      const Row row = corners.template load<4>(4 * i);
      return {row[0], row[1], row[2], row[3], areas[i]};
    }
  };
};

struct RotatedOverlap {
  using Value = double;
  using Box = math::RotatedBox;
  static constexpr int kNumbers = 10;  // the last is unused: rows are whole pieces of 16 bytes
  static constexpr int kUnroll = 1;    // an overlap is hundreds of instructions
  using Row = Vector<double, kNumbers>;

  double threshold;

  FASTZOO_DEVICE static Row row_of(const Box& box) {
    return {{box.x, box.y, box.width, box.height, box.angle, box.sine, box.cosine, box.radius,
             box.area, 0}};
  }
  FASTZOO_DEVICE static Box box_of(const Row& row) {
    return {row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8]};
  }
  FASTZOO_DEVICE bool suppresses(const Box& a, const Box& b) const {
    return math::rotated_iou(a, b) > threshold;
  }

  struct Stage {
    SharedArray<double, kNumbers * kKeepBlock> rows;

    FASTZOO_DEVICE void put(int i, const Box& box) { rows.store(kNumbers * i, row_of(box)); }
    FASTZOO_DEVICE Box get(int i) { return box_of(rows.load<kNumbers>(kNumbers * i)); }
  };
};

// What the blocks tell one another, in words that start as zero: the tickets taken so far, then of
// each image  blocks done << 32 | boxes kept.
constexpr int64_t kTickets = 0;
constexpr int64_t kFirstImage = 1;
constexpr uint64_t kKeptOfWord = 0xffffffff;

// `Boxes` are those of each image in falling order of score:
//   Overlap                   one of the above
//   kManyImages               whether there is more than one image, and a limit
//   exists(image, position)   positions up to some number do
//   index(image, position)    what is kept and reported of a box
//   read(image, index)        the box; computed once, however often it is compared
//   id(image, index)          where gated: boxes of different ids never overlap
template <class Boxes>
struct KeepTask {
  using Value = typename Boxes::Overlap::Value;

  Boxes boxes;
  typename Boxes::Overlap overlap;
  int64_t n;          // positions of an image
  Value* kept_rows;   // the kept list [images, n]: boxes,
  int64_t* kept_ids;  // where gated their ids,
  int64_t* kept;      // and their indices
  int64_t* group;     // where matched: by index, the first in the list that suppresses a box
  uint64_t* progress;
  unsigned images;
  int64_t limit;  // an image is done once it keeps so many; it may keep a few more
};

// Blocks take their place in the order from a ticket, so that a block only waits for blocks that
// already run.
template <class Boxes, bool gated, bool matched>
__global__ void __launch_bounds__(kKeepBlock) nms_keep(KeepTask<Boxes> task) {
  using Overlap = typename Boxes::Overlap;
  using Box = typename Overlap::Box;
  constexpr int kNumbers = Overlap::kNumbers;
  __shared__ typename Overlap::Stage stage;
  __shared__ SharedArray<int64_t, gated ? kKeepBlock : 1> stage_ids;
  __shared__ SharedArray<uint64_t, 1> announced;
  __shared__ SharedArray<uint32_t, kKeepWords> undecided_words;
  __shared__ SharedArray<uint32_t, kKeepWords> kept_words;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;

  if (thread == 0) announced[0] = atomic_add(task.progress + kTickets, uint64_t{1});
  sync_block();
  uint64_t ticket = announced[0];
  int64_t image = 0;
  if constexpr (Boxes::kManyImages) {
    image = static_cast<unsigned>(ticket) % task.images;
    ticket = static_cast<unsigned>(ticket) / task.images;
    if (!task.boxes.exists(image, static_cast<int64_t>(ticket) * kKeepBlock)) return;
  }
  typename Overlap::Value* const kept_rows = task.kept_rows + kNumbers * image * task.n;
  int64_t* const kept_ids = task.kept_ids + image * task.n;
  int64_t* const kept = task.kept + image * task.n;
  uint64_t* const progress = task.progress + kFirstImage + image;

  const int64_t position = static_cast<int64_t>(ticket) * kKeepBlock + thread;
  const bool exists = task.boxes.exists(image, position);
  int64_t index = 0;
  int64_t id = 0;
  Box own{};
  if (exists) {
    index = task.boxes.index(image, position);
    own = task.boxes.read(image, index);
    if constexpr (gated) id = task.boxes.id(image, index);
  }
  const auto suppressed_by = [&](int i) {
    if constexpr (gated) {
      if (stage_ids[i] != id) return false;
    }
    return task.overlap.suppresses(stage.get(i), own);
  };

  // Which earlier boxes of this block overlap mine.
  stage.put(thread, own);
  if constexpr (gated) stage_ids[thread] = id;
  sync_block();
  uint32_t overlaps[kKeepWords] = {};
  for (int w = 0; w <= warp; ++w) {
    uint32_t word = 0;
#pragma unroll Overlap::kUnroll
    for (int i = 0; i < kWarpSize; ++i) {
      const int other = w * kWarpSize + i;
      const bool hit = suppressed_by(other);
      word |= static_cast<uint32_t>(hit && other < thread) << i;
    }
#pragma unroll
    for (int i = 0; i < kKeepWords; ++i) {
      if (i == w) overlaps[i] = word;
    }
  }

  // Test against the kept list until all earlier blocks are done with it.
  bool undecided = exists;
  int64_t suppressor = -1;  // where matched: the first in the kept list
  uint64_t tested = 0;
  for (bool my_turn = false; !my_turn;) {
    sync_block();
    if (thread == 0) {
      uint64_t now = load_volatile(progress);
      while (now >> 32 != ticket && (now & kKeptOfWord) == tested) {
        wait_for_other_block();
        now = load_volatile(progress);
      }
      thread_fence();  // what the list holds is read after the word that announced it
      announced[0] = now;
    }
    sync_block();
    const uint64_t now = announced[0];
    my_turn = now >> 32 == ticket;
    const uint64_t total = now & kKeptOfWord;
    if constexpr (Boxes::kManyImages) {
      // Later blocks see the same word, so none of them waits for this one.
      if (static_cast<int64_t>(total) >= task.limit) return;
    }
    for (; tested < total; tested += kKeepBlock) {
      const int some = static_cast<int>(total - tested < kKeepBlock ? total - tested : kKeepBlock);
      if (thread < some) {
        const auto row = load_vector<kNumbers>(kept_rows + kNumbers * (tested + thread));
        stage.put(thread, Overlap::box_of(row));
        if constexpr (gated) stage_ids[thread] = kept_ids[tested + thread];
      }
      sync_block();
      if (any(undecided)) {
#pragma unroll Overlap::kUnroll
        for (int i = 0; i < some; ++i) {
          if (!suppressed_by(i)) continue;
          if constexpr (matched) {
            if (undecided) suppressor = static_cast<int64_t>(tested) + i;
          }
          undecided = false;
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
  int kept_here = 0;
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
    kept_here = 0;
#pragma unroll
    for (int w = 0; w < kKeepWords; ++w) {
      const uint32_t word = kept_words[w];
      blocked_by_kept |= overlaps[w] & word;
      blocked_by_undecided |= overlaps[w] & undecided_words[w];
      left |= undecided_words[w];
      const uint32_t earlier = w < warp ? ~0u : w > warp ? 0u : (1u << lane) - 1;
      rank += population_count(word & earlier);
      kept_here += population_count(word);
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

  const int64_t before = static_cast<int64_t>(tested);
  if (keep) {
    store_vector(kept_rows + kNumbers * (before + rank), Overlap::row_of(own));
    kept[before + rank] = index;
    if constexpr (gated) kept_ids[before + rank] = id;
  }
  if constexpr (matched) {
    if (keep) suppressor = before + rank;
    int64_t at = before;
#pragma unroll
    for (int w = 0; w < kKeepWords; ++w) {
      const uint32_t word = kept_words[w];
      const uint32_t hits = overlaps[w] & word;
      if (suppressor < 0 && hits != 0) {
        suppressor = at + population_count(word & ((hits & (0u - hits)) - 1));
      }
      at += population_count(word);
    }
    if (exists) task.group[index] = suppressor;
  }
  sync_block();
  if (thread == 0) {
    thread_fence();  // the list is written before the word that announces it
    atomic_exchange(progress, (ticket + 1) << 32 | static_cast<uint64_t>(before + kept_here));
  }
}

// Memory for the kept lists of some images.
template <class Boxes>
class KeptList {
 public:
  using Overlap = typename Boxes::Overlap;
  using Value = typename Overlap::Value;

  KeptList(const Tensor& like, int64_t images, int64_t n, bool gated)
      : rows_(empty(like, {images * n, Overlap::kNumbers * int64_t{sizeof(Value)}},
                    ScalarType::Byte)),
        ids_(empty(like, {gated ? images * n : 0}, ScalarType::Long)),
        progress_(torch::stable::new_zeros(like, {kFirstImage + images}, ScalarType::Long)) {}

  void give(KeepTask<Boxes>& task) const {
    task.kept_rows = static_cast<Value*>(rows_.mutable_data_ptr());
    task.kept_ids = static_cast<int64_t*>(ids_.mutable_data_ptr());
    task.progress = static_cast<uint64_t*>(progress_.mutable_data_ptr());
  }

  const Value* rows() const { return static_cast<const Value*>(rows_.const_data_ptr()); }

  // A word for each image, whose lower half is how many it keeps.
  const int64_t* words() const {
    return static_cast<const int64_t*>(progress_.const_data_ptr()) + kFirstImage;
  }

 private:
  Tensor rows_, ids_, progress_;
};

}  // namespace fastzoo::cuda
