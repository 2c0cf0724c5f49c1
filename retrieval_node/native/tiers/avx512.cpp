// The AVX-512 tier.
#include "tiers/avx512_score.h"
#include "tiers/codes.h"
#include "tiers/simd_avx512.h"
#include "tiers/vector_kernels.h"

namespace longreach {

using avx512::Simd;

namespace {

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
  vector::prefetch_first<Simd, Bfloat16>(keys, choice, vector::kGatherAhead);
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

}  // namespace

namespace avx512 {

void score(const Rows& keys, const RowChoice& choice, const QueryTile& queries, float* scores) {
  if (keys.type != Storage::kBfloat16) return vector::score<Simd>(keys, choice, queries, scores);
  if (queries.low_is_zero) return score_bfloat16<false>(keys, choice, queries, scores);
  return score_bfloat16<true>(keys, choice, queries, scores);
}

}  // namespace avx512

const KernelTable kAvx512Kernels = {
    avx512::score,
    vector::score_panel<Simd>,
    vector::to_logits<Simd>,
    vector::softmax_step<Simd>,
    vector::accumulate<Simd>,
    vector::widen<Simd>,
    vector::value_range<Simd>,
    vector::count_above<Simd>,
    vector::sum_above<Simd>,
    avx512::code_scores,
    avx512::code_scan,
};

}  // namespace longreach
