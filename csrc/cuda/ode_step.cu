// Steps of samplers and solvers: weighted sums of tensors and noise, each element by itself. A
// thread has pieces of 16 bytes; what is weighed by how much a block reads once, on the device.
//   ode_step_rows    one to three rows of sums
//   counter_numbers  the words of the noise, or its normals
//   guidance_parts   the spreads of predictions
//   error_parts      the errors of steps
//   join_parts       of samples that several blocks had
#include "../math/ode_step.h"

#include <algorithm>
#include <tuple>

#include "../math/moments.h"
#include "../torch_abi.h"
#include "runtime/rows.h"

namespace fastzoo::cuda {
namespace {

using math::kStepRows;
using math::kStepTensors;
using math::kWordsOfBlock;

// The emulator's blocks are small, so that small inputs reach every path.
#if defined(FASTZOO_EMULATE)
constexpr int kLogThreads = 6;
#else
constexpr int kLogThreads = 8;
#endif
constexpr int kThreads = 1 << kLogThreads;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLogWarp = 5;

// How often a block of a large tensor goes over its part, so that what it reads first is little.
constexpr int kTurns = 8;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Elements of a piece of a step: whole blocks of words.
template <class T>
constexpr int kPiece = kVector<T> < kWordsOfBlock ? kWordsOfBlock : kVector<T>;

// Samples of `size` elements each, as threads go over them.
struct Samples {
  int64_t count, size;
  int log_lanes;  // of those that share a sample; kLogThreads where a block has part of one
};

// The pieces of a thread, of n elements each, one after the other.
template <int n>
struct Places {
  int64_t sample;
  int64_t place;
  int64_t left;  // elements of the sample from `place` on; none where there is no such sample
  int64_t turn;

  FASTZOO_DEVICE explicit Places(const Samples& in) {
    const int thread = threadIdx.x, lanes = 1 << in.log_lanes;
    const int64_t first = (int64_t{blockIdx.y} * lanes + (thread & (lanes - 1))) * n;
    sample = first_sample(in) + (thread >> in.log_lanes);
    place = sample * in.size + first;
    left = sample < in.count ? in.size - first : 0;
    turn = int64_t{gridDim.y} * lanes * n;
  }
  FASTZOO_DEVICE static int64_t first_sample(const Samples& in) {
    return int64_t{blockIdx.x} * (kThreads >> in.log_lanes);
  }
  FASTZOO_DEVICE bool exist() const { return left > 0; }
  FASTZOO_DEVICE int count() const { return left < n ? static_cast<int>(left) : n; }
  FASTZOO_DEVICE int64_t element(const Samples& in) const { return in.size - left; }
  FASTZOO_DEVICE void next() {
    place += turn;
    left -= turn;
  }
};

template <int n, class T>
FASTZOO_DEVICE Vector<T, n> load_piece(const T* from, int count, bool whole) {
  if (whole) return load_vector<n>(from);
  Vector<T, n> piece{};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i < count) piece[i] = from[i];
  }
  return piece;
}

template <int n, class T>
FASTZOO_DEVICE void store_piece(T* to, const Vector<T, n>& piece, int count, bool whole) {
  if (whole) return store_global(to, piece);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i < count) to[i] = piece[i];
  }
}

// ---- steps --------------------------------------------------------------------------------------

// Tensors whose pieces a thread has under way at once. Room for any type is that of the widest.
template <class T, bool mixed>
constexpr int kGroup = mixed && sizeof(T) == 2 ? 2 : 4;

// Of a row of the table in shared memory, by how much is weighed: the tensors, the rows before,
// the noise; and the bound.
constexpr int kOwn = math::kStepPrevious;
constexpr int kOwnNoise = math::kStepNoise - kOwn;
constexpr int kOwnBound = kOwnNoise + 1;
constexpr int kNumbers = kOwn + kOwnBound + 1;

// Of a block, which bounds that memory.
constexpr int kLogLeastLanes = 2;
constexpr int kMostSamples = kThreads >> kLogLeastLanes;

// Blocks of a multiprocessor, which leaves a thread the registers that it wants: for its sums, and
// for words.
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 3 : 2;
template <class T, int kRows, bool random>
constexpr int kHeld = kRows * kPiece<T> + (random ? kWordsOfBlock : 0);
template <class T, int kRows, bool random>
constexpr int kStepBlocks = sizeof(T) == 8                  ? 2
                            : kHeld<T, kRows, random> <= 8  ? 4
                            : kHeld<T, kRows, random> <= 20 ? 3
                                                            : 2;

// What a tensor may hold that is computed in float.
enum class Element { float32, float16, bfloat16 };

template <class T>
struct Step {
  using C = ComputeOf<T>;

