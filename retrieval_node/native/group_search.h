// Searches a graph over keys for all query heads of a group at once.
#pragma once

#include <algorithm>
#include <vector>

#include "beam.h"
#include "graph.h"
#include "prefetch.h"

namespace longreach {

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
  // Every key scored within the scope.
  RowChoice scored() {
    const AttentionRows& rows = task_->entry->rows;
    found_.clear();
    for (const int32_t key : visits_)
      if (key >= rows.start && key < rows.stop) found_.push_back(key);
    return found();
  }
  int64_t visits() const { return static_cast<int64_t>(visits_.size()); }

 private:
  static constexpr int64_t kEdgesPerLine = 16;  // of a cache line

  void choose_round() {
    round_.clear();
    for (int g = 0; g < task_->group; ++g) {
      int32_t key = beams_[g].pop();
      while (key >= 0 && !expanded_.add(key)) key = beams_[g].pop();
      if (key < 0) continue;
      round_.push_back(key);
      prefetch(graph_->offsets + key);
    }
    for (const int32_t key : round_)
      for (int64_t e = graph_->offsets[key]; e < graph_->offsets[key + 1]; e += kEdgesPerLine)
        prefetch(graph_->edges + e);
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
      // Sixteen bits of a query are enough to find the way; what is found is scored exactly.
      QueryTile rough = tiles_[t].tile();
      rough.low_is_zero = true;
      kernels_->score(keys_, keys, rough, scores);
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

}  // namespace longreach
