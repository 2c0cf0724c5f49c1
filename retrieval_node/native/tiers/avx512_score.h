// The score kernel of the AVX-512 tier, which the AMX tier falls back on.
#pragma once

#include "kernels.h"

namespace longreach {
namespace avx512 {

void score(const Rows& keys, const RowChoice& choice, const QueryTile& queries, float* scores);

}  // namespace avx512
}  // namespace longreach
