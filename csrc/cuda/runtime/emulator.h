// The kernel vocabulary of runtime.h on the host. The threads of a block are fibers of one host
// thread: each runs until it waits for others, and which of those that can run does so can be
// chosen, so that a missing barrier shows. Blocks run one after another.
// Reported as an EmulationError, thrown by the launch: a barrier or a warp collective that some
// thread never reaches, a shared array's index out of range, a misaligned vector access, a shuffle
// from a lane that takes no part, a wait for a block that has not run. Shared memory holds NaN at
// the start of each block.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

// The launch's own variables below stand for CUDA's of the same name.
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace fastzoo::cuda {

// Few, so that a block of a small input already has several tiles to go over.
constexpr int kManyBlocks = 3;

class EmulationError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// The line of the kernel that waits, for the report.
struct Site {
  const char* file;
  int line;
};

enum class Collective { sync_block, sync_warp, shuffle, ballot, load_matrices, mma };

// Waits for every thread of the block, or for every lane of the mask. Gives a shuffle the value
// that lane `source` brought, a ballot the lanes whose value is not 0. For products of matrices the
// value is the address of the lane's part, below.
void wait_for_block(Site site);
uint64_t wait_for_lanes(Collective kind, uint32_t mask, uint64_t value, int source, Site site);

struct MatricesPart {
  const uint16_t* row;
  uint32_t loaded[4];
};

struct MmaPart {
  MmaType type;
  float* sums;
  const uint32_t* a;
  uint32_t b[2];
};

[[noreturn]] void fail(const std::string& what);
void register_shared(void* data, size_t bytes);
inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) %
                          kWarpSize);
}

// "forward", "reverse" or "random:SEED"; nullptr returns to FASTZOO_EMULATOR_ORDER, which is
// forward where it is not set.
void set_order(const char* order);

void run(const char* name, dim3 grid, dim3 block, void (*body)(void*), void* context);

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::common_type_t<Parameters>... arguments) {
  const auto call = [&] { kernel(arguments...); };
  run(
      name, grid, block, [](void* context) { (*static_cast<decltype(call)*>(context))(); },
      const_cast<void*>(static_cast<const void*>(&call)));
}

template <class T>
T exchange(T value, int source, uint32_t mask, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = wait_for_lanes(Collective::shuffle, mask, bits, source, site);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void check_alignment(const void* address, int alignment) {
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment) != 0) {
    fail("misaligned vector access: an address that is no multiple of " +
         std::to_string(alignment) + " bytes");
  }
}

}  // namespace emulator

#define FASTZOO_SITE ::fastzoo::cuda::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void sync_block(FASTZOO_SITE) { emulator::wait_for_block(site); }
inline void sync_warp(uint32_t mask = kWholeWarp, FASTZOO_SITE) {
  emulator::wait_for_lanes(emulator::Collective::sync_warp, mask, 0, emulator::lane(), site);
}

template <class T>
T shuffle(T value, int source, uint32_t mask = kWholeWarp, FASTZOO_SITE) {
  return emulator::exchange(value, source % kWarpSize, mask, site);
}
template <class T>
T shuffle_up(T value, int distance, uint32_t mask = kWholeWarp, FASTZOO_SITE) {
  const int lane = emulator::lane();
  return emulator::exchange(value, lane < distance ? lane : lane - distance, mask, site);
}
template <class T>
T shuffle_down(T value, int distance, uint32_t mask = kWholeWarp, FASTZOO_SITE) {
  const int lane = emulator::lane();
  const int source = lane + distance;
  return emulator::exchange(value, source < kWarpSize ? source : lane, mask, site);
}
template <class T>
T shuffle_xor(T value, int flip, uint32_t mask = kWholeWarp, FASTZOO_SITE) {
  return emulator::exchange(value, emulator::lane() ^ flip, mask, site);
}
inline uint32_t ballot(bool vote, uint32_t mask = kWholeWarp, FASTZOO_SITE) {
  return static_cast<uint32_t>(
      emulator::wait_for_lanes(emulator::Collective::ballot, mask, vote, emulator::lane(), site));
}
inline bool any(bool vote, uint32_t mask = kWholeWarp, FASTZOO_SITE) {
  return ballot(vote, mask, site) != 0;
}
inline bool all(bool vote, uint32_t mask = kWholeWarp, FASTZOO_SITE) {
  return ballot(vote, mask, site) == mask;
}

