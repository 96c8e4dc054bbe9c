// Arrays one behind the other in one allocation, each on a cache line of its own.
#pragma once

#include <cstdint>

namespace fastzoo::cpu {

class Arena {
 public:
  // Without a base it only counts.
  __attribute__((always_inline)) explicit Arena(void* base = nullptr)
      : base_(static_cast<char*>(base)) {}

  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    constexpr int64_t kLine = 64;
    const int64_t begin = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }

  __attribute__((always_inline)) int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace fastzoo::cpu
