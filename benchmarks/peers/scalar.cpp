// The textbook loops of the CPU kernels in torchvision, mmcv and pytorch3d: one thread, one pair of
// boxes or points at a time, for the baseline CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

namespace {

at::Tensor by_falling_score(const at::Tensor& scores) {
  return std::get<1>(scores.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true));
}

// Visits boxes in an order; what a kept one overlaps is not visited. Each pair is compared once.
template <class Overlaps>
at::Tensor greedy(const at::Tensor& order, Overlaps overlaps) {
  const int64_t n = order.numel();
  std::vector<char> suppressed(n, 0);
  at::Tensor keep = at::empty({n}, order.options());
  const int64_t* const by_score = order.const_data_ptr<int64_t>();
  int64_t* const kept = keep.mutable_data_ptr<int64_t>();
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t a = by_score[i];
    if (suppressed[a]) continue;
    kept[count++] = a;
    for (int64_t j = i + 1; j < n; ++j) {
      const int64_t b = by_score[j];
      if (!suppressed[b] && overlaps(a, b)) suppressed[b] = 1;
    }
  }
  return keep.narrow(0, 0, count);
}

template <class T>
struct Boxes {
  at::Tensor columns, areas;
  const T *x1, *y1, *x2, *y2, *area;

  explicit Boxes(const at::Tensor& boxes)
      : columns(boxes.t().contiguous()),
        areas((columns[2] - columns[0]) * (columns[3] - columns[1])),
        x1(columns.const_data_ptr<T>()),
        y1(x1 + boxes.size(0)),
        x2(y1 + boxes.size(0)),
        y2(x2 + boxes.size(0)),
        area(areas.const_data_ptr<T>()) {}

  T iou(int64_t a, int64_t b) const {
    const T w = std::max(T(0), std::min(x2[a], x2[b]) - std::max(x1[a], x1[b]));
    const T h = std::max(T(0), std::min(y2[a], y2[b]) - std::max(y1[a], y1[b]));
    const T intersection = w * h;
    return intersection / (area[a] + area[b] - intersection);
  }
};

template <class T>
at::Tensor nms_of(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold) {
  const Boxes<T> of(boxes);
  return greedy(by_falling_score(scores),
                [&](int64_t a, int64_t b) { return of.iou(a, b) > iou_threshold; });
}

at::Tensor nms(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold) {
  return boxes.scalar_type() == at::kDouble ? nms_of<double>(boxes, scores, iou_threshold)
                                            : nms_of<float>(boxes, scores, iou_threshold);
}

// The box of the highest score among those from i on is swapped into place i; the scores of all
// after it are lowered, and one that falls below the least is overwritten by the last.
std::tuple<at::Tensor, at::Tensor> soft_nms(const at::Tensor& boxes, const at::Tensor& scores,
                                            std::string_view method, double iou_threshold,
                                            double sigma, double score_threshold) {
  const at::Tensor columns = at::cat({boxes.t(), scores.unsqueeze(0)});
  const auto column = [&](int64_t i) {
    const float* const begin = columns.const_data_ptr<float>() + i * boxes.size(0);
    return std::vector<float>(begin, begin + boxes.size(0));
  };
  std::vector<float> x1 = column(0), y1 = column(1), x2 = column(2), y2 = column(3);
  std::vector<float> score = column(4), area(x1.size());
  std::vector<int64_t> index(x1.size());
  for (size_t i = 0; i < x1.size(); ++i) {
    area[i] = (x2[i] - x1[i]) * (y2[i] - y1[i]);
    index[i] = static_cast<int64_t>(i);
  }
  const auto swap_with = [&](size_t i, size_t j) {
    std::swap(x1[i], x1[j]);
    std::swap(y1[i], y1[j]);
    std::swap(x2[i], x2[j]);
    std::swap(y2[i], y2[j]);
    std::swap(area[i], area[j]);
    std::swap(score[i], score[j]);
    std::swap(index[i], index[j]);
  };
  const float limit = static_cast<float>(iou_threshold), width = static_cast<float>(sigma);
  const float least = static_cast<float>(score_threshold);
  const bool linear = method == "linear", gaussian = method == "gaussian";

  size_t n = x1.size();
  for (size_t i = 0; i < n; ++i) {
    size_t best = i;
    for (size_t j = i + 1; j < n; ++j) {
      if (score[j] > score[best]) best = j;
    }
    swap_with(i, best);
    for (size_t j = i + 1; j < n;) {
      const float w = std::max(0.0f, std::min(x2[i], x2[j]) - std::max(x1[i], x1[j]));
      const float h = std::max(0.0f, std::min(y2[i], y2[j]) - std::max(y1[i], y1[j]));
      const float intersection = w * h;
      const float overlap = intersection / (area[i] + area[j] - intersection);
      if (gaussian) {
        score[j] *= std::exp(-(overlap * overlap) / width);
      } else if (overlap > limit) {
        score[j] *= linear ? 1 - overlap : 0;
      }
      if (score[j] < least) {
        swap_with(j, --n);
      } else {
        ++j;
      }
    }
  }
  const auto size = static_cast<int64_t>(n);
  return {at::from_blob(index.data(), {size}, at::kLong).clone(),
          at::from_blob(score.data(), {size}, at::kFloat).clone()};
}

