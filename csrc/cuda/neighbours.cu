// The k nearest points of each query's cloud, or the first k within a radius: of each query a warp
// keeps the k first keys, a distance and an index, of all that it meets. No matrix of pairs is
// stored.
//   search_tiles      meets every point; tiles of them are shared by the queries of a block
//   search_tree       large clouds of few dimensions: meets the points of boxes that are near
//   neighbour_rows    the rows that pairs name, to be sorted by
//   neighbour_grads   sums over the pairs of a query, or over those that name a point
#include "../math/neighbours.h"

#include <limits>
#include <string>
#include <tuple>

#include "../torch_abi.h"
#include "runtime/nearest_list.h"
#include "runtime/point_tree.h"

namespace fastzoo::cuda {
namespace {

using math::Norm;

constexpr int kThreads = 256;
constexpr int kEach = 4;  // points that a lane has at a time
constexpr int kPart = kEach * kWarpSize;
static_assert(kPart <= kMostAppended);
constexpr int64_t kMostNeighbours = 1024;

// Larger clouds are searched by a tree, and so are smaller ones of more than a few points where the
// pairs are so many that they take longer than the sort that builds a tree.
#if defined(FASTZOO_EMULATE)
constexpr int64_t kMostByTiles = 64;
#else
constexpr int64_t kMostByTiles = 8192;
#endif
constexpr int64_t kFewPoints = 1024;
constexpr int64_t kManyPairs = int64_t{1} << 28;

// How many candidates may wait in a short list of a search by a tree, which prunes by the limit.
constexpr int kTreeWaiting = 15;

// kDims is kFewDims, whose missing ones are zeros and whose norm is two, or 0 for any.
template <class C>
struct Search {
  const C* queries;
  const C* points;
  Clouds from, among;
  int dims, k;
  bool first;  // by index, of those within the radius
  Norm norm;
  DistanceKey<C> radius;  // before it lie the keys (distance, 0) of those within
  C* dists;               // [queries, k]
  int64_t* indices;       // [queries, k]

  FASTZOO_DEVICE DistanceKey<C> limit() const { return first ? no_key<C>() : radius; }
  FASTZOO_DEVICE DistanceKey<C> key(C distance, uint32_t index) const {
    return make_key(first ? 0 : math::distance_bits(distance), index);
  }
  // That a point at this distance may have a key before the limit.
  FASTZOO_DEVICE bool wants(C distance, DistanceKey<C> key, DistanceKey<C> limit) const {
    return before(key, limit) &&
           (!first || before(make_key(math::distance_bits(distance), 0u), radius));
  }
  // Of the distances that may still be wanted.
  FASTZOO_DEVICE DistanceBits<C> farthest(DistanceKey<C> limit) const {
    return bits_of(first ? radius : limit);
  }
  // Likewise: those that are not greater. NaN is not.
  FASTZOO_DEVICE C reach(DistanceKey<C> limit) const { return math::bits_as<C>(farthest(limit)); }

  FASTZOO_DEVICE C term(C a, C b) const {
    return norm == Norm::two ? math::distance_term<Norm::two>(a, b)
                             : math::distance_term<Norm::one>(a, b);
  }
  FASTZOO_DEVICE C distance(int64_t query, int64_t point) const {
    C sum = 0;
    for (int64_t d = 0; d < dims; ++d) {
      sum += term(queries[query * dims + d], points[point * dims + d]);
    }
    return sum;
  }

  // By a warp; `origin` is the row of the cloud's first point.
  template <class List, class Memory>
  FASTZOO_DEVICE void put(int64_t query, int64_t origin, const List& list, Memory& memory) const {
    for (int i = threadIdx.x % kWarpSize; i < k; i += kWarpSize) {
      const uint32_t index = index_of(list.get(memory, i));
      const bool found = index != kNoIndex;
      dists[query * k + i] = found ? distance(query, origin + index) : C{0};
      indices[query * k + i] = found ? int64_t{index} : -1;
    }
  }
};

// Of kPart points, a dimension of theirs kPitch after the one before. A whole sum begins with its
// first term.
template <Norm norm, int kPitch, bool kWhole, class C, int kQueries, class Tile, class Wanted>
FASTZOO_DEVICE void add_terms(C (&sums)[kQueries][kEach], Tile& tile, int first, int dims,
                              const Wanted& wanted) {
#pragma unroll 4
  for (int d = 0; d < dims; ++d) {
    C point[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) point[i] = tile[d * kPitch + first + i * kWarpSize];
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      const C coordinate = wanted(q, d);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const C term = math::distance_term<norm>(coordinate, point[i]);
        sums[q][i] = kWhole && d == 0 ? term : sums[q][i] + term;
      }
    }
  }
}

