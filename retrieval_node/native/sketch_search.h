// Finds the keys of a scope that a budget needs, by their codes.
#pragma once

#include <vector>

#include "sketch_queries.h"

namespace longreach {

// Tail sums are floats relative to the bar: a weight that would exceed exp of this is taken for
// that. What lies so far above the bar and joins the tail is nothing beside the head's best keys.
constexpr float kLargestTail = 80.0f;
// A tail estimate is as good as what it need not estimate: with one, up to this share of the scope
// is read for each query head beside what the budget names. Measured to keep the median error of
// the output below .05 on diffuse heads of 131,072 keys; .007 does not.
constexpr double kTailShare = 0.008;

// The search of one row of one KV head; a thread reuses one for all its tasks.
class SketchSearch {
 public:
  // Fills candidates() for task.group <= kCodeHeads query heads. With a tail estimate or a mass
  // budget, also the tail sums of the keys that are no candidates.
  void run(const KernelTable& k, const SketchHead& sketch, const HeadTask& task);

  // Ascending. All keys of the scope when it is short or the budget wants much of it.
  RowChoice candidates() const { return candidates_; }
  bool everything() const { return candidates_.ids == nullptr; }
  int64_t keys_sketched() const { return sketched_; }

  // Whole summaries [first, stop) within the scope. Keys of the scope outside them are candidates.
  int64_t first_summary() const { return first_; }
  int64_t stop_summary() const { return stop_; }

  // For a summary and a head: sum of exp(logit - reference(head)) of its keys that are no
  // candidates, by their codes. May be added to.
  float& tail_sum(int64_t summary, int head) {
    return tail_sums_[(summary - first_) * kCodeHeads + head];
  }
  float reference(int head) const { return tail_.reference[head]; }
  // Tail sums are exp(correction) times too small on average, for what the codes cannot tell.
  float correction(int head) const { return correction_[head]; }

  // Log of the estimated attention mass of the keys that are no candidates.
  float rest_lse(int head) const;

 private:
  // Weights relative to exp(top); column_ holds each.
  struct Weights {
    double sum;
    float top;
  };

  void take_everything(const HeadTask& task);
  double set_wanted(const HeadTask& task);

  void sample(const KernelTable& k, const SketchHead& sketch, double wanted);
  void set_bars(const KernelTable& k, const HeadTask& task, double widening);
  int32_t bar_for_count(const KernelTable& k, int head, double wanted);
  int32_t bar_for_mass(const KernelTable& k, int head, double mass);
  int32_t bar_for_beta(int head, float beta, int32_t highest) const;
  void raise_to_floor(const HeadTask& task);

  const float* as_floats(const int32_t* scores, int64_t count);
  Weights weigh(const KernelTable& k, int head, const int32_t* scores, int64_t count);
  int32_t bar_above(const KernelTable& k, const int32_t* scores, int64_t count, int64_t wanted);
  int32_t bar_for_weight(const KernelTable& k, const int32_t* scores, int64_t count, double needed);

  void scan(const KernelTable& k, const SketchHead& sketch, const HeadTask& task);
  void raise_beta_bars(const HeadTask& task, int64_t from);
  void raise_mass_bars(const KernelTable& k, const HeadTask& task, int64_t stop, double caution);
  bool enough(const KernelTable& k, const HeadTask& task);
  // After the scan: sketch_trim.cpp.
  void trim(const KernelTable& k, const HeadTask& task);
  void weigh_hits(const KernelTable& k);
  void choose_for_tail(const KernelTable& k, const HeadTask& task);
  void drop_below_bars();
  template <class Keep>
  void drop(Keep keep);
  void add_edges(const HeadTask& task);
  int64_t hits_above_bar(int head) const;
  double tail_sum_to(int head, int64_t stop) const;
  double tail_total(int head, float top, int64_t stop) const;
  float logit_of(int head, int32_t score) const;
  float correction_of(int head) const;

  RowChoice candidates_{};
  int64_t sketched_ = 0;
  int64_t first_ = 0, stop_ = 0;
  SketchQueries queries_{};
  CodeTail tail_{};
  CodeHits hits_{};
  int64_t sampled_ = 0;
  double oversampling_[kCodeHeads] = {};
  double named_[kCodeHeads] = {};        // candidates for the keys that the budget names
  double wanted_[kCodeHeads] = {};       // candidates a head should have
  int32_t bars_[kCodeHeads] = {};        // scores above it make candidates
  int32_t count_bars_[kCodeHeads] = {};  // the bar for the candidates wanted
  bool floored_[kCodeHeads] = {};
  float correction_[kCodeHeads] = {};
  Workspace<int32_t> ids_, scores_, sample_scores_;
  Weights weights_[kCodeHeads] = {};     // of the hits, once weighed
  Workspace<float> column_, tail_memory_, weights_memory_;
  float* tail_sums_ = nullptr;  // null when no tail is needed
};

}  // namespace longreach