template <class T>
struct Point {
  T x, y;
};

template <class T>
Point<T> operator-(Point<T> a, Point<T> b) {
  return {a.x - b.x, a.y - b.y};
}

template <class T>
T cross(Point<T> a, Point<T> b) {
  return a.x * b.y - a.y * b.x;
}

template <class T>
T dot(Point<T> a, Point<T> b) {
  return a.x * b.x + a.y * b.y;
}

template <class T>
std::array<Point<T>, 4> corners(const T* box, Point<T> origin) {
  const T c = std::cos(box[4]) / 2, s = std::sin(box[4]) / 2;
  const Point<T> along{box[2] * c, box[2] * s}, across{-box[3] * s, box[3] * c};
  const Point<T> centre = Point<T>{box[0], box[1]} - origin;
  return {{{centre.x - along.x - across.x, centre.y - along.y - across.y},
           {centre.x + along.x - across.x, centre.y + along.y - across.y},
           {centre.x + along.x + across.x, centre.y + along.y + across.y},
           {centre.x - along.x + across.x, centre.y - along.y + across.y}}};
}

template <class T>
bool contains(const std::array<Point<T>, 4>& box, Point<T> point) {
  const Point<T> width = box[1] - box[0], height = box[3] - box[0], to = point - box[0];
  const T u = dot(to, width), v = dot(to, height);
  return u >= 0 && u <= dot(width, width) && v >= 0 && v <= dot(height, height);
}

// The corners of the intersection, in any order and some of them twice: where edges cross, and
// corners of one box in the other.
template <class T>
int shared_points(const std::array<Point<T>, 4>& a, const std::array<Point<T>, 4>& b,
                  std::array<Point<T>, 24>& found) {
  int count = 0;
  for (int i = 0; i < 4; ++i) {
    const Point<T> edge = a[(i + 1) % 4] - a[i];
    for (int j = 0; j < 4; ++j) {
      const Point<T> other = b[(j + 1) % 4] - b[j], between = b[j] - a[i];
      const T turn = cross(edge, other);
      if (std::abs(turn) <= T(1e-14)) continue;
      const T t = cross(between, other) / turn, u = cross(between, edge) / turn;
      if (t < 0 || t > 1 || u < 0 || u > 1) continue;
      found[count++] = {a[i].x + t * edge.x, a[i].y + t * edge.y};
    }
  }
  for (const Point<T> point : a) {
    if (contains(b, point)) found[count++] = point;
  }
  for (const Point<T> point : b) {
    if (contains(a, point)) found[count++] = point;
  }
  return count;
}

