// Steps of samplers and solvers: each element by itself, tile by tile, in blocks of a few vectors
// whose sums stay in registers while the terms go by. Earlier rows and noise are terms too, of
// arrays that stay in L1. Where samples are short a tile has several, and what differs from one to
// the next is written out for each element.
#include "ode_step.h"

#include <type_traits>

#include "../runtime/convert.h"
#include "../runtime/counter_random.h"
#include "../runtime/rows.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using Place = StepTiles::Place;
using math::kStepTensors;

constexpr int kBlockVectors = 8;
template <class T>
constexpr int64_t kBlock = kBlockVectors * Vec<T>::size;

template <class T>
using BlockOf = Vec<T>[kBlockVectors];

// Calls body(Element{}) for what tensors may hold that are computed in T.
template <class T, class Body>
FASTZOO_INLINE void with_element_of(Dtype dtype, const Body& body) {
  if constexpr (std::is_same_v<T, double>) {
    body(double{});
  } else if (dtype == Dtype::float32) {
    body(float{});
  } else if (dtype == Dtype::float16) {
    body(Half{});
  } else {
    body(BFloat16{});
  }
}

template <class T, class Element>
FASTZOO_INLINE void load_block(const Element* p, BlockOf<T>& values) {
#pragma GCC unroll 8
  for (int j = 0; j < kBlockVectors; ++j) values[j] = load_wide(p + j * Vec<T>::size);
}

// A number for all elements of a tile, or one for each.
template <class T>
struct Number {
  T value;
  const T* each;

  __attribute__((always_inline)) Vec<T> at(int64_t i) const {
    return each == nullptr ? Vec<T>(value) : Vec<T>::load(each + i);
  }
  __attribute__((always_inline)) bool is(T other) const {
    return each == nullptr && value == other;
  }
};

// Those of the samples of a tile, where of(sample) is one: written out in `room`, which has place
// for a block more, unless there is one sample or they are `alike`.
template <class T, class Of>
FASTZOO_INLINE Number<T> spread(const Place& at, bool alike, T* room, const Of& of) {
  if (alike || at.samples == 1) return {static_cast<T>(of(at.sample)), nullptr};
  for (int64_t sample = 0; sample < at.samples; ++sample) {
    const Vec<T> value(static_cast<T>(of(at.sample + sample)));
    T* const own = room + sample * at.width;
    for (int64_t i = 0; i < at.width; i += Vec<T>::size) value.store(own + i);
  }
  return {T(0), room};
}
template <class T>
FASTZOO_INLINE Number<T> spread(const Place& at, const StepNumbers& numbers, T* room) {
  const T* const data = static_cast<const T*>(numbers.data);
  return spread(at, !numbers.each, room, [&](int64_t i) { return data[numbers.each ? i : 0]; });
}

constexpr int kMostTerms = kStepTensors + math::kStepRows;  // earlier rows and noise among them

// What lies beyond the whole blocks of a tile, copied to where whole ones can be read.
template <class T>
struct alignas(kVectorBytes) Rests {
  char data[kMostTerms][kBlock<T> * sizeof(T)];

  // Of the elements from `begin` on, fewer than a block.
  const void* copy(int k, const void* from, Dtype dtype, int64_t begin, int64_t count) {
    with_element_of<T>(dtype, [&](auto element) {
      using Element = decltype(element);
      copy_few<sizeof(data[k])>(static_cast<const Element*>(from) + begin, data[k],
                                count * sizeof(Element));
    });
    return data[k];
  }
};

// Where the elements from `first` on are.
template <class T>
FASTZOO_INLINE const void* data_from(const StepTensor& tensor, int64_t first) {
  const void* data = nullptr;
  with_element_of<T>(tensor.dtype, [&](auto element) {
    data = static_cast<const decltype(element)*>(tensor.data) + first;
  });
  return data;
}

// ---- the step

template <class T>
struct Term {
  int tensor;        // which, or kStepTensors
  const void* data;  // of the tile
  Dtype dtype;
  Number<T> weight;
  bool scaled;  // by the factors of the elements
};

template <class T>
struct Row {
  Term<T> terms[kMostTerms];
  int count;
  bool plain;  // whether all weights are the same for all elements
  bool noisy;
  bool bounded, divided;
  Number<T> bound, factor;

