// Sums and maxima of features over lists of neighbours.
#include "neighbour_reduce.h"

#include "../runtime/convert.h"
#include "../runtime/vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

template <class Element>
struct NeighbourReduce {
  using T = typename ComputeOf<Element>::type;
  using V = Vec<T>;
  static constexpr int kLanes = V::size;
  // Vectors of channels that are reduced in registers.
  static constexpr int kVectors = 4;

  const NeighbourReduceArgs& args;

  const Element* row(int64_t centre, int64_t neighbour) const {
    const int64_t cloud = centre / args.centres;
    return static_cast<const Element*>(args.features) +
           (cloud * args.points + neighbour) * args.channels;
  }
  const int64_t* neighbours_of(int64_t centre) const {
    return args.neighbours + centre * args.neighbours_each;
  }
  T weight(int64_t edge) const {
    return args.weights == nullptr ? T(1) : static_cast<const T*>(args.weights)[edge];
  }

  // The channels from c on, 0 where there are no more.
  __attribute__((always_inline)) V load(const Element* from, int64_t c) const {
    if (c + kLanes <= args.channels) return load_wide(from + c);
    T values[kLanes] = {};
    for (int64_t i = 0; c + i < args.channels; ++i) values[i] = widen(from[c + i]);
    return V::load(values);
  }
  __attribute__((always_inline)) void store(V vector, Element* to, int64_t c) const {
    T values[kLanes];
    vector.store(values);
    for (int64_t i = 0; i < kLanes && c + i < args.channels; ++i) narrow(values[i], to[c + i]);
  }

