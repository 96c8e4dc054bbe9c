// PointConv: of each centre, e = the sum over its neighbours of the products of their features and
// the weights that a small net makes of their relative coordinates, and a linear map of e. Neither
// the gathered features nor, in 16 bits, e is stored. Centres come in chunks, so that what is
// stored of their edges stays small.
//   pointconv_weights  an edge's weights: the net as tiles of products, times the edge's scale
//   float16, bfloat16, on matrix units:
//     pointconv_fused  a tile of centres: chunks of e in shared memory, each at once multiplied
//                      with its part of the linear map
//     pointconv_sums   e itself, where there is no linear map
//   float32, float64, with fused multiply-adds:
//     pointconv_plain_sums    e
//     pointconv_plain_linear  its products with the linear map
#include "../math/pointconv.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../torch_abi.h"
#include "runtime/rows.h"
#include "runtime/tile_product.h"

namespace fastzoo::cuda {
namespace {

using math::NetLayout;
using math::round_up;

constexpr int64_t kChunkCentres = kManyBlocks * 64;  // a large tile of them for each unit

// ---- weights ------------------------------------------------------------------------------------

constexpr int kNetThreads = 128;
constexpr int kNetEdges = 256;  // of a block, at most
constexpr int kNetPiece = 8;    // outputs that a thread has at once, of two edges
template <class C>
constexpr int kNetValues = 16384 / sizeof(C);

// Of a chunk of centres the weights [centres, m, k], and each edge's row of the chunk's features
// [centres, k], or -1 for none. Both are padded, with zeros and with -1, to what the sums read at
// once.
template <class T>
struct Weights {
  int k, m;
  T* values;
  int* rows;
};

// Those of a chunk of centres.
template <class C>
struct Edges {
  int64_t first, count;  // centres
  const C* xyz;
  const C* centres;
  const int64_t* neighbours;
  const C* scale;  // or null
  int64_t points;  // of a cloud
  int64_t centres_each;
  int64_t k;
  bool grouped;  // an edge's features are those of the edge, not of the point
};

template <class C>
struct NetArrays {
  SharedArray<C, kNetValues<C>> values[2];  // [width, edges]
  SharedArray<C, math::kNetWidth * math::kNetWidth> weight;
  SharedArray<C, math::kNetWidth> bias;
  SharedArray<int64_t, kNetEdges> points;  // -1 for none
  SharedArray<int64_t, kNetEdges> centres;
  SharedArray<int64_t, kNetEdges> places;
  SharedArray<C, kNetEdges> scales;
};

// The logarithm of how many edges a block has of a net whose layers are up to so wide: a power of
// two, so that no division tells them apart.
template <class C>
int net_log_edges(int width) {
  int log = 0;
  while (2 << log <= kNetEdges && width << (log + 1) <= kNetValues<C>) ++log;
  return log;
}

// A block has 2^log_edges of the chunk's padded edges.
template <class C, class T>
__global__ void __launch_bounds__(kNetThreads, sizeof(C) == 4 ? 4 : 2)
    pointconv_weights(Edges<C> in, NetLayout layout, const C* net, int log_edges, Weights<T> out) {
  auto& arrays = large_shared<NetArrays<C>>();
  const int thread = threadIdx.x;
  const int dims = layout.dims;
  const int edges = 1 << log_edges;
  const int64_t first_cloud = in.first / in.centres_each;

  for (int edge = thread; edge < edges; edge += kNetThreads) {
    const int64_t flat = int64_t{blockIdx.x} * edges + edge;
    const int64_t own = flat / out.k;
    const int k = static_cast<int>(flat - own * out.k);
    const int64_t centre = in.first + own;
    int64_t row = -1;
    if (own < in.count && k < in.k) {
      row = in.neighbours[centre * in.k + k];
      if (row >= in.points) row = -1;
    }
    const bool exists = row >= 0;
    const int64_t cloud = exists ? centre / in.centres_each : 0;
    const int64_t listed = in.grouped ? own * in.k + k : (cloud - first_cloud) * in.points + row;
    arrays.points[edge] = exists ? (cloud * in.points + row) * dims : -1;
    arrays.centres[edge] = centre * dims;
    arrays.places[edge] = own < in.count ? own * out.m * out.k + k : -1;
    arrays.scales[edge] = exists && in.scale != nullptr ? in.scale[centre * in.k + k] : C{1};
    if (own < in.count) out.rows[flat] = exists ? static_cast<int>(listed) : -1;
  }
  sync_block();
  const auto coordinate = [&](int edge, int d) {
    const int64_t point = arrays.points[edge];
    return point < 0 ? C{0} : in.xyz[point + d] - in.centres[arrays.centres[edge] + d];
  };

  int current = 0;
  for (int l = 0; l < layout.layers; ++l) {
    const math::NetLayer layer = layout.layer[l];
    const int outputs = static_cast<int>(round_up(layer.out, kNetPiece));
    auto& from = arrays.values[current];
    auto& to = arrays.values[current ^ 1];
    // The first layer may have any number of inputs.
    for (int begin = 0; begin < layer.in; begin += math::kNetWidth) {
      const int left = layer.in - begin;
      const int inputs = left < math::kNetWidth ? left : math::kNetWidth;
      for (int i = thread; i < outputs * inputs; i += kNetThreads) {
        const int o = i / inputs, d = i % inputs;
        arrays.weight[d * outputs + o] =
            o < layer.out ? net[layer.weight + o * layer.in + begin + d] : C{0};
      }
      if (thread < outputs) {
        arrays.bias[thread] = thread < layer.out ? net[layer.bias + thread] : C{0};
      }
      if (l == 0) {
        for (int i = thread; i < inputs * edges; i += kNetThreads) {
          from[i] = coordinate(i & (edges - 1), begin + (i >> log_edges));
        }
      }
      sync_block();
      for (int item = thread; item < edges / 2 * (outputs / kNetPiece); item += kNetThreads) {
        const int edge = item * 2 & (edges - 1), o = (item * 2 >> log_edges) * kNetPiece;
        Vector<C, 2> sums[kNetPiece];
#pragma unroll
        for (int j = 0; j < kNetPiece; ++j) {
          const C bias = arrays.bias[o + j];
          sums[j] =
              begin > 0 ? to.template load<2>((o + j) * edges + edge) : Vector<C, 2>{bias, bias};
        }
#pragma unroll 4
        for (int d = 0; d < inputs; ++d) {
          const auto value = from.template load<2>(d * edges + edge);
          const auto weight = arrays.weight.template load<kNetPiece>(d * outputs + o);
#pragma unroll
          for (int j = 0; j < kNetPiece; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              sums[j][e] = fused_multiply_add(weight[j], value[e], sums[j][e]);
            }
          }
        }
        const bool last = begin + inputs == layer.in;
#pragma unroll
        for (int j = 0; j < kNetPiece; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (last) sums[j][e] = math::maximum(sums[j][e], C{0});
          }
          to.store((o + j) * edges + edge, sums[j]);
        }
      }
      sync_block();
    }
    current ^= 1;
  }

