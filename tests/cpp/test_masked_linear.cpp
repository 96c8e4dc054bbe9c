// Masked-autoregressive transforms: activations against the C library's in a wider type, which
// layouts and steps are refused, and the kernel in tiles of every size against plain loops in
// double.
#include "per_isa.h"

namespace fastzoo::cpu {
FASTZOO_DECLARE_KERNEL(check_masked_linear, (int& failures))
}

#if !defined(FASTZOO_CPU_ISA)

FASTZOO_RUN_ON_EACH_ISA(check_masked_linear)

#else

#include <math.h>

#include <cstdlib>
#include <vector>

#include "../../csrc/cpu/kernels/masked_linear.cpp"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::Activation;

long double exact_activation(Activation activation, long double x) {
  switch (activation) {
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::tanh:
      return tanhl(x);
    case Activation::elu:
      return x > 0 ? x : expm1l(x);
    case Activation::silu:
      return x / (1 + expl(-x));
    case Activation::leaky_relu:
      return x > 0 ? x : 0.01L * x;
    case Activation::gelu:
      return x / 2 * erfcl(-x / sqrtl(2));
  }
  return 0;
}

template <class T>
void check_activations(int& failures) {
  using V = Vec<T>;
  constexpr int kCount = 1 << 14;
  const double unit = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
  for (const char* name : {"relu", "tanh", "elu", "silu", "leaky_relu", "gelu"}) {
    Activation activation;
    CHECK(math::activation_named(name, activation));
    double worst = 0;
    for (int i = 0; i < kCount; ++i) {
      const T x = static_cast<T>(-12 + 24. * i / (kCount - 1));
      const T found = math::activate<T>(activation, V(x))[0];
      const double wanted = static_cast<double>(exact_activation(activation, x));
      // An exponential has its argument's error: 72 is the largest argument here.
      const double allowed = unit * (fabs(wanted) * (activation == Activation::gelu ? 72 : 6));
      worst = fmax(worst, fabs(found - wanted) / (allowed + unit * 1e-30));
    }
    CHECK(worst <= 1);
    if (!(worst <= 1)) std::printf("%s: %g\n", name, worst);
    const T nan = static_cast<T>(__builtin_nan(""));
    const T of_nan = math::activate<T>(activation, V(nan))[0];
    CHECK(of_nan != of_nan);
  }
}

void check_layout(int& failures) {
  math::MaskedLayout layout;
  const int64_t widths[] = {3, 5, 6};
  CHECK(math::masked_layout(widths, 3, layout));
  CHECK(layout.layers == 2 && layout.features == 3 && layout.units == 5);
  CHECK(layout.layer[1].weight == 20 && layout.layer[1].bias == 50 && layout.size == 56);
  const int64_t none[] = {3, 0, 6};
  CHECK(!math::masked_layout(none, 3, layout));
  CHECK(!math::masked_layout(widths, 1, layout));

  CHECK(math::masked_layout(widths, 3, layout));
  const int64_t good[] = {0, 1, 3, 0, 2, 5, 0, 2, 6};
  CHECK(math::masked_steps_fit({good, 2}, layout, 2));
  CHECK(!math::masked_steps_fit({good, 2}, layout, 3));
  for (int i = 0; i < 9; ++i) {
    std::vector<int64_t> bad(good, good + 9);
    bad[static_cast<size_t>(i)] = 4;
    CHECK(i == 4 || !math::masked_steps_fit({bad.data(), 2}, layout, 2));
  }
}

// In [-1, 1), the same for the same argument.
double element(int64_t i) {
  uint64_t bits = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u;
  bits ^= bits >> 29;
  return static_cast<double>(bits * 0xbf58476d1ce4e5b9u >> 40) / (1 << 23) - 1;
}

