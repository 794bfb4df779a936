/* The weight formats with integer codes, in one list: X(name in enums, name in symbols). */
#ifndef HIKUI_KINDS_H
#define HIKUI_KINDS_H

#define HIKUI_KINDS(X) \
  X(SIGN, sign)        \
  X(INT2, int2)        \
  X(TERNARY, ternary)  \
  X(INT3, int3)        \
  X(INT4, int4)        \
  X(NF4, nf4)          \
  X(FP4, fp4)          \
  X(INT8, int8)        \
  X(MIXED, mixed)

#endif
