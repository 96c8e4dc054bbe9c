// PointConv: the edges of a chunk of centres are weighed, their features summed by weight, and the
// sums multiplied by the linear layer, while they are in cache. Backward goes the same way: what it
// needs is computed again.
//
// The sums of a centre have two coordinates, channel c and weight m. Channels stand in vectors, a
// vector of channels has all its weights in turn, two of them to a panel:
//   sums[channel vector][pair of weights][centre][weight of the pair][lane],
// so that a panel is the right operand of a tile product and its rows are a left one.
#include "pointconv.h"

#include <type_traits>

#include "../runtime/arena.h"
#include "../runtime/tile_product.h"
#include "../runtime/vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::NetLayer;

// Centres of a unit at most, and the edges that a unit is made for.
constexpr int64_t kUnitCentres = 16;
constexpr int64_t kUnitEdges = 512;

// Vectors of edges that the net takes at once.
constexpr int kNetVectors = 32;

FASTZOO_INLINE int64_t unit_centres(int64_t neighbours_each) {
  int64_t unit = kUnitCentres;
  while (unit > 1 && unit * neighbours_each > kUnitEdges) unit /= 2;
  return unit;
}

// left(i) . right(j) for all i and j, whose elements lie in `count` vectors, a step apart:
// write(i, j, product).
template <class T, class Left, class Right, class Write>
FASTZOO_INLINE void dot_products(int rows, const Left& left, int64_t left_step, int columns,
                                 const Right& right, int64_t right_step, int count,
                                 const Write& write) {
  using V = Vec<T>;
  // As many products at once as give a vector of sums.
  constexpr int kColumns = V::size >= 16 ? 4 : 2;
  constexpr int kRows = V::size / kColumns;
  for (int i = 0; i < rows; i += kRows) {
    for (int j = 0; j < columns; j += kColumns) {
      const T* a[kRows];
      const T* b[kColumns];
      for (int r = 0; r < kRows; ++r) a[r] = left(i + r < rows ? i + r : i);
      for (int c = 0; c < kColumns; ++c) b[c] = right(j + c < columns ? j + c : j);
      V products[V::size];
#pragma GCC unroll 16
      for (int p = 0; p < V::size; ++p) products[p] = V(T(0));
      for (int64_t k = 0; k < count; ++k) {
        V right_values[kColumns];
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) right_values[c] = V::load(b[c] + k * right_step);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const V left_values = V::load(a[r] + k * left_step);
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) {
            V& product = products[r * kColumns + c];
            product = fused_multiply_add(left_values, right_values[c], product);
          }
        }
      }
      T sums[V::size];
      lane_sums(products).store(sums);
      for (int r = 0; r < kRows && i + r < rows; ++r) {
        for (int c = 0; c < kColumns && j + c < columns; ++c) {
          write(i + r, j + c, sums[r * kColumns + c]);
        }
      }
    }
  }
}

// Calls body(rows, first) for groups of rows, `rows` being a constant: as many as leave registers,
// and fewer at the end.
template <class Body>
FASTZOO_INLINE void in_groups(int64_t count, const Body& body) {
  constexpr int kMost = kVectorRegisters == 32 ? 8 : 4;
  int64_t first = 0;
  for (; first + kMost <= count; first += kMost) {
    body(std::integral_constant<int, kMost>{}, first);
  }
  if constexpr (kMost > 4) {
    if (first + 4 <= count) {
      body(std::integral_constant<int, 4>{}, first);
      first += 4;
    }
  }
  if (first + 2 <= count) {
    body(std::integral_constant<int, 2>{}, first);
    first += 2;
  }
  if (first < count) body(std::integral_constant<int, 1>{}, first);
}

// tile[i] += sum over k of left[i * row + k * left_step] * the vectors from right[k * right_step]
// on.
template <class T, int kRows, int kVectors>
FASTZOO_INLINE void add_products(const T* left, int64_t row, int64_t left_step, const T* right,
                                 int64_t right_step, int64_t count,
                                 Vec<T> (&tile)[kRows][kVectors]) {
  using V = Vec<T>;
  for (int64_t k = 0; k < count; ++k) {
    V values[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) values[v] = V::load(right + v * V::size);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V factor(left[i * row]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        tile[i][v] = fused_multiply_add(factor, values[v], tile[i][v]);
      }
    }
    left += left_step;
    right += right_step;
  }
}

// The edges of the centres of a unit, in order; those without a neighbour are left out.
template <class T>
struct Edges {
  int64_t* begins;  // of each centre's edges, and the end of the last
  int64_t* edge;    // which of the batch's it is
  int64_t* point;   // the neighbour's row of xyz
  T* coordinates;  // [dims][stride] relative to the centre; at the end of backward, their gradients
  int64_t count;
};

// The net on the edges of a unit, some vectors of them at once: each with the values of all layers
// in turn.
template <class T>
struct EdgeNet {
  using V = Vec<T>;

  const EdgeArgs& args;
  const math::NetLayout& layout = args.layout;
  // Lanes of a unit's edges; those after the last edge have what the last one has. An odd number of
  // vectors, so that the lines of an edge do not all meet in one set of the cache.
  const int64_t stride = round_up(args.unit * args.neighbours_each, 2 * V::size) +
                         (args.neighbours_each > 0 ? V::size : 0);
  int depth = layout.dims;  // values of an edge: the coordinates, then the outputs of each layer
  int widest = layout.dims;
  // The edges of all units at hand.
  char* lists = nullptr;
  int64_t list_bytes = 0;

  EdgeNet(const EdgeArgs& args, Arena& arena) : args(args) {
    for (int i = 0; i < layout.layers; ++i) {
      depth += layout.layer[i].out;
      if (layout.layer[i].out > widest) widest = layout.layer[i].out;
    }
    Arena counter;
    take_edges(counter);
    list_bytes = counter.bytes();
    lists = arena.take<char>(units() * list_bytes);
  }

