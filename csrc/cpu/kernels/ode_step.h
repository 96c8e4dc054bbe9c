// Steps of samplers and solvers on the CPU: what the entries hand to the kernels.
#pragma once

#include <cstdint>

#include "../../math/ode_step.h"
#include "../runtime/capability.h"
#include "../runtime/dtype.h"

namespace fastzoo::cpu {

// Elements of a tile at most: of a piece of a long sample, and of several short ones.
constexpr int64_t kStepTile = 1024;
constexpr int64_t kShortTile = 512;

// Samples of `size` elements each in tiles: of several whole ones where they are short, and else of
// a piece of one.
struct StepTiles {
  int64_t samples, size;
  int64_t samples_each;  // of a tile
  int64_t pieces;        // of a sample
  int64_t piece;         // elements of a piece, but for the last

  struct Place {
    int64_t sample, samples, begin, width;

    __attribute__((always_inline)) int64_t count() const { return samples * width; }
  };

  __attribute__((always_inline)) StepTiles(int64_t samples, int64_t size)
      : samples(samples), size(size), samples_each(1), pieces(1), piece(size) {
    constexpr int64_t kShort = kShortTile / 4;
    if (size <= kShort) {
      samples_each = kShortTile / (size > 1 ? size : 1);
    } else {
      constexpr int64_t kMultiple = 128;
      const int64_t least = (size + kStepTile - 1) / kStepTile;
      piece = math::round_up((size + least - 1) / least, kMultiple);
      pieces = (size + piece - 1) / piece;
    }
  }

  __attribute__((always_inline)) int64_t count() const {
    return (samples + samples_each - 1) / samples_each * pieces;
  }

  __attribute__((always_inline)) Place place(int64_t tile) const {
    const int64_t sample = tile / pieces * samples_each, begin = tile % pieces * piece;
    const int64_t rest = samples - sample, width = size - begin;
    return {sample, rest < samples_each ? rest : samples_each, begin,
            width < piece ? width : piece};
  }
};

struct StepTensor {
  const void* data;  // [samples][size], or nullptr where there is none
  Dtype dtype;
};

// Numbers of the compute type: double where results are float64, else float.
struct StepNumbers {
  const void* data;  // [1] or, `each`, [samples]; or nullptr
  bool each;
};

struct OdeStepArgs {
  int64_t samples, size;
  StepTensor tensors[math::kStepTensors];
  const double* table;  // [rows][13] or, `table_each`, [samples][rows][13]
  bool table_each;
  int rows;
  int64_t scaled;
  StepNumbers factor, threshold;
  const int64_t* keys;  // [samples][2], or nullptr
  bool stochastic;
  bool streams;  // whether what is written is to bypass the caches
  Dtype dtype;   // of the results
  void* out;
  void* kept[math::kStepRows - 1];  // or nullptr

  __attribute__((always_inline)) StepTiles tiles() const { return {samples, size}; }
};

struct CounterArgs {
  int64_t samples, size;
  const int64_t* keys;  // [samples][2]
  uint32_t draw;
  int64_t* words;  // [samples][size], one of the two
  float* normals;

  __attribute__((always_inline)) StepTiles tiles() const { return {samples, size}; }
};

// Of a piece: the sum of squares is of distances from the mean.
struct Moments {
  double mean, squares;
};

struct GuidanceArgs {
  int64_t samples, size;
  StepTensor cond, uncond;
  Dtype dtype;           // double, or what is computed as float
  StepNumbers guidance;  // of doubles
  Moments* parts;        // [samples][pieces][2]: of cond, and of what is guided

  __attribute__((always_inline)) StepTiles tiles() const { return {samples, size}; }
};

struct StepErrorArgs {
  int64_t samples, size;
  StepTensor tensors[math::kStepTensors];
  Dtype dtype;
  double weights[math::kStepTensors];
  StepNumbers factor;
  double rtol, atol;
  double* parts;  // [samples][pieces]: the sums of squares

  __attribute__((always_inline)) StepTiles tiles() const { return {samples, size}; }
};

// Of tiles [begin, end).
FASTZOO_DECLARE_KERNEL(ode_step, (const OdeStepArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(counter_numbers, (const CounterArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(guidance_moments, (const GuidanceArgs&, int64_t begin, int64_t end))
FASTZOO_DECLARE_KERNEL(step_error, (const StepErrorArgs&, int64_t begin, int64_t end))

}  // namespace fastzoo::cpu
