// Code kernels with VNNI: four dimensions of sixteen keys per instruction.
#include "prefetch.h"
#include "tiers/codes.h"
#include "tiers/simd_avx512.h"
#include "tiers/vector_kernels.h"

namespace longreach {
namespace avx512 {
namespace {

constexpr int64_t kPrefetchBytes = 4096;

// Keeps the compiler from making x anew at each use.
inline __m512i in_register(__m512i x) {
  asm("" : "+v"(x));
  return x;
}

// Blocks scored together: each weight is fetched once for all of them. Four blocks are a summary.
constexpr int kBlocks = 2;

// Scores of `Blocks` blocks for `Heads` heads. The 4-bit part comes first, so that one shift scales
// it.
template <int Heads, int Blocks>
inline void score_blocks(const uint8_t* const* blocks, const CodeQueries& queries,
                         __m512i (*scores)[Heads]) {
  using vector::unrolled;
  const __m512i nibble = _mm512_set1_epi8(15);
  const CodeFormat format = queries.format;
  const auto each = [](auto body) LONGREACH_INLINE {
    unrolled<Blocks>([&](auto b) LONGREACH_INLINE {
      unrolled<Heads>([&](auto h) LONGREACH_INLINE { body(b, h); });
    });
  };
  const auto add_quad = [&](int quad, const __m512i* codes) LONGREACH_INLINE {
    unrolled<Heads>([&](auto h) LONGREACH_INLINE {
      const __m512i weights = _mm512_set1_epi32(queries.weights[h][quad]);
      unrolled<Blocks>([&](auto b) LONGREACH_INLINE {
        scores[b][h] = _mm512_dpbusd_epi32(scores[b][h], codes[b], weights);
      });
    });
  };
  each([&](auto b, auto h) LONGREACH_INLINE { scores[b][h] = _mm512_setzero_si512(); });
  for (int line = 0; line < format.four; ++line) {
    __m512i low[Blocks], high[Blocks];
    unrolled<Blocks>([&](auto b) LONGREACH_INLINE {
      const __m512i both = _mm512_loadu_si512(blocks[b] + (format.eight + line) * 64);
      low[b] = _mm512_and_si512(both, nibble);
      high[b] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    });
    add_quad(format.eight + 2 * line, low);
    add_quad(format.eight + 2 * line + 1, high);
  }
  each([&](auto b, auto h) LONGREACH_INLINE { scores[b][h] = _mm512_slli_epi32(scores[b][h], 4); });
  for (int line = 0; line < format.eight; ++line) {
    __m512i codes[Blocks];
    unrolled<Blocks>(
        [&](auto b) LONGREACH_INLINE { codes[b] = _mm512_loadu_si512(blocks[b] + line * 64); });
    add_quad(line, codes);
  }
}

// Writes whole vectors, as storing with compression takes over 70 cycles on AMD's Zen 4: there is
// room, for no more keys are hits than were scanned before.
template <int Heads>
inline void append_hits(const __m512i* scores, __mmask16 hit, int32_t first, CodeHits& hits) {
  const __m512i ids =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                       _mm512_set1_epi32(first));
  const auto append = [hit](int32_t* to, __m512i from) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(hit, from));
  };
  append(hits.ids + hits.count, ids);
  for (int h = 0; h < Heads; ++h) append(hits.scores + h * hits.capacity + hits.count, scores[h]);
  hits.count += __builtin_popcount(hit);
}

template <int Heads, bool Tail>
void scan(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,
          const int32_t* thresholds, CodeHits& hits, const CodeTail* tail) {
  const int64_t block_bytes = queries.format.block_bytes();
  const uint8_t* block = codes + first * (kSummaryKeys / kCodeKeys) * block_bytes;
  __m512i bars[Heads];
  for (int h = 0; h < Heads; ++h) bars[h] = in_register(_mm512_set1_epi32(thresholds[h]));
  for (int64_t summary = first; summary < stop; ++summary) {
    __m512 sums[Heads];
    for (int h = 0; h < Heads; ++h) sums[h] = _mm512_setzero_ps();
    for (int part = 0; part < kSummaryKeys / kCodeKeys; part += kBlocks) {
      for (int64_t at = 0; at < kBlocks * block_bytes; at += 64)
        prefetch(block + kPrefetchBytes + at);
      const uint8_t* blocks[kBlocks];
      __m512i scores[kBlocks][Heads];
      for (int b = 0; b < kBlocks; ++b, block += block_bytes) blocks[b] = block;
      score_blocks<Heads, kBlocks>(blocks, queries, scores);
      vector::unrolled<kBlocks>([&](auto b) LONGREACH_INLINE {
        __mmask16 hit = _mm512_cmpgt_epi32_mask(scores[b][0], bars[0]);
        for (int h = 1; h < Heads; ++h)
          hit = _kor_mask16(hit, _mm512_cmpgt_epi32_mask(scores[b][h], bars[h]));
        if (Tail)
          for (int h = 0; h < Heads; ++h)
            sums[h] = _mm512_mask_add_ps(
                sums[h], static_cast<__mmask16>(~hit), sums[h],
                vector::tail_weights<Simd>(*tail, h, _mm512_cvtepi32_ps(scores[b][h])));
        const auto id = static_cast<int32_t>(summary * kSummaryKeys + (part + b) * kCodeKeys);
        if (!_kortestz_mask16_u8(hit, hit)) append_hits<Heads>(scores[b], hit, id, hits);
      });
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
    for (int64_t at = 0; at < queries.format.block_bytes(); at += 64) prefetch(later + at);
    __m512i scores[1][Heads];
    score_blocks<Heads, 1>(&block, queries, scores);
    for (int h = 0; h < Heads; ++h)
      _mm512_storeu_si512(out + (h * count + i) * kCodeKeys, scores[0][h]);
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
