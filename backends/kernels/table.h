/* The kernels of one instruction set, as compiled from TIR. HIKUI_TABLE declares them and makes a table of them. */
#ifndef HIKUI_TABLE_H
#define HIKUI_TABLE_H

#include <stdint.h>

typedef uint16_t float16; /* bits only: the dispatcher never computes with it */

typedef void integer_kernel(const int32_t* q, const float* q_scale, const int32_t* q_sums, const uint8_t* weight,
                            const float16* scale, const float* bias, const float16* b, const float* t, float* y,
                            int64_t m, int64_t n, int64_t row_quads, int64_t lines, int64_t groups,
                            int64_t group_steps, int64_t rank, int64_t has_bias, int64_t first, int64_t last);
typedef void floating_kernel(const float* x, const void* weight, const float* bias, float* y, int64_t m, int64_t n,
                             int64_t k, int64_t has_bias, int64_t first, int64_t last);
typedef void quantize_kernel(const float* x, int8_t* q, float* scale, int32_t* sums, int64_t k, int64_t first,
                             int64_t last);
typedef void rms_norm_kernel(const float* x, const float* weight, float* y, int64_t k, float eps, int64_t first,
                             int64_t last);
typedef void swiglu_kernel(const float* gate, const float* up, float* y, int64_t k, int64_t first, int64_t last);
typedef void rotary_kernel(const float* x, const float* cos, const float* sin, float* y, int64_t tokens, int64_t size,
                           int64_t first, int64_t last);
typedef void attention_kernel(const float* q, const float* keys, const float* values, float* out, int64_t heads,
                              int64_t kv_heads, int64_t tokens, int64_t context, int64_t size, int64_t past,
                              float factor, int64_t first, int64_t last);

/* One row of activations or several; the same with fewer blocks of output rows than the first two take at once. */
enum { SINGLE, MANY, FEW_SINGLE, FEW_MANY };
enum { INT4, INT8 };          /* integer weights */
enum { FLOAT16, FLOAT32 };    /* float weights */

struct kernel_table {
  const char* isa;
  int (*supported)(void);
  int64_t integer_blocks[2];  /* blocks of 16 rows a position stands for, by SINGLE or MANY */
  int64_t floating_blocks[4];    /* by SINGLE … FEW_MANY */
  integer_kernel* integer[2][2]; /* [kind][SINGLE or MANY] */
  floating_kernel* floating[2][4];
  quantize_kernel* quantize;
  rms_norm_kernel* rms_norm;
  swiglu_kernel* swiglu;
  rotary_kernel* rotary;
  attention_kernel* attention;
};

#define HIKUI_TABLE(ISA, SINGLE_BLOCKS, MANY_BLOCKS, FLOAT_SINGLE_BLOCKS, FLOAT_MANY_BLOCKS)                           \
  extern integer_kernel hikui_linear_a8_int4_single__##ISA, hikui_linear_a8_int4_many__##ISA;                          \
  extern integer_kernel hikui_linear_a8_int8_single__##ISA, hikui_linear_a8_int8_many__##ISA;                          \
  extern floating_kernel hikui_linear_float16_single__##ISA, hikui_linear_float16_many__##ISA;                         \
  extern floating_kernel hikui_linear_float16_few_single__##ISA, hikui_linear_float16_few_many__##ISA;                 \
  extern floating_kernel hikui_linear_float32_single__##ISA, hikui_linear_float32_many__##ISA;                         \
  extern floating_kernel hikui_linear_float32_few_single__##ISA, hikui_linear_float32_few_many__##ISA;                 \
  extern quantize_kernel hikui_quantize_activation__##ISA;                                                             \
  extern rms_norm_kernel hikui_rms_norm__##ISA;                                                                        \
  extern swiglu_kernel hikui_swiglu__##ISA;                                                                            \
  extern rotary_kernel hikui_rotary__##ISA;                                                                            \
  extern attention_kernel hikui_attention__##ISA;                                                                      \
  static const struct kernel_table table_##ISA = {                                                                     \
      #ISA,                                                                                                            \
      supports_##ISA,                                                                                                  \
      {SINGLE_BLOCKS, MANY_BLOCKS},                                                                                    \
      {FLOAT_SINGLE_BLOCKS, FLOAT_MANY_BLOCKS, 1, 1},                                                                  \
      {{hikui_linear_a8_int4_single__##ISA, hikui_linear_a8_int4_many__##ISA},                                         \
       {hikui_linear_a8_int8_single__##ISA, hikui_linear_a8_int8_many__##ISA}},                                        \
      {{hikui_linear_float16_single__##ISA, hikui_linear_float16_many__##ISA,                                          \
        hikui_linear_float16_few_single__##ISA, hikui_linear_float16_few_many__##ISA},                                 \
       {hikui_linear_float32_single__##ISA, hikui_linear_float32_many__##ISA,                                          \
        hikui_linear_float32_few_single__##ISA, hikui_linear_float32_few_many__##ISA}},                                \
      hikui_quantize_activation__##ISA,                                                                                \
      hikui_rms_norm__##ISA,                                                                                           \
      hikui_swiglu__##ISA,                                                                                             \
      hikui_rotary__##ISA,                                                                                             \
      hikui_attention__##ISA,                                                                                          \
  };

#endif
