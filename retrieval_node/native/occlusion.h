// Chooses the neighbours of a vertex of a graph over keys.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "workspace.h"

namespace longreach {

// A key and its inner product with the vertex whose neighbour it may become.
struct Neighbour {
  float score;
  int32_t key;
};

// Best first; equal scores by key, so that builds repeat exactly.
inline bool better(const Neighbour& a, const Neighbour& b) {
  return a.score > b.score || (a.score == b.score && a.key < b.key);
}

// Four bfloat16 rows as a query tile. Unused rows are zero.
class RowTile {
 public:
  const QueryTile& pack(const Rows& rows, const int32_t* ids, int used);

 private:
  Workspace<float> wide_;
  Workspace<uint16_t> halves_;
  QueryTile tile_{};
};

// Occlusion rule (RoarGraph's, and HNSW's heuristic): taken best first, a candidate is kept unless
// some kept one is nearer to it than the vertex is. Stops at `degree`. A thread has one of its own.
class Occlusion {
 public:
  // Scores candidates against the vertex, drops the vertex itself and repeats, sorts best first.
  void rank(const KernelTable& k, const Rows& keys, int32_t vertex,
            const std::vector<int32_t>& candidates);

  // Neighbours kept among the ranked candidates; with `fill`, the best of the rejected ones follow
  // until there are `degree`.
  void choose(const KernelTable& k, const Rows& keys, int64_t degree, bool fill,
              std::vector<int32_t>& neighbours);

 private:
  std::vector<int32_t> ids_;
  std::vector<float> scores_;
  std::vector<Neighbour> ranked_;
  std::vector<char> rejected_;
  RowTile tile_;
};

}  // namespace longreach