  int64_t units() const { return (args.count + args.unit - 1) / args.unit; }
  const T* net() const { return static_cast<const T*>(args.net); }
  // Where the weights are among the values of an edge.
  int weights() const { return depth - layout.width; }
  // The centres of a unit, counted among those at hand.
  int64_t begin_of(int64_t unit) const { return unit * args.unit; }
  int64_t end_of(int64_t unit) const {
    const int64_t end = (unit + 1) * args.unit;
    return end < args.count ? end : args.count;
  }

  Edges<T> take_edges(Arena& arena) const {
    Edges<T> edges{};
    edges.begins = arena.take<int64_t>(args.unit + 1);
    edges.edge = arena.take<int64_t>(stride);
    edges.point = arena.take<int64_t>(stride);
    edges.coordinates = arena.take<T>(layout.dims * stride);
    return edges;
  }
  // Once they have been found.
  Edges<T> edges_of(int64_t unit) const {
    Arena arena(lists + unit * list_bytes);
    Edges<T> edges = take_edges(arena);
    edges.count = edges.begins[end_of(unit) - begin_of(unit)];
    return edges;
  }
  V* take_values(Arena& arena) const { return arena.take<V>(kNetVectors * depth); }
  V* take_grad(Arena& arena) const { return arena.take<V>(kNetVectors * widest); }

  Edges<T> find_edges(int64_t unit) const {
    Arena arena(lists + unit * list_bytes);
    Edges<T> edges = take_edges(arena);
    const int64_t dims = layout.dims, each = args.neighbours_each;
    int64_t count = 0;
    for (int64_t i = begin_of(unit); i < end_of(unit); ++i) {
      edges.begins[i - begin_of(unit)] = count;
      const int64_t centre = args.first + i;
      const int64_t cloud = centre / args.centres;
      const T* const from = static_cast<const T*>(args.centre_xyz) + centre * dims;
      for (int64_t edge = centre * each; edge < (centre + 1) * each; ++edge) {
        if (args.neighbours[edge] < 0) continue;
        const int64_t point = cloud * args.points + args.neighbours[edge];
        const T* const to = static_cast<const T*>(args.xyz) + point * dims;
        edges.edge[count] = edge;
        edges.point[count] = point;
        for (int64_t d = 0; d < dims; ++d) edges.coordinates[d * stride + count] = to[d] - from[d];
        ++count;
      }
    }
    edges.begins[end_of(unit) - begin_of(unit)] = edges.count = count;
    for (int64_t i = count; i < round_up(count, V::size); ++i) {
      edges.edge[i] = edges.edge[count - 1];
      for (int64_t d = 0; d < dims; ++d) {
        edges.coordinates[d * stride + i] = edges.coordinates[d * stride + count - 1];
      }
    }
    return edges;
  }

  // Calls body(lane, vectors) for all edges, as many vectors from a lane on as are taken at once.
  template <class Body>
  void over_blocks(const Edges<T>& edges, const Body& body) const {
    const int64_t vectors = round_up(edges.count, V::size) / V::size;
    for (int64_t first = 0; first < vectors; first += kNetVectors) {
      const int64_t left = vectors - first;
      body(first * V::size, static_cast<int>(left < kNetVectors ? left : kNetVectors));
    }
  }

  void forward(const Edges<T>& edges, int64_t lane, int vectors, V* values) const {
    for (int v = 0; v < vectors; ++v) {
      V* to = values + v * depth;
      for (int64_t d = 0; d < layout.dims; ++d) {
        to[d] = V::load(edges.coordinates + d * stride + lane + v * V::size);
      }
      for (int i = 0; i < layout.layers; ++i) {
        const NetLayer& layer = layout.layer[i];
        math::net_layer(layer, net(), to, to + layer.in);
        to += layer.in;
      }
    }
  }

  // Each vector of edges has `widest` gradients in grad, at first by the weights; `other` is as
  // large. Adds the gradients by the parameters to sums, and puts those by the coordinates, where
  // they are wanted, in their place.
  void backward(const Edges<T>& edges, int64_t lane, int vectors, const V* values, V* grad,
                V* other, double* sums) const {
    int at = depth;
    for (int l = layout.layers - 1; l >= 0; --l) {
      const NetLayer& layer = layout.layer[l];
      at -= layer.out;
      for (int v = 0; v < vectors; ++v) {
        for (int o = 0; o < layer.out; ++o) {
          V& slope = grad[v * widest + o];
          slope = math::relu_gradient<T>(values[v * depth + at + o], slope);
        }
      }
      const V* const in = values + at - layer.in;
      dot_products<T>(
          layer.out, [&](int o) { return reinterpret_cast<const T*>(grad + o); }, widest * V::size,
          layer.in, [&](int i) { return reinterpret_cast<const T*>(in + i); }, depth * V::size,
          vectors, [&](int o, int i, T sum) { sums[layer.weight + o * layer.in + i] += sum; });
      for (int o = 0; o < layer.out; ++o) {
        V sum(T(0));
        for (int v = 0; v < vectors; ++v) sum = sum + grad[v * widest + o];
        sums[layer.bias + o] += lane_sum(sum);
      }
      if (l == 0 && !args.wants_coordinates) return;
      for (int v = 0; v < vectors; ++v) {
        math::net_layer_backward(layer, net(), grad + v * widest, other + v * widest);
      }
      V* const done = grad;
      grad = other;
      other = done;
    }
    if (!args.wants_coordinates) return;
    for (int v = 0; v < vectors; ++v) {
      for (int64_t d = 0; d < layout.dims; ++d) {
        grad[v * widest + d].store(edges.coordinates + d * stride + lane + v * V::size);
      }
    }
  }

  // The gradients by the centres of a unit, after backward on all its edges.
  void write_centres(int64_t unit, const Edges<T>& edges) const {
    for (int64_t i = 0; i < end_of(unit) - begin_of(unit); ++i) {
      T* const to =
          static_cast<T*>(args.grad_centres) + (args.first + begin_of(unit) + i) * layout.dims;
      for (int64_t d = 0; d < layout.dims; ++d) {
        T sum(0);
        for (int64_t e = edges.begins[i]; e < edges.begins[i + 1]; ++e) {
          sum += edges.coordinates[d * stride + e];
        }
        to[d] = -sum;
      }
    }
  }

