/* The devices: how many, what they are, and the errors of calls. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

static __thread int current;
static __thread cudaError_t last = cudaSuccess;

int nullgpu_devices(void) {
  const char *given = getenv("NULLGPU_DEVICES");
  int n = given ? atoi(given) : 1;
  return n < 1 ? 1 : n > MOST_DEVICES ? MOST_DEVICES : n;
}

int nullgpu_current(void) { return current; }

int nullgpu_fail(int error) { return last = error; }

int nullgpu_attribute(int attribute) {
  switch ((enum cudaDeviceAttr)attribute) {
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrL2CacheSize: return 52428800;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
  }
}

cudaError_t cudaGetDeviceCount(int *n) {
  *n = nullgpu_devices();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= nullgpu_devices()) return nullgpu_fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  if (device < 0 || device >= nullgpu_devices()) return nullgpu_fail(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, H100_NAME);
  p->uuid.bytes[0] = device + 1;
  p->totalGlobalMem = H100_BYTES;
  p->major = nullgpu_attribute(cudaDevAttrComputeCapabilityMajor);
  p->minor = nullgpu_attribute(cudaDevAttrComputeCapabilityMinor);
  p->multiProcessorCount = nullgpu_attribute(cudaDevAttrMultiProcessorCount);
  p->warpSize = nullgpu_attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = nullgpu_attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = nullgpu_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = nullgpu_attribute(cudaDevAttrMaxGridDimX);
  p->maxGridSize[1] = p->maxGridSize[2] = nullgpu_attribute(cudaDevAttrMaxGridDimY);
  p->regsPerBlock = p->regsPerMultiprocessor = nullgpu_attribute(cudaDevAttrMaxRegistersPerBlock);
  p->sharedMemPerBlock = nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->reservedSharedMemPerBlock = 1024;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = nullgpu_attribute(cudaDevAttrL2CacheSize);
  p->persistingL2CacheMaxSize = 32768000;
  p->memoryBusWidth = nullgpu_attribute(cudaDevAttrGlobalMemoryBusWidth);
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  p->asyncEngineCount = 3;
  p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = p->managedMemory = p->ECCEnabled = 1;
  p->concurrentManagedAccess = p->cooperativeLaunch = p->clusterLaunch = 1;
  p->memoryPoolsSupported = p->streamPrioritiesSupported = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = nullgpu_attribute(attribute);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int n, int device) {
  snprintf(text, n, "0000:%02X:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDA_VERSION_SHOWN;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

cudaError_t cudaInitDevice(int device, unsigned flags, unsigned more) { return cudaSuccess; }

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }

cudaError_t cudaDeviceSetLimit(enum cudaLimit limit, size_t value) { return cudaSuccess; }

cudaError_t cudaDeviceReset(void) { return cudaSuccess; }

cudaError_t cudaProfilerStart(void) { return cudaSuccess; }

cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError(void) { return last; }

const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    default: return "an error of the null device";
  }
}

const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    default: return "cudaErrorUnknown";
  }
}
