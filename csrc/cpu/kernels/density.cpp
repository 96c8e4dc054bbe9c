// Kernel density and its gradients: tiles of a few owners by the panels of the stream. Squared
// distances are of differences, so that an offset of all points cancels before it is squared.
#include "density.h"

#include "../runtime/convert.h"
#include "../runtime/vec_math.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {
namespace {

using math::DensityKernel;

constexpr int kPanel = kDensityPanel;
// Panels whose terms are added in the compute type: 64 terms a lane on the widest vectors, 256 on
// the narrowest. Beyond, sums are double.
constexpr int kAtOnce = 64;
// Owners that share the loads of the stream.
constexpr int kOwners = kVectorRegisters == 32 ? 4 : 2;

// The sum of squared differences, up to dimension d.
template <class T>
FASTZOO_INLINE Vec<T> add_square(Vec<T> difference, int64_t d, Vec<T> sum) {
  return d == 0 ? difference * difference : fused_multiply_add(difference, difference, sum);
}

template <class T>
FASTZOO_INLINE bool is_finite(T value) {
  return value - value == 0;
}

FASTZOO_INLINE double double_sum(Vec<double> values) { return lane_sum(values); }
FASTZOO_INLINE double double_sum(Vec<float> values) {
  float lanes[Vec<float>::size];
  values.store(lanes);
  constexpr int kHalf = Vec<double>::size;
  return lane_sum(load_doubles(lanes) + load_doubles(lanes + kHalf));
}

// The panels that pass by the owners.
template <class T>
struct Stream {
  const DensityArgs& args;
  int64_t size = args.lines_of_panel() * kPanel;

  T* panel(int64_t index) const { return static_cast<T*>(args.lines) + index * size; }

  void pack(int64_t index) const {
    const int64_t* const rows = args.stream.rows + index * kPanel;
    const auto* const coordinates = static_cast<const T*>(args.stream.coordinates);
    T* const lines = panel(index);
    for (int i = 0; i < kPanel; ++i) {
      for (int64_t d = 0; d < args.dims; ++d) {
        lines[d * kPanel + i] = rows[i] < 0 ? T(0) : coordinates[rows[i] * args.dims + d];
      }
    }
    T* const more = lines + args.dims * kPanel;
    // Where there is no point its weight, or gradient, makes it nothing.
    if (args.sum == DensitySum::by_points) {
      gather(static_cast<const T*>(args.grad), rows, T(0), more);
    } else {
      gather(static_cast<const T*>(args.scale), rows, T(1), more);
      gather(static_cast<const T*>(args.weight), rows, T(0), more + kPanel);
    }
    if (args.boxes != nullptr) enclose(index, rows, lines);
  }

  static void gather(const T* from, const int64_t* rows, T none, T* line) {
    for (int i = 0; i < kPanel; ++i) line[i] = rows[i] < 0 ? none : from[rows[i]];
  }

  T* low(int64_t d) const { return static_cast<T*>(args.boxes) + d * args.panels; }
  T* high(int64_t d) const { return low(args.dims + d); }
  // The least scale; NaN where a panel has terms that are not 0 however far it is.
  T* least_scale() const { return low(2 * args.dims); }

  void enclose(int64_t index, const int64_t* rows, const T* lines) const {
    bool finite = true;
    T least = static_cast<T>(__builtin_inf());
    const T* const more = lines + args.dims * kPanel;
    for (int i = 0; i < kPanel && rows[i] >= 0; ++i) {
      for (int64_t line = 0; line < args.lines_of_panel(); ++line) {
        finite &= is_finite(lines[line * kPanel + i]);
      }
      least = math::minimum(least, args.sum == DensitySum::by_points ? T(1) : more[i]);
    }
    for (int64_t d = 0; d < args.dims; ++d) {
      T lowest = lines[d * kPanel], highest = lowest;
      for (int i = 1; i < kPanel && rows[i] >= 0; ++i) {
        lowest = math::minimum(lowest, lines[d * kPanel + i]);
        highest = math::maximum(highest, lines[d * kPanel + i]);
      }
      low(d)[index] = lowest;
      high(d)[index] = highest;
    }
    least_scale()[index] = finite ? least : static_cast<T>(__builtin_nan(""));
  }
};

// One task. kDims: the number of dimensions where it is 2 or 3, else 0.
template <class T, DensitySum kSum, DensityKernel kKernel, int kDims>
struct Tile {
  using V = Vec<T>;
  static constexpr bool kByPoints = kSum == DensitySum::by_points;

