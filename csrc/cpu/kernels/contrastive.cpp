// Contrastive losses: the scores of a chunk of keys stay in cache, where they become the sums of
// rows and columns, or gradients; no matrix of queries by keys is stored.
#include "contrastive.h"

#include <initializer_list>
#include <type_traits>

#include "../../math/contrastive.h"
#include "../runtime/pair_scores.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

template <class Element, class M>
struct Contrastive {
  using Pairs = PairScores<M>;
  using T = typename Pairs::T;
  using V = typename Pairs::V;
  using Word = typename Pairs::Word;
  using Tile = typename Pairs::Tile;
  static constexpr int kColumns = Pairs::kColumns;
  static constexpr int kRows = Pairs::kRows;
  static constexpr T kInf = static_cast<T>(__builtin_inf());
  static constexpr bool kDirect = std::is_same_v<Element, T>;

  const ContrastiveArgs& args;
  const Pairs pairs{args.count, args.dims, chunk_rows(args.keys_count, args.parts, kRows)};
  const int64_t group = pairs.group_blocks();
  const int64_t padded = pairs.blocks() * kColumns;
  const T scale = static_cast<const T*>(args.scale)[0];
  const T bias = static_cast<const T*>(args.bias)[0];
  // What depends on a query, [padded] each. Those beyond the last score -inf with every key.
  struct Lanes {
    T *bias, *reference, *grad_row, *dot;
    int64_t *excluded, *positive;
  } lanes{};
  Word *packed = nullptr, *across = nullptr;
  // What a part of the keys finds.
  struct Part {
    T *highest, *sum;  // forward: the sum of exp(score - highest), or of log(1 + exp(score))
    T* gradient;       // backward
    double* scalars;   // backward: the gradients of scale and bias
    typename Pairs::Chunk chunk;
    T* references;  // forward: of a group's lanes
    T* vectors;     // forward, columns: [chunk][V::size], what a key finds in each lane
    T* column;      // the keys' references in the chunk
    Marks excluded;
    T* sums;  // [chunk][dims]: the keys' gradients, where dtype is not their type
  };
  char* parts = nullptr;
  int64_t part_bytes = 0;
  int64_t bytes = 0;

  explicit Contrastive(const ContrastiveArgs& args) : args(args) {
    Arena arena(args.memory);
    packed = arena.take<Word>(pairs.lanes_size());
    if (args.backward && args.needs_keys) across = arena.take<Word>(pairs.across_size());
    for (T** array : {&lanes.bias, &lanes.reference, &lanes.grad_row, &lanes.dot}) {
      *array = arena.take<T>(padded);
    }
    lanes.excluded = arena.take<int64_t>(padded);
    lanes.positive = arena.take<int64_t>(padded);
    Arena counter;
    take_part(counter);
    part_bytes = counter.bytes();
    parts = arena.take<char>(part_bytes * args.parts);
    bytes = arena.bytes();
  }

  Part take_part(Arena& arena) const {
    Part part{};
    part.chunk = pairs.take(arena, group, args.backward);
    part.column = arena.take<T>(pairs.chunk);
    part.excluded.bits = arena.take<uint32_t>(pairs.chunk);
    if (args.backward) {
      part.gradient = arena.take<T>(args.needs_queries ? pairs.sums_size() : 0);
      part.scalars = arena.take<double>(2);
      if (!kDirect) part.sums = arena.take<T>(pairs.chunk * args.dims);
    } else {
      part.highest = arena.take<T>(padded);
      part.sum = arena.take<T>(padded);
      part.references = arena.take<T>(group * kColumns);
      part.vectors = arena.take<T>(pairs.chunk * V::size);
    }
    return part;
  }

  Part part_of(int index) const {
    Arena arena(parts + index * part_bytes);
    return take_part(arena);
  }

  int64_t chunks() const { return (args.keys_count + pairs.chunk - 1) / pairs.chunk; }

  // n counts in the range of queries at hand.
  const Element* query(int64_t n) const {
    return static_cast<const Element*>(args.queries) + (args.first + n) * args.dims;
  }
  const Element* key(int64_t m) const {
    return static_cast<const Element*>(args.keys) + m * args.dims;
  }
  T of_query(const void* array, int64_t n) const {
    return static_cast<const T*>(array)[args.first + n];
  }

