// The query-whitened sketch of a KV head: short codes of all keys, scanned to find the few whose
// rows are read in full, and a mean value per 64 keys for the rest.
//
// Keys are centred and turned into a basis in which sampled queries have unit second moment and
// keys are uncorrelated, strongest first. A code holds the leading dimensions, some in 8 bits and
// some in
// 4. What the code leaves out has known variance, so its effect on exp(logit) is known on average.
#pragma once

#include <cstdint>
#include <vector>

#include "chosen.h"
#include "kernels.h"

namespace longreach {

// Everything about one KV head. Whitened key dimension i is about low[i] + step[i] * code[i].
struct SketchHead {
  CodeFormat format;
  const uint8_t* codes;    // ceil(n / kCodeKeys) blocks
  Rows summaries;          // mean value of each kSummaryKeys keys, ceil(n / kSummaryKeys) rows
  const float* transform;  // [head_dim + 1, head_dim]: query to whitened query; last row: mean key
  const float* step;       // [dims]
  const float* low;        // [dims]
  const float* noise;      // [dims] variance of the rounding of whitened keys
  const float* variance;   // [head_dim] of whitened keys
};

// Encodes keys [0, count): code[i] = floor(weights[i] . key + bias[i]), clipped to its bits.
// weights [dims, head_dim], bias [dims]. Returns the first key that is not finite, or -1.
int64_t encode_sketch(const Rows& keys, int64_t count, const CodeFormat& format,
                      const float* weights, const float* bias, uint8_t* codes);

// Mean of each kSummaryKeys values, as bfloat16 [ceil(count / kSummaryKeys), dim].
void summarise_values(const Rows& values, int64_t count, uint16_t* summaries);

// Each entry's budget over the keys the sketch finds. heads[h] belongs to KV head h of the layer.
void attend_sketch(const LayerKv& kv, const std::vector<SketchHead>& heads,
                   const std::vector<BudgetedRows>& batch, const LogitRule& rule);

}  // namespace longreach
