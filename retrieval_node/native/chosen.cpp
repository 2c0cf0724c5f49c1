#include "chosen.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"

namespace longreach {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Of the logits [count][kTile] of one query head, drops those at the threshold that are too many.
void drop_ties(const Cut& cut, float* logits, int64_t count) {
  int64_t ties = cut.ties;
  for (int64_t i = 0; i < count; ++i) {
    float& z = logits[i * kTile];
    if (z == cut.threshold && ties-- <= 0) z = kMinusInfinity;
  }
}

// Whether any of the logits of a candidate is not -infinity.
bool any_left(const float* logits) {
  uint32_t bits[kTile], others = 0;
  constexpr uint32_t kMinusInfinityBits = 0xff800000u;
  std::memcpy(bits, logits, sizeof bits);
  for (const uint32_t each : bits) others |= each ^ kMinusInfinityBits;
  return others != 0;
}

}  // namespace

float HeadTask::lowest_logit(int g) const {
  return entry->logit_floor ? entry->logit_floor[index(g)] : kMinusInfinity;
}

void ChosenAttention::reserve(const HeadTask& task, int64_t count) {
  const int rows = task.tiles() * kTile;
  value_dim_ = task.kv->values.dim;
  logits_stride_ = count * kTile + kPanel;
  logits_ = logits_memory_.reserve(task.tiles() * logits_stride_);
  sums_ = sums_memory_.reserve(static_cast<size_t>(rows) * (value_dim_ + 2));
  highest_ = sums_ + static_cast<int64_t>(rows) * value_dim_;
  total_ = highest_ + rows;
  std::fill_n(sums_, static_cast<int64_t>(rows) * value_dim_, 0.0f);
  std::fill_n(highest_, rows, kMinusInfinity);
  std::fill_n(total_, rows, 0.0f);
  if (tiles_.size() < static_cast<size_t>(task.tiles()))
    tiles_ = std::vector<PackedTile>(task.tiles());
}

void ChosenAttention::score(const KernelTable& k, const HeadTask& task,
                            const RowChoice& candidates) {
  choice_ = candidates;
  reserve(task, candidates.count);
  const Rows keys = task.keys();
  for (int t = 0; t < task.tiles(); ++t) {
    const int used = std::min(kTile, task.group - t * kTile);
    tiles_[t].pack(used, keys.dim, [&](int r) { return task.query(t * kTile + r); });
    k.score(keys, candidates, tiles_[t].tile(), logits(t));
    k.to_logits(logits(t), candidates.count * kTile, task.rule);
  }
}

void ChosenAttention::cut(const KernelTable& k, const HeadTask& task, const float* rest_lse) {
  for (int t = 0; t < task.tiles(); ++t) cut_tile(k, task, rest_lse, t);
}

void ChosenAttention::cut_tile(const KernelTable& k, const HeadTask& task, const float* rest_lse,
                               int tile) {
  const int64_t count = choice_.count;
  float* all = logits(tile);
  float* columns = column_memory_.reserve(kTile * count);
  for (int64_t i = 0; i < count; ++i)
    for (int r = 0; r < kTile; ++r) columns[r * count + i] = all[i * kTile + r];
  float thresholds[kTile];
  for (int r = 0; r < kTile; ++r) {
    const int g = tile * kTile + r;
    thresholds[r] = kMinusInfinity;
    if (g >= task.group) {  // padding must not keep keys alive
      for (int64_t i = 0; i < count; ++i) all[i * kTile + r] = kMinusInfinity;
      continue;
    }
    const float* own = columns + r * count;
    int32_t unordered = 0;
    for (int64_t i = 0; i < count; ++i) unordered |= own[i] != own[i];
    // NaN has no rank: a head that meets one keeps every key, and its output shows the NaN.
    if (unordered) continue;
    const Cut cut = cut_of(k, task.entry->budget, own, count, task.lowest_logit(g),
                           rest_lse ? rest_lse[g] : kMinusInfinity);
    thresholds[r] = cut.threshold;
    if (cut.ties != kAllTies) drop_ties(cut, all + r, count);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int r = 0; r < kTile; ++r) {
      const float z = all[i * kTile + r];
      all[i * kTile + r] = z < thresholds[r] ? kMinusInfinity : z;
    }
}