  for (int i = thread; i < out.m << log_edges; i += kNetThreads) {
    const int edge = i & (edges - 1), m = i >> log_edges;
    const int64_t place = arrays.places[edge];
    if (place < 0) continue;
    C value = 0;
    if (m < layout.width && arrays.points[edge] >= 0) {
      value = (layout.layers == 0 ? coordinate(edge, m) : arrays.values[current][i]) *
              arrays.scales[edge];
    }
    out.values[place + int64_t{m} * out.k] = static_cast<T>(value);
  }
}

// ---- sums ---------------------------------------------------------------------------------------

// What a chunk's sums and the linear map are made of.
template <class T>
struct PointConv {
  int64_t count;  // centres
  int64_t channels, m;
  const T* features;  // [rows, pitch]
  int pitch;
  Weights<T> weights;
  const T* linear;  // [outputs, channels, m]; in 16 bits [outputs, pitch, weights.m]
  int64_t outputs;
  const T* bias;  // or null
  T* out;         // [centres, outputs], or without linear [centres, channels, m]
};

// [rows, channels, m] with zeros to the sizes of `out`, which the matrix units read.
template <class T>
struct Padded {
  int64_t channels, m;
  T* data;
};

constexpr int kPadThreads = 256;

template <class T>
__global__ void __launch_bounds__(kPadThreads)
    pointconv_pad(const T* in, int64_t rows, int64_t channels, int64_t m, Padded<T> out) {
  const int64_t i = int64_t{blockIdx.x} * kPadThreads + threadIdx.x;
  const int64_t row = i / out.m, at_m = i - row * out.m;
  const int64_t outer = row / out.channels, at_channel = row - outer * out.channels;
  if (outer >= rows) return;
  const bool exists = at_channel < channels && at_m < m;
  out.data[i] = exists ? in[(outer * channels + at_channel) * m + at_m] : T(0.f);
}

