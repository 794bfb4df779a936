/* The kernels of one instruction set, as compiled from TIR. table.py writes the tables. */
#ifndef HIKUI_TABLE_H
#define HIKUI_TABLE_H

#include <stdint.h>

#include "kinds.h"

typedef uint16_t float16; /* bits only: the dispatcher never computes with it */

typedef void integer_kernel(const int32_t* q, const float* q_scale, const int32_t* q_sums, const int32_t* weight,
                            const float16* scale, const float* bias, const float16* b, const float* t, float* y,
                            int64_t m, int64_t n, int64_t row_quads, int64_t lines, int64_t groups, int64_t split,
                            int64_t group_steps, int64_t rank, int64_t has_bias, int64_t first, int64_t last);
typedef void prepare_kernel(const int32_t* q, uint8_t* prepared, int64_t row_quads, int64_t first, int64_t last);
typedef void weight_only_kernel(const float* x, const int32_t* weight, const float16* scale, const float* bias, float* y,
                                int64_t m, int64_t n, int64_t columns, int64_t lines, int64_t groups, int64_t split,
                                int64_t group_steps, int64_t has_bias, int64_t first, int64_t last);
typedef void floating_kernel(const float* x, const void* weight, const float* bias, float* y, int64_t m, int64_t n,
                             int64_t k, int64_t has_bias, int64_t first, int64_t last);
typedef void quantize_kernel(const float* x, const float* step, int8_t* q, float* scale, int32_t* sums, int64_t k,
                             int64_t first, int64_t last);
typedef void rms_norm_kernel(const float* x, const float* weight, float* y, int64_t k, float eps, int64_t first,
                             int64_t last);
typedef void swiglu_kernel(const float* gate, const float* up, float* y, int64_t k, int64_t first, int64_t last);
typedef void rotary_kernel(const float* x, const float* cos, const float* sin, float* y, int64_t tokens, int64_t size,
                           int64_t first, int64_t last);
/* the tensors of a cache hold what its format says; scales are null for float32 */
typedef void attention_kernel(const float* q, const void* keys, const void* values, const float16* key_scale,
                              const float16* value_scale, float* out, int64_t heads, int64_t kv_heads, int64_t tokens,
                              int64_t context, int64_t size, int64_t past, float factor, int64_t first, int64_t last);
typedef void cache_store_kernel(const float* x, void* codes, float16* scale, int64_t tokens, int64_t context,
                                int64_t size, int64_t past, int64_t first, int64_t last);
typedef void cache_load_kernel(const void* codes, const float16* scale, float* y, int64_t context, int64_t size,
                               int64_t filled, int64_t first, int64_t last);

#define HIKUI_ENUM(NAME, SYMBOL) NAME,
enum { HIKUI_KINDS(HIKUI_ENUM) KINDS };
#undef HIKUI_ENUM

/* Rows of activations: 1, 2…15, 16 and more. */
enum { SINGLE, FEW, MANY, SIZES };
/* One row of activations or several; the same with fewer blocks of output rows than the first two take at once. */
enum { FLOAT_SINGLE, FLOAT_MANY, FLOAT_FEW_SINGLE, FLOAT_FEW_MANY };
enum { FLOAT16, FLOAT32 };                     /* float weights */
enum { DYNAMIC_INT8, DYNAMIC_INT4, STATIC_INT8 }; /* quantisers of activations */
enum { INT8_CACHE, INT4_CACHE, QUANTISED_CACHES };

struct integer_entry {
  integer_kernel* kernel;
  const char* name;         /* for people */
  int64_t blocks;           /* blocks of 16 rows that a position stands for */
  prepare_kernel* prepare;  /* makes what the kernel reads instead of q, or null */
  int64_t prepared_bytes;   /* of that, for 32 columns of a row */
};

struct kernel_table {
  const char* isa;
  int (*supported)(void);
  const char* description; /* a line for each format and size: "<format> <size> <kernel>\n" */
  struct integer_entry integer[KINDS][SIZES];
  weight_only_kernel* weight_only[KINDS][2]; /* one row of activations, or several */
  int64_t floating_blocks[4];                /* by FLOAT_SINGLE … FLOAT_FEW_MANY */
  floating_kernel* floating[2][4];
  quantize_kernel* quantize[3];
  rms_norm_kernel* rms_norm;
  swiglu_kernel* swiglu;
  rotary_kernel* rotary;
  attention_kernel* attention[1 + QUANTISED_CACHES]; /* float32 first */
  cache_store_kernel* cache_store[QUANTISED_CACHES];
  cache_load_kernel* cache_load[QUANTISED_CACHES];
};

#endif
