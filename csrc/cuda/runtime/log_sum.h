// Sums of exponentials that neither overflow nor vanish, and their parts put together.
#pragma once

#include "../../math/host_device.h"
#include "launch.h"

namespace fastzoo::cuda {

// A sum of exp(z - reference()). One whose largest stays -inf is a plain sum.
template <class C>
struct LogSum {
  static constexpr C kNothing = -std::numeric_limits<C>::infinity();

  C largest = kNothing;
  C sum = 0;

  FASTZOO_DEVICE static C reference(C largest) {
    return largest == kNothing || largest == -kNothing ? C{0} : largest;
  }
  FASTZOO_DEVICE C reference() const { return reference(largest); }

  // For a largest z that may be larger. A sum of 0 stays 0.
  FASTZOO_DEVICE void raise(C z) {
    const C raised = math::maximum(largest, z);
    if (raised == largest) return;
    if (raised != -kNothing) sum *= math::exponential(largest - raised);
    largest = raised;
  }

  FASTZOO_DEVICE void merge(LogSum other) {
    raise(other.largest);
    other.raise(largest);
    sum += other.sum;
  }

  FASTZOO_DEVICE C value() const {
    return static_cast<C>(static_cast<double>(reference()) + ::log(static_cast<double>(sum)));
  }
};

constexpr int kCombineWarps = 8;

// Of parts [parts, items]: each item's logarithm, or where `plain` its sum. A block has an item
// for each lane, and its warps share out the parts; always in the same order.
template <class C>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize)
    combine_log_sums(const LogSum<C>* parts, int64_t count, int64_t items, bool plain, C* out) {
  __shared__ SharedArray<C, kCombineWarps * kWarpSize> largest;
  __shared__ SharedArray<C, kCombineWarps * kWarpSize> sums;
  const int thread = threadIdx.x;
  const int64_t item = int64_t{blockIdx.x} * kWarpSize + thread % kWarpSize;
  LogSum<C> mine;
  if (item < items) {
    for (int64_t part = thread / kWarpSize; part < count; part += kCombineWarps) {
      mine.merge(parts[part * items + item]);
    }
  }
  largest[thread] = mine.largest;
  sums[thread] = mine.sum;
  sync_block();
  if (thread >= kWarpSize || item >= items) return;
  for (int other = thread + kWarpSize; other < kCombineWarps * kWarpSize; other += kWarpSize) {
    mine.merge({largest[other], sums[other]});
  }
  out[item] = plain ? mine.sum : mine.value();
}

template <class C>
void launch_combine(const Stream& stream, const Tensor& parts, bool plain, const Tensor& out) {
  stream.launch("combine_log_sums", combine_log_sums<C>, blocks_for(out.numel(), kWarpSize),
                kCombineWarps * kWarpSize, static_cast<const LogSum<C>*>(parts.const_data_ptr()),
                parts.size(0), out.numel(), plain, static_cast<C*>(out.mutable_data_ptr()));
}

// Memory for [parts, items] of them.
template <class C>
Tensor empty_log_sums(const Tensor& like, int64_t parts, int64_t items) {
  return empty(like, {parts, items, static_cast<int64_t>(sizeof(LogSum<C>))}, ScalarType::Byte);
}

}  // namespace fastzoo::cuda
