// Greedy suppression without an n x n mask: the kept list grows. A block owns kKeepBlock boxes in
// falling order of score. It tests them against the kept list as earlier blocks extend it; when
// the last of these is done it settles its own boxes and appends what it keeps.
#pragma once

#include "../../math/nms.h"
#include "../../math/rotated_boxes.h"
#include "rows.h"
#include "sorted.h"

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

// What blocks tell one another, in words that start as zero: the tickets taken so far, and of each
// list  blocks done << 32 | boxes kept. Blocks take their place in the order from a ticket, so that
// a block only waits for blocks that already run.
constexpr uint64_t kKeptOfWord = 0xffffffff;
constexpr uint64_t kNoLimit = ~uint64_t{0};

// Of an image or a segment.
template <class Overlap>
struct KeptList {
  static constexpr int kNumbers = Overlap::kNumbers;

  typename Overlap::Value* rows;
  int64_t* ids;      // where gated
  int64_t* indices;  // of boxes, as the kernel names them
  uint64_t* word;

  FASTZOO_DEVICE typename Overlap::Box box(int64_t i) const {
    return Overlap::box_of(load_vector<kNumbers>(rows + kNumbers * i));
  }
  FASTZOO_DEVICE void put(int64_t i, const typename Overlap::Box& box, int64_t index) const {
    store_vector(rows + kNumbers * i, Overlap::row_of(box));
    indices[i] = index;
  }
};

// What the threads of a block share.
template <class Overlap, bool gated>
struct KeepShared {
  typename Overlap::Stage stage;
  SharedArray<int64_t, gated ? kKeepBlock : 1> ids;
  SharedArray<uint64_t, 1> announced;
  SharedArray<uint32_t, kKeepWords> undecided_words;
  SharedArray<uint32_t, kKeepWords> kept_words;

  // Called once, by all threads.
  FASTZOO_DEVICE uint64_t take_ticket(uint64_t* tickets) {
    if (threadIdx.x == 0) announced[0] = atomic_add(tickets, uint64_t{1});
    sync_block();
    return announced[0];
  }
};

// A thread's box among those of its block. gated: boxes of different ids never overlap. matched:
// which box suppresses mine is remembered.
template <class Overlap, bool gated, bool matched>
class KeepBlock {
 public:
  using Box = typename Overlap::Box;
  using Shared = KeepShared<Overlap, gated>;

  // Finds which earlier boxes of the block overlap mine.
  FASTZOO_DEVICE KeepBlock(Shared& shared, const Overlap& overlap, bool exists, const Box& own,
                           int64_t id)
      : shared_(shared), overlap_(overlap), own_(own), id_(id), undecided_(exists) {
    shared.stage.put(thread_, own);
    if constexpr (gated) shared.ids[thread_] = id;
    sync_block();
    for (int w = 0; w <= warp_; ++w) {
      uint32_t word = 0;
#pragma unroll Overlap::kUnroll
      for (int i = 0; i < kWarpSize; ++i) {
        const int other = w * kWarpSize + i;
        const bool hit = is_suppressed_by<gated>(other);
        word |= static_cast<uint32_t>(hit && other < thread_) << i;
      }
#pragma unroll
      for (int i = 0; i < kKeepWords; ++i) {
        if (i == w) overlaps_[i] = word;
      }
    }
  }

