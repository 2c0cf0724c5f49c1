#include "isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace longreach {
namespace {

struct Tier {
  const char* name;
  const KernelTable* table;
  bool (*supported)();
};

bool has_scalar() { return true; }

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// Tile data is state that a process must ask the kernel for, once.
bool has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr Tier kTiers[] = {
    {"scalar", &kScalarKernels, has_scalar},
    {"avx2", &kAvx2Kernels, has_avx2},
    {"avx512", &kAvx512Kernels, has_avx512},
    {"amx", &kAmxKernels, has_amx},
};

std::atomic<const Tier*> current{&kTiers[0]};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::string isa_name() { return current.load()->name; }

const KernelTable& kernels() { return *current.load(std::memory_order_relaxed)->table; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto& tier : kTiers)
    if (tier.supported()) names.push_back(tier.name);
  return names;
}

void set_isa(const std::string& name) {
  for (const auto& tier : kTiers) {
    if (name != tier.name) continue;
    if (!tier.supported())
      throw std::invalid_argument("instruction set \"" + name +
                                  "\" is not supported by this CPU; it supports " +
                                  joined(supported_isas()));
    current.store(&tier);
    return;
  }
  throw std::invalid_argument("unknown instruction set \"" + name + "\"; this CPU supports " +
                              joined(supported_isas()));
}

void choose_isa_from_environment() {
  const char* forced = std::getenv("LONGREACH_ISA");
  if (forced == nullptr || *forced == '\0') {
    set_isa(supported_isas().back());
    return;
  }
  try {
    set_isa(forced);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("LONGREACH_ISA: ") + error.what());
  }
}

}  // namespace longreach