void ChosenAttention::list_selected(const HeadTask& task) const {
  for (int g = 0; g < task.group; ++g) {
    const float* column = logits(g / kTile) + g % kTile;
    auto& list = (*task.entry->selected)[task.index(g)];
    for (int64_t i = 0; i < choice_.count; ++i)
      if (column[i * kTile] != kMinusInfinity) list.push_back(candidate(i));
  }
}

void ChosenAttention::attend(const KernelTable& k, const HeadTask& task) {
  if (task.entry->selected) list_selected(task);
  const int64_t count = choice_.count;
  int32_t* ids = kept_ids_.reserve(count);
  int64_t kept = 0;
  float* weights = kept_memory_.reserve(task.tiles() * (count * kTile + kPanel));
  const int64_t stride = count * kTile + kPanel;
  for (int64_t i = 0; i < count; ++i) {
    bool any = false;
    for (int t = 0; t < task.tiles(); ++t) {
      const float* own = logits(t) + i * kTile;
      std::memcpy(weights + t * stride + kept * kTile, own, kTile * sizeof(float));
      any |= any_left(own);
    }
    ids[kept] = candidate(i);
    kept += any;
  }
  const Rows values = task.values();
  float rescale[kTile];
  for (int t = 0; t < task.tiles(); ++t) {
    k.softmax_step(weights + t * stride, kept, kTile, highest_ + t * kTile, total_ + t * kTile,
                   rescale);
    k.accumulate(values, {ids, 0, kept}, weights + t * stride, kTile, sums(t * kTile));
  }
  task.figures().attended += kept;
}

void ChosenAttention::finish(const HeadTask& task) {
  for (int g = 0; g < task.group; ++g) {
    const int64_t at = task.index(g);
    float* output = task.entry->rows.output + at * value_dim_;
    const bool seen = total_[g] != 0;
    const float inverse = seen ? 1.0f / total_[g] : 0.0f;
    for (int c = 0; c < value_dim_; ++c) output[c] = sums(g)[c] * inverse;
    task.entry->rows.lse[at] = seen ? highest_[g] + std::log(total_[g]) : kMinusInfinity;
  }
}

namespace {

void attend_over(const KernelTable& k, const HeadTask& task, const RowChoice& candidates) {
  thread_local ChosenAttention attention;
  Stopwatch watch;
  attention.score(k, task, candidates);
  attention.cut(k, task, nullptr);
  task.figures().scanned = candidates.count;
  task.figures().search_ns = watch.lap();
  attention.attend(k, task);
  attention.finish(task);
  task.figures().attend_ns = watch.lap();
}

}  // namespace

void attend_best(const LayerKv& kv, const std::vector<BudgetedRows>& batch, const LogitRule& rule) {
  const KernelTable& k = kernels();
  for_each_head(kv, batch, rule, [&](const HeadTask& task, size_t) {
    const AttentionRows& rows = task.entry->rows;
    attend_over(k, task, {nullptr, rows.start, rows.stop - rows.start});
  });
}

void attend_candidates(const LayerKv& kv, const std::vector<BudgetedRows>& batch,
                       const std::vector<Candidates>& candidates, const LogitRule& rule) {
  const KernelTable& k = kernels();
  for_each_head(kv, batch, rule, [&](const HeadTask& task, size_t number) {
    const Candidates& given = candidates[number];
    const int64_t i = task.row * task.entry->rows.heads + task.head;
    attend_over(k, task,
                {given.ids + given.offsets[i], 0, given.offsets[i + 1] - given.offsets[i]});
  });
}

}  // namespace longreach
