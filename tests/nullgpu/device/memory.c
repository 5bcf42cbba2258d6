/* Memory: of the device (pages that are never touched, so that 80 GB cost nothing), pinned on the host, and copies. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "nullgpu.h"

#define PAGE 4096
#define ALIGNMENT (2u << 20) /* cudaMalloc gives 2 MiB blocks, and torch counts on 512 bytes at least */

/* Copies between host and device are done: a program may read a small result. Larger ones between pieces of device
 * memory only move zeros, since no kernel wrote there, and would make pages of both real. */
#define LARGEST_HOST_COPY (256u << 20)
#define LARGEST_DEVICE_COPY (1u << 20)

/* A driver stages a copy of pageable memory: the host waits, but for a small one to the device. */
#define LARGEST_STAGED_AT_ONCE (64u << 10)

struct span {
  char *start;
  size_t bytes;
  int device; /* -1: pinned memory of the host */
  struct span *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct span *spans;
static size_t taken[MOST_DEVICES];

int nullgpu_take(int device, size_t bytes) {
  pthread_mutex_lock(&lock);
  int fits = taken[device] + bytes <= H100_BYTES;
  if (fits) taken[device] += bytes;
  pthread_mutex_unlock(&lock);
  return fits;
}

void nullgpu_give(int device, size_t bytes) {
  pthread_mutex_lock(&lock);
  taken[device] -= bytes;
  pthread_mutex_unlock(&lock);
}

size_t nullgpu_free_bytes(int device) { return H100_BYTES - taken[device]; }

void *nullgpu_map(size_t bytes) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char *start = mmap(NULL, bytes + ALIGNMENT, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (start == MAP_FAILED) return NULL;
  return (char *)(((uintptr_t)start + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
}

static void add_span(void *start, size_t bytes, int device) {
  struct span *span = malloc(sizeof *span);
  pthread_mutex_lock(&lock);
  *span = (struct span){start, bytes, device, spans};
  spans = span;
  pthread_mutex_unlock(&lock);
}

/* Unlink the span that starts here, for the caller to free; NULL if none does. */
static struct span *remove_span(void *start) {
  pthread_mutex_lock(&lock);
  struct span **at = &spans;
  while (*at && (*at)->start != (char *)start) at = &(*at)->next;
  struct span *found = *at;
  if (found) *at = found->next;
  pthread_mutex_unlock(&lock);
  return found;
}

/* The device of an address, -1 for pinned memory, -2 for other memory of the host. */
static int place_of(const void *address) {
  pthread_mutex_lock(&lock);
  int place = -2;
  for (struct span *s = spans; s; s = s->next)
    if ((char *)address >= s->start && (char *)address < s->start + s->bytes) place = s->device;
  pthread_mutex_unlock(&lock);
  return place;
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
  int error = nullgpu_refuse_unsafe("cudaMalloc"), device = nullgpu_current();
  if (error) return error;
  size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
  nullgpu_log("MALLOC %zu", bytes);
  if (!nullgpu_take(device, whole)) return nullgpu_fail(cudaErrorMemoryAllocation);
  *out = nullgpu_map(whole);
  if (!*out) return nullgpu_fail(cudaErrorMemoryAllocation);
  add_span(*out, whole, device);
  return cudaSuccess;
}

cudaError_t cudaFree(void *start) {
  if (!start) return cudaSuccess;
  int error = nullgpu_refuse_unsafe("cudaFree");
  if (error) return error;
  struct span *span = remove_span(start);
  if (!span) return nullgpu_fail(cudaErrorInvalidValue);
  nullgpu_log("FREE %zu", span->bytes);
  munmap(span->start, span->bytes);
  nullgpu_give(span->device, span->bytes);
  free(span);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **out, size_t bytes, cudaStream_t stream) { return cudaMalloc(out, bytes); }

cudaError_t cudaFreeAsync(void *start, cudaStream_t stream) { return cudaFree(start); }

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *total = H100_BYTES;
  *free_bytes = nullgpu_free_bytes(nullgpu_current());
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
  int error = nullgpu_refuse_unsafe("cudaHostAlloc");
  if (error) return error;
  nullgpu_log("HOSTALLOC %zu", bytes);
  *out = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
  if (!*out) return nullgpu_fail(cudaErrorMemoryAllocation);
  add_span(*out, bytes, -1);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void *start) {
  free(remove_span(start));
  free(start);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void *start, size_t bytes, unsigned flags) {
  add_span(start, bytes, -1);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *start) {
  free(remove_span(start));
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void **out, void *start, unsigned flags) {
  *out = start;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
  int place = place_of(address);
  memset(found, 0, sizeof *found);
  found->type = place >= 0 ? cudaMemoryTypeDevice : place == -1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  found->device = place;
  found->devicePointer = place >= 0 ? (void *)address : NULL;
  found->hostPointer = place >= 0 ? NULL : (void *)address;
  return cudaSuccess;
}

/* Note and do a copy. `waits`: the call is one that returns when the copy is done. */
static cudaError_t copy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, const void *stream, int waits) {
  static const char *directions[] = {"h2h", "h2d", "d2h", "d2d"};
  int down = place_of(to), up = place_of(from);
  if (kind == cudaMemcpyDefault) kind = (up >= 0 ? 2 : 0) + (down >= 0 ? 1 : 0);
  int host = kind == cudaMemcpyHostToDevice ? up : kind == cudaMemcpyDeviceToHost ? down : -1;
  int pageable = host == -2;
  if (pageable && !(kind == cudaMemcpyHostToDevice && n <= LARGEST_STAGED_AT_ONCE)) waits = 1;
  int error = waits ? nullgpu_refuse_wait(stream, "a copy that waits") : 0;
  if (error) return error;
  nullgpu_log("COPY %s %zu %s%s stream %d", directions[kind & 3], n, pageable ? "pageable" : "pinned",
              waits ? " waits" : "", nullgpu_stream_number(stream));
  if (n <= (kind == cudaMemcpyDeviceToDevice ? LARGEST_DEVICE_COPY : LARGEST_HOST_COPY)) memmove(to, from, n);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
  return copy(to, from, n, kind, NULL, 1);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, n, kind, stream, 0);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int d, const void *from, int s, size_t n, cudaStream_t stream) {
  return copy(to, from, n, cudaMemcpyDeviceToDevice, stream, 0);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) {
    cudaError_t error =
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind, stream, 0);
    if (error) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *start, int value, size_t n, cudaStream_t stream) {
  nullgpu_log("MEMSET %zu stream %d", n, nullgpu_stream_number(stream));
  if (n <= LARGEST_DEVICE_COPY) memset(start, value, n);
  return cudaSuccess;
}

cudaError_t cudaMemset(void *start, int value, size_t n) { return cudaMemsetAsync(start, value, n, NULL); }

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t n, size_t at, enum cudaMemcpyKind kind) {
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **out, const void *symbol) {
  static char room[1 << 16];
  *out = room;
  return cudaSuccess;
}

/* Pools and sharing between processes: torch asks for the first at its start, the second is refused. */
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
  static char pools[MOST_DEVICES];
  *pool = (cudaMemPool_t)(pools + device);
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  *(uint64_t *)value = 0;
  return cudaSuccess;
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep) { return cudaSuccess; }

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const struct cudaMemAccessDesc *access, size_t n) {
  return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *start) {
  return nullgpu_fail(cudaErrorNotSupported);
}

cudaError_t cudaIpcOpenMemHandle(void **out, cudaIpcMemHandle_t handle, unsigned flags) {
  return nullgpu_fail(cudaErrorNotSupported);
}

cudaError_t cudaIpcCloseMemHandle(void *start) { return cudaSuccess; }

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *handle, cudaEvent_t event) {
  return nullgpu_fail(cudaErrorNotSupported);
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t handle) {
  return nullgpu_fail(cudaErrorNotSupported);
}
