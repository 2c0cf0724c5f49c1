#include "sketch_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace longreach {
namespace {

// Scopes up to this long are read whole: scanning codes and sampling them would cost as much.
constexpr int64_t kReadWhole = 4096;
// Candidates per wanted key. The code's order is not the exact one; this many keep recall@100 above
// .95 on measured heads.
constexpr double kOversampling = 4.0;
constexpr int64_t kFewestCandidates = 64;
// A tail estimate is as good as what it need not estimate: at least this share of the scope is read.
constexpr double kTailShare = 1.0 / 128;
// Code blocks sampled to set the bars, and sampled keys that should lie above a bar.
constexpr int64_t kSampleBlocks = 384;
constexpr double kSampledAbove = 16;
// Summaries scanned between two looks at the bars.
constexpr int64_t kChunk = 128;
// Standard deviations of the sketch's error allowed for where a rule is about logits.
constexpr float kErrorMargin = 3.0f;
// Gathered rows arrive at about a fifth of the rate of rows in order, so beyond this share of the
// scope it is quicker to read all of it, where the budget allows that.
constexpr double kGatherShare = 0.2;
// Each retry lowers the bars to find this many times as many keys.
constexpr double kWidening = 4.0;
// A head with more hits than this many times the wanted ones is trimmed before the exact step.
constexpr double kTrimAbove = 1.5;

// Candidates a head should have.
double wanted_of(const HeadTask& task) {
  const Budget& budget = task.entry->budget;
  const auto length = static_cast<double>(task.entry->rows.stop - task.entry->rows.start);
  double keys = 0;
  if (budget.rule == BudgetRule::kTopK) keys = static_cast<double>(budget.top_k);
  if (budget.rule == BudgetRule::kMass) keys = static_cast<double>(budget.floor);
  const double wanted = kOversampling * keys + kFewestCandidates;
  return budget.tail_estimate ? std::max(wanted, kTailShare * length) : wanted;
}

int32_t as_score(float value) {
  constexpr float kLimit = 2e9f;
  return static_cast<int32_t>(std::min(std::max(value, -kLimit), kLimit));
}

// The mass to look for: a little more than wanted, as the sketch does not find exactly the best keys.
double cautious_mass(double mass, double widening) { return 1.0 - (1.0 - mass) * 0.8 / widening; }

}  // namespace

void SketchSearch::run(const KernelTable& k, const SketchHead& sketch, const HeadTask& task) {
  const AttentionRows& rows = task.entry->rows;
  const Budget& budget = task.entry->budget;
  const int64_t length = rows.stop - rows.start;
  first_ = (rows.start + kSummaryKeys - 1) / kSummaryKeys;
  stop_ = std::max(first_, rows.stop / kSummaryKeys);
  sketched_ = 0;
  tail_sums_ = nullptr;
  const double wanted = wanted_of(task);
  if (budget.rule == BudgetRule::kExact || length <= kReadWhole || 2 * wanted >= length)
    return take_everything(task);
  queries_ = sketch_queries(k, sketch, task);
  sample(k, sketch, static_cast<int64_t>(wanted));
  for (double widening = 1; 2 * wanted * widening < length; widening *= kWidening) {
    set_bars(k, task, widening);
    scan(k, sketch, task);
    if (!enough(task)) continue;
    trim(task);
    const bool too_many = static_cast<double>(hits_.count) > kGatherShare * static_cast<double>(length);
    if (too_many && may_use_all(budget)) break;
    return add_edges(task);
  }
  take_everything(task);
}

void SketchSearch::take_everything(const HeadTask& task) {
  const AttentionRows& rows = task.entry->rows;
  candidates_ = {nullptr, rows.start, rows.stop - rows.start};
  first_ = stop_ = 0;
  tail_sums_ = nullptr;
}

// ---- bars from a sample ----------------------------------------------------------------------------

void SketchSearch::sample(const KernelTable& k, const SketchHead& sketch, int64_t wanted) {
  const int64_t per_summary = kSummaryKeys / kCodeKeys;
  const int64_t blocks = (stop_ - first_) * per_summary;
  const auto for_bar =
      static_cast<int64_t>(kSampledAbove * static_cast<double>(blocks) / static_cast<double>(wanted));
  const int64_t count = std::min(blocks, std::max(kSampleBlocks, for_bar));
  const int64_t step = blocks / count;
  sampled_ = count * kCodeKeys;
  int32_t* scores = sample_scores_.reserve(sampled_ * queries_.codes.heads);
  k.code_scores(sketch.codes, queries_.codes, first_ * per_summary + step / 2, step, count, scores);
}

float* SketchSearch::sampled_scores(int head) {
  float* column = column_.reserve(sampled_ + kPanel);
  const int32_t* scores = sample_scores_.reserve(0) + head * sampled_;
  for (int64_t i = 0; i < sampled_; ++i) column[i] = static_cast<float>(scores[i]);
  return column;
}

