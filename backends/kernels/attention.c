/* The public functions over heads: rotation, and attention over key-value caches, which are written in place. */
#include <inttypes.h>
#include <string.h>

#include "arguments.h"

/* --- rotation ----------------------------------------------------------------------------------------------------- */

struct rotary {
  rotary_kernel* kernel;
  struct view x, cos, sin, y;
};

static void run_rotary(const void* arguments, int64_t first, int64_t last) {
  const struct rotary* a = arguments;
  a->kernel(a->x.data, a->cos.data, a->sin.data, a->y.data, a->cos.rows, a->x.columns, first, last);
}

static int rotary(const char* name, const hikui_any* args, int32_t count) {
  const struct kernel_table* table = hikui_kernels();
  struct call call;
  struct rotary a;
  if (table == NULL || hikui_begin(&call, name, args, count, 4)) return -1;
  a.kernel = table->rotary;
  a.x = hikui_take_tensor(&call, 0, "x", FLOAT32_ELEMENT);
  a.cos = hikui_take_tensor(&call, 1, "cos", FLOAT32_ELEMENT);
  a.sin = hikui_take_tensor(&call, 2, "sin", FLOAT32_ELEMENT);
  a.y = hikui_take_tensor(&call, 3, "y", FLOAT32_ELEMENT);
  if (!call.failed && (a.x.ndim < 2 || a.x.columns % 2 != 0))
    call.failed = hikui_fail("%s: x must be [..., heads, tokens, size] with an even size.", name);
  if (call.failed) return -1;
  hikui_expect_matrix(&call, &a.cos, a.x.shape[a.x.ndim - 2], a.x.columns);
  hikui_expect_matrix(&call, &a.sin, a.x.shape[a.x.ndim - 2], a.x.columns);
  hikui_expect_matrix(&call, &a.y, a.x.rows, a.x.columns);
  if (call.failed) return -1;
  return a.x.count == 0 ? 0 : hikui_parallel(run_rotary, &a, a.x.rows, hikui_product(a.x.count, 8));
}

/* --- caches ------------------------------------------------------------------------------------------------------- */

enum { FLOAT_CACHE = -1 }; /* beside INT8_CACHE and INT4_CACHE */

/* how the cache of keys or values is stored, and new tokens for it */
struct cache {
  const struct kernel_table* table;
  int format;
  struct view stored, scale, added;
  int64_t heads, context, tokens, size, past;
};

/* columns that a token has in the cache's tensor: two int4 codes share a byte */
static int64_t stored_size(const struct cache* cache) {
  return cache->format == INT4_CACHE ? cache->size / 2 : cache->size;
}

static enum element stored_element(int format) {
  return format == FLOAT_CACHE ? FLOAT32_ELEMENT : format == INT8_CACHE ? INT8_ELEMENT : UINT8_ELEMENT;
}

/* checks the tensors of a cache against its sizes, and that the new tokens fit; not 0 where something is wrong */
static int check_cache(struct call* call, const struct cache* cache) {
  if (!call->failed && cache->format == INT4_CACHE && cache->size % 2 != 0)
    call->failed = hikui_fail("%s: heads of %" PRId64 " cannot be stored as two codes a byte.", call->name, cache->size);
  hikui_expect_heads(call, &cache->stored, cache->heads, cache->context, stored_size(cache));
  hikui_expect_heads(call, &cache->added, cache->heads, cache->tokens, cache->size);
  if (cache->format != FLOAT_CACHE) hikui_expect_matrix(call, &cache->scale, cache->heads, cache->context);
  if (!call->failed && (cache->past < 0 || cache->past > cache->context - cache->tokens))
    call->failed = hikui_fail("%s: %" PRId64 " tokens after %" PRId64 " do not fit a cache of %" PRId64 ".", call->name,
                              cache->tokens, cache->past, cache->context);
  return call->failed;
}

static void run_store(const void* arguments, int64_t first, int64_t last) {
  const struct cache* a = arguments;
  a->table->cache_store[a->format](a->added.data, a->stored.data, a->scale.data, a->tokens, a->context, a->size, a->past,
                                   first, last);
}

/* writes [heads, tokens, size] into the rows past … past+tokens-1 of each head of the cache */
static int append(const struct cache* cache) {
  const int64_t rows = cache->heads * cache->tokens, width = cache->tokens * cache->size;
  if (cache->added.count == 0) return 0;
  if (cache->format != FLOAT_CACHE) return hikui_parallel(run_store, cache, rows, hikui_product(cache->added.count, 5));
  for (int64_t head = 0; head < cache->heads; ++head)
    memcpy((float*)cache->stored.data + (head * cache->context + cache->past) * cache->size,
           (const float*)cache->added.data + head * width, (size_t)width * sizeof(float));
  return 0;
}

struct load {
  const struct cache* cache;
  float* values;
};

static void run_load(const void* arguments, int64_t first, int64_t last) {
  const struct load* a = arguments;
  const struct cache* cache = a->cache;
  cache->table->cache_load[cache->format](cache->stored.data, cache->scale.data, a->values, cache->context, cache->size,
                                          cache->past + cache->tokens, first, last);
}

