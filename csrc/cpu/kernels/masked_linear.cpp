// The inverse of a masked-autoregressive transform: every step finds the units that wait for the
// features solved last, so that all steps cost what one pass through the net does. Samples are
// lanes; a tile of a few vectors of them has its units at hand, and weights pass by, each loaded
// once a tile and broadcast. (A batch smaller than a vector leaves lanes idle.)
#include "masked_linear.h"

#include "../runtime/arena.h"
#include "../runtime/vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

// Units whose products are summed at once, as many as leave registers for the inputs.
template <int kVectors>
constexpr int kUnitsAtOnce = kVectorRegisters == 32 ? (kVectors == 4 ? 6 : 8)
                                                    : (kVectors == 4   ? 2
                                                       : kVectors == 2 ? 4
                                                                       : 8);

// Terms of a sample's log-determinant that are added in the compute type.
constexpr int64_t kTermsAtOnce = 1024;

// Lines of a tile: the values of kVectors vectors of samples, for each unit in turn.
template <class T, int kVectors>
constexpr int64_t kLanes = kVectors * Vec<T>::size;

// lines[c][lane] = rows[lane][c]; the last of the `count` rows stands in for those missing.
template <class T, int kVectors>
void rows_to_lines(const T* rows, int64_t columns, int64_t count, T* lines) {
  using V = Vec<T>;
  for (int64_t lane = 0; lane < kLanes<T, kVectors>; lane += V::size) {
    const T* row[V::size];
    for (int i = 0; i < V::size; ++i) {
      row[i] = rows + (lane + i < count ? lane + i : count - 1) * columns;
    }
    T* const to = lines + lane;
    int64_t c = 0;
    for (; c + V::size <= columns; c += V::size) {
      V block[V::size];
      for (int i = 0; i < V::size; ++i) block[i] = V::load(row[i] + c);
      transpose(block);
      for (int i = 0; i < V::size; ++i) block[i].store(to + (c + i) * kLanes<T, kVectors>);
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < V::size; ++i) to[c * kLanes<T, kVectors> + i] = row[i][c];
    }
  }
}

template <class T, int kVectors>
void lines_to_rows(const T* lines, int64_t columns, int64_t count, T* rows) {
  using V = Vec<T>;
  for (int64_t lane = 0; lane < count; lane += V::size) {
    const T* const from = lines + lane;
    T* const to = rows + lane * columns;
    const int many = static_cast<int>(count - lane < V::size ? count - lane : V::size);
    int64_t c = 0;
    for (; c + V::size <= columns; c += V::size) {
      V block[V::size];
      for (int i = 0; i < V::size; ++i) block[i] = V::load(from + (c + i) * kLanes<T, kVectors>);
      transpose(block);
      for (int i = 0; i < many; ++i) block[i].store(to + i * columns + c);
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < many; ++i) to[i * columns + c] = from[c * kLanes<T, kVectors> + i];
    }
  }
}

// Units of one step: what enters them, for all samples of a tile.
template <class T>
struct UnitRows {
  const T* weight;  // of the first unit
  int64_t row;      // from one unit's weights to the next one's
  const T* bias;
  const T* context;  // lines that are added, or nullptr
  const T* inputs;   // lines
  int64_t depth;     // how many of them
  T* out;            // lines
};

// out[u] = bias[u] + context[u] + the sum of weight[u][k] inputs[k], in ascending k, so that a
// sample's result depends on nothing else.
template <class T, int kUnits, int kVectors>
FASTZOO_INLINE void multiply(const UnitRows<T>& rows, int64_t unit) {
  using V = Vec<T>;
  constexpr int64_t kStride = kLanes<T, kVectors>;
  const T* const weight = rows.weight + unit * rows.row;
  V sums[kUnits][kVectors];
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[u][v] = V(rows.bias[unit + u]);
      if (rows.context == nullptr) continue;
      sums[u][v] = sums[u][v] + V::load(rows.context + (unit + u) * kStride + v * V::size);
    }
  }
  const T* inputs = rows.inputs;
  for (int64_t k = 0; k < rows.depth; ++k) {
    V values[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) values[v] = V::load(inputs + v * V::size);
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) {
      const V factor(weight[u * rows.row + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[u][v] = fused_multiply_add(factor, values[v], sums[u][v]);
      }
    }
    inputs += kStride;
  }
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[u][v].store(rows.out + (unit + u) * kStride + v * V::size);
    }
  }
}