  // Tests my box, if it takes part, against a list that earlier blocks extend, until all of them
  // are done with it. False as soon as the list has `limit` boxes.
  template <bool mixed_list>
  FASTZOO_DEVICE bool follow(const KeptList<Overlap>& list, uint64_t ticket, bool takes_part,
                             uint64_t limit) {
    bool open = undecided_ && takes_part;
    for (bool my_turn = false; !my_turn;) {
      sync_block();
      if (thread_ == 0) {
        uint64_t now = load_volatile(list.word);
        while (now >> 32 != ticket && (now & kKeptOfWord) == tested_) {
          wait_for_other_block();
          now = load_volatile(list.word);
        }
        thread_fence();  // what the list holds is read after the word that announced it
        shared_.announced[0] = now;
      }
      sync_block();
      const uint64_t now = shared_.announced[0];
      my_turn = now >> 32 == ticket;
      const uint64_t total = now & kKeptOfWord;
      if (total >= limit) return false;
      for (; tested_ < total; tested_ += kKeepBlock) {
        const int some =
            static_cast<int>(total - tested_ < kKeepBlock ? total - tested_ : kKeepBlock);
        if (thread_ < some) {
          shared_.stage.put(thread_, list.box(tested_ + thread_));
          if constexpr (mixed_list) shared_.ids[thread_] = list.ids[tested_ + thread_];
        }
        sync_block();
        if (any(open)) {
#pragma unroll Overlap::kUnroll
          for (int i = 0; i < some; ++i) {
            if (!is_suppressed_by<mixed_list>(i)) continue;
            if constexpr (matched) {
              if (open) in_list_ = static_cast<int>(tested_) + i;
            }
            open = false;
          }
        }
        sync_block();
      }
      tested_ = total;
    }
    if (takes_part) undecided_ = open;
    return true;
  }

  // Settles the block's boxes, all at once: one is dropped when an earlier one that overlaps it is
  // kept, and kept when all of those are dropped. Each round settles at least the first.
  FASTZOO_DEVICE void settle() {
    uint32_t undecided_word = ballot(undecided_);
    uint32_t kept_word = 0;
    for (bool settled = false; !settled;) {
      if (thread_ % kWarpSize == 0) {
        shared_.undecided_words[warp_] = undecided_word;
        shared_.kept_words[warp_] = kept_word;
      }
      sync_block();
      uint32_t blocked_by_kept = 0;
      uint32_t blocked_by_undecided = 0;
      uint32_t left = 0;
#pragma unroll
      for (int w = 0; w < kKeepWords; ++w) {
        const uint32_t undecided = shared_.undecided_words[w];
        blocked_by_kept |= overlaps_[w] & shared_.kept_words[w];
        blocked_by_undecided |= overlaps_[w] & undecided;
        left |= undecided;
      }
      settled = left == 0;
      if (undecided_ && blocked_by_kept != 0) {
        undecided_ = false;
      } else if (undecided_ && blocked_by_undecided == 0) {
        undecided_ = false;
        kept_ = true;
      }
      undecided_word = ballot(undecided_);
      kept_word = ballot(kept_);
      sync_block();
    }
  }

  // Then: whether my box is kept,
  FASTZOO_DEVICE bool kept() const { return kept_; }
  // how many of the list it was tested against,
  FASTZOO_DEVICE int64_t tested() const { return static_cast<int64_t>(tested_); }
  // how many boxes of the block before the i-th are kept,
  FASTZOO_DEVICE int kept_before(int i) const {
    int count = 0;
#pragma unroll
    for (int w = 0; w < kKeepWords; ++w) {
      const int bits = i - w * kWarpSize;
      const uint32_t mask = bits >= kWarpSize ? ~0u : bits <= 0 ? 0u : (1u << bits) - 1;
      count += population_count(shared_.kept_words[w] & mask);
    }
    return count;
  }
  // where matched: the first in the list that suppresses it, or -1,
  FASTZOO_DEVICE int suppressor_in_list() const { return in_list_; }
  // and otherwise the first of the block, or itself.
  FASTZOO_DEVICE int suppressor_in_block() const {
    int first = thread_;
#pragma unroll
    for (int w = kKeepWords - 1; w >= 0; --w) {
      const uint32_t hits = overlaps_[w] & shared_.kept_words[w];
      if (hits != 0) first = w * kWarpSize + population_count((hits & (0u - hits)) - 1);
    }
    return first;
  }

  // Tells later blocks that the list now has so many boxes, which this block has written.
  FASTZOO_DEVICE void announce(const KeptList<Overlap>& list, uint64_t ticket, int64_t count) {
    sync_block();
    if (thread_ != 0) return;
    thread_fence();  // the list is written before the word that announces it
    atomic_exchange(list.word, (ticket + 1) << 32 | static_cast<uint64_t>(count));
  }

 private:
  template <bool by_id>
  FASTZOO_DEVICE bool is_suppressed_by(int i) const {
    if constexpr (by_id) {
      if (shared_.ids[i] != id_) return false;
    }
    return overlap_.suppresses(shared_.stage.get(i), own_);
  }

