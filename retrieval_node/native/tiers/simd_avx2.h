// AVX2 + FMA + F16C vectors of eight floats.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "storage.h"

namespace longreach {
namespace avx2 {

struct Simd {
  using F = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kScoreKeys = 2;     // scored together: 2 keys x 4 queries of sums
  static constexpr int kValueVectors = 2;  // 4 rows x 2 vectors of sums fit in 16 registers
  static constexpr int kPanelKeys = 4;     // 4 keys x 2 vectors of 16 rows

  static F zero() { return _mm256_setzero_ps(); }
  // Keeps the compiler from reading x from memory again at each use.
  static F in_register(F x) {
    asm("" : "+x"(x));
    return x;
  }
  static F all(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F negated_fma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  // The second operand wins if either is NaN.
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for whole n in [-126, 127].
  static F scale2(F x, F n) {
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
  }
  // x * 2^n for whole n and normal x and results, by integer arithmetic on the exponent.
  static F add_exponent(F x, F n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
  }
  // x where it is above y, else 0.
  static F keep_above(F x, F y) { return _mm256_and_ps(x, _mm256_cmp_ps(x, y, _CMP_GT_OQ)); }
  // x where `value` >= limit or NaN, else 0.
  static F zero_below(F x, F value, F limit) {
    return _mm256_and_ps(x, _mm256_cmp_ps(value, limit, _CMP_NLT_UQ));
  }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load(const Bfloat16* p) {
    const __m256i bits =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  // 2 * kWidth elements: those at even places, and those at odd ones.
  static void load_two(const Bfloat16* p, F& even, F& odd) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)));
  }
  // From consecutive elements in a and b to those of load_two, and back.
  static void part_two(F a, F b, F& even, F& odd) {
    even = in_order(_mm256_shuffle_ps(a, b, 0x88));
    odd = in_order(_mm256_shuffle_ps(a, b, 0xdd));
  }
  static void join_two(F even, F odd, F& a, F& b) {
    const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
  }
  // The first `count` < kWidth elements, then zeros; reads nothing beyond them.
  template <class T>
  static F load_part(const T* p, int count) {
    T padded[kWidth] = {};
    std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
    return load(padded);
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store_part(float* p, F x, int count) {
    float padded[kWidth];
    store(padded, x);
    std::memcpy(p, padded, static_cast<size_t>(count) * sizeof(float));
  }
  // Lanes of x above y.
  static int count_above(F x, F y) {
    return __builtin_popcount(
        static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ))));
  }
  // out[j] = sum of the lanes of the j-th argument.
  static void sum4(F a, F b, F c, F d, float* out) {
    const F pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }

 private:
  // Of two vectors' elements that were taken half by half: the first vector's, then the other's.
  static F in_order(F x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
  }
};

}  // namespace avx2
}  // namespace longreach
