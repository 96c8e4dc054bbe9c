// The first k keys that a warp has been offered. New ones wait in a buffer in shared memory until
// there are enough to be sorted and merged; what does not come before the k-th is not taken at all.
#pragma once

#include "distance_keys.h"

namespace fastzoo::cuda {

// By position of a list in shared memory; each warp has some of its own.
template <class C, int n>
using KeyMemory = SharedArray<DistanceKey<C>, n>;

// What both kinds of list share. `Self` has merge(), which empties the buffer.
template <class C, class Self>
class BufferedList {
 public:
  using Key = DistanceKey<C>;

  // Keys that come before this may be among the first k. It only falls.
  Key limit = no_key<C>();
  bool full = false;  // k keys are merged

  // By the whole warp; `wanted` keys come before the limit. `most` that wait are merged.
  template <class Memory>
  FASTZOO_DEVICE void add(Memory& memory, bool wanted, Key key, int most) {
    const uint32_t taken = ballot(wanted);
    if (taken == 0) return;
    const int lane = threadIdx.x % kWarpSize;
    const int earlier = population_count(taken & ((1u << lane) - 1));
    if (wanted) memory[buffer_ + waiting_ + earlier] = key;
    waiting_ += population_count(taken);
    if (waiting_ > most) static_cast<Self*>(this)->merge(memory);
  }
  template <class Memory>
  FASTZOO_DEVICE void finish(Memory& memory) {
    if (waiting_ > 0) static_cast<Self*>(this)->merge(memory);
  }

 protected:
  FASTZOO_DEVICE void lower_limit(Key last) {
    full = before(last, no_key<C>());
    if (before(last, limit)) limit = last;
  }

  int buffer_ = 0;  // where it begins
  int waiting_ = 0;
};

// Up to kWarpSize keys, one a lane.
template <class C>
class ShortList : public BufferedList<C, ShortList<C>> {
 public:
  using Base = BufferedList<C, ShortList<C>>;
  using Key = typename Base::Key;
  static constexpr int kMost = kWarpSize;
  static constexpr int kWarps = 8;                                     // of a block
  static constexpr int kQueries = sizeof(C) == sizeof(float) ? 2 : 1;  // of a warp
  static constexpr int kKeys = 2 * kWarpSize;

  // Its memory begins at `first`.
  FASTZOO_DEVICE void start(int k, Key limit, int first) {
    this->limit = limit;
    this->buffer_ = first;
    k_ = k;
  }

  // The most that may wait.
  FASTZOO_DEVICE int room() const { return kWarpSize - 1; }

  // Sorts the first kWarpSize that wait; the rest moves up.
  template <class Memory>
  FASTZOO_DEVICE void merge(Memory& memory) {
    const int lane = threadIdx.x % kWarpSize;
    const bool more = kWarpSize + lane < this->waiting_;
    sync_warp();
    Key added = lane < this->waiting_ ? memory[this->buffer_ + lane] : no_key<C>();
    const Key rest = more ? memory[this->buffer_ + kWarpSize + lane] : no_key<C>();
    sync_warp();
    if (more) memory[this->buffer_ + lane] = rest;
    this->waiting_ = this->waiting_ > kWarpSize ? this->waiting_ - kWarpSize : 0;

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

// Up to kMostKeys keys in shared memory, rising, and after them as many that wait.
template <class C, int kMostKeys>
class LongList : public BufferedList<C, LongList<C, kMostKeys>> {
 public:
  using Base = BufferedList<C, LongList<C, kMostKeys>>;
  using Key = typename Base::Key;
  static constexpr int kMost = kMostKeys;
  static constexpr int kKeys = 2 * kMostKeys;
  static constexpr int kFitting = 32 * 1024 / (kKeys * static_cast<int>(sizeof(Key)));
  static constexpr int kWarps = kFitting < 8 ? kFitting : 8;
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
    const int buffer = this->buffer_;
    for (int i = this->waiting_ + lane; i < size_; i += kWarpSize) memory[buffer + i] = no_key<C>();
    if (!started_) {
      for (int i = lane; i < size_; i += kWarpSize) memory[first_ + i] = no_key<C>();
      started_ = true;
    }
    this->waiting_ = 0;
    for (int size = 2; size <= size_; size *= 2) {
      for (int step = size / 2; step > 0; step /= 2) exchange(memory, buffer, step, size);
    }
    sync_warp();
    for (int i = lane; i < size_; i += kWarpSize) {
      const Key added = memory[buffer + i];
      if (before(added, memory[first_ + i])) memory[first_ + i] = added;
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
