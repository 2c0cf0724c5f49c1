// The inner loops that exist once per instruction-set tier.
//
// tiers/scalar.cpp is the specification: plain loops, one per function. The other tiers are held to
// it by tests. Queries come in tiles of kTile rows, or, for many rows at a time, in panels of
// kPanel rows; unused rows are zero.
#pragma once

#include <cstdint>

#include "storage.h"

namespace longreach {

constexpr int kTile = 4;
constexpr int kPanel = 16;
constexpr int kDimPadding = 32;  // queries of a tile are zero-padded to a multiple of this

inline int padded_dim(int dim) { return (dim + kDimPadding - 1) / kDimPadding * kDimPadding; }

// kTile queries, each of `stride` = padded_dim elements: as float32, and as the sum of two bfloat16
// (high + low), which loses nothing when the queries were bfloat16 (`low_is_zero`) and keeps 16
// bits of mantissa otherwise.
struct QueryTile {
  const float* wide;
  const uint16_t* high;
  const uint16_t* low;
  bool low_is_zero;
  int stride;
  // The same in the order that a matrix unit reads, [stride / 2][kTile]: two elements of query 0,
  // the same two of query 1, and so on. Null in tiles that are only used for gathered rows.
  const uint32_t* high_pairs = nullptr;
  const uint32_t* low_pairs = nullptr;
};

// Which rows to read: ids[i], or first + i when ids is null, for i in [0, count).
struct RowChoice {
  const int32_t* ids;
  int64_t first;
  int64_t count;
  // Rows to be read right after, which are brought to the cache meanwhile: arithmetic then overlaps
  // with waiting for memory. Row i + upcoming_first with row i; may be null.
  const Rows* upcoming = nullptr;
  int64_t upcoming_first = 0;
};

struct LogitRule {
  float scale;
  float softcap;  // 0: none; else logit = softcap * tanh(scale * dot / softcap)
};

// ---- codes of the sketch ----

constexpr int kCodeKeys = 16;     // keys of a code block
constexpr int kSummaryKeys = 64;  // keys of a value summary: four code blocks
constexpr int kCodeHeads = 8;     // most query heads scanned at once
constexpr int kMostQuads = 64;    // most groups of four dimensions in a code
constexpr int kMostHighest = 64;  // most highest scores found in one pass

// A code has 4 * eight dimensions of 8 bits, then 8 * four of 4 bits. Blocks of kCodeKeys keys are
// transposed: `eight` lines of 64 bytes with four dimensions of each key, then `four` lines whose
// low nibbles are four dimensions of each key and whose high nibbles are the next four.
struct CodeFormat {
  int eight;
  int four;

  int dims() const { return 4 * eight + 8 * four; }
  int quads() const { return eight + 2 * four; }
  int key_bytes() const { return 4 * (eight + four); }
  int64_t block_bytes() const { return static_cast<int64_t>(kCodeKeys) * key_bytes(); }
};

// int8 weights of `heads` query heads, four dimensions to an int32, in the code's order. The score
// of a code c is sum over 8-bit dimensions of w * c, plus 16 times that over 4-bit dimensions.
struct CodeQueries {
  CodeFormat format;
  int heads;
  int32_t weights[kCodeHeads][kMostQuads];
};

// Codes with a score above its head's threshold, for any head: ids, and scores[head * capacity +
// i].
struct CodeHits {
  int32_t* ids;
  int32_t* scores;
  int64_t capacity;
  int64_t count;
};

// Where the keys that are no hits leave exp(logit - reference) per summary: sums[summary *
// kCodeHeads
// + head], logit being score * slope + offset, then softcapped if softcap > 0.
struct CodeTail {
  float* sums;
  float softcap;
  float slope[kCodeHeads];
  float offset[kCodeHeads];
  float reference[kCodeHeads];
};

struct KernelTable {
  // scores[i * kTile + r] = <query r, row i of the choice>.
  void (*score)(const Rows& keys, const RowChoice& choice, const QueryTile& queries, float* scores);

  // scores[i * kPanel + r] = sum over c of panel[c * kPanel + r] * keys[i * dim + c].
  void (*score_panel)(const float* keys, int64_t count, int dim, const float* panel, float* scores);

  // scores -> logits in place, for count * lanes scores.
  void (*to_logits)(float* scores, int64_t count, const LogitRule& rule);

  // One step of online softmax over logits [count][lanes], lanes being kTile or kPanel: raises
  // highest[lanes], turns logits into exp(logit - highest), sets rescale[lanes] to the factor by
  // which earlier sums shrink, and updates total[lanes]. Writes up to 15 floats past the logits.
  void (*softmax_step)(float* logits, int64_t count, int lanes, float* highest, float* total,
                       float* rescale);

  // acc[r * dim + c] += sum over i of weights[i * lanes + r] * values[row i][c], for r < lanes.
  void (*accumulate)(const Rows& values, const RowChoice& choice, const float* weights, int lanes,
                     float* acc);

  // out[i * dim + c] = rows [first, first + count) as float32, densely.
  void (*widen)(const Rows& rows, int64_t first, int64_t count, float* out);

  // Lowest and highest of values[0 .. count), count >= 1, none NaN.
  void (*value_range)(const float* values, int64_t count, float* lowest, float* highest);

  // How many of values[0 .. count) are above the threshold.
  int64_t (*count_above)(const float* values, int64_t count, float threshold);

  // Sum of those of values[0 .. count) above the threshold.
  double (*sum_above)(const float* values, int64_t count, float threshold);

  // The `wanted`-th highest of the scores, 1 <= wanted <= min(kMostHighest, count).
  int32_t (*nth_highest)(const int32_t* scores, int64_t count, int64_t wanted);

  // Scores of `count` code blocks, `step` apart from `first`: out[(head * count + i) * kCodeKeys +
  // key].
  void (*code_scores)(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t step,
                      int64_t count, int32_t* out);

  // Scans the whole summaries [first, stop) and appends hits in order of their ids. `tail` may be
  // null.
  void (*code_scan)(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,
                    const int32_t* thresholds, CodeHits& hits, const CodeTail* tail);
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAmxKernels;

}  // namespace longreach
