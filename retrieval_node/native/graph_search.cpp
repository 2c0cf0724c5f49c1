#include <algorithm>
#include <cmath>
#include <limits>

#include "beam.h"
#include "graph.h"
#include "head_tasks.h"
#include "isa.h"

namespace longreach {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Beam growth when a mass or beta rule is not met by what was found.
constexpr int64_t kWiden = 4;
// Reading a key at random costs about this many times what it costs in a scan of the scope.
constexpr int64_t kRandomCost = 4;
// Fresh keys that an expanded key brings, about.
constexpr int64_t kFreshPerExpansion = 8;
// Keys a search is first asked for when the budget names no number.
constexpr int64_t kFirstWanted = 128;
constexpr int64_t kEdgesPerLine = 16;  // of a cache line
// Scopes at most this long are read whole.
constexpr int64_t kShortScope = 4096;

// One search at a time; a thread reuses one for all its tasks.
class GroupSearch {
 public:
  void start(const KernelTable& k, const HeadTask& task, const KeyGraph& graph, int64_t beam) {
    kernels_ = &k;
    task_ = &task;
    graph_ = &graph;
    keys_ = task.keys();
    const int64_t count = task.kv->count;
    visited_.clear(count);
    expanded_.clear(count);
    visits_.clear();
    found_.clear();
    if (tiles_.size() < static_cast<size_t>(task.tiles())) {
      tiles_ = std::vector<PackedTile>(task.tiles());
      scores_ = std::vector<std::vector<float>>(task.tiles());
    }
    for (int t = 0; t < task.tiles(); ++t) {
      const int used = std::min(kTile, task.group - t * kTile);
      tiles_[t].pack(used, keys_.dim, [&](int r) { return task.query(t * kTile + r); });
      scores_[t].clear();
    }
    if (beams_.size() < static_cast<size_t>(task.group)) beams_.resize(task.group);
    for (int g = 0; g < task.group; ++g) beams_[g].clear(beam);
    visited_.add(graph.entry);
    visit({&graph.entry, 0, 1});
  }

  // Expands keys until the beams of all query heads are done. In a round every query head expands
  // its best key, and all keys that are new are scored in one go: the more rows are on their way
  // from memory at once, the less each of them costs.
  void run() {
    do {
      choose_round();
      fresh_.clear();
      for (const int32_t key : round_) gather_fresh(key);
      if (!fresh_.empty()) visit({fresh_.data(), 0, static_cast<int64_t>(fresh_.size())});
    } while (!round_.empty());
  }

  // Goes on with wider beams, which take in keys visited before.
  void widen(int64_t beam) {
    for (int g = 0; g < task_->group; ++g) {
      beams_[g].clear(beam);
      const std::vector<float>& scores = scores_[g / kTile];
      for (size_t i = 0; i < visits_.size(); ++i)
        beams_[g].insert(scores[i * kTile + g % kTile], visits_[i], expanded_.holds(visits_[i]));
    }
    run();
  }

  // Keys expanded within the scope: they include every key left in a beam.
  RowChoice found() const { return {found_.data(), 0, static_cast<int64_t>(found_.size())}; }
  int64_t visits() const { return static_cast<int64_t>(visits_.size()); }

 private:
  void choose_round() {
    round_.clear();
    for (int g = 0; g < task_->group; ++g) {
      int32_t key = beams_[g].pop();
      while (key >= 0 && !expanded_.add(key)) key = beams_[g].pop();
      if (key < 0) continue;
      round_.push_back(key);
      __builtin_prefetch(graph_->offsets + key);
    }
    for (const int32_t key : round_)
      for (int64_t e = graph_->offsets[key]; e < graph_->offsets[key + 1]; e += kEdgesPerLine)
        __builtin_prefetch(graph_->edges + e);
  }

  void gather_fresh(int32_t key) {
    const AttentionRows& rows = task_->entry->rows;
    if (key >= rows.start && key < rows.stop) found_.push_back(key);
    for (int64_t e = graph_->offsets[key]; e < graph_->offsets[key + 1]; ++e)
      if (visited_.add(graph_->edges[e])) fresh_.push_back(graph_->edges[e]);
  }

