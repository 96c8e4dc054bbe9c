// Sums over the rows of each code, and gradients of the lookup. All in double, rounded once.
#include "vq_codes.h"

#include <type_traits>

#include "../runtime/convert.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::Estimator;
using math::Metric;
using V = Vec<double>;

// Elements from p on as W: one double, or a vector of them.
template <class W, class Element>
FASTZOO_INLINE W at(const Element* p) {
  if constexpr (std::is_same_v<W, double>) {
    return widen(*p);
  } else {
    return load_doubles(p);
  }
}

template <class Element>
FASTZOO_INLINE void put(double value, Element* p) {
  narrow(value, *p);
}
template <class Element>
FASTZOO_INLINE void put(V values, Element* p) {
  narrow(values, p);
}

// Calls body(W{}, d) for the dimensions from d on, as many as W holds, until all are met.
template <class Body>
FASTZOO_INLINE void over_dims(int64_t dims, const Body& body) {
  int64_t d = 0;
  for (; d + V::size <= dims; d += V::size) body(V{}, d);
  for (; d < dims; ++d) body(double{}, d);
}

// Sums over the dimensions of kCount terms at once, in any order: term(W{}, d, i).
template <int kCount, class Term>
FASTZOO_INLINE void sum_dims(int64_t dims, double (&sums)[kCount], const Term& term) {
  V wide[kCount];
  for (int i = 0; i < kCount; ++i) wide[i] = V(0.0);
  int64_t d = 0;
  for (; d + V::size <= dims; d += V::size) {
    for (int i = 0; i < kCount; ++i) wide[i] = wide[i] + term(V{}, d, i);
  }
  for (int i = 0; i < kCount; ++i) sums[i] = lane_sum(wide[i]);
  for (; d < dims; ++d) {
    for (int i = 0; i < kCount; ++i) sums[i] += term(double{}, d, i);
  }
}

// Terms: what a pair of a row and its code has for dimension d. `own` is the side that is
// differentiated, or none; at(W{}, d) is the value.
template <class Element>
struct Value {
  const Element* values;

  template <class W>
  __attribute__((always_inline)) W operator()(W, int64_t d) const {
    return at<W>(values + d);
  }
};

template <class Element>
struct Weighted {
  double weight;
  const Element* other;

  template <class W>
  __attribute__((always_inline)) W operator()(W, int64_t d) const {
    return W(weight) * at<W>(other + d);
  }
};

// Of the squared distance. The difference comes first, or an offset of both would cancel late.
template <class Element>
struct Pull {
  double weight;
  const Element* own;
  const Element* other;

  template <class W>
  __attribute__((always_inline)) W operator()(W, int64_t d) const {
    return W(weight) * (at<W>(own + d) - at<W>(other + d));
  }
};

// Of the cosine.
template <class Element>
struct Turn {
  double weight, shrink;
  const Element* own;
  const Element* other;

  template <class W>
  __attribute__((always_inline)) W operator()(W, int64_t d) const {
    return W(weight) * at<W>(other + d) - W(shrink) * at<W>(own + d);
  }
};

// The gradient, turned and scaled as the rotation that takes the row to its code.
template <class Element>
struct Rotated {
  const Element* grad;
  const Element* x;
  const Element* code;
  double scale;       // |c| / |x|
  double x_inverse;   // of |x|
  double c_inverse;   // of |c|
  double w_inverse;   // of |u + v|
  double twice_on_w;  // 2 g.w
  double twice_on_v;  // 2 g.v

  template <class W>
  __attribute__((always_inline)) W operator()(W, int64_t d) const {
    const W u = W(x_inverse) * at<W>(x + d);
    const W v = W(c_inverse) * at<W>(code + d);
    const W w = W(w_inverse) * (u + v);
    return W(scale) * (at<W>(grad + d) - W(twice_on_w) * w + W(twice_on_v) * u);
  }
};

