// The best of many candidates, in order, sorted no further than is looked. Included like vec.h.
//
// A candidate is a rank: the falling key of its score above its index. All ranks differ, and less
// is better: a higher score, or at equal scores a lower index.
#pragma once

#include <cstdlib>
#include <cstring>

#include "../../math/nms.h"
#include "vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

template <class T>
struct RankOf {
  using Key = uint32_t;
  using type = uint64_t;
  static constexpr Key kLargest = 0xff800000u;   // of -infinity
  static constexpr Key kSmallest = 0x007fffffu;  // of infinity
};
template <>
struct RankOf<double> {
  using Key = uint64_t;
  using type = unsigned __int128;
  static constexpr Key kLargest = 0xfff0000000000000u;
  static constexpr Key kSmallest = 0x000fffffffffffffu;
};

constexpr int kIndexBits = 32;

template <class T>
FASTZOO_INLINE typename RankOf<T>::type rank_of(T score, int64_t index) {
  return static_cast<typename RankOf<T>::type>(math::falling_key(score)) << kIndexBits |
         static_cast<uint32_t>(index);
}

template <class Rank>
FASTZOO_INLINE int64_t index_of(Rank rank) {
  return static_cast<uint32_t>(rank);
}

// The least score that ranks below `bound` have; infinity where none is.
template <class T>
FASTZOO_INLINE T least_score(typename RankOf<T>::type bound) {
  using Key = typename RankOf<T>::Key;
  if (bound == 0) return static_cast<T>(__builtin_inf());
  Key key = static_cast<Key>((bound - 1) >> kIndexBits);
  if (key > RankOf<T>::kLargest) key = RankOf<T>::kLargest;
  if (key < RankOf<T>::kSmallest) key = RankOf<T>::kSmallest;
  constexpr Key kZero = ~Key{0} >> 1;
  return math::bits_as<T>(key > kZero ? key : kZero - key);
}

FASTZOO_INLINE int bit_width(uint64_t value) {
  return value == 0 ? 0 : 64 - __builtin_clzll(value);
}
FASTZOO_INLINE int bit_width(unsigned __int128 value) {
  const uint64_t high = static_cast<uint64_t>(value >> 64);
  return high == 0 ? bit_width(static_cast<uint64_t>(value)) : 64 + bit_width(high);
}

constexpr int kBucketBits = 11;

// Moves n > 1 ranks into `out` by rising buckets of equal width, of which the best and the worst
// rank are never in one. Returns how many buckets there are; ends[b] is where bucket b ends.
template <class Rank>
static int64_t distribute(const Rank* ranks, int64_t n, Rank* out, uint32_t* ends) {
  Rank least = ranks[0], most = ranks[0];
  for (int64_t i = 1; i < n; ++i) {
    least = ranks[i] < least ? ranks[i] : least;
    most = ranks[i] > most ? ranks[i] : most;
  }
  const int wanted = bit_width(static_cast<uint64_t>(n));
  const int excess = bit_width(most - least) - (wanted < kBucketBits ? wanted : kBucketBits);
  const int shift = excess > 0 ? excess : 0;
  const int64_t buckets = static_cast<int64_t>((most - least) >> shift) + 1;
  std::memset(ends, 0, buckets * sizeof(uint32_t));
  for (int64_t i = 0; i < n; ++i) ++ends[static_cast<int64_t>((ranks[i] - least) >> shift)];
  uint32_t sum = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    const uint32_t count = ends[b];
    ends[b] = sum;
    sum += count;
  }
  for (int64_t i = 0; i < n; ++i) {
    out[ends[static_cast<int64_t>((ranks[i] - least) >> shift)]++] = ranks[i];
  }
  return buckets;
}

// Sorts in place; `room` is as large.
template <class Rank>
static void sort_ranks(Rank* ranks, int64_t n, Rank* room) {
  constexpr int64_t kFew = 16;
  if (n <= kFew) {
    for (int64_t i = 1; i < n; ++i) {
      const Rank rank = ranks[i];
      int64_t place = i;
      for (; place > 0 && rank < ranks[place - 1]; --place) ranks[place] = ranks[place - 1];
      ranks[place] = rank;
    }
    return;
  }
  uint32_t ends[1 << kBucketBits];
  const int64_t buckets = distribute(ranks, n, room, ends);
  int64_t begin = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    if (ends[b] > begin + 1) sort_ranks(room + begin, ends[b] - begin, ranks + begin);
    begin = ends[b];
  }
  std::memcpy(ranks, room, n * sizeof(Rank));
}