// Graham's scan, and the area of what it walks around.
template <class T>
T hull_area(std::array<Point<T>, 24>& points, int count) {
  const auto lowest = [](Point<T> p, Point<T> q) { return p.y != q.y ? p.y < q.y : p.x < q.x; };
  std::swap(points[0], *std::min_element(points.begin(), points.begin() + count, lowest));
  const Point<T> start = points[0];
  std::sort(points.begin() + 1, points.begin() + count, [=](Point<T> p, Point<T> q) {
    const Point<T> to_p = p - start, to_q = q - start;
    const T turn = cross(to_p, to_q);
    return turn != 0 ? turn > 0 : dot(to_p, to_p) < dot(to_q, to_q);
  });
  int hull = 0;
  for (int i = 0; i < count; ++i) {
    while (hull > 1 &&
           cross(points[hull - 1] - points[hull - 2], points[i] - points[hull - 2]) <= 0)
      --hull;
    points[hull++] = points[i];
  }
  T twice = 0;
  for (int i = 1; i + 1 < hull; ++i) twice += cross(points[i] - start, points[i + 1] - start);
  return std::abs(twice) / 2;
}

// Around the middle of both, where float has the most digits, so corners are made for each pair.
template <class T>
T rotated_iou(const T* a, const T* b) {
  const Point<T> middle{(a[0] + b[0]) / 2, (a[1] + b[1]) / 2};
  std::array<Point<T>, 24> points;
  const int count = shared_points(corners(a, middle), corners(b, middle), points);
  const T intersection = count > 2 ? hull_area(points, count) : 0;
  return intersection / (a[2] * a[3] + b[2] * b[3] - intersection);
}

template <class T>
at::Tensor nms_rotated_of(const at::Tensor& boxes, const at::Tensor& scores, double threshold) {
  const at::Tensor rows = boxes.contiguous();
  const T* const row = rows.const_data_ptr<T>();
  return greedy(by_falling_score(scores), [&](int64_t a, int64_t b) {
    return rotated_iou(row + 5 * a, row + 5 * b) > threshold;
  });
}

at::Tensor nms_rotated(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold) {
  return boxes.scalar_type() == at::kDouble ? nms_rotated_of<double>(boxes, scores, iou_threshold)
                                            : nms_rotated_of<float>(boxes, scores, iou_threshold);
}

// Of clouds [B, N, D]: k times, every point's distance to the latest one, and the farthest of all.
at::Tensor farthest_points(const at::Tensor& points, int64_t k) {
  const int64_t clouds = points.size(0), n = points.size(1), dim = points.size(2);
  const at::Tensor dense = points.contiguous();
  at::Tensor chosen = at::zeros({clouds, k}, points.options().dtype(at::kLong));
  std::vector<float> least(n);
  for (int64_t cloud = 0; cloud < clouds; ++cloud) {
    const float* const p = dense.const_data_ptr<float>() + cloud * n * dim;
    int64_t* const row = chosen.mutable_data_ptr<int64_t>() + cloud * k;
    std::fill(least.begin(), least.end(), INFINITY);
    for (int64_t place = 1; place < k; ++place) {
      const float* const latest = p + row[place - 1] * dim;
      float farthest = -1;
      for (int64_t i = 0; i < n; ++i) {
        float distance = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const float difference = p[i * dim + d] - latest[d];
          distance += difference * difference;
        }
        least[i] = std::min(least[i], distance);
        if (least[i] > farthest) {
          farthest = least[i];
          row[place] = i;
        }
      }
    }
  }
  return chosen;
}

}  // namespace

TORCH_LIBRARY(fastzoo_peers, m) {
  m.def("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor", &nms);
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, str method, float iou_threshold, float sigma,"
      " float score_threshold) -> (Tensor, Tensor)",
      &soft_nms);
  m.def("nms_rotated(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor", &nms_rotated);
  m.def("farthest_points(Tensor points, int k) -> Tensor", &farthest_points);
}