inline uint32_t warp_min(uint32_t value, FASTZOO_SITE) {
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
    const uint32_t other = shuffle_xor(value, flip, kWholeWarp, site);
    if (other < value) value = other;
  }
  return value;
}

template <MmaType type>
void mma(float (&sums)[4], const Vector<uint32_t, 4>& a, uint32_t b0, uint32_t b1, FASTZOO_SITE) {
  emulator::MmaPart part{type, sums, a.values, {b0, b1}};
  emulator::wait_for_lanes(emulator::Collective::mma, kWholeWarp, reinterpret_cast<uint64_t>(&part),
                           emulator::lane(), site);
}

template <class T>
T atomic_exchange(T* address, T value) {
  const T before = *address;
  *address = value;
  return before;
}
template <class T>
T atomic_add(T* address, T value) {
  return atomic_exchange(address, static_cast<T>(*address + value));
}
template <class T>
T atomic_max(T* address, T value) {
  return atomic_exchange(address, *address < value ? value : *address);
}
template <class T>
T atomic_compare_exchange(T* address, T expected, T value) {
  return atomic_exchange(address, *address == expected ? value : *address);
}
template <class T>
T load_volatile(const T* address) {
  return *address;
}
inline void thread_fence() {}
inline void wait_for_other_block() {
  emulator::fail("a wait for a block that has not run: blocks run one after another");
}

template <int n, class T>
Vector<T, n> load_vector(const T* address) {
  emulator::check_alignment(address, Vector<T, n>::kAlignment);
  Vector<T, n> vector;
  __builtin_memcpy(vector.values, address, sizeof(vector.values));
  return vector;
}

template <class T, int n>
void store_vector(T* address, const Vector<T, n>& vector) {
  emulator::check_alignment(address, Vector<T, n>::kAlignment);
  __builtin_memcpy(address, vector.values, sizeof(vector.values));
}

template <class T, int n>
void store_global(T* address, const Vector<T, n>& vector) {
  store_vector(address, vector);
}

inline float fused_multiply_add(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float fast_exponential(float x) { return std::exp(x); }
inline double fast_exponential(double x) { return std::exp(x); }
inline int population_count(uint32_t bits) { return __builtin_popcount(bits); }
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

// Static, so that all threads of the block see one array; a block starts with it poisoned.
template <class T, int n>
class SharedArray {
 public:
  SharedArray() { emulator::register_shared(values_, sizeof(values_)); }

  T& operator[](int64_t i) { return *at(i, 1); }
  template <int m>
  Vector<T, m> load(int64_t i) {
    return load_vector<m>(at(i, m));
  }
  template <int m>
  void store(int64_t i, const Vector<T, m>& vector) {
    store_vector(at(i, m), vector);
  }
  Vector<uint32_t, 4> load_matrices(int64_t i, FASTZOO_SITE) {
    static_assert(sizeof(T) == 2, "load_matrices moves elements of 16 bits");
    const T* row = at(i, 8);
    emulator::check_alignment(row, 16);
    emulator::MatricesPart part{reinterpret_cast<const uint16_t*>(row), {}};
    emulator::wait_for_lanes(emulator::Collective::load_matrices, kWholeWarp,
                             reinterpret_cast<uint64_t>(&part), emulator::lane(), site);
    Vector<uint32_t, 4> loaded;
    __builtin_memcpy(loaded.values, part.loaded, sizeof(loaded));
    return loaded;
  }

 private:
  T* at(int64_t i, int count) {
    if (i < 0 || i + count > n) {
      emulator::fail("shared index out of range: " + std::to_string(i) + " to " +
                     std::to_string(i + count - 1) + " of " + std::to_string(n));
    }
    return values_ + i;
  }

  alignas(16) T values_[n];
};

template <class Arrays>
Arrays& large_shared() {
  static Arrays arrays;
  return arrays;
}

#undef FASTZOO_SITE

}  // namespace fastzoo::cuda