template <class A, class B>
struct Both {
  A a;
  B b;

  template <class W>
  __attribute__((always_inline)) W operator()(W lanes, int64_t d) const {
    return a(lanes, d) + b(lanes, d);
  }
};
template <class A, class B>
Both(A, B) -> Both<A, B>;

template <class Element, class Term>
FASTZOO_INLINE void write(int64_t dims, const Term& term, Element* out) {
  over_dims(dims, [&](auto lanes, int64_t d)
                      __attribute__((always_inline)) { put(term(lanes, d), out + d); });
}

// Adds the terms of rows[0] .. rows[kRows - 1] to the sums, one after the other.
template <int kRows, class TermOf>
FASTZOO_INLINE void add_rows(int64_t dims, const int64_t* rows, const TermOf& term_of,
                             double* sums) {
  std::remove_const_t<decltype(term_of(*rows))> terms[kRows];
  for (int i = 0; i < kRows; ++i) terms[i] = term_of(rows[i]);
  over_dims(dims, [&](auto lanes, int64_t d) __attribute__((always_inline)) {
    auto sum = at<decltype(lanes)>(sums + d);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum = sum + terms[i](lanes, d);
    put(sum, sums + d);
  });
}

// For each part the sums over its rows: term_of(code, row, d) is a row's term from dimension d on.
template <class Element, class Sum, class TermOf>
void sum_parts(const VqCodesArgs& args, int64_t begin, int64_t end, const TermOf& term_of) {
  constexpr int64_t kLine = 64;    // bytes of the cache
  constexpr int64_t kBlock = 512;  // dimensions whose sums stay in the fastest cache
  constexpr int kAtOnce = 4;       // rows for which each sum is read and written once
  constexpr int kAhead = 24;       // rows are fetched before their turn: they lie all over x
  for (const VqPart* part = args.parts + begin; part < args.parts + end; ++part) {
    for (int64_t first = 0; first < args.dims; first += kBlock) {
      const int64_t dims = args.dims - first < kBlock ? args.dims - first : kBlock;
      alignas(kVectorBytes) double sums[kBlock];
      for (int64_t d = 0; d < dims; ++d) sums[d] = 0;
      const auto of_row = [&](int64_t row) __attribute__((always_inline)) {
        return term_of(part->code, row, first);
      };
      const auto fetch = [&](int64_t place) __attribute__((always_inline)) {
        if (place >= args.rows) return;
        const auto* const row =
            static_cast<const Element*>(args.x) + args.order[place] * args.dims + first;
        for (int64_t d = 0; d < dims; d += kLine / static_cast<int64_t>(sizeof(Element))) {
          __builtin_prefetch(row + d);
        }
      };
      int64_t i = part->begin;
      for (; i + kAtOnce <= part->end; i += kAtOnce) {
        for (int j = 0; j < kAtOnce; ++j) fetch(i + kAhead + j);
        add_rows<kAtOnce>(dims, args.order + i, of_row, sums);
      }
      for (; i < part->end; ++i) {
        fetch(i + kAhead);
        add_rows<1>(dims, args.order + i, of_row, sums);
      }
      if (part->slot < 0) {
        write(dims, Value<double>{sums},
              static_cast<Sum*>(args.sums) + part->code * args.dims + first);
      } else {
        write(dims, Value<double>{sums}, args.partials + part->slot * args.dims + first);
      }
    }
  }
}

// The gradient of the cosine of a row and its code, by both.
struct CosineSlope {
  double weight;         // of the other side
  double by_x, by_code;  // of the own side
};

