// glibc's checked longjmp takes a change of stacks for a corrupted one.
#undef _FORTIFY_SOURCE

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "runtime.h"

namespace fastzoo::cuda {

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMostThreads = 1024;

enum class State { fresh, running, waiting, exited };

// Which threads can run, and which of them does: always the first in an order of preference, so
// that a warp runs as far ahead of the others as the kernel lets it.
class Schedule {
 public:
  static constexpr int kNone = -1;

  Schedule(const std::string& order, int threads)
      : by_rank_(threads), rank_(threads), ready_((threads + 63) / 64) {
    std::iota(by_rank_.begin(), by_rank_.end(), 0);
    const std::string random = "random:";
    if (order == "reverse") {
      std::reverse(by_rank_.begin(), by_rank_.end());
    } else if (order.compare(0, random.size(), random) == 0) {
      shuffled_ = true;
      generator_.seed(std::strtoull(order.c_str() + random.size(), nullptr, 10));
    } else if (order != "forward") {
      throw EmulationError("FASTZOO_EMULATOR_ORDER=" + order +
                           ": expected forward, reverse or random:SEED");
    }
  }

  // All threads can run, at a block's start and after a barrier.
  void release_all() {
    if (shuffled_) shuffle();
    for (size_t i = 0; i < by_rank_.size(); ++i) rank_[by_rank_[i]] = static_cast<int>(i);
    for (size_t i = 0; i < by_rank_.size(); ++i) release(static_cast<int>(i));
  }

  void release(int thread) { ready_[rank_[thread] / 64] |= uint64_t{1} << rank_[thread] % 64; }

  // The next thread to run, until it is released again; kNone where all wait.
  int take() {
    for (size_t word = 0; word < ready_.size(); ++word) {
      if (ready_[word] == 0) continue;
      const int bit = __builtin_ctzll(ready_[word]);
      ready_[word] &= ready_[word] - 1;
      return by_rank_[word * 64 + bit];
    }
    return kNone;
  }

 private:
  // At times warp by warp, so that one gets ahead, at times with all their threads mixed.
  void shuffle() {
    std::shuffle(by_rank_.begin(), by_rank_.end(), generator_);
    if (generator_() % 2 == 0) return;
    uint64_t key[kMostThreads / kWarpSize];
    for (uint64_t& warp : key) warp = generator_();
    std::stable_sort(by_rank_.begin(), by_rank_.end(),
                     [&](int a, int b) { return key[a / kWarpSize] < key[b / kWarpSize]; });
  }

  std::vector<int> by_rank_;
  std::vector<int> rank_;
  std::vector<uint64_t> ready_;
  bool shuffled_ = false;
  std::mt19937_64 generator_;
};

// What a waiting thread waits for; those who wait for one another agree in all of it.
struct Meeting {
  Collective kind;
  uint32_t mask;
  Site site;
  bool operator==(const Meeting& other) const {
    return kind == other.kind && mask == other.mask && site.line == other.site.line &&
           std::strcmp(site.file, other.site.file) == 0;
  }
};

// A stack that runs one thread of each block. It is started once and then only jumped into,
// because setcontext costs a system call and _longjmp does not.
class Fiber {
 public:
  Fiber();
  ~Fiber() { munmap(memory_, kStackBytes + guard_); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();
  void suspend();

  dim3 index;
  State state = State::exited;
  Meeting meeting;
  uint64_t value;
  int source;

 private:
  size_t guard_;
  void* memory_;
  ucontext_t start_;
  jmp_buf position_;
  bool started_ = false;
};

// Unwinds a thread that can no longer go on.
struct Cancelled {};

struct SharedMemory {
  void* data;
  size_t bytes;
};

// The one emulated device: a launch holds the lock. Plain variables rather than thread-local
// ones: a compiler may keep a thread-local address across the switch of a fiber.
struct Device {
  std::mutex lock;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<SharedMemory> shared;
  std::string forced_order;

  jmp_buf scheduler;
  Fiber* running = nullptr;
  Schedule* schedule = nullptr;
  int threads = 0;
  int at_barrier = 0;
  std::vector<uint32_t> lanes_waiting;  // one mask a warp