  // Adds one dimension of the gradients by the points.
  void add_points(int64_t d) const {
    T* const to = static_cast<T*>(args.grad_xyz) + d;
    for (int64_t unit = 0; unit < units(); ++unit) {
      const Edges<T> edges = edges_of(unit);
      for (int64_t e = 0; e < edges.count; ++e) {
        to[edges.point[e] * layout.dims] += edges.coordinates[d * stride + e];
      }
    }
  }
};

template <class Element>
struct PointConv {
  using T = typename ComputeOf<Element>::type;
  using V = Vec<T>;
  using Product = TileProduct<Multiply<T>>;
  using Tile = typename Product::Tile;
  static constexpr int kLanes = V::size;
  static constexpr int kRows = Product::kRows;
  static constexpr int kColumns = Product::kColumns;
  // Rows of features that are gathered at once, and vectors of their channels.
  static constexpr int kGatherEdges = 64;
  static constexpr int kGatherVectors = 8;
  static constexpr int kGatherStride = (kGatherVectors + 1) * kLanes;
  // Edges whose rows are fetched before their turn.
  static constexpr int64_t kAhead = 6;
  // Terms of a long sum that are added up in registers, before they are added to the others.
  static constexpr int64_t kTerms = 256;
  // Elements of the linear layer that are packed at once, at least.
  static constexpr int64_t kPacked = 32768;

  const PointConvArgs& args;
  Arena arena{args.memory};
  const EdgeNet<T> net{args, arena};
  const bool backward = args.grad != nullptr;
  const int64_t width = net.layout.width;
  const int64_t pairs = (width + 1) / 2;  // of weights
  const int64_t vectors = (args.channels + kLanes - 1) / kLanes;
  // An odd number, for the same reason as there is for the net's stride.
  const int64_t rows = round_up(args.count, kRows) | 1;
  const int64_t tiles = (args.count + kRows - 1) / kRows;
  const int64_t outputs_stride = round_up(args.outputs, kRows);

  // Of the centres at hand.
  T* weights = nullptr;    // [unit][width][stride], with the scale
  T* sums = nullptr;       // [vectors][pairs][rows][kColumns]
  T* grad_sums = nullptr;  // the same
  T* grad = nullptr;       // [rows][outputs_stride]
  struct Scratch {
    V *values, *grad, *other;
    T* gathered;      // [kGatherEdges][kGatherStride]
    T* channels;      // [width][kGatherVectors][kLanes], of a centre
    T* weights_grad;  // [width][stride]
    T* packed;
    T* products;  // [rows][kColumns]
  };

  explicit PointConv(const PointConvArgs& args) : args(args) {
    weights = arena.take<T>(net.units() * width * net.stride);
    const int64_t size = vectors * pairs * rows * kColumns;
    if (!backward || args.has_linear) sums = arena.take<T>(size);
    if (backward) grad_sums = arena.take<T>(size);
    if (backward && args.has_linear) grad = arena.take<T>(rows * outputs_stride);
  }

  Scratch take_scratch(Arena& arena) const {
    const int64_t packed = 2 * pairs * kLanes * kColumns;
    Scratch scratch;
    scratch.values = net.take_values(arena);
    scratch.grad = net.take_grad(arena);
    scratch.other = net.take_grad(arena);
    scratch.gathered = arena.take<T>(kGatherEdges * kGatherStride);
    scratch.channels = arena.take<T>(width * kGatherVectors * kLanes);
    scratch.weights_grad = arena.take<T>(width * net.stride);
    scratch.packed = arena.take<T>(packed < kPacked ? kPacked : packed);
    scratch.products = arena.take<T>(rows * kColumns);
    return scratch;
  }

  T* weights_of(int64_t unit) const { return weights + unit * width * net.stride; }
  T* at(T* matrix, int64_t vector, int64_t weight, int64_t row) const {
    return matrix + ((vector * pairs + weight / 2) * rows + row) * kColumns + weight % 2 * kLanes;
  }
  // How many of the channels of some vectors there are.
  int64_t channels_from(int64_t vector, int64_t count) const {
    const int64_t left = args.channels - vector * kLanes;
    return left < count * kLanes ? left : count * kLanes;
  }
  int64_t feature_row(const Edges<T>& edges, int64_t edge) const {
    return args.grouped ? edges.edge[edge] : edges.point[edge];
  }

  // ---- sums of features ------------------------------------------------------------------------

  void sum(int64_t unit, const Scratch& scratch) const {
    const Edges<T> edges = net.find_edges(unit);
    weigh(edges, weights_of(unit), scratch);
    for (int64_t row = net.begin_of(unit); row < net.end_of(unit); ++row) {
      const int64_t* const begins = edges.begins + row - net.begin_of(unit);
      if (sums != nullptr)
        add_features(edges, begins[0], begins[1], weights_of(unit), row, scratch);
      if (grad != nullptr) widen_grad(row);
      if (backward && !args.has_linear) split_grad(row);
      if (!backward && !args.has_linear) write_sums(row);
    }
  }

  void weigh(const Edges<T>& edges, T* to, const Scratch& scratch) const {
    const T* const scale = static_cast<const T*>(args.scale);
    net.over_blocks(edges, [&](int64_t lane, int count) {
      net.forward(edges, lane, count, scratch.values);
      for (int v = 0; v < count; ++v, lane += kLanes) {
        const V* const from = scratch.values + v * net.depth + net.weights();
        V factor(T(1));
        if (scale != nullptr) {
          T factors[kLanes];
          for (int i = 0; i < kLanes; ++i) factors[i] = scale[edges.edge[lane + i]];
          factor = V::load(factors);
        }
        for (int64_t m = 0; m < width; ++m) (from[m] * factor).store(to + m * net.stride + lane);
      }
    });
  }

