// The AVX2 tier.
#include "tiers/codes.h"
#include "tiers/simd_avx2.h"
#include "tiers/vector_kernels.h"

namespace longreach {

using avx2::Simd;

const KernelTable kAvx2Kernels = {
    vector::score<Simd>,        vector::score_panel<Simd>, vector::to_logits<Simd>,
    vector::softmax_step<Simd>, vector::accumulate<Simd>,  vector::widen<Simd>,
    vector::value_range<Simd>,  vector::count_above<Simd>, vector::sum_above<Simd>,
    vector::nth_highest<Simd>,  avx2::code_scores,         avx2::code_scan,
};

}  // namespace longreach