template <class T, int kUnits, int kVectors>
void multiply_last(const UnitRows<T>& rows, int64_t unit, int64_t left) {
  if constexpr (kUnits > 0) {
    if (left < kUnits) return multiply_last<T, kUnits - 1, kVectors>(rows, unit, left);
    multiply<T, kUnits, kVectors>(rows, unit);
  }
}

template <class T, int kVectors>
void multiply_all(const UnitRows<T>& rows, int64_t units) {
  constexpr int kMost = kUnitsAtOnce<kVectors>;
  int64_t unit = 0;
  for (; unit + kMost <= units; unit += kMost) multiply<T, kMost, kVectors>(rows, unit);
  multiply_last<T, kMost - 1, kVectors>(rows, unit, units - unit);
}

template <class T>
void activate(math::Activation activation, T* values, int64_t count) {
  using V = Vec<T>;
  for (int64_t i = 0; i < count; i += V::size) {
    math::activate<T>(activation, V::load(values + i)).store(values + i);
  }
}

// A value in a line, as a vector of samples has it.
template <class T>
struct Place {
  T* at;
  __attribute__((always_inline)) operator Vec<T>() const { return Vec<T>::load(at); }
  __attribute__((always_inline)) void operator=(Vec<T> value) const { value.store(at); }
};

// Parameters of a vector of samples, in lines.
template <class T, int64_t kStride>
struct Parameters {
  T* at;
  __attribute__((always_inline)) Place<T> operator[](int i) const { return {at + i * kStride}; }
  __attribute__((always_inline)) Parameters operator+(int i) const { return {at + i * kStride}; }
};

// Of a vector of samples, a feature: y becomes x. Returns the log-derivative.
template <class T, int64_t kStride>
Vec<T> solve(const math::MaskedMap& map, const math::MaskedConstants<T>& constants,
             const Parameters<T, kStride>& parameters, T* feature) {
  constexpr int kBins = 8;  // what most splines have
  Vec<T> log;
  math::with_masked_inverse<kBins>(map, [&](auto inverse) __attribute__((always_inline)) {
    const math::Mapped<Vec<T>> x = inverse.of(constants, Vec<T>::load(feature), parameters);
    x.value.store(feature);
    log = x.log;
  });
  return log;
}

// What a tile works in.
template <class T, int kVectors>
struct Scratch {
  Arena arena;
  T* features;    // lines: y, and from its step on x
  T* hidden;      // lines of all hidden layers
  T* context;     // lines of `first`
  T* parameters;  // lines of a step's
  double* totals;

  Scratch(void* base, const MaskedArgs& args) : arena(base) {
    constexpr int64_t kStride = kLanes<T, kVectors>;
    const math::MaskedLayout& layout = args.layout;
    int64_t most = 0;
    for (int64_t s = 0; s < args.steps.count; ++s) {
      const int64_t own =
          step_begin(args.steps, layout.layers, s + 1) - step_begin(args.steps, layout.layers, s);
      if (own > most) most = own;
    }
    features = arena.take<T>(layout.features * kStride);
    hidden = arena.take<T>(layout.units * kStride);
    context = arena.take<T>(args.first == nullptr ? 0 : layout.layer[0].out * kStride);
    parameters = arena.take<T>(most * kStride);
    totals = arena.take<double>(kStride);
  }
};

template <class T, int kVectors>
struct Tile {
  using V = Vec<T>;
  static constexpr int64_t kStride = kLanes<T, kVectors>;

  const MaskedArgs& args;
  const math::MaskedLayout& layout;
  math::MaskedConstants<T> constants;
  Scratch<T, kVectors> scratch;

  Tile(const MaskedArgs& args, void* base)
      : args(args),
        layout(args.layout),
        constants(math::masked_constants<T>(args.map)),
        scratch(base, args) {}

