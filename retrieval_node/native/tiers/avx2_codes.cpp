// Code kernels with AVX2: vpmaddubsw multiplies and adds pairs into 16 bits. Its sums saturate for
// 8-bit codes, so those are split into nibbles; the high ones join the 4-bit part.
#include "prefetch.h"
#include "tiers/codes.h"
#include "tiers/simd_avx2.h"
#include "tiers/vector_kernels.h"

namespace longreach {
namespace avx2 {
namespace {

constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kBlocksAhead = 8;  // blocks of a sample to prefetch
constexpr int kHalfKeys = kCodeKeys / 2;  // eight keys of four bytes fill a vector
// A pair adds at most 2 * 15 * 127 = 3810 in magnitude, so eight fit in 16 bits.
constexpr int kPairsBeforeOverflow = 8;

// The weights of every head, each repeated over a vector.
template <int Heads>
struct WideWeights {
  __m256i quads[kMostQuads][Heads];

  explicit WideWeights(const CodeQueries& queries) {
    for (int quad = 0; quad < queries.format.quads(); ++quad)
      for (int h = 0; h < Heads; ++h) quads[quad][h] = _mm256_set1_epi32(queries.weights[h][quad]);
  }
};

// Whether 16 bits hold the weighted sum of any nibbles, for every head. Sums wrap, so only their
// final value must fit. Those that may not fit are moved on every kPairsBeforeOverflow pairs.
bool nibbles_fit(const CodeQueries& queries) {
  constexpr int kMost = 32767;
  for (int h = 0; h < queries.heads; ++h) {
    int highest[2] = {}, lowest[2] = {};
    for (int quad = 0; quad < queries.format.quads(); ++quad)
      for (int byte = 0; byte < 4; ++byte) {
        const auto bits = static_cast<uint32_t>(queries.weights[h][quad]) >> (8 * byte);
        const int weight = static_cast<int8_t>(bits);
        highest[byte / 2] += weight > 0 ? 15 * weight : 0;
        lowest[byte / 2] += weight < 0 ? 15 * weight : 0;
      }
    for (int pair = 0; pair < 2; ++pair)
      if (highest[pair] > kMost || lowest[pair] < -kMost) return false;
  }
  return true;
}

// Scores of eight keys of a block, those of its half `half`: 16 times the 4-bit part and the high
// nibbles of the 8-bit part, plus the low nibbles of the latter.
template <int Heads, bool Fit>
inline void score_half(const uint8_t* block, CodeFormat format, const WideWeights<Heads>& weights,
                       int half, __m256i* scores) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
  __m256i sums[Heads];
  int pairs = 0;
  for (int h = 0; h < Heads; ++h) scores[h] = sums[h] = _mm256_setzero_si256();
  const auto flush = [&](__m256i unit) {
    for (int h = 0; h < Heads; ++h) {
      scores[h] = _mm256_add_epi32(scores[h], _mm256_madd_epi16(sums[h], unit));
      sums[h] = _mm256_setzero_si256();
    }
    pairs = 0;
  };
  const auto add = [&](__m256i nibbles, int quad, __m256i unit) {
    if (!Fit && pairs == kPairsBeforeOverflow) flush(unit);
    ++pairs;
    for (int h = 0; h < Heads; ++h)
      sums[h] = _mm256_add_epi16(sums[h], _mm256_maddubs_epi16(nibbles, weights.quads[quad][h]));
  };
  const auto line_at = [&](int line) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + line * 64 + half * 32));
  };
  const auto high = [&](__m256i x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble); };
  for (int line = 0; line < format.four; ++line) {
    const __m256i both = line_at(format.eight + line);
    const int quad = format.eight + 2 * line;
    add(_mm256_and_si256(both, nibble), quad, sixteen);
    add(high(both), quad + 1, sixteen);
  }
  for (int line = 0; line < format.eight; ++line) add(high(line_at(line)), line, sixteen);
  flush(sixteen);
  for (int line = 0; line < format.eight; ++line)
    add(_mm256_and_si256(line_at(line), nibble), line, one);
  flush(one);
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