void SketchSearch::set_bars(const KernelTable& k, const HeadTask& task, double widening) {
  const Budget& budget = task.entry->budget;
  for (int head = 0; head < task.group; ++head) {
    floored_[head] = false;
    if (budget.rule == BudgetRule::kTopK) {
      bars_[head] = bar_for_count(head, wanted_of(task) * widening);
    } else if (budget.rule == BudgetRule::kBeta) {
      const float* scores = sampled_scores(head);
      bars_[head] = bar_for_beta(head, budget.beta, as_score(*std::max_element(scores, scores + sampled_)));
    } else {
      int32_t bar = bar_for_mass(k, task, head, cautious_mass(budget.mass, widening));
      if (budget.ceiling > 0)
        bar = std::max(bar, bar_for_count(head, kOversampling * static_cast<double>(budget.ceiling)));
      bars_[head] = std::min(bar, bar_for_count(head, wanted_of(task) * widening));
    }
  }
  raise_to_floor(task);
}

int32_t SketchSearch::bar_for_count(int head, double wanted) {
  const double scanned = static_cast<double>((stop_ - first_) * kSummaryKeys);
  const auto above =
      std::max<int64_t>(1, static_cast<int64_t>(wanted / scanned * static_cast<double>(sampled_)));
  return as_score(cut_highest(sampled_scores(head), sampled_, above).threshold - 1.0f);
}

int32_t SketchSearch::bar_for_mass(const KernelTable& k, const HeadTask& task, int head, double mass) {
  float* column = sampled_scores(head);
  for (int64_t i = 0; i < sampled_; ++i)
    column[i] = column[i] * queries_.slope[head] + queries_.offset[head];
  k.to_logits(column, sampled_, {1.0f, task.rule.softcap});
  const float top = *std::max_element(column, column + sampled_);
  float highest[kTile] = {top, top, top, top}, totals[kTile] = {}, rescale[kTile];
  k.softmax_step(column, sampled_ / kTile, kTile, highest, totals, rescale);
  const double total = totals[0] + totals[1] + totals[2] + totals[3];
  const int64_t count = fewest_for_sum(column, sampled_, mass * total);
  // The bar as a score: that of the sampled key whose weight closes the sum.
  return as_score(cut_highest(sampled_scores(head), sampled_, count).threshold - 1.0f);
}

int32_t SketchSearch::bar_for_beta(int head, float beta, int32_t highest) const {
  const float below = beta + kErrorMargin * std::sqrt(queries_.residual[head]);
  return as_score(static_cast<float>(highest) - below / queries_.slope[head]);
}

// Keys that the logit floor would drop anyway need not be read. With a softcap the floor is not a
// linear function of the score, and a tail estimate wants every key, so there it applies later.
void SketchSearch::raise_to_floor(const HeadTask& task) {
  const Budget& budget = task.entry->budget;
  if (task.entry->logit_floor == nullptr || task.rule.softcap > 0 || budget.tail_estimate ||
      budget.rule == BudgetRule::kMass)
    return;
  for (int head = 0; head < task.group; ++head) {
    const float lowest = task.lowest_logit(head) - kErrorMargin * std::sqrt(queries_.residual[head]);
    const int32_t bar = as_score((lowest - queries_.offset[head]) / queries_.slope[head]);
    floored_[head] = bar > bars_[head];
    bars_[head] = std::max(bar, bars_[head]);
  }
}

// ---- the scan --------------------------------------------------------------------------------------

void SketchSearch::scan(const KernelTable& k, const SketchHead& sketch, const HeadTask& task) {
  const Budget& budget = task.entry->budget;
  const int64_t keys = (stop_ - first_) * kSummaryKeys;
  const int64_t edge = first_ * kSummaryKeys - task.entry->rows.start;
  const int64_t edges = task.entry->rows.stop - task.entry->rows.start - keys;
  hits_ = {ids_.reserve(keys + edges) + edge, scores_.reserve(keys * task.group), keys, 0};
  tail_sums_ = nullptr;
  if (budget.tail_estimate || budget.rule == BudgetRule::kMass) {
    tail_sums_ = tail_memory_.reserve((stop_ - first_) * kCodeHeads);
    tail_.sums = tail_sums_ - first_ * kCodeHeads;
  }
  tail_.softcap = task.rule.softcap;
  for (int head = 0; head < task.group; ++head) {
    tail_.slope[head] = queries_.slope[head];
    tail_.offset[head] = queries_.offset[head];
    tail_.reference[head] = logit_of(head, bars_[head]);
    correction_[head] = correction_of(head);
  }
  int32_t highest[kCodeHeads];
  std::fill_n(highest, kCodeHeads, std::numeric_limits<int32_t>::min());
  for (int64_t at = first_; at < stop_; at += kChunk) {
    const int64_t before = hits_.count;
    k.code_scan(sketch.codes, queries_.codes, at, std::min(stop_, at + kChunk), bars_, hits_,
                tail_sums_ ? &tail_ : nullptr);
    if (budget.rule != BudgetRule::kBeta) continue;
    for (int head = 0; head < task.group; ++head) {  // the best so far raises the bar
      const int32_t* scores = hits_.scores + head * hits_.capacity;
      for (int64_t i = before; i < hits_.count; ++i) highest[head] = std::max(highest[head], scores[i]);
      if (highest[head] > bars_[head])
        bars_[head] = std::max(bars_[head], bar_for_beta(head, budget.beta, highest[head]));
    }
  }
  sketched_ += keys;
}

