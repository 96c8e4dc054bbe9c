// A dense detector's detections, of a whole batch and with fixed shapes: nothing is read back.
//   detection_keys   one key for each pair of a location and a class, that sorts candidates first
//   aten::topk       or sort: the candidates of each image by falling score
//   nms_keep         decodes and suppresses them, all images at once
//   detections_emit  the limits, and the padding
#include "../math/detections.h"

#include <limits>
#include <string>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/falling_order.h"
#include "runtime/kept_list.h"

namespace fastzoo::cuda {
namespace {

using math::Decode;

constexpr int kEmitBlock = 128;
constexpr int kEmitWarps = kEmitBlock / kWarpSize;

// Of a pair that is no candidate. The last key, which otherwise belongs to NaN.
constexpr int64_t kNoCandidate = std::numeric_limits<int64_t>::max();

// A key of 32 bits leaves room for the pair itself, which makes keys unique: any selection finds
// the same ones in the same order. One of 64 bits needs a stable sort, and its indices.
template <class C>
constexpr bool kPacked = sizeof(C) == 4;

FASTZOO_DEVICE int64_t candidate_key(float score, unsigned pair) {
  return int64_t{signed_falling_key(score)} * (int64_t{1} << 32) + pair;
}
FASTZOO_DEVICE int64_t candidate_key(double score, unsigned) { return signed_falling_key(score); }

// Of scores [images, pairs]; an image has its own blocks.
template <class T>
__global__ void __launch_bounds__(kKeyThreads)
    detection_keys(const T* scores, unsigned pairs, unsigned blocks_each, double threshold,
                   int64_t* keys) {
  const int64_t image = blockIdx.x / blocks_each;
  const unsigned pair = blockIdx.x % blocks_each * kKeyThreads + threadIdx.x;
  if (pair >= pairs) return;
  const auto score = static_cast<ComputeOf<T>>(scores[image * pairs + pair]);
  keys[image * pairs + pair] =
      static_cast<double>(score) > threshold ? candidate_key(score, pair) : kNoCandidate;
}

// Those of each image by falling score, read from the head's output.
template <class T>
struct Candidates {
  using C = ComputeOf<T>;
  using Overlap = AlignedOverlap<C>;
  static constexpr bool kManyImages = true;

  int64_t most;            // of an image
  int64_t step;            // from an image's keys to the next's
  const int64_t* keys;     // sorted
  const int64_t* indices;  // their pairs, where keys are not packed
  unsigned pairs;          // of an image
  unsigned classes;
  const T* boxes;  // a row for each pair, or each location
  bool box_each_pair;
  const C* priors;
  math::Decoder decoder;

