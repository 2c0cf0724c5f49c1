// The AMX tier: AVX-512, with scores of consecutive bfloat16 keys by the matrix unit.
//
// A tile of 16 keys x 32 elements, straight from memory, times a tile of 32 elements x 4 queries
// adds to 16 x 4 scores, which are stored as they are wanted: [key][query].
#include <immintrin.h>

#include "tiers/avx512_score.h"
#include "tiers/codes.h"
#include "tiers/simd_avx512.h"
#include "tiers/vector_kernels.h"

namespace longreach {
namespace {

using avx512::Simd;

constexpr int kTileKeys = 16;
constexpr int kTileElements = 32;
constexpr int kQueryTileBytes = kTile * static_cast<int>(sizeof(uint32_t));

// Tile registers, by their numbers as the compiler's macros want them: two of scores, two of keys,
// one of queries.
#define SCORES_0 0
#define SCORES_1 1
#define KEYS_0 2
#define KEYS_1 3
#define QUERIES 4

struct TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the layout ldtilecfg reads");

constexpr TileConfig kConfig = {
    1, 0, {}, {kQueryTileBytes, kQueryTileBytes, 64, 64, kQueryTileBytes}, {16, 16, 16, 16, 16}};

inline void prefetch_keys(const Rows& keys, int64_t first) {
  for (int64_t i = first; i < first + 2 * kTileKeys; ++i)
    vector::prefetch_row<Simd, Bfloat16>(keys, i);
}

// Adds the products of `pairs` (QueryTile::high_pairs or low_pairs) with 32 keys.
inline void add_products(const Bfloat16* keys, int64_t stride, int dim, const uint32_t* pairs) {
  const auto row_bytes = stride * static_cast<int64_t>(sizeof(Bfloat16));
  for (int c = 0; c < dim; c += kTileElements) {
    _tile_loadd(QUERIES, pairs + c / 2 * kTile, kQueryTileBytes);
    _tile_loadd(KEYS_0, keys + c, row_bytes);
    _tile_dpbf16ps(SCORES_0, KEYS_0, QUERIES);
    _tile_loadd(KEYS_1, keys + kTileKeys * stride + c, row_bytes);
    _tile_dpbf16ps(SCORES_1, KEYS_1, QUERIES);
  }
}

void score(const Rows& keys, const RowChoice& choice, const QueryTile& queries, float* scores) {
  const bool fits = keys.type == Storage::kBfloat16 && keys.dim % kTileElements == 0;
  if (!fits || choice.ids != nullptr || queries.high_pairs == nullptr)
    return avx512::score(keys, choice, queries, scores);
  int64_t i = 0;
  _tile_loadconfig(&kConfig);
  for (; i + 2 * kTileKeys <= choice.count; i += 2 * kTileKeys) {
    const Bfloat16* block = keys.row<Bfloat16>(choice.first + i);
    prefetch_keys(keys, choice.first + i + 2 * kTileKeys);
    _tile_zero(SCORES_0);
    _tile_zero(SCORES_1);
    add_products(block, keys.stride, keys.dim, queries.high_pairs);
    if (!queries.low_is_zero) add_products(block, keys.stride, keys.dim, queries.low_pairs);
    _tile_stored(SCORES_0, scores + i * kTile, kQueryTileBytes);
    _tile_stored(SCORES_1, scores + (i + kTileKeys) * kTile, kQueryTileBytes);
  }
  _tile_release();
  if (i < choice.count)
    avx512::score(keys, {nullptr, choice.first + i, choice.count - i}, queries, scores + i * kTile);
}

}  // namespace

const KernelTable kAmxKernels = {
    score,
    vector::score_panel<Simd>,
    vector::to_logits<Simd>,
    vector::softmax_step<Simd>,
    vector::accumulate<Simd>,
    vector::widen<Simd>,
    vector::value_range<Simd>,
    vector::count_above<Simd>,
    vector::sum_above<Simd>,
    vector::nth_highest<Simd>,
    avx512::code_scores,
    avx512::code_scan,
};

}  // namespace longreach
