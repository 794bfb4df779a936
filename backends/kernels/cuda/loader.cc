// The CUDA kernels from C; see hikui_cuda.h. Needs only libc and libdl, no C++ library.

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hikui_cuda.h"

namespace {

thread_local char last_error[512];

int fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return 1;
}

}  // namespace

// The driver's functions, as cuda.h declares them; handles are pointers, results are 0 or an error's number.
struct hikui_cuda {
  void* library;
  void *context, *module, *stream;
  int device;
  int (*init)(unsigned);
  int (*device_count)(int*);
  int (*device_get)(int*, int);
  int (*retain)(void**, int);
  int (*release)(int);
  int (*set_current)(void*);
  int (*error_string)(int, const char**);
  int (*module_load)(void**, const void*);
  int (*module_unload)(void*);
  int (*module_function)(void**, void*, const char*);
  int (*stream_create)(void**, unsigned);
  int (*stream_destroy)(void*);
  int (*stream_synchronize)(void*);
  int (*allocate)(uint64_t*, size_t);
  int (*free_memory)(uint64_t);
  int (*to_device)(uint64_t, const void*, size_t);
  int (*to_host)(void*, uint64_t, size_t);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
};

namespace {

int check(const hikui_cuda* cuda, int status, const char* what) {
  const char* text = nullptr;
  if (status == 0) return 0;
  cuda->error_string(status, &text);
  return fail("%s fails: %s.", what, text ? text : "unknown error");
}

int find_functions(hikui_cuda* cuda, const char* driver) {
  const struct {
    const char* name;
    void* address;
  } functions[] = {
      {"cuInit", &cuda->init},
      {"cuDeviceGetCount", &cuda->device_count},
      {"cuDeviceGet", &cuda->device_get},
      {"cuDevicePrimaryCtxRetain", &cuda->retain},
      {"cuDevicePrimaryCtxRelease_v2", &cuda->release},
      {"cuCtxSetCurrent", &cuda->set_current},
      {"cuGetErrorString", &cuda->error_string},
      {"cuModuleLoadData", &cuda->module_load},
      {"cuModuleUnload", &cuda->module_unload},
      {"cuModuleGetFunction", &cuda->module_function},
      {"cuStreamCreate", &cuda->stream_create},
      {"cuStreamDestroy_v2", &cuda->stream_destroy},
      {"cuStreamSynchronize", &cuda->stream_synchronize},
      {"cuMemAlloc_v2", &cuda->allocate},
      {"cuMemFree_v2", &cuda->free_memory},
      {"cuMemcpyHtoD_v2", &cuda->to_device},
      {"cuMemcpyDtoH_v2", &cuda->to_host},
      {"cuLaunchKernel", &cuda->launch},
  };
  for (const auto& function : functions) {
    void* found = dlsym(cuda->library, function.name);
    if (!found) return fail("%s has no function %s: the driver is too old.", driver, function.name);
    memcpy(function.address, &found, sizeof found);
  }
  return 0;
}

void* read_file(const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) return fail("%s cannot be read.", path), nullptr;
  void* content = nullptr;
  long size = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
  if (size > 0 && !fseek(file, 0, SEEK_SET)) content = malloc(size);
  if (content && fread(content, 1, size, file) != (size_t)size) {
    free(content);
    content = nullptr;
  }
  if (!content) fail("%s cannot be read.", path);
  fclose(file);
  return content;
}

int start(hikui_cuda* cuda, const char* fatbin) {
  int count = 0;
  if (cuda->init(0) || cuda->device_count(&count) || !count) return fail("The CUDA driver finds no GPU.");
  if (check(cuda, cuda->device_get(&cuda->device, 0), "cuDeviceGet")) return 1;
  if (check(cuda, cuda->retain(&cuda->context, cuda->device), "cuDevicePrimaryCtxRetain")) return 1;
  if (check(cuda, cuda->set_current(cuda->context), "cuCtxSetCurrent")) return 1;
  // Such a stream waits for copies from host memory, which may still be under way when their call returns.
  const unsigned ordered_with_copies = 0;
  if (check(cuda, cuda->stream_create(&cuda->stream, ordered_with_copies), "cuStreamCreate")) return 1;
  void* image = read_file(fatbin);
  if (!image) return 1;
  int status = cuda->module_load(&cuda->module, image);
  free(image);
  return check(cuda, status, "cuModuleLoadData");
}

constexpr int kMost = 24;

// The arguments of a kernel, in its order: addresses, then sizes.
struct Arguments {
  uint64_t values[kMost];
  void* pointers[kMost];
  int count = 0;
  template <typename... Values>
  void addresses(Values... given) {
    (add(given), ...);
  }
  // Both machines are little-endian: a kernel that takes 4 bytes reads the lower half.
  template <typename... Values>
  void sizes(Values... given) {
    (add((uint32_t)given), ...);
  }
  void add(uint64_t value) {
    values[count] = value;
    pointers[count] = &values[count];
    count++;
  }
};

