#include <algorithm>
#include <cmath>
#include <limits>

#include "graph.h"
#include "group_search.h"
#include "head_tasks.h"
#include "isa.h"
#include "scope_sample.h"

namespace longreach {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Beam growth when a mass or beta rule is not met by what was found.
constexpr int64_t kWiden = 4;
// Reading a key at random costs about this many times what it costs in a scan of the scope.
constexpr int64_t kRandomCost = 4;
// Keys that a query head brings to a search for each place in its beam, about: at first, and in
// the long searches of beams that were widened.
constexpr int64_t kReadsPerPlace = 8;
constexpr int64_t kReadsPerWidePlace = 48;
// Keys a search is first asked for when the budget names no number.
constexpr int64_t kFirstWanted = 128;
// Under a tail estimate, keys this far (in logits) below a head's best are left to the sample.
constexpr float kVisible = 7.0f;
// Scopes at most this long are read whole.
constexpr int64_t kShortScope = 4096;

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
    const int64_t reads = beam_ * (widened_ ? kReadsPerWidePlace : kReadsPerPlace);
    return scope_ <= kShortScope || reads * kRandomCost > scope_;
  }
  // Whether a search this wide may be trusted to have found the `kept` best keys of the scope.
  bool covers(int64_t kept) const {
    return static_cast<double>(kept) * options_.oversearch <= in_scope_ + 0.5;
  }
  void widen() {
    widened_ = true;
    set(in_scope_ * kWiden);
  }

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
  bool widened_ = false;
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
      const RowChoice scope{nullptr, rows.start, rows.stop - rows.start};
      if (budget.tail_estimate)
        keep_all(k, task, scope);
      else
        cut(k, task, scope, false);
      task.figures().scanned = scope.count;
    }
    task.figures().search_ns = watch.lap();
    if (searched && budget.tail_estimate) keep_visible(k, task);
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
    attention_.cut(k, task, rest_.data());
  }

  // With a tail estimate every key that was scored joins the softmax, whatever the budget: what was
  // read exactly beats its estimate.
  void keep_all(const KernelTable& k, const HeadTask& task, const RowChoice& scored) {
    BudgetedRows all = *task.entry;
    all.budget.rule = BudgetRule::kExact;
    HeadTask whole = task;
    whole.entry = &all;
    attention_.score(k, whole, scored);
    attention_.cut(k, whole, nullptr);
  }

  // keep_all, without keys too faint to be worth reading their values: the sample stands for them.
  void keep_visible(const KernelTable& k, const HeadTask& task) {
    keep_all(k, task, search_.scored());
    for (int g = 0; g < task.group; ++g) {
      float* column = attention_.logits(g / kTile) + g % kTile;
      const int64_t count = attention_.candidates();
      float top = kMinusInfinity;
      for (int64_t i = 0; i < count; ++i) top = std::max(top, column[i * kTile]);
      for (int64_t i = 0; i < count; ++i)
        if (column[i * kTile] < top - kVisible) column[i * kTile] = kMinusInfinity;
    }
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