  // ---- before the keys -------------------------------------------------------------------------

  void prepare(int64_t block) const {
    pairs.pack_lanes(
        block, [&](int64_t n, int64_t d) { return static_cast<T>(widen(query(n)[d])); }, packed,
        across);
    for (int64_t n = block * kColumns; n < (block + 1) * kColumns; ++n) {
      const bool inside = n < args.count;
      lanes.bias[n] = inside ? bias : -kInf;
      lanes.excluded[n] = inside && args.exclude_self ? args.first + n : -1;
      lanes.positive[n] = inside ? args.positives[args.first + n] : -1;
      lanes.reference[n] = kInf;
      lanes.grad_row[n] = lanes.dot[n] = T(0);
      if (!inside) continue;
      if (lanes.positive[n] >= 0) {
        const Element *const a = query(n), *const b = key(lanes.positive[n]);
        lanes.dot[n] = static_cast<T>(wide_sum(
            args.dims, [&](int64_t d) { return static_cast<double>(widen(a[d])) * widen(b[d]); }));
      }
      if (args.backward) {
        lanes.grad_row[n] = of_query(args.grad_row, n);
        lanes.reference[n] = gradient_reference(lanes.grad_row[n], of_query(args.saved_row, n));
      } else {
        static_cast<T*>(args.positive)[args.first + n] =
            lanes.positive[n] >= 0 ? scale * lanes.dot[n] + bias : T(0);
      }
    }
  }

  // ---- a part of the keys ----------------------------------------------------------------------

  void run(int index) const {
    const Part part = part_of(index);
    if (args.backward) {
      part.scalars[0] = part.scalars[1] = 0;
      const int64_t size = args.needs_queries ? pairs.sums_size() : 0;
      for (int64_t i = 0; i < size; ++i) part.gradient[i] = T(0);
    } else {
      for (int64_t n = 0; n < padded; ++n) {
        part.highest[n] = -kInf;
        part.sum[n] = T(0);
      }
    }
    for (int64_t r = 0; r < pairs.chunk; ++r) part.excluded.bits[r] = 0;
    const bool with_columns = !args.backward && args.columns;
    const int64_t last = chunks() * (index + 1) / args.parts;
    for (int64_t chunk = chunks() * index / args.parts; chunk < last; ++chunk) {
      const int64_t m = chunk * pairs.chunk;
      const int64_t rows = args.keys_count - m < pairs.chunk ? args.keys_count - m : pairs.chunk;
      pairs.pack_rows(part.chunk, key(m), rows, [](int64_t, T) {});
      for (int64_t r = 0; r < rows && with_columns && args.first == 0; ++r) {
        static_cast<T*>(args.column)[m + r] = -kInf;
        static_cast<T*>(args.column_sum)[m + r] = T(0);
      }
      for (int64_t first = 0; first < pairs.blocks(); first += group) {
        const int64_t count = pairs.blocks() - first < group ? pairs.blocks() - first : group;
        pairs.multiply(part.chunk, rows, packed, first, count);
        if (args.backward) {
          carry_back(part, m, rows, first, count);
        } else if (args.sigmoid) {
          each_block(part, m, rows, first, count,
                     [&](int64_t n, T* scores) { add_softplus(part, rows, n, scores); });
        } else if (with_columns) {
          add_exponentials<true>(part, m, rows, first, count);
        } else {
          add_exponentials<false>(part, m, rows, first, count);
        }
      }
      if (args.backward && args.needs_keys && !kDirect) {
        Element* const out = static_cast<Element*>(args.grad_keys) + m * args.dims;
        for (int64_t i = 0; i < rows * args.dims; ++i) narrow(part.sums[i], out[i]);
      }
      const bool last_range = args.first + args.count == args.queries_count;
      for (int64_t r = 0; r < rows && with_columns && last_range; ++r) finish_column(m + r);
    }
  }