  // Rows lie all over the features: they are fetched before their turn.
  template <class Value>
  __attribute__((always_inline)) static void fetch(const Value* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(Value))) {
      __builtin_prefetch(from + i);
    }
  }

  void gather(const Edges<T>& edges, int64_t begin, int64_t end, int64_t vector, int64_t count,
              T* to) const {
    const int64_t channels = channels_from(vector, count);
    const auto row = [&](int64_t e) __attribute__((always_inline)) {
      return static_cast<const Element*>(args.features) + feature_row(edges, e) * args.channels +
             vector * kLanes;
    };
    for (int64_t e = begin; e < end; ++e, to += kGatherStride) {
      const Element* const from = row(e);
      if (e + kAhead < edges.count) fetch(row(e + kAhead), channels);
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) load_wide(from + c).store(to + c);
      if (c == channels) continue;
      V(T(0)).store(to + c);
      for (; c < channels; ++c) to[c] = widen(from[c]);
    }
  }

  // Calls body(first, vectors) for the vectors of channels that are gathered at once.
  template <class Body>
  void over_channels(const Body& body) const {
    for (int64_t first = 0; first < vectors; first += kGatherVectors) {
      const int64_t left = vectors - first;
      body(first, static_cast<int>(left < kGatherVectors ? left : kGatherVectors));
    }
  }

  void add_features(const Edges<T>& edges, int64_t begin, int64_t end, const T* factors,
                    int64_t row, const Scratch& scratch) const {
    const int64_t panel_size = rows * kColumns, vector_size = pairs * panel_size;
    over_channels([&](int64_t first, int count) {
      int64_t from = begin;
      do {
        const int64_t to = end - from < kGatherEdges ? end : from + kGatherEdges;
        gather(edges, from, to, first, count, scratch.gathered);
        for (int v = 0; v < count; v += 2) {
          const T* const right = scratch.gathered + v * kLanes;
          T* const to_sums = at(sums, first + v, 0, row);
          const auto sum_of = [=](int64_t m, int64_t j) __attribute__((always_inline)) {
            return to_sums + j * vector_size + m / 2 * panel_size + m % 2 * kLanes;
          };
          const auto add = [&](auto at_once) __attribute__((always_inline)) {
            constexpr int kVectors = decltype(at_once)::value;
            in_groups(width, [&](auto group, int64_t m) __attribute__((always_inline)) {
              constexpr int kGroup = decltype(group)::value;
              V tile[kGroup][kVectors];
              for (int i = 0; i < kGroup; ++i) {
                for (int j = 0; j < kVectors; ++j) {
                  tile[i][j] = from == begin ? V(T(0)) : V::load(sum_of(m + i, j));
                }
              }
              add_products<T>(factors + m * net.stride + from, net.stride, 1, right, kGatherStride,
                              to - from, tile);
              for (int i = 0; i < kGroup; ++i) {
                for (int j = 0; j < kVectors; ++j) {
                  tile[i][j].store(sum_of(m + i, j));
                }
              }
            });
          };
          if (v + 1 < count) {
            add(std::integral_constant<int, 2>{});
          } else {
            add(std::integral_constant<int, 1>{});
          }
        }
        from = to;
      } while (from < end);
    });
  }

  // Calls body(index, vector, weight, lane) for the elements of a centre's sums, or of a row of the
  // linear layer, in some vectors of channels.
  template <class Body>
  __attribute__((always_inline)) void over_elements(int64_t vector, int64_t count,
                                                    const Body& body) const {
    for (int64_t v = vector; v < vector + count; ++v) {
      const int64_t channels = channels_from(v, 1);
      int64_t index = v * kLanes * width;
      for (int64_t lane = 0; lane < channels; ++lane) {
        for (int64_t m = 0; m < width; ++m) body(index++, v, m, lane);
      }
    }
  }

  void write_sums(int64_t row) const {
    Element* const out = static_cast<Element*>(args.out) + (args.first + row) * args.outputs;
    over_elements(0, vectors, [&](int64_t index, int64_t vector, int64_t m, int64_t lane) {
      narrow(at(sums, vector, m, row)[lane], out[index]);
    });
  }

  const Element* grad_of(int64_t row) const {
    return static_cast<const Element*>(args.grad) + (args.first + row) * args.outputs;
  }

  void widen_grad(int64_t row) const {
    const Element* const from = grad_of(row);
    T* const to = grad + row * outputs_stride;
    for (int64_t o = 0; o < args.outputs; ++o) to[o] = widen(from[o]);
    for (int64_t o = args.outputs; o < outputs_stride; ++o) to[o] = T(0);
  }

  void split_grad(int64_t row) const {
    const Element* const from = grad_of(row);
    over_elements(0, vectors, [&](int64_t index, int64_t vector, int64_t m, int64_t lane) {
      at(grad_sums, vector, m, row)[lane] = widen(from[index]);
    });
    // Beyond the channels there are no gradients.
    for (int64_t lane = args.channels - (vectors - 1) * kLanes; vectors > 0 && lane < kLanes;
         ++lane) {
      for (int64_t m = 0; m < width; ++m) at(grad_sums, vectors - 1, m, row)[lane] = T(0);
    }
  }

  // ---- the linear layer ------------------------------------------------------------------------

  const Element* linear_row(int64_t output) const {
    return static_cast<const Element*>(args.linear) + output * args.channels * width;
  }
  int64_t output_panels() const { return (args.outputs + kColumns - 1) / kColumns; }
  // The tiles of rows that one of args.parts has.
  int64_t first_tile(int64_t part) const { return tiles * part / args.parts; }

  // Lines of a vector of channels, as the sums lie: [pairs][weight of the pair][lane][kColumns].
  void pack_columns(int64_t vector, int64_t first_output, T* to) const {
    const int64_t lines = 2 * pairs * kLanes;
    const int64_t there = channels_from(vector, 1) * width;
    const int64_t left = args.outputs - first_output;
    if (left < kColumns || there < kLanes * width) {
      for (int64_t i = 0; i < lines * kColumns; ++i) to[i] = T(0);
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t outputs = left - half * kLanes;
      int64_t lane = 0, m = 0;
      for (int64_t i = 0; i < kLanes * width && outputs > 0; i += kLanes) {
        V block[kLanes];
#pragma GCC unroll 16
        for (int o = 0; o < kLanes; ++o) {
          const Element* const from =
              linear_row(first_output + half * kLanes + o) + vector * kLanes * width + i;
          block[o] = V(T(0));
          if (o >= outputs) continue;
          if (i + kLanes <= there) {
            block[o] = load_wide(from);
          } else {
            T values[kLanes] = {};
            for (int64_t j = 0; i + j < there; ++j) values[j] = widen(from[j]);
            block[o] = V::load(values);
          }
        }
        transpose(block);
        for (int j = 0; j < kLanes; ++j) {
          block[j].store(to + (m * kLanes + lane) * kColumns + half * kLanes);
          if (++m == width) m = 0, ++lane;
        }
      }
    }
  }

  void output(int64_t index, const Scratch& scratch) const {
    const int64_t first_output = index / args.parts * kColumns;
    const int64_t part = index % args.parts;
    const int64_t begin = first_tile(part) * kRows, end = first_tile(part + 1) * kRows;
    const int64_t lines = 2 * pairs * kLanes;
    for (int64_t i = 0; i < (end - begin) * kColumns; ++i) scratch.products[i] = T(0);
    const int64_t at_once = kTerms < lines ? 1 : kTerms / lines;
    for (int64_t vector = 0; vector < vectors; vector += at_once) {
      const int64_t stop = vector + at_once < vectors ? vector + at_once : vectors;
      for (int64_t v = vector; v < stop; ++v) {
        pack_columns(v, first_output, scratch.packed + (v - vector) * lines * kColumns);
      }
      for (int64_t row = begin; row < end; row += kRows) {
        Tile tile;
        Product::clear(tile);
        const T* right = scratch.packed;
        for (int64_t v = vector; v < stop; ++v) {
          for (int64_t m = 0; m < width; m += 2) {
            const T* const left = at(sums, v, m, row);
            fetch(left + rows * kColumns, kRows * kColumns);  // what comes next
            // Where the weights are odd in number, the last pair has one.
            Product::add_rows(left, kColumns, right, m + 1 < width ? kColumns : kLanes, tile);
            right += kColumns * kColumns;
          }
        }
        add_tile(tile, false, scratch.products + (row - begin) * kColumns, kColumns);
      }
    }
    const int64_t last = end < args.count ? end : args.count;
    const int64_t left = args.outputs - first_output;
    const Element* const bias = static_cast<const Element*>(args.bias);
    for (int64_t row = begin; row < last; ++row) {
      const T* const from = scratch.products + (row - begin) * kColumns;
      Element* const out =
          static_cast<Element*>(args.out) + (args.first + row) * args.outputs + first_output;
      for (int64_t o = 0; o < left && o < kColumns; ++o) {
        const T with = bias != nullptr ? widen(bias[first_output + o]) : T(0);
        narrow(from[o] + with, out[o]);
      }
    }
  }

  // Adds to what is there, unless it is the first.
  __attribute__((always_inline)) static void add_tile(Tile& tile, bool first, T* to,
                                                      int64_t stride) {
    if (!first) {
      Tile before;
      Product::load(to, stride, before);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        tile[i][0] = before[i][0] + tile[i][0];
        tile[i][1] = before[i][1] + tile[i][1];
      }
    }
    Product::store(tile, to, stride);
  }

  // Outputs that backward_sums packs at once.
  int64_t packed_outputs() const {
    const int64_t fitting = kPacked / (pairs * kColumns);
    return fitting < 1 ? 1 : fitting < kTerms ? fitting : kTerms;
  }

  void backward_sums(int64_t index, const Scratch& scratch) const {
    const int64_t vector = index / args.parts, part = index % args.parts;
    const int64_t begin = first_tile(part) * kRows, end = first_tile(part + 1) * kRows;
    for (int64_t first = 0; first < args.outputs; first += packed_outputs()) {
      const int64_t left = args.outputs - first;
      const int64_t outputs = left < packed_outputs() ? left : packed_outputs();
      pack_rows(vector, first, outputs, scratch.packed);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const T* const right = scratch.packed + pair * outputs * kColumns;
        for (int64_t row = begin; row < end; row += kRows) {
          Tile tile;
          Product::clear(tile);
          Product::add_rows(grad + row * outputs_stride + first, outputs_stride, right, outputs,
                            tile);
          add_tile(tile, first == 0, at(grad_sums, vector, 2 * pair, row), kColumns);
        }
      }
    }
  }

  // Panels of a vector of channels: [pair][output][weight of the pair][lane].
  void pack_rows(int64_t vector, int64_t first, int64_t outputs, T* to) const {
    const int64_t channels = channels_from(vector, 1);
    const bool whole = channels == kLanes;
    for (int64_t i = 0; i < pairs * outputs * kColumns && !(whole && width % 2 == 0); ++i) {
      to[i] = T(0);
    }
    for (int64_t o = 0; o < outputs; ++o) {
      const Element* const from = linear_row(first + o) + vector * kLanes * width;
      const auto line = [&](int64_t m) __attribute__((always_inline)) {
        return to + (m / 2 * outputs + o) * kColumns + m % 2 * kLanes;
      };
      int64_t m = 0;
      for (; whole && m + kLanes <= width; m += kLanes) {
        V block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) block[i] = load_wide(from + i * width + m);
        transpose(block);
        for (int64_t i = 0; i < kLanes; ++i) block[i].store(line(m + i));
      }
      for (; m < width; ++m) {
        T* const values = line(m);
        for (int64_t lane = 0; lane < channels; ++lane)
          values[lane] = widen(from[lane * width + m]);
      }
    }
  }

  void backward_linear(int64_t panel, const Scratch&) const {
    const int64_t vector = panel / pairs, weight = panel % pairs * 2;
    T* const to = static_cast<T*>(args.linear_sums) + panel * outputs_stride * kColumns;
    // So that its part of the panel stays in the fastest cache.
    constexpr int64_t kCentres = 128;
    for (int64_t first = 0; first < args.count; first += kCentres) {
      const int64_t left = args.count - first;
      for (int64_t o = 0; o < outputs_stride; o += kRows) {
        Tile tile;
        Product::clear(tile);
        Product::add_columns(grad + first * outputs_stride + o, outputs_stride,
                             at(sums, vector, weight, first), left < kCentres ? left : kCentres,
                             tile);
        add_tile(tile, false, to + o * kColumns, kColumns);
      }
    }
  }

  void backward_bias(int64_t begin, int64_t end) const {
    for (int64_t row = 0; row < args.count; ++row) {
      const T* const from = grad + row * outputs_stride;
      for (int64_t o = begin; o < end; ++o) args.bias_sums[o] += from[o];
    }
  }

  void write_linear(int64_t output, const Scratch&) const {
    const T* const from = static_cast<const T*>(args.linear_sums);
    Element* const to = static_cast<Element*>(args.grad_linear) + output * args.channels * width;
    over_elements(0, vectors, [&](int64_t index, int64_t vector, int64_t m, int64_t lane) {
      const int64_t panel = vector * pairs + m / 2;
      narrow(from[(panel * outputs_stride + output) * kColumns + m % 2 * kLanes + lane], to[index]);
    });
  }

  // ---- gradients of the sums of features -------------------------------------------------------

  // A centre's gradients of some vectors of channels: [weight][vector][lane].
  void copy_grad(int64_t vector, int64_t count, int64_t row, T* to) const {
    constexpr int64_t kRowsAhead = 4;
    for (int64_t m = 0; m < width; ++m) {
      for (int64_t v = 0; v < count; ++v, to += kLanes) {
        const T* const from = at(grad_sums, vector + v, m, row);
        __builtin_prefetch(from + kRowsAhead * kColumns);
        V::load(from).store(to);
      }
    }
  }

  int64_t channel_pairs() const { return (vectors + 1) / 2; }

  // One thread has these channels of a cloud, so that the gradients of a row are added in the order
  // of its edges.
  void backward_features(int64_t index, const Scratch& scratch) const {
    const int64_t cloud = args.first / args.centres + index / channel_pairs();
    const int64_t vector = index % channel_pairs() * 2;
    int64_t begin = cloud * args.centres - args.first;
    int64_t end = begin + args.centres;
    if (begin < 0) begin = 0;
    if (end > args.count) end = args.count;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t unit = row / args.unit;
      const Edges<T> edges = net.edges_of(unit);
      const int64_t* const begins = edges.begins + row - net.begin_of(unit);
      if (vector + 1 < vectors) {
        add_to_features<2>(edges, begins[0], begins[1], weights_of(unit), vector, row, scratch);
      } else {
        add_to_features<1>(edges, begins[0], begins[1], weights_of(unit), vector, row, scratch);
      }
    }
  }

  template <int kVectors>
  void add_to_features(const Edges<T>& edges, int64_t begin, int64_t end, const T* factors,
                       int64_t vector, int64_t row, const Scratch& scratch) const {
    copy_grad(vector, kVectors, row, scratch.channels);
    const int64_t channels = channels_from(vector, kVectors);
    const bool whole = !args.grouped && channels == kVectors * kLanes;
    const auto place = [&](int64_t edge) __attribute__((always_inline)) {
      return feature_row(edges, edge) * args.channels + vector * kLanes;
    };
    // The rows of the next centre.
    for (int64_t e = end; whole && e < 2 * end - begin && e < edges.count; ++e) {
      fetch(static_cast<const T*>(args.row_sums) + place(e), channels);
    }
    in_groups(end - begin, [&](auto group, int64_t first) __attribute__((always_inline)) {
      constexpr int kGroup = decltype(group)::value;
      V tile[kGroup][kVectors];
      for (int i = 0; i < kGroup; ++i) {
        for (int v = 0; v < kVectors; ++v) tile[i][v] = V(T(0));
      }
      add_products<T>(factors + begin + first, 1, net.stride, scratch.channels, kVectors * kLanes,
                      width, tile);
      for (int i = 0; i < kGroup; ++i) {
        const int64_t at = place(begin + first + i);
        if (whole) {
          T* const to = static_cast<T*>(args.row_sums) + at;
          for (int v = 0; v < kVectors; ++v) {
            (V::load(to + v * kLanes) + tile[i][v]).store(to + v * kLanes);
          }
          continue;
        }
        T values[kVectors * kLanes];
        for (int v = 0; v < kVectors; ++v) tile[i][v].store(values + v * kLanes);
        for (int64_t c = 0; c < channels; ++c) {
          if (args.grouped) {
            narrow(values[c], static_cast<Element*>(args.grad_features)[at + c]);
          } else {
            static_cast<T*>(args.row_sums)[at + c] += values[c];
          }
        }
      }
    });
  }

  void write_features(int64_t row, const Scratch&) const {
    const T* const from = static_cast<const T*>(args.row_sums) + row * args.channels;
    Element* const to = static_cast<Element*>(args.grad_features) + row * args.channels;
    for (int64_t c = 0; c < args.channels; ++c) narrow(from[c], to[c]);
  }

  // ---- gradients of the weights ----------------------------------------------------------------

  void backward_edges(int64_t unit, const Scratch& scratch) const {
    const Edges<T> edges = net.edges_of(unit);
    const int64_t stride = net.stride;
    for (int64_t i = 0; i < width * stride; ++i) scratch.weights_grad[i] = T(0);
    for (int64_t row = net.begin_of(unit); row < net.end_of(unit); ++row) {
      const int64_t* const begins = edges.begins + row - net.begin_of(unit);
      add_weights_grad(edges, begins[0], begins[1], row, scratch);
    }
    double* const sums = args.net_sums + unit * net.layout.size;
    for (int64_t i = 0; i < net.layout.size; ++i) sums[i] = 0;
    const T* const scale = static_cast<const T*>(args.scale);
    net.over_blocks(edges, [&](int64_t lane, int count) {
      net.forward(edges, lane, count, scratch.values);
      for (int v = 0; v < count; ++v) {
        const V* const values = scratch.values + v * net.depth + net.weights();
        V* const to = scratch.grad + v * net.widest;
        const int64_t at = lane + v * kLanes;
        for (int64_t m = 0; m < width; ++m) to[m] = V::load(scratch.weights_grad + m * stride + at);
        if (scale == nullptr) continue;
        V by_scale(T(0));
        T factors[kLanes], slopes[kLanes];
        for (int64_t m = 0; m < width; ++m)
          by_scale = fused_multiply_add(values[m], to[m], by_scale);
        by_scale.store(slopes);
        for (int i = 0; i < kLanes; ++i) factors[i] = scale[edges.edge[at + i]];
        for (int i = 0; i < kLanes && at + i < edges.count; ++i) {
          static_cast<T*>(args.grad_scale)[edges.edge[at + i]] = slopes[i];
        }
        for (int64_t m = 0; m < width; ++m) to[m] = to[m] * V::load(factors);
      }
      net.backward(edges, lane, count, scratch.values, scratch.grad, scratch.other, sums);
    });
    if (args.wants_coordinates) net.write_centres(unit, edges);
  }

  // The gradients by the weights before the scale; those of lanes without an edge stay 0.
  void add_weights_grad(const Edges<T>& edges, int64_t begin, int64_t end, int64_t row,
                        const Scratch& scratch) const {
    over_channels([&](int64_t first, int count) {
      copy_grad(first, count, row, scratch.channels);
      for (int64_t from = begin; from < end; from += kGatherEdges) {
        const int64_t to = end - from < kGatherEdges ? end : from + kGatherEdges;
        gather(edges, from, to, first, count, scratch.gathered);
        dot_products<T>(
            static_cast<int>(width), [&](int m) { return scratch.channels + m * count * kLanes; },
            kLanes, static_cast<int>(to - from),
            [&](int e) { return scratch.gathered + e * kGatherStride; }, kLanes, count,
            [&](int m, int e, T product) {
              scratch.weights_grad[m * net.stride + from + e] += product;
            });
      }
    });
  }
};