constexpr int kUnitK = 16;  // neighbours of a matrix product
constexpr int kUnitM = 16;  // weights that are in a chunk at once
constexpr int kChunkChannels = 32;
constexpr int kDepth = kChunkChannels * kUnitM;
constexpr int kChannelPiece = 8;  // what channels are padded to
constexpr int kWarpCentres = 8;
constexpr int kWarpRows = 32;  // and as many columns, of the tile of outputs
constexpr int kTileOutputs = 128;
constexpr int kSlabDepth = 32;
constexpr int kSlabChannels = kSlabDepth / kUnitM;
constexpr int kSumPitch = kDepth + 8;  // eight rows of a matrix meet all banks
constexpr int kSlabPitch = kSlabDepth + 8;

FASTZOO_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
FASTZOO_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

// n elements of 16 bits, as the matrix units take them: two to a register.
template <int n, class T>
FASTZOO_DEVICE Vector<uint32_t, n / 2> load_pairs(const T* address) {
  return load_vector<n / 2>(reinterpret_cast<const uint32_t*>(address));
}

template <class T>
FASTZOO_DEVICE Vector<uint16_t, 2> bits_of(float a, float b) {
  return {T(a).x, T(b).x};
}

// By a warp: of one centre, the sums of kChunkChannels channels with kUnitM weights, given to
// take(channel, m, sum, next) as those of m and m + 1, from the beginning of the chunk.
template <class T, MmaType type, class Take>
FASTZOO_DEVICE void sum_chunk(const PointConv<T>& conv, int64_t own, int64_t channel, int m,
                              const Take& take) {
  // A lane has 4 neighbouring channels of 4 neighbouring edges. Which channel a row of the product
  // is, and which edge a step of its depth, is ours to choose; so lanes gather as they multiply.
  constexpr int kLaneChannels = 4;
  constexpr int kLaneEdges = 4;
  const int lane = threadIdx.x % kWarpSize;
  const int group = lane / 4, turn = lane % 4;
  const T* features = conv.features + channel + group * kLaneChannels;
  const bool exists = channel + group * kLaneChannels < conv.pitch;
  const int k_padded = conv.weights.k;
  const int* rows = conv.weights.rows + own * k_padded + turn * kLaneEdges;
  const T* weights =
      conv.weights.values + (own * conv.weights.m + m + group) * k_padded + turn * kLaneEdges;

  float sums[2][2][4] = {};
#pragma unroll 2
  for (int k = 0; k < k_padded; k += kUnitK) {
    const auto edge_rows = load_vector<kLaneEdges>(rows + k);
    Vector<uint32_t, 2> gathered[kLaneEdges];
#pragma unroll
    for (int e = 0; e < kLaneEdges; ++e) {
      gathered[e] = {};
      if (exists && edge_rows[e] >= 0) {
        gathered[e] = load_pairs<kLaneChannels>(features + int64_t{edge_rows[e]} * conv.pitch);
      }
    }
    Vector<uint32_t, 2> b[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      b[half] = load_pairs<kLaneEdges>(weights + int64_t{half} * 8 * k_padded + k);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const Vector<uint32_t, 4> a{low_halves(gathered[0][pair], gathered[1][pair]),
                                  high_halves(gathered[0][pair], gathered[1][pair]),
                                  low_halves(gathered[2][pair], gathered[3][pair]),
                                  high_halves(gathered[2][pair], gathered[3][pair])};
#pragma unroll
      for (int half = 0; half < 2; ++half) mma<type>(sums[pair][half], a, b[half][0], b[half][1]);
    }
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* sum = sums[pair][half];
      const int first = group * kLaneChannels + pair * 2;
      take(first, half * 8 + turn * 2, sum[0], sum[1]);
      take(first + 1, half * 8 + turn * 2, sum[2], sum[3]);
    }
  }
}