  Shared& shared_;
  const Overlap overlap_;
  const Box own_;
  const int64_t id_;
  const int thread_ = threadIdx.x;
  const int warp_ = threadIdx.x / kWarpSize;
  bool undecided_;
  bool kept_ = false;
  uint64_t tested_ = 0;
  int in_list_ = -1;
  uint32_t overlaps_[kKeepWords] = {};
};

// `Boxes` are those of each image in falling order of score:
//   Overlap                   one of the above
//   kManyImages               whether there is more than one image, and a limit
//   exists(image, position)   positions up to some number do
//   index(image, position)    what is kept and reported of a box
//   read(image, index)        the box; computed once, however often it is compared
//   id(image, index)          where gated
template <class Boxes>
struct KeepTask {
  Boxes boxes;
  typename Boxes::Overlap overlap;
  int64_t n;                                // positions of an image
  KeptList<typename Boxes::Overlap> lists;  // one after another, of n each
  int64_t* group;  // where matched: by index, the first in the list that suppresses a box
  uint64_t* tickets;
  unsigned images;
  uint64_t limit;  // an image is done once it keeps so many; it may keep a few more
};

template <class Boxes, bool gated, bool matched>
__global__ void __launch_bounds__(kKeepBlock) nms_keep(KeepTask<Boxes> task) {
  using Overlap = typename Boxes::Overlap;
  __shared__ KeepShared<Overlap, gated> shared;
  const int thread = threadIdx.x;
  uint64_t ticket = shared.take_ticket(task.tickets);
  int64_t image = 0;
  KeptList<Overlap> list = task.lists;
  if constexpr (Boxes::kManyImages) {
    image = static_cast<unsigned>(ticket) % task.images;
    ticket = static_cast<unsigned>(ticket) / task.images;
    if (!task.boxes.exists(image, static_cast<int64_t>(ticket) * kKeepBlock)) return;
    const int64_t first = image * task.n;
    list = {list.rows + Overlap::kNumbers * first, list.ids + first, list.indices + first,
            list.word + image};
  }

  const int64_t position = static_cast<int64_t>(ticket) * kKeepBlock + thread;
  const bool exists = task.boxes.exists(image, position);
  int64_t index = 0;
  int64_t id = 0;
  typename Overlap::Box own{};
  if (exists) {
    index = task.boxes.index(image, position);
    own = task.boxes.read(image, index);
    if constexpr (gated) id = task.boxes.id(image, index);
  }

  KeepBlock<Overlap, gated, matched> block(shared, task.overlap, exists, own, id);
  // At the limit later blocks see the same word, so none of them waits for this one.
  const uint64_t limit = Boxes::kManyImages ? task.limit : kNoLimit;
  if (!block.template follow<gated>(list, ticket, true, limit)) return;
  block.settle();

  const int64_t before = block.tested();
  if (block.kept()) {
    const int64_t place = before + block.kept_before(thread);
    list.put(place, own, index);
    if constexpr (gated) list.ids[place] = id;
  }
  if constexpr (matched) {
    const int in_list = block.suppressor_in_list();
    const int64_t in_block = before + block.kept_before(block.suppressor_in_block());
    if (exists) task.group[index] = in_list >= 0 ? in_list : in_block;
  }
  block.announce(list, ticket, before + block.kept_before(kKeepBlock));
}

// One image's boxes in order of their segments, and within one by falling score. A segment has a
// list of its own, which begins at its first position, and blocks wait only for those that share
// a segment with them. That list's word is the one of the block where the segment begins: of the
// segments that begin in a block only the last goes on to others.
template <class Boxes>
struct SegmentTask {
  Boxes boxes;
  typename Boxes::Overlap overlap;
  int64_t n;
  const int64_t* ids;    // by position, rising
  const int64_t* ranks;  // by position: places in the falling order of all scores
  KeptList<typename Boxes::Overlap> lists;  // of ranks
  int64_t* flags;                           // by rank: 1 where kept
  int64_t* suppressors;  // where matched: by index, the rank of the first that suppresses a box
  uint64_t* tickets;
};

