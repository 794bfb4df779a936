/* Calls one stage of a product so many times, to be counted: call KIND STAGE TIMES M N K LINES GROUPS SPLIT STEPS.
 *
 * KIND is a name of kinds.h; STAGE is quantize, prepare or product; LINES are those of a block of 16 rows, SPLIT the groups
 * of the first segment, STEPS the steps of 32 columns in a group. Prints the instruction set, the kernel's name for people
 * and whether it prepares its activations. What is computed does not matter: no kernel branches on values. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static void* filled(size_t bytes, int byte) {
  void* data = aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (data == NULL) exit(2);
  return memset(data, byte, bytes);
}

int main(int count, char** arguments) {
  static const char* const names[] = {
#define NAME(UPPER, LOWER) #LOWER,
      HIKUI_KINDS(NAME)
#undef NAME
  };
  const struct kernel_table* table = hikui_kernels();
  if (count != 11 || table == NULL) return 2;
  int kind = 0;
  while (kind < KINDS && strcmp(arguments[1], names[kind]) != 0) ++kind;
  if (kind == KINDS) return 2;
  int64_t number[8];
  for (int i = 0; i < 8; ++i) number[i] = atoll(arguments[3 + i]);
  const int64_t times = number[0], m = number[1], n = number[2], k = number[3], lines = number[4], groups = number[5];
  const int64_t columns = (k + 127) / 128 * 128, blocks = (n + 15) / 16;
  const struct integer_entry* entry = &table->integer[kind][m == 1 ? SINGLE : m < 16 ? FEW : MANY];
  const int64_t positions = (blocks + entry->blocks - 1) / entry->blocks;

  float* x = filled((size_t)(m * columns) * 4, 0x3c);
  void* q = filled((size_t)(m * columns), 1);
  float* q_scale = filled((size_t)m * 4, 0);
  int32_t* q_sums = filled((size_t)(m * columns / 32) * 4, 0);
  void* weight = filled((size_t)(blocks * lines * 64), 1);
  void* scale = filled((size_t)(blocks * groups * 32), 0x3c);
  float* y = filled((size_t)(m * n) * 4, 0);
  void* prepared = filled((size_t)(m * columns / 32 * entry->prepared_bytes), 0);

  const int quantize = strcmp(arguments[2], "quantize") == 0, prepare = strcmp(arguments[2], "prepare") == 0;
  for (int64_t i = 0; i < times; ++i) {
    if (quantize)
      table->quantize[DYNAMIC_INT8](x, NULL, q, q_scale, q_sums, k, 0, m);
    else if (prepare && entry->prepare != NULL)
      entry->prepare(q, prepared, columns / 4, 0, m);
    else if (!prepare)
      entry->kernel(entry->prepare != NULL ? prepared : q, q_scale, q_sums, weight, scale, NULL, NULL, NULL, y, m, n,
                    columns / 4, lines, groups, number[6], number[7], 0, 0, 0, positions);
  }
  printf("%s\t%s\t%d\n", table->isa, entry->name, entry->prepare != NULL);
  return 0;
}
