// Steps of samplers and solvers: each element by itself, in blocks of a few vectors whose sums stay
// in registers while the terms go by. Where samples are short a tile has several, and what differs
// from one to the next is written out for each element.
#include "ode_step.h"

#include <type_traits>

#include "../runtime/convert.h"
#include "../runtime/counter_random.h"
#include "../runtime/rows.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using Place = StepTiles::Place;
using math::kStepTensors;

constexpr int kBlockVectors = 4;
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
#pragma GCC unroll 4
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

// The blocks of tensors that lie beyond the whole blocks of a tile, copied to where there is room
// to read whole ones.
template <class T>
struct alignas(kVectorBytes) Rests {
  char data[kStepTensors][kBlock<T> * sizeof(T)];

  __attribute__((always_inline)) const void* copy(int k, const StepTensor& tensor, int64_t first,
                                                  int64_t count) {
    with_element_of<T>(tensor.dtype, [&](auto element) {
      using Element = decltype(element);
      copy_few<sizeof(data[k])>(static_cast<const Element*>(tensor.data) + first, data[k],
                                count * sizeof(Element));
    });
    return data[k];
  }
};

// Calls block(data, offset, i, count) for the elements [i, i + count) of a tile's, block by block:
// those of tensor k are from data[k] on, `offset` elements further.
template <class T, class Block>
FASTZOO_INLINE void over_blocks(const StepTensor (&tensors)[kStepTensors], int64_t first,
                                int64_t count, Rests<T>& rests, const Block& block) {
  const void* data[kStepTensors];
  for (int k = 0; k < kStepTensors; ++k) {
    data[k] = nullptr;
    if (tensors[k].data == nullptr) continue;
    with_element_of<T>(tensors[k].dtype, [&](auto element) {
      data[k] = static_cast<const decltype(element)*>(tensors[k].data) + first;
    });
  }
  int64_t i = 0;
  for (; i + kBlock<T> <= count; i += kBlock<T>) block(data, i, i, kBlock<T>);
  if (i == count) return;
  for (int k = 0; k < kStepTensors; ++k) {
    if (data[k] != nullptr) data[k] = rests.copy(k, tensors[k], first + i, count - i);
  }
  block(data, 0, i, count - i);
}

// ---- the step

template <class T>
struct Term {
  int tensor;
  Dtype dtype;
  Number<T> weight;
  bool scaled;  // by the factors of the elements
};

template <class T>
struct Row {
  Term<T> terms[kStepTensors];
  int count;
  Number<T> previous[math::kStepRows - 1];
  Number<T> noise, bound;
};

template <class Element>
struct OdeStep {
  using T = typename ComputeOf<Element>::type;
  using V = Vec<T>;
  using Block = BlockOf<T>;
  static constexpr int64_t kRoom = kShortTile + kBlock<T>;
  static constexpr bool kRounds = sizeof(Element) == 2;

  struct alignas(kVectorBytes) Scratch {
    T table[math::kStepRows][math::kStepNumbers][kRoom];
    T factor[kRoom], threshold[kRoom];
    float normals[kStepTile + kRandomAtOnce];
    uint32_t words[kStepTile + kRandomAtOnce];
    Rests<T> rests;
  };

  const OdeStepArgs& args;
  StepTiles tiles;
  Scratch& scratch;
  Row<T> rows[math::kStepRows];
  Number<T> factor, threshold;
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
    factor = {T(1), nullptr};
    if (args.factor.data != nullptr) factor = spread(at, args.factor, scratch.factor);
    threshold = {T(0), nullptr};
    if (args.threshold.data != nullptr) threshold = spread(at, args.threshold, scratch.threshold);
    for (int r = 0; r < args.rows; ++r) {
      Row<T>& row = rows[r];
      row.count = 0;
      for (int k = 0; k < kStepTensors; ++k) {
        if (args.tensors[k].data == nullptr) continue;
        Term<T> term{k, args.tensors[k].dtype, table_number(at, r, k), (args.scaled >> k & 1) != 0};
        if (term.scaled && factor.each == nullptr && term.weight.each == nullptr) {
          term.weight.value *= factor.value;
          term.scaled = false;
        }
        if (!term.weight.is(T(0))) row.terms[row.count++] = term;
      }
      for (int j = 0; j < r; ++j) row.previous[j] = table_number(at, r, math::kStepPrevious + j);
      const bool last = r + 1 == args.rows;
      row.noise = {T(0), nullptr};
      if (last && args.keys != nullptr) row.noise = table_number(at, r, math::kStepNoise);
      row.bound = {static_cast<T>(__builtin_inf()), nullptr};
      if (!last) row.bound = table_number(at, r, math::kStepBound);
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
    const bool noise = !rows[args.rows - 1].noise.is(T(0));
    if (noise) random(at, 0, scratch.normals);
    const bool stochastic = kRounds && args.stochastic;
    if (stochastic) random(at, math::kRoundingDraw, scratch.words);
    const int64_t first = at.sample * args.size + at.begin;
    Element* const out = static_cast<Element*>(args.out) + first;
    const bool streams =
        args.streams && !kRounds && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
    over_blocks<T>(
        args.tensors, first, at.count(), scratch.rests,
        [&](const void* const(&data)[kStepTensors], int64_t offset, int64_t i, int64_t count) {
          Block values[math::kStepRows];
          for (int r = 0; r + 1 < args.rows; ++r) {
            sum_row(r, data, offset, i, values);
            if (args.kept[r] == nullptr) continue;
            put(values[r], static_cast<Element*>(args.kept[r]) + first + i, count);
          }
          const int last = args.rows - 1;
          sum_row(last, data, offset, i, values);
          if (stochastic) {
            put_rounded(values[last], i, out + i, count);
          } else if (streams && count == kBlock<T>) {
            stream_block(values[last], out + i);
          } else {
            put(values[last], out + i, count);
          }
        });
  }

