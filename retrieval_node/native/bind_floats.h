// Dense float32 arrays from Python, by the buffer protocol.
//
// nanobind's own arrays come by DLPack, whose calls and capsules made a search on the token path,
// with cold caches, a twentieth longer.
#pragma once

#include <nanobind/nanobind.h>

#include <cstring>
#include <memory>

namespace longreach {

namespace nb = nanobind;

// T is float, for arrays to write to, or const float. The array's memory is held as long as this.
template <class T>
class FloatArray {
 public:
  // False, without an error, unless `array` is a dense float32 array, and writable if T is.
  bool take(PyObject* array) noexcept {
    int wanted = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT;
    if (!std::is_const_v<T>) wanted |= PyBUF_WRITABLE;
    held_ = std::make_shared<Held>();
    if (PyObject_GetBuffer(array, &held_->view, wanted) != 0) {
      PyErr_Clear();
      return false;
    }
    return held_->view.format != nullptr && std::strcmp(held_->view.format, "f") == 0;
  }

  T* data() const { return static_cast<T*>(held_->view.buf); }
  size_t ndim() const { return static_cast<size_t>(held_->view.ndim); }
  int64_t shape(size_t axis) const { return held_->view.shape[axis]; }
  size_t size() const { return static_cast<size_t>(held_->view.len) / sizeof(float); }

 private:
  struct Held {
    Py_buffer view{};
    ~Held() { PyBuffer_Release(&view); }  // of nothing, if it was not got
  };
  std::shared_ptr<Held> held_;
};

using FloatsIn = FloatArray<const float>;
using FloatsOut = FloatArray<float>;

}  // namespace longreach

namespace nanobind::detail {

template <>
struct type_caster<longreach::FloatsOut> {
  NB_TYPE_CASTER(longreach::FloatsOut, const_name("dense writable float32 array"))
  bool from_python(handle array, uint8_t, cleanup_list*) noexcept {
    return value.take(array.ptr());
  }
};

template <>
struct type_caster<longreach::FloatsIn> {
  NB_TYPE_CASTER(longreach::FloatsIn, const_name("array"))
  // Arrays that are not dense float32 are copied.
  bool from_python(handle array, uint8_t flags, cleanup_list*) noexcept {
    if (value.take(array.ptr())) return true;
    if (!(flags & static_cast<uint8_t>(cast_flags::convert)) || !PyObject_CheckBuffer(array.ptr()))
      return false;
    try {
      return value.take(
          module_::import_("numpy").attr("ascontiguousarray")(array, "float32").ptr());
    } catch (python_error&) {
      return false;
    }
  }
};

}  // namespace nanobind::detail
