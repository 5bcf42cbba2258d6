/* The driver's library, libcuda.so.1, as far as Triton's launcher, torch's run-time compiler and torch's expandable
 * segments ask for it.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "nullgpu.h"

#define CONTEXT ((CUcontext)16)
#define MODULE ((CUmodule)32)
#define LINKER ((CUlinkState)48)
#define GRANULE (2u << 20)

/* Devices and contexts */
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION_SHOWN;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *n) {
  *n = nullgpu_devices();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int i) {
  *device = i;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int n, CUdevice device) {
  snprintf(name, n, H100_NAME);
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
  *bytes = H100_BYTES;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
  memset(uuid, 0, sizeof *uuid);
  uuid->bytes[0] = device + 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = nullgpu_attribute(attribute);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = CONTEXT;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = CONTEXT;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = nullgpu_current();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuCtxSynchronize(void) {
  int error = nullgpu_refuse_wait(NULL, "cuCtxSynchronize");
  if (!error) nullgpu_log("SYNC context");
  return error;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) { return cuCtxGetCurrent(context); }

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the null device";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }

/* Kernels that Triton or NVRTC compiled: the handle of a function is its name. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = MODULE;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
  return cuModuleLoadData(module, image);
}

CUresult cuModuleLoad(CUmodule *module, const char *file) { return cuModuleLoadData(module, NULL); }

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetGlobal_v2(CUdeviceptr *start, size_t *bytes, CUmodule module, const char *name) {
  *start = 0;
  *bytes = 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

static CUresult launched(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, CUstream stream) {
  nullgpu_log("TRITON %s grid %ux%ux%u block %u stream %d", (const char *)function, x, y, z, threads,
              nullgpu_stream_number(stream));
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **arguments, void **extra) {
  return launched(function, x, y, z, bx * by * bz, stream);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
  return launched(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX * c->blockDimY * c->blockDimZ,
                  c->hStream);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void **arguments) {
  return launched(function, x, y, z, bx * by * bz, stream);
}

CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *config) {
  *n = 8;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction function, int threads, size_t bytes) {
  *n = 1;
  return CUDA_SUCCESS;
}

/* Descriptors of tiles that Hopper's copy engine reads; CUTLASS makes them on the host. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *start,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

CUresult cuLinkCreate_v2(unsigned n, CUjit_option *options, void **values, CUlinkState *state) {
  *state = LINKER;
  return CUDA_SUCCESS;
}

CUresult cuLinkAddData_v2(CUlinkState state, CUjitInputType type, void *data, size_t bytes, const char *name,
                          unsigned n, CUjit_option *options, void **values) {
  return CUDA_SUCCESS;
}

CUresult cuLinkComplete(CUlinkState state, void **image, size_t *bytes) {
  static char none[64];
  *image = none;
  *bytes = sizeof none;
  return CUDA_SUCCESS;
}

CUresult cuLinkDestroy(CUlinkState state) { return CUDA_SUCCESS; }

/* Memory in pieces that are mapped into reserved addresses: torch's expandable segments. */
CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  *total = H100_BYTES;
  *free_bytes = nullgpu_free_bytes(nullgpu_current());
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *properties,
                                       CUmemAllocationGranularity_flags flags) {
  *bytes = GRANULE;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *start, size_t bytes, size_t alignment, CUdeviceptr at,
                             unsigned long long flags) {
  *start = (CUdeviceptr)nullgpu_map(bytes);
  return *start ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemAddressFree(CUdeviceptr start, size_t bytes) {
  munmap((void *)start, bytes);
  return CUDA_SUCCESS;
}

struct piece {
  size_t bytes;
  int device;
};

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *properties,
                     unsigned long long flags) {
  int device = properties->location.id;
  nullgpu_log("MALLOC %zu", bytes);
  if (!nullgpu_take(device, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  struct piece *piece = malloc(sizeof *piece);
  *piece = (struct piece){bytes, device};
  *handle = (CUmemGenericAllocationHandle)piece;
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  struct piece *piece = (struct piece *)handle;
  nullgpu_log("FREE %zu", piece->bytes);
  nullgpu_give(piece->device, piece->bytes);
  free(piece);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr start, size_t bytes, size_t at, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr start, size_t bytes) {
  madvise((void *)start, bytes, MADV_DONTNEED);
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr start, size_t bytes, const CUmemAccessDesc *access, size_t n) {
  return CUDA_SUCCESS;
}
