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

constexpr int kBfloat16Keys = 4;  // scored together: 4 keys x 4 queries of sums

// Scores of `Keys` bfloat16 keys: pairs of elements are multiplied and added in one instruction.
// Queries come as high + low parts; `Low` is false when the low parts are all zero.
template <int Keys, bool Low>
inline void score_bfloat16_keys(const Bfloat16* const* keys, int dim, const QueryTile& queries,
                                float* scores) {
  using vector::unrolled;
  __m512 sums[Keys][kTile];
  unrolled<Keys>([&](auto i) LONGREACH_INLINE {
    unrolled<kTile>([&](auto r) LONGREACH_INLINE { sums[i][r] = _mm512_setzero_ps(); });
  });
  const auto add_part = [&](const uint16_t* part, int c, const __m512i* x) LONGREACH_INLINE {
    unrolled<kTile>([&](auto r) LONGREACH_INLINE {
      const __m512bh query = bfloats(load_bits(part + r * queries.stride + c));
      unrolled<Keys>([&](auto i) LONGREACH_INLINE {
        sums[i][r] = _mm512_dpbf16_ps(sums[i][r], bfloats(x[i]), query);
      });
    });
  };
  const auto add = [&](int c, const __m512i* x) LONGREACH_INLINE {
    add_part(queries.high, c, x);
    if (Low) add_part(queries.low, c, x);
  };
  __m512i x[Keys];
  int c = 0;
  for (; c + 32 <= dim; c += 32) {
    unrolled<Keys>([&](auto i) LONGREACH_INLINE { x[i] = load_bits(keys[i] + c); });
    add(c, x);
  }
  if (c < dim) {
    const auto rest = static_cast<__mmask32>((1ull << (dim - c)) - 1);
    unrolled<Keys>([&](auto i)
                       LONGREACH_INLINE { x[i] = _mm512_maskz_loadu_epi16(rest, keys[i] + c); });
    add(c, x);
  }
  if constexpr (Keys == 4) {
    Simd::sum16(sums, scores);
  } else {
    unrolled<Keys>([&](auto i) LONGREACH_INLINE {
      Simd::sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3], scores + i * kTile);
    });
  }
}

template <bool Low>
void score_bfloat16(const Rows& keys, const RowChoice& choice, const QueryTile& queries,
                    float* scores) {
  vector::prefetch_first<Simd, Bfloat16>(keys, choice, vector::kGatherAhead);
  int64_t i = 0;
  for (; i + kBfloat16Keys <= choice.count; i += kBfloat16Keys) {
    const Bfloat16* rows[kBfloat16Keys];
    vector::unrolled<kBfloat16Keys>([&](auto j) LONGREACH_INLINE {
      vector::prefetch_ahead<Simd, Bfloat16>(keys, choice, i + j);
      vector::prefetch_upcoming<Simd, Bfloat16>(choice, i + j, 0, keys.dim);
      rows[j] = keys.row<Bfloat16>(vector::row_index<Simd>(choice, i + j));
    });
    score_bfloat16_keys<kBfloat16Keys, Low>(rows, keys.dim, queries, scores + i * kTile);
  }
  for (; i < choice.count; ++i) {
    const Bfloat16* row = keys.row<Bfloat16>(vector::row_index<Simd>(choice, i));
    score_bfloat16_keys<1, Low>(&row, keys.dim, queries, scores + i * kTile);
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
    vector::nth_highest<Simd>,
    avx512::code_scores,
    avx512::code_scan,
};

}  // namespace longreach