  // Calls body(first lane, scores) for each block of a group, its excluded pairs marked.
  template <class Body>
  __attribute__((always_inline)) void each_block(const Part& part, int64_t m, int64_t rows,
                                                 int64_t first, int64_t count,
                                                 const Body& body) const {
    for (int64_t block = 0; block < count; ++block) {
      const int64_t n = (first + block) * kColumns;
      part.excluded.template set<kColumns>(lanes.excluded + n, m, rows);
      body(n, pairs.scores_of(part.chunk, block));
      part.excluded.template clear<kColumns>(lanes.excluded + n, m, rows);
    }
  }

  __attribute__((always_inline)) V score(const Part& part, const T* scores, int64_t r, int h,
                                         V lane_bias) const {
    const V z =
        fused_multiply_add(V(scale), V::load(scores + r * kColumns + h * V::size), lane_bias);
    return select(part.excluded.template of<V>(r, h), V(-kInf), z);
  }

  void add_softplus(const Part& part, int64_t rows, int64_t n, const T* scores) const {
    V lane_bias[2], sum[2];
    for (int h = 0; h < 2; ++h) {
      lane_bias[h] = V::load(lanes.bias + n + h * V::size);
      sum[h] = V(T(0));
    }
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        sum[h] = sum[h] + math::softplus(score(part, scores, r, h, lane_bias[h]));
      }
    }
    for (int h = 0; h < 2; ++h) {
      T* const sums = part.sum + n + h * V::size;
      (V::load(sums) + sum[h]).store(sums);
    }
  }

  template <bool kWithColumns>
  void add_exponentials(const Part& part, int64_t m, int64_t rows, int64_t first,
                        int64_t count) const {
    T* const column_highest = static_cast<T*>(args.column) + m;
    T* const column_sum = static_cast<T*>(args.column_sum) + m;
    if constexpr (kWithColumns) {
      for (int64_t i = 0; i < rows * V::size; ++i) part.vectors[i] = -kInf;
    }
    each_block(part, m, rows, first, count, [&](int64_t n, T* scores) {
      find_highest<kWithColumns>(part, rows, n, first * kColumns, scores);
    });
    if constexpr (kWithColumns) {
      for (int64_t r = 0; r < rows; ++r) {
        const T before = column_highest[r];
        const T after = math::maximum(before, lane_maximum(V::load(part.vectors + r * V::size)));
        part.column[r] = after > -kInf ? after : T(0);
        column_highest[r] = after;
        column_sum[r] *= math::exponential(before - part.column[r]);
        V(T(0)).store(part.vectors + r * V::size);
      }
    }
    for (int64_t block = 0; block < count; ++block) {
      sum_exponentials<kWithColumns>(part, rows, (first + block) * kColumns, first * kColumns,
                                     pairs.scores_of(part.chunk, block));
    }
    if constexpr (kWithColumns) {
      for (int64_t r = 0; r < rows; ++r) {
        column_sum[r] += lane_sum(V::load(part.vectors + r * V::size));
      }
    }
  }

  template <bool kWithColumns>
  void find_highest(const Part& part, int64_t rows, int64_t n, int64_t group_first,
                    T* scores) const {
    V lane_bias[2], top[2];
    for (int h = 0; h < 2; ++h) {
      lane_bias[h] = V::load(lanes.bias + n + h * V::size);
      top[h] = V(-kInf);
    }
    for (int64_t r = 0; r < rows; ++r) {
      V z[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        z[h] = score(part, scores, r, h, lane_bias[h]);
        z[h].store(scores + r * kColumns + h * V::size);
        top[h] = maximum(top[h], z[h]);
      }
      if constexpr (kWithColumns) {
        T* const highest = part.vectors + r * V::size;
        maximum(V::load(highest), maximum(z[0], z[1])).store(highest);
      }
    }
    for (int h = 0; h < 2; ++h) {
      const int64_t at = n + h * V::size;
      raise_highest(part.highest + at, part.sum + at, top[h])
          .store(part.references + at - group_first);
    }
  }

  template <bool kWithColumns>
  void sum_exponentials(const Part& part, int64_t rows, int64_t n, int64_t group_first,
                        const T* scores) const {
    V reference[2], sum[2];
    for (int h = 0; h < 2; ++h) {
      reference[h] = V::load(part.references + n - group_first + h * V::size);
      sum[h] = V(T(0));
    }
    for (int64_t r = 0; r < rows; ++r) {
      V column(T(0));
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const V z = V::load(scores + r * kColumns + h * V::size);
        sum[h] = sum[h] + exponential(z - reference[h]);
        if constexpr (kWithColumns) column = column + exponential(z - V(part.column[r]));
      }
      if constexpr (kWithColumns) {
        T* const sums = part.vectors + r * V::size;
        (V::load(sums) + column).store(sums);
      }
    }
    for (int h = 0; h < 2; ++h) {
      T* const sums = part.sum + n + h * V::size;
      (V::load(sums) + sum[h]).store(sums);
    }
  }

  void finish_column(int64_t m) const {
    T& column = static_cast<T*>(args.column)[m];
    const double highest = column > -kInf ? column : 0;
    const double sum = static_cast<const T*>(args.column_sum)[m];
    column = static_cast<T>(highest + ::log(sum));
  }

  void carry_back(const Part& part, int64_t m, int64_t rows, int64_t first, int64_t count) const {
    const bool with_columns = args.grad_column != nullptr;
    const T* const grad_column =
        with_columns ? static_cast<const T*>(args.grad_column) + m : nullptr;
    if (with_columns) {
      for (int64_t r = 0; r < rows; ++r) {
        part.column[r] =
            gradient_reference(grad_column[r], static_cast<const T*>(args.saved_column)[m + r]);
      }
    }
    each_block(part, m, rows, first, count, [&](int64_t n, T* scores) {
      if (args.sigmoid) {
        find_gradients<true, false>(part, rows, n, nullptr, scores);
      } else if (with_columns) {
        find_gradients<false, true>(part, rows, n, grad_column, scores);
      } else {
        find_gradients<false, false>(part, rows, n, nullptr, scores);
      }
    });
    if (!args.needs_queries && !args.needs_keys) return;
    for (int64_t n = first * kColumns; n < (first + count) * kColumns; ++n) {
      const int64_t r = lanes.positive[n] - m;
      if (lanes.positive[n] < 0 || r < 0 || r >= rows) continue;
      T* const scores = pairs.scores_of(part.chunk, n / kColumns - first);
      scores[r * kColumns + n % kColumns] += of_query(args.grad_positive, n) * scale;
    }
    pairs.finish_gradients(part.chunk, rows, count);
    if (args.needs_queries) {
      pairs.add_lane_gradients(part.chunk, rows, first, count, part.gradient);
    }
    if (!args.needs_keys) return;
    T* sums = part.sums;
    if constexpr (kDirect) sums = static_cast<T*>(args.grad_keys) + m * args.dims;
    const bool starts = first == 0 && args.first == 0;
    pairs.row_gradients(part.chunk, rows, across, first, count,
                        [&](int64_t r, int64_t d, const Tile& tile) __attribute__((always_inline)) {
                          pairs.add_tile(tile, r, rows, d, starts, nullptr, key(m), sums);
                        });
  }

  // Writes the gradients of the dot products over the scores.
  template <bool kSigmoid, bool kWithColumns>
  void find_gradients(const Part& part, int64_t rows, int64_t n, const T* grad_column,
                      T* scores) const {
    V lane_bias[2], reference[2], grad_row[2], by_scale[2], by_bias[2];
    for (int h = 0; h < 2; ++h) {
      lane_bias[h] = V::load(lanes.bias + n + h * V::size);
      reference[h] = V::load(lanes.reference + n + h * V::size);
      grad_row[h] = V::load(lanes.grad_row + n + h * V::size);
      by_scale[h] = by_bias[h] = V(T(0));
    }
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        T* const at = scores + r * kColumns + h * V::size;
        const V dot = V::load(at);
        const V z = score(part, scores, r, h, lane_bias[h]);
        V dz;
        if constexpr (kSigmoid) {
          dz = grad_row[h] * math::sigmoid(z);
        } else {
          dz = grad_row[h] * exponential(z - reference[h]);
          if constexpr (kWithColumns) {
            dz = fused_multiply_add(V(grad_column[r]), exponential(z - V(part.column[r])), dz);
          }
        }
        by_scale[h] = fused_multiply_add(dz, dot, by_scale[h]);
        by_bias[h] = by_bias[h] + dz;
        (dz * V(scale)).store(at);
      }
    }
    part.scalars[0] += static_cast<double>(lane_sum(by_scale[0] + by_scale[1]));
    part.scalars[1] += static_cast<double>(lane_sum(by_bias[0] + by_bias[1]));
  }

  // ---- after the keys --------------------------------------------------------------------------

  void finish(int64_t block, double* sums) const {
    const int64_t last = (block + 1) * kColumns < args.count ? (block + 1) * kColumns : args.count;
    for (int64_t n = block * kColumns; n < last; ++n) {
      if (!args.backward) {
        finish_row(n);
      } else if (args.needs_queries) {
        for (int64_t d = 0; d < args.dims; ++d) sums[d] = 0;
        for (int index = 0; index < args.parts; ++index) {
          pairs.collect(part_of(index).gradient, n, sums);
        }
        Element* const out =
            static_cast<Element*>(args.grad_queries) + (args.first + n) * args.dims;
        for (int64_t d = 0; d < args.dims; ++d) narrow(sums[d], out[d]);
      }
    }
  }

  void finish_row(int64_t n) const {
    double highest = -static_cast<double>(kInf), sum = 0;
    for (int index = 0; index < args.parts; ++index) {
      highest = math::maximum(highest, static_cast<double>(part_of(index).highest[n]));
    }
    const double reference = args.sigmoid || !(highest > -kInf) ? 0 : highest;
    for (int index = 0; index < args.parts; ++index) {
      const Part part = part_of(index);
      const double share =
          args.sigmoid ? 1 : ::exp(static_cast<double>(part.highest[n]) - reference);
      sum += static_cast<double>(part.sum[n]) * share;
    }
    static_cast<T*>(args.row)[args.first + n] =
        static_cast<T>(args.sigmoid ? sum : reference + ::log(sum));
  }

  void add_scalars() const {
    for (int index = 0; index < args.parts; ++index) {
      args.grad_scalars[0] += part_of(index).scalars[0];
      args.grad_scalars[1] += part_of(index).scalars[1];
    }
    for (int64_t n = 0; n < args.count; ++n) {
      if (lanes.positive[n] < 0) continue;
      const double grad = of_query(args.grad_positive, n);
      args.grad_scalars[0] += grad * lanes.dot[n];
      args.grad_scalars[1] += grad;
    }
    static_cast<T*>(args.grad_scale)[0] = static_cast<T>(args.grad_scalars[0]);
    static_cast<T*>(args.grad_bias)[0] = static_cast<T>(args.grad_scalars[1]);
  }
};