  __attribute__((always_inline)) void sum_row(int r, const void* const (&data)[kStepTensors],
                                              int64_t offset, int64_t i,
                                              Block (&values)[math::kStepRows]) const {
    const Row<T>& row = rows[r];
    Block sum;
    for (V& each : sum) each = V(T(0));
    for (int k = 0; k < row.count; ++k) {
      const Term<T>& term = row.terms[k];
      Block x;
      with_element_of<T>(term.dtype, [&](auto element) {
        load_block<T>(static_cast<const decltype(element)*>(data[term.tensor]) + offset, x);
      });
      if (term.weight.each == nullptr && !term.scaled) {
        const V weight(term.weight.value);
#pragma GCC unroll 4
        for (int j = 0; j < kBlockVectors; ++j) sum[j] = fused_multiply_add(weight, x[j], sum[j]);
      } else {
        const Number<T> scale = term.scaled ? factor : Number<T>{T(1), nullptr};
#pragma GCC unroll 4
        for (int j = 0; j < kBlockVectors; ++j) {
          const int64_t at = i + j * V::size;
          sum[j] = math::add_weighted(term.weight.at(at) * scale.at(at), x[j], sum[j]);
        }
      }
    }
    for (int j = 0; j < r; ++j) add(row.previous[j], values[j], i, sum);
    if (!row.noise.is(T(0))) {
      Block z;
      for (int j = 0; j < kBlockVectors; ++j) {
        const float* const from = scratch.normals + i + j * V::size;
        if constexpr (std::is_same_v<T, double>) {
          z[j] = load_doubles(from);
        } else {
          z[j] = V::load(from);
        }
      }
      add(row.noise, z, i, sum);
    }
    const bool thresholds = r == 0 && args.threshold.data != nullptr;
    if (thresholds || !row.bound.is(static_cast<T>(__builtin_inf()))) {
      for (int j = 0; j < kBlockVectors; ++j) {
        const int64_t at = i + j * V::size;
        sum[j] = thresholds ? math::thresholded(sum[j], threshold.at(at))
                            : math::clamp_to(sum[j], row.bound.at(at));
      }
    }
    for (int j = 0; j < kBlockVectors; ++j) values[r][j] = sum[j];
  }

  FASTZOO_INLINE void add(const Number<T>& weight, const Block& x, int64_t i, Block& sum) {
    if (weight.is(T(0))) return;
    for (int j = 0; j < kBlockVectors; ++j) {
      sum[j] = math::add_weighted(weight.at(i + j * V::size), x[j], sum[j]);
    }
  }

  FASTZOO_INLINE void put(const Block& values, Element* to, int64_t count) {
    if (count == kBlock<T>) {
#pragma GCC unroll 4
      for (int j = 0; j < kBlockVectors; ++j) store_narrow(values[j], to + j * V::size);
    } else {
      Element stored[kBlock<T>];
      for (int j = 0; j < kBlockVectors; ++j) store_narrow(values[j], stored + j * V::size);
      copy_few<sizeof(stored)>(stored, to, count * sizeof(Element));
    }
  }

  FASTZOO_INLINE void stream_block(const Block& values, Element* to) {
    if constexpr (!kRounds) {
      for (int j = 0; j < kBlockVectors; ++j) stream(values[j], to + j * V::size);
    }
  }

  __attribute__((always_inline)) void put_rounded(const Block& values, int64_t i, Element* to,
                                                  int64_t count) const {
    if constexpr (kRounds) {
      Element stored[kBlock<T>];
      for (int j = 0; j < kBlockVectors; ++j) {
        Element* const own = stored + j * V::size;
        store_narrow(values[j], own);
        const Words word = Words::load(scratch.words + i + j * V::size);
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

// ---- guidance

template <class T>
FASTZOO_INLINE Moments moments_of(const T* values, int64_t count) {
  using V = Vec<T>;
  const int64_t whole = count / V::size * V::size;
  const typename V::MaskType rest{(1u << (count - whole)) - 1};
  const V zero(T(0));
  V sum = select(rest, V::load(values + whole), zero);
  for (int64_t i = 0; i < whole; i += V::size) sum = sum + V::load(values + i);
  // Distances are from what is close to the mean; how close, their sum tells.
  const T middle = lane_sum(sum) / static_cast<T>(count);
  V by = select(rest, V::load(values + whole) - V(middle), zero);
  V squares = by * by;
  for (int64_t i = 0; i < whole; i += V::size) {
    const V distance = V::load(values + i) - V(middle);
    by = by + distance;
    squares = fused_multiply_add(distance, distance, squares);
  }
  const double off = static_cast<double>(lane_sum(by)) / static_cast<double>(count);
  return {middle + off, lane_sum(squares) - off * off * static_cast<double>(count)};
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
                   [&](const void* const(&data)[kStepTensors], int64_t offset, int64_t i, int64_t) {
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
      over_blocks<T>(
          args.tensors, at.sample * args.size + at.begin, at.count(), scratch.rests,
          [&](const void* const(&data)[kStepTensors], int64_t offset, int64_t i, int64_t) {
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
              const V ratio = factor.at(own) * sum[j] / math::error_scale(x[j], y[j], rtol, atol);
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
    const int64_t first = at.sample * tiles.pieces + (at.samples > 1 ? 0 : i % tiles.pieces);
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
