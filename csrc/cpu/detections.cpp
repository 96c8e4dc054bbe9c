// fastzoo::multiclass_nms and fastzoo::peak_nms on the CPU.
#include "kernels/detections.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "entry.h"

namespace fastzoo {
namespace {

using math::Decode;

Decode parse_decode(const std::string& name) {
  Decode form;
  STD_TORCH_CHECK(math::decode_named(name.c_str(), form), "multiclass_nms: unknown decode ", name);
  return form;
}

// What the kernels allocate.
class Lists {
 public:
  explicit Lists(int64_t count) : lists_(count, cpu::RankList{nullptr, 0}) {}
  ~Lists() {
    for (const cpu::RankList& list : lists_) std::free(list.ranks);
  }
  Lists(const Lists&) = delete;
  Lists& operator=(const Lists&) = delete;
  cpu::RankList* data() { return lists_.data(); }

 private:
  std::vector<cpu::RankList> lists_;
};

// An image is shared among the threads where there are fewer images than threads.
int64_t parts_of(int64_t images, int64_t elements) {
  const int64_t threads = torch::stable::get_num_threads();
  if (images >= threads) return 1;
  return std::min<int64_t>(threads, 1 + elements / kElementsWorthAThread);
}

// Candidates are known by the 32-bit number of their element.
void check_elements(const char* op, int64_t elements) {
  STD_TORCH_CHECK(elements < int64_t{1} << 32, op, ": fewer than 2^32 scores an image needed, got ",
                  elements);
}

template <class Args, class Kernel>
void run(const char* op, Args& args, int64_t elements, Kernel* scan, Kernel* finish) {
  args.parts = parts_of(args.images, elements);
  Lists lists(args.parts == 1 ? 0 : args.images * args.parts);
  args.lists = lists.data();
  if (args.parts > 1) {
    torch::stable::parallel_for(0, args.images * args.parts, 1,
                                [&](int64_t begin, int64_t end) { scan(args, begin, end); });
  }
  const int64_t images_worth_a_thread = 1 + kElementsWorthAThread / (elements + 1);
  if (!args.out_of_memory) {
    torch::stable::parallel_for(0, args.images, images_worth_a_thread,
                                [&](int64_t begin, int64_t end) { finish(args, begin, end); });
  }
  STD_TORCH_CHECK(!args.out_of_memory, op, ": out of memory");
}

// How an image's scores lie in memory, if one of their two dimensions is dense.
bool find_runs(const Tensor& scores, cpu::Runs& runs) {
  const int64_t locations = scores.size(1), classes = scores.size(2);
  const int64_t by_location = scores.stride(1), by_class = scores.stride(2);
  if ((by_class == 1 || classes == 1) && (by_location == classes || locations == 1)) {
    runs = {1, locations * classes, 0, 0, 1};
    return true;
  }
  if (by_class == 1) {
    runs = {locations, classes, by_location, classes, 1};
    return true;
  }
  runs = {classes, locations, by_class, 1, classes};
  return by_location == 1;
}

int64_t limit_or(int64_t limit, int64_t none) { return limit < 0 ? none : std::min(limit, none); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multiclass_nms(
    const Tensor& boxes, const Tensor& scores, const Tensor& priors, std::string decode,
    double weight_x, double weight_y, double weight_w, double weight_h, double clip,
    double score_threshold, double iou_threshold, int64_t pre_top_k, int64_t max_per_class,
    int64_t max_detections, bool class_agnostic) {
  const ScalarType dtype = boxes.scalar_type();
  const ScalarType compute = compute_dtype(dtype);
  cpu::MulticlassArgs args{};
  args.dtype = kernel_dtype(dtype, "multiclass_nms");
  args.images = scores.size(0);
  args.locations = scores.size(1);
  args.classes = scores.size(2);
  args.max_detections = max_detections;
  STD_TORCH_CHECK(scores.scalar_type() == dtype && max_detections >= 0,
                  "multiclass_nms: boxes and scores of one dtype and max_detections of at least 0 "
                  "needed");
  const Tensor num = empty(boxes, {args.images}, ScalarType::Long);
  const Tensor out_boxes = empty(boxes, {args.images, max_detections, 4}, compute);
  const Tensor out_scores = empty(boxes, {args.images, max_detections}, compute);
  const Tensor labels = empty(boxes, {args.images, max_detections}, ScalarType::Long);
  const Tensor indices = empty(boxes, {args.images, max_detections}, ScalarType::Long);

  const int64_t pairs = args.locations * args.classes;
  check_elements("multiclass_nms", pairs);
  Tensor dense = scores;
  if (!find_runs(dense, args.runs)) {
    dense = torch::stable::contiguous(scores);
    find_runs(dense, args.runs);
  }
  for (int i = 0; i < 3; ++i) args.score_strides[i] = dense.stride(i);
  const bool by_class = boxes.dim() == 4;
  args.box_strides[0] = boxes.stride(0);
  args.box_strides[1] = boxes.stride(1);
  args.box_strides[2] = by_class ? boxes.stride(2) : 0;
  args.box_strides[3] = boxes.stride(by_class ? 3 : 2);
  args.decoder = {parse_decode(decode), weight_x, weight_y, weight_w, weight_h, clip};
  const Tensor given = torch::stable::contiguous(torch::stable::to(priors, compute));
  STD_TORCH_CHECK(
      args.decoder.form == Decode::none || (given.dim() == 2 && given.size(0) == args.locations &&
                                            given.size(1) == math::prior_size(args.decoder.form)),
      "multiclass_nms: priors do not fit the boxes");
  args.scores = dense.const_data_ptr();
  args.boxes = boxes.const_data_ptr();
  args.priors = given.const_data_ptr();
  args.score_threshold = score_threshold;
  args.iou_threshold = iou_threshold;
  args.pre_top_k = limit_or(pre_top_k, pairs);
  args.max_per_class = limit_or(max_per_class, pairs);
  args.class_agnostic = class_agnostic;
  args.num = static_cast<int64_t*>(num.mutable_data_ptr());
  args.out_boxes = out_boxes.mutable_data_ptr();
  args.out_scores = out_scores.mutable_data_ptr();
  args.labels = static_cast<int64_t*>(labels.mutable_data_ptr());
  args.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  run("multiclass_nms", args, pairs, FASTZOO_SELECT_KERNEL(multiclass_scan),
      FASTZOO_SELECT_KERNEL(multiclass_nms));
  return {num, out_boxes, out_scores, labels, indices};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> peak_nms(const Tensor& heatmap, int64_t kernel,
                                                    int64_t top_k) {
  cpu::PeakArgs args{};
  args.dtype = kernel_dtype(heatmap.scalar_type(), "peak_nms");
  STD_TORCH_CHECK(kernel > 0 && kernel % 2 == 1 && top_k >= 0,
                  "peak_nms: an odd kernel and top_k of at least 0 needed");
  const Tensor dense = torch::stable::contiguous(heatmap);
  args.images = dense.size(0);
  args.classes = dense.size(1);
  args.height = dense.size(2);
  args.width = dense.size(3);
  args.reach = kernel / 2;
  args.top_k = top_k;
  const int64_t cells = args.classes * args.height * args.width;
  check_elements("peak_nms", cells);
  const Tensor scores = empty(heatmap, {args.images, top_k}, heatmap.scalar_type());
  const Tensor labels = empty(heatmap, {args.images, top_k}, ScalarType::Long);
  const Tensor ys = empty(heatmap, {args.images, top_k}, ScalarType::Long);
  const Tensor xs = empty(heatmap, {args.images, top_k}, ScalarType::Long);
  args.heatmap = dense.const_data_ptr();
  args.scores = scores.mutable_data_ptr();
  args.labels = static_cast<int64_t*>(labels.mutable_data_ptr());
  args.ys = static_cast<int64_t*>(ys.mutable_data_ptr());
  args.xs = static_cast<int64_t*>(xs.mutable_data_ptr());
  run("peak_nms", args, cells, FASTZOO_SELECT_KERNEL(peak_scan), FASTZOO_SELECT_KERNEL(peak_nms));
  return {scores, labels, ys, xs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastzoo, CPU, m) {
  implement<multiclass_nms>(m, "multiclass_nms");
  implement<multiclass_nms>(m, "multiclass_nms.cpu");
  implement<peak_nms>(m, "peak_nms");
  implement<peak_nms>(m, "peak_nms.cpu");
}

}  // namespace fastzoo