  const char* kernel = nullptr;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::exception_ptr error;
  bool cancelling = false;
};

Device& device() {
  static Device device;
  return device;
}

void fiber_main() {
  Device& d = device();
  for (;;) {
    try {
      d.body(d.context);
    } catch (const Cancelled&) {
    } catch (...) {
      if (!d.error) d.error = std::current_exception();
    }
    d.running->state = State::exited;
    d.running->suspend();
  }
}

Fiber::Fiber() : guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
  memory_ = mmap(nullptr, kStackBytes + guard_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory_, guard_, PROT_NONE);  // stacks grow down into it
  getcontext(&start_);
  start_.uc_stack.ss_sp = static_cast<char*>(memory_) + guard_;
  start_.uc_stack.ss_size = kStackBytes;
  start_.uc_link = nullptr;
  makecontext(&start_, fiber_main, 0);
}

void Fiber::resume() {
  Device& d = device();
  d.running = this;
  threadIdx = index;
  if (_setjmp(d.scheduler) != 0) return;
  if (started_) _longjmp(position_, 1);
  started_ = true;
  setcontext(&start_);
}

void Fiber::suspend() {
  if (_setjmp(position_) == 0) _longjmp(device().scheduler, 1);
}

std::string text(const dim3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string text(const Meeting& meeting) {
  static const char* const names[] = {"sync_block", "sync_warp",     "shuffle",
                                      "ballot",     "load_matrices", "mma"};
  return std::string(names[static_cast<int>(meeting.kind)]) + " (" + meeting.site.file + ":" +
         std::to_string(meeting.site.line) + ")";
}

// Says why no thread can go on: the first one that waits, and one that it waits for in vain.
std::string describe_deadlock(const Device& d) {
  const auto waits = [&](int i) { return i < d.threads && d.fibers[i]->state == State::waiting; };
  int first = 0;
  while (!waits(first)) ++first;
  const Meeting& meeting = d.fibers[first]->meeting;
  const bool whole_block = meeting.kind == Collective::sync_block;
  const int begin = whole_block ? 0 : first / kWarpSize * kWarpSize;
  const int end = whole_block ? d.threads : begin + kWarpSize;
  int missing = begin;
  while ((!whole_block && (meeting.mask >> (missing - begin) & 1) == 0) ||
         (waits(missing) && d.fibers[missing]->meeting == meeting)) {
    if (++missing == end) return "deadlock";
  }
  const std::string other = missing >= d.threads ? " does not exist"
                            : waits(missing)     ? " waits at " + text(d.fibers[missing]->meeting)
                                                 : " has exited";
  return std::string(whole_block ? "divergent barrier" : "lane missing from a warp collective") +
         ": thread " + std::to_string(first) + " waits at " + text(meeting) + ", but thread " +
         std::to_string(missing) + other;
}

void cancel(Device& d) {
  d.cancelling = true;
  for (int i = 0; i < d.threads; ++i) {
    Fiber& fiber = *d.fibers[i];
    if (fiber.state == State::running || fiber.state == State::waiting) fiber.resume();
    fiber.state = State::exited;
  }
  d.cancelling = false;
}

void run_block(Device& d) {
  for (const SharedMemory& memory : d.shared) std::memset(memory.data, 0xff, memory.bytes);
  for (int i = 0; i < d.threads; ++i) d.fibers[i]->state = State::fresh;
  d.at_barrier = 0;
  std::fill(d.lanes_waiting.begin(), d.lanes_waiting.end(), 0);
  d.schedule->release_all();
  for (int left = d.threads; left > 0;) {
    const int next = d.schedule->take();
    if (next == Schedule::kNone) {
      d.error = std::make_exception_ptr(EmulationError(
          std::string(d.kernel) + ", block " + text(blockIdx) + ": " + describe_deadlock(d)));
    } else {
      Fiber& fiber = *d.fibers[next];
      fiber.state = State::running;
      fiber.resume();
      if (fiber.state == State::exited) --left;
    }
    if (d.error) return cancel(d);
  }
}

// Returns once the thread is released and its turn has come.
void wait_for_turn(Device& d) {
  d.running->suspend();
  if (d.cancelling) throw Cancelled();
}

void exchange_matrices(const uint64_t* brought) {
  const auto part = [&](int lane) { return reinterpret_cast<MatricesPart*>(brought[lane]); };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint16_t* row = part(8 * matrix + lane / 4)->row;
      std::memcpy(&part(lane)->loaded[matrix], row + 2 * (lane % 4), sizeof(uint32_t));
    }
  }
}

double element(MmaType type, uint32_t pair, int which) {
  const uint32_t bits = pair >> (16 * which) & 0xffffu;
  if (type == MmaType::bfloat16) {
    const uint32_t wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  const int exponent = static_cast<int>(bits >> 10 & 31);
  const int fraction = static_cast<int>(bits & 1023);
  const double size = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -size : size;
}

// Summed in double, and rounded once; hardware rounds otherwise, and no better than fp32.
void multiply_matrices(const uint64_t* brought) {
  const auto part = [&](int lane) { return reinterpret_cast<MmaPart*>(brought[lane]); };
  double a[16][16], b[8][16];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaPart& held = *part(lane);
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 4; ++half) {
        a[row + half % 2 * 8][pair + half / 2 * 8 + i] = element(held.type, held.a[half], i);
      }
      b[row][pair + i] = element(held.type, held.b[0], i);
      b[row][pair + 8 + i] = element(held.type, held.b[1], i);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = part(lane)->sums[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      part(lane)->sums[i] = static_cast<float>(sum);
    }
  }
}

