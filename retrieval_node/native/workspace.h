// Memory that a thread keeps between calls, so that a decode step allocates nothing.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace longreach {

// A 64-byte-aligned array of trivially copyable T that only grows. Growing drops the contents.
template <class T>
class Workspace {
 public:
  Workspace() = default;
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // At least `count` elements, uninitialised.
  T* reserve(size_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = 0;
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace longreach
