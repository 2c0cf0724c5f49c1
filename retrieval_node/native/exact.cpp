#include "exact.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "query_tile.h"
#include "thread_pool.h"
#include "workspace.h"

namespace longreach {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// From this many query rows on, K and V blocks are widened once and scored by panels.
constexpr int64_t kPanelFrom = 9;
// Keys scored before their values are read; K and V of a block stay in the L2 cache, for panels as
// float32.
constexpr int64_t kTileBlock = 512;
constexpr int64_t kPanelBlock = 128;
// Scores of a block, and what softmax_step may write past them.
constexpr int64_t kScoreFloats = std::max(kTileBlock * kTile, kPanelBlock* kPanel) + kPanel;
// A pass is cut along the keys only into pieces at least this long.
constexpr int64_t kShortestPiece = 2048;

const float* query_of(const Piece& piece, int64_t row, int dim) {
  const AttentionRows& entry = *piece.entry;
  const int64_t flat = piece.first + row;
  return entry.queries +
         entry.index(flat / entry.group, piece.head, static_cast<int>(flat % entry.group)) * dim;
}

// Running softmax sums of up to kRowsAtOnce rows.
struct Sums {
  float* acc;      // [rows, value_dim]
  float* highest;  // [rows]
  float* total;    // [rows]
};

void start_sums(const Sums& sums, int64_t rows, int value_dim) {
  std::fill_n(sums.acc, rows * value_dim, 0.0f);
  std::fill_n(sums.highest, rows, kMinusInfinity);
  std::fill_n(sums.total, rows, 0.0f);
}

void finish_sums(const Sums& sums, const Piece& piece, int value_dim) {
  for (int64_t r = 0; r < piece.count; ++r) {
    const float total = sums.total[r];
    const float inverse = total > 0 ? 1.0f / total : (total == 0 ? 0.0f : total);
    for (int c = 0; c < value_dim; ++c)
      piece.output[r * value_dim + c] = sums.acc[r * value_dim + c] * inverse;
    piece.lse[r] = total == 0 ? kMinusInfinity : sums.highest[r] + std::log(total);
  }
}

// Softmax and values of one block of scored keys for `lanes` rows starting at `row`.
void add_block(const KernelTable& k, const Rows& values, const RowChoice& choice,
               const LogitRule& rule, float* scores, int lanes, const Sums& sums, int64_t row) {
  float rescale[kPanel];
  k.to_logits(scores, choice.count * lanes, rule);
  k.softmax_step(scores, choice.count, lanes, sums.highest + row, sums.total + row, rescale);
  for (int r = 0; r < lanes; ++r) {
    if (rescale[r] == 1.0f) continue;
    float* acc = sums.acc + (row + r) * values.dim;
    for (int c = 0; c < values.dim; ++c) acc[c] *= rescale[r];
  }
  k.accumulate(values, choice, scores, lanes, sums.acc + row * values.dim);
}

// Few rows: K and V are read in their storage type.
void attend_tiles(const KernelTable& k, const Rows& keys, const Rows& values, const Piece& piece,
                  const LogitRule& rule, float* scores, const Sums& sums) {
  thread_local PackedTile tiles[(kPanelFrom + kTile - 2) / kTile];
  const int64_t tile_count = (piece.count + kTile - 1) / kTile;
  for (int64_t t = 0; t < tile_count; ++t)
    tiles[t].pack(static_cast<int>(std::min<int64_t>(kTile, piece.count - t * kTile)), keys.dim,
                  [&](int r) { return query_of(piece, t * kTile + r, keys.dim); });
  for (int64_t at = piece.start; at < piece.stop; at += kTileBlock) {
    const int64_t count = std::min(kTileBlock, piece.stop - at);
    // Each pass brings to the cache what the next one reads.
    const RowChoice block_keys{nullptr, at, count, &values, at};
    const RowChoice block_values{nullptr, at, count, &keys, at + kTileBlock};
    for (int64_t t = 0; t < tile_count; ++t) {
      k.score(keys, block_keys, tiles[t].tile(), scores);
      add_block(k, values, block_values, rule, scores, kTile, sums, t * kTile);
    }
  }
}

// Many rows: blocks are widened to float32 once, then used by every panel of rows.
void attend_panels(const KernelTable& k, const Rows& keys, const Rows& values, const Piece& piece,
                   const LogitRule& rule, float* scores, const Sums& sums) {
  thread_local Workspace<float> panel_memory, wide_memory;
  const int64_t panel_count = (piece.count + kPanel - 1) / kPanel;
  const size_t panel_size = static_cast<size_t>(keys.dim) * kPanel;
  float* panels = panel_memory.reserve(panel_count * panel_size);
  std::fill_n(panels, panel_count * panel_size, 0.0f);
  for (int64_t r = 0; r < piece.count; ++r) {
    const float* query = query_of(piece, r, keys.dim);
    float* panel = panels + (r / kPanel) * panel_size + r % kPanel;
    for (int c = 0; c < keys.dim; ++c) panel[c * kPanel] = query[c];
  }
  float* wide_keys = wide_memory.reserve(kPanelBlock * (keys.dim + values.dim));
  float* wide_values = wide_keys + kPanelBlock * keys.dim;
  const Rows block_values{wide_values, Storage::kFloat32, values.dim, values.dim};
  for (int64_t at = piece.start; at < piece.stop; at += kPanelBlock) {
    const int64_t count = std::min(kPanelBlock, piece.stop - at);
    k.widen(keys, at, count, wide_keys);
    k.widen(values, at, count, wide_values);
    for (int64_t p = 0; p < panel_count; ++p) {
      k.score_panel(wide_keys, count, keys.dim, panels + p * panel_size, scores);
      add_block(k, block_values, {nullptr, 0, count}, rule, scores, kPanel, sums, p * kPanel);
    }
  }
}

struct PlannedPiece {
  const LayerKv* kv;
  Piece piece;
};

// All pieces of a batch. Piece outputs are dense in `memory`, a run of `cuts` pieces along the keys
// for each (pair, entry, head, row tile), in order.
struct Plan {
  std::vector<PlannedPiece> pieces;
  std::vector<int> cuts;  // pieces along the keys of each run
  size_t memory_floats = 0;
};

int64_t runs_of(const AttentionRows& entry) {
  return entry.heads * ((entry.rows * entry.group + kRowsAtOnce - 1) / kRowsAtOnce);
}

// Keys of a piece such that the runs together make about two pieces a thread: a long pair among
// short ones is cut, so that no thread is left with it alone.
int64_t even_share(const std::vector<KvRows>& batch, int threads) {
  int64_t keys = 0;
  for (const auto& pair : batch)
    for (const auto& entry : pair.entries) keys += runs_of(entry) * (entry.stop - entry.start);
  return std::max<int64_t>(1, (keys + 2 * threads - 1) / (2 * threads));
}

void plan_entry(const LayerKv& kv, const AttentionRows& entry, int64_t share, Plan& plan) {
  const int64_t flat_rows = entry.rows * entry.group;
  const int64_t length = entry.stop - entry.start;
  const int64_t most = std::max<int64_t>(1, length / kShortestPiece);
  const int64_t cuts = std::clamp<int64_t>((length + share - 1) / share, 1, most);
  const int64_t step = ((length + cuts - 1) / cuts + kTileBlock - 1) / kTileBlock * kTileBlock;
  for (int head = 0; head < entry.heads; ++head)
    for (int64_t first = 0; first < flat_rows; first += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, flat_rows - first);
      int made = 0;
      for (int64_t at = entry.start; made == 0 || at < entry.stop; at += step, ++made) {
        const int64_t stop = std::min(entry.stop, at + step);
        plan.pieces.push_back({&kv, {&entry, head, first, count, at, stop, nullptr, nullptr}});
        plan.memory_floats += static_cast<size_t>(count) * (kv.values.dim + 1);
      }
      plan.cuts.push_back(made);
    }
}

