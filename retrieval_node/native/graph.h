// Graphs over keys: search by inner product, and attention over what the search finds.
#pragma once

#include <cstdint>
#include <vector>

#include "chosen.h"

namespace longreach {

// A directed graph over the keys of one KV head: the neighbours of key v are
// edges[offsets[v] .. offsets[v + 1]).
struct KeyGraph {
  const int64_t* offsets;  // [count + 1]
  const int32_t* edges;
  int32_t entry;  // where searches start
};

// How far a search goes. The beam is the number of best keys a query head holds while it searches;
// the search ends when all of them have been expanded.
struct GraphSearch {
  int64_t beam;       // least beam
  double oversearch;  // beam per key that the budget asks for
  int64_t sample_stride;  // every how many keys the tail sample has one
};

// Each entry's budget, over the keys that a search of each row and KV head finds. The query heads
// of a group search together: they share the visited set, and a key read for one is scored for all.
// Rows for which searching would cost more than reading the scope read it all. `sample` holds every
// `sample_stride`-th key with its value; it stands for the keys no search listed, in the mass rule
// and in the tail estimate.
void attend_graph(const LayerKv& kv, const LayerKv& sample, const std::vector<KeyGraph>& graphs,
                  const std::vector<BudgetedRows>& batch, const LogitRule& rule,
                  const GraphSearch& options);

}  // namespace longreach
