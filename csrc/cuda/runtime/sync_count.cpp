#include <atomic>
#include <cstdint>

namespace fastzoo::cuda {
namespace {
std::atomic<int64_t> syncs{0};
}

void count_sync() { syncs.fetch_add(1, std::memory_order_relaxed); }

}  // namespace fastzoo::cuda

extern "C" __attribute__((visibility("default"))) int64_t fastzoo_cuda_sync_count() {
  return fastzoo::cuda::syncs.load(std::memory_order_relaxed);
}
