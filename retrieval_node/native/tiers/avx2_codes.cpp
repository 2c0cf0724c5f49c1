// Code kernels with AVX2: vpmaddubsw multiplies and adds pairs into 16 bits. Its sums saturate for
// 8-bit codes, so those are split into nibbles; the high ones join the 4-bit part.
#include "tiers/codes.h"
#include "tiers/simd_avx2.h"
#include "tiers/vector_kernels.h"

namespace longreach {
namespace avx2 {
namespace {

constexpr int64_t kPrefetchBytes = 4096;
constexpr int kHalfKeys = kCodeKeys / 2;  // eight keys of four bytes fill a vector
// A pair adds at most 2 * 15 * 127 = 3810 in magnitude, so eight fit in 16 bits.
constexpr int kPairsBeforeOverflow = 8;

// 16-bit sums that are moved to 32 bits before they can overflow.
template <int Heads>
struct Accumulator {
  __m256i wide[Heads];
  __m256i narrow[Heads];
  int pairs = 0;

  Accumulator() {
    for (int h = 0; h < Heads; ++h) wide[h] = narrow[h] = _mm256_setzero_si256();
  }
  void add(__m256i nibbles, const CodeQueries& queries, int quad) {
    if (pairs == kPairsBeforeOverflow) flush();
    for (int h = 0; h < Heads; ++h)
      narrow[h] = _mm256_add_epi16(
          narrow[h], _mm256_maddubs_epi16(nibbles, _mm256_set1_epi32(queries.weights[h][quad])));
    ++pairs;
  }
  void flush() {
    for (int h = 0; h < Heads; ++h) {
      wide[h] = _mm256_add_epi32(wide[h], _mm256_madd_epi16(narrow[h], _mm256_set1_epi16(1)));
      narrow[h] = _mm256_setzero_si256();
    }
    pairs = 0;
  }
  void shift4() {
    for (int h = 0; h < Heads; ++h) wide[h] = _mm256_slli_epi32(wide[h], 4);
  }
};

// Scores of eight keys of a block: keys [0, 8) for half 0, [8, 16) for half 1.
template <int Heads>
inline void score_half(const uint8_t* block, const CodeQueries& queries, int half,
                       __m256i* scores) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const CodeFormat format = queries.format;
  const auto line_at = [&](int line) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + line * 64 + half * 32));
  };
  const auto high = [&](__m256i x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble); };
  Accumulator<Heads> sums;
  for (int line = 0; line < format.four; ++line) {
    const __m256i both = line_at(format.eight + line);
    const int quad = format.eight + 2 * line;
    sums.add(_mm256_and_si256(both, nibble), queries, quad);
    sums.add(high(both), queries, quad + 1);
  }
  for (int line = 0; line < format.eight; ++line) sums.add(high(line_at(line)), queries, line);
  sums.flush();
  sums.shift4();
  for (int line = 0; line < format.eight; ++line)
    sums.add(_mm256_and_si256(line_at(line), nibble), queries, line);
  sums.flush();
  for (int h = 0; h < Heads; ++h) scores[h] = sums.wide[h];
}

inline __m256 tail_weights(const CodeTail& tail, int head, __m256i scores) {
  __m256 logits = _mm256_fmadd_ps(_mm256_cvtepi32_ps(scores), _mm256_set1_ps(tail.slope[head]),
                                  _mm256_set1_ps(tail.offset[head]));
  if (tail.softcap > 0) logits = vector::capped<Simd>(logits, tail.softcap);
  return vector::exponential<Simd>(_mm256_sub_ps(logits, _mm256_set1_ps(tail.reference[head])));
}

template <int Heads>
inline void append_hits(const __m256i* scores, unsigned hit, int64_t first_id, CodeHits& hits) {
  int32_t stored[Heads][kHalfKeys];
  for (int h = 0; h < Heads; ++h)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(stored[h]), scores[h]);
  for (; hit; hit &= hit - 1) {
    const int key = __builtin_ctz(hit);
    hits.ids[hits.count] = static_cast<int32_t>(first_id + key);
    for (int h = 0; h < Heads; ++h) hits.scores[h * hits.capacity + hits.count] = stored[h][key];
    ++hits.count;
  }
}

template <int Heads, bool Tail>
void scan(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,
          const int32_t* thresholds, CodeHits& hits, const CodeTail* tail) {
  const int64_t block_bytes = queries.format.block_bytes();
  for (int64_t summary = first; summary < stop; ++summary) {
    __m256 sums[Heads];
    for (int h = 0; h < Heads; ++h) sums[h] = _mm256_setzero_ps();
    for (int part = 0; part < kSummaryKeys / kHalfKeys; ++part) {
      const int64_t id = summary * kSummaryKeys + part * kHalfKeys;
      const uint8_t* block = codes + id / kCodeKeys * block_bytes;
      if (part % 2 == 0)
        for (int64_t at = 0; at < block_bytes; at += 64)
          __builtin_prefetch(block + kPrefetchBytes + at);
      __m256i scores[Heads];
      score_half<Heads>(block, queries, part % 2, scores);
      __m256i above = _mm256_setzero_si256();
      for (int h = 0; h < Heads; ++h)
        above =
            _mm256_or_si256(above, _mm256_cmpgt_epi32(scores[h], _mm256_set1_epi32(thresholds[h])));
      if (Tail)
        for (int h = 0; h < Heads; ++h)
          sums[h] = _mm256_add_ps(sums[h], _mm256_andnot_ps(_mm256_castsi256_ps(above),
                                                            tail_weights(*tail, h, scores[h])));
      const auto hit = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(above)));
      if (hit) append_hits<Heads>(scores, hit, id, hits);
    }
    if (!Tail) continue;
    for (int h = 0; h < Heads; ++h) {
      float total[kTile];
      Simd::sum4(sums[h], Simd::zero(), Simd::zero(), Simd::zero(), total);
      tail->sums[summary * kCodeHeads + h] = total[0];
    }
  }
}

template <int Heads>
void scores_of(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t step,
               int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* block = codes + (first + i * step) * queries.format.block_bytes();
    for (int half = 0; half < 2; ++half) {
      __m256i scores[Heads];
      score_half<Heads>(block, queries, half, scores);
      for (int h = 0; h < Heads; ++h) {
        int32_t* place = out + (h * count + i) * kCodeKeys + half * kHalfKeys;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), scores[h]);
      }
    }
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

}  // namespace avx2
}  // namespace longreach