Plan plan_pieces(const std::vector<KvRows>& batch, int threads) {
  const int64_t share = even_share(batch, threads);
  Plan plan;
  for (const auto& pair : batch)
    for (const auto& entry : pair.entries) plan_entry(pair.kv, entry, share, plan);
  return plan;
}

// Merges the pieces of one run by log-sum-exp into the entry's output.
void merge_run(const PlannedPiece* run, int cuts) {
  const Piece& first = run->piece;
  const AttentionRows& entry = *first.entry;
  const int value_dim = run->kv->values.dim;
  for (int64_t r = 0; r < first.count; ++r) {
    const int64_t flat = first.first + r;
    const int64_t at =
        entry.index(flat / entry.group, first.head, static_cast<int>(flat % entry.group));
    float* output = entry.output + at * value_dim;
    float highest = kMinusInfinity;
    for (int p = 0; p < cuts; ++p)  // NaN wins, so that a NaN key is not hidden
      if (!(run[p].piece.lse[r] <= highest)) highest = run[p].piece.lse[r];
    std::fill_n(output, value_dim, 0.0f);
    entry.lse[at] = highest;
    if (highest == kMinusInfinity) continue;
    float total = 0;
    for (int p = 0; p < cuts; ++p) {
      const Piece& piece = run[p].piece;
      const float weight = std::exp(piece.lse[r] - highest);
      total += weight;
      for (int c = 0; c < value_dim; ++c) output[c] += weight * piece.output[r * value_dim + c];
    }
    for (int c = 0; c < value_dim; ++c) output[c] /= total;
    entry.lse[at] = highest + std::log(total);
  }
}

}  // namespace

