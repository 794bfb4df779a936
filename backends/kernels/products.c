/* The public products: they check their arguments, flatten leading dimensions and call the kernels of this CPU. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "arguments.h"

/* Lines in a step of 32 columns; ternary and mixed have their own rules. */
static const int64_t step_lines[KINDS] = {[SIGN] = 1, [INT2] = 2, [TERNARY] = 0, [INT3] = 3, [INT4] = 4,
                                          [NF4] = 4,  [FP4] = 4,  [INT8] = 8,    [MIXED] = 0};

/* Sums of 32 bits hold 256 times the result. */
enum { WIDEST_TERNARY = 32768 };

static int64_t blocks_of(int64_t rows) { return (rows + 15) / 16; }

static int64_t positions_of(int64_t rows, int64_t blocks) { return (blocks_of(rows) + blocks - 1) / blocks; }

/* Memory of one call: on the stack where it is small. */
struct scratch {
  _Alignas(64) unsigned char small[4096];
  void* data;
};

static void* scratch_take(struct scratch* scratch, int64_t bytes) {
  scratch->data = scratch->small;
  if (bytes > (int64_t)sizeof scratch->small) scratch->data = aligned_alloc(64, ((size_t)bytes + 63) / 64 * 64);
  if (scratch->data == NULL) hikui_fail("There is no memory for the %" PRId64 " bytes of a product's scratch.", bytes);
  return scratch->data;
}

static void scratch_give(struct scratch* scratch) {
  if (scratch->data != scratch->small) free(scratch->data);
}

/* --- float weights ------------------------------------------------------------------------------------------------ */

struct floating {
  floating_kernel* kernel;
  const float* x;
  const void* weight;
  const float* bias;
  float* y;
  int64_t m, n, k, has_bias;
};

static void run_floating(const void* arguments, int64_t first, int64_t last) {
  const struct floating* a = arguments;
  a->kernel(a->x, a->weight, a->bias, a->y, a->m, a->n, a->k, a->has_bias, first, last);
}

static int floating(const struct kernel_table* table, int kind, struct floating a) {
  int size = a.m == 1 ? FLOAT_SINGLE : FLOAT_MANY;
  if (blocks_of(a.n) < table->floating_blocks[size]) size = a.m == 1 ? FLOAT_FEW_SINGLE : FLOAT_FEW_MANY;
  const int64_t width = kind == FLOAT16 ? 2 : 4;
  a.kernel = table->floating[kind][size];
  return hikui_parallel(run_floating, &a, positions_of(a.n, table->floating_blocks[size]),
                        hikui_product(hikui_product(a.n, a.k), width + a.m / 4));
}

static int linear_float(const char* name, int kind, const hikui_any* args, int32_t count) {
  const struct kernel_table* table = hikui_kernels();
  struct call call;
  if (table == NULL || hikui_begin(&call, name, args, count, 4)) return -1;
  const struct view x = hikui_take_tensor(&call, 0, "x", FLOAT32_ELEMENT);
  const struct view weight = hikui_take_tensor(&call, 1, "weight", kind == FLOAT16 ? FLOAT16_ELEMENT : FLOAT32_ELEMENT);
  const struct view bias = hikui_take_tensor(&call, 2, "bias", FLOAT32_ELEMENT);
  const struct view y = hikui_take_tensor(&call, 3, "y", FLOAT32_ELEMENT);
  const int64_t n = y.columns;
  hikui_expect_matrix(&call, &y, x.rows, n);
  hikui_expect_packed(&call, &weight, blocks_of(n), 3);
  if (!call.failed) hikui_expect_count(&call, &weight, hikui_product(hikui_product(blocks_of(n), x.columns), 16));
  hikui_expect_bias(&call, &bias, n);
  if (call.failed) return -1;
  if (y.count == 0) return 0;
  const struct floating a = {NULL, x.data, weight.data, bias.data, y.data, x.rows, n, x.columns, bias.count > 0};
  return floating(table, kind, a);
}

/* --- low-bit weights ---------------------------------------------------------------------------------------------- */