// Of 11 features in steps of 1, 1, 2, 3 and 4; the first layer has 13 units, the second 20.
template <class T, int kVectors>
void check_kernel(int& failures, int64_t batch, bool with_first, std::vector<T>& x) {
  constexpr int64_t kFeatures = 11, kFirst = 13, kSecond = 20;
  const int64_t widths[] = {kFeatures, kFirst, kSecond, 2 * kFeatures};
  const int64_t starts[] = {0, 1, 2, 4, 7,  11,  // features
                            0, 0, 1, 3, 3,  13,  //
                            0, 1, 8, 8, 17, 20,  //
                            0, 2, 4, 8, 14, 22};
  MaskedArgs args{};
  args.dtype = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;
  CHECK(math::masked_layout(widths, 4, args.layout));
  args.steps = {starts, 5};
  CHECK(math::masked_map_named("tanh", 0, 0.5, 0, args.map));
  CHECK(math::masked_steps_fit(args.steps, args.layout, args.map.parameters));
  args.activation = Activation::elu;
  args.batch = batch;
  std::vector<T> net(static_cast<size_t>(args.layout.size)), logdet(static_cast<size_t>(batch));
  std::vector<T> y(static_cast<size_t>(batch * kFeatures)),
      first(static_cast<size_t>(batch * kFirst));
  // Weights of units that are not known yet are not read.
  for (size_t i = 0; i < net.size(); ++i) net[i] = static_cast<T>(__builtin_nan(""));
  for (int l = 1; l <= 3; ++l) {
    const math::MaskedLayer& layer = args.layout.layer[l - 1];
    for (int64_t s = 0; s < 5; ++s) {
      for (int64_t u = step_begin(args.steps, l, s); u < step_begin(args.steps, l, s + 1); ++u) {
        net[static_cast<size_t>(layer.bias + u)] = static_cast<T>(element(l * 1000 + u));
        for (int64_t k = 0; k < step_inputs(args.steps, l, s); ++k) {
          const int64_t at = layer.weight + u * layer.in + k;
          net[static_cast<size_t>(at)] = static_cast<T>(element(at) / 2);
        }
      }
    }
  }
  for (size_t i = 0; i < y.size(); ++i)
    y[i] = static_cast<T>(2 * element(static_cast<int64_t>(i) + 77777));
  for (size_t i = 0; i < first.size(); ++i)
    first[i] = static_cast<T>(element(static_cast<int64_t>(i) + 99999));
  x.assign(y.size(), 0);
  args.net = net.data();
  args.first = with_first ? first.data() : nullptr;
  args.y = y.data();
  args.x = x.data();
  args.logdet = logdet.data();
  MaskedPlan plan{};
  try_vectors<T, kVectors>(args, 1, plan);
  CHECK((plan.tiles * kLanes<T, kVectors> >= batch));
  void* const scratch = std::aligned_alloc(64, static_cast<size_t>(plan.scratch_bytes));
  __builtin_memset(scratch, 0xff, static_cast<size_t>(plan.scratch_bytes));
  autoregressive_inverse(args, plan, 0, plan.tiles, scratch);
  std::free(scratch);

  double worst = 0;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> layers[4];
    for (int l = 0; l < 4; ++l) layers[l].assign(static_cast<size_t>(widths[l]), 0);
    double total = 0;
    for (int64_t s = 0; s < 5; ++s) {
      for (int l = 1; l <= 3; ++l) {
        const math::MaskedLayer& layer = args.layout.layer[l - 1];
        for (int64_t u = step_begin(args.steps, l, s); u < step_begin(args.steps, l, s + 1); ++u) {
          double sum = net[static_cast<size_t>(layer.bias + u)];
          if (l == 1 && with_first) sum += first[static_cast<size_t>(b * kFirst + u)];
          for (int64_t k = 0; k < step_inputs(args.steps, l, s); ++k) {
            sum += static_cast<double>(net[static_cast<size_t>(layer.weight + u * layer.in + k)]) *
                   layers[l - 1][static_cast<size_t>(k)];
          }
          layers[l][static_cast<size_t>(u)] = l == 3 || sum > 0 ? sum : expm1(sum);
        }
      }
      for (int64_t d = starts[s]; d < starts[s + 1]; ++d) {
        const double shift = layers[3][static_cast<size_t>(2 * d)];
        const double log = 0.5 * tanh(layers[3][static_cast<size_t>(2 * d + 1)]);
        layers[0][static_cast<size_t>(d)] =
            (y[static_cast<size_t>(b * kFeatures + d)] - shift) * exp(-log);
        total -= log;
      }
    }
    for (int64_t d = 0; d < kFeatures; ++d) {
      const double wanted = layers[0][static_cast<size_t>(d)];
      const double found = x[static_cast<size_t>(b * kFeatures + d)];
      worst = fmax(worst, fabs(found - wanted) / (1 + fabs(wanted)));
      if (!(fabs(found) < 1e30)) worst = 1;
    }
    worst = fmax(worst, fabs(logdet[static_cast<size_t>(b)] - total));
  }
  // 500 operations a sample, whose errors the next steps enlarge a few times.
  const double allowed = sizeof(T) == 4 ? 1e-4 : 1e-13;
  CHECK(worst < allowed);
  if (!(worst < allowed)) std::printf("batch %d: %g\n", static_cast<int>(batch), worst);
}

template <class T>
void check_kernels(int& failures) {
  for (const int64_t batch : {1, 3, 16, 17, 70}) {
    for (const bool with_first : {false, true}) {
      std::vector<T> by_one, by_two, by_four;
      check_kernel<T, 1>(failures, batch, with_first, by_one);
      check_kernel<T, 2>(failures, batch, with_first, by_two);
      check_kernel<T, 4>(failures, batch, with_first, by_four);
      CHECK(by_one == by_two);
      CHECK(by_one == by_four);
    }
  }
}

}  // namespace

void check_masked_linear(int& failures) {
  check_activations<float>(failures);
  check_activations<double>(failures);
  check_layout(failures);
  check_kernels<float>(failures);
  check_kernels<double>(failures);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA

#endif
