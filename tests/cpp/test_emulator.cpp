// The host emulator: correct kernels give the right answer in every order of their threads, and
// each planted fault is reported.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/runtime/runtime.h"

namespace fastzoo::cuda {
namespace {

int failures = 0;

const char* const kOrders[] = {"forward", "reverse", "random:1", "random:2"};
constexpr int kThreads = 96;

// What the launch reports, or "" where it succeeds.
template <class... Parameters, class... Arguments>
std::string error_of(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  try {
    emulator::launch("planted", kernel, grid, block, arguments...);
  } catch (const EmulationError& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

__global__ void block_sum(const int* in, int* out) {
  __shared__ SharedArray<int, kThreads> partial;
  const int thread = threadIdx.x;
  partial[thread] = in[blockIdx.x * blockDim.x + thread];
  for (int width = kThreads; width > 1;) {
    const int half = (width + 1) / 2;
    sync_block();
    if (thread + half < width) partial[thread] += partial[thread + half];
    width = half;
  }
  if (thread == 0) out[blockIdx.x] = partial[0];
}

__global__ void warp_scan(const int* in, int* out) {
  int sum = in[threadIdx.x];
  const int lane = threadIdx.x % kWarpSize;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = shuffle_up(sum, distance);
    if (lane >= distance) sum += before;
  }
  out[threadIdx.x] = sum;
}

// Each half of the warp works alone, at its own pace.
__global__ void half_warps(uint32_t* out) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  uint32_t votes = 0;
  for (int round = 0; round <= lane / 16; ++round) votes = ballot(lane % 2 == round, mask);
  const bool some = any(lane == 20, mask);
  const bool every = all(lane >= 16, mask);
  sync_warp();
  out[threadIdx.x] = votes + (some ? 1 : 0) + (every ? 2 : 0);
}

__global__ void exchange_lanes(double* xor_out, int* down_out, int64_t* broadcast_out) {
  const int thread = threadIdx.x;
  xor_out[thread] = shuffle_xor(thread + 0.5, 5);
  down_out[thread] = shuffle_down(thread, 3);
  broadcast_out[thread] = shuffle(int64_t{1} << 40 | thread, 7);
}

__global__ void count_all(uint64_t* total, uint64_t* largest, uint64_t* tickets) {
  const uint64_t index = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  tickets[atomic_add(total, uint64_t{1})] += 1;
  atomic_max(largest, index);
}

// The first thread of a place to come takes it; each warp's least place goes to `least`.
__global__ void take_places(uint32_t* places, int* taken, uint32_t* least) {
  const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t before = atomic_compare_exchange(places + index / 2, 0u, index + 1);
  if (before == 0) atomic_add(taken, 1);
  const uint32_t lowest = warp_min(1000 - index);
  if (lowest_bit(ballot(lowest == 1000 - index)) == static_cast<int>(threadIdx.x % kWarpSize)) {
    least[index / kWarpSize] = lowest;
  }
}

__global__ void copy_vectors(const float* in, float* out) {
  __shared__ SharedArray<float, 4 * kThreads> staged;
  const int i = 4 * threadIdx.x;
  staged.store(i, load_vector<4>(in + i));
  sync_block();
  const int other = 4 * (kThreads - 1 - static_cast<int>(threadIdx.x));
  store_vector(out + i, staged.load<4>(other));
}

// sums[16, 8] += a[16, 16] b[8, 16]^T, the operands' registers put together by hand.
template <MmaType type>
__global__ void multiply_from_registers(const uint16_t* a, const uint16_t* b, float* sums) {
  const int lane = threadIdx.x;
  const int row = lane / 4, pair = lane % 4 * 2;
  const auto two = [](const uint16_t* from) {
    return from[0] | static_cast<uint32_t>(from[1]) << 16;
  };
  Vector<uint32_t, 4> left;
  for (int i = 0; i < 4; ++i) left[i] = two(a + (row + i % 2 * 8) * 16 + pair + i / 2 * 8);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = sums[(row + i / 2 * 8) * 8 + pair + i % 2];
  mma<type>(sum, left, two(b + row * 16 + pair), two(b + row * 16 + pair + 8));
  for (int i = 0; i < 4; ++i) sums[(row + i / 2 * 8) * 8 + pair + i % 2] = sum[i];
}

template <MmaType type>
__global__ void multiply_from_shared(const uint16_t* a, const uint16_t* b, float* sums) {
  constexpr int kPitch = 24;
  __shared__ SharedArray<uint16_t, 24 * kPitch> staged;
  const int lane = threadIdx.x;
  for (int i = lane; i < 24 * 16; i += kWarpSize) {
    staged[i / 16 * kPitch + i % 16] = i < 16 * 16 ? a[i] : b[i - 16 * 16];
  }
  sync_warp();
  const Vector<uint32_t, 4> left = staged.load_matrices(lane % 16 * kPitch + lane / 16 * 8);
  const Vector<uint32_t, 4> right =
      staged.load_matrices((16 + lane % 8) * kPitch + lane / 8 % 2 * 8);
  float sum[4] = {};
  mma<type>(sum, left, right[0], right[1]);
  const int row = lane / 4, pair = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) sums[(row + i / 2 * 8) * 8 + pair + i % 2] += sum[i];
}

// Small whole numbers and quarters, of either type, exactly.
uint16_t bits_of(MmaType type, float value) {
  if (type == MmaType::bfloat16) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<uint16_t>(bits >> 16);
  }
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}

