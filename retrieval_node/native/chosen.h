// Attention over chosen keys: score candidates exactly, keep what the budget allows, attend.
#pragma once

#include <cstdint>
#include <vector>

#include "budget.h"
#include "exact.h"
#include "query_tile.h"
#include "workspace.h"

namespace longreach {

// Counts for one row of one KV head. Times are of the thread that ran it.
struct HeadFigures {
  int64_t scanned;    // key rows read
  int64_t sketched;   // keys scored by their code
  int64_t attended;   // keys in the softmax of at least one query head of the group
  int64_t tail_rows;  // value summaries read by the tail estimate
  int64_t code_bytes;
  int64_t search_ns;
  int64_t attend_ns;
};

// AttentionRows with a budget. `logit_floor` is null or [rows, heads, group]. figures [rows,
// heads]. `selected` is null or has a list of keys for each (row, head, query head).
struct BudgetedRows {
  AttentionRows rows;
  Budget budget;
  const float* logit_floor;
  HeadFigures* figures;
  std::vector<std::vector<int32_t>>* selected;
};

// One row of one KV head of an entry, for query heads [first, first + group) of its group.
struct HeadTask {
  const LayerKv* kv;
  const BudgetedRows* entry;
  LogitRule rule;
  int64_t row;
  int head;  // counted from the entry's first
  int first;
  int group;

  int tiles() const { return (group + kTile - 1) / kTile; }
  int64_t index(int g) const { return entry->rows.index(row, head, first + g); }
  const float* query(int g) const { return entry->rows.queries + index(g) * kv->keys.dim; }
  float lowest_logit(int g) const;
  Rows keys() const { return kv->keys_of(entry->rows.head_start + head); }
  Rows values() const { return kv->values_of(entry->rows.head_start + head); }
  HeadFigures& figures() const { return entry->figures[row * entry->rows.heads + head]; }
};

// Attention of one row of one KV head over candidates; a thread reuses one for all its tasks.
class ChosenAttention {
 public:
  // Exact logits of the candidates for every query head of the group.
  void score(const KernelTable& k, const HeadTask& task, const RowChoice& candidates);

  // Applies the budget to each query head. `rest_lse` [group] or null, as in cut_of.
  void cut(const KernelTable& k, const HeadTask& task, const float* rest_lse);

  // Softmax and value sums over the kept candidates; `finish` may follow after more is added. Lists
  // the kept candidates if the entry wants them.
  void attend(const KernelTable& k, const HeadTask& task);

  // Divides by the total and writes output and lse.
  void finish(const HeadTask& task);

  int64_t candidates() const { return choice_.count; }
  int32_t candidate(int64_t i) const {
    return choice_.ids ? choice_.ids[i] : static_cast<int32_t>(choice_.first + i);
  }
  // Logits [candidates][kTile] of a tile; -infinity where the budget dropped the key.
  float* logits(int tile) const { return logits_ + tile * logits_stride_; }

  // Running softmax of query head g: sum of weights * values, highest logit, sum of weights.
  float* sums(int g) { return sums_ + static_cast<int64_t>(g) * value_dim_; }
  float& highest(int g) { return highest_[g]; }
  float& total(int g) { return total_[g]; }

 private:
  void reserve(const HeadTask& task, int64_t count);
  void cut_tile(const KernelTable& k, const HeadTask& task, const float* rest_lse, int tile);
  void list_selected(const HeadTask& task) const;

  RowChoice choice_{};
  int value_dim_ = 0;
  int64_t logits_stride_ = 0;
  std::vector<PackedTile> tiles_;
  Workspace<float> logits_memory_, kept_memory_, sums_memory_, column_memory_;
  Workspace<int32_t> kept_ids_;
  float* logits_ = nullptr;
  float* sums_ = nullptr;
  float* highest_ = nullptr;
  float* total_ = nullptr;
};

// Each entry's budget over every key of its scope: the exact answer to the budget.
void attend_best(const LayerKv& kv, const std::vector<BudgetedRows>& batch, const LogitRule& rule);

// Each entry's budget over given candidates: those of (row, head) are ids[offsets[i] ..
// offsets[i + 1]) with i = row * heads + head, ascending and within the scope.
struct Candidates {
  const int64_t* offsets;
  const int32_t* ids;
};
void attend_candidates(const LayerKv& kv, const std::vector<BudgetedRows>& batch,
                       const std::vector<Candidates>& candidates, const LogitRule& rule);

// Runs task(HeadTask) for every (entry, row, head) on the pool. `body` gets the entry's number too.
template <class Body>
void for_each_head(const LayerKv& kv, const std::vector<BudgetedRows>& batch, const LogitRule& rule,
                   Body body);

}  // namespace longreach

#include "head_tasks.h"