int launch(hikui_cuda* cuda, const char* symbol, int grid_x, int grid_y, Arguments* arguments) {
  void* function = nullptr;
  if (check(cuda, cuda->set_current(cuda->context), "cuCtxSetCurrent")) return 1;
  if (cuda->module_function(&function, cuda->module, symbol)) return fail("There is no kernel %s.", symbol);
  return check(cuda,
               cuda->launch(function, grid_x, grid_y, 1, 32, 8, 1, 0, cuda->stream, arguments->pointers, nullptr),
               symbol);
}

// The tiles of launch.py: the smallest that takes m rows, else the largest.
int integer_rows(int m) { return m <= 1 ? 1 : m <= 4 ? 4 : 8; }
int float_rows(int m) { return m <= 1 ? 1 : 4; }
int blocks(int size, int of) { return (size + of - 1) / of; }

// Sizes are rounded up to tiles, at most by this much.
constexpr int32_t kMostSize = INT32_MAX - 127;

bool is_size(int32_t size) { return size >= 1 && size <= kMostSize; }

// Nothing is divided by a number of a caller before it has been seen here.
int check_matrix(const char* kind, const hikui_cuda_matrix& matrix) {
  if (!kind) return fail("A product needs the name of its format.");
  if (!is_size(matrix.n) || !is_size(matrix.columns) || !is_size(matrix.lines) || !is_size(matrix.groups))
    return fail("A matrix of %d rows, %d columns, %d lines and %d groups is none.", matrix.n, matrix.columns,
                matrix.lines, matrix.groups);
  const int32_t group = matrix.columns / matrix.groups;
  if (matrix.columns % matrix.groups || group % 32)
    return fail("%d columns do not fall into %d groups of a multiple of 32.", matrix.columns, matrix.groups);
  // The kernels multiply by an inverse to find a step's group; beyond this it would not be exact.
  if (matrix.groups > 1 && static_cast<int64_t>(matrix.columns / 32) * (group / 32) >= int64_t{1} << 31)
    return fail("%d columns in groups of %d are more than the kernels count.", matrix.columns, group);
  if (!matrix.weight || !matrix.scale) return fail("A matrix lacks the address of its weight or scale.");
  return 0;
}

// As `_factor` of launch.py.
int32_t group_factor(const hikui_cuda_matrix& matrix) {
  if (matrix.groups == 1) return 0;
  const uint32_t steps = static_cast<uint32_t>(matrix.columns / matrix.groups / 32);
  return static_cast<int32_t>(((uint32_t{1} << 31) + steps - 1) / steps);
}

}  // namespace