template <class Element>
CosineSlope cosine_slope(int64_t dims, double grad, const Element* x, const Element* code) {
  double sums[3];
  sum_dims(dims, sums, [&](auto lanes, int64_t d, int i) __attribute__((always_inline)) {
    using W = decltype(lanes);
    return at<W>((i == 1 ? x : code) + d) * at<W>((i == 2 ? code : x) + d);
  });
  const auto [dot, x_square, code_square] = sums;
  const double x_norm = __builtin_sqrt(x_square);
  const double code_norm = __builtin_sqrt(code_square);
  const double both =
      math::maximum(x_norm, math::kNormFloor) * math::maximum(code_norm, math::kNormFloor);
  // Where the floor rules, the norm is a constant.
  return {grad / both, x_norm > math::kNormFloor ? grad * (dot / both / x_square) : 0,
          code_norm > math::kNormFloor ? grad * (dot / both / code_square) : 0};
}

template <class Element>
double norm(int64_t dims, const Element* values) {
  double square[1];
  sum_dims(dims, square, [&](auto lanes, int64_t d, int) __attribute__((always_inline)) {
    const auto value = at<decltype(lanes)>(values + d);
    return value * value;
  });
  return __builtin_sqrt(square[0]);
}

template <class Element>
Rotated<Element> rotated(int64_t dims, double x_norm, const Element* grad, const Element* x,
                         const Element* code) {
  const double code_norm = norm(dims, code);
  const double x_inverse = 1 / x_norm;
  const double c_inverse = 1 / math::maximum(code_norm, math::kNormFloor);
  double sums[3];  // of (u + v)^2, g (u + v) and g v
  sum_dims(dims, sums, [&](auto lanes, int64_t d, int i) __attribute__((always_inline)) {
    using W = decltype(lanes);
    const W v = W(c_inverse) * at<W>(code + d);
    const W both = W(x_inverse) * at<W>(x + d) + v;
    if (i == 0) return both * both;
    return at<W>(grad + d) * (i == 1 ? both : v);
  });
  const double w_inverse = 1 / math::maximum(__builtin_sqrt(sums[0]), math::kNormFloor);
  return {grad,       x,         code,      code_norm * x_inverse,
          x_inverse,  c_inverse, w_inverse, 2 * sums[1] * w_inverse,
          2 * sums[2]};
}

template <class Element>
struct Pairs {
  const VqCodesArgs& args;
  const Element* x(int64_t row) const {
    return static_cast<const Element*>(args.x) + row * args.dims;
  }
  const Element* code(int64_t index) const {
    return static_cast<const Element*>(args.codebook) + index * args.dims;
  }
};

}  // namespace

void vq_sum_rows(const VqCodesArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    const Pairs<Element> pairs{args};
    sum_parts<Element, typename ComputeOf<Element>::type>(
        args, begin, end, [&](int64_t, int64_t row, int64_t d) __attribute__((always_inline)) {
          return Value<Element>{pairs.x(row) + d};
        });
  });
}

void vq_join_parts(const VqCodesArgs& args, int64_t begin, int64_t end) {
  with_element(args.sums_dtype, [&](auto element) {
    using Sum = decltype(element);
    for (int64_t first = begin; first < end;) {
      const VqPart& part = args.parts[first];
      int64_t next = first + 1;
      while (next < end && args.parts[next].code == part.code) ++next;
      if (part.slot >= 0) {
        double* const sums = args.partials + part.slot * args.dims;
        for (int64_t i = first + 1; i < next; ++i) {
          const double* const others = args.partials + args.parts[i].slot * args.dims;
          write(args.dims, Both{Value<double>{sums}, Value<double>{others}}, sums);
        }
        write(args.dims, Value<double>{sums}, static_cast<Sum*>(args.sums) + part.code * args.dims);
      }
      first = next;
    }
  });
}