  // The samples from `first` on.
  void run(int64_t first) const {
    const int64_t left = args.batch - first;
    const int64_t count = left < kStride ? left : kStride;
    const int64_t dims = layout.features, contexts = layout.layer[0].out;
    rows_to_lines<T, kVectors>(static_cast<const T*>(args.y) + first * dims, dims, count,
                               scratch.features);
    if (args.first != nullptr) {
      rows_to_lines<T, kVectors>(static_cast<const T*>(args.first) + first * contexts, contexts,
                                 count, scratch.context);
    }
    for (int64_t i = 0; i < kStride; ++i) scratch.totals[i] = 0;
    V sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = V(T(0));
    int64_t terms = 0;
    for (int64_t step = 0; step < args.steps.count; ++step) {
      find_parameters(step);
      const int64_t begin = step_begin(args.steps, 0, step);
      const int64_t own = step_begin(args.steps, 0, step + 1) - begin;
      for (int64_t i = 0; i < own; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          const Parameters<T, kStride> parameters{scratch.parameters + v * V::size};
          sums[v] = sums[v] + solve(args.map, constants,
                                    parameters + static_cast<int>(i) * args.map.parameters,
                                    scratch.features + (begin + i) * kStride + v * V::size);
        }
        if (++terms % kTermsAtOnce == 0) add(sums);
      }
    }
    add(sums);
    lines_to_rows<T, kVectors>(scratch.features, dims, count,
                               static_cast<T*>(args.x) + first * dims);
    T* const logdet = static_cast<T*>(args.logdet) + first;
    for (int64_t i = 0; i < count; ++i) logdet[i] = static_cast<T>(scratch.totals[i]);
  }

  void find_parameters(int64_t step) const {
    const T* const net = static_cast<const T*>(args.net);
    const T* inputs = scratch.features;
    T* hidden = scratch.hidden;
    for (int l = 1; l <= layout.layers; ++l) {
      const math::MaskedLayer& layer = layout.layer[l - 1];
      const bool last = l == layout.layers;
      const int64_t begin = step_begin(args.steps, l, step);
      const int64_t own = step_begin(args.steps, l, step + 1) - begin;
      T* const out = last ? scratch.parameters : hidden + begin * kStride;
      const bool has_context = l == 1 && args.first != nullptr;
      multiply_all<T, kVectors>(
          {net + layer.weight + begin * layer.in, layer.in, net + layer.bias + begin,
           has_context ? scratch.context + begin * kStride : nullptr, inputs,
           step_inputs(args.steps, l, step), out},
          own);
      if (last) break;
      activate(args.activation, out, own * kStride);
      inputs = hidden;
      hidden += layer.out * kStride;
    }
  }

  void add(V (&sums)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) {
      T lanes[V::size];
      sums[v].store(lanes);
      for (int i = 0; i < V::size; ++i) scratch.totals[v * V::size + i] += lanes[i];
      sums[v] = V(T(0));
    }
  }
};

template <class T, int kVectors>
void run(const MaskedArgs& args, int64_t begin, int64_t end, void* scratch) {
  const Tile<T, kVectors> tile(args, scratch);
  for (int64_t i = begin; i < end; ++i) tile.run(i * kLanes<T, kVectors>);
}

template <class T>
void run(const MaskedArgs& args, const MaskedPlan& plan, int64_t begin, int64_t end,
         void* scratch) {
  switch (plan.vectors) {
    case 4:
      return run<T, 4>(args, begin, end, scratch);
    case 2:
      return run<T, 2>(args, begin, end, scratch);
    default:
      return run<T, 1>(args, begin, end, scratch);
  }
}

// Whether so many vectors are not too many for the batch, the threads and the second cache.
template <class T, int kVectors>
bool try_vectors(const MaskedArgs& args, int64_t threads, MaskedPlan& plan) {
  constexpr int64_t kCache = int64_t{1} << 19;
  plan.vectors = kVectors;
  plan.tiles = (args.batch + kLanes<T, kVectors> - 1) / kLanes<T, kVectors>;
  plan.scratch_bytes = Scratch<T, kVectors>(nullptr, args).arena.bytes();
  return args.batch > kLanes<T, kVectors> / 2 && plan.tiles >= threads &&
         plan.scratch_bytes <= kCache;
}

template <class T>
void find_plan(const MaskedArgs& args, int64_t threads, MaskedPlan& plan) {
  if (try_vectors<T, 4>(args, threads, plan)) return;
  if (try_vectors<T, 2>(args, threads, plan)) return;
  try_vectors<T, 1>(args, threads, plan);
}

}  // namespace

void masked_linear_plan(const MaskedArgs& args, int64_t threads, MaskedPlan& plan) {
  if (args.dtype == Dtype::float64) {
    find_plan<double>(args, threads, plan);
  } else {
    find_plan<float>(args, threads, plan);
  }
}

void autoregressive_inverse(const MaskedArgs& args, const MaskedPlan& plan, int64_t begin,
                            int64_t end, void* scratch) {
  if (args.dtype == Dtype::float64) {
    run<double>(args, plan, begin, end, scratch);
  } else {
    run<float>(args, plan, begin, end, scratch);
  }
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