template <MmaType type>
void test_products() {
  float a[16][16], b[8][16];
  uint16_t a_bits[16][16], b_bits[8][16];
  const auto fill = [](int i, int k) {
    return static_cast<float>((i * 37 + k * 11) % 29 - 14) / 4;
  };
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 16; ++i) a_bits[i][k] = bits_of(type, a[i][k] = fill(i, k));
    for (int j = 0; j < 8; ++j) b_bits[j][k] = bits_of(type, b[j][k] = fill(j + 50, 3 * k));
  }
  using Kernel = void (*)(const uint16_t*, const uint16_t*, float*);
  for (const Kernel kernel :
       {Kernel{multiply_from_registers<type>}, Kernel{multiply_from_shared<type>}}) {
    float sums[16][8];
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) sums[i][j] = static_cast<float>(8 * i + j);
    }
    emulator::launch("products", kernel, 1, kWarpSize, a_bits[0], b_bits[0], sums[0]);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        float expected = static_cast<float>(8 * i + j);
        for (int k = 0; k < 16; ++k) expected += a[i][k] * b[j][k];
        CHECK(sums[i][j] == expected);
      }
    }
  }
}

void test_correct_kernels() {
  std::vector<int> in(2 * kThreads);
  for (int i = 0; i < 2 * kThreads; ++i) in[i] = i * i % 37 - 11;
  for (const char* order : kOrders) {
    emulator::set_order(order);

    int sums[2];
    emulator::launch("block_sum", block_sum, 2, kThreads, in.data(), sums);
    int expected[2] = {};
    for (int i = 0; i < 2 * kThreads; ++i) expected[i / kThreads] += in[i];
    CHECK(sums[0] == expected[0] && sums[1] == expected[1]);

    int scanned[kThreads];
    emulator::launch("warp_scan", warp_scan, 1, kThreads, in.data(), scanned);
    for (int i = 0, sum = 0; i < kThreads; ++i) {
      sum = (i % kWarpSize == 0 ? 0 : sum) + in[i];
      CHECK(scanned[i] == sum);
    }

    uint32_t votes[kWarpSize];
    emulator::launch("half_warps", half_warps, 1, kWarpSize, votes);
    for (int i = 0; i < kWarpSize; ++i) CHECK(votes[i] == (i < 16 ? 0x5555u : 0xaaaa0000u + 3));

    double flipped[kWarpSize];
    int down[kWarpSize];
    int64_t broadcast[kWarpSize];
    emulator::launch("exchange_lanes", exchange_lanes, 1, kWarpSize, flipped, down, broadcast);
    for (int i = 0; i < kWarpSize; ++i) {
      CHECK(flipped[i] == (i ^ 5) + 0.5);
      CHECK(down[i] == (i + 3 < kWarpSize ? i + 3 : i));
      CHECK(broadcast[i] == (int64_t{1} << 40 | 7));
    }

    uint64_t total = 0, largest = 0;
    std::vector<uint64_t> tickets(3 * kThreads, 0);
    emulator::launch("count_all", count_all, 3, kThreads, &total, &largest, tickets.data());
    CHECK(total == 3 * kThreads && largest == 3 * kThreads - 1);
    for (const uint64_t taken : tickets) CHECK(taken == 1);

    uint32_t places[kThreads / 2] = {}, least[kThreads / kWarpSize];
    int places_taken = 0;
    emulator::launch("take_places", take_places, 1, kThreads, places, &places_taken, least);
    CHECK(places_taken == kThreads / 2);
    for (uint32_t i = 0; i < kThreads / 2; ++i) CHECK((places[i] - 1) / 2 == i);
    for (uint32_t warp = 0; warp < kThreads / kWarpSize; ++warp) {
      CHECK(least[warp] == 1000 - warp * kWarpSize - (kWarpSize - 1));
    }

    alignas(16) float from[4 * kThreads], to[4 * kThreads];
    for (int i = 0; i < 4 * kThreads; ++i) from[i] = static_cast<float>(i);
    emulator::launch("copy_vectors", copy_vectors, 1, kThreads, from, to);
    for (int i = 0; i < kThreads; ++i) {
      for (int j = 0; j < 4; ++j) CHECK(to[4 * i + j] == from[4 * (kThreads - 1 - i) + j]);
    }

    test_products<MmaType::float16>();
    test_products<MmaType::bfloat16>();
  }
}