  Samples samples;
  const void* tensors[kStepTensors];
  uint32_t elements;  // two bits each
  uint32_t given;     // a bit each
  int end;            // one more than the last that is given
  bool vectors;       // whether pieces are whole accesses
  const double* table;
  int64_t table_step, table_sample;  // numbers from one to the next
  const int64_t* step;
  const C* factor;
  bool factor_each;
  uint32_t scaled;  // a bit each
  const C* threshold;
  const int64_t* keys;
  bool stochastic;
  T* out;
  T* kept[kStepRows - 1];

  FASTZOO_DEVICE Element element(int k) const {
    return static_cast<Element>(elements >> (2 * k) & 3u);
  }
};

// Calls body(E{}) with the type of a tensor's elements, which is T unless they are `mixed`.
template <bool mixed, class T, class Body>
FASTZOO_DEVICE void with_element(const Step<T>& in, int k, const Body& body) {
  if constexpr (!mixed) {
    body(T{});
  } else if (in.element(k) == Element::float32) {
    body(float{});
  } else if (in.element(k) == Element::float16) {
    body(Half{});
  } else {
    body(BFloat16{});
  }
}

// n elements as they are in memory: words, which nothing touches before all are under way.
template <class T, int n, bool mixed>
struct Loaded {
  static constexpr int kWords = n * static_cast<int>(mixed ? sizeof(float) : sizeof(T)) / 4;
  Vector<uint32_t, kWords> words;

  FASTZOO_DEVICE void load(const Step<T>& in, int k, int64_t place) {
    with_element<mixed>(in, k, [&](auto type) {
      using E = decltype(type);
      constexpr int kRead = n * static_cast<int>(sizeof(E)) / 4;
      const E* const from = static_cast<const E*>(in.tensors[k]) + place;
      const auto loaded = load_vector<kRead>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
      for (int i = 0; i < kRead; ++i) words[i] = loaded[i];
    });
  }
  template <class Body>
  FASTZOO_DEVICE void with_values(const Step<T>& in, int k, const Body& body) const {
    with_element<mixed>(in, k, [&](auto type) {
      Vector<decltype(type), n> values;
      __builtin_memcpy(values.values, words.values, sizeof(values.values));
      body(values);
    });
  }
};

// What threads share: of each sample its rows' numbers, and which draw its noise is.
template <class C, int kRows>
struct StepNumbers {
  SharedArray<C, kMostSamples * kRows * kNumbers> numbers;
  SharedArray<uint32_t, kMostSamples> draws;

  // All threads call it.
  template <bool random, class T>
  FASTZOO_DEVICE void read(const Step<T>& in) {
    const int thread = threadIdx.x;
    const int64_t first = Places<1>::first_sample(in.samples), left = in.samples.count - first;
    const int most = kThreads >> in.samples.log_lanes;
    const int samples = left < most ? static_cast<int>(left) : most;
    const double* const table =
        in.table + (in.step == nullptr ? 0 : *in.step * in.table_step) + first * in.table_sample;
#pragma unroll 1
    for (int i = thread; i < samples * kRows * kNumbers; i += kThreads) {
      const int row = i / kNumbers, number = i - row * kNumbers;
      const int sample = row / kRows, r = row - sample * kRows;
      const double* const from = table + sample * in.table_sample + r * math::kStepNumbers;
      C value = static_cast<C>(from[number < kOwn + kOwnBound ? number : math::kStepBound]);
      if (number < kOwn) {
        if ((in.scaled >> number & 1u) != 0)
          value *= in.factor[in.factor_each ? first + sample : 0];
        if ((in.given >> number & 1u) == 0) value = 0;
      } else if (number == kOwn + kOwnBound && r == 0 && in.threshold != nullptr) {
        value = in.threshold[first + sample];
      }
      numbers[i] = value;
    }
    if constexpr (random) {
#pragma unroll 1
      for (int sample = thread; sample < samples; sample += kThreads) {
        const double* const from = table + sample * in.table_sample;
        draws[sample] =
            static_cast<uint32_t>(from[(kRows - 1) * math::kStepNumbers + math::kStepDraw]);
      }
    }
    sync_block();
  }
};

template <int n, class Body>
FASTZOO_DEVICE void for_random_blocks(const math::RandomKey& key, uint32_t draw, int64_t element,
                                      const Body& body) {
  static_assert(n % kWordsOfBlock == 0, "a piece has whole blocks");
#pragma unroll
  for (int i = 0; i < n; i += kWordsOfBlock) {
    const uint64_t block = static_cast<uint64_t>(element + i) / kWordsOfBlock;
    body(i, math::random_block(key, draw, block));
  }
}

// Rounded up or down, as the words have it.
template <class T, int n>
FASTZOO_DEVICE void round_by_chance(const math::RandomKey& key, uint32_t draw, int64_t element,
                                    const float (&values)[n], Vector<T, n>& rounded) {
  for_random_blocks<n>(key, draw | math::kRoundingDraw, element, [&](int first, const auto& block) {
#pragma unroll
    for (int j = 0; j < kWordsOfBlock; ++j) {
      const float value = values[first + j];
      const uint32_t word = block.words[j];
      const uint32_t nearest = math::bits_as<uint16_t>(rounded[first + j]);
      const uint32_t bits = std::is_same_v<T, Half>
                                ? math::stochastic_half(value, word, nearest)
                                : math::stochastic_bfloat16(value, word, nearest);
      rounded[first + j] = math::bits_as<T>(static_cast<uint16_t>(bits));
    }
  });
}

