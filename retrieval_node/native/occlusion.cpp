#include "occlusion.h"

#include <algorithm>
#include <cstring>

namespace longreach {

const QueryTile& RowTile::pack(const Rows& rows, const int32_t* ids, int used) {
  const int stride = padded_dim(rows.dim);
  const size_t size = static_cast<size_t>(kTile) * stride;
  float* wide = wide_.reserve(size);
  uint16_t* high = halves_.reserve(2 * size);
  std::memset(wide, 0, size * sizeof(float));
  std::memset(high, 0, 2 * size * sizeof(uint16_t));
  for (int r = 0; r < used; ++r) {
    const auto* row = rows.row<Bfloat16>(ids[r]);
    std::memcpy(high + static_cast<size_t>(r) * stride, row, rows.row_bytes());
    for (int c = 0; c < rows.dim; ++c) wide[static_cast<size_t>(r) * stride + c] = to_float(row[c]);
  }
  tile_ = {wide, high, high + size, true, stride};
  return tile_;
}

void Occlusion::rank(const KernelTable& k, const Rows& keys, int32_t vertex,
                     const std::vector<int32_t>& candidates) {
  ids_ = candidates;
  std::sort(ids_.begin(), ids_.end());
  ids_.erase(std::unique(ids_.begin(), ids_.end()), ids_.end());
  ids_.erase(std::remove(ids_.begin(), ids_.end(), vertex), ids_.end());
  const int64_t count = static_cast<int64_t>(ids_.size());
  scores_.resize(count * kTile);
  k.score(keys, {ids_.data(), 0, count}, tile_.pack(keys, &vertex, 1), scores_.data());
  ranked_.clear();
  for (int64_t i = 0; i < count; ++i) ranked_.push_back({scores_[i * kTile], ids_[i]});
  std::sort(ranked_.begin(), ranked_.end(), better);
}

void Occlusion::choose(const KernelTable& k, const Rows& keys, int64_t degree, bool fill,
                       std::vector<int32_t>& kept) {
  kept.clear();
  const int64_t count = static_cast<int64_t>(ranked_.size());
  rejected_.assign(count, 0);
  // Candidates go in tiles of four: one pass over the kept rows tests them all.
  for (int64_t first = 0; first < count && static_cast<int64_t>(kept.size()) < degree; first += kTile) {
    const int used = static_cast<int>(std::min<int64_t>(kTile, count - first));
    int32_t tile_ids[kTile];
    for (int r = 0; r < used; ++r) tile_ids[r] = ranked_[first + r].key;
    const QueryTile& tile = tile_.pack(keys, tile_ids, used);
    scores_.resize((kept.size() + kTile) * kTile);
    k.score(keys, {kept.data(), 0, static_cast<int64_t>(kept.size())}, tile, scores_.data());
    for (size_t i = 0; i < kept.size(); ++i)
      for (int r = 0; r < used; ++r)
        rejected_[first + r] |= scores_[i * kTile + r] > ranked_[first + r].score;
    k.score(keys, {tile_ids, 0, used}, tile, scores_.data());
    for (int r = 0; r < used; ++r) {
      if (rejected_[first + r]) continue;
      if (static_cast<int64_t>(kept.size()) == degree) {
        rejected_[first + r] = 1;
        continue;
      }
      kept.push_back(tile_ids[r]);
      for (int later = r + 1; later < used; ++later)
        rejected_[first + later] |= scores_[r * kTile + later] > ranked_[first + later].score;
    }
  }
  if (!fill) return;
  for (int64_t i = 0; i < count && static_cast<int64_t>(kept.size()) < degree; ++i)
    if (rejected_[i]) kept.push_back(ranked_[i].key);
}

}  // namespace longreach
