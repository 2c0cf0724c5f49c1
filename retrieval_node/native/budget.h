// How many keys a query head keeps, decided on exact logits.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace longreach {

enum class BudgetRule : int { kExact = 0, kTopK = 1, kMass = 2, kBeta = 3 };

// As longreach.types.Budget. `floor` and `ceiling` (0: none) bound the mass rule's keys.
struct Budget {
  BudgetRule rule;
  int64_t top_k;
  double mass;
  int64_t floor;
  int64_t ceiling;
  float beta;
  bool tail_estimate;
};

// Whether attending every key is within the budget: it asks for a least mass and caps nothing, or
// lets what lies outside be estimated, of which the truth is the best estimate.
inline bool may_use_all(const Budget& budget) {
  return budget.tail_estimate || (budget.rule == BudgetRule::kMass && budget.ceiling == 0);
}

// Keeps logits above `threshold`, which need not be one of them, and the first `ties` of those
// equal to it.
struct Cut {
  float threshold;
  int64_t ties;
};

constexpr int64_t kAllTies = INT64_MAX;

// The cut of one query head over logits[0 .. count). `lowest` drops logits below it, unless the
// budget is exact. `rest_lse` is the log of the summed exponentials of keys not listed (-infinity:
// none); only the mass rule uses it.
Cut cut_of(const KernelTable& k, const Budget& budget, const float* logits, int64_t count,
           float lowest, float rest_lse);

// Fewest of the highest weights (>= 0) whose sum reaches `needed`: the `count` highest, all of them
// if that is not enough, at least one if there are any. They are those above `bar`, but for ties.
struct Heaviest {
  int64_t count;
  float bar;
};
Heaviest fewest_for_sum(const KernelTable& k, const float* weights, int64_t count, double needed);

// The cut that keeps the `wanted` highest; none may be NaN.
Cut cut_highest(const KernelTable& k, const float* logits, int64_t count, int64_t wanted);

}  // namespace longreach
