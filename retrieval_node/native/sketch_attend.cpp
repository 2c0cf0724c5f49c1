#include <algorithm>
#include <cmath>
#include <limits>

#include "head_tasks.h"
#include "isa.h"
#include "sketch.h"
#include "sketch_search.h"

namespace longreach {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Under a tail estimate, candidates that together show no more than this in the output, as a share
// of it, are not worth reading their values: they join the tail of their summaries.
constexpr double kFaint = 0.005;
// Summaries whose weight is below this share of the total for every head are not read; their mass
// still counts.
constexpr float kNegligible = 2e-6f;

// Moves to the tail the candidates whose values would hardly show in any head's output. An error in
// a value goes with the square of the key's weight, as in SketchSearch::choose_for_tail. Candidates
// outside whole summaries stay.
void demote_faint(const KernelTable& k, const HeadTask& task, SketchSearch& search,
                  ChosenAttention& attention) {
  thread_local Workspace<float> memory;
  const int64_t count = attention.candidates();
  const int64_t stride = count * kTile + kPanel;
  float* weights = memory.reserve((task.tiles() + 1) * stride);
  float* squares = weights + task.tiles() * stride;
  std::fill_n(squares, count, 0.0f);
  float highest[kCodeHeads], total[kCodeHeads] = {}, rescale[kTile];
  std::fill_n(highest, kCodeHeads, kMinusInfinity);
  for (int t = 0; t < task.tiles(); ++t) {
    std::copy_n(attention.logits(t), count * kTile, weights + t * stride);
    k.softmax_step(weights + t * stride, count, kTile, highest + t * kTile, total + t * kTile,
                   rescale);
  }
  for (int g = 0; g < task.group; ++g) {
    const float* own = weights + g / kTile * stride + g % kTile;
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(own[i * kTile] * own[i * kTile]);
    if (!(sum > 0 && std::isfinite(sum))) return;
    const auto per_square = static_cast<float>(1 / sum);
    for (int64_t i = 0; i < count; ++i) squares[i] += own[i * kTile] * own[i * kTile] * per_square;
  }
  // Tail sums are corrected for the codes' error later, which these weights do not have.
  float to_tail[kCodeHeads];
  for (int g = 0; g < task.group; ++g)
    to_tail[g] = std::exp(
        std::min(kLargestTail, highest[g] - search.reference(g) - search.correction(g)));
  const float bar = fewest_for_sum(k, squares, count, (1 - kFaint * kFaint) * task.group).bar;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t summary = attention.candidate(i) / kSummaryKeys;
    if (squares[i] > bar || summary < search.first_summary() || summary >= search.stop_summary())
      continue;
    // Rows of a tile that are no query head must not keep keys alive.
    for (int g = task.group; g < task.tiles() * kTile; ++g)
      attention.logits(g / kTile)[i * kTile + g % kTile] = kMinusInfinity;
    for (int g = 0; g < task.group; ++g) {
      float& z = attention.logits(g / kTile)[i * kTile + g % kTile];
      search.tail_sum(summary, g) += weights[g / kTile * stride + i * kTile + g % kTile] *
                                     to_tail[g];
      z = kMinusInfinity;
    }
  }
}

// Adds the tail: each summary's mean value with the weight of its keys that were not attended.
void add_tail(const KernelTable& k, const SketchHead& sketch, const HeadTask& task,
              SketchSearch& search, ChosenAttention& attention) {
  thread_local Workspace<float> memory;
  thread_local Workspace<int32_t> ids_memory;
  const int64_t summaries = search.stop_summary() - search.first_summary();
  const int64_t tile_floats = summaries * kTile;
  float* weights = memory.reserve(task.tiles() * tile_floats);
  int32_t* ids = ids_memory.reserve(summaries);
  float factor[kCodeHeads] = {}, least[kCodeHeads] = {};
  for (int g = 0; g < task.group; ++g) {
    if (attention.highest(g) == kMinusInfinity) attention.highest(g) = search.reference(g);
    factor[g] = std::exp(search.reference(g) + search.correction(g) - attention.highest(g));
    least[g] = kNegligible * attention.total(g);
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < summaries; ++i) {
    const float* sums = &search.tail_sum(search.first_summary() + i, 0);
    bool matters = false;
    for (int g = 0; g < task.group; ++g) {
      const float weight = sums[g] * factor[g];
      weights[g / kTile * tile_floats + kept * kTile + g % kTile] = weight;
      attention.total(g) += weight;
      matters = matters || weight > least[g];
    }
    for (int g = task.group; g < task.tiles() * kTile; ++g)
      weights[g / kTile * tile_floats + kept * kTile + g % kTile] = 0;
    ids[kept] = static_cast<int32_t>(search.first_summary() + i);
    kept += matters;
  }
  for (int t = 0; t < task.tiles(); ++t)
    k.accumulate(sketch.summaries, {ids, 0, kept}, weights + t * tile_floats, kTile,
                 attention.sums(t * kTile));
  task.figures().tail_rows += kept;
}

// Exact attention over the whole scope, in one pass.
void attend_all(const KernelTable& k, const HeadTask& task) {
  const AttentionRows& rows = task.entry->rows;
  const int64_t first = task.row * rows.group + task.first;
  attend_piece(k, *task.kv,
               {&rows, task.head, first, task.group, rows.start, rows.stop,
                rows.output + task.index(0) * task.kv->values.dim, rows.lse + task.index(0)},
               task.rule);
  task.figures().attended += rows.stop - rows.start;
  if (!task.entry->selected) return;
  for (int g = 0; g < task.group; ++g) {
    auto& list = (*task.entry->selected)[task.index(g)];
    for (int64_t i = rows.start; i < rows.stop; ++i) list.push_back(static_cast<int32_t>(i));
  }
}

void attend_heads(const KernelTable& k, const SketchHead& sketch, const HeadTask& task) {
  thread_local SketchSearch search;
  thread_local ChosenAttention attention;
  Stopwatch watch;
  HeadFigures& figures = task.figures();
  search.run(k, sketch, task);
  figures.sketched += search.keys_sketched();
  figures.code_bytes += search.keys_sketched() * sketch.format.key_bytes();
  figures.scanned += search.candidates().count;
  if (search.everything() && may_use_all(task.entry->budget)) {
    figures.search_ns += watch.lap();
    attend_all(k, task);
    figures.attend_ns += watch.lap();
    return;
  }
  attention.score(k, task, search.candidates());
  const bool estimate = task.entry->budget.tail_estimate;
  float rest[kCodeHeads];
  for (int g = 0; g < task.group; ++g) rest[g] = search.rest_lse(g);
  // What was read exactly is better than its estimate, so with a tail estimate it all joins.
  if (estimate)
    demote_faint(k, task, search, attention);
  else
    attention.cut(k, task, rest);
  figures.search_ns += watch.lap();
  attention.attend(k, task);
  if (estimate) add_tail(k, sketch, task, search, attention);
  attention.finish(task);
  figures.attend_ns += watch.lap();
}

}  // namespace

void attend_sketch(const LayerKv& kv, const std::vector<SketchHead>& heads,
                   const std::vector<BudgetedRows>& batch, const LogitRule& rule) {
  const KernelTable& k = kernels();
  for_each_head(kv, batch, rule, [&](const HeadTask& task, size_t) {
    // Larger groups are searched kCodeHeads query heads at a time.
    for (int first = 0; first < task.group; first += kCodeHeads) {
      HeadTask part = task;
      part.first = first;
      part.group = std::min(kCodeHeads, task.group - first);
      attend_heads(k, heads[task.entry->rows.head_start + task.head], part);
    }
  });
}

}  // namespace longreach
