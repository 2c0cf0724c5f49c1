// The specification of the code kernels.
#include <cmath>

#include "tiers/codes.h"

namespace longreach {
namespace {

int weight(const CodeQueries& queries, int head, int quad, int dimension) {
  return static_cast<int8_t>(static_cast<uint32_t>(queries.weights[head][quad]) >> (8 * dimension));
}

int32_t code_score(const uint8_t* block, const CodeQueries& queries, int head, int key) {
  const CodeFormat& format = queries.format;
  int32_t eight = 0, four = 0;
  for (int line = 0; line < format.eight; ++line)
    for (int d = 0; d < 4; ++d)
      eight += weight(queries, head, line, d) * block[(line * kCodeKeys + key) * 4 + d];
  for (int line = 0; line < format.four; ++line)
    for (int d = 0; d < 4; ++d) {
      const int both = block[((format.eight + line) * kCodeKeys + key) * 4 + d];
      four += weight(queries, head, format.eight + 2 * line, d) * (both & 15);
      four += weight(queries, head, format.eight + 2 * line + 1, d) * (both >> 4);
    }
  return eight + 16 * four;
}

float tail_weight(const CodeTail& tail, int head, int32_t score) {
  float logit = static_cast<float>(score) * tail.slope[head] + tail.offset[head];
  if (tail.softcap > 0) logit = tail.softcap * std::tanh(logit / tail.softcap);
  return std::exp(logit - tail.reference[head]);
}

}  // namespace

namespace scalar {

void code_scores(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t step,
                 int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* block = codes + (first + i * step) * queries.format.block_bytes();
    for (int head = 0; head < queries.heads; ++head)
      for (int key = 0; key < kCodeKeys; ++key)
        out[(head * count + i) * kCodeKeys + key] = code_score(block, queries, head, key);
  }
}

void code_scan(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,
               const int32_t* thresholds, CodeHits& hits, const CodeTail* tail) {
  for (int64_t summary = first; summary < stop; ++summary) {
    float sums[kCodeHeads] = {};
    for (int64_t id = summary * kSummaryKeys; id < (summary + 1) * kSummaryKeys; ++id) {
      const uint8_t* block = codes + id / kCodeKeys * queries.format.block_bytes();
      int32_t scores[kCodeHeads];
      bool hit = false;
      for (int head = 0; head < queries.heads; ++head) {
        scores[head] = code_score(block, queries, head, static_cast<int>(id % kCodeKeys));
        hit = hit || scores[head] > thresholds[head];
      }
      if (hit) {
        hits.ids[hits.count] = static_cast<int32_t>(id);
        for (int head = 0; head < queries.heads; ++head)
          hits.scores[head * hits.capacity + hits.count] = scores[head];
        ++hits.count;
      } else if (tail) {
        for (int head = 0; head < queries.heads; ++head)
          sums[head] += tail_weight(*tail, head, scores[head]);
      }
    }
    if (tail)
      for (int head = 0; head < queries.heads; ++head)
        tail->sums[summary * kCodeHeads + head] = sums[head];
  }
}

}  // namespace scalar
}  // namespace longreach