Rows LayerKv::keys_of(int head) const {
  Rows rows = keys;
  rows.data = static_cast<const char*>(keys.data) + head * key_head_stride * item_bytes(keys.type);
  return rows;
}

Rows LayerKv::values_of(int head) const {
  Rows rows = values;
  rows.data =
      static_cast<const char*>(values.data) + head * value_head_stride * item_bytes(values.type);
  return rows;
}

void attend_piece(const KernelTable& k, const LayerKv& kv, const Piece& piece,
                  const LogitRule& rule) {
  thread_local Workspace<float> memory;
  const int head = piece.entry->head_start + piece.head;
  const Rows keys = kv.keys_of(head);
  const Rows values = kv.values_of(head);
  const int64_t rows = (piece.count + kPanel - 1) / kPanel * kPanel;
  float* scores = memory.reserve(kScoreFloats + rows * (values.dim + 2));
  float* acc = scores + kScoreFloats;
  const Sums sums{acc, acc + rows * values.dim, acc + rows * (values.dim + 1)};
  start_sums(sums, rows, values.dim);
  const auto attend = piece.count < kPanelFrom ? attend_tiles : attend_panels;
  attend(k, keys, values, piece, rule, scores, sums);
  finish_sums(sums, piece, values.dim);
}

void attend_exact(const std::vector<KvRows>& batch, const LogitRule& rule) {
  thread_local Workspace<float> memory;
  const KernelTable& k = kernels();
  const auto pool = shared_pool();
  Plan plan = plan_pieces(batch, pool->threads());
  float* free_floats = memory.reserve(plan.memory_floats);
  for (auto& [kv, piece] : plan.pieces) {
    piece.output = free_floats;
    piece.lse = free_floats + piece.count * kv->values.dim;
    free_floats = piece.lse + piece.count;
  }
  pool->run(static_cast<int>(plan.pieces.size()),
            [&](int i) { attend_piece(k, *plan.pieces[i].kv, plan.pieces[i].piece, rule); });
  const PlannedPiece* run = plan.pieces.data();
  for (const int cuts : plan.cuts) {
    merge_run(run, cuts);
    run += cuts;
  }
}

}  // namespace longreach