float SketchSearch::logit_of(int head, int32_t score) const {
  const float logit = static_cast<float>(score) * queries_.slope[head] + queries_.offset[head];
  return tail_.softcap > 0 ? tail_.softcap * std::tanh(logit / tail_.softcap) : logit;
}

// With f the softcap and e an error of variance r, E[exp(f(z + e))] is about exp(f(z) + r / 2 * (f'^2
// + f'')). Keys near the bar weigh most, so both derivatives are taken there; without a softcap they
// are 1 and 0.
float SketchSearch::correction_of(int head) const {
  float first = 1, second = 0;
  if (tail_.softcap > 0) {
    const float t = tail_.reference[head] / tail_.softcap;
    first = 1 - t * t;
    second = -2 * t * first / tail_.softcap;
  }
  return 0.5f * queries_.residual[head] * (first * first + second);
}

int64_t SketchSearch::hits_above_bar(int head) const {
  const int32_t* scores = hits_.scores + head * hits_.capacity;
  return std::count_if(scores, scores + hits_.count, [&](int32_t s) { return s > bars_[head]; });
}

double SketchSearch::hit_weights(int head) {
  float* weights = column_.reserve(hits_.count + 1);
  double sum = 0;
  for (int64_t i = 0; i < hits_.count; ++i) {
    weights[i] = std::exp(logit_of(head, hits_.scores[head * hits_.capacity + i]) - reference(head));
    sum += static_cast<double>(weights[i]);
  }
  return sum;
}

double SketchSearch::tail_total(int head) const {
  double sum = 0;
  for (int64_t i = 0; i < stop_ - first_; ++i)
    sum += static_cast<double>(tail_sums_[i * kCodeHeads + head]);
  return sum * std::exp(static_cast<double>(correction_[head]));
}

bool SketchSearch::enough(const HeadTask& task) {
  const Budget& budget = task.entry->budget;
  for (int head = 0; head < task.group; ++head) {
    if (floored_[head] || budget.rule == BudgetRule::kBeta) continue;
    const int64_t found = hits_above_bar(head);
    if (budget.rule == BudgetRule::kTopK) {
      if (found < budget.top_k) return false;
      continue;
    }
    if (budget.ceiling > 0 && found >= budget.ceiling) continue;
    const double weight = hit_weights(head);
    if (found < budget.floor || weight < budget.mass * (weight + tail_total(head))) return false;
  }
  return true;
}

// ---- after the scan --------------------------------------------------------------------------------

void SketchSearch::trim(const HeadTask& task) {
  const Budget& budget = task.entry->budget;
  for (int head = 0; head < task.group; ++head) {
    const int32_t* scores = hits_.scores + head * hits_.capacity;
    int64_t wanted = static_cast<int64_t>(wanted_of(task));
    if (budget.rule == BudgetRule::kMass) {
      const double sum = hit_weights(head) + tail_total(head);
      wanted = std::max(wanted, fewest_for_sum(column_.reserve(0), hits_.count,
                                               cautious_mass(budget.mass, 1) * sum));
      if (budget.ceiling > 0)
        wanted = std::min(wanted, static_cast<int64_t>(kOversampling * budget.ceiling));
    }
    if (budget.rule == BudgetRule::kBeta ||
        static_cast<double>(hits_above_bar(head)) < kTrimAbove * static_cast<double>(wanted))
      continue;
    float* column = column_.reserve(hits_.count + 1);
    for (int64_t i = 0; i < hits_.count; ++i) column[i] = static_cast<float>(scores[i]);
    const float threshold = cut_highest(column, hits_.count, wanted).threshold;
    bars_[head] = std::max(bars_[head], as_score(threshold - 1.0f));
  }
  drop_below_bars();
}

// Keeps the hits above some head's bar; the others join the tail.
void SketchSearch::drop_below_bars() {
  const int heads = queries_.codes.heads;
  int64_t kept = 0;
  for (int64_t i = 0; i < hits_.count; ++i) {
    const int32_t id = hits_.ids[i];
    bool keep = false;
    for (int head = 0; head < heads; ++head)
      keep = keep || hits_.scores[head * hits_.capacity + i] > bars_[head];
    if (keep) {
      hits_.ids[kept++] = id;
    } else if (tail_sums_) {
      for (int head = 0; head < heads; ++head)
        tail_sum(id / kSummaryKeys, head) +=
            std::exp(logit_of(head, hits_.scores[head * hits_.capacity + i]) - reference(head));
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

float SketchSearch::rest_lse(int head) const {
  if (tail_sums_ == nullptr) return -std::numeric_limits<float>::infinity();
  return reference(head) + static_cast<float>(std::log(tail_total(head)));
}

}  // namespace longreach
