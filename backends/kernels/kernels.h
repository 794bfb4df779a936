/* The kernel library's C interface.
 *
 * The public functions have the packed C ABI of TVM's FFI, so that a TVM program calls them directly and anything else
 * can with the few declarations below. DLTensor arguments must be on the CPU and contiguous; every leading dimension
 * counts as rows. A function returns 0, or -1 after it has stored one sentence that says what is wrong (see below).
 */
#ifndef HIKUI_KERNELS_H
#define HIKUI_KERNELS_H

#include <stdint.h>

#include "kinds.h"

#ifdef __cplusplus
extern "C" {
#endif

#define HIKUI_EXPORT __attribute__((visibility("default")))

/* DLPack 1.x */
typedef struct {
  int32_t device_type; /* 1: CPU */
  int32_t device_id;
} hikui_device;

typedef struct {
  uint8_t code; /* 0 int, 1 uint, 2 float */
  uint8_t bits;
  uint16_t lanes;
} hikui_dtype;

typedef struct {
  void* data;
  hikui_device device;
  int32_t ndim;
  hikui_dtype dtype;
  const int64_t* shape;
  const int64_t* strides; /* in elements; null: compact */
  uint64_t byte_offset;
} hikui_tensor;

/* A value of TVM's FFI. */
enum {
  HIKUI_ANY_NONE = 0,
  HIKUI_ANY_INT = 1,
  HIKUI_ANY_FLOAT = 3,
  HIKUI_ANY_DLTENSOR = 7,
  HIKUI_ANY_TENSOR = 70 /* an object whose DLTensor follows its header of HIKUI_OBJECT_HEADER bytes */
};
#define HIKUI_OBJECT_HEADER 24

typedef struct {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t as_int;
    double as_float;
    void* as_pointer;
  } value;
} hikui_any;

#define HIKUI_PACKED(name) int32_t __tvm_ffi_##name(void* self, const hikui_any* args, int32_t count, hikui_any* result)

#define HIKUI_DECLARE_PRODUCTS(KIND, SYMBOL)                                                                           \
  HIKUI_EXPORT HIKUI_PACKED(hikui_linear_a8_##SYMBOL);        /* q, q_scale, q_sums, weight, scale, bias, y */         \
  HIKUI_EXPORT HIKUI_PACKED(hikui_linear_a8_branch_##SYMBOL); /* … bias, x, a, b, y */                                 \
  HIKUI_EXPORT HIKUI_PACKED(hikui_linear_##SYMBOL);           /* x, weight, scale, bias, y */

#define HIKUI_DECLARE_EMBEDDING(KIND, SYMBOL) \
  HIKUI_EXPORT HIKUI_PACKED(hikui_embedding_##SYMBOL); /* ids, weight, scale, rows, y */

HIKUI_KINDS(HIKUI_DECLARE_PRODUCTS)
HIKUI_STORED_KINDS(HIKUI_DECLARE_EMBEDDING)
HIKUI_EXPORT HIKUI_PACKED(hikui_embedding_float16);          /* ids, weight, rows, y */
HIKUI_EXPORT HIKUI_PACKED(hikui_embedding_float32);          /* the same */
HIKUI_EXPORT HIKUI_PACKED(hikui_linear_float16);             /* x, weight, bias, y */
HIKUI_EXPORT HIKUI_PACKED(hikui_linear_float32);             /* the same */
HIKUI_EXPORT HIKUI_PACKED(hikui_quantize_activation);        /* x, q, scale, sums */
HIKUI_EXPORT HIKUI_PACKED(hikui_quantize_activation_int4);   /* the same */
HIKUI_EXPORT HIKUI_PACKED(hikui_quantize_activation_static); /* x, step, q, scale, sums */
HIKUI_EXPORT HIKUI_PACKED(hikui_rms_norm);                 /* x, weight, eps, y */
HIKUI_EXPORT HIKUI_PACKED(hikui_rms_norm_quantize);        /* x, weight, eps, y, q, scale, sums */
HIKUI_EXPORT HIKUI_PACKED(hikui_swiglu);                   /* gate, up, y */
HIKUI_EXPORT HIKUI_PACKED(hikui_swiglu_quantize);          /* gate, up, y, q, scale, sums */
HIKUI_EXPORT HIKUI_PACKED(hikui_rotary);                   /* x, cos, sin, y */
HIKUI_EXPORT HIKUI_PACKED(hikui_attention);                /* q, k, v, key_cache, value_cache, past, scale, out */
HIKUI_EXPORT HIKUI_PACKED(hikui_attention_int8);           /* … value_cache, key_scale, value_scale, past, scale, out */
HIKUI_EXPORT HIKUI_PACKED(hikui_attention_int4);           /* the same */
HIKUI_EXPORT HIKUI_PACKED(hikui_cache_update_int8);        /* codes, scale, new, past, values */
HIKUI_EXPORT HIKUI_PACKED(hikui_cache_update_int4);        /* the same */

/* One share of a parallel region: task `id` of `env->tasks`. The layouts are TVM's TVMParallelGroupEnv,
 * FTVMParallelLambda and TVMBackendParallelLaunch. */
typedef struct {
  void* sync;
  int32_t tasks;
} hikui_parallel_env;

typedef int (*hikui_parallel_task)(int id, hikui_parallel_env* env, void* data);

/* Runs task 0 … tasks-1 and returns when all are done; 0 tasks: as many as there are workers. */
typedef int (*hikui_parallel_launch)(hikui_parallel_task task, void* data, int tasks);

/* Says who runs parallel regions. Without it: TVM's thread pool where the library is part of a TVM module, else the
 * calling thread alone. Null goes back to that. Not to be called while a kernel runs. */
HIKUI_EXPORT void hikui_kernels_set_launch(hikui_parallel_launch launch);

/* Says who hears of errors, in the thread where they occur. Without it: TVM's error state where TVM is loaded. */
HIKUI_EXPORT void hikui_kernels_set_error(void (*report)(const char* sentence));

/* The last error's sentence in this thread, "" if none; kept until the next error. */
HIKUI_EXPORT const char* hikui_kernels_last_error(void);

/* The instruction set in use: "avx512vnni", …; null (and an error) where this CPU has none of those in the library.
 * The environment variable HIKUI_ISA asks for a certain one. */
HIKUI_EXPORT const char* hikui_kernels_isa(void);

/* Which kernel serves products of each format on this CPU: lines "<format> <single|few|many> <kernel>\n"; a kernel
 * named "generic" is the fallback. Null (and an error) as above. */
HIKUI_EXPORT const char* hikui_kernels_describe(void);

#ifdef __cplusplus
}
#endif
#endif