/* How the columns of a packed matrix are cut into groups. */
struct packing {
  int64_t columns;     /* input columns, padding counted */
  int64_t groups;
  int64_t split;       /* groups of the first segment: all but for `mixed` */
  int64_t group_steps; /* steps of 32 columns in a group */
};

/* Reads it from the shapes; `available` columns of activations are there. */
static int take_packing(struct call* call, int kind, const struct view* weight, const struct view* scale,
                        int64_t available, struct packing* packing) {
  if (call->failed) return -1;
  const int64_t lines = weight->shape[1], groups = scale->shape[1], wide = hikui_product(lines, 32);
  int64_t columns, first; /* of the first segment */
  if (kind == MIXED) { /* columns/8 − … lines of int4 and columns/32 of sign fill a multiple of 128 columns */
    columns = (available + 127) / 128 * 128;
    first = (wide - columns) / 3;
    if (first < 0 || first > columns || 3 * first != wide - columns) first = -1;
  } else if (kind == TERNARY) { /* which is not stored in steps */
    const int64_t width = hikui_ternary_group(lines, groups);
    if (width > WIDEST_TERNARY)
      return hikui_fail("%s: %" PRId64 " ternary columns under one scale are more than the %d that can be added up.",
                        call->name, width, WIDEST_TERNARY);
    columns = width > 0 ? hikui_product(width, groups) : -1;
    first = columns;
  } else {
    columns = lines % step_lines[kind] == 0 ? hikui_product(lines / step_lines[kind], 32) : -1;
    first = columns;
  }
  /* Nothing is divided by a size before it is known to be none of zero. */
  if (columns < 1 || first < 0 || groups < 1 || columns % hikui_product(groups, 32) != 0 ||
      first % (columns / groups) != 0)
    return hikui_fail("%s: %" PRId64 " weight lines in %" PRId64 " groups do not fit activations of %" PRId64
                      " columns; groups are multiples of 32, activations are padded to 128.",
                      call->name, lines, groups, available);
  packing->columns = columns;
  packing->groups = groups;
  packing->group_steps = columns / groups / 32;
  packing->split = first / (columns / groups);
  return 0;
}

struct integer {
  const struct integer_entry* entry;
  struct view q, q_scale, q_sums, weight, scale, bias, b, y;
  struct packing packing;
  const void* read; /* q, or what was prepared of it */
  void* prepared;
  const float* t;
  int64_t m, n, rank;
};

static void run_integer(const void* arguments, int64_t first, int64_t last) {
  const struct integer* a = arguments;
  a->entry->kernel(a->read, a->q_scale.data, a->q_sums.data, a->weight.data, a->scale.data, a->bias.data, a->b.data,
                   a->t, a->y.data, a->m, a->n, a->q.columns / 4, a->weight.shape[1], a->packing.groups,
                   a->packing.split, a->packing.group_steps, a->rank, a->bias.count > 0, first, last);
}

static void run_prepare(const void* arguments, int64_t first, int64_t last) {
  const struct integer* a = arguments;
  a->entry->prepare(a->q.data, a->prepared, a->q.columns / 4, first, last);
}

static int run_linear_a8(const struct kernel_table* table, int kind, struct integer* a) {
  a->entry = &table->integer[kind][a->m == 1 ? SINGLE : a->m < 16 ? FEW : MANY];
  const int64_t positions = positions_of(a->n, a->entry->blocks);
  const int64_t bytes = hikui_product(a->weight.count, 1 + a->m / 4);
  a->read = a->q.data;
  if (a->entry->prepare == NULL) return hikui_parallel(run_integer, a, positions, bytes);
  struct scratch scratch;
  const int64_t rows = a->m == 1 ? 1 : (a->m + 15) / 16 * 16; /* tiles are whole, though their last rows may mean nothing */
  a->prepared = scratch_take(&scratch, hikui_product(hikui_product(rows, a->q.columns / 32), a->entry->prepared_bytes));
  if (a->prepared == NULL) return -1;
  a->read = a->prepared;
  int status = hikui_parallel(run_prepare, a, a->m, hikui_product(a->q.count, 2));
  if (status == 0) status = hikui_parallel(run_integer, a, positions, bytes);
  scratch_give(&scratch);
  return status;
}