  __attribute__((always_inline)) void add(const Term<T>& term) {
    if (term.weight.is(T(0))) return;
    plain = plain && term.weight.each == nullptr && !term.scaled;
    terms[count++] = term;
  }
};

// Where a row's values go: each that is not nullptr.
template <class Element, class T>
struct Target {
  T* values;
  Element* elements;
  const uint32_t* words;  // that round the elements
  bool streams;
};

template <class Element>
struct OdeStep {
  using T = typename ComputeOf<Element>::type;
  using V = Vec<T>;
  using Block = BlockOf<T>;
  static constexpr int64_t kRoom = kShortTile + kBlock<T>, kTileRoom = kStepTile + kBlock<T>;
  static constexpr bool kRounds = sizeof(Element) == 2;

  struct alignas(kVectorBytes) Scratch {
    T values[math::kStepRows - 1][kTileRoom];
    T noise[kTileRoom];
    float normals[kStepTile + kRandomAtOnce];  // of which noise is made, where T is double
    uint32_t words[kTileRoom];
    Rests<T> rests;
    T factor[kRoom], threshold[kRoom];
    T table[math::kStepRows][math::kStepNumbers][kRoom];
  };

  const OdeStepArgs& args;
  StepTiles tiles;
  Scratch& scratch;
  Row<T> rows[math::kStepRows];
  int64_t prepared = -1;  // the sample that the numbers are of, where it is one

