/* Replays calls of the kernels from a file: how they are tested on another machine's instruction set, under emulation.
 *
 *     replay CALLS RESULTS THREADS
 *     replay                          prints the instruction set in use
 *
 * CALLS is a sequence of calls, numbers little-endian: name (int32 length, bytes), int32 count of arguments, and for
 * each argument int32 type: 1 int64, 3 float64, or 7 a tensor: int32 code, bits, dimensions, misalignment in bytes,
 * int64 each size, int64 length in bytes, its bytes. RESULTS has for each call int32 status, int32 whether the guards
 * around every tensor are whole, the error's sentence (int32 length, bytes), and the bytes of every tensor after it.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define GUARD 256
#define GUARD_BYTE 0xa5
#define MOST_ARGUMENTS 16
#define MOST_DIMENSIONS 8
#define MOST_THREADS 16

#define KERNEL(name) {#name, __tvm_ffi_##name},
#define PRODUCTS(KIND, SYMBOL)            \
  KERNEL(hikui_linear_a8_##SYMBOL)        \
  KERNEL(hikui_linear_a8_branch_##SYMBOL) \
  KERNEL(hikui_linear_##SYMBOL)

#define EMBEDDING(KIND, SYMBOL) KERNEL(hikui_embedding_##SYMBOL)

static const struct {
  const char* name;
  int32_t (*function)(void*, const hikui_any*, int32_t, hikui_any*);
} kernels[] = {HIKUI_KINDS(PRODUCTS)                    //
               HIKUI_STORED_KINDS(EMBEDDING)            //
               KERNEL(hikui_embedding_float16)          //
               KERNEL(hikui_embedding_float32)          //
               KERNEL(hikui_linear_float16)             //
               KERNEL(hikui_linear_float32)             //
               KERNEL(hikui_quantize_activation)        //
               KERNEL(hikui_quantize_activation_int4)   //
               KERNEL(hikui_quantize_activation_static) //
               KERNEL(hikui_rms_norm)                   //
               KERNEL(hikui_rms_norm_quantize)          //
               KERNEL(hikui_swiglu)                     //
               KERNEL(hikui_swiglu_quantize)            //
               KERNEL(hikui_rotary)                     //
               KERNEL(hikui_attention)                  //
               KERNEL(hikui_attention_int8)             //
               KERNEL(hikui_attention_int4)             //
               KERNEL(hikui_cache_update_int8)          //
               KERNEL(hikui_cache_update_int4)};

static FILE *calls, *results;
static int threads;

static void take(void* to, size_t bytes) {
  if (bytes > 0 && fread(to, bytes, 1, calls) != 1) {
    fputs("the file of calls is cut short\n", stderr);
    exit(2);
  }
}

static int32_t take_int32(void) {
  int32_t value;
  take(&value, sizeof value);
  return value;
}

static int64_t take_int64(void) {
  int64_t value;
  take(&value, sizeof value);
  return value;
}

static void give(const void* from, size_t bytes) {
  if (bytes > 0 && fwrite(from, bytes, 1, results) != 1) {
    perror("results");
    exit(2);
  }
}

struct share {
  pthread_t thread;
  hikui_parallel_task task;
  hikui_parallel_env env;
  void* data;
  int id;
};

static void* run_share(void* argument) {
  struct share* share = argument;
  share->task(share->id, &share->env, share->data);
  return NULL;
}

static int launch(hikui_parallel_task task, void* data, int tasks) {
  struct share shares[MOST_THREADS];
  const int count = tasks > 0 && tasks < threads ? tasks : threads;
  for (int i = 0; i < count; ++i) {
    shares[i] = (struct share){.task = task, .env = {NULL, count}, .data = data, .id = i};
    if (pthread_create(&shares[i].thread, NULL, run_share, &shares[i]) != 0) {
      perror("pthread_create");
      exit(2);
    }
  }
  for (int i = 0; i < count; ++i) pthread_join(shares[i].thread, NULL);
  return 0;
}

struct slot {
  hikui_tensor tensor;
  int64_t shape[MOST_DIMENSIONS];
  unsigned char* memory;
  size_t bytes, misalignment;
};

static void take_tensor(struct slot* slot) {
  memset(slot, 0, sizeof *slot);
  slot->tensor.device.device_type = 1;
  slot->tensor.dtype.code = (uint8_t)take_int32();
  slot->tensor.dtype.bits = (uint8_t)take_int32();
  slot->tensor.dtype.lanes = 1;
  slot->tensor.ndim = take_int32();
  slot->misalignment = (size_t)take_int32();
  if (slot->tensor.ndim > MOST_DIMENSIONS) exit(2);
  for (int i = 0; i < slot->tensor.ndim; ++i) slot->shape[i] = take_int64();
  slot->tensor.shape = slot->shape;
  slot->bytes = (size_t)take_int64();
  const size_t whole = (slot->bytes + slot->misalignment + 2 * GUARD + 63) / 64 * 64;
  slot->memory = aligned_alloc(64, whole);
  if (slot->memory == NULL) exit(2);
  memset(slot->memory, GUARD_BYTE, whole);
  slot->tensor.data = slot->memory + GUARD + slot->misalignment;
  take(slot->tensor.data, slot->bytes);
}

static int guards_are_whole(const struct slot* slot) {
  const unsigned char* data = slot->tensor.data;
  for (size_t i = 0; i < GUARD; ++i)
    if (slot->memory[i] != GUARD_BYTE || data[slot->bytes + i] != GUARD_BYTE) return 0;
  return 1;
}

static void replay(const char* name) {
  hikui_any arguments[MOST_ARGUMENTS], result = {0};
  struct slot slots[MOST_ARGUMENTS];
  const int32_t count = take_int32();
  int tensors = 0;
  if (count > MOST_ARGUMENTS) exit(2);
  for (int i = 0; i < count; ++i) {
    arguments[i].type_index = take_int32();
    arguments[i].padding = 0;
    if (arguments[i].type_index == HIKUI_ANY_DLTENSOR) {
      take_tensor(&slots[tensors]);
      arguments[i].value.as_pointer = &slots[tensors++].tensor;
    } else {
      take(&arguments[i].value, sizeof arguments[i].value);
    }
  }
  int32_t status = 0, found = 0;
  for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; ++i) {
    if (strcmp(name, kernels[i].name) != 0) continue;
    status = kernels[i].function(NULL, arguments, count, &result);
    found = 1;
  }
  if (!found) {
    fprintf(stderr, "%s is not a kernel\n", name);
    exit(2);
  }
  const char* sentence = status != 0 ? hikui_kernels_last_error() : "";
  const int32_t length = (int32_t)strlen(sentence);
  int32_t whole = 1;
  for (int i = 0; i < tensors; ++i) whole &= guards_are_whole(&slots[i]);
  give(&status, sizeof status);
  give(&whole, sizeof whole);
  give(&length, sizeof length);
  give(sentence, (size_t)length);
  for (int i = 0; i < tensors; ++i) {
    give(slots[i].tensor.data, slots[i].bytes);
    free(slots[i].memory);
  }
}

int main(int count, char** arguments) {
  if (count == 1) {
    const char* isa = hikui_kernels_isa();
    puts(isa != NULL ? isa : hikui_kernels_last_error());
    return isa == NULL;
  }
  if (count != 4) {
    fputs("usage: replay CALLS RESULTS THREADS\n", stderr);
    return 2;
  }
  calls = fopen(arguments[1], "rb");
  results = fopen(arguments[2], "wb");
  threads = atoi(arguments[3]);
  if (calls == NULL || results == NULL || threads < 1 || threads > MOST_THREADS) {
    fputs("the files cannot be opened, or the number of threads is not 1…16\n", stderr);
    return 2;
  }
  if (threads > 1) hikui_kernels_set_launch(launch);
  int32_t length;
  while (fread(&length, sizeof length, 1, calls) == 1) {
    char name[64] = "";
    if (length >= (int32_t)sizeof name) return 2;
    take(name, (size_t)length);
    replay(name);
  }
  return fclose(results) == 0 ? 0 : 2;
}
