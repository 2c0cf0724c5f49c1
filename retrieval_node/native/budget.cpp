#include "budget.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "workspace.h"

namespace longreach {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr Cut kKeepAll = {kMinusInfinity, kAllTies};

// Moves the `wanted` highest, in any order, to the front. One pass with a rising bar: for
// wanted << count few logits pass it, so this reads the logits once and sorts little.
void highest_to_front(float* logits, int64_t count, int64_t wanted) {
  const int64_t room = std::min(count, std::max<int64_t>(2 * wanted, 256));
  int64_t kept = room;
  float bar = kMinusInfinity;
  const auto raise_bar = [&] {
    std::nth_element(logits, logits + wanted - 1, logits + kept, std::greater<float>());
    bar = logits[wanted - 1];
    kept = wanted;
  };
  for (int64_t i = room; i < count; ++i) {
    if (!(logits[i] > bar)) continue;
    if (kept == room) raise_bar();
    if (logits[i] > bar) std::swap(logits[kept++], logits[i]);
  }
  raise_bar();
}

}  // namespace

Cut cut_highest(float* logits, int64_t count, int64_t wanted) {
  if (wanted >= count) return kKeepAll;
  if (wanted <= 0) return {std::numeric_limits<float>::infinity(), 0};
  highest_to_front(logits, count, wanted);
  const float threshold = *std::min_element(logits, logits + wanted);
  const int64_t above =
      std::count_if(logits, logits + wanted, [&](float z) { return z > threshold; });
  return {threshold, wanted - above};
}

// Quickselect by weight: the answer lies in (first, last], and weights before `first` are taken.
int64_t fewest_for_sum(float* weights, int64_t count, double needed) {
  int64_t first = 0, last = count;
  while (last - first > 1) {
    const int64_t middle = first + (last - first) / 2;
    std::nth_element(weights + first, weights + middle, weights + last, std::greater<float>());
    double upper = 0;
    for (int64_t i = first; i < middle; ++i) upper += static_cast<double>(weights[i]);
    if (upper >= needed) {
      last = middle;
    } else {
      needed -= upper;
      first = middle;
    }
  }
  return last;
}

int64_t keys_for_mass(float* logits, int64_t count, double mass, float rest_lse) {
  if (count == 0) return 0;
  const float top = *std::max_element(logits, logits + count);
  if (top == kMinusInfinity) return count;
  double total = std::exp(static_cast<double>(rest_lse - top));
  for (int64_t i = 0; i < count; ++i) {
    logits[i] = std::exp(logits[i] - top);
    total += static_cast<double>(logits[i]);
  }
  return fewest_for_sum(logits, count, mass * total);
}

namespace {

// Selects twice: weights to count the keys, then logits to find their edge without rounding.
Cut cut_mass(const Budget& budget, float* logits, int64_t count, float rest_lse) {
  thread_local Workspace<float> memory;
  float* weights = memory.reserve(count);
  std::copy_n(logits, count, weights);
  int64_t wanted = std::max(keys_for_mass(weights, count, budget.mass, rest_lse), budget.floor);
  if (budget.ceiling > 0) wanted = std::min(wanted, budget.ceiling);
  return cut_highest(logits, count, wanted);
}

}  // namespace

Cut cut_of(const Budget& budget, float* logits, int64_t count, float lowest, float rest_lse) {
  if (budget.rule == BudgetRule::kExact || count == 0) return kKeepAll;
  Cut cut = kKeepAll;
  if (budget.rule == BudgetRule::kTopK) {
    cut = cut_highest(logits, count, budget.top_k);
  } else if (budget.rule == BudgetRule::kBeta) {
    cut.threshold = *std::max_element(logits, logits + count) - budget.beta;
  } else {
    cut = cut_mass(budget, logits, count, rest_lse);
  }
  if (lowest > cut.threshold) cut = {lowest, kAllTies};
  return cut;
}

}  // namespace longreach
