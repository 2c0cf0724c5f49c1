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

// A value with `above` >= wanted values above it: as many as wanted unless there are ties or wild
// outliers. -infinity if it has to be below all of them.
struct Bar {
  float value;
  int64_t above;
};

// Bisection by counting, which costs a fast pass each time.
Bar bar_below(const KernelTable& k, const float* logits, int64_t count, int64_t wanted) {
  constexpr int kMostPasses = 32;
  float low, high;
  k.value_range(logits, count, &low, &high);
  Bar bar{kMinusInfinity, count};
  for (int pass = 0; pass < kMostPasses && bar.above > wanted; ++pass) {
    const float middle = 0.5f * low + 0.5f * high;
    if (!(middle > low && middle < high)) break;
    const int64_t above = k.count_above(logits, count, middle);
    (above >= wanted ? low : high) = middle;
    if (above >= wanted) bar = {middle, above};
  }
  return bar;
}

}  // namespace

Cut cut_highest(const KernelTable& k, const float* logits, int64_t count, int64_t wanted) {
  thread_local Workspace<float> memory;
  if (wanted >= count) return kKeepAll;
  if (wanted <= 0) return {std::numeric_limits<float>::infinity(), 0};
  const auto [bar, found] = bar_below(k, logits, count, wanted);
  if (found == wanted)
    return {std::nextafter(bar, std::numeric_limits<float>::infinity()), kAllTies};
  float* above = memory.reserve(count);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    above[kept] = logits[i];
    kept += logits[i] > bar || bar == kMinusInfinity;
  }
  std::nth_element(above, above + wanted - 1, above + kept, std::greater<float>());
  const float threshold = above[wanted - 1];
  const int64_t higher =
      std::count_if(above, above + wanted, [&](float z) { return z > threshold; });
  const int64_t equal = std::count(above, above + kept, threshold);
  return {threshold, higher + equal == wanted ? kAllTies : wanted - higher};
}

Heaviest fewest_for_sum(const KernelTable& k, const float* weights, int64_t count, double needed) {
  constexpr int kMostPasses = 40;
  constexpr int64_t kFew = 64;
  thread_local Workspace<float> memory;
  if (count == 0) return {0, 0};
  float low, high;
  k.value_range(weights, count, &low, &high);
  // What lies above `high` weighs less than needed; what lies above `low`, enough, or it is all
  // there is. Bisection goes by ratio, as weights are exponentials.
  double above_high = 0;
  int64_t count_high = 0, count_low = count;
  low = -1;
  float next = high * 0.5f;
  for (int pass = 0; pass < kMostPasses && count_low - count_high > kFew; ++pass) {
    if (!(next > std::max(low, 0.0f) && next < high)) break;
    const double sum = k.sum_above(weights, count, next);
    const int64_t above = k.count_above(weights, count, next);
    if (sum >= needed) {
      low = next;
      count_low = above;
    } else {
      high = next;
      above_high = sum;
      count_high = above;
    }
    next = low > 0 ? std::sqrt(low) * std::sqrt(high) : high * 0.0625f;
  }
  float* band = memory.reserve(count);
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) {
    band[size] = weights[i];
    size += weights[i] > low && !(count_high > 0 && weights[i] > high);
  }
  std::sort(band, band + size, std::greater<float>());
  int64_t taken = 0;
  double sum = above_high;
  while (taken < size && (taken == 0 || sum < needed)) sum += static_cast<double>(band[taken++]);
  const float last = taken > 0 ? band[taken - 1] : high;
  return {count_high + taken, std::nextafter(last, -1.0f)};
}

namespace {

int64_t keys_for_mass(const KernelTable& k, const float* logits, int64_t count, double mass,
                      float rest_lse) {
  thread_local Workspace<float> memory;
  float lowest, top;
  k.value_range(logits, count, &lowest, &top);
  if (top == kMinusInfinity) return count;
  float* weights = memory.reserve(count);
  double total = std::exp(static_cast<double>(rest_lse - top));
  for (int64_t i = 0; i < count; ++i) {
    weights[i] = std::exp(logits[i] - top);
    total += static_cast<double>(weights[i]);
  }
  return fewest_for_sum(k, weights, count, mass * total).count;
}

// Weights decide how many keys; the logits decide which, free of rounding.
Cut cut_mass(const KernelTable& k, const Budget& budget, const float* logits, int64_t count,
             float rest_lse) {
  int64_t wanted = std::max(keys_for_mass(k, logits, count, budget.mass, rest_lse), budget.floor);
  if (budget.ceiling > 0) wanted = std::min(wanted, budget.ceiling);
  return cut_highest(k, logits, count, wanted);
}

}  // namespace

Cut cut_of(const KernelTable& k, const Budget& budget, const float* logits, int64_t count,
           float lowest, float rest_lse) {
  if (budget.rule == BudgetRule::kExact || count == 0) return kKeepAll;
  Cut cut = kKeepAll;
  if (budget.rule == BudgetRule::kTopK) {
    cut = cut_highest(k, logits, count, budget.top_k);
  } else if (budget.rule == BudgetRule::kBeta) {
    float low, high;
    k.value_range(logits, count, &low, &high);
    cut.threshold = high - budget.beta;
  } else {
    cut = cut_mass(k, budget, logits, count, rest_lse);
  }
  if (lowest > cut.threshold) cut = {lowest, kAllTies};
  return cut;
}

}  // namespace longreach
