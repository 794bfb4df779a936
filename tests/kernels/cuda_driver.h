// Stands for libcuda.so.1: the driver calls of benchmarks/cuda and of the loader, with device memory that is the host's and kernels that
// are emulated. What is captured into a graph is run at once, and every time is a millisecond.
#pragma once

#include <cstring>

struct EmulatedKernel {
  const char* name;
  void (*run)(unsigned, unsigned, unsigned, unsigned, void**);
};
extern const EmulatedKernel emulated_kernels[];

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int size, int) { std::snprintf(name, size, "emulated"); return 0; }
int cuDeviceGetAttribute(int* value, int number, int) { *value = number == 38 ? 4096 : 0; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = nullptr; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuStreamCreate(void** stream, unsigned) { *stream = nullptr; return 0; }
int cuStreamDestroy_v2(void*) { return 0; }
int cuStreamSynchronize(void*) { return 0; }
int cuStreamBeginCapture_v2(void*, int) { return 0; }
int cuStreamEndCapture(void*, void** graph) { *graph = nullptr; return 0; }
int cuGraphInstantiateWithFlags(void**, void*, unsigned long long) { return 0; }
int cuGraphLaunch(void*, void*) { return 0; }
int cuGraphExecDestroy(void*) { return 0; }
int cuGraphDestroy(void*) { return 0; }
int cuEventCreate(void**, unsigned) { return 0; }
int cuEventRecord(void*, void*) { return 0; }
int cuEventSynchronize(void*) { return 0; }
int cuEventElapsedTime(float* milliseconds, void*, void*) { *milliseconds = 1; return 0; }
int cuEventDestroy_v2(void*) { return 0; }
int cuGetErrorString(int, const char** text) { *text = "emulated failure"; return 0; }

int cuModuleLoadData(void** module, const void* image) {
  *module = nullptr;
  return *(const uint32_t*)image == 0xba55ed50 ? 0 : 200;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(const EmulatedKernel** function, void*, const char* name) {
  for (*function = emulated_kernels; (*function)->name; ++*function)
    if (!std::strcmp((*function)->name, name)) return 0;
  return 500;
}
int cuMemAlloc_v2(uint64_t* address, size_t size) {
  *address = (uint64_t)aligned_alloc(256, (size + 255) / 256 * 256);
  return *address ? 0 : 2;
}
int cuMemFree_v2(uint64_t address) { std::free((void*)address); return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) { std::memcpy((void*)to, from, size); return 0; }
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) { std::memcpy(to, (void*)from, size); return 0; }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void*) {
  std::memmove((void*)to, (void*)from, size);
  return 0;
}
int cuLaunchKernel(const EmulatedKernel* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned tx, unsigned ty,
                   unsigned tz, unsigned, void*, void** arguments, void**) {
  if (gz != 1 || tz != 1) return 1;
  kernel->run(gx, gy, tx, ty, arguments);
  return 0;
}
}
