// The tile product against three plain loops in double, for sizes around the tile's and for both
// types. The inputs are small multiples of 1/16, so that every sum is exact and the results equal.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_tile_gemm, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_tile_gemm)

#else

#include <cstdlib>

#include "../../csrc/cpu/runtime/tile_gemm.h"

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
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(__builtin_nan(""));
  return values;
}

template <class T>
void check_size(int& failures, int64_t rows, int64_t columns, int64_t depth) {
  using Gemm = TileGemm<T>;
  using V = Vec<T>;
  const int64_t padded_rows = Gemm::left_panels(rows) * Gemm::kRows;
  const int64_t padded_columns = Gemm::right_panels(columns) * Gemm::kColumns;
  T* left = allocate<T>(Gemm::left_panels(rows) * Gemm::left_panel_size(depth));
  T* right = allocate<T>(Gemm::right_panels(columns) * Gemm::right_panel_size(depth));
  T* result = allocate<T>(padded_rows * padded_columns);
  for (int64_t first = 0; first < padded_rows; first += Gemm::kRows) {
    T* starts = left + first / Gemm::kRows * Gemm::left_panel_size(depth);
    for (int i = 0; i < Gemm::kRows; ++i) starts[i] = static_cast<T>(element(2, first + i, 0));
    pack_lines<Gemm::kRows>(starts + Gemm::kRows, first, rows, depth, [](int64_t row, int64_t k) {
      return static_cast<T>(element(0, row, k));
    });
  }
  for (int64_t first = 0; first < padded_columns; first += Gemm::kColumns) {
    pack_lines<Gemm::kColumns>(
        right + first * depth, first, columns, depth,
        [](int64_t row, int64_t k) { return static_cast<T>(element(1, row, k)); });
  }

  int64_t tiles = 0;
  Gemm::run(left, rows, right, columns, depth,
            [&](int64_t row, int64_t column, const typename Gemm::Tile& tile) {
              ++tiles;
              for (int i = 0; i < Gemm::kRows; ++i) {
                for (int j = 0; j < 2; ++j) {
                  tile[i][j].store(result + (row + i) * padded_columns + column + j * V::size);
                }
              }
            });

  CHECK(tiles == Gemm::left_panels(rows) * Gemm::right_panels(columns));
  int wrong = 0;
  for (int64_t row = 0; row < padded_rows; ++row) {
    for (int64_t column = 0; column < padded_columns; ++column) {
      double sum = element(2, row, 0);
      for (int64_t k = 0; k < depth && row < rows && column < columns; ++k) {
        sum += element(0, row, k) * element(1, column, k);
      }
      wrong += !(static_cast<double>(result[row * padded_columns + column]) == sum);
    }
  }
  CHECK(wrong == 0);
  if (wrong != 0) {
    std::printf("%d wrong at rows %d, columns %d, depth %d\n", wrong, static_cast<int>(rows),
                static_cast<int>(columns), static_cast<int>(depth));
  }
  std::free(left);
  std::free(right);
  std::free(result);
}

template <class T>
void check_type(int& failures) {
  using Gemm = TileGemm<T>;
  const int64_t all_rows[] = {0, 1, Gemm::kRows - 1, Gemm::kRows, Gemm::kRows + 1, 53};
  const int64_t all_columns[] = {0, 1, Gemm::kColumns - 1, Gemm::kColumns, Gemm::kColumns + 1, 97};
  const int64_t depths[] = {0, 1, 2, 13, 64, 301};
  for (const int64_t rows : all_rows) {
    for (const int64_t columns : all_columns) {
      for (const int64_t depth : depths) check_size<T>(failures, rows, columns, depth);
    }
  }
  // More left panels than one block holds; a panel larger than a block.
  check_size<T>(failures, 700, 3, 301);
  check_size<T>(failures, Gemm::kRows + 1, 2, Gemm::kLeftBlockBytes / 16);
}

}  // namespace

void check_tile_gemm(int& failures) {
  check_type<float>(failures);
  check_type<double>(failures);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
