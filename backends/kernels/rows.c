/* The public functions over rows of activations: they check their arguments, flatten leading dimensions and call the
 * kernels of this CPU. */
#include "arguments.h"

/* x becomes y by a norm or SwiGLU (or stays x), and y becomes q, scale and sums where they are wanted */
struct rows {
  const struct kernel_table* table;
  const float *norm_x, *norm_weight, *gate, *up, *source;
  float* y;
  int64_t k;
  float eps;
  quantize_kernel* quantize;
  const float* step;
  int8_t* q;
  float* scale;
  int32_t* sums;
};

static void run_rows(const void* arguments, int64_t first, int64_t last) {
  const struct rows* a = arguments;
  for (int64_t row = first; row < last; ++row) { /* row by row, so that the second step finds the row in cache */
    if (a->norm_x != NULL) a->table->rms_norm(a->norm_x, a->norm_weight, a->y, a->k, a->eps, row, row + 1);
    if (a->gate != NULL) a->table->swiglu(a->gate, a->up, a->y, a->k, row, row + 1);
    if (a->q != NULL) a->quantize(a->source, a->step, a->q, a->scale, a->sums, a->k, row, row + 1);
  }
}

/* takes the outputs q, scale, sums from the arguments at `index` */
static void quantized(struct call* call, int index, const struct view* source, int mode, struct rows* a) {
  const struct view q = hikui_take_tensor(call, index, "q", INT8_ELEMENT);
  const struct view scale = hikui_take_tensor(call, index + 1, "scale", FLOAT32_ELEMENT);
  const struct view sums = hikui_take_tensor(call, index + 2, "sums", INT32_ELEMENT);
  const int64_t padded = (source->columns + 127) / 128 * 128;
  hikui_expect_matrix(call, &q, source->rows, padded);
  hikui_expect_count(call, &scale, source->rows);
  hikui_expect_matrix(call, &sums, source->rows, padded / 32);
  a->source = source->data;
  a->quantize = a->table->quantize[mode];
  a->q = q.data;
  a->scale = scale.data;
  a->sums = sums.data;
}

static int finish_rows(const struct call* call, const struct rows* a, const struct view* source) {
  if (call->failed) return -1;
  return source->rows == 0 ? 0 : hikui_parallel(run_rows, a, source->rows, hikui_product(source->count, 8));
}

static int quantize_activation(const char* name, int mode, const hikui_any* args, int32_t count) {
  const int fixed = mode == STATIC_INT8;
  struct rows a = {.table = hikui_kernels()};
  struct call call;
  if (a.table == NULL || hikui_begin(&call, name, args, count, fixed ? 5 : 4)) return -1;
  const struct view x = hikui_take_tensor(&call, 0, "x", FLOAT32_ELEMENT);
  a.k = x.columns;
  if (fixed) {
    const struct view step = hikui_take_tensor(&call, 1, "step", FLOAT32_ELEMENT);
    hikui_expect_count(&call, &step, 1);
    a.step = step.data;
  }
  quantized(&call, fixed ? 2 : 1, &x, mode, &a);
  return finish_rows(&call, &a, &x);
}

static int rms_norm(const char* name, int quantize, const hikui_any* args, int32_t count) {
  struct rows a = {.table = hikui_kernels()};
  struct call call;
  if (a.table == NULL || hikui_begin(&call, name, args, count, quantize ? 7 : 4)) return -1;
  const struct view x = hikui_take_tensor(&call, 0, "x", FLOAT32_ELEMENT);
  const struct view weight = hikui_take_tensor(&call, 1, "weight", FLOAT32_ELEMENT);
  a.eps = (float)hikui_take_number(&call, 2, "eps");
  const struct view y = hikui_take_tensor(&call, 3, "y", FLOAT32_ELEMENT);
  hikui_expect_count(&call, &weight, x.columns);
  hikui_expect_matrix(&call, &y, x.rows, x.columns);
  a.norm_x = x.data;
  a.norm_weight = weight.data;
  a.y = y.data;
  a.k = x.columns;
  if (quantize) quantized(&call, 4, &y, DYNAMIC_INT8, &a);
  return finish_rows(&call, &a, &y);
}

static int swiglu(const char* name, int quantize, const hikui_any* args, int32_t count) {
  struct rows a = {.table = hikui_kernels()};
  struct call call;
  if (a.table == NULL || hikui_begin(&call, name, args, count, quantize ? 6 : 3)) return -1;
  const struct view gate = hikui_take_tensor(&call, 0, "gate", FLOAT32_ELEMENT);
  const struct view up = hikui_take_tensor(&call, 1, "up", FLOAT32_ELEMENT);
  const struct view y = hikui_take_tensor(&call, 2, "y", FLOAT32_ELEMENT);
  hikui_expect_matrix(&call, &up, gate.rows, gate.columns);
  hikui_expect_matrix(&call, &y, gate.rows, gate.columns);
  a.gate = gate.data;
  a.up = up.data;
  a.y = y.data;
  a.k = gate.columns;
  if (quantize) quantized(&call, 3, &y, DYNAMIC_INT8, &a);
  return finish_rows(&call, &a, &y);
}

/* --- public names ------------------------------------------------------------------------------------------------- */

HIKUI_FORWARD(hikui_quantize_activation, quantize_activation(name, DYNAMIC_INT8, args, count))
HIKUI_FORWARD(hikui_quantize_activation_int4, quantize_activation(name, DYNAMIC_INT4, args, count))
HIKUI_FORWARD(hikui_quantize_activation_static, quantize_activation(name, STATIC_INT8, args, count))
HIKUI_FORWARD(hikui_rms_norm, rms_norm(name, 0, args, count))
HIKUI_FORWARD(hikui_rms_norm_quantize, rms_norm(name, 1, args, count))
HIKUI_FORWARD(hikui_swiglu, swiglu(name, 0, args, count))
HIKUI_FORWARD(hikui_swiglu_quantize, swiglu(name, 1, args, count))