template <class T>
constexpr MmaType kMmaType = std::is_same_v<T, Half> ? MmaType::float16 : MmaType::bfloat16;

constexpr int kSumsThreads = 128;

// A warp a centre.
template <class T>
__global__ void __launch_bounds__(kSumsThreads) pointconv_sums(PointConv<T> conv) {
  const int64_t own = int64_t{blockIdx.x} * (kSumsThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (own >= conv.count) return;
  T* out = conv.out + own * conv.channels * conv.m;
  for (int m = 0; m < conv.weights.m; m += kUnitM) {
    for (int64_t channel = 0; channel < conv.channels; channel += kChunkChannels) {
      sum_chunk<T, kMmaType<T>>(conv, own, channel, m,
                                [&](int channel_in, int m_in, float sum, float next) {
                                  const int64_t c = channel + channel_in;
                                  const int64_t at = m + m_in;
                                  if (c >= conv.channels) return;
                                  if (at < conv.m) out[c * conv.m + at] = T(sum);
                                  if (at + 1 < conv.m) out[c * conv.m + at + 1] = T(next);
                                });
    }
  }
}

template <int centres>
constexpr int kFusedThreads = centres / kWarpCentres * kWarpSize;

template <int centres>
struct FusedArrays {
  SharedArray<uint16_t, centres * kSumPitch> sums;  // [centres, depth], in units as sum_unit says
  SharedArray<uint16_t, kTileOutputs * kSlabPitch> linear[2];
};

// Where the unit of 8 elements is that begins a row's depth `8 unit`: apart for the channels that
// are stored together.
FASTZOO_DEVICE int sum_unit(int unit) { return unit ^ (unit >> 3 & 7); }

// The part of the linear map that a slab has, as threads fetch it.
template <class T, int threads>
class LinearFetch {
  static constexpr int kPiece = 8;
  static constexpr int kRowPieces = kSlabDepth / kPiece;
  static constexpr int kParts = kTileOutputs * kRowPieces / threads;

 public:
  // From one output and channel on, and of its weights from m on.
  FASTZOO_DEVICE void fetch(const PointConv<T>& conv, int64_t output, int64_t channel, int m) {
    const int64_t step = int64_t{conv.pitch} * conv.weights.m;
    const T* from = conv.linear + (output + row(0)) * step +
                    (channel + depth() / kUnitM) * conv.weights.m + m + depth() % kUnitM;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      pieces_[i] = {};
      if (output + row(i) < conv.outputs) {
        pieces_[i] = load_pairs<kPiece>(from + i * (threads / kRowPieces) * step);
      }
    }
  }
  FASTZOO_DEVICE void put(SharedArray<uint16_t, kTileOutputs * kSlabPitch>& slab) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      slab.store(row(i) * kSlabPitch + depth(),
                 math::bits_as<Vector<uint16_t, kPiece>>(pieces_[i]));
    }
  }

 private:
  FASTZOO_DEVICE static int row(int i) {
    return static_cast<int>(threadIdx.x) / kRowPieces + i * (threads / kRowPieces);
  }
  FASTZOO_DEVICE static int depth() { return threadIdx.x % kRowPieces * kPiece; }

  Vector<uint32_t, kPiece / 2> pieces_[kParts];
};