static int cache_update(const char* name, int format, const hikui_any* args, int32_t count) {
  struct call call;
  struct cache a = {.table = hikui_kernels(), .format = format};
  if (a.table == NULL || hikui_begin(&call, name, args, count, 5)) return -1;
  a.stored = hikui_take_tensor(&call, 0, "codes", stored_element(format));
  a.scale = hikui_take_tensor(&call, 1, "scale", FLOAT16_ELEMENT);
  a.added = hikui_take_tensor(&call, 2, "new", FLOAT32_ELEMENT);
  const struct view past = hikui_take_tensor(&call, 3, "past", INT64_ELEMENT);
  const struct view values = hikui_take_tensor(&call, 4, "values", FLOAT32_ELEMENT);
  if (!call.failed && (a.stored.ndim != 4 || a.added.ndim != 4))
    call.failed = hikui_fail("%s: codes and new must have 4 dimensions.", name);
  hikui_expect_count(&call, &past, 1);
  if (call.failed) return -1;
  a.heads = a.stored.shape[1], a.context = a.stored.shape[2];
  a.tokens = a.added.shape[2], a.size = a.added.shape[3];
  memcpy(&a.past, past.data, sizeof a.past);
  hikui_expect_heads(&call, &values, a.heads, a.context, a.size);
  if (check_cache(&call, &a) || append(&a)) return -1;
  const struct load load = {&a, values.data};
  return values.count == 0 ? 0 : hikui_parallel(run_load, &load, a.heads * a.context, hikui_product(values.count, 5));
}

/* --- attention ---------------------------------------------------------------------------------------------------- */

struct attention {
  attention_kernel* kernel;
  struct view q, out;
  struct cache keys, values;
  int64_t heads;
  float factor;
};

static void run_attention(const void* arguments, int64_t first, int64_t last) {
  const struct attention* a = arguments;
  const struct cache* keys = &a->keys;
  a->kernel(a->q.data, keys->stored.data, a->values.stored.data, keys->scale.data, a->values.scale.data, a->out.data,
            a->heads, keys->heads, keys->tokens, keys->context, keys->size, keys->past, a->factor, first, last);
}

static int attention(const char* name, int format, const hikui_any* args, int32_t count) {
  const struct kernel_table* table = hikui_kernels();
  const int scales = format == FLOAT_CACHE ? 0 : 2;
  struct call call;
  struct attention a = {.keys = {.table = table, .format = format}, .values = {.table = table, .format = format}};
  if (table == NULL || hikui_begin(&call, name, args, count, 8 + scales)) return -1;
  a.kernel = table->attention[1 + format];
  a.q = hikui_take_tensor(&call, 0, "q", FLOAT32_ELEMENT);
  a.keys.added = hikui_take_tensor(&call, 1, "k", FLOAT32_ELEMENT);
  a.values.added = hikui_take_tensor(&call, 2, "v", FLOAT32_ELEMENT);
  a.keys.stored = hikui_take_tensor(&call, 3, "key_cache", stored_element(format));
  a.values.stored = hikui_take_tensor(&call, 4, "value_cache", stored_element(format));
  if (scales != 0) {
    a.keys.scale = hikui_take_tensor(&call, 5, "key_scale", FLOAT16_ELEMENT);
    a.values.scale = hikui_take_tensor(&call, 6, "value_scale", FLOAT16_ELEMENT);
  }
  const struct view past = hikui_take_tensor(&call, 5 + scales, "past", INT64_ELEMENT);
  a.factor = (float)hikui_take_number(&call, 6 + scales, "scale");
  a.out = hikui_take_tensor(&call, 7 + scales, "out", FLOAT32_ELEMENT);
  if (!call.failed && (a.q.ndim != 4 || a.keys.stored.ndim != 4))
    call.failed = hikui_fail("%s: q and key_cache must have 4 dimensions.", name);
  hikui_expect_count(&call, &past, 1);
  if (call.failed) return -1;
  a.heads = a.q.shape[1];
  a.keys.heads = a.keys.stored.shape[1], a.keys.context = a.keys.stored.shape[2];
  a.keys.tokens = a.q.shape[2], a.keys.size = a.q.shape[3];
  memcpy(&a.keys.past, past.data, sizeof a.keys.past);
  a.values.heads = a.keys.heads, a.values.context = a.keys.context, a.values.tokens = a.keys.tokens;
  a.values.size = a.keys.size, a.values.past = a.keys.past;
  if (a.keys.heads < 1 || a.heads % a.keys.heads != 0)
    return hikui_fail("%s: %" PRId64 " query heads cannot share %" PRId64 " key-value heads.", name, a.heads,
                      a.keys.heads);
  hikui_expect_heads(&call, &a.q, a.heads, a.keys.tokens, a.keys.size);
  hikui_expect_heads(&call, &a.out, a.heads, a.keys.tokens, a.keys.size);
  if (check_cache(&call, &a.keys) || check_cache(&call, &a.values) || append(&a.keys) || append(&a.values)) return -1;
  const int64_t rows = a.heads * a.keys.tokens, past_columns = a.keys.past + a.keys.tokens;
  return a.out.count == 0 ? 0
                          : hikui_parallel(run_attention, &a, rows,
                                           hikui_product(hikui_product(rows, past_columns), a.keys.size * 8));
}

/* --- public names ------------------------------------------------------------------------------------------------- */

HIKUI_FORWARD(hikui_rotary, rotary(name, args, count))
HIKUI_FORWARD(hikui_cache_update_int8, cache_update(name, INT8_CACHE, args, count))
HIKUI_FORWARD(hikui_cache_update_int4, cache_update(name, INT4_CACHE, args, count))
HIKUI_FORWARD(hikui_attention, attention(name, FLOAT_CACHE, args, count))
HIKUI_FORWARD(hikui_attention_int8, attention(name, INT8_CACHE, args, count))
HIKUI_FORWARD(hikui_attention_int4, attention(name, INT4_CACHE, args, count))
