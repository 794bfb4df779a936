/* Errors and parallel regions, inside a TVM module and outside. */
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

/* Starting the workers costs some microseconds: below this many bytes one core is done sooner. */
#define SERIAL_BYTES (96 * 1024)

/* Where TVM is in the process, it takes the message. */
extern void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) __attribute__((weak));

/* TVM's loader fills this variable of every module that defines it. */
__attribute__((weak, visibility("default"))) hikui_parallel_launch __TVMBackendParallelLaunch = NULL;

static hikui_parallel_launch chosen_launch;
static void (*chosen_report)(const char*);
static __thread char last_error[512];

void hikui_kernels_set_launch(hikui_parallel_launch launch) { chosen_launch = launch; }

void hikui_kernels_set_error(void (*report)(const char*)) { chosen_report = report; }

const char* hikui_kernels_last_error(void) { return last_error; }

int hikui_fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(last_error, sizeof last_error, format, values);
  va_end(values);
  if (chosen_report != NULL)
    chosen_report(last_error);
  else if (TVMFFIErrorSetRaisedFromCStr != NULL)
    TVMFFIErrorSetRaisedFromCStr("ValueError", last_error);
  return -1;
}

struct region {
  hikui_range* run;
  const void* arguments;
  int64_t count;
};

static int run_share(int id, hikui_parallel_env* env, void* data) {
  const struct region* region = data;
  const int64_t share = (region->count + env->tasks - 1) / env->tasks;
  const int64_t first = id * share;
  const int64_t last = first + share < region->count ? first + share : region->count;
  if (first < last) region->run(region->arguments, first, last);
  return 0;
}

int hikui_parallel(hikui_range* run, const void* arguments, int64_t count, int64_t bytes) {
  const hikui_parallel_launch launch = chosen_launch != NULL ? chosen_launch : __TVMBackendParallelLaunch;
  if (launch == NULL || count < 2 || bytes < SERIAL_BYTES) {
    run(arguments, 0, count);
    return 0;
  }
  struct region region = {run, arguments, count};
  return launch(run_share, &region, 0);
}