// Calls body(pointconv, scratch).
template <class Body>
FASTZOO_INLINE void with_pointconv(const PointConvArgs& args, void* scratch, const Body& body) {
  with_element(args.dtype, [&](auto element) {
    const PointConv<decltype(element)> pointconv(args);
    Arena arena(scratch);
    body(pointconv, pointconv.take_scratch(arena));
  });
}

// The moments of the net's outputs.
template <class T>
struct Moments {
  using V = Vec<T>;
  using Wide = Vec<double>;

  const MomentsArgs& args;
  Arena arena{args.memory};
  const EdgeNet<T> net{args, arena};
  const int64_t width = net.layout.width;
  const int64_t lanes = kNetVectors * V::size;

  struct Scratch {
    V *values, *grad, *other;
    double* wide;  // [width][lanes]
  };

  Scratch take_scratch(Arena& arena) const {
    Scratch scratch;
    scratch.values = net.take_values(arena);
    scratch.grad = net.take_grad(arena);
    scratch.other = net.take_grad(arena);
    scratch.wide = arena.take<double>(width * lanes);
    return scratch;
  }

  explicit Moments(const MomentsArgs& args) : args(args) {}

  void sum(int64_t unit, const Scratch& scratch) const {
    const Edges<T> edges = net.find_edges(unit);
    double* const means = args.sums + unit * (width + width * width);
    double* const products = means + width;
    for (int64_t i = 0; i < width + width * width; ++i) means[i] = 0;
    net.over_blocks(edges, [&](int64_t lane, int count) {
      net.forward(edges, lane, count, scratch.values);
      const int64_t left = edges.count - lane;
      for (int64_t m = 0; m < width; ++m) {
        double* const to = scratch.wide + m * lanes;
        for (int v = 0; v < count; ++v) {
          const V values = scratch.values[v * net.depth + net.weights() + m];
          for (int i = 0; i < V::size; ++i) {
            const bool there = v * V::size + i < left;
            to[v * V::size + i] = there ? static_cast<double>(values[i]) : 0;
          }
        }
        Wide total(0.0);
        for (int64_t i = 0; i < count * V::size; i += Wide::size)
          total = total + Wide::load(to + i);
        means[m] += lane_sum(total);
      }
      const auto row = [&](int m) { return scratch.wide + m * lanes; };
      dot_products<double>(static_cast<int>(width), row, Wide::size, static_cast<int>(width), row,
                           Wide::size, count * V::size / Wide::size,
                           [&](int i, int j, double sum) { products[i * width + j] += sum; });
    });
  }