  void sum(int64_t centre) const {
    const int64_t* const neighbours = neighbours_of(centre);
    Element* const out = static_cast<Element*>(args.out) + centre * args.channels;
    for (int64_t c = 0; c < args.channels; c += kVectors * kLanes) {
      V sums[kVectors];
      for (int v = 0; v < kVectors; ++v) sums[v] = V(T(0));
      for (int64_t k = 0; k < args.neighbours_each; ++k) {
        if (neighbours[k] < 0) continue;
        const V factor(weight(centre * args.neighbours_each + k));
        const Element* const from = row(centre, neighbours[k]);
        for (int v = 0; v < kVectors; ++v) {
          sums[v] = fused_multiply_add(factor, load(from, c + v * kLanes), sums[v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) store(sums[v], out, c + v * kLanes);
    }
  }

  // The first of the highest wins, a NaN being the highest.
  void maximum(int64_t centre) const {
    using Bits = typename BitsOf<T>::type;
    using Scalar = typename BitsOf<T>::Scalar;
    const int64_t* const neighbours = neighbours_of(centre);
    Element* const out = static_cast<Element*>(args.out) + centre * args.channels;
    int32_t* const winner = args.winner + centre * args.channels;
    for (int64_t c = 0; c < args.channels; c += kVectors * kLanes) {
      V best[kVectors];
      Bits rows[kVectors];
      bool any = false;
      for (int v = 0; v < kVectors; ++v) {
        best[v] = V(T(0));
        rows[v] = Scalar{-1} - Bits{};
      }
      for (int64_t k = 0; k < args.neighbours_each; ++k) {
        if (neighbours[k] < 0) continue;
        const Element* const from = row(centre, neighbours[k]);
        const Bits index = static_cast<Scalar>(neighbours[k]) - Bits{};
        for (int v = 0; v < kVectors; ++v) {
          const V value = load(from, c + v * kLanes);
          const Bits wins =
              any ? (value.v > best[v].v) | ((value.v != value.v) & (best[v].v == best[v].v))
                  : ~Bits{};
          best[v] = V(wins ? value.v : best[v].v);
          rows[v] = wins ? index : rows[v];
        }
        any = true;
      }
      for (int v = 0; v < kVectors; ++v) {
        const int64_t first = c + v * kLanes;
        store(best[v], out, first);
        for (int64_t i = 0; i < kLanes && first + i < args.channels; ++i) {
          winner[first + i] = static_cast<int32_t>(rows[v][i]);
        }
      }
    }
  }

  // Calls body(first centre, end, first channel, end) for a part of the channels of a cloud.
  template <class Body>
  __attribute__((always_inline)) void over_part(int64_t index, const Body& body) const {
    const int64_t cloud = index / args.parts, part = index % args.parts;
    // Whole vectors, so that threads seldom write to one line of the cache.
    const int64_t vectors = (args.channels + kLanes - 1) / kLanes;
    const int64_t last = vectors * (part + 1) / args.parts * kLanes;
    body(cloud * args.centres, (cloud + 1) * args.centres, vectors * part / args.parts * kLanes,
         last < args.channels ? last : args.channels);
  }
  T* sums_of(int64_t centre, int64_t row) const {
    const int64_t cloud = centre / args.centres;
    return static_cast<T*>(args.row_sums) + (cloud * args.points + row) * args.channels;
  }

  void sum_backward(int64_t index) const {
    over_part(index, [&](int64_t begin, int64_t end, int64_t from, int64_t to) {
      for (int64_t centre = begin; centre < end; ++centre) {
        const int64_t* const neighbours = neighbours_of(centre);
        const Element* const grad = static_cast<const Element*>(args.grad) + centre * args.channels;
        for (int64_t k = 0; k < args.neighbours_each; ++k) {
          if (neighbours[k] < 0) continue;
          const T factor = weight(centre * args.neighbours_each + k);
          T* const sums = sums_of(centre, neighbours[k]);
          int64_t c = from;
          for (; c + kLanes <= to; c += kLanes) {
            fused_multiply_add(V(factor), load_wide(grad + c), V::load(sums + c)).store(sums + c);
          }
          for (; c < to; ++c) sums[c] += factor * widen(grad[c]);
        }
      }
    });
  }

  void maximum_backward(int64_t index) const {
    over_part(index, [&](int64_t begin, int64_t end, int64_t from, int64_t to) {
      for (int64_t centre = begin; centre < end; ++centre) {
        const Element* const grad = static_cast<const Element*>(args.grad) + centre * args.channels;
        const int32_t* const winner = args.winner + centre * args.channels;
        for (int64_t c = from; c < to; ++c) {
          if (winner[c] >= 0) sums_of(centre, winner[c])[c] += widen(grad[c]);
        }
      }
    });
  }

  void sum_backward_weights(int64_t centre) const {
    const int64_t* const neighbours = neighbours_of(centre);
    const Element* const grad = static_cast<const Element*>(args.grad) + centre * args.channels;
    T* const to = static_cast<T*>(args.grad_weights) + centre * args.neighbours_each;
    for (int64_t k = 0; k < args.neighbours_each; ++k) {
      to[k] = T(0);
      if (neighbours[k] < 0) continue;
      const Element* const from = row(centre, neighbours[k]);
      V sums[kVectors];
      for (int v = 0; v < kVectors; ++v) sums[v] = V(T(0));
      for (int64_t c = 0; c < args.channels; c += kVectors * kLanes) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t first = c + v * kLanes;
          sums[v] = fused_multiply_add(load(grad, first), load(from, first), sums[v]);
        }
      }
      to[k] = lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
  }

  void write_features(int64_t row) const {
    const T* const from = static_cast<const T*>(args.row_sums) + row * args.channels;
    Element* const to = static_cast<Element*>(args.grad_features) + row * args.channels;
    for (int64_t c = 0; c < args.channels; ++c) narrow(from[c], to[c]);
  }
};

}  // namespace

#define FASTZOO_DEFINE_NEIGHBOUR_REDUCE(name, method)                         \
  void name(const NeighbourReduceArgs& args, int64_t begin, int64_t end) {    \
    with_element(args.dtype, [&](auto element) {                              \
      const NeighbourReduce<decltype(element)> reduce{args};                  \
      for (int64_t index = begin; index < end; ++index) reduce.method(index); \
    });                                                                       \
  }

FASTZOO_DEFINE_NEIGHBOUR_REDUCE(neighbour_sum, sum)
FASTZOO_DEFINE_NEIGHBOUR_REDUCE(neighbour_maximum, maximum)
FASTZOO_DEFINE_NEIGHBOUR_REDUCE(neighbour_sum_backward_weights, sum_backward_weights)
FASTZOO_DEFINE_NEIGHBOUR_REDUCE(neighbour_sum_backward, sum_backward)
FASTZOO_DEFINE_NEIGHBOUR_REDUCE(neighbour_maximum_backward, maximum_backward)
FASTZOO_DEFINE_NEIGHBOUR_REDUCE(neighbour_write_features, write_features)

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
