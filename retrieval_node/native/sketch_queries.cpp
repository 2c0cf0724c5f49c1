#include "sketch_queries.h"

#include <algorithm>
#include <cmath>

namespace longreach {
namespace {

// How much a unit of dimension i counts in a code's score.
float score_unit(const CodeFormat& format, int i) { return i < 4 * format.eight ? 1.0f : 16.0f; }

// Where dimension i's weight lies: quad and byte.
void set_weight(CodeQueries& codes, int head, int i, int value) {
  const int eights = 4 * codes.format.eight;
  int quad = i / 4, byte = i % 4;
  if (i >= eights) quad = codes.format.eight + (i - eights) / 4;
  codes.weights[head][quad] |=
      static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint8_t>(value)) << (8 * byte));
}

// One head: `whitened` holds head_dim dimensions of scale * query, then scale * query . mean.
// `stride` separates them.
void quantise(const SketchHead& sketch, int dim, const float* whitened, int stride, int head,
              SketchQueries& out) {
  const CodeFormat& format = sketch.format;
  const int dims = std::min(format.dims(), dim);
  float largest = 0;
  for (int i = 0; i < dims; ++i)
    largest =
        std::max(largest, std::fabs(whitened[i * stride] * sketch.step[i]) / score_unit(format, i));
  const float units = largest > 0 ? 127.0f / largest : 1.0f;
  float offset = whitened[dim * stride], residual = 0, spread = 0;
  for (int i = 0; i < dim; ++i) {
    float used = 0;  // the whitened query that the integer weight stands for
    if (i < dims && sketch.step[i] > 0) {
      const float exact = whitened[i * stride] * sketch.step[i] / score_unit(format, i);
      const float rounded = std::nearbyint(exact * units);
      set_weight(out.codes, head, i, static_cast<int>(rounded));
      used = rounded / units * score_unit(format, i) / sketch.step[i];
      offset += used * sketch.low[i];
      residual += used * used * sketch.noise[i];
    }
    const float missed = whitened[i * stride] - used;
    residual += missed * missed * sketch.variance[i];
    spread += whitened[i * stride] * whitened[i * stride] * sketch.variance[i];
  }
  out.slope[head] = 1.0f / units;
  out.offset[head] = offset;
  out.residual[head] = residual;
  out.lost_share[head] = spread > 0 ? std::min(1.0f, residual / spread) : 0.0f;
}

}  // namespace

SketchQueries sketch_queries(const KernelTable& k, const SketchHead& sketch, const HeadTask& task) {
  thread_local PackedTile packed;
  thread_local Workspace<float> memory;
  const int dim = task.kv->keys.dim;
  const Rows transform{sketch.transform, Storage::kFloat32, dim, dim};
  float* whitened = memory.reserve(static_cast<size_t>(dim + 1) * kTile);
  SketchQueries out{};
  out.codes.format = sketch.format;
  out.codes.heads = task.group;
  for (int t = 0; t < task.tiles(); ++t) {
    const int used = std::min(kTile, task.group - t * kTile);
    packed.pack(used, dim, [&](int r) { return task.query(t * kTile + r); });
    k.score(transform, {nullptr, 0, dim + 1}, packed.tile(), whitened);
    for (int i = 0; i < (dim + 1) * kTile; ++i) whitened[i] *= task.rule.scale;
    for (int r = 0; r < used; ++r) quantise(sketch, dim, whitened + r, kTile, t * kTile + r, out);
  }
  return out;
}

}  // namespace longreach
