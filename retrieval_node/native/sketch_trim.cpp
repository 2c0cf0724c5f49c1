// What becomes of the keys that a scan listed: which are read, which join the tail.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "sketch_search.h"

namespace longreach {
namespace {

// Fewer are read where those left out would add no more than about this error.
constexpr double kTailError = 0.015;
// A head with more hits than this many times the wanted ones is trimmed before the exact step.
constexpr double kTrimAbove = 2.0;

}  // namespace

void SketchSearch::trim(const KernelTable& k, const HeadTask& task) {
  const Budget& budget = task.entry->budget;
  if (budget.rule == BudgetRule::kMass) raise_mass_bars(k, task, stop_, 1);
  if (tail_sums_) weigh_hits(k);
  if (budget.rule == BudgetRule::kTopK && budget.tail_estimate) return choose_for_tail(k, task);
  bool raised = budget.rule != BudgetRule::kTopK;  // other rules raise bars during the scan
  for (int head = 0; head < task.group; ++head) {
    double most = std::numeric_limits<double>::infinity();
    if (budget.rule == BudgetRule::kTopK) most = wanted_[head];
    if (budget.rule == BudgetRule::kMass && budget.ceiling > 0)
      most = oversampling_[head] * static_cast<double>(budget.ceiling);
    if (static_cast<double>(hits_above_bar(head)) < kTrimAbove * most) continue;
    const int32_t* scores = hits_.scores + head * hits_.capacity;
    const int32_t bar = bar_above(k, scores, hits_.count, static_cast<int64_t>(most));
    raised = raised || bar > bars_[head];
    bars_[head] = std::max(bars_[head], bar);
  }
  if (raised) drop_below_bars();
}

// Weighs all hits, for each head.
void SketchSearch::weigh_hits(const KernelTable& k) {
  const int heads = queries_.codes.heads;
  float* kept = weights_memory_.reserve(heads * hits_.count);
  for (int head = 0; head < heads; ++head) {
    weights_[head] = weigh(k, head, hits_.scores + head * hits_.capacity, hits_.count);
    std::copy_n(column_.reserve(0), hits_.count, kept + head * hits_.count);
  }
}

// Which hits to read beside those that the budget names, for all heads together. A key helps a head
// by its share of the head's attention, so those with the highest sum of shares come first, up to
// kTailShare of the scope a head. The error that estimating a key leaves goes with the square of
// its weight, for what is estimated, its value before all, is wrong independently of the others:
// where few keys hold nearly all of the squares, no more are read.
void SketchSearch::choose_for_tail(const KernelTable& k, const HeadTask& task) {
  const int heads = task.group;
  const int64_t count = hits_.count;
  int32_t named[kCodeHeads];
  for (int head = 0; head < heads; ++head)
    named[head] = bar_above(k, hits_.scores + head * hits_.capacity, count,
                            static_cast<int64_t>(named_[head]));
  const float* weights = weights_memory_.reserve(0);
  float* shares = column_.reserve(2 * (count + kPanel));
  float* squares = shares + count + kPanel;
  std::fill_n(shares, count, 0.0f);
  std::fill_n(squares, count, 0.0f);
  double needed = 0;
  for (int head = 0; head < heads; ++head) {
    const float* own = weights + head * count;
    // Keys that are no hits weigh at most `bar` each, half of that when it counts. A head without
    // hits of its own may have its bar far above what others hit.
    constexpr double kFarAbove = 60;
    const double bar =
        std::exp(std::min(kFarAbove, static_cast<double>(reference(head) - weights_[head].top)));
    const double rest = bar * tail_sum_to(head, stop_);
    double listed = 0;
    for (int64_t i = 0; i < count; ++i) listed += static_cast<double>(own[i] * own[i]);
    const double all = listed + 0.5 * bar * rest;
    needed += 1 - kTailError * kTailError;
    const auto per_mass = static_cast<float>(1 / (weights_[head].sum + rest));
    const auto per_square = static_cast<float>(1 / all);
    for (int64_t i = 0; i < count; ++i) {
      shares[i] += own[i] * per_mass;
      squares[i] += own[i] * own[i] * per_square;
    }
  }
  // Logits beyond floats have no order: then all hits are read.
  const double sum =
      std::accumulate(shares, shares + count, 0.0) + std::accumulate(squares, squares + count, 0.0);
  if (!std::isfinite(sum)) return;
  const double length = static_cast<double>(task.entry->rows.stop - task.entry->rows.start);
  const auto most = static_cast<int64_t>(kTailShare * heads * length);
  const float* rank = shares;
  float bar = cut_highest(k, shares, count, most).threshold;
  const Heaviest heaviest = fewest_for_sum(k, squares, count, needed);
  if (heaviest.count < most) {
    rank = squares;
    bar = heaviest.bar;
  }
  drop([&](int64_t i) {
    bool keep = rank[i] >= bar;
    for (int head = 0; head < heads; ++head)
      keep = keep || hits_.scores[head * hits_.capacity + i] > named[head];
    return keep;
  });
}

// Keeps the hits above some head's bar.
void SketchSearch::drop_below_bars() {
  const int heads = queries_.codes.heads;
  drop([&](int64_t i) {
    bool keep = false;
    for (int head = 0; head < heads; ++head)
      keep = keep || hits_.scores[head * hits_.capacity + i] > bars_[head];
    return keep;
  });
}

// Keeps the hits i with keep(i); the others join the tail.
template <class Keep>
void SketchSearch::drop(Keep keep) {
  const int heads = queries_.codes.heads;
  const int64_t count = hits_.count;
  const float* weights = weights_memory_.reserve(0);
  double to_tail[kCodeHeads] = {};
  if (tail_sums_)
    for (int head = 0; head < heads; ++head)
      to_tail[head] = std::exp(
          static_cast<double>(std::min(kLargestTail, weights_[head].top - reference(head))));
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t id = hits_.ids[i];
    if (keep(i)) {
      hits_.ids[kept++] = id;
    } else if (tail_sums_) {
      for (int head = 0; head < heads; ++head)
        tail_sum(id / kSummaryKeys, head) +=
            static_cast<float>(static_cast<double>(weights[head * count + i]) * to_tail[head]);
    }
  }
  hits_.count = kept;
}

void SketchSearch::add_edges(const HeadTask& task) {
  const AttentionRows& rows = task.entry->rows;
  int32_t* ids = ids_.reserve(0);
  int64_t count = 0;
  for (int64_t id = rows.start; id < first_ * kSummaryKeys; ++id)
    ids[count++] = static_cast<int32_t>(id);
  count += hits_.count;  // they lie right behind the leading edge
  for (int64_t id = stop_ * kSummaryKeys; id < rows.stop; ++id)
    ids[count++] = static_cast<int32_t>(id);
  candidates_ = {ids, 0, count};
}

}  // namespace longreach