void vq_nearest_backward_x(const VqNearestBackwardArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    const Pairs<Element> pairs{args};
    for (int64_t row = begin; row < end; ++row) {
      Element* const out = static_cast<Element*>(args.grad_x) + row * args.dims;
      const Element* const x = pairs.x(row);
      if (args.indices[row] < 0) {
        for (int64_t d = 0; d < args.dims; ++d) narrow(0.0, out[d]);
        continue;
      }
      const Element* const code = pairs.code(args.indices[row]);
      const double grad = static_cast<const T*>(args.grad)[row];
      switch (args.metric) {
        case Metric::l2:
          write(args.dims, Pull<Element>{2 * grad, x, code}, out);
          break;
        case Metric::dot:
          write(args.dims, Weighted<Element>{grad, code}, out);
          break;
        case Metric::cosine: {
          const CosineSlope slope = cosine_slope(args.dims, grad, x, code);
          args.slopes[2 * row] = slope.weight;
          args.slopes[2 * row + 1] = slope.by_code;
          write(args.dims, Turn<Element>{slope.weight, slope.by_x, x, code}, out);
          break;
        }
      }
    }
  });
}

void vq_nearest_backward_codebook(const VqNearestBackwardArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    const Pairs<Element> pairs{args};
    const T* const grad = static_cast<const T*>(args.grad);
    switch (args.metric) {
      case Metric::l2:
        return sum_parts<Element, Element>(
            args, begin, end,
            [&](int64_t code, int64_t row, int64_t d) __attribute__((always_inline)) {
              return Pull<Element>{2.0 * grad[row], pairs.code(code) + d, pairs.x(row) + d};
            });
      case Metric::dot:
        return sum_parts<Element, Element>(
            args, begin, end, [&](int64_t, int64_t row, int64_t d) __attribute__((always_inline)) {
              return Weighted<Element>{grad[row], pairs.x(row) + d};
            });
      case Metric::cosine:
        return sum_parts<Element, Element>(
            args, begin, end,
            [&](int64_t code, int64_t row, int64_t d) __attribute__((always_inline)) {
              const double* const slope = args.slopes + 2 * row;
              return Turn<Element>{slope[0], slope[1], pairs.code(code) + d, pairs.x(row) + d};
            });
    }
  });
}

void vq_quantize_backward_x(const VqQuantizeBackwardArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    const Pairs<Element> pairs{args};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at_row = row * args.dims;
      Element* const out = static_cast<Element*>(args.grad_x) + at_row;
      const Element* const grad = static_cast<const Element*>(args.grad_quantized) + at_row;
      const Value<Element> straight{grad};
      if (args.indices[row] < 0) {
        write(args.dims, straight, out);
        continue;
      }
      const Element* const x = pairs.x(row);
      const Element* const code = pairs.code(args.indices[row]);
      const double loss = static_cast<const T*>(args.grad_losses)[row];
      const Pull<Element> pull{2 * args.beta * loss, x, code};
      if (args.estimator == Estimator::none) {
        write(args.dims, pull, out);
        continue;
      }
      const double x_norm = args.estimator == Estimator::rotation ? norm(args.dims, x) : 0;
      if (x_norm > math::kNormFloor) {
        write(args.dims, Both{rotated(args.dims, x_norm, grad, x, code), pull}, out);
      } else {
        write(args.dims, Both{straight, pull}, out);
      }
    }
  });
}

void vq_quantize_backward_codebook(const VqQuantizeBackwardArgs& args, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename ComputeOf<Element>::type;
    const Pairs<Element> pairs{args};
    const auto pull = [&](int64_t code, int64_t row, int64_t d) __attribute__((always_inline)) {
      const double loss = static_cast<const T*>(args.grad_losses)[row];
      return Pull<Element>{2 * args.codebook_weight * loss, pairs.code(code) + d, pairs.x(row) + d};
    };
    if (args.estimator != Estimator::none)
      return sum_parts<Element, Element>(args, begin, end, pull);
    const Element* const grad = static_cast<const Element*>(args.grad_quantized);
    sum_parts<Element, Element>(
        args, begin, end, [&](int64_t code, int64_t row, int64_t d) __attribute__((always_inline)) {
          return Both{pull(code, row, d), Value<Element>{grad + row * args.dims + d}};
        });
  });
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
