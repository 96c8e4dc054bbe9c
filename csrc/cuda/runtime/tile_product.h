// Tiles of the products of all rows of one matrix with all rows of another: a block has
// Scheme::kRows rows of the left one and goes over the right one, kTileColumns rows at a time.
//   FusedScheme<C>     fused multiply-adds of C
//   MmaScheme<type>    matrix instructions on operands rounded to 16 bits, summed in fp32
//   SplitScheme        the same on operands that come as two bfloat16 parts each
// A thread holds kRowsEach x kColumnsEach products, (i, j) that of row(i) with column(j). The
// kRowLanes lanes that are neighbours hold the same rows, and all of their columns; lanes that are
// kRowLanes apart hold the same columns.
#pragma once

#include <algorithm>

#include "../../math/host_device.h"
#include "rows.h"

namespace fastzoo::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarpSize;
constexpr int kTileColumns = 64;

template <class C>
struct FusedScheme {
  using Value = C;
  static constexpr int kPiece = 4;   // dimensions that a thread loads at once
  static constexpr int kDepth = 16;  // those in shared memory at a time
  static constexpr int kRowLanes = 16;
  static constexpr int kRowsEach = sizeof(C) == sizeof(float) ? 8 : 4;
  static constexpr int kColumnsEach = 4;
  static constexpr int kRows = kTileThreads / kRowLanes * kRowsEach;
  static constexpr int kBlocksEach = sizeof(C) == sizeof(float) ? 2 : 1;  // that a unit can hold

  FASTZOO_DEVICE static int row(int i) { return threadIdx.x / kRowLanes * kRowsEach + i; }
  FASTZOO_DEVICE static int column(int j) { return threadIdx.x % kRowLanes * kColumnsEach + j; }

  // One dimension after the other.
  template <int rows>
  struct Slab {
    static constexpr int kPitch = rows + 4;  // aligned, and stores are free of conflicts
    SharedArray<C, kDepth * kPitch> values;

    FASTZOO_DEVICE void put(int row, int depth, const Vector<C, kPiece>& piece) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) values[(depth + i) * kPitch + row] = piece[i];
    }
  };

  struct Products {
    C values[kRowsEach][kColumnsEach] = {};
    FASTZOO_DEVICE C& operator()(int i, int j) { return values[i][j]; }
  };

  template <class Left, class Right>
  FASTZOO_DEVICE static void multiply_add(Left& left, Right& right, Products& products) {
    accumulate(left, right, products,
               [](C a, C b, C sum) { return fused_multiply_add(a, b, sum); });
  }

  // Of each pair, sum = add(a, b, sum) for one dimension after the other.
  template <class Left, class Right, class Add>
  FASTZOO_DEVICE static void accumulate(Left& left, Right& right, Products& sums, const Add& add) {
#pragma unroll 4
    for (int d = 0; d < kDepth; ++d) {
      const Vector<C, kRowsEach> a =
          left.values.template load<kRowsEach>(d * Left::kPitch + row(0));
      const Vector<C, kColumnsEach> b =
          right.values.template load<kColumnsEach>(d * Right::kPitch + column(0));
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnsEach; ++j) sums(i, j) = add(a[i], b[j], sums(i, j));
      }
    }
  }
};

template <MmaType type>
struct MmaScheme {
  using Value = float;
  using Operand = std::conditional_t<type == MmaType::bfloat16, BFloat16, Half>;
  static constexpr int kPiece = 8;
  static constexpr int kDepth = 32;
  static constexpr int kRowLanes = 4;
  static constexpr int kRowsEach = 2;
  static constexpr int kColumnsEach = 16;
  static constexpr int kRows = kTileWarps * 16;
  static constexpr int kBlocksEach = 2;

  FASTZOO_DEVICE static int row(int i) {
    return threadIdx.x / kWarpSize * 16 + threadIdx.x % kWarpSize / kRowLanes + i * 8;
  }
  FASTZOO_DEVICE static int column(int j) {
    return j / 2 * 8 + threadIdx.x % kRowLanes * 2 + j % 2;
  }

  // One row after the other.
  template <int rows>
  struct Slab {
    static constexpr int kPitch = kDepth + 8;  // eight rows of a matrix meet all banks
    SharedArray<uint16_t, rows * kPitch> values;

