// The code kernels of each tier; KernelTable says what they do.
#pragma once

#include "kernels.h"

namespace longreach {

#define LONGREACH_DECLARE_CODE_KERNELS(tier)                                                      \
  namespace tier {                                                                                \
  void code_scores(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t step, \
                   int64_t count, int32_t* out);                                                  \
  void code_scan(const uint8_t* codes, const CodeQueries& queries, int64_t first, int64_t stop,   \
                 const int32_t* thresholds, CodeHits& hits, const CodeTail* tail);                \
  }

LONGREACH_DECLARE_CODE_KERNELS(scalar)
LONGREACH_DECLARE_CODE_KERNELS(avx2)
LONGREACH_DECLARE_CODE_KERNELS(avx512)

#undef LONGREACH_DECLARE_CODE_KERNELS

}  // namespace longreach
