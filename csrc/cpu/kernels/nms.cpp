// Greedy suppression: boxes come by falling score, and join the kept ones unless one of these
// suppresses them.
#include "nms.h"

#include "../runtime/kept_boxes.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

template <class T>
FASTZOO_INLINE void nms(NmsArgs<T>& args) {
  // No overlap exceeds 1, as no union comes out smaller than the intersection.
  if (!(args.threshold < 1)) {
    args.kept = args.n;
    return;
  }
  KeptBoxes<T> kept(args.n, args.threshold);
  if (kept.out_of_memory()) {
    args.kept = -1;
    return;
  }
  const bool inert_boxes_matter = args.threshold < 0;
  args.kept = 0;
  for (int64_t i = 0; i < args.n; ++i) {
    // The order by score is no order in memory.
    constexpr int64_t kAhead = 8;
    if (i + kAhead < args.n) {
      __builtin_prefetch(args.boxes + static_cast<int64_t>(args.order[i + kAhead]) * 4);
    }
    const int32_t index = args.order[i];
    const math::Box<T> box = load_box(args.boxes + static_cast<int64_t>(index) * 4);
    if ((is_inert(box) && !inert_boxes_matter) || kept.add(box)) args.order[args.kept++] = index;
  }
}

}  // namespace

void nms_float(NmsArgs<float>& args) { nms(args); }
void nms_double(NmsArgs<double>& args) { nms(args); }

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
