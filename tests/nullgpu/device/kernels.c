/* Kernels that nvcc compiled: their names come with the registration at load time, a launch is a line of the log. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

struct kernel {
  const void *function;
  const char *name;
  struct kernel *next;
};

#define BUCKETS 65536
static struct kernel *kernels[BUCKETS];

static struct kernel **bucket_of(const void *function) { return &kernels[((uintptr_t)function >> 4) % BUCKETS]; }

static const char *name_of(const void *function) {
  for (struct kernel *k = *bucket_of(function); k; k = k->next)
    if (k->function == function) return k->name;
  return "unknown";
}

static cudaError_t launched(const void *function, dim3 grid, dim3 block, const void *stream) {
  nullgpu_log("KERNEL %s grid %ux%ux%u block %u stream %d", name_of(function), grid.x, grid.y, grid.z,
              block.x * block.y * block.z, nullgpu_stream_number(stream));
  return cudaSuccess;
}

/* What nvcc's code calls when a library is loaded */
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[8];
  return handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) {}

void __cudaUnregisterFatBinary(void **handle) {}

void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t bytes,
                       int constant, int global) {}

void __cudaRegisterManagedVar(void **handle, void **host, char *device, const char *name, int external, size_t bytes,
                              int constant, int global) {}

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int threads, void *tid,
                            void *bid, void *block, void *grid, int *warp) {
  struct kernel *kernel = malloc(sizeof *kernel), **bucket = bucket_of(host);
  *kernel = (struct kernel){host, strdup(name), *bucket};
  *bucket = kernel;
}

char __cudaInitModule(void **handle) { return 1; }

/* What nvcc makes of `kernel<<<grid, block, bytes, stream>>>(...)` */
static __thread struct {
  dim3 grid, block;
  size_t bytes;
  void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t bytes, void *stream) {
  pushed.grid = grid;
  pushed.block = block;
  pushed.bytes = bytes;
  pushed.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *bytes, void *stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *bytes = pushed.bytes;
  *(void **)stream = pushed.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t bytes,
                               cudaStream_t stream) {
  return launched(kernel, grid, block, stream);
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t bytes,
                             cudaStream_t stream) {
  return launched(function, grid, block, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  return launched(function, config->gridDim, config->blockDim, config->stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t bytes,
                                        cudaStream_t stream) {
  return launched(function, grid, block, stream);
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}

cudaError_t cudaFuncSetCacheConfig(const void *function, enum cudaFuncCache config) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return cudaSuccess;
}

/* By threads alone: nobody knows the registers of a kernel that is not there. */
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t bytes, unsigned flags) {
  int most = threads > 0 ? nullgpu_attribute(cudaDevAttrMaxThreadsPerMultiProcessor) / threads : 1;
  *blocks = most < 1 ? 1 : most > 16 ? 16 : most;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                          size_t bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, bytes, 0);
}

/* torch gets the driver's functions by name; those that ours lacks are named in the log and do nothing. */
static int nothing(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  void *found = driver ? dlsym(driver, name) : NULL;
  if (!found) nullgpu_log("MISSING %s", name);
  *function = found ? found : (void *)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
