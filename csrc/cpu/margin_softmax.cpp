// fastzoo::margin_softmax_* on the CPU.
#include "kernels/margin_softmax.h"

#include <string>
#include <tuple>

#include "entry.h"

namespace fastzoo {
namespace {

using math::MarginRule;

MarginRule parse_rule(const std::string& name) {
  if (name == "shift") return MarginRule::shift;
  if (name == "arcface") return MarginRule::arcface;
  if (name == "easy") return MarginRule::easy;
  if (name == "unguarded") return MarginRule::unguarded;
  if (name == "clip") return MarginRule::clip;
  if (name == "combined") return MarginRule::combined;
  if (name == "psi") return MarginRule::psi;
  STD_TORCH_CHECK(false, "margin_softmax_target: unknown rule ", name);
}

// Contiguous copies of the inputs that all four operators share, and the arguments made of them.
struct Inputs {
  Tensor embeddings, weight, labels, scale, threshold, hardness;
  cpu::MarginArgs args{};

  Inputs(cpu::MarginPass pass, const Tensor& embeddings_in, const Tensor& weight_in,
         const Tensor& labels_in, const Tensor& scale_in, const Tensor& threshold_in,
         const Tensor& hardness_in, double interclass_filter, int64_t sub_centers,
         bool normalize_embeddings, bool normalize_weight, bool bfloat16_products)
      : embeddings(torch::stable::contiguous(embeddings_in)),
        weight(torch::stable::contiguous(weight_in)),
        labels(torch::stable::contiguous(labels_in)),
        scale(torch::stable::contiguous(scale_in)),
        threshold(torch::stable::contiguous(threshold_in)),
        hardness(torch::stable::contiguous(hardness_in)) {
    args.pass = pass;
    args.dtype = kernel_dtype(embeddings.scalar_type(), "margin_softmax");
    args.bfloat16_products = bfloat16_products;
    args.rows = embeddings.size(0);
    args.sub_centers = sub_centers;
    STD_TORCH_CHECK(sub_centers >= 1 && weight.size(0) % sub_centers == 0,
                    "margin_softmax: ", weight.size(0), " rows of weight are no whole classes of ",
                    sub_centers);
    args.classes = weight.size(0) / sub_centers;
    args.dims = embeddings.size(1);
    args.normalize_embeddings = normalize_embeddings;
    args.normalize_weight = normalize_weight;
    args.interclass_filter = interclass_filter;
    args.embeddings = embeddings.const_data_ptr();
    args.weight = weight.const_data_ptr();
    args.labels = static_cast<const int64_t*>(labels.const_data_ptr());
    args.scale = scale.const_data_ptr();
    args.threshold = data_or_null(threshold);
    args.hardness = data_or_null(hardness);
    for (int64_t n = 0; n < args.rows; ++n) {
      STD_TORCH_CHECK(args.labels[n] < args.classes, "margin_softmax: label ", args.labels[n],
                      " of row ", n, " is not below ", args.classes, ", the number of classes");
    }
  }

  ScalarType compute() const { return compute_dtype(embeddings.scalar_type()); }
  Tensor per_row() const { return empty(embeddings, {args.rows}, compute()); }

  // The kernels, over the rows, the classes and the rows again.
  void run() {
    args.parts = threads_for(args.rows * args.classes * args.sub_centers * (args.dims + 16));
    // Gradients of 16 bits are not added to, so their rows come at once.
    const bool at_once = args.grad_weight != nullptr && embeddings.scalar_type() != compute();
    const int64_t range =
        at_once ? args.rows
                : rows_at_once(args.rows, args.dims, args.parts, element_size(compute()));
    args.count = range;
    // From what was kept the gradient of the scale does not follow, and the weight's only at once.
    if (args.needs_scale || range < args.rows) args.saved_kept = nullptr;
    cpu::MarginPlan plan{};
    const auto make_plan = FASTZOO_SELECT_KERNEL(margin_plan);
    make_plan(args, plan);
    if (plan.chunks < args.parts) {
      args.parts = plan.chunks < 1 ? 1 : static_cast<int>(plan.chunks);
      make_plan(args, plan);
    }
    const Tensor memory = empty(embeddings, {plan.bytes}, ScalarType::Byte);
    args.memory = memory.mutable_data_ptr();
    for (; args.first < args.rows; args.first += args.count) {
      const int64_t left = args.rows - args.first;
      args.count = left < range ? left : range;
      run_range();
    }
  }

