// fastzoo::vq_nearest and vq_quantize on the CPU.
#include "kernels/vq.h"

#include <string>
#include <tuple>

#include "entry.h"
#include "runtime/arena.h"

namespace fastzoo {
namespace {

using math::Metric;

int64_t grain(int64_t elements) { return 1 + kElementsWorthAThread / elements; }

// The operands of a lookup: vectors [N, D] with codes [K, D], or [N, H, D] with [H, K, D].
struct Operands {
  Tensor x, codebook, mask;
  int64_t heads;
  cpu::VqArgs args{};

  Operands(const char* op, const Tensor& x_in, const Tensor& codebook_in, const Tensor& mask_in,
           const std::string& metric, const std::string& precision)
      : x(torch::stable::contiguous(x_in)),
        codebook(torch::stable::contiguous(codebook_in)),
        mask(torch::stable::contiguous(mask_in)),
        heads(codebook.dim() == 3 ? codebook.size(0) : 1) {
    STD_TORCH_CHECK(precision == "exact" || precision == "fast", op,
                    ": precision must be exact or fast, got ", precision);
    args.dtype = kernel_dtype(x.scalar_type(), op);
    STD_TORCH_CHECK(math::metric_named(metric.c_str(), args.metric), op, ": unknown metric ",
                    metric);
    args.fast = precision == "fast";
    args.rows = x.size(0);
    args.codes = codebook.size(codebook.dim() - 2);
    args.dims = codebook.size(codebook.dim() - 1);
    args.k = 1;
    args.threads = static_cast<int>(torch::stable::get_num_threads());
    STD_TORCH_CHECK(args.codes >= 1 && args.codes < (int64_t{1} << 31) && args.dims >= 1, op,
                    ": a codebook of ", args.codes, " codes of ", args.dims,
                    " dimensions is out of range");
    STD_TORCH_CHECK(mask.size(0) == 0 || mask.size(0) == args.rows, op, ": a mask of ",
                    mask.size(0), " for ", args.rows, " vectors");
    args.mask = static_cast<const bool*>(data_or_null(mask));
    args.x_stride = heads * args.dims;
  }

  Tensor like_x() const {
    if (codebook.dim() == 3) return empty(x, {args.rows, heads, args.dims}, x.scalar_type());
    return empty(x, {args.rows, args.dims}, x.scalar_type());
  }

  // [rows], or [rows, heads]; with k, [rows, k] or [rows, heads, k].
  Tensor results(ScalarType dtype, int64_t k) const {
    if (codebook.dim() == 3) {
      return k > 0 ? empty(x, {args.rows, heads, k}, dtype) : empty(x, {args.rows, heads}, dtype);
    }
    return k > 0 ? empty(x, {args.rows, k}, dtype) : empty(x, {args.rows}, dtype);
  }
};

// Where each head's share of something contiguous lies.
template <class Pointer>
Pointer shifted(Pointer base, int64_t elements, int64_t element_size) {
  using Bytes =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return base == nullptr ? base : static_cast<Bytes*>(base) + elements * element_size;
}

// What a lookup needs beside its operands and results; serves the heads one after another.
class Lookup {
 public:
  explicit Lookup(const Operands& operands) : like_(operands.x), args_(operands.args) {
    const int64_t value_bytes = element_size(compute_dtype(like_.scalar_type()));
    const bool cosine = args_.metric == Metric::cosine;
    FASTZOO_SELECT_KERNEL(vq_plan)(args_, plan_);
    // A sample of the rows decides; it must be cheap beside all of them.
    constexpr int64_t kRowsWorthAProbe = 128;
    args_.bfloat16 = plan_.bfloat16 && (args_.fast || args_.rows >= kRowsWorthAProbe);
    args_.fast = args_.fast && args_.bfloat16;
    const auto take = [&](cpu::Arena arena) {
      args_.centre = arena.take<char>(args_.dims * value_bytes);
      args_.squares = arena.take<double>(args_.codes);
      args_.norms = arena.take<double>(cosine ? args_.codes : 0);
      args_.lost = arena.take<double>(args_.bfloat16 ? args_.codes : 0);
      args_.loose = arena.take<int32_t>(args_.codes);
      table_ = arena.take<int32_t>(plan_.table_size);
      return arena.bytes();
    };
    scratch_ = empty(like_, {take(cpu::Arena())}, ScalarType::Byte);
    take(cpu::Arena(scratch_.mutable_data_ptr()));
    plan();
  }