/* t = A · x for every row, then the product with the epilogue y += B · t */
static int run_branch(const struct kernel_table* table, int kind, struct integer* a, const struct view* x,
                      const struct view* branch_a) {
  struct scratch scratch;
  float* t = scratch_take(&scratch, hikui_product(hikui_product(a->m, a->rank), sizeof(float)));
  if (t == NULL) return -1;
  const struct floating product = {NULL, x->data, branch_a->data, NULL, t, a->m, a->rank, x->columns, 0};
  int status = floating(table, FLOAT16, product);
  a->t = t;
  if (status == 0) status = run_linear_a8(table, kind, a);
  scratch_give(&scratch);
  return status;
}

static int linear_a8(const char* name, int kind, int branch, const hikui_any* args, int32_t count) {
  const struct kernel_table* table = hikui_kernels();
  struct call call;
  struct integer a = {0};
  if (table == NULL || hikui_begin(&call, name, args, count, branch ? 10 : 7)) return -1;
  a.q = hikui_take_tensor(&call, 0, "q", QUADS_ELEMENT);
  a.q_scale = hikui_take_tensor(&call, 1, "q_scale", FLOAT32_ELEMENT);
  a.q_sums = hikui_take_tensor(&call, 2, "q_sums", INT32_ELEMENT);
  a.weight = hikui_take_tensor(&call, 3, "weight", kind == INT8 ? QUADS_ELEMENT : LINES_ELEMENT);
  a.scale = hikui_take_tensor(&call, 4, "scale", FLOAT16_ELEMENT);
  a.bias = hikui_take_tensor(&call, 5, "bias", FLOAT32_ELEMENT);
  a.y = hikui_take_tensor(&call, branch ? 9 : 6, "y", FLOAT32_ELEMENT);
  a.m = a.q.rows;
  a.n = a.y.columns;
  hikui_expect_matrix(&call, &a.y, a.m, a.n);
  hikui_expect_count(&call, &a.q_scale, a.m);
  hikui_expect_matrix(&call, &a.q_sums, a.m, a.q.columns / 32);
  hikui_expect_packed(&call, &a.weight, blocks_of(a.n), 4);
  hikui_expect_packed(&call, &a.scale, blocks_of(a.n), 3);
  if (take_packing(&call, kind, &a.weight, &a.scale, a.q.columns, &a.packing)) return -1;
  if (a.q.columns % 128 != 0 || a.packing.columns > a.q.columns)
    return hikui_fail("%s: %" PRId64 " weight columns in %" PRId64 " groups do not fit activations of %" PRId64
                      " columns; groups are multiples of 32, activations are padded to 128.",
                      name, a.packing.columns, a.packing.groups, a.q.columns);
  hikui_expect_bias(&call, &a.bias, a.n);
  if (!branch) {
    if (call.failed) return -1;
    return a.y.count == 0 ? 0 : run_linear_a8(table, kind, &a);
  }
  const struct view x = hikui_take_tensor(&call, 6, "x", FLOAT32_ELEMENT);
  const struct view branch_a = hikui_take_tensor(&call, 7, "a", FLOAT16_ELEMENT);
  a.b = hikui_take_tensor(&call, 8, "b", FLOAT16_ELEMENT);
  hikui_expect_matrix(&call, &x, a.m, x.columns);
  hikui_expect_packed(&call, &a.b, blocks_of(a.n), 3);
  if (call.failed) return -1;
  a.rank = a.b.shape[1];
  hikui_expect_packed(&call, &branch_a, blocks_of(a.rank), 3);
  if (!call.failed) hikui_expect_count(&call, &branch_a, hikui_product(hikui_product(blocks_of(a.rank), x.columns), 16));
  if (call.failed) return -1;
  return a.y.count == 0 ? 0 : run_branch(table, kind, &a, &x, &branch_a);
}