template <class T, int kRows, bool mixed, bool random>
__global__ void __launch_bounds__(kThreads, kStepBlocks<T, kRows, random>)
    ode_step_rows(Step<T> in) {
  using C = ComputeOf<T>;
  constexpr int n = kPiece<T>;
  constexpr int group = kGroup<T, mixed>;
  constexpr int last = kRows - 1;
  __shared__ StepNumbers<C, kRows> shared;
  shared.template read<random>(in);
  Places<n> at(in.samples);
  if (!at.exist()) return;
  const int own = static_cast<int>(threadIdx.x) >> in.samples.log_lanes;
  const int numbers = own * kRows * kNumbers;
  math::RandomKey key{};
  uint32_t draw = 0;
  if constexpr (random) {
    key = math::random_key(in.keys + 2 * at.sample);
    draw = shared.draws[own];
  }

  for (; at.exist(); at.next()) {
    const int64_t place = at.place;
    const int count = at.count();
    const bool whole = in.vectors && count == n;
    C sums[kRows][n] = {};
    if (whole) {
#pragma unroll 1
      for (int first = 0; first < in.end; first += group) {
        Vector<C, group> weights[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          weights[r] = shared.numbers.template load<group>(numbers + r * kNumbers + first);
        }
        Loaded<T, n, mixed> loaded[group] = {};
        bool used[group] = {};
#pragma unroll
        for (int k = 0; k < group; ++k) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) used[k] = used[k] || !math::is_zero(weights[r][k]);
          if (used[k]) loaded[k].load(in, first + k, place);
        }
#pragma unroll
        for (int k = 0; k < group; ++k) {
          loaded[k].with_values(in, first + k, [&](const auto& values) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
              for (int i = 0; i < n; ++i) {
                sums[r][i] =
                    math::add_weighted(weights[r][k], static_cast<C>(values[i]), sums[r][i]);
              }
            }
          });
        }
      }
    } else {
      const auto add = [&](int k, auto type) {
        const auto* const from = static_cast<const decltype(type)*>(in.tensors[k]) + place;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          if (i >= count) continue;
          const C value = static_cast<C>(from[i]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const C weight = shared.numbers[numbers + r * kNumbers + k];
            sums[r][i] = math::add_weighted(weight, value, sums[r][i]);
          }
        }
      };
#pragma unroll 1
      for (int k = 0; k < in.end; ++k) {
        bool used = false;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          used = used || !math::is_zero(shared.numbers[numbers + r * kNumbers + k]);
        }
        if (!used) continue;
        with_element<mixed>(in, k, [&](auto type) { add(k, type); });
      }
    }

    Vector<T, n> rounded;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto row = shared.numbers.template load<4>(numbers + r * kNumbers + kOwn);
#pragma unroll
      for (int j = 0; j < r; ++j) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          sums[r][i] = math::add_weighted(row[j], sums[j][i], sums[r][i]);
        }
      }
      if (r == last && random && !math::is_zero(row[kOwnNoise])) {
        for_random_blocks<n>(key, draw, at.element(in.samples), [&](int i, const auto& block) {
          float normals[kWordsOfBlock];
          math::normals_of(block, normals);
#pragma unroll
          for (int j = 0; j < kWordsOfBlock; ++j) {
            sums[r][i + j] =
                math::add_weighted(row[kOwnNoise], static_cast<C>(normals[j]), sums[r][i + j]);
          }
        });
      }
      if (r < last) {
        if (r == 0 && in.threshold != nullptr) {
#pragma unroll
          for (int i = 0; i < n; ++i) {
            sums[r][i] = math::thresholded(sums[r][i], row[kOwnBound]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < n; ++i) sums[r][i] = math::clamp_to(sums[r][i], row[kOwnBound]);
        }
      }
#pragma unroll
      for (int i = 0; i < n; ++i) rounded[i] = static_cast<T>(sums[r][i]);
      if (r < last && in.kept[r] != nullptr) {
        store_piece(in.kept[r] + place, rounded, count, whole);
      }
    }
    if constexpr (random && sizeof(T) == 2) {
      if (in.stochastic) round_by_chance(key, draw, at.element(in.samples), sums[last], rounded);
    }
    store_piece(in.out + place, rounded, count, whole);
  }
}

// ---- noise --------------------------------------------------------------------------------------