extern "C" {

const char* hikui_cuda_last_error(void) { return last_error; }

struct hikui_cuda* hikui_cuda_open(const char* fatbin, const char* driver) {
  if (!driver) driver = "libcuda.so.1";
  void* library = dlopen(driver, RTLD_NOW | RTLD_LOCAL);
  if (!library) return fail("No CUDA driver is here (%s cannot be loaded).", driver), nullptr;
  hikui_cuda* cuda = static_cast<hikui_cuda*>(calloc(1, sizeof(hikui_cuda)));
  if (!cuda) return fail("There is no memory."), dlclose(library), nullptr;
  cuda->library = library;
  if (find_functions(cuda, driver)) return dlclose(library), free(cuda), nullptr;
  if (start(cuda, fatbin)) return hikui_cuda_close(cuda), nullptr;
  return cuda;
}

void hikui_cuda_close(struct hikui_cuda* cuda) {
  if (!cuda) return;
  if (cuda->context) cuda->set_current(cuda->context);
  if (cuda->module) cuda->module_unload(cuda->module);
  if (cuda->stream) cuda->stream_destroy(cuda->stream);
  if (cuda->context) cuda->release(cuda->device);
  dlclose(cuda->library);
  free(cuda);
}

int hikui_cuda_allocate(struct hikui_cuda* cuda, size_t size, hikui_cuda_address* address) {
  if (check(cuda, cuda->set_current(cuda->context), "cuCtxSetCurrent")) return 1;
  return check(cuda, cuda->allocate(address, size ? size : 1), "cuMemAlloc");
}

int hikui_cuda_free(struct hikui_cuda* cuda, hikui_cuda_address address) {
  return hikui_cuda_synchronize(cuda) || check(cuda, cuda->free_memory(address), "cuMemFree");
}

int hikui_cuda_upload(struct hikui_cuda* cuda, hikui_cuda_address to, const void* from, size_t size) {
  return hikui_cuda_synchronize(cuda) || check(cuda, cuda->to_device(to, from, size), "cuMemcpyHtoD");
}

int hikui_cuda_download(struct hikui_cuda* cuda, void* to, hikui_cuda_address from, size_t size) {
  return hikui_cuda_synchronize(cuda) || check(cuda, cuda->to_host(to, from, size), "cuMemcpyDtoH");
}

int hikui_cuda_synchronize(struct hikui_cuda* cuda) {
  if (check(cuda, cuda->set_current(cuda->context), "cuCtxSetCurrent")) return 1;
  return check(cuda, cuda->stream_synchronize(cuda->stream), "cuStreamSynchronize");
}

int hikui_cuda_quantize_activation(struct hikui_cuda* cuda, hikui_cuda_address x, int32_t k, int bits,
                                   hikui_cuda_address step, struct hikui_cuda_activation out) {
  if (!cuda || !x || !out.q || !out.scale || !out.sums) return fail("The quantiser lacks an address.");
  if (!is_size(k) || !is_size(out.m)) return fail("%d rows of %d columns cannot be quantised.", out.m, k);
  if (bits != 8 && (bits != 4 || step)) return fail("Activations are quantised to 8 bits, or to 4 without a step.");
  if (out.columns != blocks(k, 128) * 128) return fail("%d columns are quantised to %d.", k, blocks(k, 128) * 128);
  const char* suffix = step ? "_static" : bits == 4 ? "_int4" : "";
  char symbol[64];
  snprintf(symbol, sizeof symbol, "hikui_quantize_activation%s", suffix);
  Arguments arguments;
  arguments.addresses(x, step, out.q, out.scale, out.sums);
  arguments.sizes(out.m, k);
  return launch(cuda, symbol, out.m, 1, &arguments);
}

int hikui_cuda_linear_a8(struct hikui_cuda* cuda, const char* kind, struct hikui_cuda_activation activation,
                         struct hikui_cuda_matrix matrix, hikui_cuda_address bias, struct hikui_cuda_branch branch,
                         hikui_cuda_address y) {
  if (!cuda || !activation.q || !activation.scale || !activation.sums || !y) return fail("The product lacks an address.");
  if (check_matrix(kind, matrix)) return 1;
  if (!is_size(activation.m) || !is_size(activation.columns) || activation.columns % 128)
    return fail("%d rows of %d columns are no quantised activation.", activation.m, activation.columns);
  if (branch.rank < 0 || branch.rank > kMostSize || (branch.rank > 0 && (!branch.b || !branch.t)))
    return fail("A branch of rank %d lacks an address, or is none.", branch.rank);
  if (activation.columns < matrix.columns) return fail("The activation is narrower than the matrix.");
  int rows = integer_rows(activation.m);
  char symbol[64];
  snprintf(symbol, sizeof symbol, "hikui_linear_a8_%s_m%d", kind, rows);
  Arguments arguments;
  arguments.addresses(activation.q, activation.scale, activation.sums, matrix.weight, matrix.scale, bias, branch.b,
                      branch.t, y);
  arguments.sizes(activation.m, matrix.n, activation.columns / 32, matrix.lines, matrix.groups, group_factor(matrix),
                  matrix.columns / 32, branch.rank, bias != 0);
  return launch(cuda, symbol, blocks(matrix.n, 16), blocks(activation.m, rows), &arguments);
}

int hikui_cuda_linear(struct hikui_cuda* cuda, const char* kind, const char* dtype, hikui_cuda_address x, int32_t m,
                      int32_t k, struct hikui_cuda_matrix matrix, hikui_cuda_address bias, hikui_cuda_address y) {
  if (!cuda || !dtype || !x || !y) return fail("The product lacks an address or the type of its activations.");
  if (check_matrix(kind, matrix)) return 1;
  if (!is_size(m) || !is_size(k) || k > matrix.columns)
    return fail("%d rows of %d columns do not fit a matrix of %d.", m, k, matrix.columns);
  int rows = float_rows(m);
  char symbol[64];
  snprintf(symbol, sizeof symbol, "hikui_linear_%s_%s_m%d", kind, dtype, rows);
  Arguments arguments;
  arguments.addresses(x, matrix.weight, matrix.scale, bias, y);
  arguments.sizes(m, matrix.n, k, matrix.lines, matrix.groups, group_factor(matrix), matrix.columns / 32,
                  bias != 0);
  return launch(cuda, symbol, blocks(matrix.n, 16), blocks(m, rows), &arguments);
}

int hikui_cuda_linear_dense(struct hikui_cuda* cuda, const char* kind, hikui_cuda_address x, int32_t m, int32_t n,
                            int32_t k, hikui_cuda_address weight, hikui_cuda_address bias, hikui_cuda_address y) {
  if (!cuda || !kind || !x || !weight || !y) return fail("The product lacks an address or the name of its format.");
  if (!is_size(m) || !is_size(n) || !is_size(k)) return fail("A product of %d×%d by %d×%d is none.", m, k, k, n);
  int rows = float_rows(m);
  char symbol[64];
  snprintf(symbol, sizeof symbol, "hikui_linear_%s_m%d", kind, rows);
  Arguments arguments;
  arguments.addresses(x, weight, bias, y);
  arguments.sizes(m, n, k, bias != 0);
  return launch(cuda, symbol, blocks(n, 16), blocks(m, rows), &arguments);
}

}  // extern "C"
