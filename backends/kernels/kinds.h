/* The weight formats with integer codes, in lists: X(name in enums, name in symbols). */
#ifndef HIKUI_KINDS_H
#define HIKUI_KINDS_H

/* whose columns are all stored alike, in their own order */
#define HIKUI_STORED_KINDS(X) \
  X(SIGN, sign)               \
  X(INT2, int2)               \
  X(TERNARY, ternary)         \
  X(INT3, int3)               \
  X(INT4, int4)               \
  X(NF4, nf4)                 \
  X(FP4, fp4)                 \
  X(INT8, int8)

#define HIKUI_KINDS(X)  \
  HIKUI_STORED_KINDS(X) \
  X(MIXED, mixed)

#endif
