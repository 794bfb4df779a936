/* The CUDA kernels from C.
 *
 * A program opens the fatbin of an artefact, puts packed weights on the GPU and starts products there. The driver's
 * library is opened at run time: what links this needs nothing of CUDA, and where there is no GPU, hikui_cuda_open
 * says so. Tensors are as in the project's docs/architecture.md, but in the GPU's memory, which addresses below name;
 * every base address is aligned to 16 bytes, as the GPU's allocators give it.
 *
 * Functions that return int give 0, or 1 after a failure that hikui_cuda_last_error() tells in a sentence (for the
 * calling thread). Calls on one handle come from one thread at a time. Work is put on a stream of the handle's own, in
 * order; hikui_cuda_download and hikui_cuda_synchronize wait for it. */
#ifndef HIKUI_CUDA_H
#define HIKUI_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HIKUI_CUDA_EXPORT __attribute__((visibility("default")))

struct hikui_cuda;
typedef uint64_t hikui_cuda_address;

/* A packed matrix of N rows: `columns` of them stored, padding included; `lines` of 64 bytes a block of 16 rows. */
struct hikui_cuda_matrix {
  hikui_cuda_address weight, scale;
  int32_t n, columns, lines, groups;
};

/* A quantised activation: int8 q [M, columns], float32 scale [M], int32 sums [M, columns / 32]. */
struct hikui_cuda_activation {
  hikui_cuda_address q, scale, sums;
  int32_t m, columns;
};

/* A low-rank branch: float16 b [N16, rank, 16], float32 t [M, rank] = A x. Rank 0 is none. */
struct hikui_cuda_branch {
  hikui_cuda_address b, t;
  int32_t rank;
};

/* Opens the first GPU and loads the fatbin file; driver is the driver's library, NULL for libcuda.so.1. NULL where that
 * fails. */
HIKUI_CUDA_EXPORT struct hikui_cuda* hikui_cuda_open(const char* fatbin, const char* driver);
HIKUI_CUDA_EXPORT void hikui_cuda_close(struct hikui_cuda* cuda);
HIKUI_CUDA_EXPORT const char* hikui_cuda_last_error(void);

HIKUI_CUDA_EXPORT int hikui_cuda_allocate(struct hikui_cuda* cuda, size_t size, hikui_cuda_address* address);
HIKUI_CUDA_EXPORT int hikui_cuda_free(struct hikui_cuda* cuda, hikui_cuda_address address);
HIKUI_CUDA_EXPORT int hikui_cuda_upload(struct hikui_cuda* cuda, hikui_cuda_address to, const void* from, size_t size);
HIKUI_CUDA_EXPORT int hikui_cuda_download(struct hikui_cuda* cuda, void* to, hikui_cuda_address from, size_t size);
HIKUI_CUDA_EXPORT int hikui_cuda_synchronize(struct hikui_cuda* cuda);

/* Quantises float32 x [M, k]; bits is 8 or 4. step is the address of one float32, or 0 for a step of each row's own. */
HIKUI_CUDA_EXPORT int hikui_cuda_quantize_activation(struct hikui_cuda* cuda, hikui_cuda_address x, int32_t k, int bits,
                                                     hikui_cuda_address step, struct hikui_cuda_activation out);

/* y [M, N] float32 = activation · matrixᵀ + bias + t · bᵀ; kind as in the format's name; bias is 0 for none. */
HIKUI_CUDA_EXPORT int hikui_cuda_linear_a8(struct hikui_cuda* cuda, const char* kind,
                                           struct hikui_cuda_activation activation, struct hikui_cuda_matrix matrix,
                                           hikui_cuda_address bias, struct hikui_cuda_branch branch,
                                           hikui_cuda_address y);

/* y [M, N] float32 = x · matrixᵀ + bias; x [M, k] is `float32` or `float16`, as dtype says. */
HIKUI_CUDA_EXPORT int hikui_cuda_linear(struct hikui_cuda* cuda, const char* kind, const char* dtype,
                                        hikui_cuda_address x, int32_t m, int32_t k, struct hikui_cuda_matrix matrix,
                                        hikui_cuda_address bias, hikui_cuda_address y);

/* y [M, n] float32 = x · weightᵀ + bias; x float32 [M, k], weight [N16, k, 16] of `float16` or `float32`, as kind says. */
HIKUI_CUDA_EXPORT int hikui_cuda_linear_dense(struct hikui_cuda* cuda, const char* kind, hikui_cuda_address x, int32_t m,
                                              int32_t n, int32_t k, hikui_cuda_address weight, hikui_cuda_address bias,
                                              hikui_cuda_address y);

#ifdef __cplusplus
}
#endif
#endif