// A block has `centres` centres, and the kTileOutputs outputs from blockIdx.y on.
template <class T, int centres>
__global__ void __launch_bounds__(kFusedThreads<centres>, centres >= 128 ? 1 : 3)
    pointconv_fused(PointConv<T> conv) {
  constexpr int kThreads = kFusedThreads<centres>;
  constexpr int kColumnWarps = kTileOutputs / kWarpRows;
  auto& arrays = large_shared<FusedArrays<centres>>();
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = int64_t{blockIdx.x} * centres;
  const int64_t first_output = int64_t{blockIdx.y} * kTileOutputs;
  const int first_row = warp / kColumnWarps * kWarpRows;
  const int first_column = warp % kColumnWarps * kWarpRows;
  LinearFetch<T, kThreads> fetch;
  int current = 0;
  float products[2][4][4] = {};
  for (int m = 0; m < conv.weights.m; m += kUnitM) {
    for (int64_t channel = 0; channel < conv.pitch; channel += kChunkChannels) {
      fetch.fetch(conv, first_output, channel, m);
#pragma unroll 1
      for (int i = 0; i < kWarpCentres; ++i) {
        const int centre = warp * kWarpCentres + i;
        if (first + centre >= conv.count) break;
        sum_chunk<T, kMmaType<T>>(
            conv, first + centre, channel, m, [&](int channel_in, int m_in, float sum, float next) {
              const int unit = sum_unit(channel_in * (kUnitM / 8) + m_in / 8);
              arrays.sums.store(centre * kSumPitch + unit * 8 + m_in % 8, bits_of<T>(sum, next));
            });
      }
      const int left = tile_left(conv.pitch, channel, kChunkChannels);
      for (int slab = 0; slab * kSlabChannels < left; ++slab) {
        // A thread that is a slab ahead of others fills the one that they no longer read.
        fetch.put(arrays.linear[current]);
        sync_block();
        const int next = (slab + 1) * kSlabChannels;
        if (next < left) fetch.fetch(conv, first_output, channel + next, m);
#pragma unroll
        for (int d = 0; d < kSlabDepth; d += 16) {
          const int unit = sum_unit((slab * kSlabDepth + d) / 8 + lane / 16);
          Vector<uint32_t, 4> a[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            a[i] =
                arrays.sums.load_matrices((first_row + i * 16 + lane % 16) * kSumPitch + unit * 8);
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int column = first_column + j * 16 + lane / 16 * 8 + lane % 8;
            const auto b =
                arrays.linear[current].load_matrices(column * kSlabPitch + d + lane / 8 % 2 * 8);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              mma<kMmaType<T>>(products[i][j * 2], a[i], b[0], b[1]);
              mma<kMmaType<T>>(products[i][j * 2 + 1], a[i], b[2], b[3]);
            }
          }
        }
        current ^= 1;
      }
      sync_block();  // before the next chunk's sums
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t own = first + first_row + i * 16 + lane / 4 + e / 2 * 8;
        const int64_t output = first_output + first_column + j * 8 + lane % 4 * 2 + e % 2;
        if (own >= conv.count || output >= conv.outputs) continue;
        const float bias = conv.bias == nullptr ? 0.f : static_cast<float>(conv.bias[output]);
        conv.out[own * conv.outputs + output] = T(products[i][j][e] + bias);
      }
    }
  }
}

// ---- sums and the linear map with fused multiply-adds
// ---------------------------------------------

constexpr int kPlainEdges = 32;  // in shared memory at a time
constexpr int kPlainPiece = 8;   // weights that a thread has at once