  void backward(int64_t unit, const Scratch& scratch) const {
    const T* const mean = static_cast<const T*>(args.mean);
    const T* const grad_mean = static_cast<const T*>(args.grad_mean);
    const T* const slope = static_cast<const T*>(args.slope);
    const V share(static_cast<T>(1 / args.edges));
    const Edges<T> edges = net.find_edges(unit);
    double* const sums = args.net_sums + unit * net.layout.size;
    for (int64_t i = 0; i < net.layout.size; ++i) sums[i] = 0;
    net.over_blocks(edges, [&](int64_t lane, int count) {
      net.forward(edges, lane, count, scratch.values);
      for (int v = 0; v < count; ++v) {
        const V* const values = scratch.values + v * net.depth + net.weights();
        V* const to = scratch.grad + v * net.widest;
        const int64_t left = edges.count - lane - v * V::size;
        T there[V::size];
        for (int i = 0; i < V::size; ++i) there[i] = i < left ? T(1) : T(0);
        for (int64_t i = 0; i < width; ++i) {
          V grad(grad_mean[i]);
          for (int64_t j = 0; j < width; ++j) {
            grad = fused_multiply_add(V(slope[i * width + j]), values[j] - V(mean[j]), grad);
          }
          to[i] = grad * share * V::load(there);
        }
      }
      net.backward(edges, lane, count, scratch.values, scratch.grad, scratch.other, sums);
    });
    if (args.wants_coordinates) net.write_centres(unit, edges);
  }
};

