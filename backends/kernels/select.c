/* Which instruction set runs: the best one in the library that this CPU has, found once. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>

struct x86_features {
  unsigned leaf1_ecx, leaf7_ebx, leaf7_ecx, extended_ecx;
  uint64_t xcr0;
};

static struct x86_features x86_features(void) {
  struct x86_features found = {0, 0, 0, 0, 0};
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
  found.leaf1_ecx = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    found.leaf7_ebx = ebx;
    found.leaf7_ecx = ecx;
  }
  if (__get_cpuid(0x80000001u, &eax, &ebx, &ecx, &edx)) found.extended_ecx = ecx;
  if (found.leaf1_ecx & (1u << 27)) { /* the system has enabled xgetbv */
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    found.xcr0 = ((uint64_t)high << 32) | low;
  }
  return found;
}

static int has(unsigned word, unsigned bits) { return (word & bits) == bits; }

/* x86-64-v3: FMA, MOVBE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT; the system saves ymm */
__attribute__((unused)) static int supports_avx2(void) {
  struct x86_features f = x86_features();
  return has(f.leaf1_ecx, 1u << 12 | 1u << 22 | 1u << 28 | 1u << 29) && has(f.leaf7_ebx, 1u << 3 | 1u << 5 | 1u << 8) &&
         has(f.extended_ecx, 1u << 5) && (f.xcr0 & 0x6) == 0x6;
}

/* x86-64-v4 and VNNI: AVX512 F, DQ, CD, BW, VL; VNNI; the system saves zmm and the mask registers */
__attribute__((unused)) static int supports_avx512vnni(void) {
  struct x86_features f = x86_features();
  return supports_avx2() && has(f.leaf7_ebx, 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31) &&
         has(f.leaf7_ecx, 1u << 11) && (f.xcr0 & 0xe6) == 0xe6;
}

#elif defined(__aarch64__)
#include <sys/auxv.h>

__attribute__((unused)) static int supports_neon(void) { return 1; } /* part of the AArch64 Linux ABI */

/* HWCAP_ASIMDDP */
__attribute__((unused)) static int supports_dotprod(void) { return (getauxval(AT_HWCAP) >> 20) & 1; }

/* HWCAP2_I8MM, and the dot product beside it */
__attribute__((unused)) static int supports_i8mm(void) {
  return supports_dotprod() && ((getauxval(AT_HWCAP2) >> 13) & 1);
}

#endif

__attribute__((unused)) static int supports_portable(void) { return 1; }

#include "isas.inc"

static const struct kernel_table* find(void) {
  const size_t count = sizeof(tables) / sizeof(tables[0]);
  const char* asked = getenv("HIKUI_ISA");
  if (asked != NULL && asked[0] != '\0') {
    for (size_t i = 0; i < count; ++i) {
      if (strcmp(asked, tables[i]->isa) != 0) continue;
      if (tables[i]->supported()) return tables[i];
      hikui_fail("HIKUI_ISA asks for %s, which this CPU does not have.", asked);
      return NULL;
    }
    hikui_fail("HIKUI_ISA asks for %s, which this library does not hold; it holds %s.", asked, TABLE_NAMES);
    return NULL;
  }
  for (size_t i = count; i-- > 0;)
    if (tables[i]->supported()) return tables[i];
  hikui_fail("This CPU has none of the instruction sets that this library holds (%s).", TABLE_NAMES);
  return NULL;
}

const struct kernel_table* hikui_kernels(void) {
  static const struct kernel_table* selected;
  const struct kernel_table* table = __atomic_load_n(&selected, __ATOMIC_ACQUIRE);
  if (table == NULL) {
    table = find();
    __atomic_store_n(&selected, table, __ATOMIC_RELEASE);
  }
  return table;
}

const char* hikui_kernels_isa(void) {
  const struct kernel_table* table = hikui_kernels();
  return table == NULL ? NULL : table->isa;
}

const char* hikui_kernels_describe(void) {
  const struct kernel_table* table = hikui_kernels();
  return table == NULL ? NULL : table->description;
}
