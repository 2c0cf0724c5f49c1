// A sample of the keys of a scope, standing for the keys that a search did not list.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "chosen.h"

namespace longreach {

// The sampled keys inside a scope, for one row of one KV head: every stride-th key, each standing
// for an equal share of the keys that a query head does not list.
class ScopeSample {
 public:
  void score(const KernelTable& k, const HeadTask& task, const LayerKv& sample, int64_t stride) {
    const AttentionRows& rows = task.entry->rows;
    const int head = rows.head_start + task.head;
    stride_ = stride;
    first_ = (rows.start + stride - 1) / stride;
    count_ = std::max<int64_t>(0, std::min((rows.stop - 1) / stride + 1, sample.count) - first_);
    values_ = sample.values_of(head);
    tile_stride_ = count_ * kTile + kPanel;
    logits_ = memory_.reserve(2 * task.tiles() * tile_stride_);
    weights_ = logits_ + task.tiles() * tile_stride_;
    highest_.resize(task.tiles() * kTile);
    total_.resize(task.tiles() * kTile);
    for (int t = 0; t < task.tiles(); ++t) {
      const int used = std::min(kTile, task.group - t * kTile);
      tile_.pack(used, sample.keys.dim, [&](int r) { return task.query(t * kTile + r); });
      float* logits = logits_ + t * tile_stride_;
      k.score(sample.keys_of(head), {nullptr, first_, count_}, tile_.tile(), logits);
      k.to_logits(logits, count_ * kTile, task.rule);
    }
  }

  // Weighs the sample for the keys that each query head does not list, those whose logit in
  // `listed` is -infinity or that are no candidates at all.
  void weigh(const KernelTable& k, const HeadTask& task, ChosenAttention& listed) {
    std::copy_n(logits_, task.tiles() * tile_stride_, weights_);
    for (int g = 0; g < task.tiles() * kTile; ++g) {
      float* own = weights_ + (g / kTile) * tile_stride_ + g % kTile;
      const float raise = g < task.group ? leave_out(task, listed, g, own) : kNone;
      for (int64_t i = 0; i < count_; ++i) own[i * kTile] += raise;
      highest_[g] = kNone;
      total_[g] = 0;
    }
    float rescale[kTile];
    for (int t = 0; t < task.tiles(); ++t)
      k.softmax_step(weights_ + t * tile_stride_, count_, kTile, &highest_[t * kTile],
                     &total_[t * kTile], rescale);
  }

  // Log of the summed exponentials of the keys that query head g does not list, estimated.
  float lse(int g) const { return total_[g] > 0 ? highest_[g] + std::log(total_[g]) : kNone; }

  // Adds the weighed sample to sums that have seen at least one key.
  void add_to(const KernelTable& k, const HeadTask& task, ChosenAttention& attention) {
    for (int t = 0; t < task.tiles(); ++t) {
      float factors[kTile] = {};
      for (int r = 0; r < kTile && t * kTile + r < task.group; ++r) {
        const int g = t * kTile + r;
        if (attention.highest(g) == kNone || total_[g] == 0) continue;
        factors[r] = std::exp(std::min(kLargestRise, highest_[g] - attention.highest(g)));
        attention.total(g) += factors[r] * total_[g];
      }
      float* weights = weights_ + t * tile_stride_;
      for (int64_t i = 0; i < count_; ++i)
        for (int r = 0; r < kTile; ++r) weights[i * kTile + r] *= factors[r];
      k.accumulate(values_, {nullptr, first_, count_}, weights, kTile, attention.sums(t * kTile));
    }
    task.figures().tail_rows += count_;
  }

  int64_t count() const { return count_; }

 private:
  static constexpr float kNone = -std::numeric_limits<float>::infinity();
  // Largest difference between logits of the sample and of the listed keys that still is finite
  // when exponentiated; no search that works comes near it.
  static constexpr float kLargestRise = 80.0f;

  // Drops from column `own` what query head g lists; returns the log of the keys each left key
  // stands for.
  float leave_out(const HeadTask& task, ChosenAttention& listed, int g, float* own) const {
    const float* column = listed.logits(g / kTile) + g % kTile;
    int64_t out = 0, known = 0;
    for (int64_t i = 0; i < listed.candidates(); ++i) {
      if (column[i * kTile] == kNone) continue;
      ++known;
      const int32_t key = listed.candidate(i);
      if (key % stride_ != 0) continue;
      ++out;
      own[(key / stride_ - first_) * kTile] = kNone;
    }
    const int64_t unlisted = task.entry->rows.stop - task.entry->rows.start - known;
    const int64_t left = std::max<int64_t>(1, count_ - out);
    return std::log(static_cast<float>(unlisted) / static_cast<float>(left));
  }

  int64_t stride_ = 1, first_ = 0, count_ = 0, tile_stride_ = 0;
  Rows values_{};
  Workspace<float> memory_;
  float* logits_ = nullptr;
  float* weights_ = nullptr;
  std::vector<float> highest_, total_;
  PackedTile tile_;
};

}  // namespace longreach