  void run_range() const {
    cpu::MarginPlan plan{};
    FASTZOO_SELECT_KERNEL(margin_plan)(args, plan);
    const int64_t grain = 1 + kElementsWorthAThread / (32 * (args.dims + 16));
    const auto prepare = FASTZOO_SELECT_KERNEL(margin_prepare);
    torch::stable::parallel_for(0, plan.blocks, grain,
                                [&](int64_t begin, int64_t end) { prepare(args, begin, end); });
    const auto part = FASTZOO_SELECT_KERNEL(margin_part);
    torch::stable::parallel_for(0, args.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) part(args, static_cast<int>(index));
    });
    if (args.pass == cpu::MarginPass::scores) return;
    const auto finish = FASTZOO_SELECT_KERNEL(margin_finish);
    torch::stable::parallel_for(0, plan.blocks, grain, [&](int64_t begin, int64_t end) {
      const Tensor sums = empty(embeddings, {args.dims}, ScalarType::Double);
      finish(args, begin, end, static_cast<double*>(sums.mutable_data_ptr()));
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> margin_softmax_negatives(
    const Tensor& embeddings, const Tensor& weight, const Tensor& labels, const Tensor& scale,
    const Tensor& threshold, const Tensor& hardness, const Tensor& class_weight,
    double interclass_filter, int64_t sub_centers, bool normalize_embeddings, bool normalize_weight,
    bool bfloat16_products, bool with_total, bool keep) {
  Inputs in(cpu::MarginPass::negatives, embeddings, weight, labels, scale, threshold, hardness,
            interclass_filter, sub_centers, normalize_embeddings, normalize_weight,
            bfloat16_products);
  const Tensor weights = torch::stable::contiguous(class_weight);
  cpu::MarginArgs& args = in.args;
  args.class_weight = data_or_null(weights);
  args.with_total = with_total;
  const Tensor target = in.per_row(), lse = in.per_row(), total = in.per_row();
  const Tensor embedding_norm = in.per_row(), weight_norm = in.per_row();
  const int64_t blocks = (args.classes + 63) / 64;
  const Tensor kept = keep ? empty(weight, {args.classes, args.rows}, ScalarType::BFloat16)
                           : empty(weight, {0}, ScalarType::BFloat16);
  const Tensor kept_max =
      keep ? empty(weight, {blocks, args.rows}, in.compute()) : empty(weight, {0}, in.compute());
  args.target = target.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  args.total = total.mutable_data_ptr();
  args.embedding_norm = embedding_norm.mutable_data_ptr();
  args.weight_norm = weight_norm.mutable_data_ptr();
  if (keep) {
    args.kept = static_cast<uint16_t*>(kept.mutable_data_ptr());
    args.kept_max = kept_max.mutable_data_ptr();
  }
  in.run();
  return {target, lse, total, embedding_norm, weight_norm, kept, kept_max};
}

// What is common to both gradients.
std::tuple<Tensor, Tensor, Tensor> run_backward(Inputs& in, const Tensor& grad_target,
                                                const Tensor& grad_embedding_norm,
                                                const Tensor& grad_weight_norm,
                                                bool needs_embeddings, bool needs_weight,
                                                bool needs_scale) {
  const Tensor by_target = torch::stable::contiguous(grad_target);
  const Tensor by_embedding_norm = torch::stable::contiguous(grad_embedding_norm);
  const Tensor by_weight_norm = torch::stable::contiguous(grad_weight_norm);
  cpu::MarginArgs& args = in.args;
  args.grad_target = by_target.const_data_ptr();
  args.grad_embedding_norm = by_embedding_norm.const_data_ptr();
  args.grad_weight_norm = by_weight_norm.const_data_ptr();
  args.needs_embeddings = needs_embeddings;
  args.needs_weight = needs_weight;
  args.needs_scale = needs_scale;
  const ScalarType dtype = in.embeddings.scalar_type();
  const Tensor grad_embeddings =
      empty_if(needs_embeddings, in.embeddings, {args.rows, args.dims}, dtype);
  const Tensor grad_weight =
      empty_if(needs_weight, in.embeddings, {args.classes * args.sub_centers, args.dims}, dtype);
  const Tensor grad_scale = empty_if(needs_scale, in.embeddings, {args.rows}, in.compute());
  args.grad_embeddings = grad_embeddings.mutable_data_ptr();
  args.grad_weight = grad_weight.mutable_data_ptr();
  args.grad_scale = grad_scale.mutable_data_ptr();
  if (args.rows == 0) torch::stable::zero_(const_cast<Tensor&>(grad_weight));
  in.run();
  return {grad_embeddings, grad_weight, grad_scale};
}

std::tuple<Tensor, Tensor, Tensor> margin_softmax_negatives_backward(
    const Tensor& grad_target, const Tensor& grad_lse, const Tensor& grad_total,
    const Tensor& grad_embedding_norm, const Tensor& grad_weight_norm, const Tensor& embeddings,
    const Tensor& weight, const Tensor& labels, const Tensor& scale, const Tensor& threshold,
    const Tensor& hardness, const Tensor& class_weight, const Tensor& lse, const Tensor& kept,
    const Tensor& kept_max, double interclass_filter, int64_t sub_centers,
    bool normalize_embeddings, bool normalize_weight, bool bfloat16_products, bool needs_embeddings,
    bool needs_weight, bool needs_scale) {
  Inputs in(cpu::MarginPass::negatives_backward, embeddings, weight, labels, scale, threshold,
            hardness, interclass_filter, sub_centers, normalize_embeddings, normalize_weight,
            bfloat16_products);
  const Tensor by_lse = torch::stable::contiguous(grad_lse);
  const Tensor by_total = torch::stable::contiguous(grad_total);
  const Tensor weights = torch::stable::contiguous(class_weight);
  const Tensor saved = torch::stable::contiguous(lse);
  in.args.grad_lse = by_lse.const_data_ptr();
  in.args.grad_total = by_total.const_data_ptr();
  in.args.class_weight = data_or_null(weights);
  in.args.saved_lse = saved.const_data_ptr();
  const Tensor kept_in = torch::stable::contiguous(kept);
  const Tensor kept_max_in = torch::stable::contiguous(kept_max);
  in.args.saved_kept = static_cast<const uint16_t*>(data_or_null(kept_in));
  in.args.saved_kept_max = kept_max_in.const_data_ptr();
  return run_backward(in, grad_target, grad_embedding_norm, grad_weight_norm, needs_embeddings,
                      needs_weight, needs_scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> margin_softmax_scores(
    const Tensor& embeddings, const Tensor& weight, const Tensor& labels, const Tensor& scale,
    const Tensor& threshold, const Tensor& hardness, double interclass_filter, int64_t sub_centers,
    bool normalize_embeddings, bool normalize_weight, bool bfloat16_products) {
  Inputs in(cpu::MarginPass::scores, embeddings, weight, labels, scale, threshold, hardness,
            interclass_filter, sub_centers, normalize_embeddings, normalize_weight,
            bfloat16_products);
  const Tensor scores = empty(embeddings, {in.args.rows, in.args.classes}, in.compute());
  const Tensor target = in.per_row(), embedding_norm = in.per_row(), weight_norm = in.per_row();
  in.args.scores = scores.mutable_data_ptr();
  in.args.target = target.mutable_data_ptr();
  in.args.embedding_norm = embedding_norm.mutable_data_ptr();
  in.args.weight_norm = weight_norm.mutable_data_ptr();
  in.run();
  return {scores, target, embedding_norm, weight_norm};
}

std::tuple<Tensor, Tensor, Tensor> margin_softmax_scores_backward(
    const Tensor& grad_scores, const Tensor& grad_target, const Tensor& grad_embedding_norm,
    const Tensor& grad_weight_norm, const Tensor& embeddings, const Tensor& weight,
    const Tensor& labels, const Tensor& scale, const Tensor& threshold, const Tensor& hardness,
    double interclass_filter, int64_t sub_centers, bool normalize_embeddings, bool normalize_weight,
    bool bfloat16_products, bool needs_embeddings, bool needs_weight, bool needs_scale) {
  Inputs in(cpu::MarginPass::scores_backward, embeddings, weight, labels, scale, threshold,
            hardness, interclass_filter, sub_centers, normalize_embeddings, normalize_weight,
            bfloat16_products);
  const Tensor by_scores = torch::stable::contiguous(grad_scores);
  in.args.grad_scores = by_scores.const_data_ptr();
  return run_backward(in, grad_target, grad_embedding_norm, grad_weight_norm, needs_embeddings,
                      needs_weight, needs_scale);
}

Tensor margin_softmax_target(const Tensor& cosine, const Tensor& m1, const Tensor& m2,
                             const Tensor& m3, std::string rule) {
  const Tensor inputs[] = {torch::stable::contiguous(cosine), torch::stable::contiguous(m1),
                           torch::stable::contiguous(m2), torch::stable::contiguous(m3)};
  const Tensor value = empty(cosine, {cosine.size(0)}, cosine.scalar_type());
  cpu::MarginTargetArgs args{};
  args.dtype = kernel_dtype(cosine.scalar_type(), "margin_softmax_target");
  args.rule = parse_rule(rule);
  args.cosine = inputs[0].const_data_ptr();
  args.m1 = inputs[1].const_data_ptr();
  args.m2 = inputs[2].const_data_ptr();
  args.m3 = inputs[3].const_data_ptr();
  args.value = value.mutable_data_ptr();
  const auto kernel = FASTZOO_SELECT_KERNEL(margin_target);
  torch::stable::parallel_for(0, cosine.size(0), 1024,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return value;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> margin_softmax_target_backward(
    const Tensor& grad, const Tensor& cosine, const Tensor& m1, const Tensor& m2, const Tensor& m3,
    std::string rule) {
  const Tensor inputs[] = {torch::stable::contiguous(grad), torch::stable::contiguous(cosine),
                           torch::stable::contiguous(m1), torch::stable::contiguous(m2),
                           torch::stable::contiguous(m3)};
  const int64_t rows = cosine.size(0);
  const ScalarType dtype = cosine.scalar_type();
  const Tensor grads[] = {empty(cosine, {rows}, dtype), empty(cosine, {rows}, dtype),
                          empty(cosine, {rows}, dtype), empty(cosine, {rows}, dtype)};
  cpu::MarginTargetArgs args{};
  args.dtype = kernel_dtype(dtype, "margin_softmax_target");
  args.rule = parse_rule(rule);
  args.grad = inputs[0].const_data_ptr();
  args.cosine = inputs[1].const_data_ptr();
  args.m1 = inputs[2].const_data_ptr();
  args.m2 = inputs[3].const_data_ptr();
  args.m3 = inputs[4].const_data_ptr();
  args.grad_cosine = grads[0].mutable_data_ptr();
  args.grad_m1 = grads[1].mutable_data_ptr();
  args.grad_m2 = grads[2].mutable_data_ptr();
  args.grad_m3 = grads[3].mutable_data_ptr();
  const auto kernel = FASTZOO_SELECT_KERNEL(margin_target);
  torch::stable::parallel_for(0, rows, 1024,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<margin_softmax_negatives>(m, "margin_softmax_negatives");
  implement<margin_softmax_negatives>(m, "margin_softmax_negatives.cpu");
  implement<margin_softmax_negatives_backward>(m, "margin_softmax_negatives_backward");
  implement<margin_softmax_negatives_backward>(m, "margin_softmax_negatives_backward.cpu");
  implement<margin_softmax_scores>(m, "margin_softmax_scores");
  implement<margin_softmax_scores>(m, "margin_softmax_scores.cpu");
  implement<margin_softmax_scores_backward>(m, "margin_softmax_scores_backward");
  implement<margin_softmax_scores_backward>(m, "margin_softmax_scores_backward.cpu");
  implement<margin_softmax_target>(m, "margin_softmax_target");
  implement<margin_softmax_target>(m, "margin_softmax_target.cpu");
  implement<margin_softmax_target_backward>(m, "margin_softmax_target_backward");
  implement<margin_softmax_target_backward>(m, "margin_softmax_target_backward.cpu");
}

}  // namespace fastzoo