// A block a centre; a thread a channel and a piece of the weights.
template <class C>
__global__ void __launch_bounds__(kSumsThreads) pointconv_plain_sums(PointConv<C> conv) {
  __shared__ SharedArray<C, kPlainEdges * math::kNetWidth> weights;  // [k, m]
  __shared__ SharedArray<int, kPlainEdges> rows;
  const int thread = threadIdx.x;
  const int64_t own = blockIdx.x;
  const int k_padded = conv.weights.k, m_padded = conv.weights.m;
  const int pieces = m_padded / kPlainPiece;
  const int64_t items = conv.channels * pieces;
  C* out = conv.out + own * conv.channels * conv.m;
  for (int64_t first = 0; first < items; first += kSumsThreads) {
    const int64_t item = first + thread;
    const int64_t channel = item / pieces;
    const int m = static_cast<int>(item - channel * pieces) * kPlainPiece;
    C sums[kPlainPiece] = {};
    for (int k = 0; k < k_padded; k += kPlainEdges) {
      const int edges = k_padded - k < kPlainEdges ? k_padded - k : kPlainEdges;
      if (first == 0 || k_padded > kPlainEdges) {
        if (first > 0 || k > 0) sync_block();
        if (thread < edges) rows[thread] = conv.weights.rows[own * k_padded + k + thread];
        for (int i = thread; i < edges * m_padded; i += kSumsThreads) {
          const int edge = i % edges, at = i / edges;
          weights[edge * m_padded + at] =
              conv.weights.values[(own * m_padded + at) * k_padded + k + edge];
        }
        sync_block();
      }
      if (item >= items) continue;
      for (int edge = 0; edge < edges; ++edge) {
        if (rows[edge] < 0) continue;
        const C feature = conv.features[int64_t{rows[edge]} * conv.pitch + channel];
        const auto weight = weights.template load<kPlainPiece>(edge * m_padded + m);
#pragma unroll
        for (int j = 0; j < kPlainPiece; ++j) {
          sums[j] = fused_multiply_add(feature, weight[j], sums[j]);
        }
      }
    }
    if (item >= items) continue;
#pragma unroll
    for (int j = 0; j < kPlainPiece; ++j) {
      if (m + j < conv.m) out[channel * conv.m + m + j] = sums[j];
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kTileThreads, FusedScheme<C>::kBlocksEach)
    pointconv_plain_linear(Rows<C> sums, Rows<C> linear, const C* bias, C* out) {
  using Scheme = FusedScheme<C>;
  __shared__ TileSlabs<Scheme> slabs;
  const int64_t first_row = int64_t{blockIdx.x} * Scheme::kRows;
  const int64_t first_output = int64_t{blockIdx.y} * kTileColumns;
  TileProduct<Scheme, C> product(slabs);
  auto products = product.multiply(sums.from(first_row), linear.from(first_output));
#pragma unroll
  for (int j = 0; j < Scheme::kColumnsEach; ++j) {
    const int64_t output = first_output + Scheme::column(j);
    if (output >= linear.count) continue;
    const C added = bias == nullptr ? C{0} : bias[output];
#pragma unroll
    for (int i = 0; i < Scheme::kRowsEach; ++i) {
      const int64_t row = first_row + Scheme::row(i);
      if (row < sums.count) out[row * linear.count + output] = products(i, j) + added;
    }
  }
}

// ---- the operator
// ---------------------------------------------------------------------------------

template <class T, int centres>
void launch_fused(const Stream& stream, const PointConv<T>& conv) {
  stream.launch_large<FusedArrays<centres>>(
      "pointconv_fused", pointconv_fused<T, centres>,
      dim3(blocks_for(conv.count, centres), blocks_for(conv.outputs, kTileOutputs)),
      kFusedThreads<centres>, conv);
}

// Every tile of centres reads the linear map once, so tiles are large where there are enough of
// them for all units.
template <class T>
void launch_sums(const Stream& stream, const PointConv<T>& conv, bool has_linear) {
  constexpr int kMany = 128, kFew = 32;
  if (!has_linear) {
    stream.launch("pointconv_sums", pointconv_sums<T>,
                  blocks_for(conv.count, kSumsThreads / kWarpSize), kSumsThreads, conv);
  } else if (conv.count >= kManyBlocks / 3 * kMany && stream.has_large_shared()) {
    launch_fused<T, kMany>(stream, conv);
  } else {
    launch_fused<T, kFew>(stream, conv);
  }
}

// `sums` is room for those of a chunk that a linear map follows.
template <class C>
void launch_plain_sums(const Stream& stream, const PointConv<C>& conv, bool has_linear,
                       const Tensor& linear, const Tensor& sums) {
  PointConv<C> summed = conv;
  if (has_linear) summed.out = static_cast<C*>(sums.mutable_data_ptr());
  stream.launch("pointconv_plain_sums", pointconv_plain_sums<C>, blocks_for(conv.count, 1),
                kSumsThreads, summed);
  if (!has_linear) return;
  Rows<C> left = rows_of<C>(sums);
  left.count = conv.count;
  const dim3 grid(blocks_for(conv.count, FusedScheme<C>::kRows),
                  blocks_for(conv.outputs, kTileColumns));
  stream.launch("pointconv_plain_linear", pointconv_plain_linear<C>, grid, kTileThreads, left,
                rows_of<C>(linear), conv.bias, conv.out);
}

// [rows, channels, m] as the matrix units read it: itself where it is so already.
template <class T>
Tensor padded(const Stream& stream, const Tensor& in, int64_t rows, int64_t channels, int64_t m,
              int64_t pitch, int64_t m_padded) {
  const bool aligned = reinterpret_cast<uintptr_t>(in.const_data_ptr()) % 16 == 0;
  if (aligned && channels == pitch && m == m_padded) return in;
  const Tensor out = empty(in, {rows, pitch, m_padded}, in.scalar_type());
  if (out.numel() == 0) return out;
  stream.launch("pointconv_pad", pointconv_pad<T>, blocks_for(out.numel(), kPadThreads),
                kPadThreads, static_cast<const T*>(in.const_data_ptr()), rows, channels, m,
                Padded<T>{pitch, m_padded, static_cast<T*>(out.mutable_data_ptr())});
  return out;
}

template <class T>
void convolve(const Tensor& xyz, const Tensor& features, const Tensor& centres,
              const Tensor& neighbours, const Tensor& scale, const Tensor& net,
              const NetLayout& layout, const Tensor& linear, const Tensor& bias,
              const Tensor& out) {
  using C = ComputeOf<T>;
  constexpr bool kPlain = sizeof(T) != 2;
  const Stream stream(out);
  const bool has_linear = linear.dim() == 2;
  const bool grouped = features.dim() == 4;
  const int64_t channels = features.size(-1);
  const int64_t points = xyz.size(1);
  const int64_t centres_each = neighbours.size(1);
  const int64_t k = neighbours.size(2);
  const int64_t m = layout.width;
  const int64_t total = neighbours.size(0) * centres_each;
  // The rows of features of a chunk are numbered in 32 bits; it may touch two clouds in part.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t fitting = grouped ? kMost / std::max(k, int64_t{1})
                                  : (kMost / std::max(points, int64_t{1}) - 2) * centres_each;
  STD_TORCH_CHECK(fitting > 0 && k < kMost / 2 && channels < kMost / 2,
                  "fastzoo: pointconv: fewer points, neighbours or channels expected than ", points,
                  ", ", k, " and ", channels);
  const int64_t chunk = std::min({total, kChunkCentres, fitting});
  const int64_t pitch = kPlain ? channels : round_up(channels, kChannelPiece);
  const int64_t k_padded = kPlain ? k : round_up(k, kUnitK);
  const int64_t m_padded = round_up(m, kPlain ? kPlainPiece : kUnitM);
  Tensor read_features = features, read_linear = linear;
  if constexpr (!kPlain) {
    const int64_t rows = grouped ? total * k : features.size(0) * points;
    read_features = padded<T>(stream, features, rows, channels, 1, pitch, 1);
    if (has_linear) {
      read_linear = padded<T>(stream, linear, linear.size(0), channels, m, pitch, m_padded);
    }
  }
  const ScalarType compute = compute_dtype(features.scalar_type());
  const Tensor values = empty(out, {chunk, m_padded, k_padded}, out.scalar_type());
  const Tensor rows = empty(out, {chunk, k_padded}, ScalarType::Int);
  const Tensor sums = empty(out, {kPlain && has_linear ? chunk : 0, channels * m}, compute);
  const Weights<T> weights{static_cast<int>(k_padded), static_cast<int>(m_padded),
                           static_cast<T*>(values.mutable_data_ptr()),
                           static_cast<int*>(rows.mutable_data_ptr())};

  int widest = std::min(layout.dims, math::kNetWidth);
  for (int l = 0; l < layout.layers; ++l) widest = std::max(widest, layout.layer[l].out);
  const int log_edges = net_log_edges<C>(static_cast<int>(round_up(widest, kNetPiece)));
  for (int64_t first = 0; first < total; first += chunk) {
    const int64_t count = std::min(chunk, total - first);
    const int64_t first_row = grouped ? first * k : first / centres_each * points;
    const Edges<C> edges{first,
                         count,
                         static_cast<const C*>(xyz.const_data_ptr()),
                         static_cast<const C*>(centres.const_data_ptr()),
                         static_cast<const int64_t*>(neighbours.const_data_ptr()),
                         optional_data<const C>(scale),
                         points,
                         centres_each,
                         k,
                         grouped};
    if (k > 0) {
      stream.launch_large<NetArrays<C>>(
          "pointconv_weights", pointconv_weights<C, T>,
          blocks_for(count * k_padded, int64_t{1} << log_edges), kNetThreads, edges, layout,
          static_cast<const C*>(net.const_data_ptr()), log_edges, weights);
    }
    const PointConv<T> conv{
        count,
        channels,
        m,
        static_cast<const T*>(read_features.const_data_ptr()) + first_row * pitch,
        static_cast<int>(pitch),
        weights,
        optional_data<const T>(read_linear),
        out.size(2),
        optional_data<const T>(bias),
        static_cast<T*>(out.mutable_data_ptr()) + first * out.size(2)};
    if constexpr (kPlain) {
      launch_plain_sums<T>(stream, conv, has_linear, linear, sums);
    } else {
      launch_sums<T>(stream, conv, has_linear);
    }
  }
}

Tensor pointconv(const Tensor& xyz, const Tensor& features, const Tensor& centres,
                 const Tensor& neighbours, const Tensor& scale, const Tensor& net,
                 std::vector<int64_t> widths, const Tensor& linear, const Tensor& bias) {
  using torch::stable::contiguous;
  NetLayout layout;
  STD_TORCH_CHECK(
      math::net_layout(xyz.size(2), widths.data(), static_cast<int64_t>(widths.size()), layout) &&
          layout.width <= math::kNetWidth,
      "fastzoo: pointconv: at most ", math::kNetLayers, " layers of 1 to ", math::kNetWidth,
      " outputs expected");
  const int64_t outputs = linear.dim() == 2 ? linear.size(0) : features.size(-1) * layout.width;
  const Tensor out =
      empty(features, {neighbours.size(0), neighbours.size(1), outputs}, features.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor x = contiguous(xyz), f = contiguous(features), c = contiguous(centres),
               n = contiguous(neighbours), s = contiguous(scale), w = contiguous(net),
               l = contiguous(linear), b = contiguous(bias);
  dispatch_float(f.scalar_type(), "pointconv",
                 [&](auto type) { convolve<decltype(type)>(x, f, c, n, s, w, layout, l, b, out); });
  return out;
}

}  // namespace
}  // namespace fastzoo::cuda

STABLE_TORCH_LIBRARY_IMPL(fastzoo, FASTZOO_CUDA_DISPATCH_KEY, m) {
  fastzoo::implement<fastzoo::cuda::pointconv>(m, "pointconv.cuda");
}