  // Scores keys for every query head and offers them to the beams.
  void visit(const RowChoice& keys) {
    const size_t first = visits_.size();
    visits_.insert(visits_.end(), keys.ids, keys.ids + keys.count);
    for (int t = 0; t < task_->tiles(); ++t) {
      scores_[t].resize((first + keys.count) * kTile);
      float* scores = scores_[t].data() + first * kTile;
      kernels_->score(keys_, keys, tiles_[t].tile(), scores);
      for (int r = 0; r < kTile && t * kTile + r < task_->group; ++r) {
        Beam& beam = beams_[t * kTile + r];
        for (int64_t i = 0; i < keys.count; ++i)
          if (scores[i * kTile + r] > beam.bar()) beam.insert(scores[i * kTile + r], keys.ids[i], false);
      }
    }
  }

  const KernelTable* kernels_ = nullptr;
  const HeadTask* task_ = nullptr;
  const KeyGraph* graph_ = nullptr;
  Rows keys_{};
  KeySet visited_, expanded_;
  std::vector<int32_t> visits_, found_, round_, fresh_;
  std::vector<std::vector<float>> scores_;  // [tile][visit][kTile]
  std::vector<PackedTile> tiles_;
  std::vector<Beam> beams_;
};

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
      const float raise = g < task.group ? leave_out(task, listed, g, own) : kMinusInfinity;
      for (int64_t i = 0; i < count_; ++i) own[i * kTile] += raise;
      highest_[g] = kMinusInfinity;
      total_[g] = 0;
    }
    float rescale[kTile];
    for (int t = 0; t < task.tiles(); ++t)
      k.softmax_step(weights_ + t * tile_stride_, count_, kTile, &highest_[t * kTile],
                     &total_[t * kTile], rescale);
  }

  // Log of the summed exponentials of the keys that query head g does not list, estimated.
  float lse(int g) const { return total_[g] > 0 ? highest_[g] + std::log(total_[g]) : kMinusInfinity; }

  // Adds the weighed sample to sums that have seen at least one key.
  void add_to(const KernelTable& k, const HeadTask& task, ChosenAttention& attention) {
    for (int t = 0; t < task.tiles(); ++t) {
      float factors[kTile] = {};
      for (int r = 0; r < kTile && t * kTile + r < task.group; ++r) {
        const int g = t * kTile + r;
        if (attention.highest(g) == kMinusInfinity || total_[g] == 0) continue;
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
  // Largest difference between logits of the sample and of the listed keys that still is finite
  // when exponentiated; no search that works comes near it.
  static constexpr float kLargestRise = 80.0f;

  // Drops from column `own` what query head g lists; returns the log of the keys each left key
  // stands for.
  float leave_out(const HeadTask& task, ChosenAttention& listed, int g, float* own) const {
    const float* column = listed.logits(g / kTile) + g % kTile;
    int64_t out = 0, known = 0;
    for (int64_t i = 0; i < listed.candidates(); ++i) {
      if (column[i * kTile] == kMinusInfinity) continue;
      ++known;
      const int32_t key = listed.candidate(i);
      if (key % stride_ != 0) continue;
      ++out;
      own[(key / stride_ - first_) * kTile] = kMinusInfinity;
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

// How wide to search for one row, and when to read the whole scope instead.
class Width {
 public:
  Width(const HeadTask& task, const GraphSearch& options)
      : options_(options),
        scope_(task.entry->rows.stop - task.entry->rows.start),
        share_(static_cast<double>(scope_) / static_cast<double>(std::max<int64_t>(1, task.kv->count))) {
    const Budget& budget = task.entry->budget;
    int64_t wanted = budget.rule == BudgetRule::kTopK ? budget.top_k
                                                      : std::max(budget.floor, kFirstWanted);
    if (budget.rule == BudgetRule::kMass && budget.ceiling > 0)
      wanted = std::min(wanted, budget.ceiling);
    set(std::max<double>(static_cast<double>(options.beam),
                         options.oversearch * static_cast<double>(wanted)));
  }

  int64_t beam() const { return beam_; }
  bool reads_all() const {
    return scope_ <= kShortScope || beam_ * kFreshPerExpansion * kRandomCost > scope_;
  }
  // Whether a search this wide may be trusted to have found the `kept` best keys of the scope.
  bool covers(int64_t kept) const {
    return static_cast<double>(kept) * options_.oversearch <= in_scope_ + 0.5;
  }
  void widen() { set(in_scope_ * kWiden); }

 private:
  // Only a share of the keys in a beam lies within the scope.
  void set(double in_scope) {
    in_scope_ = in_scope;
    beam_ = static_cast<int64_t>(std::ceil(in_scope / std::max(share_, 1e-9)));
  }

  GraphSearch options_;
  int64_t scope_;
  double share_;
  double in_scope_ = 0;
  int64_t beam_ = 0;
};

int64_t most_kept(const HeadTask& task, ChosenAttention& attention) {
  int64_t most = 0;
  for (int g = 0; g < task.group; ++g) {
    const float* column = attention.logits(g / kTile) + g % kTile;
    int64_t kept = 0;
    for (int64_t i = 0; i < attention.candidates(); ++i) kept += column[i * kTile] > kMinusInfinity;
    most = std::max(most, kept);
  }
  return most;
}

// Searches, attends and writes the answer of one row of one KV head.
class GraphAttention {
 public:
  void answer(const KernelTable& k, const HeadTask& task, const KeyGraph& graph,
              const LayerKv& sample, const GraphSearch& options) {
    Stopwatch watch;
    const Budget& budget = task.entry->budget;
    const bool sampled = budget.tail_estimate || budget.rule == BudgetRule::kMass;
    Width width(task, options);
    bool searched = !width.reads_all();
    if (searched) {
      if (sampled) sample_.score(k, task, sample, options.sample_stride);
      search_.start(k, task, graph, width.beam());
      search_.run();
      cut(k, task, search_.found(), sampled);
      while (searched && budget.rule != BudgetRule::kTopK && !width.covers(most_kept(task, attention_))) {
        width.widen();
        searched = !width.reads_all();
        if (!searched) break;
        search_.widen(width.beam());
        cut(k, task, search_.found(), sampled);
      }
      task.figures().scanned += search_.visits() + (sampled ? sample_.count() : 0);
    }
    if (!searched) {
      const AttentionRows& rows = task.entry->rows;
      cut(k, task, {nullptr, rows.start, rows.stop - rows.start}, false);
      task.figures().scanned = rows.stop - rows.start;
    }
    task.figures().search_ns = watch.lap();
    attention_.attend(k, task);
    if (searched && budget.tail_estimate) {
      sample_.weigh(k, task, attention_);
      sample_.add_to(k, task, attention_);
    }
    attention_.finish(task);
    task.figures().attend_ns = watch.lap();
  }

 private:
  // Exact logits of the candidates, of which the budget keeps some.
  void cut(const KernelTable& k, const HeadTask& task, const RowChoice& candidates, bool sampled) {
    attention_.score(k, task, candidates);
    rest_.assign(task.group, kMinusInfinity);
    if (sampled && task.entry->budget.rule == BudgetRule::kMass) {
      sample_.weigh(k, task, attention_);
      for (int g = 0; g < task.group; ++g) rest_[g] = sample_.lse(g);
    }
    attention_.cut(task, rest_.data());
  }

  GroupSearch search_;
  ScopeSample sample_;
  ChosenAttention attention_;
  std::vector<float> rest_;
};

}  // namespace

void attend_graph(const LayerKv& kv, const LayerKv& sample, const std::vector<KeyGraph>& graphs,
                  const std::vector<BudgetedRows>& batch, const LogitRule& rule,
                  const GraphSearch& options) {
  const KernelTable& k = kernels();
  for_each_head(kv, batch, rule, [&](const HeadTask& task, size_t) {
    thread_local GraphAttention attention;
    attention.answer(k, task, graphs[task.entry->rows.head_start + task.head], sample, options);
  });
}

}  // namespace longreach
