/* The public look-ups: rows of a packed matrix, dequantised. One row lies in steps of lines, 4 bytes in each; nothing
 * is added up, so plain C is as good as any instruction set, and the results are those of the reference bit for bit. */
#include <inttypes.h>
#include <string.h>

#include "arguments.h"

/* How a kind of codes is stored: bits of a field, lines of a step of 32 columns (0: ternary, which is not stored in
 * steps), what each field stands for. */
struct stored_kind {
  int bits, lines;
  int8_t codes[16];
};

#include "kinds.inc"

enum { LINE = 16 * 4, STEP = 32 };

struct lookup {
  const struct stored_kind* kind; /* null for floats */
  struct view ids, weight, scale, y;
  int64_t group; /* columns that share a scale */
};

static float half_to_float(float16 half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 0x3ffu;
  uint32_t bits;
  float value;
  if (exponent == 0) { /* zero, or a multiple of 2^-24 below the normal numbers */
    value = (float)fraction * 0x1p-24f;
    return sign ? -value : value;
  }
  bits = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* The codes of a step of 32 columns; `lines` points to the row's 4 bytes in the step's first line. */
static void read_step(const struct stored_kind* kind, const uint8_t* lines, int8_t* codes) {
  if (kind->bits == 8) {
    for (int line = 0; line < 8; ++line) memcpy(codes + 4 * line, lines + line * LINE, 4);
    return;
  }
  if (kind->bits == 3) { /* fields 0 … 5 are whole, two a byte; 6 and 7 are cut */
    for (int j = 0; j < 4; ++j) {
      const uint8_t low = lines[j], middle = lines[LINE + j], high = lines[2 * LINE + j];
      for (int half = 0; half < 2; ++half) {
        codes[4 * half + j] = kind->codes[low >> 3 * half & 7];
        codes[4 * (2 + half) + j] = kind->codes[middle >> 3 * half & 7];
        codes[4 * (4 + half) + j] = kind->codes[high >> 3 * half & 7];
      }
      codes[4 * 6 + j] = kind->codes[low >> 6 | middle >> 7 << 2];
      codes[4 * 7 + j] = kind->codes[high >> 6 | (middle >> 6 & 1) << 2];
    }
    return;
  }
  const int share = 8 / kind->bits, mask = (1 << kind->bits) - 1;
  for (int line = 0; line < kind->lines; ++line)
    for (int field = 0; field < share; ++field)
      for (int j = 0; j < 4; ++j)
        codes[4 * (line * share + field) + j] = kind->codes[lines[line * LINE + j] >> field * kind->bits & mask];
}

/* Rows of ternary codes, five to a byte, each group in lines of its own. A byte s holds 3s/256 to the nearest integer,
 * and what is left of 3s modulo 256 the next code. */
static void read_ternary(const struct lookup* a, int64_t row, float* y) {
  const int64_t lines = a->weight.shape[1], groups = a->scale.shape[1], columns = a->y.columns;
  const uint8_t* bytes = (const uint8_t*)a->weight.data + (row / 16 * lines * 16 + row % 16) * 4;
  const float16* scales = (const float16*)a->scale.data + row / 16 * groups * 16 + row % 16;
  for (int64_t start = 0; start < columns; start += a->group, scales += 16) {
    const float scale = half_to_float(*scales);
    const int64_t stop = columns < start + a->group ? columns : start + a->group;
    for (int64_t first = start; first < start + a->group; first += TERNARY_COLUMNS, bytes += LINE)
      for (int j = 0; j < 4; ++j) {
        int state = (int8_t)bytes[j];
        for (int64_t column = first + j; column < first + TERNARY_COLUMNS; column += 4) {
          const int code = (3 * state + 384) / 256 - 1;
          state = 3 * state - 256 * code;
          if (column < stop) y[column] = (float)code * scale;
        }
      }
  }
}

static void read_codes(const struct lookup* a, int64_t row, float* y) {
  const int64_t lines = a->weight.shape[1], groups = a->scale.shape[1], columns = a->y.columns;
  const uint8_t* bytes = (const uint8_t*)a->weight.data + (row / 16 * lines * 16 + row % 16) * 4;
  const float16* scales = (const float16*)a->scale.data + row / 16 * groups * 16 + row % 16;
  int8_t codes[STEP];
  for (int64_t first = 0; first < columns; first += STEP, bytes += a->kind->lines * LINE) {
    const float scale = half_to_float(scales[first / a->group * 16]);
    const int64_t count = columns - first < STEP ? columns - first : STEP;
    read_step(a->kind, bytes, codes);
    for (int64_t j = 0; j < count; ++j) y[first + j] = (float)codes[j] * scale;
  }
}

static void read_floats(const struct lookup* a, int64_t row, float* y) {
  const int64_t columns = a->y.columns, at = row / 16 * columns * 16 + row % 16;
  if (a->scale.data != NULL) { /* where the weight of halves is noted too */
    const float16* from = (const float16*)a->weight.data + at;
    for (int64_t j = 0; j < columns; ++j) y[j] = half_to_float(from[16 * j]);
  } else {
    const float* from = (const float*)a->weight.data + at;
    for (int64_t j = 0; j < columns; ++j) y[j] = from[16 * j];
  }
}

static void run_lookup(const void* arguments, int64_t first, int64_t last) {
  const struct lookup* a = arguments;
  for (int64_t at = first; at < last; ++at) {
    int64_t row;
    memcpy(&row, (const int64_t*)a->ids.data + at, sizeof row);
    float* y = (float*)a->y.data + at * a->y.columns;
    if (a->kind == &stored_kinds[TERNARY])
      read_ternary(a, row, y);
    else if (a->kind != NULL)
      read_codes(a, row, y);
    else
      read_floats(a, row, y);
  }
}

/* Columns of so many lines in groups, or −1 where there are none such. */
static int64_t stored_columns(const struct stored_kind* kind, int64_t lines, int64_t groups) {
  if (kind->lines > 0) return lines % kind->lines == 0 ? hikui_product(lines / kind->lines, STEP) : -1;
  const int64_t width = hikui_ternary_group(lines, groups);
  return width > 0 ? hikui_product(width, groups) : -1;
}

/* Takes the number of rows, checks ids and packed matrix against it, and looks the rows up. */
static int run_checked(struct call* call, struct lookup* a, int index) {
  const double given = hikui_take_number(call, index, "rows");
  if (call->failed) return -1;
  const int64_t rows = given >= 1 && given <= 0x1p53 ? (int64_t)given : 0;
  if (rows == 0 || (double)rows != given)
    return hikui_fail("%s: rows must be a positive whole number.", call->name);
  const int64_t blocks = rows / 16 + (rows % 16 != 0);
  hikui_expect_packed(call, &a->weight, blocks, a->kind != NULL ? 4 : 3);
  if (a->kind != NULL) hikui_expect_packed(call, &a->scale, blocks, 3);
  if (!call->failed && (a->y.ndim < 1 || a->y.rows != a->ids.count || a->y.columns < 1))
    call->failed = hikui_fail("%s: y must be [..., columns] for each of the %" PRId64 " ids.", call->name, a->ids.count);
  if (call->failed) return -1;
  const int64_t columns = a->y.columns;
  if (a->kind != NULL) {
    const int64_t lines = a->weight.shape[1], groups = a->scale.shape[1];
    const int64_t stored = stored_columns(a->kind, lines, groups);
    if (groups < 1 || stored < columns || stored % hikui_product(groups, STEP) != 0)
      return hikui_fail("%s: %" PRId64 " weight lines in %" PRId64 " groups do not fit rows of %" PRId64 " columns.",
                        call->name, lines, groups, columns);
    a->group = stored / groups;
  } else if (a->weight.shape[1] != columns) {
    return hikui_fail("%s: the weight has %" PRId64 " columns where y has %" PRId64 ".", call->name, a->weight.shape[1],
                      columns);
  }
  for (int64_t at = 0; at < a->ids.count; ++at) {
    int64_t row;
    memcpy(&row, (const int64_t*)a->ids.data + at, sizeof row);
    if (row < 0 || row >= rows)
      return hikui_fail("%s: id %" PRId64 " is none of the %" PRId64 " rows.", call->name, row, rows);
  }
  return a->ids.count == 0 ? 0 : hikui_parallel(run_lookup, a, a->ids.count, hikui_product(a->y.count, 6));
}

static int embedding(const char* name, int kind, const hikui_any* args, int32_t count) {
  struct call call;
  struct lookup a = {.kind = &stored_kinds[kind]};
  if (hikui_begin(&call, name, args, count, 5)) return -1;
  a.ids = hikui_take_tensor(&call, 0, "ids", INT64_ELEMENT);
  a.weight = hikui_take_tensor(&call, 1, "weight", kind == INT8 ? INT8_ELEMENT : UINT8_ELEMENT);
  a.scale = hikui_take_tensor(&call, 2, "scale", FLOAT16_ELEMENT);
  a.y = hikui_take_tensor(&call, 4, "y", FLOAT32_ELEMENT);
  return run_checked(&call, &a, 3);
}

static int embedding_float(const char* name, int kind, const hikui_any* args, int32_t count) {
  struct call call;
  struct lookup a = {0};
  if (hikui_begin(&call, name, args, count, 4)) return -1;
  a.ids = hikui_take_tensor(&call, 0, "ids", INT64_ELEMENT);
  a.weight = hikui_take_tensor(&call, 1, "weight", kind == FLOAT16 ? FLOAT16_ELEMENT : FLOAT32_ELEMENT);
  if (kind == FLOAT16) a.scale = a.weight;
  a.y = hikui_take_tensor(&call, 3, "y", FLOAT32_ELEMENT);
  return run_checked(&call, &a, 2);
}

/* --- public names ------------------------------------------------------------------------------------------------- */

#define FORWARD_KIND(KIND, SYMBOL) HIKUI_FORWARD(hikui_embedding_##SYMBOL, embedding(name, KIND, args, count))

HIKUI_STORED_KINDS(FORWARD_KIND)
HIKUI_FORWARD(hikui_embedding_float16, embedding_float(name, FLOAT16, args, count))
HIKUI_FORWARD(hikui_embedding_float32, embedding_float(name, FLOAT32, args, count))
