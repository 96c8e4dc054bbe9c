// Points in Morton order and their boxes: every point stands in its place once, boxes are those of
// their points, and neighbours in the order are near one another.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/runtime/point_blocks.h"
#include "check.h"

namespace {

using namespace fastzoo;
using cpu::kBlockPoints;
using cpu::kFanOut;

// Backwards, so that a part which needs an earlier one shows.
const auto kParallel = [](int64_t parts, const auto& body) {
  for (int64_t part = parts - 1; part >= 0; --part) body(part);
};

// Clouds: uniform; flat; almost all points near one another and one far away; all points equal;
// from the most negative to the greatest value.
template <class T>
std::vector<T> cloud(int kind, int64_t n, int64_t dims) {
  std::mt19937_64 random(static_cast<uint64_t>(31 * kind + n));
  std::uniform_real_distribution<T> uniform(T(-1), T(1));
  std::vector<T> points(n * dims);
  for (T& value : points) value = uniform(random);
  for (int64_t i = 0; i < n * dims; ++i) {
    if (kind == 1 && i % dims == dims - 1) points[i] = T(3);
    if (kind == 2) points[i] = i < dims ? T(1e9) : 5 + points[i] * T(1e-3);
    if (kind == 3) points[i] = T(7);
    if (kind == 4) points[i] *= std::numeric_limits<T>::max();
  }
  return points;
}

template <class T>
void check_blocks(int& failures, const std::vector<T>& points, int64_t n, int64_t dims,
                  const std::vector<int32_t>& order) {
  const cpu::PointBlocks<T> blocks(points.data(), n, dims, order, 3, kParallel);
  const cpu::PointBlocksView<T>& view = blocks.view;
  CHECK(view.points == n && view.blocks == (n + kBlockPoints - 1) / kBlockPoints);
  std::vector<int> met(n);
  for (int64_t place = 0; place < view.blocks * kBlockPoints; ++place) {
    const T* const lane = view.block(place / kBlockPoints) + place % kBlockPoints;
    const int32_t row = view.rows[place];
    CHECK((row >= 0) == (place < n));
    for (int64_t d = 0; d < dims; ++d) {
      const T value = lane[d * kBlockPoints];
      CHECK(row < 0 ? value != value : value == points[row * dims + d]);
    }
    if (row >= 0) ++met[row];
  }
  for (const int count : met) CHECK(count == 1);
  CHECK((view.levels > 0) == !order.empty());
  int64_t inside = kBlockPoints;  // places of a box
  for (int level = 0; level < view.levels; ++level, inside *= kFanOut) {
    const int64_t count = (n + inside - 1) / inside;
    CHECK(view.box_counts[level] == count);
    CHECK((level == view.levels - 1) == (count <= kFanOut));
    for (int64_t box = 0; box < (count + kFanOut - 1) / kFanOut * kFanOut; ++box) {
      for (int64_t d = 0; d < dims; ++d) {
        T lower = std::numeric_limits<T>::infinity(), upper = -lower;
        for (int64_t place = box * inside; place < std::min(n, (box + 1) * inside); ++place) {
          const T value = points[view.rows[place] * dims + d];
          lower = std::min(lower, value);
          upper = std::max(upper, value);
        }
        const T* const own = view.group(level, box / kFanOut) + d * kFanOut + box % kFanOut;
        const T own_upper = own[dims * kFanOut];
        CHECK(box < count ? *own == lower && own_upper == upper
                          : *own != *own && own_upper != own_upper);
      }
    }
  }
}

template <class T>
void check_clouds(int& failures) {
  for (const int64_t n : {0, 1, 15, 16, 17, 255, 256, 257, 5000}) {
    for (const int64_t dims : {1, 2, 3, 5}) {
      for (int kind = 0; kind < 5; ++kind) {
        const std::vector<T> points = cloud<T>(kind, n, dims);
        const std::vector<int32_t> order = cpu::morton_order(points.data(), n, dims, 1, kParallel);
        CHECK(static_cast<int64_t>(order.size()) == n);
        CHECK(order == cpu::morton_order(points.data(), n, dims, 4, kParallel));
        check_blocks(failures, points, n, dims, order);
        check_blocks(failures, points, n, dims, {});
      }
    }
  }
}

// The mean side of the boxes of blocks but the last.
double mean_side(const std::vector<float>& points, int64_t n, int64_t dims) {
  const auto order = cpu::morton_order(points.data(), n, dims, 1, kParallel);
  const cpu::PointBlocks<float> blocks(points.data(), n, dims, order, 1, kParallel);
  double sum = 0;
  for (int64_t box = 0; box < blocks.view.blocks - 1; ++box) {
    const float* const lower = blocks.view.group(0, box / kFanOut) + box % kFanOut;
    for (int64_t d = 0; d < dims; ++d) {
      sum += lower[(dims + d) * kFanOut] - lower[d * kFanOut];
    }
  }
  return sum / static_cast<double>((blocks.view.blocks - 1) * dims);
}

void check_order(int& failures) {
  // 16 of 4096 points of a cube of side 2 fill one of side 0.31.
  CHECK(mean_side(cloud<float>(0, 4096, 3), 4096, 3) < 0.6);
  // A far point, which comes last, leaves the others in order in a cloud 1000 times smaller.
  std::vector<float> points = cloud<float>(0, 4096, 3);
  for (float& value : points) value *= 1e-3f;
  const double alone = mean_side(points, 4096, 3);
  points.insert(points.end(), {1.0f, 1.0f, 1.0f});
  CHECK(mean_side(points, 4097, 3) < 1.2 * alone);

  for (const float wrong : {INFINITY, -INFINITY, NAN}) {
    points[2] = wrong;
    CHECK(cpu::morton_order(points.data(), 4097, 3, 2, kParallel).empty());
  }
}

}  // namespace

int main() {
  int failures = 0;
  check_clouds<float>(failures);
  check_clouds<double>(failures);
  check_order(failures);
  std::printf(failures == 0 ? "ok\n" : "FAILED\n");
  return failures == 0 ? 0 : 1;
}