template <class Body>
FASTZOO_INLINE void with_contrastive(const ContrastiveArgs& args, const Body& body) {
  with_product(args.dtype, args.bfloat16_products, [&](auto element, auto multiply) {
    body(Contrastive<decltype(element), decltype(multiply)>(args));
  });
}

}  // namespace

void contrastive_plan(const ContrastiveArgs& args, ContrastivePlan& plan) {
  with_contrastive(args, [&](const auto& contrastive) {
    plan.bytes = contrastive.bytes;
    plan.blocks = contrastive.pairs.blocks();
    plan.chunks = contrastive.chunks();
  });
}

void contrastive_prepare(const ContrastiveArgs& args, int64_t begin, int64_t end) {
  with_contrastive(args, [&](const auto& contrastive) {
    for (int64_t block = begin; block < end; ++block) contrastive.prepare(block);
  });
}

void contrastive_part(const ContrastiveArgs& args, int part) {
  with_contrastive(args, [&](const auto& contrastive) { contrastive.run(part); });
}

void contrastive_finish(const ContrastiveArgs& args, int64_t begin, int64_t end, double* sums) {
  with_contrastive(args, [&](const auto& contrastive) {
    for (int64_t block = begin; block < end; ++block) contrastive.finish(block, sums);
  });
}

void contrastive_scalars(const ContrastiveArgs& args) {
  with_contrastive(args, [&](const auto& contrastive) { contrastive.add_scalars(); });
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
