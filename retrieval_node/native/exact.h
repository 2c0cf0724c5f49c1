// Exact partial attention of many rows over the KV heads of one layer, of any number of K/V pairs.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace longreach {

// K and V of one layer: head h starts `key_head_stride * h` elements after `keys`.
struct LayerKv {
  Rows keys;
  Rows values;
  int64_t key_head_stride;
  int64_t value_head_stride;
  int kv_heads;
  int64_t count;  // keys of a head

  Rows keys_of(int head) const;
  Rows values_of(int head) const;
};

// Rows that share a scope. queries [rows, heads, group, head_dim], output [rows, heads, group,
// value_dim] and lse [rows, heads, group] are dense; heads begin at KV head `head_start`; the scope
// [start, stop) counts keys of the layer from 0.
struct AttentionRows {
  const float* queries;
  int64_t rows;
  int heads;
  int group;
  int head_start;
  int64_t start;
  int64_t stop;
  float* output;
  float* lse;

  // Offset of (row, head, g) in the dense [rows, heads, group] order.
  int64_t index(int64_t row, int head, int g) const { return (row * heads + head) * group + g; }
};

// Flattened query rows [first, first + count) of one KV head of an entry, over keys [start, stop).
// Row r is (r / group, r % group); `head` counts from the entry's first. count <= kRowsAtOnce.
struct Piece {
  const AttentionRows* entry;
  int head;
  int64_t first;
  int64_t count;
  int64_t start;
  int64_t stop;
  float* output;  // [count, value_dim]
  float* lse;     // [count]
};

// K and V, and the rows that read them.
struct KvRows {
  LayerKv kv;
  std::vector<AttentionRows> entries;
};

// Query rows that share one pass over K and V. Their sums (64 x 128 floats) stay in the L2 cache.
constexpr int64_t kRowsAtOnce = 64;

// Exact attention of one piece, on the calling thread.
void attend_piece(const KernelTable& k, const LayerKv& kv, const Piece& piece,
                  const LogitRule& rule);

// Fills output and lse of every entry of every pair, as one batch over the thread pool: pairs may
// differ in length, heads, dimensions and storage. Every K and V row is read from memory once for
// up to kRowsAtOnce query rows. Deterministic for a given batch and pool size.
void attend_exact(const std::vector<KvRows>& batch, const LogitRule& rule);

}  // namespace longreach
