// Builds RoarGraph's projected bipartite graph over the keys of one KV head
// (Chen et al., PVLDB 17(11), 2024; used for attention by RetrievalAttention, arXiv 2409.10516).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "storage.h"

namespace longreach {

// The nearest keys of each training query, best first: ids[i * width .. (i + 1) * width), with -1
// where there were fewer.
struct QueryNeighbours {
  const int32_t* ids;
  int64_t queries;
  int64_t width;
};

struct GraphShape {
  int64_t pivots;      // nearest keys of a query whose neighbours its list may become
  int64_t degree;      // M: neighbours kept by each of the two stages, so at most 2M in the end
  int64_t build_beam;  // L: keys held by the searches that connect the graph
};

struct BuiltGraph {
  std::vector<int64_t> offsets;  // [count + 1]
  std::vector<int32_t> edges;
  int32_t entry;
};

// Thrown by build_graph when `proceed` returns false.
struct BuildStopped {};

// Graph over keys [0, count) of bfloat16 `keys`, which must be centred: over inner products of keys
// that share a large mean the occlusion rule keeps next to nothing. Distances are -<x, y>.
//
// Neighbour lists may be short or hold repeated ids. The result depends on the arguments only, not
// on the number of threads. `proceed` is called by the calling thread every few thousand keys.
BuiltGraph build_graph(const Rows& keys, int64_t count, const QueryNeighbours& neighbours,
                       const GraphShape& shape, int threads, const std::function<bool()>& proceed);

}  // namespace longreach