  __attribute__((always_inline)) OdeStep(const OdeStepArgs& args, Scratch& scratch)
      : args(args), tiles(args.tiles()), scratch(scratch) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const Place at = tiles.place(tile);
      if (at.samples > 1 || at.sample != prepared) prepare(at);
      prepared = at.samples > 1 ? -1 : at.sample;
      this->tile(at);
    }
  }

 private:
  const double* table_of(int64_t sample, int row) const {
    const int64_t first = args.table_each ? sample * args.rows : 0;
    return args.table + (first + row) * math::kStepNumbers;
  }

  Number<T> table_number(const Place& at, int row, int column) const {
    const auto of = [&](int64_t sample) { return table_of(sample, row)[column]; };
    if (args.table_each && at.samples > 1) {
      bool used = false;
      for (int64_t i = 0; i < at.samples; ++i) used |= of(at.sample + i) != 0;
      if (!used) return {T(0), nullptr};
    }
    return spread(at, !args.table_each, scratch.table[row][column], of);
  }

  void prepare(const Place& at) {
    constexpr T kInfinity = static_cast<T>(__builtin_inf());
    constexpr Dtype kCompute = std::is_same_v<T, double> ? Dtype::float64 : Dtype::float32;
    Number<T> factor{T(1), nullptr}, threshold;
    if (args.factor.data != nullptr) factor = spread(at, args.factor, scratch.factor);
    if (args.threshold.data != nullptr) threshold = spread(at, args.threshold, scratch.threshold);
    for (int r = 0; r < args.rows; ++r) {
      Row<T>& row = rows[r];
      const bool last = r + 1 == args.rows;
      row.count = 0;
      row.plain = true;
      row.factor = factor;
      for (int k = 0; k < kStepTensors; ++k) {
        if (args.tensors[k].data == nullptr) continue;
        Term<T> term{k, nullptr, args.tensors[k].dtype, table_number(at, r, k),
                     (args.scaled >> k & 1) != 0};
        if (term.scaled && factor.each == nullptr && term.weight.each == nullptr) {
          term.weight.value *= factor.value;
          term.scaled = false;
        }
        row.add(term);
      }
      for (int j = 0; j < r; ++j) {
        const Number<T> weight = table_number(at, r, math::kStepPrevious + j);
        row.add({kStepTensors, scratch.values[j], kCompute, weight, false});
      }
      const int before = row.count;
      if (last && args.keys != nullptr) {
        const Number<T> weight = table_number(at, r, math::kStepNoise);
        row.add({kStepTensors, noise(), kCompute, weight, false});
      }
      row.noisy = row.count > before;
      row.divided = r == 0 && !last && args.threshold.data != nullptr;
      row.bound = {kInfinity, nullptr};
      if (row.divided) {
        row.bound = threshold;
      } else if (!last) {
        row.bound = table_number(at, r, math::kStepBound);
      }
      row.bounded = row.divided || !row.bound.is(kInfinity);
    }
  }

  T* noise() const {
    if constexpr (std::is_same_v<T, float>) {
      return scratch.normals;
    } else {
      return scratch.noise;
    }
  }

  // The words or normals of a tile, of draws | `bits`.
  template <class Number>
  void random(const Place& at, uint32_t bits, Number* to) const {
    const int64_t* const keys = args.keys + 2 * at.sample;
    const auto draw = [&](int64_t i) {
      const double* const row = table_of(at.sample + i, args.rows - 1);
      return static_cast<uint32_t>(row[math::kStepDraw]) | bits;
    };
    if (at.samples > 1) {
      random_of_rows(keys, draw, at.samples, at.width, to);
    } else {
      random_of_row(keys, draw(0), at.begin, at.width, to);
    }
  }

  void tile(const Place& at) {
    const int last = args.rows - 1;
    if (rows[last].noisy) {
      random(at, 0, scratch.normals);
      if constexpr (std::is_same_v<T, double>) {
        for (int64_t i = 0; i < at.count(); ++i) scratch.noise[i] = scratch.normals[i];
      }
    }
    const bool stochastic = kRounds && args.stochastic;
    if (stochastic) random(at, math::kRoundingDraw, scratch.words);
    const int64_t first = at.sample * args.size + at.begin;
    for (int r = 0; r <= last; ++r) {
      void* const to = r == last ? args.out : args.kept[r];
      Target<Element, T> target{};
      if (to != nullptr) target.elements = static_cast<Element*>(to) + first;
      if (r < last) {
        target.values = scratch.values[r];
      } else {
        if (stochastic) target.words = scratch.words;
        target.streams = args.streams && !kRounds &&
                         reinterpret_cast<uintptr_t>(target.elements) % kVectorBytes == 0;
      }
      row_of_tile(rows[r], first, at.count(), target);
    }
  }

  void row_of_tile(Row<T>& row, int64_t first, int64_t count, const Target<Element, T>& target) {
    for (int k = 0; k < row.count; ++k) {
      Term<T>& term = row.terms[k];
      if (term.tensor < kStepTensors) term.data = data_from<T>(args.tensors[term.tensor], first);
    }
    const int64_t whole = count / kBlock<T> * kBlock<T>;
    if (whole > 0) (row.plain ? blocks<true> : blocks<false>)(row, whole, target);
    if (whole == count) return;
    Row<T> rest = row;
    for (int k = 0; k < rest.count; ++k) {
      Term<T>& term = rest.terms[k];
      term.data = scratch.rests.copy(k, term.data, term.dtype, whole, count - whole);
    }
    Block sum;
    sum_block<false>(rest, whole, 0, sum);
    put(sum, whole, count - whole, target);
  }

  // Of a copy of the row, which no store can be thought to change.
  template <bool kPlain>
  __attribute__((noinline)) static void blocks(const Row<T>& row_of, int64_t count,
                                               const Target<Element, T>& target_of) {
    const Row<T> row = row_of;
    const Target<Element, T> target = target_of;
    for (int64_t i = 0; i < count; i += kBlock<T>) {
      Block sum;
      sum_block<kPlain>(row, i, i, sum);
      put(sum, i, kBlock<T>, target);
    }
  }

  // Of the elements from i on, which the terms' data have from `offset` on.
  template <bool kPlain>
  FASTZOO_INLINE void sum_block(const Row<T>& row, int64_t i, int64_t offset, Block& sum) {
#pragma GCC unroll 8
    for (int j = 0; j < kBlockVectors; ++j) sum[j] = V(T(0));
    for (int k = 0; k < row.count; ++k) {
      const Term<T>& term = row.terms[k];
      with_element_of<T>(term.dtype, [&](auto element) {
        const auto* const x = static_cast<const decltype(element)*>(term.data) + offset;
        if constexpr (kPlain) {
          add_same(term, x, sum);
        } else {
          add_each(term, row.factor, x, i, sum);
        }
      });
    }
    if (!row.bounded) return;
    for (int j = 0; j < kBlockVectors; ++j) {
      const V bound = row.bound.at(i + j * V::size);
      sum[j] = row.divided ? math::thresholded(sum[j], bound) : math::clamp_to(sum[j], bound);
    }
  }

  template <class Stored>
  FASTZOO_INLINE void add_same(const Term<T>& term, const Stored* x, Block& sum) {
    const V weight(term.weight.value);
#pragma GCC unroll 8
    for (int j = 0; j < kBlockVectors; ++j) {
      sum[j] = fused_multiply_add(weight, load_wide(x + j * V::size), sum[j]);
    }
  }

  template <class Stored>
  FASTZOO_INLINE void add_each(const Term<T>& term, const Number<T>& factor, const Stored* x,
                               int64_t i, Block& sum) {
    Block weights;
#pragma GCC unroll 8
    for (V& weight : weights) weight = V(term.weight.value);
    if (term.weight.each != nullptr) {
#pragma GCC unroll 8
      for (int j = 0; j < kBlockVectors; ++j) {
        weights[j] = V::load(term.weight.each + i + j * V::size);
      }
    }
    if (term.scaled) {
#pragma GCC unroll 8
      for (int j = 0; j < kBlockVectors; ++j) {
        weights[j] = weights[j] * factor.at(i + j * V::size);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kBlockVectors; ++j) {
      sum[j] = math::add_weighted(weights[j], load_wide(x + j * V::size), sum[j]);
    }
  }

  FASTZOO_INLINE void put(const Block& sum, int64_t i, int64_t count,
                          const Target<Element, T>& target) {
    if (target.values != nullptr) {
#pragma GCC unroll 8
      for (int j = 0; j < kBlockVectors; ++j) sum[j].store(target.values + i + j * V::size);
    }
    if (target.elements == nullptr) return;
    Element* const to = target.elements + i;
    if (target.words != nullptr) {
      put_rounded(sum, target.words + i, to, count);
    } else if (target.streams && count == kBlock<T>) {
      stream_block(sum, to);
    } else {
      put(sum, to, count);
    }
  }

  FASTZOO_INLINE void put(const Block& values, Element* to, int64_t count) {
    if (count == kBlock<T>) {
#pragma GCC unroll 8
      for (int j = 0; j < kBlockVectors; ++j) store_narrow(values[j], to + j * V::size);
    } else {
      Element stored[kBlock<T>];
      for (int j = 0; j < kBlockVectors; ++j) store_narrow(values[j], stored + j * V::size);
      copy_few<sizeof(stored)>(stored, to, count * sizeof(Element));
    }
  }

  FASTZOO_INLINE void stream_block(const Block& values, Element* to) {
    if constexpr (!kRounds) {
#pragma GCC unroll 8
      for (int j = 0; j < kBlockVectors; ++j) stream(values[j], to + j * V::size);
    }
  }

  FASTZOO_INLINE void put_rounded(const Block& values, const uint32_t* words, Element* to,
                                  int64_t count) {
    if constexpr (kRounds) {
      Element stored[kBlock<T>];
      for (int j = 0; j < kBlockVectors; ++j) {
        Element* const own = stored + j * V::size;
        store_narrow(values[j], own);
        const Words word = Words::load(words + j * V::size);
        const Words nearest = Words::load_lower(&own->bits);
        if constexpr (std::is_same_v<Element, Half>) {
          math::stochastic_half(values[j], word, nearest).store_lower(&own->bits);
        } else {
          math::stochastic_bfloat16(values[j], word, nearest).store_lower(&own->bits);
        }
      }
      if (count == kBlock<T>) {
        __builtin_memcpy(to, stored, sizeof(stored));
      } else {
        copy_few<sizeof(stored)>(stored, to, count * sizeof(Element));
      }
    }
  }
};

