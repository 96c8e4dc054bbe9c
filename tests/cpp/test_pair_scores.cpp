// The three products of pair scores against plain loops in double, for sizes around the tile's, in
// each type. The values are small multiples of 1/16 that bfloat16 holds, so that every sum is
// exact.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_pair_scores, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_pair_scores)

#else

#include <cstdlib>

#include "../../csrc/cpu/runtime/pair_scores.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

// A multiple of 1/16 in [-4, 4), the same for the same arguments.
double element(int64_t side, int64_t row, int64_t k) {
  uint64_t bits = static_cast<uint64_t>(side * 1000003 + row * 5003 + k) * 0x9e3779b97f4a7c15u;
  bits ^= bits >> 29;
  return static_cast<double>(bits * 0xbf58476d1ce4e5b9u >> 57) / 16 - 4;
}

template <class T>
T* allocate(int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
  T* values = static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
  __builtin_memset(values, 0xff, static_cast<size_t>(bytes));  // NaN of every type
  return values;
}

template <class M>
void check_size(int& failures, int64_t lanes, int64_t dims, int64_t rows) {
  using Pairs = PairScores<M>;
  using T = typename Pairs::T;
  using Word = typename Pairs::Word;
  const Pairs pairs{lanes, dims, chunk_rows(rows, 1, Pairs::kRows)};
  const int64_t group = pairs.blocks() < 2 ? pairs.blocks() : 2;
  Word* packed = allocate<Word>(pairs.lanes_size());
  Word* across = allocate<Word>(pairs.across_size());
  T* weight = allocate<T>(rows * dims);
  T* lane_sums = allocate<T>(pairs.sums_size());
  T* row_sums = allocate<T>(rows * dims);
  T* along = allocate<T>(rows);
  Arena counter;
  pairs.take(counter, group, true);
  char* memory = allocate<char>(counter.bytes());
  Arena arena(memory);
  const typename Pairs::Chunk chunk = pairs.take(arena, group, true);

  for (int64_t i = 0; i < rows * dims; ++i) {
    weight[i] = static_cast<T>(element(1, i / dims, i % dims));
  }
  for (int64_t r = 0; r < rows; ++r) along[r] = static_cast<T>(element(3, r, 0));
  for (int64_t i = 0; i < pairs.sums_size(); ++i) lane_sums[i] = T(0);
  const auto lane = [](int64_t n, int64_t d) { return static_cast<T>(element(0, n, d)); };
  for (int64_t block = 0; block < pairs.blocks(); ++block) {
    pairs.pack_lanes(block, lane, packed, across);
  }

  int wrong = 0;
  pairs.pack_rows(chunk, weight, rows, [&](int64_t r, T squares) {
    double sum = 0;
    for (int64_t d = 0; d < dims; ++d) sum += element(1, r, d) * element(1, r, d);
    wrong += !(static_cast<double>(squares) == sum);
  });
  for (int64_t first = 0; first < pairs.blocks(); first += group) {
    const int64_t count = pairs.blocks() - first < group ? pairs.blocks() - first : group;
    pairs.multiply(chunk, rows, packed, first, count);
    for (int64_t block = 0; block < count; ++block) {
      T* const scores = pairs.scores_of(chunk, block);
      for (int64_t i = 0; i < rows * Pairs::kColumns; ++i) {
        const int64_t r = i / Pairs::kColumns;
        const int64_t n = (first + block) * Pairs::kColumns + i % Pairs::kColumns;
        double sum = 0;
        for (int64_t d = 0; d < dims && n < lanes; ++d) sum += element(0, n, d) * element(1, r, d);
        wrong += !(static_cast<double>(scores[i]) == sum);
        scores[i] = n < lanes ? static_cast<T>(element(2, n, r)) : T(0);
      }
    }
    pairs.finish_gradients(chunk, rows, count);
    pairs.add_lane_gradients(chunk, rows, first, count, lane_sums);
    pairs.row_gradients(chunk, rows, across, first, count,
                        [&](int64_t r, int64_t d, const typename Pairs::Tile& tile) {
                          pairs.add_tile(tile, r, rows, d, first == 0, first == 0 ? along : nullptr,
                                         weight, row_sums);
                        });
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < dims; ++d) {
      double sum = element(3, r, 0) * element(1, r, d);
      for (int64_t n = 0; n < lanes; ++n) sum += element(2, n, r) * element(0, n, d);
      wrong += !(static_cast<double>(row_sums[r * dims + d]) == sum);
    }
  }
  double* total = allocate<double>(dims);
  for (int64_t n = 0; n < lanes; ++n) {
    for (int64_t d = 0; d < dims; ++d) total[d] = 1;
    pairs.collect(lane_sums, n, total);
    for (int64_t d = 0; d < dims; ++d) {
      double sum = 1;
      for (int64_t r = 0; r < rows; ++r) sum += element(2, n, r) * element(1, r, d);
      wrong += !(total[d] == sum);
    }
  }
  CHECK(wrong == 0);
  if (wrong != 0) {
    std::printf("%d wrong at lanes %d, dims %d, rows %d, %d bytes\n", wrong,
                static_cast<int>(lanes), static_cast<int>(dims), static_cast<int>(rows),
                static_cast<int>(sizeof(T)));
  }
  void* const allocated[] = {packed, across, weight, lane_sums, row_sums, along, memory, total};
  for (void* values : allocated) std::free(values);
}

template <class M>
void check_type(int& failures) {
  using Pairs = PairScores<M>;
  for (const int64_t lanes :
       {1, Pairs::kColumns - 1, Pairs::kColumns, 2 * Pairs::kColumns + 1, 97}) {
    for (const int64_t dims : {1, 2, 13, 33, 64}) {
      for (const int64_t rows : {1, Pairs::kRows - 1, Pairs::kRows, 53, 192}) {
        check_size<M>(failures, lanes, dims, rows);
      }
    }
  }
}

}  // namespace

void check_pair_scores(int& failures) {
  check_type<Multiply<float> >(failures);
  check_type<Multiply<double> >(failures);
  check_type<MultiplyBFloat16>(failures);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
