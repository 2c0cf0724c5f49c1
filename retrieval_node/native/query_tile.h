// Packs queries the way the kernels read them.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "workspace.h"

namespace longreach {

// Owns the memory of one QueryTile.
class PackedTile {
 public:
  // Packs `rows` <= kTile queries of `dim` elements; query r starts at `at(r)`.
  template <class At>
  const QueryTile& pack(int rows, int dim, At at) {
    const int stride = padded_dim(dim);
    const size_t count = static_cast<size_t>(kTile) * stride;
    float* wide = wide_.reserve(count);
    uint16_t* high = halves_.reserve(4 * count);
    uint16_t* low = high + count;
    std::memset(wide, 0, count * sizeof(float));
    std::memset(high, 0, 2 * count * sizeof(uint16_t));
    bool low_is_zero = true;
    for (int r = 0; r < rows; ++r) {
      const float* query = at(r);
      for (int c = 0; c < dim; ++c) {
        const size_t i = static_cast<size_t>(r) * stride + c;
        wide[i] = query[c];
        high[i] = bfloat16_bits(query[c]);
        const float rest = query[c] - to_float(Bfloat16{high[i]});
        low[i] = bfloat16_bits(rest);
        low_is_zero = low_is_zero && rest == 0;
      }
    }
    auto* high_pairs = reinterpret_cast<uint32_t*>(low + count);
    auto* low_pairs = high_pairs + count / 2;
    pair_up(high, stride, high_pairs);
    pair_up(low, stride, low_pairs);
    tile_ = {wide, high, low, low_is_zero, stride, high_pairs, low_pairs};
    return tile_;
  }

  const QueryTile& tile() const { return tile_; }

 private:
  static void pair_up(const uint16_t* queries, int stride, uint32_t* pairs) {
    for (int r = 0; r < kTile; ++r)
      for (int p = 0; p < stride / 2; ++p)
        std::memcpy(&pairs[p * kTile + r], queries + r * stride + 2 * p, sizeof(uint32_t));
  }

  Workspace<float> wide_;
  Workspace<uint16_t> halves_;
  QueryTile tile_{};
};

}  // namespace longreach
