// Code kernels with VNNI: four dimensions of sixteen keys per instruction.
#include "prefetch.h"
#include "tiers/codes.h"
#include "tiers/simd_avx512.h"
#include "tiers/vector_kernels.h"

namespace longreach {
namespace avx512 {
namespace {

constexpr int64_t kPrefetchBytes = 4096;

// Scores of one block for `Heads` heads. The 4-bit part comes first, so that one shift scales it.
template <int Heads>
inline void score_block(const uint8_t* block, const CodeQueries& queries, __m512i* scores) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const CodeFormat format = queries.format;
  for (int h = 0; h < Heads; ++h) scores[h] = _mm512_setzero_si512();
  const uint8_t* fours = block + format.eight * 64;
  for (int line = 0; line < format.four; ++line) {
    const __m512i both = _mm512_loadu_si512(fours + line * 64);
    const __m512i low = _mm512_and_si512(both, nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    const int quad = format.eight + 2 * line;
    for (int h = 0; h < Heads; ++h) {
      scores[h] = _mm512_dpbusd_epi32(scores[h], low, _mm512_set1_epi32(queries.weights[h][quad]));
      scores[h] =
          _mm512_dpbusd_epi32(scores[h], high, _mm512_set1_epi32(queries.weights[h][quad + 1]));
    }
  }
  for (int h = 0; h < Heads; ++h) scores[h] = _mm512_slli_epi32(scores[h], 4);
  for (int line = 0; line < format.eight; ++line) {
    const __m512i bytes = _mm512_loadu_si512(block + line * 64);
    for (int h = 0; h < Heads; ++h)
      scores[h] =
          _mm512_dpbusd_epi32(scores[h], bytes, _mm512_set1_epi32(queries.weights[h][line]));
  }
}

template <int Heads>
inline void append_hits(const __m512i* scores, __mmask16 hit, __m512i ids, CodeHits& hits) {
  _mm512_mask_compressstoreu_epi32(hits.ids + hits.count, hit, ids);
  for (int h = 0; h < Heads; ++h)
    _mm512_mask_compressstoreu_epi32(hits.scores + h * hits.capacity + hits.count, hit, scores[h]);
  hits.count += __builtin_popcount(hit);
}

template <int Heads, bool Tail>
void scan(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,
          const int32_t* thresholds, CodeHits& hits, const CodeTail* tail) {
  const int64_t block_bytes = queries.format.block_bytes();
  const uint8_t* block = codes + first * (kSummaryKeys / kCodeKeys) * block_bytes;
  __m512i ids =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                       _mm512_set1_epi32(static_cast<int32_t>(first * kSummaryKeys)));
  for (int64_t summary = first; summary < stop; ++summary) {
    __m512 sums[Heads];
    for (int h = 0; h < Heads; ++h) sums[h] = _mm512_setzero_ps();
    for (int part = 0; part < kSummaryKeys / kCodeKeys; ++part, block += block_bytes) {
      for (int64_t at = 0; at < block_bytes; at += 64)
        prefetch(block + kPrefetchBytes + at);
      __m512i scores[Heads];
      score_block<Heads>(block, queries, scores);
      __mmask16 hit = 0;
      for (int h = 0; h < Heads; ++h)
        hit |= _mm512_cmpgt_epi32_mask(scores[h], _mm512_set1_epi32(thresholds[h]));
      if (Tail)
        for (int h = 0; h < Heads; ++h)
          sums[h] = _mm512_mask_add_ps(sums[h], static_cast<__mmask16>(~hit), sums[h],
                                       vector::tail_weights<Simd>(
                                           *tail, h, _mm512_cvtepi32_ps(scores[h])));
      if (hit) append_hits<Heads>(scores, hit, ids, hits);
      ids = _mm512_add_epi32(ids, _mm512_set1_epi32(kCodeKeys));
    }
    if (Tail)
      for (int h = 0; h < Heads; ++h)
        tail->sums[summary * kCodeHeads + h] = _mm512_reduce_add_ps(sums[h]);
  }
}

template <int Heads>
void scores_of(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t step,
               int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* block = codes + (first + i * step) * queries.format.block_bytes();
    const uint8_t* later = block + 8 * step * queries.format.block_bytes();
    for (int64_t at = 0; at < queries.format.block_bytes(); at += 64)
      prefetch(later + at);
    __m512i scores[Heads];
    score_block<Heads>(block, queries, scores);
    for (int h = 0; h < Heads; ++h)
      _mm512_storeu_si512(out + (h * count + i) * kCodeKeys, scores[h]);
  }
}

}  // namespace

void code_scores(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t step,
                 int64_t count, int32_t* out) {
  vector::with_heads(queries.heads, [&](auto heads) {
    scores_of<decltype(heads)::kValue>(codes, queries, first, step, count, out);
  });
}

void code_scan(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,
               const int32_t* thresholds, CodeHits& hits, const CodeTail* tail) {
  vector::with_heads(queries.heads, [&](auto heads) {
    constexpr int kHeads = decltype(heads)::kValue;
    if (tail)
      scan<kHeads, true>(codes, queries, first, stop, thresholds, hits, tail);
    else
      scan<kHeads, false>(codes, queries, first, stop, thresholds, hits, nullptr);
  });
}

}  // namespace avx512
}  // namespace longreach
