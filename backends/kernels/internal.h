/* What the C files of the dispatcher share. */
#ifndef HIKUI_INTERNAL_H
#define HIKUI_INTERNAL_H

#include <stddef.h>

#include "kernels.h"
#include "symbols.inc"
#include "table.h"

/* Defines a public function, whose arguments are `name`, `args` and `count`, if this library is to have it: table.py
 * writes HIKUI_KEEP_<name>, which is its body or nothing. */
#define HIKUI_FORWARD(NAME, CALL)                    \
  HIKUI_KEEP_##NAME(HIKUI_PACKED(NAME) {             \
    (void)self, (void)result;                        \
    const char* const name = #NAME;                  \
    return CALL;                                     \
  })

/* The kernels in use, or null after an error. */
const struct kernel_table* hikui_kernels(void);

/* Stores and reports a sentence; returns -1. */
int hikui_fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/* A part of the positions of a kernel. */
typedef void hikui_range(const void* arguments, int64_t first, int64_t last);

/* Runs positions 0 … count-1, in parallel where `bytes`, what the region reads and writes, makes it worth while. */
int hikui_parallel(hikui_range* run, const void* arguments, int64_t count, int64_t bytes);

#endif
