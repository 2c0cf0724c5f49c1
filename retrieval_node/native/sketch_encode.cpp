#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "sketch.h"
#include "workspace.h"

namespace longreach {
namespace {

constexpr int64_t kBatch = 64;  // keys transformed at a time; a multiple of kCodeKeys

// weights [dims, dim] as panels of kPanel outputs: [panel][dim][kPanel].
void pack_panels(const float* weights, int dims, int dim, float* panels) {
  std::fill_n(panels, static_cast<size_t>((dims + kPanel - 1) / kPanel) * dim * kPanel, 0.0f);
  for (int i = 0; i < dims; ++i)
    for (int c = 0; c < dim; ++c)
      panels[(static_cast<size_t>(i / kPanel) * dim + c) * kPanel + i % kPanel] =
          weights[i * dim + c];
}

uint8_t clipped(float value, float highest) {
  return static_cast<uint8_t>(std::min(std::max(value, 0.0f), highest));
}

// Places dimension i of a key in its block.
void place(const CodeFormat& format, int i, int key, float value, uint8_t* block) {
  const int eights = 4 * format.eight;
  if (i < eights) {
    block[((i / 4) * kCodeKeys + key) * 4 + i % 4] = clipped(value, 255.0f);
    return;
  }
  const int j = i - eights;
  const int line = format.eight + j / 8;
  const int shift = j % 8 < 4 ? 0 : 4;
  block[(line * kCodeKeys + key) * 4 + j % 4] |=
      static_cast<uint8_t>(clipped(value, 15.0f) << shift);
}

}  // namespace

int64_t encode_sketch(const Rows& keys, int64_t count, const CodeFormat& format,
                      const float* weights, const float* bias, uint8_t* codes) {
  thread_local Workspace<float> memory;
  const KernelTable& k = kernels();
  const int dims = format.dims(), dim = keys.dim;
  const int panels = (dims + kPanel - 1) / kPanel;
  float* packed = memory.reserve(static_cast<size_t>(panels) * dim * kPanel + kBatch * dim +
                                 static_cast<size_t>(panels) * kBatch * kPanel);
  float* wide = packed + static_cast<size_t>(panels) * dim * kPanel;
  float* outputs = wide + kBatch * dim;
  pack_panels(weights, dims, dim, packed);
  const int64_t block_bytes = format.block_bytes();
  std::memset(codes, 0, static_cast<size_t>((count + kCodeKeys - 1) / kCodeKeys * block_bytes));
  for (int64_t at = 0; at < count; at += kBatch) {
    const int64_t here = std::min(kBatch, count - at);
    k.widen(keys, at, here, wide);
    for (int p = 0; p < panels; ++p)
      k.score_panel(wide, here, dim, packed + static_cast<size_t>(p) * dim * kPanel,
                    outputs + p * kBatch * kPanel);
    for (int64_t key = 0; key < here; ++key) {
      uint8_t* block = codes + (at + key) / kCodeKeys * block_bytes;
      float sum = 0;  // NaN or infinity in any element of the key shows up here
      for (int c = 0; c < dim; ++c) sum += wide[key * dim + c] * 0.0f;
      if (sum != 0.0f) return at + key;
      for (int i = 0; i < dims; ++i) {
        const float value = outputs[(i / kPanel * kBatch + key) * kPanel + i % kPanel] + bias[i];
        place(format, i, static_cast<int>((at + key) % kCodeKeys), value, block);
      }
    }
  }
  return -1;
}

void summarise_values(const Rows& values, int64_t count, uint16_t* summaries) {
  thread_local Workspace<float> memory;
  const KernelTable& k = kernels();
  float* sums = memory.reserve(static_cast<size_t>(kTile) * values.dim);
  float weights[kSummaryKeys * kTile] = {};
  for (int64_t first = 0, row = 0; first < count; first += kSummaryKeys, ++row) {
    const int64_t here = std::min<int64_t>(kSummaryKeys, count - first);
    for (int64_t i = 0; i < here; ++i) weights[i * kTile] = 1.0f / static_cast<float>(here);
    std::fill_n(sums, static_cast<size_t>(kTile) * values.dim, 0.0f);
    k.accumulate(values, {nullptr, first, here}, weights, kTile, sums);
    for (int c = 0; c < values.dim; ++c) summaries[row * values.dim + c] = bfloat16_bits(sums[c]);
  }
}

}  // namespace longreach