// A warp has kQueries consecutive queries, and a block goes over the clouds that its queries are
// of. Few dimensions are in shared memory at once, many a chunk at a time.
template <class C, int kDims, class List>
__global__ void __launch_bounds__(List::kWarps* kWarpSize, List::kBlocks)
    search_tiles(Search<C> search) {
  using Key = DistanceKey<C>;
  constexpr int kWarps = List::kWarps;
  constexpr int kBlock = kWarps * kWarpSize;
  constexpr int kQueries = List::kQueries;
  constexpr bool kWhole = kDims > 0;
  constexpr int kChunk = kWhole ? kDims : 64 / static_cast<int>(sizeof(C));
  constexpr int kTile = kWhole ? 4 * kPart : kPart;
  constexpr int kPitch = kTile + 1;  // neighbouring dimensions of a point lie in different banks
  __shared__ SharedArray<C, kChunk * kPitch> tile;
  __shared__ SharedArray<C, kWhole ? 1 : kWarps * kQueries * kChunk> wanted;
  __shared__ SharedArray<Key, kWarps * kQueries * List::kKeys> memory;
  __shared__ SharedArray<int, kWarps> active;

  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int64_t first_row = int64_t{blockIdx.x} * (kWarps * kQueries);
  const int64_t last_row = first_row + kWarps * kQueries;
  const int64_t row = first_row + warp * kQueries;

  List lists[kQueries];
  C reach[kQueries];
  C own[kQueries][kWhole ? kDims : 1] = {};
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    lists[q].start(search.k, search.limit(), (warp * kQueries + q) * List::kKeys);
    reach[q] = search.reach(lists[q].limit);
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      if (d < search.dims && row + q < search.from.rows) {
        own[q][d] = search.queries[(row + q) * search.dims + d];
      }
    }
  }

  int64_t cloud = search.from.last_from(first_row);
  if (cloud < 0) cloud = 0;
  for (; cloud < search.from.count && search.from.begin(cloud) < last_row; ++cloud) {
    const int64_t from = search.from.begin(cloud), to = search.from.end(cloud);
    const int64_t origin = search.among.begin(cloud);
    const uint32_t size = static_cast<uint32_t>(search.among.size(cloud));
    if (to <= first_row) continue;
    bool mine[kQueries];
    bool busy = false;
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      mine[q] = row + q >= from && row + q < to;
      busy |= mine[q];
    }

    // kPart points, the first of which is `begin`, whose distances are known.
    const auto offer = [&](uint32_t begin, const C(&sums)[kQueries][kEach]) {
      bool going_on = !search.first;
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        if (!mine[q]) continue;
        bool some = false;
#pragma unroll
        for (int i = 0; i < kEach; ++i) some |= !(sums[q][i] > reach[q]);
        if (any(some)) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            if (!any(!(sums[q][i] > reach[q]))) continue;
            const uint32_t index = begin + lane + i * kWarpSize;
            const Key key = search.key(sums[q][i], index);
            const bool wanted = index < size && search.wants(sums[q][i], key, lists[q].limit);
            lists[q].append(memory, wanted, key);
          }
          lists[q].settle(memory, lists[q].room());
          reach[q] = search.reach(lists[q].limit);
        }
        // By index there is no limit until there are k.
        going_on |= !before(lists[q].limit, no_key<C>());
      }
      busy = going_on;
    };

    for (uint32_t begin = 0; begin < size; begin += kTile) {
      const int points = size - begin < kTile ? static_cast<int>(size - begin) : kTile;
      const int padded = (points + kPart - 1) / kPart * kPart;
      if constexpr (kWhole) {
        sync_block();
        for (int i = thread; i < padded; i += kBlock) {
#pragma unroll
          for (int d = 0; d < kDims; ++d) {
            tile[d * kPitch + i] = i < points && d < search.dims
                                       ? search.points[(origin + begin + i) * search.dims + d]
                                       : C{0};
          }
        }
        sync_block();
        for (int part = 0; busy && part < padded; part += kPart) {
          C sums[kQueries][kEach] = {};
          add_terms<Norm::two, kPitch, kWhole>(sums, tile, part + lane, kDims,
                                               [&](int q, int d) { return own[q][d]; });
          offer(begin + part, sums);
        }
      } else {
        C sums[kQueries][kEach] = {};
        for (int d = 0; d < search.dims; d += kChunk) {
          sync_block();
          for (int e = thread; e < kChunk * kTile; e += kBlock) {
            const int i = e / kChunk, c = e % kChunk;
            tile[c * kPitch + i] = i < points && d + c < search.dims
                                       ? search.points[(origin + begin + i) * search.dims + d + c]
                                       : C{0};
          }
          for (int e = thread; e < kWarps * kQueries * kChunk; e += kBlock) {
            const int64_t query = first_row + e / kChunk, c = e % kChunk;
            const bool exists = query < search.from.rows && d + c < search.dims;
            wanted[e] = exists ? search.queries[query * search.dims + d + c] : C{0};
          }
          sync_block();
          if (!busy) continue;
          const auto coordinate = [&](int q, int c) {
            return wanted[(warp * kQueries + q) * kChunk + c];
          };
          if (search.norm == Norm::two) {
            add_terms<Norm::two, kPitch, kWhole>(sums, tile, lane, kChunk, coordinate);
          } else {
            add_terms<Norm::one, kPitch, kWhole>(sums, tile, lane, kChunk, coordinate);
          }
        }
        if (busy) offer(begin, sums);
      }
      if (search.first) {
        // Later points have higher indices.
        if (lane == 0) active[warp] = busy;
        sync_block();
        bool going_on = false;
        for (int w = 0; w < kWarps; ++w) going_on |= active[w] != 0;
        if (!going_on) break;
      }
    }
  }