// Calls body(T{}) with the compute type.
template <class Body>
FASTZOO_INLINE void with_compute(Dtype dtype, const Body& body) {
  if (dtype == Dtype::float64) {
    body(double{});
  } else {
    body(float{});
  }
}

// Calls body(moments, scratch).
template <class Body>
FASTZOO_INLINE void with_moments(const MomentsArgs& args, void* scratch, const Body& body) {
  with_compute(args.dtype, [&](auto compute) {
    const Moments<decltype(compute)> moments(args);
    Arena arena(scratch);
    body(moments, moments.take_scratch(arena));
  });
}

// Centres that are taken at once, where each has so many bytes.
int64_t centres_at_once(const EdgeArgs& args, int64_t bytes) {
  constexpr int64_t kBytes = int64_t{4} << 20;
  // A whole number of units and of tiles of rows.
  constexpr int64_t kMultiple = 3 * kUnitCentres;
  const int64_t fitting = kBytes / (bytes + 1);
  const int64_t multiple = fitting < kMultiple ? args.unit : kMultiple;
  const int64_t count = fitting < multiple ? multiple : fitting / multiple * multiple;
  const int64_t all = args.clouds * args.centres;
  return count < all ? count : all;
}

}  // namespace

void pointconv_plan(PointConvArgs& args, PointConvPlan& plan) {
  with_element(args.dtype, [&](auto element) {
    using Kernel = PointConv<decltype(element)>;
    using T = typename Kernel::T;
    args.unit = unit_centres(args.neighbours_each);
    const int64_t matrices = args.grad == nullptr ? 1 : 2;
    const int64_t width = args.layout.width;
    const int64_t values = matrices * round_up(args.channels, Kernel::kLanes) * round_up(width, 2) +
                           args.neighbours_each * (width + args.layout.dims + 4);
    args.first = 0;
    args.count = centres_at_once(args, values * static_cast<int64_t>(sizeof(T)));
    const Kernel kernel(args);
    Arena scratch;
    kernel.take_scratch(scratch);
    plan.bytes = kernel.arena.bytes();
    plan.scratch_bytes = scratch.bytes();
    plan.output_panels = kernel.output_panels();
    plan.channel_vectors = kernel.vectors;
    plan.channel_pairs = kernel.channel_pairs();
    plan.linear_panels = kernel.vectors * kernel.pairs;
    plan.linear_sums = plan.linear_panels * kernel.outputs_stride * Kernel::kColumns;
  });
}