    template <class T>
    FASTZOO_DEVICE void put(int row, int depth, const Vector<T, kPiece>& piece) {
      Vector<uint16_t, kPiece> bits;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        if constexpr (std::is_same_v<T, Operand>) {
          bits[i] = piece[i].x;
        } else {
          bits[i] = Operand(static_cast<float>(piece[i])).x;
        }
      }
      values.store(row * kPitch + depth, bits);
    }
  };

  struct Products {
    float values[kColumnsEach / 2][4] = {};
    FASTZOO_DEVICE float& operator()(int i, int j) { return values[j / 2][i * 2 + j % 2]; }
  };

  // Where a lane's row of the matrices begins that it loads: 16 x 16 of the left rows, and of the
  // right ones from j on, from element d on.
  template <class Left, class Right>
  struct Lanes {
    const int lane = threadIdx.x % kWarpSize;
    const int left_row = static_cast<int>(threadIdx.x) / kWarpSize * 16 + lane % 16;
    const int right_row = lane / 16 * 8 + lane % 8;

    FASTZOO_DEVICE int left(int d) const { return left_row * Left::kPitch + d + lane / 16 * 8; }
    FASTZOO_DEVICE int right(int j, int d) const {
      return (j + right_row) * Right::kPitch + d + lane / 8 % 2 * 8;
    }
  };

  template <class Left, class Right>
  FASTZOO_DEVICE static void multiply_add(Left& left, Right& right, Products& products) {
    const Lanes<Left, Right> at;
#pragma unroll
    for (int d = 0; d < kDepth; d += 16) {
      const Vector<uint32_t, 4> a = left.values.load_matrices(at.left(d));
#pragma unroll
      for (int j = 0; j < kTileColumns; j += 16) {
        const Vector<uint32_t, 4> b = right.values.load_matrices(at.right(j, d));
        mma<type>(products.values[j / 8], a, b[0], b[1]);
        mma<type>(products.values[j / 8 + 1], a, b[2], b[3]);
      }
    }
  }
};

// high high + high low + low high of operands stored as high and low parts: rows are pieces of
// kDepth elements, the high parts of kDepth / 2 dimensions followed by their low parts.
struct SplitScheme : MmaScheme<MmaType::bfloat16> {
  static constexpr int kDims = kDepth / 2;

  // Where a dimension's high part is; its low part is kDims elements further.
  FASTZOO_DEVICE static int64_t place(int64_t d) { return d / kDims * kDepth + d % kDims; }

  template <class Left, class Right>
  FASTZOO_DEVICE static void multiply_add(Left& left, Right& right, Products& products) {
    constexpr MmaType kType = MmaType::bfloat16;
    const Lanes<Left, Right> at;
    const Vector<uint32_t, 4> a_high = left.values.load_matrices(at.left(0));
    const Vector<uint32_t, 4> a_low = left.values.load_matrices(at.left(kDims));
#pragma unroll
    for (int j = 0; j < kTileColumns; j += 16) {
      const Vector<uint32_t, 4> b_high = right.values.load_matrices(at.right(j, 0));
      const Vector<uint32_t, 4> b_low = right.values.load_matrices(at.right(j, kDims));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto& sums = products.values[j / 8 + half];
        mma<kType>(sums, a_high, b_high[2 * half], b_high[2 * half + 1]);
        mma<kType>(sums, a_high, b_low[2 * half], b_low[2 * half + 1]);
        mma<kType>(sums, a_low, b_high[2 * half], b_high[2 * half + 1]);
      }
    }
  }
};

// Shared memory of one product at a time. A slab is filled while the one before it is multiplied.
template <class Scheme>
struct TileSlabs {
  typename Scheme::template Slab<Scheme::kRows> left[2];
  typename Scheme::template Slab<kTileColumns> right[2];
};

// The rows of a slab as its threads fetch them: a warp two pieces of 16 rows at a time, which are
// whole sectors of memory, and stores that do not conflict.
template <class Scheme, class T, int rows>
class SlabFetch {
  static constexpr int kGroups = rows / 16;
  static constexpr int kParts = kGroups * (Scheme::kDepth / Scheme::kPiece / 2);
  static_assert(kParts % kTileWarps == 0, "all warps fetch equally");

 public:
  FASTZOO_DEVICE void fetch(const Rows<T>& tile, int64_t d) {
#pragma unroll
    for (int i = 0; i < kParts / kTileWarps; ++i) {
      pieces_[i] = tile.template load<Scheme::kPiece>(row(i), d + depth(i));
    }
  }
  template <class Slab>
  FASTZOO_DEVICE void put(Slab& slab) const {
#pragma unroll
    for (int i = 0; i < kParts / kTileWarps; ++i) slab.put(row(i), depth(i), pieces_[i]);
  }