// ---- words and normals

template <class Number>
void random_of_tile(const CounterArgs& args, const Place& at, Number* to) {
  const int64_t* const keys = args.keys + 2 * at.sample;
  if (at.samples > 1) {
    random_of_rows(keys, [&](int64_t) { return args.draw; }, at.samples, at.width, to);
  } else {
    random_of_row(keys, args.draw, at.begin, at.width, to);
  }
}

// Calls block(data, offset, i) for the elements from i on of a tile's, block by block: tensor k has
// them from data[k] + offset on.
template <class T, class Block>
FASTZOO_INLINE void over_blocks(const StepTensor (&tensors)[kStepTensors], int64_t first,
                                int64_t count, Rests<T>& rests, const Block& block) {
  const void* data[kStepTensors];
  for (int k = 0; k < kStepTensors; ++k) {
    data[k] = tensors[k].data == nullptr ? nullptr : data_from<T>(tensors[k], first);
  }
  int64_t i = 0;
  for (; i + kBlock<T> <= count; i += kBlock<T>) block(data, i, i);
  if (i == count) return;
  for (int k = 0; k < kStepTensors; ++k) {
    if (data[k] != nullptr) data[k] = rests.copy(k, data[k], tensors[k].dtype, i, count - i);
  }
  block(data, 0, i);
}

