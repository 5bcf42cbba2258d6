/* Streams, events and graphs. Work is done at once; what a capture forbids is kept account of.
 *
 * A stream is in a capture if the capture was begun on it, or if it waited for an event that a stream of the capture
 * recorded. Not modelled: a stream that was not joined again before the capture's end.
 */
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdlib.h>

#include "nullgpu.h"

struct handle {
  int number;
  unsigned long long capture; /* 0: none */
};

static struct handle default_stream;
static int numbers;

/* The capture under way: torch has one at a time. */
static struct {
  unsigned long long id; /* 0: none */
  enum cudaStreamCaptureMode mode;
  uintptr_t thread;
  struct handle *stream;
  int broken;
} capture;
static unsigned long long captures;

static __thread char this_thread;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

/* 0, 1 and 2 are the names of the default streams. */
static struct handle *stream_of(const void *stream) {
  return (uintptr_t)stream < 16 ? &default_stream : (struct handle *)stream;
}

static struct handle *new_handle(void) {
  struct handle *handle = calloc(1, sizeof *handle);
  handle->number = __sync_add_and_fetch(&numbers, 1);
  return handle;
}

static int captured(const struct handle *handle) { return capture.id && handle->capture == capture.id; }

static int break_capture(const char *call) {
  nullgpu_log("BROKEN capture: %s", call);
  capture.broken = 1;
  return nullgpu_fail(cudaErrorStreamCaptureUnsupported);
}

int nullgpu_stream_number(const void *stream) { return stream_of(stream)->number; }

int nullgpu_refuse_wait(const void *stream, const char *call) {
  if (!capture.id) return 0;
  if (!stream || captured(stream_of(stream))) return break_capture(call);
  return nullgpu_refuse_unsafe(call);
}

int nullgpu_refuse_unsafe(const char *call) {
  if (!capture.id || thread_mode == cudaStreamCaptureModeRelaxed) return 0;
  int mine = capture.thread == (uintptr_t)&this_thread;
  if (capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal)
    return break_capture(call);
  return mine && capture.mode != cudaStreamCaptureModeRelaxed ? break_capture(call) : 0;
}

cudaError_t cudaDeviceSynchronize(void) {
  int error = nullgpu_refuse_wait(NULL, "cudaDeviceSynchronize");
  if (!error) nullgpu_log("SYNC device");
  return error;
}

/* Streams */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = (cudaStream_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

/* Handles are not given back: one of a stream that is gone may still be in a table of torch's. */
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) {
  *flags = cudaStreamNonBlocking;
  return cudaSuccess;
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *device) { return cudaGetDevice(device); }

cudaError_t cudaStreamQuery(cudaStream_t stream) { return nullgpu_refuse_wait(stream, "cudaStreamQuery"); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  int error = nullgpu_refuse_wait(stream, "cudaStreamSynchronize");
  if (!error) nullgpu_log("SYNC stream %d", nullgpu_stream_number(stream));
  return error;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  struct handle *s = stream_of(stream), *e = (struct handle *)event;
  nullgpu_log("WAIT stream %d event %d", s->number, e->number);
  if (captured(e)) s->capture = capture.id;
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned flags) {
  call(stream, cudaSuccess, data);
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
  call(data);
  return cudaSuccess;
}

/* Events */
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = (cudaEvent_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  struct handle *e = (struct handle *)event, *s = stream_of(stream);
  nullgpu_log("RECORD event %d stream %d", e->number, s->number);
  e->capture = captured(s) ? capture.id : 0;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

static cudaError_t refuse_event(cudaEvent_t event, const char *call) {
  return captured((struct handle *)event) ? break_capture(call) : nullgpu_refuse_unsafe(call);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return refuse_event(event, "cudaEventQuery"); }

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  cudaError_t error = refuse_event(event, "cudaEventSynchronize");
  if (!error) nullgpu_log("SYNC event %d", ((struct handle *)event)->number);
  return error;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 100; /* long: who measures a kernel (Inductor, Triton) repeats it the more, the less time it took */
  return cudaSuccess;
}

/* Captures and graphs */
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  struct handle *s = stream_of(stream);
  if (capture.id || s == &default_stream) return nullgpu_fail(cudaErrorStreamCaptureUnsupported);
  capture.id = s->capture = ++captures;
  capture.mode = mode;
  capture.thread = (uintptr_t)&this_thread;
  capture.stream = s;
  capture.broken = 0;
  nullgpu_log("CAPTURE begin");
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = NULL;
  if (!capture.id || capture.stream != stream_of(stream)) return nullgpu_fail(cudaErrorStreamCaptureUnmatched);
  nullgpu_log("CAPTURE end");
  capture.id = 0;
  if (capture.broken) return nullgpu_fail(cudaErrorStreamCaptureInvalidated);
  *graph = (cudaGraph_t)new_handle();
  return cudaSuccess;
}

static enum cudaStreamCaptureStatus status_of(cudaStream_t stream) {
  if (!captured(stream_of(stream))) return cudaStreamCaptureStatusNone;
  return capture.broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = status_of(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *n) {
  *status = status_of(stream);
  if (id) *id = capture.id;
  if (graph) *graph = (cudaGraph_t)capture.stream;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (n) *n = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t *nodes,
                                                const cudaGraphEdgeData *edges, size_t n, unsigned flags) {
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *program, cudaGraph_t graph, unsigned long long flags) {
  *program = (cudaGraphExec_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *program, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(program, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t program, cudaStream_t stream) {
  nullgpu_log("GRAPH launch stream %d", nullgpu_stream_number(stream));
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t program) { return cudaSuccess; }

/* torch warns of an empty graph: say that there is a node, without showing it. */
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) {
  *n = 1;
  return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *nodes, cudaGraphEdgeData *edges,
                                         size_t *n) {
  *n = 0;
  return cudaSuccess;
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags) { return cudaSuccess; }