 private:
  FASTZOO_DEVICE static int part(int i) {
    return static_cast<int>(threadIdx.x) / kWarpSize + i * kTileWarps;
  }
  FASTZOO_DEVICE static int row(int i) { return part(i) % kGroups * 16 + threadIdx.x % 16; }
  FASTZOO_DEVICE static int depth(int i) {
    return (part(i) / kGroups * 2 + static_cast<int>(threadIdx.x) % kWarpSize / 16) *
           Scheme::kPiece;
  }

  Vector<T, Scheme::kPiece> pieces_[kParts / kTileWarps];
};

// All threads call multiply(), which passes at least one barrier before its products are made.
template <class Scheme, class T>
class TileProduct {
 public:
  using Products = typename Scheme::Products;

  FASTZOO_DEVICE explicit TileProduct(TileSlabs<Scheme>& slabs) : slabs_(slabs) {}

  // Of the tiles at the beginning of two matrices.
  FASTZOO_DEVICE Products multiply(const Rows<T>& left, const Rows<T>& right) {
    SlabFetch<Scheme, T, Scheme::kRows> left_fetch;
    SlabFetch<Scheme, T, kTileColumns> right_fetch;
    Products products;
    left_fetch.fetch(left, 0);
    right_fetch.fetch(right, 0);
    for (int64_t d = 0;;) {
      // A thread that is a slab ahead of others fills the one that they no longer read.
      left_fetch.put(slabs_.left[current_]);
      right_fetch.put(slabs_.right[current_]);
      sync_block();
      d += Scheme::kDepth;
      if (d < left.dims) {
        left_fetch.fetch(left, d);
        right_fetch.fetch(right, d);
      }
      Scheme::multiply_add(slabs_.left[current_], slabs_.right[current_], products);
      current_ ^= 1;
      if (d >= left.dims) return products;
    }
  }

 private:
  TileSlabs<Scheme>& slabs_;
  int current_ = 0;
};

// Of an index into a whole matrix, that into the tile that begins at `first`; -1 for another's.
FASTZOO_DEVICE int in_tile(int64_t index, int64_t first, int size) {
  return index >= first && index - first < size ? static_cast<int>(index - first) : -1;
}

// How many of the `size` rows from `first` on there are.
FASTZOO_DEVICE int tile_left(int64_t count, int64_t first, int size) {
  return count - first < size ? static_cast<int>(count - first) : size;
}

// The largest of what the lanes of one row hold, or their sum.
template <class Scheme, class C>
FASTZOO_DEVICE C row_maximum(C value) {
#pragma unroll
  for (int flip = Scheme::kRowLanes / 2; flip > 0; flip /= 2) {
    value = math::maximum(value, shuffle_xor(value, flip));
  }
  return value;
}
template <class Scheme, class C>
FASTZOO_DEVICE C row_sum(C value) {
#pragma unroll
  for (int flip = Scheme::kRowLanes / 2; flip > 0; flip /= 2) value += shuffle_xor(value, flip);
  return value;
}

// The grid: blocks of rows, and shares of the tiles of columns.
template <class Scheme>
dim3 tile_grid(int64_t rows, int64_t columns) {
  const unsigned row_blocks = std::max(blocks_for(rows, Scheme::kRows), 1u);
  const unsigned tiles = std::max(blocks_for(columns, kTileColumns), 1u);
  return dim3(row_blocks, std::min((kManyBlocks + row_blocks - 1) / row_blocks, tiles));
}

// Calls body(T{}, Scheme{}) for operands of a dtype: products in bfloat16 where these are wanted or
// stored, in float16 where those are stored, otherwise in the dtype itself.
template <class Body>
void dispatch_products(ScalarType dtype, bool bfloat16, const char* op, const Body& body) {
  dispatch_float(dtype, op, [&](auto value) {
    using T = decltype(value);
    if constexpr (std::is_same_v<T, double>) {
      body(value, FusedScheme<double>{});
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      body(value, MmaScheme<MmaType::bfloat16>{});
    } else if (bfloat16) {
      body(value, MmaScheme<MmaType::bfloat16>{});
    } else if constexpr (std::is_same_v<T, Half>) {
      body(value, MmaScheme<MmaType::float16>{});
    } else {
      body(value, FusedScheme<float>{});
    }
  });
}

}  // namespace fastzoo::cuda