// ---- guidance

template <class T>
FASTZOO_INLINE Moments moments_of(const T* values, int64_t count) {
  using V = Vec<T>;
  constexpr int kChains = 4;  // of additions at a time
  constexpr int64_t kStep = kChains * V::size;
  const int64_t whole = count / kStep * kStep;
  const V zero(T(0));
  // Calls visit(chain, values, mask of those that count).
  const auto over_vectors = [&](const auto& visit) {
    constexpr auto kAll = V::MaskType::kAll;
    for (int64_t i = 0; i < whole; i += kStep) {
#pragma GCC unroll 4
      for (int j = 0; j < kChains; ++j) visit(j, V::load(values + i + j * V::size), {kAll});
    }
    for (int64_t i = whole; i < count; i += V::size) {
      const int64_t rest = count - i;
      const uint32_t bits = rest < V::size ? (1u << rest) - 1 : kAll;
      visit(0, V::load(values + i), typename V::MaskType{bits});
    }
  };
  const auto joined = [](const V(&chains)[kChains]) {
    return lane_sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
  };
  V sums[kChains] = {zero, zero, zero, zero}, squares[kChains] = {zero, zero, zero, zero};
  over_vectors([&](int j, V value, typename V::MaskType counts) {
    sums[j] = sums[j] + select(counts, value, zero);
  });
  // Distances are from what is close to the mean; how close, their sum tells.
  const T middle = joined(sums) / static_cast<T>(count);
  for (V& sum : sums) sum = zero;
  over_vectors([&](int j, V value, typename V::MaskType counts) {
    const V distance = select(counts, value - V(middle), zero);
    sums[j] = sums[j] + distance;
    squares[j] = fused_multiply_add(distance, distance, squares[j]);
  });
  const double size = static_cast<double>(count), off = joined(sums) / size;
  return {middle + off, joined(squares) - off * off * size};
}

template <class T>
struct Guidance {
  struct alignas(kVectorBytes) Scratch {
    T cond[kStepTile + kBlock<T>], guided[kStepTile + kBlock<T>];
    T guidance[kShortTile + kBlock<T>];
    Rests<T> rests;
  };

  static void tile(const GuidanceArgs& args, const Place& at, Moments* parts, Scratch& scratch) {
    const double* const by = static_cast<const double*>(args.guidance.data);
    const Number<T> guidance = spread(at, !args.guidance.each, scratch.guidance,
                                      [&](int64_t i) { return by[args.guidance.each ? i : 0]; });
    const StepTensor tensors[kStepTensors] = {args.cond, args.uncond};
    over_blocks<T>(tensors, at.sample * args.size + at.begin, at.count(), scratch.rests,
                   [&](const void* const(&data)[kStepTensors], int64_t offset, int64_t i) {
                     BlockOf<T> cond, uncond;
                     with_element_of<T>(args.cond.dtype, [&](auto element) {
                       load_block<T>(static_cast<const decltype(element)*>(data[0]) + offset, cond);
                     });
                     with_element_of<T>(args.uncond.dtype, [&](auto element) {
                       load_block<T>(static_cast<const decltype(element)*>(data[1]) + offset,
                                     uncond);
                     });
                     for (int j = 0; j < kBlockVectors; ++j) {
                       const int64_t own = i + j * Vec<T>::size;
                       cond[j].store(scratch.cond + own);
                       fused_multiply_add(guidance.at(own), cond[j] - uncond[j], uncond[j])
                           .store(scratch.guided + own);
                     }
                   });
    for (int64_t sample = 0; sample < at.samples; ++sample) {
      parts[2 * sample] = moments_of(scratch.cond + sample * at.width, at.width);
      parts[2 * sample + 1] = moments_of(scratch.guided + sample * at.width, at.width);
    }
  }
};