#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    if (row + q >= search.from.rows) break;
    lists[q].settle(memory, 0);
    const int64_t of = search.from.of_row(row + q);
    search.put(row + q, of < 0 ? 0 : search.among.begin(of), lists[q], memory);
  }
}

// A warp's way through the tree for one query: the nearest group of a level first.
template <class C, int kDims, class List, class Memory>
struct Walk {
  static constexpr int kAxes = kDims > 0 ? kDims : kTreeDims;

  const Search<C>& search;
  const PointTree<C>& tree;
  Memory& memory;
  List& list;
  CloudGroups cloud;
  C query[kAxes];
  int waiting;  // at most, in the list

  template <class Term>
  FASTZOO_DEVICE C sum(const Term& term) const {
    C total = 0;
#pragma unroll
    for (int d = 0; d < kAxes; ++d) {
      if (kDims > 0 || d < tree.dims) total += term(d);
    }
    return total;
  }
  template <Norm norm>
  FASTZOO_DEVICE C box_distance(int64_t group, int level) const {
    return sum([&](int d) {
      const C* bounds = tree.bounds(group, level, d) + threadIdx.x % kWarpSize;
      return math::box_distance_term<norm>(query[d], bounds[0], bounds[kWarpSize]);
    });
  }
  template <Norm norm>
  FASTZOO_DEVICE C point_distance(int64_t group) const {
    return sum([&](int d) {
      return math::distance_term<norm>(query[d],
                                       tree.coordinate(group, d)[threadIdx.x % kWarpSize]);
    });
  }

  // `within` is the group's number in its cloud.
  template <int level>
  FASTZOO_DEVICE void visit(int64_t within) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t group = cloud.first(level) + within;
    const bool two = kDims > 0 || search.norm == Norm::two;
    if constexpr (level == 0) {
      const int32_t index = tree.indices[group * kWarpSize + lane];
      const C distance = two ? point_distance<Norm::two>(group) : point_distance<Norm::one>(group);
      const DistanceKey<C> key = search.key(distance, static_cast<uint32_t>(index));
      list.append(memory, index >= 0 && search.wants(distance, key, list.limit), key);
      list.settle(memory, waiting);
    } else {
      const C distance =
          two ? box_distance<Norm::two>(group, level) : box_distance<Norm::one>(group, level);
      // A distance that is not known may be any.
      DistanceBits<C> nearest = math::is_nan(distance) ? 0 : math::distance_bits(distance);
      if (within * kWarpSize + lane >= cloud.count(level - 1)) nearest = kNoBits<C>;
      for (;;) {
        const DistanceBits<C> least = warp_least(nearest);
        if (least == kNoBits<C> || least > search.farthest(list.limit)) return;
        const int member = lowest_bit(ballot(nearest == least));
        if (lane == member) nearest = kNoBits<C>;
        visit<level - 1>(within * kWarpSize + member);
      }
    }
  }
};

