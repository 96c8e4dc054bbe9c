// The inverse of a masked-autoregressive transform in one kernel. A block has a tile of samples,
// with their features and the net's units in shared memory; step by step it finds the units that
// wait for the features solved last, so that all steps cost what one pass through the net does.
#include "../math/masked_linear.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../torch_abi.h"
#include "runtime/rows.h"

namespace fastzoo::cuda {
namespace {

using math::step_begin;

constexpr int kThreads = 256;
constexpr int kUnits = 4;  // whose products a thread sums at once
constexpr int kPartials = kThreads * kUnits;
constexpr int kMostParts = 16;  // that the products of a unit are divided into
constexpr int kLogSamples = 5;  // of a tile, at most; and at least, where that makes enough blocks
constexpr int kLogFewSamples = 2;

template <class C, int bytes>
struct Room {
  static constexpr int kCount = bytes / static_cast<int>(sizeof(C));
  SharedArray<C, kCount> values;
};

// Lines hold a number for each sample of a tile: those of the features, which are y until they are
// x, those of all hidden units, and those of the parameters of a few features. Behind the lines are
// the parts of sums.
template <class C>
struct Masked {
  math::MaskedLayout layout;
  math::MaskedSteps steps;
  math::MaskedConstants<C> constants;
  math::Activation activation;
  int parameters;  // of a feature
  int features;    // whose parameters are there at once
  int log_samples;
  int64_t batch;
  const C* net;
  const C* first;  // or null
  const C* y;
  C* x;
  C* logdet;
};

// Of a feature of a sample.
template <class Array, class C>
struct Parameters {
  Array* values;
  int at, step;

  FASTZOO_DEVICE C& operator[](int i) const { return (*values)[at + i * step]; }
  FASTZOO_DEVICE Parameters operator+(int i) const { return {values, at + i * step, step}; }
};

template <class C>
struct Tile {
  using Array = SharedArray<C, Room<C, kLargeShared>::kCount>;

  const Masked<C>& in;
  Array& values;
  int log_samples, samples, sample;
  int slot, slots;           // a slot is the threads that have one sample each
  int parameters, partials;  // where they begin

  FASTZOO_DEVICE Tile(const Masked<C>& in, Array& values)
      : in(in),
        values(values),
        log_samples(in.log_samples),
        samples(1 << log_samples),
        sample(threadIdx.x & (samples - 1)),
        slot(threadIdx.x >> log_samples),
        slots(kThreads >> log_samples),
        parameters(static_cast<int>(in.layout.features + in.layout.units) << log_samples),
        partials(parameters + (in.features * in.parameters << log_samples)) {}

  FASTZOO_DEVICE int64_t row_of(int own_sample) const {
    const int64_t row = (int64_t{blockIdx.x} << log_samples) + own_sample;
    return row < in.batch ? row : in.batch - 1;
  }