// ---- errors of steps

template <class T>
struct StepError {
  struct alignas(kVectorBytes) Scratch {
    T squares[kStepTile + kBlock<T>];
    T factor[kShortTile + kBlock<T>];
    Rests<T> rests;
  };

  static void tile(const StepErrorArgs& args, const Place& at, double* parts, Scratch& scratch) {
    using V = Vec<T>;
    const Number<T> factor = spread(at, args.factor, scratch.factor);
    const V rtol(static_cast<T>(args.rtol)), atol(static_cast<T>(args.atol));
    with_element_of<T>(args.dtype, [&](auto element) {
      using Element = decltype(element);
      over_blocks<T>(args.tensors, at.sample * args.size + at.begin, at.count(), scratch.rests,
                     [&](const void* const(&data)[kStepTensors], int64_t offset, int64_t i) {
                       BlockOf<T> sum, x, y;
                       for (V& each : sum) each = V(T(0));
                       for (int k = 2; k < kStepTensors; ++k) {
                         const T weight = static_cast<T>(args.weights[k]);
                         if (data[k] == nullptr || weight == T(0)) continue;
                         load_block<T>(static_cast<const Element*>(data[k]) + offset, x);
                         for (int j = 0; j < kBlockVectors; ++j) {
                           sum[j] = fused_multiply_add(V(weight), x[j], sum[j]);
                         }
                       }
                       load_block<T>(static_cast<const Element*>(data[0]) + offset, x);
                       load_block<T>(static_cast<const Element*>(data[1]) + offset, y);
                       for (int j = 0; j < kBlockVectors; ++j) {
                         const int64_t own = i + j * V::size;
                         const V ratio =
                             factor.at(own) * sum[j] / math::error_scale(x[j], y[j], rtol, atol);
                         (ratio * ratio).store(scratch.squares + own);
                       }
                     });
    });
    sum_rows(scratch.squares, at.samples, at.width,
             [&](int64_t sample, T sum) { parts[sample] = sum; });
  }
};

template <class Kernel, class Args, class Part>
void over_tiles(const Args& args, Part* parts, int64_t each, int64_t begin, int64_t end) {
  typename Kernel::Scratch scratch;
  const StepTiles tiles = args.tiles();
  for (int64_t i = begin; i < end; ++i) {
    const Place at = tiles.place(i);
    const int64_t first = at.sample * tiles.pieces + i % tiles.pieces;
    Kernel::tile(args, at, parts + each * first, scratch);
  }
}

}  // namespace

void ode_step(const OdeStepArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Kernel = OdeStep<decltype(element)>;
    typename Kernel::Scratch scratch;
    Kernel(args, scratch).run(begin, end);
  });
  if (args.streams) stream_fence();
}

void counter_numbers(const CounterArgs& args, int64_t begin, int64_t end) {
  alignas(kVectorBytes) uint32_t words[kStepTile + kRandomAtOnce];
  alignas(kVectorBytes) float normals[kStepTile + kRandomAtOnce];
  const StepTiles tiles = args.tiles();
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = tiles.place(tile);
    const int64_t first = at.sample * args.size + at.begin, count = at.count();
    if (args.normals != nullptr) {
      random_of_tile(args, at, normals);
      copy_bytes(normals, args.normals + first, count * sizeof(float));
    } else {
      random_of_tile(args, at, words);
      for (int64_t i = 0; i < count; ++i) args.words[first + i] = words[i];
    }
  }
}

void guidance_moments(const GuidanceArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == Dtype::float64) {
    over_tiles<Guidance<double>>(args, args.parts, 2, begin, end);
  } else {
    over_tiles<Guidance<float>>(args, args.parts, 2, begin, end);
  }
}

void step_error(const StepErrorArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == Dtype::float64) {
    over_tiles<StepError<double>>(args, args.parts, 1, begin, end);
  } else {
    over_tiles<StepError<float>>(args, args.parts, 1, begin, end);
  }
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