// `order` is that in which warps take queries, or null for that of their rows.
template <class C, int kDims, class List>
__global__ void __launch_bounds__(List::kWarps* kWarpSize, List::kBlocks)
    search_tree(Search<C> search, PointTree<C> tree, const int64_t* order) {
  using Memory = SharedArray<DistanceKey<C>, List::kWarps * List::kKeys>;
  __shared__ Memory memory;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t turn = int64_t{blockIdx.x} * List::kWarps + warp;
  if (turn >= search.from.rows) return;
  const int64_t row = order == nullptr ? turn : order[turn];
  const CloudGroups cloud = tree.of_cloud(search.from.of_row(row));

  List list;
  list.start(search.k, search.limit(), warp * List::kKeys);
  Walk<C, kDims, List, Memory> walk{search, tree, memory, list, cloud};
  walk.waiting = list.room() < kWarpSize ? kTreeWaiting : list.room();
#pragma unroll
  for (int d = 0; d < walk.kAxes; ++d) {
    walk.query[d] = d < search.dims ? search.queries[row * search.dims + d] : C{0};
  }
  const int64_t groups = cloud.count(kTreeTop);
  for (int64_t group = 0; group < groups; ++group) walk.template visit<kTreeTop>(group);
  list.settle(memory, 0);
  search.put(row, cloud.begin, list, memory);
}

template <class C, int kDims, class List>
void launch_search(const Stream& stream, const Search<C>& search, const PointTree<C>* tree,
                   const int64_t* order) {
  constexpr int kBlock = List::kWarps * kWarpSize;
  if (tree != nullptr) {
    stream.launch("search_tree", search_tree<C, kDims, List>,
                  blocks_for(search.from.rows, List::kWarps), kBlock, search, *tree, order);
  } else {
    stream.launch("search_tiles", search_tiles<C, kDims, List>,
                  blocks_for(search.from.rows, List::kWarps * List::kQueries), kBlock, search);
  }
}

template <class C>
void launch_search(const Stream& stream, const Search<C>& search, const PointTree<C>* tree,
                   const int64_t* order) {
  const bool few = search.dims <= kFewDims && search.norm == Norm::two;
  const auto launch = [&](auto list) {
    using List = typename decltype(list)::type;
    if (few) return launch_search<C, kFewDims, List>(stream, search, tree, order);
    return launch_search<C, 0, List>(stream, search, tree, order);
  };
  if (search.k <= kWarpSize) return launch(std::common_type<ShortList<C>>());
  if (search.k <= 128) return launch(std::common_type<LongList<C, 128>>());
  launch_search<C, 0, LongList<C, kMostNeighbours>>(stream, search, tree, order);
}

Norm norm_of(int64_t norm) {
  STD_TORCH_CHECK(norm == 1 || norm == 2, "fastzoo: neighbours: norm 1 or 2 expected, got ", norm);
  return norm == 1 ? Norm::one : Norm::two;
}

template <class C>
DistanceKey<C> radius_key(Norm norm, double radius) {
  if (radius == std::numeric_limits<double>::infinity()) return no_key<C>();
  const C limit = math::radius_limit<C>(norm, radius);
  return limit > 0 ? make_key(math::distance_bits(limit), 0u) : make_key(DistanceBits<C>{0}, 0u);
}

