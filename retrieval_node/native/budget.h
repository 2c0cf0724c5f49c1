// How many keys a query head keeps, decided on exact logits.
#pragma once

#include <cstdint>

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

// Keeps logits above `threshold` and the first `ties` of those equal to it.
struct Cut {
  float threshold;
  int64_t ties;
};

constexpr int64_t kAllTies = INT64_MAX;

// The cut of one query head over logits[0 .. count), which it may overwrite. `lowest` drops logits
// below it, unless the budget is exact. `rest_lse` is the log of the summed exponentials of keys not
// listed (-infinity: none); only the mass rule uses it.
Cut cut_of(const Budget& budget, float* logits, int64_t count, float lowest, float rest_lse);

// How many of the highest logits hold `mass` of exp(rest_lse) plus all their exponentials; at most
// `count`. Overwrites logits.
int64_t keys_for_mass(float* logits, int64_t count, double mass, float rest_lse);

// Fewest of the highest weights (>= 0) whose sum reaches `needed`; `count` if all do not, and at
// least 1 if count > 0. Moves them to the front.
int64_t fewest_for_sum(float* weights, int64_t count, double needed);

// The cut that keeps the `wanted` highest. Reorders logits.
Cut cut_highest(float* logits, int64_t count, int64_t wanted);

}  // namespace longreach