// Number is int64_t, of words, or float, of normals.
template <class Number>
__global__ void __launch_bounds__(kThreads)
    counter_numbers(Samples samples, const int64_t* keys, uint32_t draw, Number* out) {
  constexpr int n = kWordsOfBlock;
  Places<n> at(samples);
  if (!at.exist()) return;
  const math::RandomKey key = math::random_key(keys + 2 * at.sample);
  const bool vectors = samples.size % n == 0;
  for (; at.exist(); at.next()) {
    Vector<Number, n> numbers;
    for_random_blocks<n>(key, draw, at.element(samples), [&](int, const auto& block) {
      if constexpr (std::is_same_v<Number, float>) {
        math::normals_of(block, numbers.values);
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i) numbers[i] = block.words[i];
      }
    });
    store_piece(out + at.place, numbers, at.count(), vectors);
  }
}

// ---- numbers of whole samples -------------------------------------------------------------------

// What is known of part of a sample.
struct ErrorPart {
  double squares;

  FASTZOO_DEVICE ErrorPart beside(int flip) const { return {shuffle_xor(squares, flip)}; }
  FASTZOO_DEVICE void join(const ErrorPart& other) { squares += other.squares; }
};

FASTZOO_DEVICE math::Moments<double> beside(const math::Moments<double>& own, int flip) {
  return {shuffle_xor(own.count, flip), shuffle_xor(own.mean, flip),
          shuffle_xor(own.squares, flip)};
}
struct GuidancePart {
  math::Moments<double> cond, guided;

  FASTZOO_DEVICE GuidancePart beside(int flip) const {
    return {cuda::beside(cond, flip), cuda::beside(guided, flip)};
  }
  FASTZOO_DEVICE void join(const GuidancePart& other) {
    cond = math::joined(cond, other.cond);
    guided = math::joined(guided, other.guided);
  }
};

// And what is to be known of all of it.
struct MeanError {
  using Part = ErrorPart;
  double size;
  double* out;

  FASTZOO_DEVICE void finish(int64_t sample, const ErrorPart& all) const {
    out[sample] = all.squares / size;
  }
};
template <class C>
struct GuidanceFactor {
  using Part = GuidancePart;
  double rescale;
  C* out;

  FASTZOO_DEVICE void finish(int64_t sample, const GuidancePart& all) const {
    const double ratio = math::deviation(all.cond) / math::deviation(all.guided);
    out[sample] = static_cast<C>(rescale * ratio + (1 - rescale));
  }
};

// All lanes of the warp call it.
template <class Part>
FASTZOO_DEVICE void join_lanes(Part& own, int lanes) {
  for (int flip = lanes / 2; flip > 0; flip /= 2) own.join(own.beside(flip));
}
// All threads of the block call it; the first one gets the whole.
template <class Part>
FASTZOO_DEVICE void join_block(Part& own, SharedArray<Part, kWarps>& shared) {
  const int thread = threadIdx.x;
  join_lanes(own, kWarpSize);
  if (thread % kWarpSize == 0) shared[thread / kWarpSize] = own;
  sync_block();
  if (thread != 0) return;
#pragma unroll 1
  for (int warp = 1; warp < kWarps; ++warp) own.join(shared[warp]);
}

// What threads found of their samples: finished, or unless null in `parts` [samples, gridDim.y].
template <class Whole>
FASTZOO_DEVICE void hand_on(const Samples& samples, int64_t sample, typename Whole::Part& own,
                            SharedArray<typename Whole::Part, kWarps>& shared, const Whole& whole,
                            typename Whole::Part* parts) {
  const int thread = threadIdx.x, lanes = 1 << samples.log_lanes;
  if (samples.log_lanes == kLogThreads) {
    join_block(own, shared);
  } else {
    join_lanes(own, lanes);
  }
  if ((thread & (lanes - 1)) != 0 || sample >= samples.count) return;
  if (parts == nullptr) {
    whole.finish(sample, own);
  } else {
    parts[sample * gridDim.y + blockIdx.y] = own;
  }
}

// A block a sample.
template <class Whole>
__global__ void __launch_bounds__(kThreads)
    join_parts(const typename Whole::Part* parts, int64_t count, Whole whole) {
  using Part = typename Whole::Part;
  __shared__ SharedArray<Part, kWarps> shared;
  const int64_t sample = blockIdx.x;
  Part own{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) own.join(parts[sample * count + i]);
  join_block(own, shared);
  if (threadIdx.x == 0) whole.finish(sample, own);
}

template <class T>
struct Guidance {
  Samples samples;
  const T *cond, *uncond;
  const double* guidance;
  bool guidance_each;
  bool vectors;
  GuidanceFactor<ComputeOf<T>> whole;
  GuidancePart* parts;
};

// Of a piece, whose middle is found before its spread.
template <class C, int n>
FASTZOO_DEVICE math::Moments<C> moments_of(const C (&values)[n], int count) {
  C sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) sum += i < count ? values[i] : C{0};
  const C mean = sum * (count == n ? C{1} / n : C{1} / static_cast<C>(count));
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const C distance = i < count ? values[i] - mean : C{0};
    squares = fused_multiply_add(distance, distance, squares);
  }
  return {static_cast<C>(count), mean, squares};
}