std::tuple<Tensor, Tensor> neighbour_search(const Tensor& p1, const Tensor& p2,
                                            const Tensor& ranges1, const Tensor& ranges2,
                                            int64_t longest, int64_t k, double radius,
                                            const std::string& order, int64_t norm) {
  using torch::stable::contiguous;
  STD_TORCH_CHECK(order == "nearest" || order == "first",
                  "fastzoo: neighbour_search: order nearest or first expected, got ", order);
  STD_TORCH_CHECK(k <= kMostNeighbours, "fastzoo: neighbour_search: k of at most ", kMostNeighbours,
                  " expected on a GPU, got ", k);
  STD_TORCH_CHECK(p2.size(0) <= std::numeric_limits<int32_t>::max(),
                  "fastzoo: neighbour_search: fewer than 2^31 points expected, got ", p2.size(0));
  const Norm form = norm_of(norm);
  const ScalarType compute = compute_dtype(p1.scalar_type());
  const int64_t rows = p1.size(0), dims = p1.size(1);
  const Tensor dists = empty(p1, {rows, k}, compute);
  const Tensor indices = empty(p1, {rows, k}, ScalarType::Long);
  if (rows == 0 || k == 0) return {dists, indices};

  const Stream stream(p1);
  const Tensor queries = contiguous(torch::stable::to(p1, compute));
  const Tensor points = contiguous(torch::stable::to(p2, compute));
  const Tensor from = contiguous(ranges1), among = contiguous(ranges2);
  const auto run = [&](auto type) {
    using C = decltype(type);
    const Search<C> search{static_cast<const C*>(queries.const_data_ptr()),
                           static_cast<const C*>(points.const_data_ptr()),
                           clouds_of(from, rows),
                           clouds_of(among, points.size(0)),
                           static_cast<int>(dims),
                           static_cast<int>(k),
                           order == "first",
                           form,
                           radius_key<C>(form, radius),
                           static_cast<C*>(dists.mutable_data_ptr()),
                           static_cast<int64_t*>(indices.mutable_data_ptr())};
    const bool large =
        longest > kMostByTiles || (longest > kFewPoints && longest > kManyPairs / rows);
    if (!large || dims > kTreeDims || points.size(0) == 0) {
      return launch_search<C>(stream, search, nullptr, nullptr);
    }
    const PointTreeMemory<C> memory = build_tree<C>(stream, points, search.among, longest);
    // Warps that follow one another look at the same boxes.
    const bool same = p1.const_data_ptr() == p2.const_data_ptr() && rows == points.size(0);
    launch_search<C>(stream, search, &memory.tree, same ? memory.row_at() : nullptr);
  };
  if (compute == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {dists, indices};
}

// ---- gradients
// -----------------------------------------------------------------------------------

// Pairs [queries, k] of a query and the point of its cloud that an index names.
template <class C>
struct Pairs {
  const C* queries;
  const C* points;
  Clouds from, among;
  const C* grads;          // of the pairs' distances
  const int64_t* indices;  // -1 for none
  int64_t k, dims;
  Norm norm;

  // The row of a pair's point, or of none.
  FASTZOO_DEVICE int64_t point(int64_t pair) const {
    const int64_t index = indices[pair];
    const int64_t cloud = index < 0 ? -1 : from.of_row(pair / k);
    return cloud < 0 || index >= among.size(cloud) ? -1 : among.begin(cloud) + index;
  }
  // The gradient of a pair's distance by a coordinate of its query; the point's is the negative.
  FASTZOO_DEVICE double slope(int64_t pair, int64_t query, int64_t point, int64_t d) const {
    const double difference = static_cast<double>(queries[query * dims + d]) -
                              static_cast<double>(points[point * dims + d]);
    const double grad = grads[pair];
    if (norm == Norm::two) return grad * 2 * difference;
    return grad * (difference > 0 ? 1 : difference < 0 ? -1 : difference);
  }
};

// The pairs that share a query.
template <class C>
struct QueryPairs : Pairs<C> {
  FASTZOO_DEVICE int64_t begin(int64_t query) const { return query * this->k; }
  FASTZOO_DEVICE int64_t end(int64_t query) const { return begin(query) + this->k; }
  FASTZOO_DEVICE double term(int64_t at, int64_t query, int64_t d) const {
    const int64_t point = this->point(at);
    return point < 0 ? 0 : this->slope(at, query, point, d);
  }
};

// The pairs that name a point, in rising order.
template <class C>
struct PointPairs : Pairs<C> {
  const int32_t* named;   // by position, rising: the rows of pairs' points
  const int64_t* sorted;  // by position: the pair

  FASTZOO_DEVICE int64_t begin(int64_t point) const {
    return first_of_segment(named, 0, this->from.rows * this->k, point);
  }
  FASTZOO_DEVICE int64_t end(int64_t point) const {
    return first_of_segment(named, 0, this->from.rows * this->k, point + 1);
  }
  FASTZOO_DEVICE double term(int64_t at, int64_t point, int64_t d) const {
    const int64_t pair = sorted[at];
    return -this->slope(pair, pair / this->k, point, d);
  }
};

// That of pairs of no point, which come last.
constexpr int32_t kNoRow = std::numeric_limits<int32_t>::max();

template <class C>
__global__ void __launch_bounds__(kThreads) neighbour_rows(Pairs<C> pairs, int32_t* rows) {
  const int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pair >= pairs.from.rows * pairs.k) return;
  const int64_t row = pairs.point(pair);
  rows[pair] = row < 0 ? kNoRow : static_cast<int32_t>(row);
}