// Without the 1, nvcc spills for the sake of more blocks a unit.
template <class Boxes, bool matched>
__global__ void __launch_bounds__(kKeepBlock, 1) nms_keep_segments(SegmentTask<Boxes> task) {
  using Overlap = typename Boxes::Overlap;
  __shared__ KeepShared<Overlap, true> shared;
  __shared__ SharedArray<int64_t, 1> head;  // where the segment of the block's first box begins
  __shared__ SharedArray<int64_t, 1> tail;  // and that of its last, if it goes on, or -1
  const int thread = threadIdx.x;
  const uint64_t ticket = shared.take_ticket(task.tickets);
  const int64_t begin = static_cast<int64_t>(ticket) * kKeepBlock;
  const int64_t end = begin + kKeepBlock < task.n ? begin + kKeepBlock : task.n;
  const auto list_from = [&](int64_t position) -> KeptList<Overlap> {
    const KeptList<Overlap>& all = task.lists;
    return {all.rows + Overlap::kNumbers * position, nullptr, all.indices + position,
            all.word + position / kKeepBlock};
  };
  if (thread == 0) {
    const int64_t first_id = task.ids[begin];
    const int64_t last_id = task.ids[end - 1];
    const int64_t first = first_of_segment(task.ids, 0, begin, first_id);
    const bool goes_on = end < task.n && task.ids[end] == last_id;
    const int64_t last =
        last_id == first_id ? first : first_of_segment(task.ids, begin, end, last_id);
    head[0] = first;
    tail[0] = goes_on ? last : -1;
  }
  const bool exists = begin + thread < end;
  int64_t id = 0;
  typename Overlap::Box own{};
  if (exists) {
    own = task.boxes.read(0, task.boxes.index(0, task.ranks[begin + thread]));
    id = task.ids[begin + thread];
  }

  KeepBlock<Overlap, true, matched> block(shared, task.overlap, exists, own, id);
  if (head[0] < begin) {
    const bool of_head = id == task.ids[begin];
    block.template follow<false>(list_from(head[0]), ticket, of_head, kNoLimit);
  }
  block.settle();

  if (tail[0] >= 0) {
    const KeptList<Overlap> list = list_from(tail[0]);
    const bool begun_before = tail[0] < begin;
    const int first_thread = begun_before ? 0 : static_cast<int>(tail[0] - begin);
    const int64_t before = (begun_before ? block.tested() : 0) - block.kept_before(first_thread);
    if (block.kept() && thread >= first_thread) {
      list.put(before + block.kept_before(thread), own, task.ranks[begin + thread]);
    }
    block.announce(list, ticket, before + block.kept_before(kKeepBlock));
  }
  if (!exists) return;
  const int64_t rank = task.ranks[begin + thread];
  task.flags[rank] = block.kept();
  if constexpr (matched) {
    const int in_list = block.suppressor_in_list();
    task.suppressors[task.boxes.index(0, rank)] =
        in_list >= 0 ? list_from(head[0]).indices[in_list]
                     : task.ranks[begin + block.suppressor_in_block()];
  }
}

// Memory for lists of n boxes in all, `words` at most.
template <class Overlap>
class KeptMemory {
 public:
  KeptMemory(const Tensor& like, int64_t n, int64_t words, bool gated)
      : rows_(empty(like, {n, Overlap::kNumbers * int64_t{sizeof(Value)}}, ScalarType::Byte)),
        ids_(empty(like, {gated ? n : 0}, ScalarType::Long)),
        words_(torch::stable::new_zeros(like, {1 + words}, ScalarType::Long)) {}

  KeptList<Overlap> lists(const Tensor& indices) const {
    return {static_cast<Value*>(rows_.mutable_data_ptr()),
            static_cast<int64_t*>(ids_.mutable_data_ptr()),
            static_cast<int64_t*>(indices.mutable_data_ptr()), tickets() + 1};
  }
  uint64_t* tickets() const { return static_cast<uint64_t*>(words_.mutable_data_ptr()); }

 private:
  using Value = typename Overlap::Value;

  Tensor rows_, ids_, words_;
};

}  // namespace fastzoo::cuda
