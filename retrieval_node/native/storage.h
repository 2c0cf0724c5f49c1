// Element types of K and V, and views of rows of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace longreach {

// float32 as it is; float16 (IEEE half) and bfloat16 as their 16 bits.
enum class Storage : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline size_t item_bytes(Storage type) { return type == Storage::kFloat32 ? 4 : 2; }

// Rows of `dim` consecutive elements, `stride` elements apart.
struct Rows {
  const void* data;
  Storage type;
  int dim;
  int64_t stride;

  size_t row_bytes() const { return static_cast<size_t>(dim) * item_bytes(type); }
  template <class T>
  const T* row(int64_t index) const {
    return static_cast<const T*>(data) + index * stride;
  }
};

inline float to_float(float value) { return value; }

inline float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {  // normal: rebias the exponent from 15 to 127
    bits = (magnitude << 13) + (112u << 23);
  } else {  // zero and subnormal: value = magnitude * 2^-24
    const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &subnormal, 4);
  }
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace longreach