template <class C>
FASTZOO_DEVICE math::Moments<double> widened(const math::Moments<C>& own) {
  return {static_cast<double>(own.count), static_cast<double>(own.mean),
          static_cast<double>(own.squares)};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) guidance_parts(Guidance<T> in) {
  using C = ComputeOf<T>;
  constexpr int n = kVector<T>;
  __shared__ SharedArray<GuidancePart, kWarps> shared;
  Places<n> at(in.samples);
  math::Moments<C> cond{}, guided{};
  if (at.exist()) {
    const C by = static_cast<C>(in.guidance[in.guidance_each ? at.sample : 0]);
    for (; at.exist(); at.next()) {
      const int64_t place = at.place;
      const int count = at.count();
      const bool whole = in.vectors && count == n;
      const auto first = load_piece<n>(in.cond + place, count, whole);
      const auto second = load_piece<n>(in.uncond + place, count, whole);
      C values[n], guided_values[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const C without = static_cast<C>(second[i]);
        values[i] = static_cast<C>(first[i]);
        guided_values[i] = fused_multiply_add(by, values[i] - without, without);
      }
      const C share = static_cast<C>(count) / (cond.count + static_cast<C>(count));
      cond = math::joined(cond, moments_of(values, count), share);
      guided = math::joined(guided, moments_of(guided_values, count), share);
    }
  }
  GuidancePart own{widened(cond), widened(guided)};
  hand_on(in.samples, at.sample, own, shared, in.whole, in.parts);
}

template <class T>
struct StepError {
  using C = ComputeOf<T>;

  Samples samples;
  const T* tensors[kStepTensors];
  const double* weights;
  const C* factor;
  bool factor_each;
  C rtol, atol;
  bool vectors;
  MeanError whole;
  ErrorPart* parts;
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) error_parts(StepError<T> in) {
  using C = ComputeOf<T>;
  constexpr int n = kVector<T>;
  __shared__ SharedArray<ErrorPart, kWarps> shared;
  Places<n> at(in.samples);
  ErrorPart own{};
  if (at.exist()) {
    const C factor = in.factor[in.factor_each ? at.sample : 0];
    C weights[kStepTensors];
#pragma unroll
    for (int k = 2; k < kStepTensors; ++k) {
      weights[k] = in.tensors[k] == nullptr ? C{0} : static_cast<C>(in.weights[k]);
    }
    for (; at.exist(); at.next()) {
      const int64_t place = at.place;
      const int count = at.count();
      const bool whole = in.vectors && count == n;
      Vector<T, n> pieces[kStepTensors] = {};
#pragma unroll
      for (int k = 0; k < kStepTensors; ++k) {
        if (k < 2 || !math::is_zero(weights[k])) {
          pieces[k] = load_piece<n>(in.tensors[k] + place, count, whole);
        }
      }
      C squares = 0;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (i >= count) continue;
        C sum = 0;
#pragma unroll
        for (int k = 2; k < kStepTensors; ++k) {
          sum = math::add_weighted(weights[k], static_cast<C>(pieces[k][i]), sum);
        }
        const C ratio = factor * sum /
                        math::error_scale(static_cast<C>(pieces[0][i]),
                                          static_cast<C>(pieces[1][i]), in.rtol, in.atol);
        squares = fused_multiply_add(ratio, ratio, squares);
      }
      own.squares += static_cast<double>(squares);
    }
  }
  hand_on(in.samples, at.sample, own, shared, in.whole, in.parts);
}

// ---- the operators ------------------------------------------------------------------------------

// The fewest lanes that reach over a sample of so many pieces, or a block.
Samples samples_of(int64_t count, int64_t size, int piece, int log_least) {
  const int64_t pieces = (size + piece - 1) / piece;
  int log = log_least;
  while (log < kLogThreads && int64_t{1} << log < pieces) ++log;
  return {count, size, log};
}
// Those whose lanes add something up are of one warp, or a block.
Samples joined_samples_of(int64_t count, int64_t size, int piece) {
  Samples samples = samples_of(count, size, piece, 0);
  if (samples.log_lanes > kLogWarp) samples.log_lanes = kLogThreads;
  return samples;
}