  const DensityArgs& args;
  const DensityTask& task;
  DensityScratch<T> scratch;
  Stream<T> stream;
  int64_t count;
  const int64_t* rows;

  Tile(const DensityArgs& args, const DensityTask& task, void* base)
      : args(args),
        task(task),
        scratch(base, args.dims, task.last_panel - task.first_panel),
        stream{args},
        count(task.end - task.begin),
        rows(args.owners.rows + task.begin) {}

  int64_t dims() const { return kDims > 0 ? kDims : args.dims; }
  // How many sums an owner has.
  int64_t width() const { return kSum == DensitySum::values ? 1 : kByPoints ? dims() + 2 : dims(); }

  T owner_scale(int64_t owner) const {
    return kByPoints ? static_cast<const T*>(args.scale)[rows[owner]] : T(1);
  }

  void run() const {
    const int64_t padded = (count + kOwners - 1) / kOwners * kOwners;
    read_owners(padded);
    for (int64_t i = 0; i < padded * width(); ++i) scratch.sums[i] = 0;
    const int64_t panels = find_near();
    // The lines of so many panels stay in the fastest cache while all owners pass.
    constexpr int64_t kCache = 32768;
    const int64_t fitting = kCache / (stream.size * static_cast<int64_t>(sizeof(T)));
    const int64_t step = fitting < 1 ? 1 : fitting > kAtOnce ? kAtOnce : fitting;
    for (int64_t first = 0; first < panels; first += step) {
      const int many = static_cast<int>(panels - first < step ? panels - first : step);
      for (int64_t i = 0; i < count; i += kOwners) add(i, scratch.near + first, many);
    }
    finish();
  }

  // The last owner stands in for those that are missing.
  void read_owners(int64_t padded) const {
    const T* const coordinates = static_cast<const T*>(args.owners.coordinates);
    for (int64_t i = 0; i < padded; ++i) {
      const T* const point = coordinates + rows[i < count ? i : count - 1] * dims();
      for (int64_t d = 0; d < dims(); ++d) scratch.owners[i * dims() + d] = point[d];
    }
  }

  // Lists the panels that may have a term that is not 0.
  int64_t find_near() const {
    const int64_t panels = task.last_panel - task.first_panel;
    T least = static_cast<T>(__builtin_inf());
    T lowest[kDensityBoxDims], highest[kDensityBoxDims];
    if (!enclose(least, lowest, highest)) {
      for (int64_t i = 0; i < panels; ++i) scratch.near[i] = static_cast<int32_t>(i);
      return panels;
    }
    // Exponentials are 0 already where their values are below the smallest normal number.
    const V reach(kKernel == DensityKernel::gaussian ? -Exponential<T>::kLeast
                                                     : math::density_reach<T>(kKernel));
    int64_t found = 0;
    for (int64_t i = 0; i < panels; i += V::size) {
      const int64_t at = task.first_panel + i;
      V square(T(0));
      for (int64_t d = 0; d < dims(); ++d) {
        const V below = V::load(stream.low(d) + at) - V(highest[d]);
        const V above = V(lowest[d]) - V::load(stream.high(d) + at);
        square = add_square(maximum(maximum(below, above), V(T(0))), d, square);
      }
      const V u = V::load(stream.least_scale() + at) * V(least) * square;
      const uint32_t far = less(reach, u).bits;
      for (int64_t j = 0; j < V::size && i + j < panels; ++j) {
        scratch.near[found] = static_cast<int32_t>(i + j);
        found += ~far >> j & 1u;
      }
    }
    return found;
  }

