// AVX-512 (F, BW, DQ, VL, VNNI, BF16) vectors of sixteen floats.
#pragma once

#include <immintrin.h>

#include "storage.h"

namespace longreach {
namespace avx512 {

struct Simd {
  using F = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kScoreKeys = 4;     // scored together: 4 keys x 4 queries of sums
  static constexpr int kValueVectors = 4;  // 4 rows x 4 vectors of sums
  static constexpr int kPanelKeys = 8;     // 8 keys x 1 vector of 16 rows

  static F zero() { return _mm512_setzero_ps(); }
  // Keeps the compiler from reading x from memory again at each use.
  static F in_register(F x) {
    asm("" : "+v"(x));
    return x;
  }
  static F all(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F negated_fma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  // The second operand wins if either is NaN.
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // x * 2^n for whole n.
  static F scale2(F x, F n) { return _mm512_scalef_ps(x, n); }
  static F add_exponent(F x, F n) { return scale2(x, n); }
  // x where it is above y, else 0.
  static F keep_above(F x, F y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), x);
  }
  // x where `value` >= limit or NaN, else 0.
  static F zero_below(F x, F value, F limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value, limit, _CMP_NLT_UQ), x);
  }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load(const Bfloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // 2 * kWidth elements: those at even places, and those at odd ones.
  static void load_two(const Bfloat16* p, F& even, F& odd) {
    const __m512i bits = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)));
  }
  // From consecutive elements in a and b to those of load_two, and back.
  static void part_two(F a, F b, F& even, F& odd) {
    const __m512i twice =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(a, twice, b);
    odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(twice, _mm512_set1_epi32(1)), b);
  }
  static void join_two(F even, F odd, F& a, F& b) {
    const __m512i mixed = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    a = _mm512_permutex2var_ps(even, mixed, odd);
    b = _mm512_permutex2var_ps(even, _mm512_add_epi32(mixed, _mm512_set1_epi32(8)), odd);
  }
  // The first `count` < kWidth elements, then zeros; reads nothing beyond them.
  static F load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static F load_part(const Half* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
  }
  static F load_part(const Bfloat16* p, int count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), p));
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store_part(float* p, F x, int count) { _mm512_mask_storeu_ps(p, first(count), x); }
  // Lanes of x above y.
  static int count_above(F x, F y) {
    return __builtin_popcount(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ));
  }
  // out[j] = sum of the lanes of the j-th argument.
  static void sum4(F a, F b, F c, F d, float* out) {
    const __m256 ab = _mm256_hadd_ps(halved(a), halved(b));
    const __m256 cd = _mm256_hadd_ps(halved(c), halved(d));
    const __m256 pairs = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }

  // out[4 * i + j] = sum of the lanes of x[i][j]: each step halves the lanes of a sum and puts two
  // sums into one vector.
  static void sum16(const F (&x)[4][4], float* out) {
    store(out, quarters(quarters(quad(x[0][0], x[0][1], x[0][2], x[0][3]),
                                 quad(x[1][0], x[1][1], x[1][2], x[1][3])),
                        quarters(quad(x[2][0], x[2][1], x[2][2], x[2][3]),
                                 quad(x[3][0], x[3][1], x[3][2], x[3][3]))));
  }

 private:
  static F quad(F a, F b, F c, F d) {
    const __m512d left = _mm512_castps_pd(folded(a, b)), right = _mm512_castps_pd(folded(c, d));
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
               _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
  }
  static F folded(F a, F b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
  // Sums of neighbouring quarters, of a and then of b.
  static F quarters(F a, F b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static F widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static __m256 halved(F x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  }
};

}  // namespace avx512
}  // namespace longreach
