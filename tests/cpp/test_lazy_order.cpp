// The best of many ranks, and their order, against a full sort.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_lazy_order, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_lazy_order)

#else

#include <algorithm>
#include <vector>

#include "../../csrc/cpu/runtime/lazy_order.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

uint64_t noise(uint64_t i) {
  uint64_t x = i * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

template <class T>
T score_of(int kind, int64_t i) {
  const T fraction = static_cast<T>(noise(i) >> 11) * static_cast<T>(0x1p-53);
  switch (kind) {
    case 0:
      return fraction - T(0.5);
    case 1:
      return T(0.25);  // all equal
    case 2:
      return static_cast<T>(static_cast<int>(fraction * 5) - 2);
    case 3:
      // One far from all others, which differ in their last bits.
      return i == 77 ? static_cast<T>(__builtin_inf())
                     : 1 + static_cast<T>(noise(i) % 64) * T(1e-6);
    default:
      return static_cast<T>(i);  // each better than all before
  }
}

template <class T>
void check_best(int& failures) {
  using Rank = typename RankOf<T>::type;
  for (const int64_t n : {0, 1, 2, 16, 17, 300, 5000}) {
    for (int kind = 0; kind < 5; ++kind) {
      std::vector<Rank> sorted(n);
      for (int64_t i = 0; i < n; ++i) sorted[i] = rank_of(score_of<T>(kind, i), i);
      std::vector<Rank> stream(n);  // in the order of a matrix seen the other way
      for (int64_t i = 0; i < n; ++i) stream[i] = sorted[i * 4099 % n];
      std::sort(sorted.begin(), sorted.end());
      for (const int64_t most : {int64_t{0}, int64_t{1}, int64_t{100}, int64_t{700}, n}) {
        BestRanks<T> best;
        for (int repeat = 0; repeat < 2; ++repeat) {
          best.start(most, rank_of(T(-0.25), 0));
          for (const Rank rank : stream) {
            // What the scan skips is not wanted.
            CHECK(rank >= best.bound ||
                  least_score<T>(best.bound) <= score_of<T>(kind, index_of(rank)));
            CHECK(best.reserve(1));
            if (rank < best.bound) best.push(rank);
          }
          best.keep_most();
          int64_t wanted = 0;
          while (wanted < n && wanted < most && sorted[wanted] < rank_of(T(-0.25), 0)) ++wanted;
          CHECK(best.count == wanted);
          if (best.count != wanted) return;
          LazyOrder<Rank> order(best.ranks, best.count, best.room);
          for (int64_t i = 0, settled = 0; i < wanted; ++i) {
            if (i == settled) settled = order.settle(i);
            CHECK(settled > i && best.room[i] == sorted[i]);
          }
        }
      }
      std::vector<Rank> room(n);
      sort_ranks(stream.data(), n, room.data());
      CHECK(stream == sorted);
    }
  }
}

// The bounds of scores next to one another, of either sign.
template <class T>
void check_least_score(int& failures) {
  const T infinity = static_cast<T>(__builtin_inf());
  const T nan = static_cast<T>(__builtin_nan(""));
  const T scores[] = {infinity, T(3), T(1), T(1e-30), T(0), T(-1e-30), T(-1), T(-3), -infinity};
  CHECK(least_score<T>(0) == infinity);
  CHECK(least_score<T>(rank_of(infinity, 0)) == infinity);
  CHECK(least_score<T>(rank_of(nan, 0)) == -infinity);
  for (const T score : scores) {
    CHECK(least_score<T>(rank_of(score, 1)) == score);
    if (score == infinity) continue;
    // Without the first index of a score it is the next score above.
    const T above = least_score<T>(rank_of(score, 0));
    CHECK(above > score || (score == 0 && above == 0));
    CHECK(rank_of(above, 5) < rank_of(score, 0) || score == 0);
  }
  CHECK(rank_of(T(-0.0), 3) == rank_of(T(0.0), 3));
  CHECK(index_of(rank_of(T(1), 0xfffffffe)) == 0xfffffffe);
}

}  // namespace

void check_lazy_order(int& failures) {
  check_best<float>(failures);
  check_best<double>(failures);
  check_least_score<float>(failures);
  check_least_score<double>(failures);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