// A warp has a row; `width` neighbouring lanes have its dimensions, and so many apart its pairs.
template <class C, class PairsOf>
__global__ void __launch_bounds__(kThreads)
    neighbour_grads(PairsOf pairs, int64_t rows, int width, C* grads) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  const int64_t begin = pairs.begin(row), end = pairs.end(row);
  for (int64_t first = 0; first < pairs.dims; first += width) {
    const int64_t d = first + lane % width;
    double sum = 0;
    if (d < pairs.dims) {
      for (int64_t at = begin + lane / width; at < end; at += kWarpSize / width) {
        sum += pairs.term(at, row, d);
      }
    }
    for (int flip = width; flip < kWarpSize; flip *= 2) sum += shuffle_xor(sum, flip);
    if (lane < width && d < pairs.dims) grads[row * pairs.dims + d] = static_cast<C>(sum);
  }
}

std::tuple<Tensor, Tensor> neighbour_search_backward(const Tensor& grad_dists, const Tensor& p1,
                                                     const Tensor& p2, const Tensor& ranges1,
                                                     const Tensor& ranges2, int64_t,
                                                     const Tensor& indices, int64_t norm) {
  using torch::stable::contiguous;
  using torch::stable::to;
  STD_TORCH_CHECK(p2.size(0) < std::numeric_limits<int32_t>::max(),
                  "fastzoo: neighbour_search_backward: fewer than 2^31 points expected, got ",
                  p2.size(0));
  const ScalarType compute = compute_dtype(p1.scalar_type());
  const int64_t rows1 = p1.size(0), rows2 = p2.size(0), dims = p1.size(1), k = indices.size(1);
  const Tensor grad1 = empty(p1, {rows1, dims}, compute);
  const Tensor grad2 = empty(p2, {rows2, dims}, compute);

  const Stream stream(p1);
  const Tensor queries = contiguous(to(p1, compute)), points = contiguous(to(p2, compute));
  const Tensor grads = contiguous(to(grad_dists, compute)), named = contiguous(indices);
  const Tensor from = contiguous(ranges1), among = contiguous(ranges2);
  int width = 1;
  while (width < dims && width < kWarpSize) width *= 2;
  const auto run = [&](auto type) {
    using C = decltype(type);
    const Pairs<C> pairs{static_cast<const C*>(queries.const_data_ptr()),
                         static_cast<const C*>(points.const_data_ptr()),
                         clouds_of(from, rows1),
                         clouds_of(among, rows2),
                         static_cast<const C*>(grads.const_data_ptr()),
                         static_cast<const int64_t*>(named.const_data_ptr()),
                         k,
                         dims,
                         norm_of(norm)};
    const auto sum = [&](const auto& of_rows, int64_t rows, const Tensor& out) {
      using PairsOf = std::decay_t<decltype(of_rows)>;
      if (rows == 0 || dims == 0) return;
      stream.launch("neighbour_grads", neighbour_grads<C, PairsOf>,
                    blocks_for(rows, kThreads / kWarpSize), kThreads, of_rows, rows, width,
                    static_cast<C*>(out.mutable_data_ptr()));
    };
    sum(QueryPairs<C>{pairs}, rows1, grad1);
    const Tensor keys = empty(p1, {rows1 * k}, ScalarType::Int);
    if (rows1 * k > 0) {
      stream.launch("neighbour_rows", neighbour_rows<C>, blocks_for(rows1 * k, kThreads), kThreads,
                    pairs, static_cast<int32_t*>(keys.mutable_data_ptr()));
    }
    const SortedKeys sorted = sort_rows(keys);
    sum(PointPairs<C>{pairs, static_cast<const int32_t*>(sorted.values.const_data_ptr()),
                      static_cast<const int64_t*>(sorted.indices.const_data_ptr())},
        rows2, grad2);
  };
  if (compute == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {to(grad1, p1.scalar_type()), to(grad2, p2.scalar_type())};
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::neighbour_search>(m, "neighbour_search.cuda");
  fastzoo::implement<fastzoo::cuda::neighbour_search_backward>(m, "neighbour_search_backward.cuda");
}
