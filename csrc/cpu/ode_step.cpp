// fastzoo::ode_step, its noise, and the numbers that steer it, on the CPU.
#include "kernels/ode_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>

#include "../math/moments.h"
#include "entry.h"

namespace fastzoo {
namespace {

using math::kStepTensors;

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Calls kernel(args, begin, end) for all tiles. `worth` elements are worth a thread.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t worth) {
  const int64_t tiles = args.tiles().count();
  const int64_t each = 1 + args.samples * args.size / std::max<int64_t>(1, tiles);
  torch::stable::parallel_for(0, tiles, 1 + worth / each,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}
constexpr int64_t kWorth = kElementsWorthAThread / 2;
constexpr int64_t kRandomWorth = kElementsWorthAThread / 8;

// The tensors of a step, each of the first's shape or absent.
struct StepTensors {
  Tensor tensors[kStepTensors];
  int64_t samples, size;
  int count = 0;

  StepTensors(const char* op, const Tensor& t0, const Tensor& t1, const Tensor& t2,
              const Tensor& t3, const Tensor& t4, const Tensor& t5, const Tensor& t6,
              const Tensor& t7, cpu::StepTensor (&args)[kStepTensors]) {
    const int64_t numel = t0.numel();
    samples = t0.dim() > 0 ? t0.size(0) : 1;
    size = samples > 0 ? numel / samples : 0;
    const bool is_double = t0.scalar_type() == ScalarType::Double;
    int k = 0;
    for (const Tensor* tensor : {&t0, &t1, &t2, &t3, &t4, &t5, &t6, &t7}) {
      cpu::StepTensor& arg = args[k];
      arg = {nullptr, cpu::Dtype::float32};
      if (k == 0 || tensor->numel() > 0) {
        STD_TORCH_CHECK(tensor->numel() == numel, op, ": t", k, " has ", tensor->numel(),
                        " elements, t0 has ", numel);
        STD_TORCH_CHECK((tensor->scalar_type() == ScalarType::Double) == is_double, op,
                        ": all tensors must be float64, or none");
        tensors[k] = dense(*tensor);
        arg = {tensors[k].const_data_ptr(), kernel_dtype(tensors[k].scalar_type(), op)};
        ++count;
      }
      ++k;
    }
  }
};

// [1] or [samples] numbers; what is kept alive is returned in `kept`.
cpu::StepNumbers numbers(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                         int64_t samples, Tensor& kept) {
  const int64_t numel = tensor.numel();
  if (numel == 0) return {nullptr, false};
  STD_TORCH_CHECK(numel == 1 || numel == samples, op, ": ", name, " has ", numel, " numbers for ",
                  samples, " samples");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " is not of the compute dtype");
  kept = dense(tensor);
  return {kept.const_data_ptr(), numel > 1};
}

const int64_t* keys_of(const char* op, const Tensor& keys, int64_t samples) {
  STD_TORCH_CHECK(keys.dim() == 2 && keys.size(0) == samples && keys.size(1) == 2 &&
                      keys.scalar_type() == ScalarType::Long,
                  op, ": keys must be int64 [", samples, ", 2]");
  return static_cast<const int64_t*>(keys.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> ode_step(const Tensor& t0, const Tensor& t1, const Tensor& t2,
                                            const Tensor& t3, const Tensor& t4, const Tensor& t5,
                                            const Tensor& t6, const Tensor& t7,
                                            const Tensor& table_in, const Tensor& step_in,
                                            const Tensor& factor_in, const Tensor& threshold_in,
                                            const Tensor& keys_in, int64_t scaled, int64_t keep,
                                            bool stochastic) {
  constexpr const char* kOp = "ode_step";
  cpu::OdeStepArgs args{};
  const StepTensors in(kOp, t0, t1, t2, t3, t4, t5, t6, t7, args.tensors);
  const ScalarType dtype = t0.scalar_type(), compute = compute_dtype(dtype);
  args.dtype = kernel_dtype(dtype, kOp);
  args.samples = in.samples;
  args.size = in.size;

  const Tensor table = dense(table_in), keys = dense(keys_in);
  STD_TORCH_CHECK(table.dim() == 4 && table.size(3) == math::kStepNumbers &&
                      table.scalar_type() == ScalarType::Double,
                  kOp, ": the table must be float64 [S, Q, R, 13]");
  const int64_t tables = table.size(1), rows = table.size(2);
  STD_TORCH_CHECK((tables == 1 || tables == in.samples) && 1 <= rows && rows <= math::kStepRows,
                  kOp, ": a table of ", tables, " samples and ", rows, " rows");
  const int64_t step =
      step_in.numel() > 0 ? *static_cast<const int64_t*>(step_in.const_data_ptr()) : 0;
  STD_TORCH_CHECK(0 <= step && step < table.size(0), kOp, ": step ", step, " of ", table.size(0));
  args.table = static_cast<const double*>(table.const_data_ptr()) +
               step * tables * rows * math::kStepNumbers;
  args.table_each = tables > 1;
  args.rows = static_cast<int>(rows);
  args.scaled = scaled;
  Tensor factor, threshold;
  args.factor = numbers(kOp, "factor", factor_in, compute, in.samples, factor);
  args.threshold = numbers(kOp, "threshold", threshold_in, compute, in.samples, threshold);
  if (keys.numel() > 0) args.keys = keys_of(kOp, keys, in.samples);
  args.stochastic = stochastic;
  STD_TORCH_CHECK(!stochastic || args.keys != nullptr || in.samples == 0, kOp,
                  ": stochastic rounding needs keys");

  const Tensor out = torch::stable::empty_like(in.tensors[0]);
  Tensor kept[math::kStepRows - 1];
  int64_t arrays = in.count + 1;
  for (int row = 0; row + 1 < math::kStepRows; ++row) {
    const bool keeps = (keep >> row & 1) != 0 && row + 1 < rows;
    kept[row] = keeps ? torch::stable::empty_like(in.tensors[0]) : empty(t0, {0}, dtype);
    if (keeps) args.kept[row] = in_huge_pages(kept[row]).mutable_data_ptr();
    arrays += keeps;
  }
  if (in.samples * in.size > 0) {
    args.out = in_huge_pages(out).mutable_data_ptr();
    args.streams = arrays * in.samples * in.size * element_size(dtype) >= kStreamedBytes;
    const bool alike = !args.table_each && !args.factor.each && !args.threshold.each;
    if (alike && args.keys == nullptr) {
      args.size *= args.samples;
      args.samples = 1;
    }
    run(FASTZOO_SELECT_KERNEL(ode_step), args, args.keys == nullptr ? kWorth : kRandomWorth);
  }
  return {out, kept[0], kept[1]};
}

Tensor counter_numbers(const char* op, const Tensor& keys_in, int64_t n, int64_t draw,
                       bool normals) {
  const Tensor keys = dense(keys_in);
  const int64_t samples = keys.size(0);
  cpu::CounterArgs args{};
  args.samples = samples;
  args.size = n;
  args.keys = keys_of(op, keys, samples);
  args.draw = static_cast<uint32_t>(draw);
  const Tensor out = empty(keys, {samples, n}, normals ? ScalarType::Float : ScalarType::Long);
  if (samples * n == 0) return out;
  if (normals) {
    args.normals = static_cast<float*>(in_huge_pages(out).mutable_data_ptr());
  } else {
    args.words = static_cast<int64_t*>(in_huge_pages(out).mutable_data_ptr());
  }
  run(FASTZOO_SELECT_KERNEL(counter_numbers), args, kRandomWorth);
  return out;
}
Tensor counter_bits(const Tensor& keys, int64_t n, int64_t draw) {
  return counter_numbers("counter_bits", keys, n, draw, false);
}
Tensor counter_normal(const Tensor& keys, int64_t n, int64_t draw) {
  return counter_numbers("counter_normal", keys, n, draw, true);
}

// Of a sample, the standard deviation from its pieces' moments.
double deviation(const cpu::Moments* parts, const cpu::StepTiles& tiles) {
  math::Moments<double> all{};
  for (int64_t i = 0; i < tiles.pieces; ++i) {
    const double width = static_cast<double>(std::min(tiles.piece, tiles.size - i * tiles.piece));
    all = math::joined(all, {width, parts[2 * i].mean, parts[2 * i].squares});
  }
  return math::deviation(all);
}

Tensor guidance_factor(const Tensor& cond_in, const Tensor& uncond_in, const Tensor& guidance_in,
                       double rescale) {
  constexpr const char* kOp = "guidance_factor";
  cpu::GuidanceArgs args{};
  const Tensor cond = dense(cond_in), uncond = dense(uncond_in);
  const ScalarType compute = compute_dtype(cond.scalar_type());
  STD_TORCH_CHECK(cond.numel() == uncond.numel() && compute == compute_dtype(uncond.scalar_type()),
                  kOp, ": cond and uncond must be alike");
  args.samples = cond.dim() > 0 ? cond.size(0) : 1;
  args.size = args.samples > 0 ? cond.numel() / args.samples : 0;
  const Tensor factor = empty(cond, {args.samples}, compute);
  const auto set = [&](int64_t sample, double value) {
    if (compute == ScalarType::Double) {
      static_cast<double*>(factor.mutable_data_ptr())[sample] = value;
    } else {
      static_cast<float*>(factor.mutable_data_ptr())[sample] = static_cast<float>(value);
    }
  };
  if (rescale == 0) {
    for (int64_t i = 0; i < args.samples; ++i) set(i, 1);
    return factor;
  }
  args.cond = {cond.const_data_ptr(), kernel_dtype(cond.scalar_type(), kOp)};
  args.uncond = {uncond.const_data_ptr(), kernel_dtype(uncond.scalar_type(), kOp)};
  args.dtype = args.cond.dtype;
  Tensor guidance;
  args.guidance = numbers(kOp, "guidance", guidance_in, ScalarType::Double, args.samples, guidance);
  STD_TORCH_CHECK(args.samples == 0 || args.guidance.data != nullptr, kOp, ": no guidance");
  const cpu::StepTiles tiles = args.tiles();
  const std::unique_ptr<cpu::Moments[]> parts(new cpu::Moments[2 * args.samples * tiles.pieces]);
  args.parts = parts.get();
  run(FASTZOO_SELECT_KERNEL(guidance_moments), args, kWorth);
  for (int64_t i = 0; i < args.samples; ++i) {
    const cpu::Moments* const own = args.parts + 2 * i * tiles.pieces;
    set(i, rescale * deviation(own, tiles) / deviation(own + 1, tiles) + (1 - rescale));
  }
  return factor;
}

Tensor step_error(const Tensor& t0, const Tensor& t1, const Tensor& t2, const Tensor& t3,
                  const Tensor& t4, const Tensor& t5, const Tensor& t6, const Tensor& t7,
                  const Tensor& weights_in, const Tensor& factor_in, double rtol, double atol) {
  constexpr const char* kOp = "step_error";
  cpu::StepErrorArgs args{};
  const StepTensors in(kOp, t0, t1, t2, t3, t4, t5, t6, t7, args.tensors);
  const ScalarType dtype = t0.scalar_type();
  args.dtype = kernel_dtype(dtype, kOp);
  args.samples = in.samples;
  args.size = in.size;
  const Tensor result = empty(t0, {in.samples}, ScalarType::Double);
  double* const errors = static_cast<double*>(result.mutable_data_ptr());
  if (in.samples * in.size == 0) {
    std::fill_n(errors, in.samples, std::numeric_limits<double>::quiet_NaN());
    return result;
  }
  for (int k = 0; k < kStepTensors; ++k) {
    STD_TORCH_CHECK(
        (k > 1 && args.tensors[k].data == nullptr) || args.tensors[k].dtype == args.dtype, kOp,
        ": all tensors must have one dtype");
  }
  STD_TORCH_CHECK(args.tensors[1].data != nullptr, kOp, ": t1 is needed");
  const Tensor weights = dense(weights_in);
  STD_TORCH_CHECK(weights.numel() == kStepTensors && weights.scalar_type() == ScalarType::Double,
                  kOp, ": weights must be float64 [8]");
  std::copy_n(static_cast<const double*>(weights.const_data_ptr()), kStepTensors, args.weights);
  Tensor factor;
  args.factor = numbers(kOp, "factor", factor_in, compute_dtype(dtype), in.samples, factor);
  STD_TORCH_CHECK(args.factor.data != nullptr, kOp, ": no factor");
  args.rtol = rtol;
  args.atol = atol;
  const cpu::StepTiles tiles = args.tiles();
  const std::unique_ptr<double[]> parts(new double[in.samples * tiles.pieces]);
  args.parts = parts.get();
  run(FASTZOO_SELECT_KERNEL(step_error), args, kWorth);
  for (int64_t i = 0; i < in.samples; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < tiles.pieces; ++j) sum += parts[i * tiles.pieces + j];
    errors[i] = sum / static_cast<double>(in.size);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<ode_step>(m, "ode_step");
  implement<ode_step>(m, "ode_step.cpu");
  implement<counter_bits>(m, "counter_bits");
  implement<counter_bits>(m, "counter_bits.cpu");
  implement<counter_normal>(m, "counter_normal");
  implement<counter_normal>(m, "counter_normal.cpu");
  implement<guidance_factor>(m, "guidance_factor");
  implement<guidance_factor>(m, "guidance_factor.cpu");
  implement<step_error>(m, "step_error");
  implement<step_error>(m, "step_error.cpu");
}

}  // namespace fastzoo
