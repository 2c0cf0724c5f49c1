// Hints that memory will be read soon.
//
// In assembly, because GCC takes a function that only calls __builtin_prefetch for one without
// effects and drops the calls to it, silently.
#pragma once

namespace longreach {

// Brings the line of `p` to the first-level cache. `p` may be any address.
inline void prefetch(const void* p) {
  asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
}

// To the second-level cache.
inline void prefetch_second(const void* p) {
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
}

}  // namespace longreach
