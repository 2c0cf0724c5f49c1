// The specification of every kernel: plain loops, nothing clever.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "kernels.h"
#include "tiers/codes.h"

namespace longreach {
namespace {

int64_t row_index(const RowChoice& choice, int64_t i) {
  return choice.ids ? choice.ids[i] : choice.first + i;
}

// Calls body(Element{}) with the element type of the storage.
template <class Body>
void with_element(Storage type, Body body) {
  switch (type) {
    case Storage::kFloat32:
      return body(float{});
    case Storage::kFloat16:
      return body(Half{});
    case Storage::kBfloat16:
      return body(Bfloat16{});
  }
}

void score(const Rows& keys, const RowChoice& choice, const QueryTile& queries, float* scores) {
  with_element(keys.type, [&](auto element) {
    for (int64_t i = 0; i < choice.count; ++i) {
      const auto* key = keys.row<decltype(element)>(row_index(choice, i));
      for (int r = 0; r < kTile; ++r) {
        float sum = 0;
        for (int c = 0; c < keys.dim; ++c)
          sum += queries.wide[r * queries.stride + c] * to_float(key[c]);
        scores[i * kTile + r] = sum;
      }
    }
  });
}

void score_panel(const float* keys, int64_t count, int dim, const float* panel, float* scores) {
  for (int64_t i = 0; i < count; ++i)
    for (int r = 0; r < kPanel; ++r) {
      float sum = 0;
      for (int c = 0; c < dim; ++c) sum += panel[c * kPanel + r] * keys[i * dim + c];
      scores[i * kPanel + r] = sum;
    }
}

void to_logits(float* scores, int64_t count, const LogitRule& rule) {
  for (int64_t i = 0; i < count; ++i) {
    const float logit = scores[i] * rule.scale;
    scores[i] = rule.softcap > 0 ? rule.softcap * std::tanh(logit / rule.softcap) : logit;
  }
}

void softmax_step(float* logits, int64_t count, int lanes, float* highest, float* total,
                  float* rescale) {
  for (int r = 0; r < lanes; ++r) {
    float top = highest[r];
    for (int64_t i = 0; i < count; ++i) top = std::fmax(top, logits[i * lanes + r]);
    const float shift = std::isinf(top) ? 0.0f : top;
    rescale[r] = std::exp(highest[r] - shift);
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      float& logit = logits[i * lanes + r];
      logit = std::exp(logit - shift);
      sum += logit;
    }
    total[r] = total[r] * rescale[r] + sum;
    highest[r] = top;
  }
}

void accumulate(const Rows& values, const RowChoice& choice, const float* weights, int lanes,
                float* acc) {
  with_element(values.type, [&](auto element) {
    for (int64_t i = 0; i < choice.count; ++i) {
      const auto* value = values.row<decltype(element)>(row_index(choice, i));
      for (int r = 0; r < lanes; ++r)
        for (int c = 0; c < values.dim; ++c)
          acc[r * values.dim + c] += weights[i * lanes + r] * to_float(value[c]);
    }
  });
}

void widen(const Rows& rows, int64_t first, int64_t count, float* out) {
  with_element(rows.type, [&](auto element) {
    for (int64_t i = 0; i < count; ++i)
      for (int c = 0; c < rows.dim; ++c)
        out[i * rows.dim + c] = to_float(rows.row<decltype(element)>(first + i)[c]);
  });
}

void value_range(const float* values, int64_t count, float* lowest, float* highest) {
  *lowest = *highest = values[0];
  for (int64_t i = 1; i < count; ++i) {
    *lowest = std::fmin(*lowest, values[i]);
    *highest = std::fmax(*highest, values[i]);
  }
}

int64_t count_above(const float* values, int64_t count, float threshold) {
  int64_t above = 0;
  for (int64_t i = 0; i < count; ++i) above += values[i] > threshold;
  return above;
}

double sum_above(const float* values, int64_t count, float threshold) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i)
    if (values[i] > threshold) sum += static_cast<double>(values[i]);
  return sum;
}

int32_t nth_highest(const int32_t* scores, int64_t count, int64_t wanted) {
  std::vector<int32_t> ordered(scores, scores + count);
  std::nth_element(ordered.begin(), ordered.begin() + (wanted - 1), ordered.end(),
                   std::greater<int32_t>());
  return ordered[wanted - 1];
}

}  // namespace

const KernelTable kScalarKernels = {
    score,       score_panel, to_logits, softmax_step, accumulate,          widen,
    value_range, count_above, sum_above, nth_highest,  scalar::code_scores, scalar::code_scan,
};

}  // namespace longreach