  // The same operands and results of the next head.
  void run(const cpu::VqArgs& head) {
    args_.x = head.x;
    args_.codebook = head.codebook;
    args_.indices = head.indices;
    args_.values = head.values;
    args_.quantized = head.quantized;
    if (args_.metric == Metric::l2) {
      const auto kernel = FASTZOO_SELECT_KERNEL(vq_centre);
      torch::stable::parallel_for(0, args_.dims, grain(args_.codes),
                                  [&](int64_t begin, int64_t end) { kernel(args_, begin, end); });
    }
    pack();
    if (args_.bfloat16 && !args_.fast && !pays()) {
      args_.bfloat16 = false;
      plan();
      pack();
    }
    const auto kernel = FASTZOO_SELECT_KERNEL(vq_lookup);
    const int threads = args_.threads;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        kernel(args_, args_.rows * part / threads, args_.rows * (part + 1) / threads,
               workspaces_ + part * plan_.workspace_bytes);
      }
    });
  }

 private:
  void plan() {
    FASTZOO_SELECT_KERNEL(vq_plan)(args_, plan_);
    const auto take = [&](cpu::Arena arena) {
      args_.starts = arena.take<char>(plan_.starts_bytes);
      args_.lines = arena.take<char>(plan_.lines_bytes);
      workspaces_ = arena.take<char>(args_.threads * plan_.workspace_bytes);
      return arena.bytes();
    };
    packed_ = empty(like_, {take(cpu::Arena())}, ScalarType::Byte);
    take(cpu::Arena(packed_.mutable_data_ptr()));
  }

  void pack() {
    const auto kernel = FASTZOO_SELECT_KERNEL(vq_pack);
    torch::stable::parallel_for(0, plan_.code_panels, grain(plan_.lines_bytes / plan_.code_panels),
                                [&](int64_t begin, int64_t end) { kernel(args_, begin, end); });
    FASTZOO_SELECT_KERNEL(vq_select)(args_, table_, plan_.table_size);
  }

  bool pays() {
    bool result = false;
    args_.probing = true;
    FASTZOO_SELECT_KERNEL(vq_probe)(args_, workspaces_, result);
    args_.probing = false;
    return result;
  }

  const Tensor& like_;
  cpu::VqArgs args_;
  cpu::VqPlan plan_{};
  int32_t* table_ = nullptr;
  char* workspaces_ = nullptr;
  Tensor scratch_, packed_;
};

void look_up(Operands& operands, const Tensor& indices, const Tensor& values,
             const Tensor* quantized) {
  cpu::VqArgs& args = operands.args;
  if (args.rows == 0) return;
  args.out_stride = operands.heads * args.k;
  const int64_t element = element_size(operands.x.scalar_type());
  const int64_t value = element_size(values.scalar_type());
  Lookup lookup(operands);
  for (int64_t head = 0; head < operands.heads; ++head) {
    args.x = shifted(operands.x.const_data_ptr(), head * args.dims, element);
    args.codebook =
        shifted(operands.codebook.const_data_ptr(), head * args.codes * args.dims, element);
    args.indices = static_cast<int64_t*>(indices.mutable_data_ptr()) + head * args.k;
    args.values = shifted(values.mutable_data_ptr(), head * args.k, value);
    if (quantized != nullptr) {
      args.quantized = shifted(quantized->mutable_data_ptr(), head * args.dims, element);
    }
    lookup.run(args);
  }
}

std::tuple<Tensor, Tensor> vq_nearest(const Tensor& x, const Tensor& codebook, const Tensor& mask,
                                      std::string metric, int64_t k, std::string precision) {
  Operands operands("vq_nearest", x, codebook, mask, metric, precision);
  STD_TORCH_CHECK(k >= 0 && k <= operands.args.codes, "vq_nearest: k = ", k, " of ",
                  operands.args.codes, " codes");
  operands.args.k = k > 0 ? k : 1;
  const Tensor indices = operands.results(ScalarType::Long, k);
  const Tensor distance = operands.results(compute_dtype(x.scalar_type()), k);
  look_up(operands, indices, distance, nullptr);
  return {distance, indices};
}

// The estimator matters to the gradient alone.
std::tuple<Tensor, Tensor, Tensor> vq_quantize(const Tensor& x, const Tensor& codebook,
                                               const Tensor& mask, std::string metric,
                                               std::string precision, std::string /*estimator*/,
                                               double codebook_weight, double beta) {
  Operands operands("vq_quantize", x, codebook, mask, metric, precision);
  operands.args.loss_weight = codebook_weight + beta;
  const Tensor quantized = operands.like_x();
  const Tensor losses = operands.results(compute_dtype(x.scalar_type()), 0);
  const Tensor indices = operands.results(ScalarType::Long, 0);
  look_up(operands, indices, losses, &quantized);
  return {quantized, losses, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<vq_nearest>(m, "vq_nearest");
  implement<vq_nearest>(m, "vq_nearest.cpu");
  implement<vq_quantize>(m, "vq_quantize");
  implement<vq_quantize>(m, "vq_quantize.cpu");
}

}  // namespace fastzoo