// Ranks in order, a bucket sorted when it is asked for.
template <class Rank>
class LazyOrder {
 public:
  // Overwrites both arrays of `count` ranks; the order comes to stand in `order`.
  LazyOrder(Rank* ranks, int64_t count, Rank* order) : room_(ranks), order_(order) {
    if (count > 1) {
      buckets_ = distribute(ranks, count, order, ends_);
    } else {
      buckets_ = count;
      ends_[0] = static_cast<uint32_t>(count);
      if (count == 1) order[0] = ranks[0];
    }
  }

  // Sorts the bucket around `place` and returns its end.
  int64_t settle(int64_t place) {
    int64_t low = 0, high = buckets_ - 1;  // the first bucket that ends behind the place
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends_[middle] > place) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int64_t begin = low == 0 ? 0 : ends_[low - 1];
    const int64_t end = ends_[low];
    sort_ranks(order_ + begin, end - begin, room_ + begin);
    return end;
  }

 private:
  Rank* room_;
  Rank* order_;
  int64_t buckets_;
  uint32_t ends_[1 << kBucketBits];
};

// The best `most` ranks of a stream.
template <class T>
class BestRanks {
 public:
  using Rank = typename RankOf<T>::type;

  BestRanks() = default;
  ~BestRanks() {
    std::free(ranks);
    std::free(room);
  }
  BestRanks(const BestRanks&) = delete;
  BestRanks& operator=(const BestRanks&) = delete;

  // Forgets all. Only ranks below `first_bound` are wanted.
  void start(int64_t how_many, Rank first_bound) {
    most_ = how_many;
    count = 0;
    bound = how_many > 0 ? first_bound : 0;
  }

  // Makes place for `more` ranks. May lower the bound. False where memory ran out.
  bool reserve(int64_t more) {
    if (count + more <= capacity_) return true;
    constexpr int64_t kLeast = 512;
    // Twice as many as are wanted, so that each is moved only a few times.
    if (count >= most_ + (most_ > kLeast ? most_ : kLeast)) {
      keep_most();
      if (count + more <= capacity_) return true;
    }
    const int64_t wanted = count + more;
    return grow(wanted < kLeast ? kLeast : 2 * wanted);
  }

  // Leaves the best in `ranks`, in no order.
  void keep_most() {
    if (count <= most_) return;
    LazyOrder<Rank> order(ranks, count, room);
    order.settle(most_ - 1);
    Rank* const kept = room;
    room = ranks;
    ranks = kept;
    count = most_;
    bound = ranks[most_ - 1];
  }

  // Hands the ranks over, to be freed by the caller.
  Rank* release() {
    Rank* const released = ranks;
    ranks = nullptr;
    capacity_ = 0;
    return released;
  }

  __attribute__((always_inline)) void push(Rank rank) { ranks[count++] = rank; }

  Rank* ranks = nullptr;
  Rank* room = nullptr;  // as large
  int64_t count = 0;
  Rank bound = 0;  // ranks from here on are not wanted

 private:
  bool grow(int64_t capacity) {
    const int64_t bytes = capacity * static_cast<int64_t>(sizeof(Rank));
    Rank* const larger = static_cast<Rank*>(std::malloc(bytes));
    Rank* const larger_room = static_cast<Rank*>(std::malloc(bytes));
    if (larger == nullptr || larger_room == nullptr) {
      std::free(larger);
      std::free(larger_room);
      return false;
    }
    if (count > 0) std::memcpy(larger, ranks, count * sizeof(Rank));
    std::free(ranks);
    std::free(room);
    ranks = larger;
    room = larger_room;
    capacity_ = capacity;
    return true;
  }

  int64_t most_ = 0;
  int64_t capacity_ = 0;
};

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
