// One packed matrix product whose result never reaches memory: each tile of
//   result[m][n] = start[m] + sum over k of left[m][k] * right[n][k]
// is summed in registers and handed to an epilogue. Included like vec.h.
//
// Both operands are packed into panels, padded to whole ones:
//   left    kRows rows each:     [1 + depth][kRows], the first line holding start
//   right   kColumns rows each:  [depth][kColumns]
// A step of depth loads two vectors of right and broadcasts kRows elements of left. Panels should
// start on a cache line.
#pragma once

#include "vec.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

template <class T>
struct TileGemm {
  using V = Vec<T>;
  // As many accumulators as leave registers for two vectors of right and one broadcast.
  static constexpr int kRows = kVectorRegisters == 32 ? 12 : 6;
  static constexpr int kColumns = 2 * V::size;
  using Tile = V[kRows][2];

  // Left panels that are met again by every right panel stay in a half of a small L2.
  static constexpr int64_t kLeftBlockBytes = 512 << 10;

  static constexpr int64_t left_panels(int64_t rows) { return (rows + kRows - 1) / kRows; }
  static constexpr int64_t right_panels(int64_t rows) { return (rows + kColumns - 1) / kColumns; }
  static constexpr int64_t left_panel_size(int64_t depth) { return (1 + depth) * kRows; }
  static constexpr int64_t right_panel_size(int64_t depth) { return depth * kColumns; }

  __attribute__((always_inline)) static void multiply(const T* left, const T* right, int64_t depth,
                                                      Tile& tile) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) tile[i][0] = tile[i][1] = V(left[i]);
    // Whole rounds of 8 steps: a depth of 8 then has no loop whose end could be mispredicted.
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) {
#pragma GCC unroll 8
      for (int step = 0; step < 8; ++step) add_step(left, right, tile);
    }
    for (; k < depth; ++k) add_step(left, right, tile);
  }

  // Adds the products of the next line of both panels.
  __attribute__((always_inline)) static void add_step(const T*& left, const T*& right, Tile& tile) {
    left += kRows;
    const V right0 = V::load(right);
    const V right1 = V::load(right + V::size);
    right += kColumns;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const V broadcast(left[i]);
      tile[i][0] = fused_multiply_add(broadcast, right0, tile[i][0]);
      tile[i][1] = fused_multiply_add(broadcast, right1, tile[i][1]);
    }
  }

  // Calls epilogue(m, n, tile) for every tile, tile[i][j] holding result[m + i][n + j * V::size
  // ..]. For one n, the m ascend; within a block of left, every n is visited before the next block.
  template <class Epilogue>
  __attribute__((always_inline)) static void run(const T* left, int64_t left_rows, const T* right,
                                                 int64_t right_rows, int64_t depth,
                                                 const Epilogue& epilogue) {
    const int64_t left_size = left_panel_size(depth);
    const int64_t right_size = right_panel_size(depth);
    const int64_t left_count = left_panels(left_rows);
    const int64_t right_count = right_panels(right_rows);
    const int64_t fitting = kLeftBlockBytes / (left_size * static_cast<int64_t>(sizeof(T)));
    const int64_t block = fitting > 1 ? fitting : 1;
    for (int64_t first = 0; first < left_count; first += block) {
      const int64_t last = first + block < left_count ? first + block : left_count;
      for (int64_t column = 0; column < right_count; ++column) {
        for (int64_t row = first; row < last; ++row) {
          Tile tile;
          multiply(left + row * left_size, right + column * right_size, depth, tile);
          epilogue(row * kRows, column * kColumns, tile);
        }
      }
    }
  }
};

// Packs rows [first, first + kCount) of load(row, k) into lines [depth][kCount]; rows from `rows`
// on are zero.
template <int kCount, class T, class Load>
FASTZOO_INLINE void pack_lines(T* lines, int64_t first, int64_t rows, int64_t depth,
                               const Load& load) {
  if (rows - first >= kCount) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int i = 0; i < kCount; ++i) lines[k * kCount + i] = load(first + i, k);
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < kCount; ++i) {
      lines[k * kCount + i] = first + i < rows ? load(first + i, k) : T(0);
    }
  }
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
