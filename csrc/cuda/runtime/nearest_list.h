// The first k keys that a warp has been offered. New ones wait in a buffer in shared memory until
// there are enough to be sorted and merged; what does not come before the k-th is not taken at all.
#pragma once

#include "distance_keys.h"

namespace fastzoo::cuda {

// The most that may be appended at a time.
constexpr int kMostAppended = 4 * kWarpSize;

// What both kinds of list share. `Self` has merge(), which takes keys from the buffer's end.
template <class C, class Self>
class BufferedList {
 public:
  using Key = DistanceKey<C>;

  // Keys that come before this may be among the first k. It only falls.
  Key limit = no_key<C>();

  // By the whole warp; those `wanted` come before the limit.
  template <class Memory>
  FASTZOO_DEVICE void append(Memory& memory, bool wanted, Key key) {
    const uint32_t taken = ballot(wanted);
    const int earlier = population_count(taken & ((1u << threadIdx.x % kWarpSize) - 1));
    if (wanted) memory[buffer_ + waiting_ + earlier] = key;
    waiting_ += population_count(taken);
  }

  // Merges until no more than `most` wait.
  template <class Memory>
  FASTZOO_DEVICE void settle(Memory& memory, int most) {
    while (waiting_ > most) static_cast<Self*>(this)->merge(memory);
  }

 protected:
  FASTZOO_DEVICE void lower_limit(Key last) {
    if (before(last, limit)) limit = last;
  }

  int buffer_ = 0;  // where it begins
  int waiting_ = 0;
};

// Up to kWarpSize keys, one a lane.
template <class C>
class ShortList : public BufferedList<C, ShortList<C>> {
 public:
  using Key = DistanceKey<C>;
  static constexpr int kWarps = 8;                                     // of a block
  static constexpr int kBlocks = sizeof(C) == sizeof(float) ? 3 : 1;   // of a multiprocessor
  static constexpr int kQueries = sizeof(C) == sizeof(float) ? 2 : 1;  // of a warp
  static constexpr int kRoom = kWarpSize - 1;  // of the buffer, before more is appended
  static constexpr int kKeys = kRoom + kMostAppended + 1;

  // Its memory begins at `first`.
  FASTZOO_DEVICE void start(int k, Key limit, int first) {
    this->limit = limit;
    this->buffer_ = first;
    k_ = k;
  }

  FASTZOO_DEVICE int room() const { return kRoom; }

  template <class Memory>
  FASTZOO_DEVICE void merge(Memory& memory) {
    const int lane = threadIdx.x % kWarpSize;
    const int count = this->waiting_ < kWarpSize ? this->waiting_ : kWarpSize;
    this->waiting_ -= count;
    sync_warp();
    Key added = lane < count ? memory[this->buffer_ + this->waiting_ + lane] : no_key<C>();
    sync_warp();

#pragma unroll
    for (int size = 2; size <= kWarpSize; size *= 2) {
#pragma unroll
      for (int step = size / 2; step > 0; step /= 2) {
        exchange(added, step, ((lane & step) == 0) == ((lane & size) != 0));
      }
    }
    // `added` falls and mine_ rises: the lesser of each two are the first of all, rising and then
    // falling.
    if (before(added, mine_)) mine_ = added;
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) exchange(mine_, step, (lane & step) == 0);
    this->lower_limit(shuffle_key(mine_, k_ - 1));
  }

  // For i that differ from the lane by a multiple of kWarpSize.
  template <class Memory>
  FASTZOO_DEVICE Key get(Memory&, int) const {
    return mine_;
  }

 private:
  // The lesser or the greater of mine and that of the lane `step` away.
  FASTZOO_DEVICE static void exchange(Key& mine, int step, bool lesser) {
    const Key other = shuffle_key(mine, static_cast<int>(threadIdx.x % kWarpSize) ^ step);
    if (before(other, mine) == lesser) mine = other;
  }

  int k_ = 0;
  Key mine_ = no_key<C>();
};

// Up to kMostKeys keys in shared memory, rising; the buffer follows.
template <class C, int kMostKeys>
class LongList : public BufferedList<C, LongList<C, kMostKeys>> {
 public:
  using Key = DistanceKey<C>;
  static constexpr int kKeys = 2 * kMostKeys - kWarpSize + kMostAppended;
  static constexpr int kFitting = 36 * 1024 / (kKeys * static_cast<int>(sizeof(Key)));
  static constexpr int kWarps = kFitting < 8 ? kFitting : 8;
  static constexpr int kBlocks = 1;
  static constexpr int kQueries = 1;

  FASTZOO_DEVICE void start(int k, Key limit, int first) {
    this->limit = limit;
    k_ = k;
    first_ = first;
    while (size_ < k) size_ *= 2;
    this->buffer_ = first_ + size_;
  }

  FASTZOO_DEVICE int room() const { return size_ - kWarpSize; }

  template <class Memory>
  FASTZOO_DEVICE void merge(Memory& memory) {
    const int lane = threadIdx.x % kWarpSize;
    const int count = this->waiting_ < size_ ? this->waiting_ : size_;
    this->waiting_ -= count;
    const int added = this->buffer_ + this->waiting_;
    for (int i = count + lane; i < size_; i += kWarpSize) memory[added + i] = no_key<C>();
    if (!started_) {
      for (int i = lane; i < size_; i += kWarpSize) memory[first_ + i] = no_key<C>();
      started_ = true;
    }
    for (int size = 2; size <= size_; size *= 2) {
      for (int step = size / 2; step > 0; step /= 2) exchange(memory, added, step, size);
    }
    sync_warp();
    for (int i = lane; i < size_; i += kWarpSize) {
      const Key key = memory[added + i];
      if (before(key, memory[first_ + i])) memory[first_ + i] = key;
    }
    for (int step = size_ / 2; step > 0; step /= 2) exchange(memory, first_, step, 0);
    sync_warp();
    this->lower_limit(memory[first_ + k_ - 1]);
  }

  template <class Memory>
  FASTZOO_DEVICE Key get(Memory& memory, int i) const {
    return started_ ? memory[first_ + i] : no_key<C>();
  }

 private:
  // Pairs `step` apart: falling where i has the bit `size` clear, rising where it is set or no
  // size is given.
  template <class Memory>
  FASTZOO_DEVICE void exchange(Memory& memory, int from, int step, int size) {
    sync_warp();
    for (int pair = threadIdx.x % kWarpSize; pair < size_ / 2; pair += kWarpSize) {
      const int i = 2 * pair - (pair & (step - 1));
      const Key a = memory[from + i], b = memory[from + i + step];
      if (before(b, a) == (size == 0 || (i & size) != 0)) {
        memory[from + i] = b;
        memory[from + i + step] = a;
      }
    }
  }

  int k_ = 0, first_ = 0, size_ = 2 * kWarpSize;
  bool started_ = false;
};

}  // namespace fastzoo::cuda