__global__ void neighbour_without_barrier(float* out) {
  __shared__ SharedArray<float, kThreads> values;
  values[threadIdx.x] = 1.0f;
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

// The first warp overwrites what the others have yet to read: only a warp that gets ahead of them
// shows it, because each stops to vote between reading and writing.
__global__ void overwrite_without_barrier(int* out) {
  __shared__ SharedArray<int, 1> value;
  if (threadIdx.x == 0) value[0] = 0;
  sync_block();
  out[threadIdx.x] = value[0];
  (void)any(true);
  if (threadIdx.x == 0) value[0] = 1;
}

__global__ void early_return(int* out) {
  if (threadIdx.x == 40) return;
  sync_block();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers() {
  if (threadIdx.x < 50) {
    sync_block();
  } else {
    sync_block();
  }
}

__global__ void barrier_against_vote(int* out) {
  if (threadIdx.x < 3) {
    sync_block();
  } else {
    out[threadIdx.x] = any(true);
  }
}

__global__ void shared_index(int index) {
  __shared__ SharedArray<int, 8> values;
  values[index] = 0;
}

__global__ void shared_vector_index(int index) {
  __shared__ SharedArray<float, 10> values;
  values.store(index, Vector<float, 4>{});
}

__global__ void vector_at(const float* in, float* out, int shift) {
  store_vector(out, load_vector<4>(in + shift));
}

__global__ void shared_vector_at(int shift) {
  __shared__ SharedArray<double, 8> values;
  (void)values.load<2>(shift);
}

__global__ void lane_left(int* out) {
  if (threadIdx.x == 33) return;
  out[threadIdx.x] = any(true);
}

__global__ void lane_without_product() {
  if (threadIdx.x == 9) return;
  float sums[4] = {};
  mma<MmaType::float16>(sums, {}, 0, 0);
}

__global__ void matrices_at(int index) {
  __shared__ SharedArray<uint16_t, 64> values;
  (void)values.load_matrices(index);
}

__global__ void not_in_own_mask(int* out) { out[threadIdx.x] = any(true, 0x7fffffffu); }

__global__ void shuffle_from_outside() { (void)shuffle(1, 9, threadIdx.x == 9 ? 0x200u : 0x1ffu); }

__global__ void wait_for_later_block() {
  if (blockIdx.x == 0) wait_for_other_block();
}

void test_planted_faults() {
  bool poison_seen = false;
  bool overwrite_seen = false;
  for (const char* order : kOrders) {
    emulator::set_order(order);
    float out[kThreads];
    int ints[2 * kThreads] = {};

    emulator::launch("planted", neighbour_without_barrier, 1, kThreads, out);
    for (const float value : out) poison_seen = poison_seen || value != value;

    emulator::launch("planted", overwrite_without_barrier, 1, kThreads, ints);
    for (int i = 0; i < kThreads; ++i) overwrite_seen = overwrite_seen || ints[i] != 0;

    std::string error = error_of(early_return, 1, kThreads, ints);
    CHECK(contains(error, "divergent barrier") && contains(error, "thread 40 has exited"));
    CHECK(contains(error, "planted, block (0, 0, 0)") && contains(error, "test_emulator.cpp:"));
    CHECK(contains(error_of(two_barriers, 1, kThreads), "divergent barrier"));
    CHECK(error_of(barrier_against_vote, 1, kWarpSize, ints) != "");

    CHECK(error_of(shared_index, 1, 1, 7) == "");
    CHECK(contains(error_of(shared_index, 1, 1, 8), "shared index out of range: 8"));
    CHECK(contains(error_of(shared_index, 1, 1, -1), "shared index out of range: -1"));
    CHECK(error_of(shared_vector_index, 1, 1, 4) == "");
    CHECK(contains(error_of(shared_vector_index, 1, 1, 8), "shared index out of range: 8 to 11"));

    alignas(16) float data[8] = {};
    alignas(16) float target[4];
    CHECK(error_of(vector_at, 1, 1, data, target, 4) == "");
    CHECK(contains(error_of(vector_at, 1, 1, data, target, 1), "misaligned vector access"));
    CHECK(error_of(shared_vector_at, 1, 1, 2) == "");
    CHECK(contains(error_of(shared_vector_at, 1, 1, 1), "misaligned vector access"));

    error = error_of(lane_left, 1, kThreads, ints);
    CHECK(contains(error, "lane missing from a warp collective: thread 32 waits at ballot"));
    CHECK(contains(error, "thread 33 has exited"));
    CHECK(contains(error_of(lane_left, 1, 40, ints), "thread 33 has exited"));
    CHECK(contains(error_of(lane_left, 1, 20, ints), "thread 20 does not exist"));
    error = error_of(lane_without_product, 1, kWarpSize);
    CHECK(contains(error, "lane missing from a warp collective: thread 0 waits at mma"));
    CHECK(contains(error, "thread 9 has exited"));
    CHECK(error_of(matrices_at, 1, kWarpSize, 56) == "");
    CHECK(contains(error_of(matrices_at, 1, kWarpSize, 57), "shared index out of range: 57 to 64"));
    CHECK(contains(error_of(matrices_at, 1, kWarpSize, 4), "misaligned vector access"));
    CHECK(contains(error_of(matrices_at, 1, 8, 0), "thread 8 does not exist"));
    CHECK(contains(error_of(not_in_own_mask, 1, kWarpSize, ints), "not in its own mask"));
    CHECK(contains(error_of(shuffle_from_outside, 1, 10), "not in the mask"));
    CHECK(contains(error_of(wait_for_later_block, 2, kWarpSize), "has not run"));
    CHECK(contains(error_of(wait_for_later_block, 1, 1025), "cannot be launched"));
    CHECK(contains(error_of(wait_for_later_block, 0, 1), "cannot be launched"));
  }
  CHECK(poison_seen);
  CHECK(overwrite_seen);

  emulator::set_order("sideways");
  CHECK(contains(error_of(shared_index, 1, 1, 0), "expected forward, reverse or random:SEED"));
  emulator::set_order(nullptr);
}

// Poison returns with every block, so that no block reads what another one left.
__global__ void read_before_write(float* out) {
  __shared__ SharedArray<float, 1> value;
  out[blockIdx.x] = value[0];
  value[0] = 1.0f;
}

void test_poison_in_every_block() {
  float out[3];
  emulator::launch("read_before_write", read_before_write, 3, 1, out);
  for (const float value : out) CHECK(value != value);
}

// A fault unwinds every thread of the block.
struct Witness {
  explicit Witness(int* alive) : alive(alive) { ++*alive; }
  ~Witness() { --*alive; }
  int* alive;
};

__global__ void fault_beside_waiting_threads(int* alive) {
  const Witness witness(alive);
  __shared__ SharedArray<int, 4> values;
  if (threadIdx.x == 50) values[4] = 0;
  sync_block();
}

void test_unwinding() {
  for (const char* order : kOrders) {
    emulator::set_order(order);
    int alive = 0;
    CHECK(
        contains(error_of(fault_beside_waiting_threads, 1, kThreads, &alive), "thread (50, 0, 0)"));
    CHECK(alive == 0);
  }
}

}  // namespace
}  // namespace fastzoo::cuda

int main() {
  fastzoo::cuda::test_correct_kernels();
  fastzoo::cuda::test_planted_faults();
  fastzoo::cuda::test_poison_in_every_block();
  fastzoo::cuda::test_unwinding();
  if (fastzoo::cuda::failures == 0) std::printf("ok\n");
  return fastzoo::cuda::failures;
}
