// The tile product against plain loops in double, for every way to multiply and to read the left
// operand. The inputs are small multiples of 1/16, exact in bfloat16 too, so that every sum is
// exact and the results equal.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_tile_product, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_tile_product)

#else

#include <cstdlib>

#include "../../csrc/cpu/runtime/tile_product.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

// A multiple of 1/16 in [-4, 4), the same for the same arguments.
double element(int64_t side, int64_t row, int64_t k) {
  uint64_t bits = static_cast<uint64_t>(side * 1000003 + row * 5003 + k) * 0x9e3779b97f4a7c15u;
  bits ^= bits >> 29;
  return static_cast<double>(bits * 0xbf58476d1ce4e5b9u >> 57) / 16 - 4;
}

// The word that holds steps k * kEach .. of a row, of which `dims` exist.
template <class M>
typename M::Word word(int64_t side, int64_t row, int64_t k, int64_t dims) {
  if constexpr (M::kEach == 2) {
    BFloat16 low, high;
    narrow(element(side, row, 2 * k), low);
    narrow(2 * k + 1 < dims ? element(side, row, 2 * k + 1) : 0, high);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
  } else {
    return static_cast<typename M::Word>(element(side, row, k));
  }
}

template <class T>
T* allocate(int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
  return static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
}

template <class M>
void check_depth(int& failures, int64_t dims) {
  using Product = TileProduct<M>;
  using T = typename Product::T;
  using Word = typename Product::Word;
  constexpr int kRows = Product::kRows;
  constexpr int kColumns = Product::kColumns;
  const int64_t depth = (dims + M::kEach - 1) / M::kEach;
  const int64_t stride = depth + 3;
  Word* rows = allocate<Word>(kRows * stride);
  Word* columns = allocate<Word>(depth * kRows);
  Word* right = allocate<Word>(depth * kColumns);
  T starts[kRows];
  for (int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < kRows; ++i) {
      rows[i * stride + k] = columns[k * kRows + i] = word<M>(0, i, k, dims);
    }
    for (int i = 0; i < kColumns; ++i) right[k * kColumns + i] = word<M>(1, i, k, dims);
  }
  for (int i = 0; i < kRows; ++i) starts[i] = static_cast<T>(element(2, i, 0));

  typename Product::Tile by_rows, by_columns;
  Product::start(starts, by_rows);
  Product::add_rows(rows, stride, right, depth, by_rows);
  Product::start(starts, by_columns);
  Product::add_columns(columns, kRows, right, depth, by_columns);

  int wrong = 0;
  T found[2][kRows][kColumns];
  Product::store(by_rows, found[0][0], kColumns);
  Product::store(by_columns, found[1][0], kColumns);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      double sum = element(2, i, 0);
      for (int64_t d = 0; d < dims; ++d) sum += element(0, i, d) * element(1, j, d);
      wrong += !(static_cast<double>(found[0][i][j]) == sum);
      wrong += !(static_cast<double>(found[1][i][j]) == sum);
    }
  }
  CHECK(wrong == 0);
  std::free(rows);
  std::free(columns);
  std::free(right);
}

template <class M>
void check_product(int& failures) {
  for (const int64_t dims : {0, 1, 2, 3, 4, 7, 8, 13, 64, 301}) check_depth<M>(failures, dims);
}

}  // namespace

void check_tile_product(int& failures) {
  check_product<Multiply<float> >(failures);
  check_product<Multiply<double> >(failures);
  check_product<MultiplyBFloat16>(failures);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
