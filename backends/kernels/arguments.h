/* Checking the arguments of a call: every public function reads them through these. */
#ifndef HIKUI_ARGUMENTS_H
#define HIKUI_ARGUMENTS_H

#include "internal.h"

/* QUADS and LINES are int8 and uint8 that the kernels read four at a time: they must lie at multiples of 4 bytes. */
enum element {
  INT8_ELEMENT,
  QUADS_ELEMENT,
  LINES_ELEMENT,
  UINT8_ELEMENT,
  INT32_ELEMENT,
  INT64_ELEMENT,
  FLOAT16_ELEMENT,
  FLOAT32_ELEMENT
};

/* The call being checked: the first error stays. */
struct call {
  const char* name;
  const hikui_any* args;
  int failed;
};

/* A contiguous tensor as a matrix: all leading dimensions are rows. */
struct view {
  const char* name;
  void* data;
  int32_t ndim;
  const int64_t* shape;
  int64_t rows, columns, count;
};

/* The product of two sizes, or INT64_MAX where that is larger: it then equals no size, and no memory is so large. */
static inline int64_t hikui_product(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

/* Columns of ternary codes in a line, the last line of a group being filled up. */
enum { TERNARY_COLUMNS = 20 };

/* Columns in a group of so many lines of ternary codes in groups, a multiple of 32; 0 where there are none such. */
static inline int64_t hikui_ternary_group(int64_t lines, int64_t groups) {
  if (groups < 1 || lines % groups != 0) return 0;
  const int64_t width = hikui_product(lines / groups, TERNARY_COLUMNS) / 32 * 32;
  return (width + TERNARY_COLUMNS - 1) / TERNARY_COLUMNS == lines / groups ? width : 0;
}

/* Starts a call; not 0 where the number of arguments is wrong. */
int hikui_begin(struct call* call, const char* name, const hikui_any* args, int32_t given, int32_t wanted);

/* Reads a tensor. Its sizes are counts: none is negative, and their product, zeros left out, is at most 2^58. */
struct view hikui_take_tensor(struct call* call, int index, const char* name, enum element element);

double hikui_take_number(struct call* call, int index, const char* name);

void hikui_expect_count(struct call* call, const struct view* view, int64_t count);

/* rows × columns, whatever the leading dimensions are */
void hikui_expect_matrix(struct call* call, const struct view* view, int64_t rows, int64_t columns);

/* a packed tensor: [blocks, any, 16] or [blocks, any, 16, 4] */
void hikui_expect_packed(struct call* call, const struct view* view, int64_t blocks, int32_t ndim);

/* float32 [n], or [0] for none */
void hikui_expect_bias(struct call* call, const struct view* view, int64_t n);

/* [1, heads, rows, size] */
void hikui_expect_heads(struct call* call, const struct view* view, int64_t heads, int64_t rows, int64_t size);

#endif
