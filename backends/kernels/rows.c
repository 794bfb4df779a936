/* The public functions over rows of activations and over caches: they check their arguments, flatten leading dimensions
 * and call the kernels of this CPU. */
#include <inttypes.h>
#include <string.h>

#include "arguments.h"

/* --- rows --------------------------------------------------------------------------------------------------------- */

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
  return source->rows == 0 ? 0 : hikui_parallel(run_rows, a, source->rows, source->count * 8);
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

/* --- attention ---------------------------------------------------------------------------------------------------- */

struct rotary {
  rotary_kernel* kernel;
  struct view x, cos, sin, y;
};

static void run_rotary(const void* arguments, int64_t first, int64_t last) {
  const struct rotary* a = arguments;
  a->kernel(a->x.data, a->cos.data, a->sin.data, a->y.data, a->cos.rows, a->x.columns, first, last);
}

HIKUI_PACKED(hikui_rotary) {
  (void)self, (void)result;
  const struct kernel_table* table = hikui_kernels();
  struct call call;
  struct rotary a;
  if (table == NULL || hikui_begin(&call, "hikui_rotary", args, count, 4)) return -1;
  a.kernel = table->rotary;
  a.x = hikui_take_tensor(&call, 0, "x", FLOAT32_ELEMENT);
  a.cos = hikui_take_tensor(&call, 1, "cos", FLOAT32_ELEMENT);
  a.sin = hikui_take_tensor(&call, 2, "sin", FLOAT32_ELEMENT);
  a.y = hikui_take_tensor(&call, 3, "y", FLOAT32_ELEMENT);
  if (!call.failed && (a.x.ndim < 2 || a.x.columns % 2 != 0))
    call.failed = hikui_fail("hikui_rotary: x must be [..., heads, tokens, size] with an even size.");
  if (call.failed) return -1;
  hikui_expect_matrix(&call, &a.cos, a.x.shape[a.x.ndim - 2], a.x.columns);
  hikui_expect_matrix(&call, &a.sin, a.x.shape[a.x.ndim - 2], a.x.columns);
  hikui_expect_matrix(&call, &a.y, a.x.rows, a.x.columns);
  if (call.failed) return -1;
  return a.x.count == 0 ? 0 : hikui_parallel(run_rotary, &a, a.x.rows, a.x.count * 8);
}

struct attention {
  attention_kernel* kernel;
  struct view q, keys, values, out;
  int64_t heads, kv_heads, tokens, context, size, past;
  float factor;
};

static void run_attention(const void* arguments, int64_t first, int64_t last) {
  const struct attention* a = arguments;
  a->kernel(a->q.data, a->keys.data, a->values.data, a->out.data, a->heads, a->kv_heads, a->tokens, a->context, a->size,
            a->past, a->factor, first, last);
}

/* writes [kv_heads, tokens, size] into the rows past … past+tokens-1 of each head of the cache */
static void append(const struct attention* a, const struct view* added, const struct view* cache) {
  const int64_t width = a->tokens * a->size;
  for (int64_t head = 0; head < a->kv_heads; ++head)
    memcpy((float*)cache->data + (head * a->context + a->past) * a->size, (const float*)added->data + head * width,
           (size_t)width * sizeof(float));
}

HIKUI_PACKED(hikui_attention) {
  (void)self, (void)result;
  const struct kernel_table* table = hikui_kernels();
  struct call call;
  struct attention a;
  if (table == NULL || hikui_begin(&call, "hikui_attention", args, count, 8)) return -1;
  a.kernel = table->attention;
  a.q = hikui_take_tensor(&call, 0, "q", FLOAT32_ELEMENT);
  const struct view k = hikui_take_tensor(&call, 1, "k", FLOAT32_ELEMENT);
  const struct view v = hikui_take_tensor(&call, 2, "v", FLOAT32_ELEMENT);
  a.keys = hikui_take_tensor(&call, 3, "key_cache", FLOAT32_ELEMENT);
  a.values = hikui_take_tensor(&call, 4, "value_cache", FLOAT32_ELEMENT);
  const struct view past = hikui_take_tensor(&call, 5, "past", INT64_ELEMENT);
  a.factor = (float)hikui_take_number(&call, 6, "scale");
  a.out = hikui_take_tensor(&call, 7, "out", FLOAT32_ELEMENT);
  if (!call.failed && (a.q.ndim != 4 || a.keys.ndim != 4))
    call.failed = hikui_fail("hikui_attention: q and key_cache must have 4 dimensions.");
  hikui_expect_count(&call, &past, 1);
  if (call.failed) return -1;
  a.heads = a.q.shape[1], a.tokens = a.q.shape[2], a.size = a.q.shape[3];
  a.kv_heads = a.keys.shape[1], a.context = a.keys.shape[2];
  memcpy(&a.past, past.data, sizeof a.past);
  if (a.kv_heads < 1 || a.heads % a.kv_heads != 0)
    return hikui_fail("hikui_attention: %" PRId64 " query heads cannot share %" PRId64 " key-value heads.", a.heads,
                      a.kv_heads);
  hikui_expect_heads(&call, &a.q, a.heads, a.tokens, a.size);
  hikui_expect_heads(&call, &k, a.kv_heads, a.tokens, a.size);
  hikui_expect_heads(&call, &v, a.kv_heads, a.tokens, a.size);
  hikui_expect_heads(&call, &a.keys, a.kv_heads, a.context, a.size);
  hikui_expect_heads(&call, &a.values, a.kv_heads, a.context, a.size);
  hikui_expect_heads(&call, &a.out, a.heads, a.tokens, a.size);
  if (call.failed) return -1;
  if (a.past < 0 || a.past > a.context - a.tokens)
    return hikui_fail("hikui_attention: %" PRId64 " tokens after %" PRId64 " do not fit a cache of %" PRId64 ".",
                      a.tokens, a.past, a.context);
  append(&a, &k, &a.keys);
  append(&a, &v, &a.values);
  const int64_t rows = a.heads * a.tokens;
  return rows == 0 ? 0 : hikui_parallel(run_attention, &a, rows, rows * (a.past + a.tokens) * a.size * 8);
}

/* --- public names ------------------------------------------------------------------------------------------------- */

#define FORWARD(NAME, CALL)                   \
  HIKUI_PACKED(NAME) {                        \
    (void)self, (void)result;                 \
    const char* const name = #NAME;           \
    return CALL;                              \
  }

FORWARD(hikui_quantize_activation, quantize_activation(name, DYNAMIC_INT8, args, count))
FORWARD(hikui_quantize_activation_int4, quantize_activation(name, DYNAMIC_INT4, args, count))
FORWARD(hikui_quantize_activation_static, quantize_activation(name, STATIC_INT8, args, count))
FORWARD(hikui_rms_norm, rms_norm(name, 0, args, count))
FORWARD(hikui_rms_norm_quantize, rms_norm(name, 1, args, count))
FORWARD(hikui_swiglu, swiglu(name, 0, args, count))
FORWARD(hikui_swiglu_quantize, swiglu(name, 1, args, count))
