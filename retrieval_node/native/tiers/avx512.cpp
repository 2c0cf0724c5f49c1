// The AVX-512 tier.
#include "tiers/codes.h"
#include "tiers/simd_avx512.h"
#include "tiers/vector_kernels.h"

namespace longreach {
namespace {

using avx512::Simd;

__m512bh bfloats(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

__m512i load_bits(const void* p) { return _mm512_loadu_si512(p); }

// Scores of `Keys` bfloat16 keys: pairs of elements are multiplied and added in one instruction.
// Queries come as high + low parts; `Low` is false when the low parts are all zero.
template <int Keys, bool Low>
void score_bfloat16_keys(const Bfloat16* const* keys, int dim, const QueryTile& queries,
                         float* scores) {
  __m512 sums[Keys][kTile];
  for (int i = 0; i < Keys; ++i)
    for (int r = 0; r < kTile; ++r) sums[i][r] = _mm512_setzero_ps();
  const auto add = [&](int c, const __m512i* x) {
    for (int r = 0; r < kTile; ++r) {
      const __m512bh high = bfloats(load_bits(queries.high + r * queries.stride + c));
      for (int i = 0; i < Keys; ++i) sums[i][r] = _mm512_dpbf16_ps(sums[i][r], bfloats(x[i]), high);
      if (!Low) continue;
      const __m512bh low = bfloats(load_bits(queries.low + r * queries.stride + c));
      for (int i = 0; i < Keys; ++i) sums[i][r] = _mm512_dpbf16_ps(sums[i][r], bfloats(x[i]), low);
    }
  };
  __m512i x[Keys];
  int c = 0;
  for (; c + 32 <= dim; c += 32) {
    for (int i = 0; i < Keys; ++i) x[i] = load_bits(keys[i] + c);
    add(c, x);
  }
  if (c < dim) {
    const auto rest = static_cast<__mmask32>((1ull << (dim - c)) - 1);
    for (int i = 0; i < Keys; ++i) x[i] = _mm512_maskz_loadu_epi16(rest, keys[i] + c);
    add(c, x);
  }
  for (int i = 0; i < Keys; ++i)
    Simd::sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3], scores + i * kTile);
}

template <bool Low>
void score_bfloat16(const Rows& keys, const RowChoice& choice, const QueryTile& queries,
                    float* scores) {
  vector::prefetch_first<Simd, Bfloat16>(keys, choice);
  const auto key = [&](int64_t i) {
    return keys.row<Bfloat16>(vector::row_index<Simd>(choice, i));
  };
  int64_t i = 0;
  for (; i + 2 <= choice.count; i += 2) {
    vector::prefetch_ahead<Simd, Bfloat16>(keys, choice, i);
    vector::prefetch_ahead<Simd, Bfloat16>(keys, choice, i + 1);
    const Bfloat16* pair[2] = {key(i), key(i + 1)};
    score_bfloat16_keys<2, Low>(pair, keys.dim, queries, scores + i * kTile);
  }
  if (i < choice.count) {
    const Bfloat16* last[1] = {key(i)};
    score_bfloat16_keys<1, Low>(last, keys.dim, queries, scores + i * kTile);
  }
}

void score(const Rows& keys, const RowChoice& choice, const QueryTile& queries, float* scores) {
  if (keys.type != Storage::kBfloat16) return vector::score<Simd>(keys, choice, queries, scores);
  if (queries.low_is_zero) return score_bfloat16<false>(keys, choice, queries, scores);
  return score_bfloat16<true>(keys, choice, queries, scores);
}

// Value sums of bfloat16 rows, 64 elements at a time. Half of the elements of a 512-bit load become
// float32 with one shift and half with one mask, if sums are kept apart for even and odd elements.
void accumulate_columns(const Rows& values, const RowChoice& choice, const float* weights, int lanes,
                        int column, bool prefetch, float* acc) {
  constexpr int kLoads = 2;  // of 32 elements
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 evens[kTile][kLoads], odds[kTile][kLoads];
  for (int r = 0; r < kTile; ++r)
    for (int v = 0; v < kLoads; ++v) {
      const float* place = acc + r * values.dim + column + v * 32;
      const __m512 a = _mm512_loadu_ps(place), b = _mm512_loadu_ps(place + 16);
      evens[r][v] = _mm512_permutex2var_ps(a, even, b);
      odds[r][v] = _mm512_permutex2var_ps(a, odd, b);
    }
  for (int64_t i = 0; i < choice.count; ++i) {
    if (prefetch) vector::prefetch_ahead<Simd, Bfloat16>(values, choice, i);
    const Bfloat16* value = values.row<Bfloat16>(vector::row_index<Simd>(choice, i)) + column;
    __m512 x[kLoads], y[kLoads];
    for (int v = 0; v < kLoads; ++v) {
      const __m512i bits = load_bits(value + v * 32);
      x[v] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
      y[v] = _mm512_castsi512_ps(_mm512_and_si512(bits, high_half));
    }
    for (int r = 0; r < kTile; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[i * lanes + r]);
      for (int v = 0; v < kLoads; ++v) {
        evens[r][v] = _mm512_fmadd_ps(weight, x[v], evens[r][v]);
        odds[r][v] = _mm512_fmadd_ps(weight, y[v], odds[r][v]);
      }
    }
  }
  for (int r = 0; r < kTile; ++r)
    for (int v = 0; v < kLoads; ++v) {
      float* place = acc + r * values.dim + column + v * 32;
      _mm512_storeu_ps(place, _mm512_permutex2var_ps(evens[r][v], first, odds[r][v]));
      _mm512_storeu_ps(place + 16, _mm512_permutex2var_ps(evens[r][v], last, odds[r][v]));
    }
}

void accumulate(const Rows& values, const RowChoice& choice, const float* weights, int lanes,
                float* acc) {
  constexpr int kColumns = 64;
  if (values.type != Storage::kBfloat16 || values.dim % kColumns != 0)
    return vector::accumulate<Simd>(values, choice, weights, lanes, acc);
  vector::prefetch_first<Simd, Bfloat16>(values, choice);
  for (int r = 0; r < lanes; r += kTile)
    for (int column = 0; column < values.dim; column += kColumns)
      accumulate_columns(values, choice, weights + r, lanes, column, r == 0 && column == 0,
                         acc + r * values.dim);
}

}  // namespace

const KernelTable kAvx512Kernels = {
    score,
    vector::score_panel<Simd>,
    vector::to_logits<Simd>,
    vector::softmax_step<Simd>,
    accumulate,
    vector::widen<Simd>,
    vector::value_range<Simd>,
    vector::count_above<Simd>,
    vector::sum_above<Simd>,
    avx512::code_scores,
    avx512::code_scan,
};

}  // namespace longreach