// How often the lanes of a sample would go over it.
int64_t turns_of(const Samples& samples, int piece) {
  const int64_t each = int64_t{piece} << samples.log_lanes;
  return std::max<int64_t>(1, (samples.size + each - 1) / each);
}
dim3 grid_of(const Samples& samples, int64_t parts) {
  return dim3(blocks_for(samples.count, kThreads >> samples.log_lanes),
              static_cast<unsigned>(std::min(parts, int64_t{65535})));
}
// Enough parts of a sample for all units, and more where they would have to go over it too often.
dim3 grid_for(const Samples& samples, int piece) {
  const int64_t turns = turns_of(samples, piece);
  const int64_t wanted = (4 * kManyBlocks + samples.count - 1) / samples.count;
  return grid_of(samples, std::max((turns + kTurns - 1) / kTurns, std::min(turns, wanted)));
}
// Where parts are added up they are as many whatever else is in the batch, and so are the bits.
dim3 joined_grid_for(const Samples& samples, int piece) {
  const int64_t turns = turns_of(samples, piece);
  const int64_t wanted = std::min((turns + 1) / 2, int64_t{2 * kManyBlocks});
  return grid_of(samples, std::max((turns + kTurns - 1) / kTurns, wanted));
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Tensors of one shape [samples, ...], those after the first maybe absent.
struct StepTensors {
  Tensor tensors[kStepTensors];
  const void* data[kStepTensors];
  int64_t samples, size;
  uint32_t given = 0;

  StepTensors(const char* op, const Tensor* const (&of)[kStepTensors]) {
    const Tensor& first = *of[0];
    const int64_t numel = first.numel();
    samples = first.dim() > 0 ? first.size(0) : 1;
    size = samples > 0 ? numel / samples : 0;
    const bool is_double = first.scalar_type() == ScalarType::Double;
    for (int k = 0; k < kStepTensors; ++k) {
      data[k] = nullptr;
      if (k > 0 && of[k]->numel() == 0) continue;
      STD_TORCH_CHECK(of[k]->numel() == numel, op, ": t", k, " has ", of[k]->numel(),
                      " elements, t0 has ", numel);
      STD_TORCH_CHECK((of[k]->scalar_type() == ScalarType::Double) == is_double, op,
                      ": all tensors must be float64, or none");
      tensors[k] = torch::stable::contiguous(*of[k]);
      data[k] = tensors[k].const_data_ptr();
      given |= 1u << k;
    }
  }

  // Whether pieces of n elements are whole accesses, but for the last one of a single sample.
  bool in_vectors(const Samples& as, int n) const {
    return (as.count == 1 || as.size % n == 0) &&
           std::all_of(data, data + kStepTensors, [](const void* p) { return is_aligned(p); });
  }
};

Element element_of(ScalarType dtype, const char* op) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::Half:
      return Element::float16;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": floating dtype float, double, half or bfloat16 needed");
  }
}

// [1] or [samples] numbers of the compute dtype.
bool is_of_each(const char* op, const char* name, const Tensor& numbers, ScalarType dtype,
                int64_t samples) {
  const int64_t numel = numbers.numel();
  STD_TORCH_CHECK(numel <= 1 || numel == samples, op, ": ", name, " has ", numel, " numbers for ",
                  samples, " samples");
  STD_TORCH_CHECK(numel == 0 || numbers.scalar_type() == dtype, op, ": ", name,
                  " is not of the dtype needed");
  return numel > 1;
}

template <class T, int kRows>
void launch_step(const Stream& stream, const Step<T>& in, dim3 grid, bool mixed) {
  const auto launch = [&](auto is_mixed, auto is_random) {
    stream.launch("ode_step_rows",
                  ode_step_rows<T, kRows, decltype(is_mixed)::value, decltype(is_random)::value>,
                  grid, kThreads, in);
  };
  const auto launch_random = [&](auto is_mixed) {
    in.keys == nullptr ? launch(is_mixed, std::false_type{}) : launch(is_mixed, std::true_type{});
  };
  if constexpr (std::is_same_v<T, double>) {
    launch_random(std::false_type{});
  } else {
    mixed ? launch_random(std::true_type{}) : launch_random(std::false_type{});
  }
}