  // The box of the owners; false where boxes tell nothing.
  bool enclose(T& least, T* lowest, T* highest) const {
    if (args.boxes == nullptr) return false;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      const T* const owner = scratch.owners + i * dims();
      least = math::minimum(least, owner_scale(i));
      finite &= is_finite(owner_scale(i));
      for (int64_t d = 0; d < dims(); ++d) {
        finite &= is_finite(owner[d]);
        lowest[d] = i == 0 ? owner[d] : math::minimum(lowest[d], owner[d]);
        highest[d] = i == 0 ? owner[d] : math::maximum(highest[d], owner[d]);
      }
    }
    return finite;
  }

  // Adds the terms of kOwners owners and the panels listed. A pair's pull is what its difference,
  // and for by_points its squared distance, is multiplied by in the gradients.
  void add(int64_t first, const int32_t* near, int many) const {
    const T* const owners = scratch.owners + first * dims();
    double* const sums = scratch.sums + first * width();
    [[maybe_unused]] alignas(kVectorBytes) T pulls[kOwners][kAtOnce * kPanel];
    V totals[kOwners], stretch[kOwners], scales[kOwners];
    for (int i = 0; i < kOwners; ++i) {
      totals[i] = stretch[i] = V(T(0));
      scales[i] = V(kByPoints && first + i < count ? owner_scale(first + i) : T(1));
    }
    for (int at = 0; at < many; ++at) {
      const T* const panel = stream.panel(task.first_panel + near[at]);
#pragma GCC unroll 4
      for (int lane = 0; lane < kPanel; lane += V::size) {
        const V first_line = V::load(panel + dims() * kPanel + lane);
        V squares[kOwners];
        for (int64_t d = 0; d < dims(); ++d) {
          const V line = V::load(panel + d * kPanel + lane);
#pragma GCC unroll 4
          for (int i = 0; i < kOwners; ++i) {
            squares[i] = add_square(V(owners[i * dims() + d]) - line, d, squares[i]);
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kOwners; ++i) {
          const V u = (kByPoints ? scales[i] : first_line) * squares[i];
          const V profile = math::density_profile<kKernel>(u);
          if constexpr (kByPoints) {
            const V pull = first_line * math::density_slope<kKernel>(u, profile);
            totals[i] = fused_multiply_add(first_line, profile, totals[i]);
            stretch[i] = fused_multiply_add(pull, squares[i], stretch[i]);
            pull.store(pulls[i] + at * kPanel + lane);
          } else {
            const V weight = V::load(panel + (dims() + 1) * kPanel + lane);
            if constexpr (kSum == DensitySum::values) {
              totals[i] = fused_multiply_add(weight, profile, totals[i]);
            } else {
              const V pull = weight * first_line * math::density_slope<kKernel>(u, profile);
              pull.store(pulls[i] + at * kPanel + lane);
            }
          }
        }
      }
    }
    if constexpr (kSum != DensitySum::by_queries) {
      for (int i = 0; i < kOwners; ++i) sums[i * width()] += double_sum(totals[i]);
    }
    if constexpr (kByPoints) {
      for (int i = 0; i < kOwners; ++i) sums[i * width() + 1] += double_sum(stretch[i]);
    }
    if constexpr (kSum != DensitySum::values) add_differences(first, near, many, pulls);
  }

  // Adds the differences of pairs, times their pulls.
  void add_differences(int64_t first, const int32_t* near, int many,
                       const T (&pulls)[kOwners][kAtOnce * kPanel]) const {
    const T* const owners = scratch.owners + first * dims();
    double* const sums = scratch.sums + first * width() + width() - dims();
    for (int64_t d = 0; d < dims(); ++d) {
      V moved[kOwners];
      for (int i = 0; i < kOwners; ++i) moved[i] = V(T(0));
      for (int at = 0; at < many; ++at) {
        const T* const line = stream.panel(task.first_panel + near[at]) + d * kPanel;
        for (int lane = 0; lane < kPanel; lane += V::size) {
          const V values = V::load(line + lane);
#pragma GCC unroll 4
          for (int i = 0; i < kOwners; ++i) {
            moved[i] = fused_multiply_add(V::load(pulls[i] + at * kPanel + lane),
                                          V(owners[i * dims() + d]) - values, moved[i]);
          }
        }
      }
      for (int i = 0; i < kOwners; ++i) sums[i * width() + d] += double_sum(moved[i]);
    }
  }

  void finish() const {
    T* const out = static_cast<T*>(args.out);
    for (int64_t i = 0; i < count; ++i) {
      const double* const sums = scratch.sums + i * width();
      if constexpr (kSum == DensitySum::values) {
        out[rows[i]] = static_cast<T>(sums[0]);
      } else {
        const double factor = 2 * finish_own(i);
        for (int64_t d = 0; d < dims(); ++d) {
          out[rows[i] * dims() + d] = static_cast<T>(factor * sums[width() - dims() + d]);
        }
      }
    }
  }

  // Writes what else an owner has, and returns what its terms have in common.
  double finish_own(int64_t owner) const {
    const int64_t row = rows[owner];
    if constexpr (kByPoints) {
      const double* const sums = scratch.sums + owner * width();
      const double weight = static_cast<const T*>(args.weight)[row];
      static_cast<T*>(args.grad_weight)[row] = static_cast<T>(sums[0]);
      static_cast<T*>(args.grad_scale)[row] = static_cast<T>(weight * sums[1]);
      return weight * owner_scale(owner);
    } else {
      return static_cast<const T*>(args.grad)[row];
    }
  }
};

template <class T>
void pack(const DensityArgs& args, int64_t begin, int64_t end) {
  const Stream<T> stream{args};
  for (int64_t i = begin; i < end; ++i) stream.pack(i);
}

template <class T, DensitySum kSum, DensityKernel kKernel>
void run(const DensityArgs& args, const DensityTask& task, void* scratch) {
  if (args.dims == 2) return Tile<T, kSum, kKernel, 2>(args, task, scratch).run();
  if (args.dims == 3) return Tile<T, kSum, kKernel, 3>(args, task, scratch).run();
  Tile<T, kSum, kKernel, 0>(args, task, scratch).run();
}

template <class T, DensitySum kSum>
void run(const DensityArgs& args, const DensityTask& task, void* scratch) {
  switch (args.kernel) {
    case DensityKernel::gaussian:
      return run<T, kSum, DensityKernel::gaussian>(args, task, scratch);
    case DensityKernel::epanechnikov:
      return run<T, kSum, DensityKernel::epanechnikov>(args, task, scratch);
    case DensityKernel::tophat:
      return run<T, kSum, DensityKernel::tophat>(args, task, scratch);
  }
}

template <class T>
void run(const DensityArgs& args, const DensityTask& task, void* scratch) {
  switch (args.sum) {
    case DensitySum::values:
      return run<T, DensitySum::values>(args, task, scratch);
    case DensitySum::by_queries:
      return run<T, DensitySum::by_queries>(args, task, scratch);
    case DensitySum::by_points:
      return run<T, DensitySum::by_points>(args, task, scratch);
  }
}

}  // namespace

void density_pack_float(const DensityArgs& args, int64_t begin, int64_t end) {
  pack<float>(args, begin, end);
}
void density_pack_double(const DensityArgs& args, int64_t begin, int64_t end) {
  pack<double>(args, begin, end);
}
void density_run_float(const DensityArgs& args, const DensityTask& task, void* scratch) {
  run<float>(args, task, scratch);
}
void density_run_double(const DensityArgs& args, const DensityTask& task, void* scratch) {
  run<double>(args, task, scratch);
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