  // Units [begin, begin + count) of a layer: to lines from `out` on, of the first `depth` lines
  // from `inputs` on.
  FASTZOO_DEVICE void find_units(int l, int64_t begin, int count, int inputs, int depth, int out) {
    const math::MaskedLayer& layer = in.layout.layer[l - 1];
    const bool is_hidden = l < in.layout.layers;
    const C* const context = l == 1 ? in.first : nullptr;
    for (int base = 0; base < count; base += slots * kUnits) {
      const int left = count - base < slots * kUnits ? count - base : slots * kUnits;
      const int groups = (left + kUnits - 1) / kUnits;
      const int most = slots / groups;
      const int parts = most < kMostParts ? most : kMostParts;
      const int group = slot / parts;
      const int part = slot - group * parts;
      if (group < groups) {
        const C* weights[kUnits];
        C sums[kUnits] = {};
#pragma unroll
        for (int j = 0; j < kUnits; ++j) {
          const int unit = group * kUnits + j;
          const int64_t row = begin + base + (unit < left ? unit : left - 1);
          weights[j] = in.net + layer.weight + row * layer.in;
        }
#pragma unroll 4
        for (int k = part; k < depth; k += parts) {
          const C value = values[inputs + (k << log_samples) + sample];
#pragma unroll
          for (int j = 0; j < kUnits; ++j) {
            sums[j] = fused_multiply_add(weights[j][k], value, sums[j]);
          }
        }
#pragma unroll
        for (int j = 0; j < kUnits; ++j) {
          const int unit = group * kUnits + j;
          values[partials + ((unit * parts + part) << log_samples) + sample] = sums[j];
        }
      }
      sync_block();
      for (int unit = slot; unit < left; unit += slots) {
        const int64_t row = begin + base + unit;
        C sum = in.net[layer.bias + row];
        if (context != nullptr) sum += context[row_of(sample) * layer.out + row];
#pragma unroll 4
        for (int p = 0; p < parts; ++p) {
          sum += values[partials + ((unit * parts + p) << log_samples) + sample];
        }
        if (is_hidden) sum = math::activate<C>(in.activation, sum);
        values[out + ((base + unit) << log_samples) + sample] = sum;
      }
      sync_block();
    }
  }
};

template <class C, class Inverse>
__global__ void __launch_bounds__(kThreads, 2) masked_inverse(Masked<C> in) {
  using Array = typename Tile<C>::Array;
  Tile<C> tile(in, large_shared<Room<C, kLargeShared>>().values);
  Array& values = tile.values;
  const int thread = threadIdx.x;
  const int log_samples = tile.log_samples, sample = tile.sample;
  const int dims = static_cast<int>(in.layout.features);
  const int layers = in.layout.layers;

  for (int i = thread; i < dims << log_samples; i += kThreads) {
    const int own = i / dims, d = i - own * dims;
    values[(d << log_samples) + own] = in.y[tile.row_of(own) * dims + d];
  }
  sync_block();
  double log_sum = 0;
  for (int64_t step = 0; step < in.steps.count; ++step) {
    int inputs = 0, own = dims << log_samples;  // where the lines of layers begin
    for (int l = 1; l < layers; ++l) {
      const int begin = static_cast<int>(step_begin(in.steps, l, step));
      const int end = static_cast<int>(step_begin(in.steps, l, step + 1));
      const int depth = static_cast<int>(step_inputs(in.steps, l, step));
      tile.find_units(l, begin, end - begin, inputs, depth, own + (begin << log_samples));
      inputs = own;
      own += static_cast<int>(in.layout.layer[l - 1].out) << log_samples;
    }
    const int begin = static_cast<int>(step_begin(in.steps, 0, step));
    const int end = static_cast<int>(step_begin(in.steps, 0, step + 1));
    const int depth = static_cast<int>(step_inputs(in.steps, layers, step));
    for (int d = begin; d < end; d += in.features) {
      const int many = end - d < in.features ? end - d : in.features;
      tile.find_units(layers, int64_t{d} * in.parameters, many * in.parameters, inputs, depth,
                      tile.parameters);
      if (tile.slot < many) {
        const Parameters<Array, C> parameters{
            &values, tile.parameters + (tile.slot * in.parameters << log_samples) + sample,
            tile.samples};
        C& feature = values[((d + tile.slot) << log_samples) + sample];
        const math::Mapped<C> x = Inverse::of(in.constants, feature, parameters);
        feature = x.value;
        log_sum += x.log;
      }
      sync_block();
    }
  }

  values[tile.partials + (tile.slot << log_samples) + sample] = static_cast<C>(log_sum);
  sync_block();
  const int64_t first = int64_t{blockIdx.x} << log_samples;
  const int count =
      in.batch - first < tile.samples ? static_cast<int>(in.batch - first) : tile.samples;
  if (thread < count) {
    double total = 0;
    for (int slot = 0; slot < in.features; ++slot) {
      total += values[tile.partials + (slot << log_samples) + thread];
    }
    in.logdet[first + thread] = static_cast<C>(total);
  }
  for (int i = thread; i < count * dims; i += kThreads) {
    const int own = i / dims, d = i - own * dims;
    in.x[(first + own) * dims + d] = values[(d << log_samples) + own];
  }
}

// Sets how many samples a tile has, and how many features have parameters at once, as they fit in
// so many bytes; false where not even one does.
template <class C>
bool fit(Masked<C>& in, int bytes) {
  const int64_t room = bytes / static_cast<int64_t>(sizeof(C)) - kPartials;
  const int64_t lines = in.layout.features + in.layout.units;
  const int64_t left = (room >> in.log_samples) - lines;
  if (left < in.parameters) return false;
  in.features = static_cast<int>(
      std::min({left / in.parameters, int64_t{kThreads} >> in.log_samples, in.layout.features}));
  return true;
}

template <class C>
void launch(const Tensor& y, const math::MaskedMap& map, Masked<C>& in) {
  const Stream stream(y);
  const auto launch_in = [&](auto bytes) {
    math::with_masked_inverse<0>(map, [&](auto inverse) {
      stream.launch_large<Room<C, bytes.value>>(
          "masked_inverse", masked_inverse<C, decltype(inverse)>,
          blocks_for(in.batch, int64_t{1} << in.log_samples), kThreads, in);
    });
  };
  constexpr int kLittle = 32 * 1024;
  const int most = stream.has_large_shared() ? kLargeShared : kCommonShared;
  in.log_samples = kLogSamples;
  while (in.log_samples > kLogFewSamples && in.batch >> in.log_samples < kManyBlocks) {
    --in.log_samples;
  }
  while (in.log_samples > 0 && !fit(in, most)) --in.log_samples;
  STD_TORCH_CHECK(fit(in, most), "autoregressive_inverse: ", in.layout.features, " features and ",
                  in.layout.units, " hidden units of a sample, and ", in.parameters,
                  " parameters, do not fit in this GPU's ", most, " bytes of shared memory");
  if (fit(in, kLittle)) return launch_in(std::integral_constant<int, kLittle>{});
  if (fit(in, kCommonShared)) return launch_in(std::integral_constant<int, kCommonShared>{});
  fit(in, kLargeShared);
  launch_in(std::integral_constant<int, kLargeShared>{});
}

template <class C>
void solve(const Tensor& y, const Tensor& first, const Tensor& net, const Tensor& starts,
           const math::MaskedMap& map, const math::MaskedLayout& layout,
           math::Activation activation, const Tensor& x, const Tensor& logdet) {
  Masked<C> in{};
  in.layout = layout;
  in.steps = {static_cast<const int64_t*>(starts.const_data_ptr()), starts.size(1) - 1};
  in.constants = math::masked_constants<C>(map);
  in.activation = activation;
  in.parameters = map.parameters;
  in.batch = y.size(0);
  in.net = static_cast<const C*>(net.const_data_ptr());
  in.first = optional_data<const C>(first);
  in.y = static_cast<const C*>(y.const_data_ptr());
  in.x = static_cast<C*>(x.mutable_data_ptr());
  in.logdet = static_cast<C*>(logdet.mutable_data_ptr());
  launch(y, map, in);
}

std::tuple<Tensor, Tensor> autoregressive_inverse(const Tensor& y, const Tensor& first,
                                                  const Tensor& net, std::vector<int64_t> widths,
                                                  const Tensor& starts, std::string activation,
                                                  std::string map, int64_t bins, double constant,
                                                  double floor) {
  using torch::stable::contiguous;
  math::MaskedLayout layout;
  STD_TORCH_CHECK(math::masked_layout(widths.data(), static_cast<int64_t>(widths.size()), layout),
                  "fastzoo: autoregressive_inverse: the features and 1 to ", math::kMaskedLayers,
                  " layers of at least 1 unit expected");
  math::Activation own_activation;
  STD_TORCH_CHECK(math::activation_named(activation.c_str(), own_activation),
                  "fastzoo: autoregressive_inverse: unknown activation ", activation);
  math::MaskedMap own_map;
  STD_TORCH_CHECK(math::masked_map_named(map.c_str(), bins, constant, floor, own_map),
                  "fastzoo: autoregressive_inverse: unknown map ", map, " of ", bins, " bins");
  const ScalarType compute = compute_dtype(y.scalar_type());
  const Tensor x = empty(y, {y.size(0), layout.features}, compute);
  const Tensor logdet = empty(y, {y.size(0)}, compute);
  if (y.size(0) > 0) {
    const auto dense = [&](const Tensor& tensor) {
      return contiguous(torch::stable::to(tensor, compute));
    };
    const auto run = compute == ScalarType::Double ? solve<double> : solve<float>;
    run(dense(y), dense(first), dense(net), contiguous(starts), own_map, layout, own_activation, x,
        logdet);
  }
  return {torch::stable::to(x, y.scalar_type()), logdet};
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::autoregressive_inverse>(m, "autoregressive_inverse.cuda");
}
