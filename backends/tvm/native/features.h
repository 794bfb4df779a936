// What this CPU offers, under the names of Linux's /proc/cpuinfo. That file itself is not read: an emulator shows the host's.
#pragma once

#include "support.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hikui {

#if defined(__aarch64__)

struct Feature {
  const char* name;
  unsigned long word;  // AT_HWCAP or AT_HWCAP2
  int bit;
};

// Bits of the Linux ABI: arch/arm64/include/uapi/asm/hwcap.h.
constexpr Feature kFeatures[] = {
    {"fp", AT_HWCAP, 0},       {"asimd", AT_HWCAP, 1},     {"atomics", AT_HWCAP, 8}, {"fphp", AT_HWCAP, 9},
    {"asimdhp", AT_HWCAP, 10}, {"asimdrdm", AT_HWCAP, 12}, {"asimddp", AT_HWCAP, 20}, {"sve", AT_HWCAP, 22},
    {"sve2", AT_HWCAP2, 1},    {"i8mm", AT_HWCAP2, 13},    {"bf16", AT_HWCAP2, 14},
};

inline bool Offers(const Feature& feature) { return (getauxval(feature.word) >> feature.bit & 1) != 0; }

#elif defined(__x86_64__)

struct Feature {
  const char* name;
  unsigned leaf;
  char word;            // 'b', 'c' or 'd'
  int bit;
  unsigned state_bits;  // what the operating system must save, in XCR0
};

constexpr unsigned kAvxState = 0x6;
constexpr unsigned kAvx512State = 0xE6;
constexpr Feature kFeatures[] = {
    {"fma", 1, 'c', 12, kAvxState},         {"f16c", 1, 'c', 29, kAvxState},
    {"bmi2", 7, 'b', 8, 0},                 {"avx2", 7, 'b', 5, kAvxState},
    {"avx512f", 7, 'b', 16, kAvx512State},  {"avx512dq", 7, 'b', 17, kAvx512State},
    {"avx512bw", 7, 'b', 30, kAvx512State}, {"avx512vl", 7, 'b', 31, kAvx512State},
    {"gfni", 7, 'c', 8, 0},                 {"avx512_vnni", 7, 'c', 11, kAvx512State},
};

inline unsigned SavedState() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

inline bool Offers(const Feature& feature) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(feature.leaf, 0, &a, &b, &c, &d)) return false;
  unsigned word = feature.word == 'b' ? b : feature.word == 'c' ? c : d;
  return (word >> feature.bit & 1) && (SavedState() & feature.state_bits) == feature.state_bits;
}

#endif

// A feature that is not in the table counts as missing.
inline bool CpuOffers(const char* name) {
  for (const Feature& feature : kFeatures) {
    if (strcmp(feature.name, name) == 0) return Offers(feature);
  }
  return false;
}

}  // namespace hikui