std::tuple<Tensor, Tensor, Tensor> ode_step(const Tensor& t0, const Tensor& t1, const Tensor& t2,
                                            const Tensor& t3, const Tensor& t4, const Tensor& t5,
                                            const Tensor& t6, const Tensor& t7,
                                            const Tensor& table_in, const Tensor& step_in,
                                            const Tensor& factor_in, const Tensor& threshold_in,
                                            const Tensor& keys_in, int64_t scaled, int64_t keep,
                                            bool stochastic) {
  using torch::stable::contiguous;
  constexpr const char* kOp = "ode_step";
  const StepTensors tensors(kOp, {&t0, &t1, &t2, &t3, &t4, &t5, &t6, &t7});
  const ScalarType dtype = t0.scalar_type(), compute = compute_dtype(dtype);
  const Tensor table = contiguous(table_in), factor = contiguous(factor_in),
               threshold = contiguous(threshold_in), keys = contiguous(keys_in);
  STD_TORCH_CHECK(table.dim() == 4 && table.size(3) == math::kStepNumbers &&
                      table.scalar_type() == ScalarType::Double,
                  kOp, ": the table must be float64 [S, Q, R, 13]");
  const int64_t rows = table.size(2);
  const bool table_each = table.size(1) > 1;
  STD_TORCH_CHECK(!table_each || table.size(1) == tensors.samples, kOp, ": a table of ",
                  table.size(1), " samples for ", tensors.samples);
  STD_TORCH_CHECK(1 <= rows && rows <= kStepRows, kOp, ": a table of ", rows, " rows");
  const bool factor_each = is_of_each(kOp, "factor", factor, compute, tensors.samples);
  STD_TORCH_CHECK(threshold.numel() == 0 ||
                      (threshold.numel() == tensors.samples && threshold.scalar_type() == compute),
                  kOp, ": threshold must be [", tensors.samples, "] in the compute dtype");
  STD_TORCH_CHECK(keys.numel() == 0 || keys.numel() == 2 * tensors.samples, kOp,
                  ": keys must be [B, 2]");
  STD_TORCH_CHECK(!stochastic || keys.numel() > 0 || tensors.samples == 0, kOp,
                  ": stochastic rounding needs keys");

  const Tensor out = torch::stable::empty_like(tensors.tensors[0]);
  const auto kept_row = [&](int row) {
    const bool keeps = (keep >> row & 1) != 0 && row + 1 < rows;
    return keeps ? torch::stable::empty_like(tensors.tensors[0]) : empty(t0, {0}, dtype);
  };
  const Tensor kept0 = kept_row(0), kept1 = kept_row(1);
  if (out.numel() == 0) return {out, kept0, kept1};
  const Stream stream(t0);
  dispatch_float(dtype, kOp, [&](auto type) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    Step<T> in{};
    const bool alike = !table_each && !factor_each && threshold.numel() == 0 && keys.numel() == 0;
    in.samples = alike ? samples_of(1, out.numel(), kPiece<T>, kLogLeastLanes)
                       : samples_of(tensors.samples, tensors.size, kPiece<T>, kLogLeastLanes);
    bool mixed = false;
    for (int k = 0; k < kStepTensors; ++k) {
      in.tensors[k] = tensors.data[k];
      if (in.tensors[k] == nullptr) continue;
      in.end = k + 1;
      if constexpr (!std::is_same_v<T, double>) {
        const ScalarType own = tensors.tensors[k].scalar_type();
        mixed = mixed || own != dtype;
        in.elements |= static_cast<uint32_t>(element_of(own, kOp)) << 2 * k;
      }
    }
    in.given = tensors.given;
    in.vectors = tensors.in_vectors(in.samples, kPiece<T>);
    in.table = static_cast<const double*>(table.const_data_ptr());
    in.table_sample = table_each ? rows * math::kStepNumbers : 0;
    in.table_step = table.size(1) * rows * math::kStepNumbers;
    in.step = optional_data<const int64_t>(step_in);
    in.factor = optional_data<const C>(factor);
    in.factor_each = factor_each;
    in.scaled = in.factor == nullptr ? 0 : static_cast<uint32_t>(scaled);
    in.threshold = optional_data<const C>(threshold);
    in.keys = optional_data<const int64_t>(keys);
    in.stochastic = stochastic;
    in.out = static_cast<T*>(out.mutable_data_ptr());
    in.kept[0] = optional_data<T>(kept0);
    in.kept[1] = optional_data<T>(kept1);
    const dim3 grid = grid_for(in.samples, kPiece<T>);
    if (rows == 1) {
      launch_step<T, 1>(stream, in, grid, mixed);
    } else if (rows == 2) {
      launch_step<T, 2>(stream, in, grid, mixed);
    } else {
      launch_step<T, 3>(stream, in, grid, mixed);
    }
  });
  return {out, kept0, kept1};
}

template <class Number>
Tensor counter_of(const Tensor& keys_in, int64_t n, int64_t draw, ScalarType dtype) {
  const Tensor keys = torch::stable::contiguous(keys_in);
  const int64_t count = keys.size(0);
  const Tensor out = empty(keys, {count, n}, dtype);
  if (out.numel() == 0) return out;
  const Stream stream(keys);
  const Samples samples = samples_of(count, n, kWordsOfBlock, 0);
  stream.launch("counter_numbers", counter_numbers<Number>, grid_for(samples, kWordsOfBlock),
                kThreads, samples, static_cast<const int64_t*>(keys.const_data_ptr()),
                static_cast<uint32_t>(draw), static_cast<Number*>(out.mutable_data_ptr()));
  return out;
}
Tensor counter_bits(const Tensor& keys, int64_t n, int64_t draw) {
  return counter_of<int64_t>(keys, n, draw, ScalarType::Long);
}
Tensor counter_normal(const Tensor& keys, int64_t n, int64_t draw) {
  return counter_of<float>(keys, n, draw, ScalarType::Float);
}

// Launches `kernel` on what it reads, and another where several blocks have parts of a sample.
template <class In>
void launch_joined(const Stream& stream, const char* name, void (*kernel)(In), In in, int piece,
                   const Tensor& like) {
  using Whole = decltype(in.whole);
  using Part = typename Whole::Part;
  const dim3 grid = joined_grid_for(in.samples, piece);
  if (grid.y == 1) {
    stream.launch(name, kernel, grid, kThreads, in);
    return;
  }
  const Tensor parts =
      empty(like, {in.samples.count, int64_t{grid.y}, sizeof(Part)}, ScalarType::Byte);
  in.parts = static_cast<Part*>(parts.mutable_data_ptr());
  stream.launch(name, kernel, grid, kThreads, in);
  stream.launch("join_parts", join_parts<Whole>, blocks_for(in.samples.count, 1), kThreads,
                in.parts, int64_t{grid.y}, in.whole);
}

