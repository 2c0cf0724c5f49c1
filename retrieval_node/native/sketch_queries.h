// Queries in the terms of a sketch.
#pragma once

#include "chosen.h"
#include "query_tile.h"
#include "sketch.h"

namespace longreach {

// The query heads of a task as integer weights. A code's logit, before softcap, is about
// score * slope + offset; what the code cannot tell has variance `residual` (in logits squared), a
// share `lost_share` of the logits' variance.
struct SketchQueries {
  CodeQueries codes;
  float slope[kCodeHeads];
  float offset[kCodeHeads];
  float residual[kCodeHeads];
  float lost_share[kCodeHeads];
};

// For task.group <= kCodeHeads.
SketchQueries sketch_queries(const KernelTable& k, const SketchHead& head, const HeadTask& task);

}  // namespace longreach