template <int Heads, bool Tail, bool Fit>
void scan(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,
          const int32_t* thresholds, CodeHits& hits, const CodeTail* tail) {
  const int64_t block_bytes = queries.format.block_bytes();
  const WideWeights<Heads> weights(queries);
  for (int64_t summary = first; summary < stop; ++summary) {
    __m256 sums[Heads];
    for (int h = 0; h < Heads; ++h) sums[h] = _mm256_setzero_ps();
    for (int part = 0; part < kSummaryKeys / kHalfKeys; ++part) {
      const int64_t id = summary * kSummaryKeys + part * kHalfKeys;
      const uint8_t* block = codes + id / kCodeKeys * block_bytes;
      if (part % 2 == 0)
        for (int64_t at = 0; at < block_bytes; at += 64)
          prefetch(block + kPrefetchBytes + at);
      __m256i scores[Heads];
      score_half<Heads, Fit>(block, queries.format, weights, part % 2, scores);
      __m256i above = _mm256_setzero_si256();
      for (int h = 0; h < Heads; ++h)
        above =
            _mm256_or_si256(above, _mm256_cmpgt_epi32(scores[h], _mm256_set1_epi32(thresholds[h])));
      if (Tail)
        for (int h = 0; h < Heads; ++h) {
          const __m256 weights_here =
              vector::tail_weights<Simd>(*tail, h, _mm256_cvtepi32_ps(scores[h]));
          sums[h] = _mm256_add_ps(sums[h],
                                  _mm256_andnot_ps(_mm256_castsi256_ps(above), weights_here));
        }
      const auto hit = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(above)));
      if (hit) append_hits<Heads>(scores, hit, id, hits);
    }
    if (!Tail) continue;
    const auto sum_of = [&](int h) { return h < Heads ? sums[h] : Simd::zero(); };
    for (int h = 0; h < Heads; h += kTile)
      Simd::sum4(sum_of(h), sum_of(h + 1), sum_of(h + 2), sum_of(h + 3),
                 tail->sums + summary * kCodeHeads + h);
  }
}

template <int Heads, bool Fit>
void scan_fitting(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,
                  const int32_t* thresholds, CodeHits& hits, const CodeTail* tail) {
  if (tail)
    scan<Heads, true, Fit>(codes, queries, first, stop, thresholds, hits, tail);
  else
    scan<Heads, false, Fit>(codes, queries, first, stop, thresholds, hits, nullptr);
}

template <int Heads, bool Fit>
void scores_of(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t step,
               int64_t count, int32_t* out) {
  const int64_t block_bytes = queries.format.block_bytes();
  const WideWeights<Heads> weights(queries);
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* block = codes + (first + i * step) * block_bytes;
    const uint8_t* later = block + kBlocksAhead * step * block_bytes;
    for (int64_t at = 0; at < block_bytes; at += 64) prefetch(later + at);
    for (int half = 0; half < 2; ++half) {
      __m256i scores[Heads];
      score_half<Heads, Fit>(block, queries.format, weights, half, scores);
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
  const bool fit = nibbles_fit(queries);
  vector::with_heads(queries.heads, [&](auto heads) {
    constexpr int kHeads = decltype(heads)::kValue;
    if (fit)
      scores_of<kHeads, true>(codes, queries, first, step, count, out);
    else
      scores_of<kHeads, false>(codes, queries, first, step, count, out);
  });
}

void code_scan(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,
               const int32_t* thresholds, CodeHits& hits, const CodeTail* tail) {
  const bool fit = nibbles_fit(queries);
  vector::with_heads(queries.heads, [&](auto heads) {
    constexpr int kHeads = decltype(heads)::kValue;
    if (fit)
      scan_fitting<kHeads, true>(codes, queries, first, stop, thresholds, hits, tail);
    else
      scan_fitting<kHeads, false>(codes, queries, first, stop, thresholds, hits, tail);
  });
}

}  // namespace avx2
}  // namespace longreach
