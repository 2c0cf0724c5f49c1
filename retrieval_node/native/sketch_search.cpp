#include "sketch_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "prefetch.h"

namespace longreach {
namespace {

// Scopes up to this long are read whole: scanning codes and sampling them would cost as much.
constexpr int64_t kReadWhole = 4096;
// Candidates per wanted key. The code's order is not the exact one: the more of the logits'
// variance it leaves out, the further down the best keys may stand. Measured to keep recall@100
// above .95 on heads whose codes leave out .4% to 20%.
constexpr double kLeastOversampling = 1.25;
constexpr double kMostOversampling = 12.0;
constexpr double kOversamplingPerShare = 55.0;
constexpr double kFewestCandidates = 64;
// Candidates listed per one that may be read, as the heads of a group choose together.
constexpr double kTailListed = 1.3;
// Code blocks sampled to set the bars, and sampled keys that should lie above a bar.
constexpr int64_t kSampleBlocks = 256;
constexpr double kSampledAbove = 16;
// Summaries scanned between two looks at the bars.
constexpr int64_t kChunk = 128;
// Standard deviations of the sketch's error allowed for where a rule is about logits. A key lost at
// the far end of a range weighs exp(-beta) of the best; keys above a logit floor are few and
// matter.
constexpr float kBetaMargin = 1.5f;
constexpr float kFloorMargin = 3.0f;
// Gathered rows arrive at about a fifth of the rate of rows in order, so beyond this share of the
// scope it is quicker to read all of it, where the budget allows that.
constexpr double kGatherShare = 0.2;
// Each retry lowers the bars to find this many times as many keys.
constexpr double kWidening = 4.0;

// Keys the budget names, if it does.
double named_keys(const Budget& budget) {
  if (budget.rule == BudgetRule::kTopK) return static_cast<double>(budget.top_k);
  return budget.rule == BudgetRule::kMass ? static_cast<double>(budget.floor) : 0.0;
}

int32_t as_score(float value) {
  constexpr float kLimit = 2e9f;
  return static_cast<int32_t>(std::min(std::max(value, -kLimit), kLimit));
}

// An error e of variance v multiplies a sum of `keys` equal weights by E[exp(e)] = exp(v / 2), if
// it is normal and the keys are many. Few keys do not reach the rare errors that this mean comes
// from: their sum is then about its largest term (Derrida's random energy model). `correction` is
// v / 2.
float realised(float correction, double keys) {
  const double most = std::log(std::max(1.0, keys));
  if (correction <= most) return correction;
  return static_cast<float>(2 * std::sqrt(static_cast<double>(correction) * most) - most);
}

// A hit's row is on its way while the scan goes on.
void prefetch_key(const Rows& keys, int32_t id) {
  const size_t bytes = keys.row_bytes();
  const char* row = static_cast<const char*>(keys.data) +
                    id * keys.stride * static_cast<int64_t>(item_bytes(keys.type));
  for (size_t at = 0; at < bytes; at += 64) prefetch_second(row + at);
}

// The mass to look for: a little more than wanted, as the sketch does not find exactly the best
// keys.
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
  if (budget.rule == BudgetRule::kExact || length <= kReadWhole ||
      2 * named_keys(budget) >= static_cast<double>(length))
    return take_everything(task);
  queries_ = sketch_queries(k, sketch, task);
  const double wanted = set_wanted(task);
  sample(k, sketch, wanted);
  for (double widening = 1; 2 * wanted * widening < length; widening *= kWidening) {
    set_bars(k, task, widening);
    scan(k, sketch, task);
    const bool found = enough(k, task);
    if (found) trim(k, task);
    const double most = kGatherShare * static_cast<double>(length);
    if (static_cast<double>(hits_.count) > most && may_use_all(budget)) break;
    if (!found) continue;
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

// Sets how many candidates each head should have; returns the fewest.
double SketchSearch::set_wanted(const HeadTask& task) {
  const Budget& budget = task.entry->budget;
  const auto length = static_cast<double>(task.entry->rows.stop - task.entry->rows.start);
  double fewest = length;
  for (int head = 0; head < task.group; ++head) {
    oversampling_[head] = std::min(
        kMostOversampling, kLeastOversampling + kOversamplingPerShare * queries_.lost_share[head]);
    wanted_[head] = named_[head] = oversampling_[head] * named_keys(budget) + kFewestCandidates;
    if (budget.tail_estimate)
      wanted_[head] = std::max(wanted_[head], kTailListed * kTailShare * length);
    fewest = std::min(fewest, wanted_[head]);
  }
  return fewest;
}

// ---- bars from a sample
// ----------------------------------------------------------------------------

void SketchSearch::sample(const KernelTable& k, const SketchHead& sketch, double wanted) {
  const int64_t per_summary = kSummaryKeys / kCodeKeys;
  const int64_t blocks = (stop_ - first_) * per_summary;
  const auto for_bar = static_cast<int64_t>(kSampledAbove * static_cast<double>(blocks) / wanted);
  const int64_t count = std::min(blocks, std::max(kSampleBlocks, for_bar));
  const int64_t step = blocks / count;
  sampled_ = count * kCodeKeys;
  int32_t* scores = sample_scores_.reserve(sampled_ * queries_.codes.heads);
  k.code_scores(sketch.codes, queries_.codes, first_ * per_summary + step / 2, step, count, scores);
}

const float* SketchSearch::as_floats(const int32_t* scores, int64_t count) {
  float* column = column_.reserve(count + kPanel);
  for (int64_t i = 0; i < count; ++i) column[i] = static_cast<float>(scores[i]);
  return column;
}

// The bar above which the `wanted` highest of the scores lie.
int32_t SketchSearch::bar_above(const KernelTable& k, const int32_t* scores, int64_t count,
                                int64_t wanted) {
  if (wanted <= kMostHighest && wanted < count) return k.nth_highest(scores, count, wanted) - 1;
  return as_score(std::ceil(cut_highest(k, as_floats(scores, count), count, wanted).threshold) -
                  1.0f);
}

// Puts exp(logit - highest logit) of the scores into column_.
SketchSearch::Weights SketchSearch::weigh(const KernelTable& k, int head, const int32_t* scores,
                                          int64_t count) {
  if (count == 0) return {0, reference(head)};
  float* column = column_.reserve(count + kPanel);
  for (int64_t i = 0; i < count; ++i)
    column[i] = static_cast<float>(scores[i]) * queries_.slope[head] + queries_.offset[head];
  k.to_logits(column, count, {1.0f, tail_.softcap});
  float lowest, top, totals[kTile] = {}, rescale[kTile];
  k.value_range(column, count, &lowest, &top);
  float highest[kTile] = {top, top, top, top};
  const int64_t whole = count / kTile * kTile;
  double sum = 0;
  for (int64_t i = whole; i < count; ++i) {
    column[i] = std::exp(column[i] - top);
    sum += static_cast<double>(column[i]);
  }
  float rest[kTile];  // the kernel pads what lies behind the last whole tile
  std::copy(column + whole, column + count, rest);
  k.softmax_step(column, whole / kTile, kTile, highest, totals, rescale);
  std::copy(rest, rest + (count - whole), column + whole);
  for (const float total : totals) sum += static_cast<double>(total);
  return {sum, top};
}

// The bar above which scores weigh `needed` together; their weights are in column_.
int32_t SketchSearch::bar_for_weight(const KernelTable& k, const int32_t* scores, int64_t count,
                                     double needed) {
  const float* weights = column_.reserve(0);
  const float bar = fewest_for_sum(k, weights, count, needed).bar;
  int32_t lowest = std::numeric_limits<int32_t>::max();
  for (int64_t i = 0; i < count; ++i)
    lowest = weights[i] > bar ? std::min(lowest, scores[i]) : lowest;
  return lowest - 1;
}

void SketchSearch::set_bars(const KernelTable& k, const HeadTask& task, double widening) {
  const Budget& budget = task.entry->budget;
  tail_.softcap = task.rule.softcap;
  for (int head = 0; head < task.group; ++head) {
    floored_[head] = false;
    bars_[head] = count_bars_[head] = bar_for_count(k, head, wanted_[head] * widening);
    if (budget.rule == BudgetRule::kBeta) {
      const int32_t* scores = sample_scores_.reserve(0) + head * sampled_;
      bars_[head] = bar_for_beta(head, budget.beta, *std::max_element(scores, scores + sampled_));
    } else if (budget.rule == BudgetRule::kMass) {
      int32_t bar = bar_for_mass(k, head, cautious_mass(budget.mass, widening));
      if (budget.ceiling > 0)
        bar = std::max(
            bar, bar_for_count(k, head, oversampling_[head] * static_cast<double>(budget.ceiling)));
      bars_[head] = std::min(bar, bars_[head]);
    }
  }
  raise_to_floor(task);
}

int32_t SketchSearch::bar_for_count(const KernelTable& k, int head, double wanted) {
  const double scanned = static_cast<double>((stop_ - first_) * kSummaryKeys);
  const auto above =
      std::max<int64_t>(1, static_cast<int64_t>(wanted / scanned * static_cast<double>(sampled_)));
  return bar_above(k, sample_scores_.reserve(0) + head * sampled_, sampled_, above);
}

int32_t SketchSearch::bar_for_mass(const KernelTable& k, int head, double mass) {
  const int32_t* scores = sample_scores_.reserve(0) + head * sampled_;
  const double sum = weigh(k, head, scores, sampled_).sum;
  return bar_for_weight(k, scores, sampled_, mass * sum);
}

int32_t SketchSearch::bar_for_beta(int head, float beta, int32_t highest) const {
  const float below = beta + kBetaMargin * std::sqrt(queries_.residual[head]);
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
    const float lowest =
        task.lowest_logit(head) - kFloorMargin * std::sqrt(queries_.residual[head]);
    const int32_t bar = as_score((lowest - queries_.offset[head]) / queries_.slope[head]);
    floored_[head] = bar > bars_[head];
    bars_[head] = std::max(bar, bars_[head]);
  }
}

// ---- the scan
// --------------------------------------------------------------------------------------

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
  for (int head = 0; head < task.group; ++head) {
    tail_.slope[head] = queries_.slope[head];
    tail_.offset[head] = queries_.offset[head];
    tail_.reference[head] = logit_of(head, bars_[head]);
    correction_[head] = correction_of(head);
  }
  const Rows keys_of_head = task.keys();
  int64_t chunks = 0;
  for (int64_t at = first_; at < stop_; at += kChunk) {
    const int64_t before = hits_.count, next = std::min(stop_, at + kChunk);
    k.code_scan(sketch.codes, queries_.codes, at, next, bars_, hits_,
                tail_sums_ ? &tail_ : nullptr);
    for (int64_t i = before; i < hits_.count; ++i) prefetch_key(keys_of_head, hits_.ids[i]);
    ++chunks;
    if (budget.rule == BudgetRule::kBeta) raise_beta_bars(task, before);
    const bool doubled = (chunks & (chunks - 1)) == 0;
    if (budget.rule == BudgetRule::kMass && doubled) raise_mass_bars(k, task, next, 2);
  }
  if (tail_sums_)
    for (int head = 0; head < task.group; ++head)  // a tail sum counts keys at the bar
      correction_[head] = realised(correction_[head], tail_sum_to(head, stop_));
  sketched_ += keys;
}

// The best hit so far, looked for from hit `from` on, says how low a logit can be and still count.
void SketchSearch::raise_beta_bars(const HeadTask& task, int64_t from) {
  for (int head = 0; head < task.group; ++head) {
    const int32_t* scores = hits_.scores + head * hits_.capacity;
    if (from == hits_.count) continue;
    const int32_t highest = *std::max_element(scores + from, scores + hits_.count);
    bars_[head] = std::max(bars_[head], bar_for_beta(head, task.entry->budget.beta, highest));
  }
}

// A sample misses the few keys with much of the mass, so its bars are low. What was scanned so far,
// up to summary `stop`, knows better. Never above the bar that finds the budget's floor.
void SketchSearch::raise_mass_bars(const KernelTable& k, const HeadTask& task, int64_t stop,
                                   double caution) {
  for (int head = 0; head < task.group; ++head) {
    const int32_t* scores = hits_.scores + head * hits_.capacity;
    const Weights weights = weigh(k, head, scores, hits_.count);
    const double needed = cautious_mass(task.entry->budget.mass, caution) *
                          (weights.sum + tail_total(head, weights.top, stop));
    if (needed > weights.sum) continue;
    const int32_t bar = bar_for_weight(k, scores, hits_.count, needed);
    bars_[head] = std::max(bars_[head], std::min(bar, count_bars_[head]));
  }
}

float SketchSearch::logit_of(int head, int32_t score) const {
  const float logit = static_cast<float>(score) * queries_.slope[head] + queries_.offset[head];
  return tail_.softcap > 0 ? tail_.softcap * std::tanh(logit / tail_.softcap) : logit;
}

// With f the softcap and e an error of variance r, E[exp(f(z + e))] is about exp(f(z) + r / 2 *
// (f'^2
// + f'')). Keys near the bar weigh most, so both derivatives are taken there; without a softcap
// they are 1 and 0.
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

// Sum of a head's tail sums up to summary `stop`.
double SketchSearch::tail_sum_to(int head, int64_t stop) const {
  double sum = 0;
  for (int64_t i = 0; i < stop - first_; ++i)
    sum += static_cast<double>(tail_sums_[i * kCodeHeads + head]);
  return sum;
}

// Weight of the tail up to summary `stop`, relative to exp(top).
double SketchSearch::tail_total(int head, float top, int64_t stop) const {
  return tail_sum_to(head, stop) *
         std::exp(static_cast<double>(correction_[head] + reference(head) - top));
}

bool SketchSearch::enough(const KernelTable& k, const HeadTask& task) {
  const Budget& budget = task.entry->budget;
  for (int head = 0; head < task.group; ++head) {
    if (floored_[head] || budget.rule == BudgetRule::kBeta) continue;
    const int64_t found = hits_above_bar(head);
    if (budget.rule == BudgetRule::kTopK) {
      if (found < budget.top_k) return false;
      continue;
    }
    if (budget.ceiling > 0 && found >= budget.ceiling) continue;
    const Weights hits = weigh(k, head, hits_.scores + head * hits_.capacity, hits_.count);
    const double all = hits.sum + tail_total(head, hits.top, stop_);
    if (found < budget.floor || hits.sum < budget.mass * all) return false;
  }
  return true;
}

float SketchSearch::rest_lse(int head) const {
  if (tail_sums_ == nullptr) return -std::numeric_limits<float>::infinity();
  return reference(head) + static_cast<float>(std::log(tail_total(head, reference(head), stop_)));
}

}  // namespace longreach