/* --- low-bit weights, float activations --------------------------------------------------------------------------- */

struct weight_only {
  weight_only_kernel* kernel;
  struct view weight, scale, bias, y;
  struct packing packing;
  const float* x;
  int64_t m;
};

static void run_weight_only(const void* arguments, int64_t first, int64_t last) {
  const struct weight_only* a = arguments;
  a->kernel(a->x, a->weight.data, a->scale.data, a->bias.data, a->y.data, a->m, a->y.columns, a->packing.columns,
            a->weight.shape[1], a->packing.groups, a->packing.split, a->packing.group_steps, a->bias.count > 0, first,
            last);
}

static int linear_weight_only(const char* name, int kind, const hikui_any* args, int32_t count) {
  const struct kernel_table* table = hikui_kernels();
  struct call call;
  struct weight_only a = {0};
  if (table == NULL || hikui_begin(&call, name, args, count, 5)) return -1;
  const struct view x = hikui_take_tensor(&call, 0, "x", FLOAT32_ELEMENT);
  a.weight = hikui_take_tensor(&call, 1, "weight", kind == INT8 ? QUADS_ELEMENT : LINES_ELEMENT);
  a.scale = hikui_take_tensor(&call, 2, "scale", FLOAT16_ELEMENT);
  a.bias = hikui_take_tensor(&call, 3, "bias", FLOAT32_ELEMENT);
  a.y = hikui_take_tensor(&call, 4, "y", FLOAT32_ELEMENT);
  a.m = x.rows;
  hikui_expect_matrix(&call, &a.y, a.m, a.y.columns);
  hikui_expect_packed(&call, &a.weight, blocks_of(a.y.columns), 4);
  hikui_expect_packed(&call, &a.scale, blocks_of(a.y.columns), 3);
  if (take_packing(&call, kind, &a.weight, &a.scale, x.columns, &a.packing)) return -1;
  if (x.columns > a.packing.columns)
    return hikui_fail("%s: x has %" PRId64 " columns, more than the %" PRId64 " of the weight.", name, x.columns,
                      a.packing.columns);
  hikui_expect_bias(&call, &a.bias, a.y.columns);
  if (call.failed) return -1;
  if (a.y.count == 0) return 0;
  a.kernel = table->weight_only[kind][a.m == 1 ? 0 : 1];
  a.x = x.data;
  const int64_t bytes = hikui_product(a.weight.count, 1 + a.m / 4);
  if (x.columns == a.packing.columns)
    return hikui_parallel(run_weight_only, &a, blocks_of(a.y.columns), bytes);
  /* the kernel reads whole groups */
  struct scratch scratch;
  const int64_t width = a.packing.columns;
  float* padded = scratch_take(&scratch, hikui_product(hikui_product(a.m, width), sizeof(float)));
  if (padded == NULL) return -1;
  for (int64_t row = 0; row < a.m; ++row) {
    memcpy(padded + row * width, (const float*)x.data + row * x.columns, (size_t)x.columns * sizeof(float));
    memset(padded + row * width + x.columns, 0, (size_t)(width - x.columns) * sizeof(float));
  }
  a.x = padded;
  const int status = hikui_parallel(run_weight_only, &a, blocks_of(a.y.columns), bytes);
  scratch_give(&scratch);
  return status;
}

/* --- public names ------------------------------------------------------------------------------------------------- */

#define FORWARD_KIND(KIND, SYMBOL)                                                              \
  HIKUI_FORWARD(hikui_linear_a8_##SYMBOL, linear_a8(name, KIND, 0, args, count))                \
  HIKUI_FORWARD(hikui_linear_a8_branch_##SYMBOL, linear_a8(name, KIND, 1, args, count))         \
  HIKUI_FORWARD(hikui_linear_##SYMBOL, linear_weight_only(name, KIND, args, count))

HIKUI_KINDS(FORWARD_KIND)
HIKUI_FORWARD(hikui_linear_float16, linear_float(name, FLOAT16, args, count))
HIKUI_FORWARD(hikui_linear_float32, linear_float(name, FLOAT32, args, count))