Tensor guidance_factor(const Tensor& cond_in, const Tensor& uncond_in, const Tensor& guidance_in,
                       double rescale) {
  using torch::stable::contiguous;
  constexpr const char* kOp = "guidance_factor";
  const Tensor cond = contiguous(cond_in), uncond = contiguous(uncond_in),
               guidance = contiguous(guidance_in);
  const ScalarType dtype = cond.scalar_type();
  STD_TORCH_CHECK(cond.numel() == uncond.numel() && dtype == uncond.scalar_type(), kOp,
                  ": cond and uncond must be alike");
  const int64_t count = cond.dim() > 0 ? cond.size(0) : 1;
  Tensor out = empty(cond, {count}, compute_dtype(dtype));
  if (count == 0) return out;
  if (rescale == 0) return torch::stable::fill_(out, 1);
  const bool each = is_of_each(kOp, "guidance", guidance, ScalarType::Double, count);
  const Stream stream(cond);
  dispatch_float(dtype, kOp, [&](auto type) {
    using T = decltype(type);
    constexpr int n = kVector<T>;
    Guidance<T> in{};
    in.samples = joined_samples_of(count, cond.numel() / count, n);
    in.cond = static_cast<const T*>(cond.const_data_ptr());
    in.uncond = static_cast<const T*>(uncond.const_data_ptr());
    in.guidance = static_cast<const double*>(guidance.const_data_ptr());
    in.guidance_each = each;
    in.vectors =
        (count == 1 || in.samples.size % n == 0) && is_aligned(in.cond) && is_aligned(in.uncond);
    in.whole = {rescale, static_cast<ComputeOf<T>*>(out.mutable_data_ptr())};
    launch_joined(stream, "guidance_parts", guidance_parts<T>, in, n, cond);
  });
  return out;
}

Tensor step_error(const Tensor& t0, const Tensor& t1, const Tensor& t2, const Tensor& t3,
                  const Tensor& t4, const Tensor& t5, const Tensor& t6, const Tensor& t7,
                  const Tensor& weights_in, const Tensor& factor_in, double rtol, double atol) {
  using torch::stable::contiguous;
  constexpr const char* kOp = "step_error";
  const StepTensors tensors(kOp, {&t0, &t1, &t2, &t3, &t4, &t5, &t6, &t7});
  const ScalarType dtype = t0.scalar_type();
  const Tensor weights = contiguous(weights_in), factor = contiguous(factor_in);
  const Tensor out = empty(t0, {tensors.samples}, ScalarType::Double);
  if (tensors.samples == 0) return out;
  STD_TORCH_CHECK(weights.numel() == kStepTensors && weights.scalar_type() == ScalarType::Double,
                  kOp, ": weights must be float64 [8]");
  STD_TORCH_CHECK(factor.numel() > 0, kOp, ": no factor");
  STD_TORCH_CHECK(tensors.size == 0 || tensors.data[1] != nullptr, kOp, ": t1 is needed");
  const bool each = is_of_each(kOp, "factor", factor, compute_dtype(dtype), tensors.samples);
  const Stream stream(t0);
  dispatch_float(dtype, kOp, [&](auto type) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    constexpr int n = kVector<T>;
    StepError<T> in{};
    in.samples = joined_samples_of(tensors.samples, tensors.size, n);
    for (int k = 0; k < kStepTensors; ++k) {
      if (tensors.data[k] == nullptr) continue;
      STD_TORCH_CHECK(tensors.tensors[k].scalar_type() == dtype, kOp,
                      ": all tensors must have one dtype");
      in.tensors[k] = static_cast<const T*>(tensors.data[k]);
    }
    in.weights = static_cast<const double*>(weights.const_data_ptr());
    in.factor = static_cast<const C*>(factor.const_data_ptr());
    in.factor_each = each;
    in.rtol = static_cast<C>(rtol);
    in.atol = static_cast<C>(atol);
    in.vectors = tensors.in_vectors(in.samples, n);
    in.whole = {static_cast<double>(tensors.size), static_cast<double*>(out.mutable_data_ptr())};
    launch_joined(stream, "error_parts", error_parts<T>, in, n, t0);
  });
  return out;
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::ode_step>(m, "ode_step.cuda");
  fastzoo::implement<fastzoo::cuda::counter_bits>(m, "counter_bits.cuda");
  fastzoo::implement<fastzoo::cuda::counter_normal>(m, "counter_normal.cuda");
  fastzoo::implement<fastzoo::cuda::guidance_factor>(m, "guidance_factor.cuda");
  fastzoo::implement<fastzoo::cuda::step_error>(m, "step_error.cuda");
}