  FASTZOO_DEVICE bool exists(int64_t image, int64_t position) const {
    return position < most && keys[image * step + position] != kNoCandidate;
  }
  FASTZOO_DEVICE int64_t index(int64_t, int64_t position) const { return position; }
  FASTZOO_DEVICE unsigned pair(int64_t image, int64_t position) const {
    const int64_t at = image * step + position;
    return static_cast<unsigned>(kPacked<C> ? keys[at] : indices[at]);
  }
  FASTZOO_DEVICE int64_t id(int64_t image, int64_t position) const {
    return pair(image, position) % classes;
  }
  FASTZOO_DEVICE typename Overlap::Box read(int64_t image, int64_t position) const {
    const unsigned which = pair(image, position);
    const int64_t location = which / classes;
    const int64_t row =
        box_each_pair ? image * pairs + which : image * (pairs / classes) + location;
    const C* prior = priors + math::prior_size(decoder.form) * location;
    const math::Corners c = math::decode_box(boxes + 4 * row, prior, decoder);
    return Overlap::box_of(
        {{static_cast<C>(c.x1), static_cast<C>(c.y1), static_cast<C>(c.x2), static_cast<C>(c.y2)}});
  }
};

template <class C>
struct Found {
  int64_t* num;
  C* boxes;
  C* scores;
  int64_t* labels;
  int64_t* indices;
};

// A block an image. `class_counts` [images, classes] starts as zero; null for no limit of a class.
template <class T, class C>
__global__ void __launch_bounds__(kEmitBlock)
    detections_emit(Candidates<T> candidates, const T* scores, KeptList<AlignedOverlap<C>> lists,
                    int64_t most_of_class, int* class_counts, int64_t most, Found<C> found) {
  __shared__ SharedArray<int, kEmitBlock> labels;
  __shared__ SharedArray<uint32_t, kEmitWarps> taken_words;
  const int thread = threadIdx.x;
  const int64_t image = blockIdx.x;
  const int64_t total = static_cast<int64_t>(lists.word[image] & kKeptOfWord);
  const int64_t first_out = image * most;
  int64_t count = 0;
  for (int64_t start = 0; start < total && count < most; start += kEmitBlock) {
    const int64_t at = image * candidates.most + start + thread;
    const bool exists = start + thread < total;
    const unsigned pair = exists ? candidates.pair(image, lists.indices[at]) : 0;
    const int label = exists ? static_cast<int>(pair % candidates.classes) : -1;
    bool take = exists;
    if (class_counts != nullptr) {
      labels[thread] = label;
      sync_block();
      int* const of_class = class_counts + image * candidates.classes + label;
      int rank = exists ? *of_class : 0;
      bool last = exists;
      for (int other = 0; other < kEmitBlock; ++other) {
        if (labels[other] != label) continue;
        rank += other < thread;
        last &= other <= thread;
      }
      take &= rank < most_of_class;
      sync_block();
      if (last) *of_class = rank + 1;
    }
    const uint32_t word = ballot(take);
    if (thread % kWarpSize == 0) taken_words[thread / kWarpSize] = word;
    sync_block();
    int64_t out = count;
    for (int w = 0; w < kEmitWarps; ++w) {
      const uint32_t taken = taken_words[w];
      const uint32_t earlier = w < thread / kWarpSize   ? ~0u
                               : w > thread / kWarpSize ? 0u
                                                        : (1u << thread % kWarpSize) - 1;
      out += population_count(taken & earlier);
      count += population_count(taken);
    }
    if (take && out < most) {
      store_vector(found.boxes + 4 * (first_out + out), load_vector<4>(lists.rows + 4 * at));
      found.scores[first_out + out] = static_cast<C>(scores[image * candidates.pairs + pair]);
      found.labels[first_out + out] = label;
      found.indices[first_out + out] = pair / candidates.classes;
    }
    sync_block();
  }

  if (count > most) count = most;
  if (thread == 0) found.num[image] = count;
  for (int64_t i = count + thread; i < most; i += kEmitBlock) {
    store_vector(found.boxes + 4 * (first_out + i), Vector<C, 4>{});
    found.scores[first_out + i] = 0;
    found.labels[first_out + i] = -1;
    found.indices[first_out + i] = -1;
  }
}

Decode decode_of(const std::string& name) {
  Decode form;
  STD_TORCH_CHECK(math::decode_named(name.c_str(), form), "multiclass_nms: unknown decode ", name);
  return form;
}

// The k smallest of each row, rising.
SortedKeys smallest(const Tensor& keys, int64_t k) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 5> stack{from(keys), from(k), from(int64_t{-1}), from(false),
                                    from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::topk", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multiclass_nms(
    const Tensor& boxes, const Tensor& scores, const Tensor& priors, const std::string& decode,
    double weight_x, double weight_y, double weight_w, double weight_h, double clip,
    double score_threshold, double iou_threshold, int64_t pre_top_k, int64_t max_per_class,
    int64_t max_detections, bool class_agnostic) {
  using torch::stable::contiguous;
  using torch::stable::new_zeros;
  const math::Decoder decoder{decode_of(decode), weight_x, weight_y, weight_w, weight_h, clip};
  const int64_t images = scores.size(0);
  const int64_t classes = scores.size(2);
  const int64_t pairs = scores.size(1) * classes;
  STD_TORCH_CHECK(pairs <= std::numeric_limits<int32_t>::max(),
                  "fastzoo: multiclass_nms: fewer than 2^31 scores an image expected, got ", pairs);
  const int64_t most = pre_top_k < 0 || pre_top_k > pairs ? pairs : pre_top_k;
  const ScalarType compute = compute_dtype(boxes.scalar_type());
  const Tensor num = empty(boxes, {images}, ScalarType::Long);
  const Tensor found_boxes = empty(boxes, {images, max_detections, 4}, compute);
  const Tensor found_scores = empty(boxes, {images, max_detections}, compute);
  const Tensor labels = empty(boxes, {images, max_detections}, ScalarType::Long);
  const Tensor indices = empty(boxes, {images, max_detections}, ScalarType::Long);
  const std::tuple result{num, found_boxes, found_scores, labels, indices};
  if (images == 0) return result;

  const Stream stream(boxes);
  const bool gated = !class_agnostic;
  const bool by_class = max_per_class >= 0;
  const Tensor rows = contiguous(boxes), values = contiguous(scores),
               prior_rows = contiguous(priors);
  const Tensor kept = empty(boxes, {images, most}, ScalarType::Long);
  const Tensor class_counts = new_zeros(boxes, {by_class ? images * classes : 0}, ScalarType::Int);

  dispatch_float(boxes.scalar_type(), "multiclass_nms", [&](auto type) {
    using T = decltype(type);
    using C = ComputeOf<T>;
    const T* score_data = static_cast<const T*>(values.const_data_ptr());
    SortedKeys sorted{empty(boxes, {images, 0}, ScalarType::Long), kept};
    if (most > 0) {
      const Tensor keys = empty(boxes, {images, pairs}, ScalarType::Long);
      const unsigned blocks_each = blocks_for(pairs, kKeyThreads);
      stream.launch("detection_keys", detection_keys<T>, blocks_for(images * blocks_each, 1),
                    kKeyThreads, score_data, static_cast<unsigned>(pairs), blocks_each,
                    score_threshold, static_cast<int64_t*>(keys.mutable_data_ptr()));
      sorted = kPacked<C> && most < pairs ? smallest(keys, most) : sort_rows(keys);
    }
    Candidates<T> candidates{};
    candidates.most = most;
    candidates.step = sorted.values.size(1);
    candidates.keys = static_cast<const int64_t*>(sorted.values.const_data_ptr());
    candidates.indices = static_cast<const int64_t*>(sorted.indices.const_data_ptr());
    candidates.pairs = static_cast<unsigned>(pairs);
    candidates.classes = static_cast<unsigned>(classes);
    candidates.boxes = static_cast<const T*>(rows.const_data_ptr());
    candidates.box_each_pair = boxes.dim() == 4;
    candidates.priors = static_cast<const C*>(prior_rows.const_data_ptr());
    candidates.decoder = decoder;

    const KeptMemory<AlignedOverlap<C>> memory(boxes, images * most, images, gated);
    KeepTask<Candidates<T>> task{candidates, {math::round_down<C>(iou_threshold)}, most};
    task.lists = memory.lists(kept);
    task.tickets = memory.tickets();
    task.images = static_cast<unsigned>(images);
    task.limit = by_class ? kNoLimit : static_cast<uint64_t>(max_detections);
    if (most > 0 && max_detections > 0) {
      stream.launch(
          "nms_keep",
          gated ? nms_keep<Candidates<T>, true, false> : nms_keep<Candidates<T>, false, false>,
          blocks_for(images * blocks_for(most, kKeepBlock), 1), kKeepBlock, task);
    }
    stream.launch("detections_emit", detections_emit<T, C>, blocks_for(images, 1), kEmitBlock,
                  candidates, score_data, task.lists, max_per_class,
                  by_class ? static_cast<int*>(class_counts.mutable_data_ptr()) : nullptr,
                  max_detections,
                  Found<C>{static_cast<int64_t*>(num.mutable_data_ptr()),
                           static_cast<C*>(found_boxes.mutable_data_ptr()),
                           static_cast<C*>(found_scores.mutable_data_ptr()),
                           static_cast<int64_t*>(labels.mutable_data_ptr()),
                           static_cast<int64_t*>(indices.mutable_data_ptr())});
  });
  return result;
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::multiclass_nms>(m, "multiclass_nms.cuda");
}
