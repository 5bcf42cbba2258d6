/* What the files of the null device share: its log, its devices, its memory, and the rules of a capture.
 *
 * The null device is a stand-in for H100 cards: libraries with NVIDIA's entry points that torch loads in the place of
 * the real ones. Kernels are written down by name and not run, so results are void; all that surrounds kernels is real:
 * dispatch, the caching allocator and its counters, streams, events, captures, Inductor, Triton's compiler, process
 * groups. Every name here is ours, but for NVIDIA's own functions, whose contracts are in their headers.
 */
#ifndef NULLGPU_H
#define NULLGPU_H

#include <stddef.h>

/* NVIDIA's data sheet and cudaGetDeviceProperties of an H100 SXM5 80 GB. */
#define H100_NAME "NVIDIA H100 80GB HBM3"
#define H100_BYTES 85017493504ull
#define CUDA_VERSION_SHOWN 13000
#define MOST_DEVICES 16

/* Append a line to the log; the first word is its kind (see ../device_log.py). */
__attribute__((format(printf, 1, 2))) void nullgpu_log(const char *format, ...);

/* How many devices there are: NULLGPU_DEVICES, or 1. */
int nullgpu_devices(void);
/* The device that this thread's calls go to. */
int nullgpu_current(void);
/* The value of a cudaDeviceAttr or CUdevice_attribute: the two enumerations have one numbering. */
int nullgpu_attribute(int attribute);

/* Take or give back bytes of the current device's memory; 0 if they are not there. */
int nullgpu_take(int device, size_t bytes);
void nullgpu_give(int device, size_t bytes);
size_t nullgpu_free_bytes(int device);
/* Address space for device memory: pages cost nothing until a copy touches them. NULL if there is none. */
void *nullgpu_map(size_t bytes);

/* A short number by which the log names a stream. */
int nullgpu_stream_number(const void *stream);
/* Make a CUDA call fail with this error, which cudaGetLastError then tells too. */
int nullgpu_fail(int error);
/* 0, or the error of a call that a capture forbids: one that waits for `stream` (NULL: for everything), ... */
int nullgpu_refuse_wait(const void *stream, const char *call);
/* ... or one that other threads' captures forbid too, such as an allocation. */
int nullgpu_refuse_unsafe(const char *call);

#endif