#define FASTZOO_DEFINE_POINTCONV(name, method)                                          \
  void name(const PointConvArgs& args, int64_t begin, int64_t end, void* scratch) {     \
    with_pointconv(args, scratch, [&](const auto& pointconv, const auto& taken) {       \
      for (int64_t index = begin; index < end; ++index) pointconv.method(index, taken); \
    });                                                                                 \
  }

FASTZOO_DEFINE_POINTCONV(pointconv_sum, sum)
FASTZOO_DEFINE_POINTCONV(pointconv_output, output)
FASTZOO_DEFINE_POINTCONV(pointconv_backward_sums, backward_sums)
FASTZOO_DEFINE_POINTCONV(pointconv_backward_linear, backward_linear)
FASTZOO_DEFINE_POINTCONV(pointconv_backward_features, backward_features)
FASTZOO_DEFINE_POINTCONV(pointconv_backward_edges, backward_edges)
FASTZOO_DEFINE_POINTCONV(pointconv_write_linear, write_linear)
FASTZOO_DEFINE_POINTCONV(pointconv_write_features, write_features)

void pointconv_backward_bias(const PointConvArgs& args, int64_t begin, int64_t end, void* scratch) {
  with_pointconv(args, scratch,
                 [&](const auto& pointconv, const auto&) { pointconv.backward_bias(begin, end); });
}

void pointconv_backward_points(const EdgeArgs& args, int64_t begin, int64_t end) {
  with_compute(args.dtype, [&](auto compute) {
    Arena arena(args.memory);
    const EdgeNet<decltype(compute)> net(args, arena);
    for (int64_t d = begin; d < end; ++d) net.add_points(d);
  });
}

void pointconv_moments_plan(MomentsArgs& args, PointConvPlan& plan) {
  with_compute(args.dtype, [&](auto compute) {
    using T = decltype(compute);
    args.unit = unit_centres(args.neighbours_each);
    args.first = 0;
    const int64_t width = args.layout.width;
    const int64_t sums = args.grad_mean == nullptr ? width + width * width : args.layout.size;
    args.count = centres_at_once(
        args, args.neighbours_each * (16 + args.layout.dims * static_cast<int64_t>(sizeof(T))) +
                  sums * static_cast<int64_t>(sizeof(double)) / args.unit);
    const Moments<T> moments(args);
    Arena scratch;
    moments.take_scratch(scratch);
    plan.bytes = moments.arena.bytes();
    plan.scratch_bytes = scratch.bytes();
  });
}

void pointconv_moments_sum(const MomentsArgs& args, int64_t begin, int64_t end, void* scratch) {
  with_moments(args, scratch, [&](const auto& moments, const auto& taken) {
    for (int64_t unit = begin; unit < end; ++unit) moments.sum(unit, taken);
  });
}

void pointconv_moments_backward(const MomentsArgs& args, int64_t begin, int64_t end,
                                void* scratch) {
  with_moments(args, scratch, [&](const auto& moments, const auto& taken) {
    for (int64_t unit = begin; unit < end; ++unit) moments.backward(unit, taken);
  });
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