int position(const Device& d) {
  const dim3& t = d.running->index;
  return static_cast<int>(t.x + blockDim.x * (t.y + blockDim.y * t.z));
}

}  // namespace

void wait_for_block(Site site) {
  Device& d = device();
  const Meeting meeting{Collective::sync_block, 0, site};
  d.running->meeting = meeting;
  d.running->state = State::waiting;
  bool complete = ++d.at_barrier == d.threads;
  for (int i = 0; complete && i < d.threads; ++i) complete = d.fibers[i]->meeting == meeting;
  if (complete) {
    d.at_barrier = 0;
    d.schedule->release_all();
  }
  wait_for_turn(d);
}

uint64_t wait_for_lanes(Collective kind, uint32_t mask, uint64_t value, int source, Site site) {
  Device& d = device();
  Fiber& self = *d.running;
  const int warp = position(d) / kWarpSize;
  const int lane = position(d) % kWarpSize;
  const auto at = [&](int i) -> Fiber& { return *d.fibers[warp * kWarpSize + i]; };
  if ((mask >> lane & 1) == 0) fail("lane " + std::to_string(lane) + " is not in its own mask");
  if ((mask >> source & 1) == 0) {
    fail("shuffle from lane " + std::to_string(source) + ", which is not in the mask");
  }
  self.meeting = {kind, mask, site};
  self.state = State::waiting;
  self.value = value;
  self.source = source;
  uint32_t& waiting = d.lanes_waiting[warp];
  waiting |= 1u << lane;

  bool complete = (waiting & mask) == mask;
  for (int i = 0; complete && i < kWarpSize; ++i) {
    if (mask >> i & 1) complete = at(i).meeting == self.meeting;
  }
  if (complete) {
    uint64_t brought[kWarpSize];
    uint64_t votes = 0;
    for (int i = 0; i < kWarpSize; ++i) {
      if ((mask >> i & 1) == 0) continue;
      brought[i] = at(i).value;
      votes |= static_cast<uint64_t>(brought[i] != 0) << i;
    }
    // The lanes wait, so that their parts stand on their stacks.
    if (kind == Collective::load_matrices) exchange_matrices(brought);
    if (kind == Collective::mma) multiply_matrices(brought);
    for (int i = 0; i < kWarpSize; ++i) {
      if ((mask >> i & 1) == 0) continue;
      at(i).value = kind == Collective::ballot ? votes : brought[at(i).source];
      d.schedule->release(warp * kWarpSize + i);
    }
    waiting &= ~mask;
  }
  wait_for_turn(d);
  return self.value;
}

void fail(const std::string& what) {
  const Device& d = device();
  throw EmulationError(std::string(d.kernel) + ", block " + text(blockIdx) + ", thread " +
                       text(d.running->index) + ": " + what);
}

void register_shared(void* data, size_t bytes) {
  std::memset(data, 0xff, bytes);
  device().shared.push_back({data, bytes});
}

void set_order(const char* order) {
  Device& d = device();
  const std::lock_guard<std::mutex> hold(d.lock);
  d.forced_order = order == nullptr ? "" : order;
}

void run(const char* name, dim3 grid, dim3 block, void (*body)(void*), void* context) {
  Device& d = device();
  const std::lock_guard<std::mutex> hold(d.lock);
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMostThreads || grid.x < 1 || grid.y < 1 || grid.z < 1) {
    throw EmulationError(std::string(name) + ": grid " + text(grid) + " of blocks " + text(block) +
                         " cannot be launched");
  }
  d.kernel = name;
  d.body = body;
  d.context = context;
  d.error = nullptr;
  d.threads = static_cast<int>(threads);
  d.lanes_waiting.resize((d.threads + kWarpSize - 1) / kWarpSize);
  while (static_cast<int>(d.fibers.size()) < d.threads)
    d.fibers.push_back(std::make_unique<Fiber>());
  gridDim = grid;
  blockDim = block;
  for (unsigned i = 0; i < static_cast<unsigned>(d.threads); ++i) {
    d.fibers[i]->index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
  }
  const char* environment = std::getenv("FASTZOO_EMULATOR_ORDER");
  Schedule schedule(!d.forced_order.empty()                       ? d.forced_order
                    : environment != nullptr && *environment != 0 ? environment
                                                                  : "forward",
                    d.threads);
  d.schedule = &schedule;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        run_block(d);
        if (d.error) std::rethrow_exception(std::exchange(d.error, nullptr));
      }
    }
  }
}

}  // namespace emulator
}  // namespace fastzoo::cuda
