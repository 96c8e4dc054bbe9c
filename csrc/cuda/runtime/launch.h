// How an operator's entry reaches the device: the current stream of a tensor's device, or the
// host emulator.
#pragma once

#include <limits>

#include "../../torch_abi.h"
#include "runtime.h"

#if !defined(FASTZOO_EMULATE)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// The dispatch key that the operators of csrc/cuda are registered for.
#if defined(FASTZOO_EMULATE)
#define FASTZOO_CUDA_DISPATCH_KEY CPU
#else
#define FASTZOO_CUDA_DISPATCH_KEY CUDA
#endif

// How often read_back() made the host wait for the device, in this process.
extern "C" int64_t fastzoo_cuda_sync_count();

namespace fastzoo::cuda {

void count_sync();

// The grid that covers `items`, `per_block` to a block.
inline unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "fastzoo: ", items,
                  " items are more than one launch can cover");
  return static_cast<unsigned>(blocks);
}

// The data of a tensor; null where it is empty, as one that an operator does without is.
template <class T>
T* optional_data(const Tensor& tensor) {
  if (tensor.numel() == 0) return nullptr;
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

#if defined(FASTZOO_EMULATE)

class Stream {
 public:
  explicit Stream(const Tensor&) {}

  template <class... Parameters>
  void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              std::common_type_t<Parameters>... arguments) const {
    emulator::launch(name, kernel, grid, block, arguments...);
  }

  template <class Arrays, class... Parameters>
  void launch_large(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    std::common_type_t<Parameters>... arguments) const {
    static_assert(sizeof(Arrays) <= kLargeShared, "large_shared has no room for these");
    launch(name, kernel, grid, block, arguments...);
  }

  bool has_large_shared() const { return true; }

  int64_t read_back(const int64_t* value) const {
    count_sync();
    return *value;
  }
};

#else

// Makes the tensor's device current while it lives.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters>
  void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              std::common_type_t<Parameters>... arguments) const {
    launch_with(0, name, kernel, grid, block, arguments...);
  }

  // A kernel that has large_shared<Arrays>(): beyond kCommonShared where has_large_shared() alone.
  template <class Arrays, class... Parameters>
  void launch_large(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    std::common_type_t<Parameters>... arguments) const {
    static_assert(sizeof(Arrays) <= kLargeShared, "large_shared has no room for these");
    check(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Arrays)));
    launch_with(sizeof(Arrays), name, kernel, grid, block, arguments...);
  }

  // Whether a block may have kLargeShared bytes; otherwise it is kCommonShared.
  bool has_large_shared() const {
    int device = 0;
    int bytes = 0;
    check("has_large_shared", cudaGetDevice(&device));
    check("has_large_shared",
          cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes >= kLargeShared;
  }

  // Waits for the stream and gives the value that device memory then holds.
  int64_t read_back(const int64_t* value) const {
    count_sync();
    int64_t result = 0;
    check("read_back",
          cudaMemcpyAsync(&result, value, sizeof(result), cudaMemcpyDeviceToHost, stream_));
    check("read_back", cudaStreamSynchronize(stream_));
    return result;
  }

 private:
  template <class... Parameters>
  void launch_with(size_t shared, const char* name, void (*kernel)(Parameters...), dim3 grid,
                   dim3 block, std::common_type_t<Parameters>... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    check(name, cudaLaunchKernelEx(&config, kernel, arguments...));
  }

  static void check(const char* what, cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "fastzoo: ", what, ": ", cudaGetErrorString(error));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

#endif

}  // namespace fastzoo::cuda
