// Clouds of points: ranges of the rows of one tensor.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "entry.h"

namespace fastzoo {

struct Cloud {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// Of ranges int64 [B, 2], held within the rows.
inline std::vector<Cloud> clouds_of(const Tensor& ranges, int64_t rows) {
  const Tensor dense = torch::stable::contiguous(ranges);
  const int64_t* const ends = static_cast<const int64_t*>(dense.const_data_ptr());
  std::vector<Cloud> clouds(ranges.size(0));
  for (size_t b = 0; b < clouds.size(); ++b) {
    clouds[b].begin = std::clamp<int64_t>(ends[2 * b], 0, rows);
    clouds[b].end = std::clamp<int64_t>(ends[2 * b + 1], clouds[b].begin, rows);
  }
  return clouds;
}

// Dense, of the type that an operator computes in.
inline Tensor dense_as(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

// How many threads are worth their start where each of so many points is met a few times.
inline int64_t threads_for_points(int64_t points) {
  constexpr int64_t kPointsWorthAThread = 16384;
  return std::min<int64_t>(torch::stable::get_num_threads(), 1 + points / kPointsWorthAThread);
}

// Calls body with each part in [0, parts), in parallel.
constexpr auto run_parts = [](int64_t parts, const auto& body) {
  if (parts == 1) return body(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(part);
  });
};

// Threads take tasks [0, count) as they become free: body(next) runs next() until that is `count`
// or more, once a thread. What a task does must not depend on the thread.
template <class Body>
void share_out(int64_t count, int64_t threads, const Body& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] { return taken.fetch_add(1, std::memory_order_relaxed); };
  if (threads <= 1 || count <= 1) return body(next);
  torch::stable::parallel_for(0, std::min(count, threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(next);
  });
}

}  // namespace fastzoo
