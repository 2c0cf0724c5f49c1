// Chooses the instruction-set tier.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace longreach {

// Name of the tier in use: "scalar", "avx2", "avx512" or "amx".
std::string isa_name();

// Tiers this CPU can run, slowest first.
std::vector<std::string> supported_isas();

// Uses the named tier from now on. Throws std::invalid_argument if it is unknown or unsupported.
void set_isa(const std::string& name);

// Uses the best tier, or the one LONGREACH_ISA names.
void choose_isa_from_environment();

const KernelTable& kernels();

}  // namespace longreach
