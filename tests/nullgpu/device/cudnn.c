/* cuDNN's graph interface, through which torch runs convolutions: one engine is found good, wants no workspace, and its
 * run is a line of the log.
 *
 * Out: cuDNN's batch norm, recurrent nets and CTC loss are refused (CUDNN_STATUS_NOT_SUPPORTED); and attention, which
 * torch would give to cuDNN in half precision only when asked to.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

/* From cudnn_graph.h, so that its headers are not needed. */
enum { NOT_SUPPORTED = 3000 };
enum { TYPE_BACKEND_DESCRIPTOR = 15, TYPE_NUMERICAL_NOTE = 11, TYPE_BEHAVIOR_NOTE = 19 };
enum { ENGINE_HEURISTIC = 4, OPERATION_GRAPH = 15 };
enum { HEURISTIC_GRAPH = 201, HEURISTIC_RESULTS = 202, CONFIG_ENGINE = 300, PLAN_CONFIG = 401 };
enum { ENGINE_GRAPH = 1300, GRAPH_OPERATIONS = 801 };

static const char *const operations[64] = {
    [10] = "convolution_forward", [11] = "convolution_backward_filter", [12] = "convolution_backward_data",
    [13] = "pointwise",           [19] = "matmul",                      [22] = "reduction",
    [25] = "resample_forward",    [26] = "resample_backward",           [30] = "norm_backward",
    [29] = "norm_forward",        [41] = "attention_forward",           [43] = "attention_backward",
};

/* A descriptor, and the one that it is made of: plan -> config -> engine -> graph -> first operation. */
struct descriptor {
  int type;
  struct descriptor *inner;
};

int cudnnCreate(void **handle) {
  *handle = calloc(1, 64);
  return 0;
}

int cudnnDestroy(void *handle) {
  free(handle);
  return 0;
}

int cudnnSetStream(void *handle, void *stream) {
  memcpy(handle, &stream, sizeof stream);
  return 0;
}

int cudnnGetStream(void *handle, void **stream) {
  memcpy(stream, handle, sizeof *stream);
  return 0;
}

int cudnnBackendCreateDescriptor(int type, struct descriptor **out) {
  *out = calloc(1, sizeof **out);
  (*out)->type = type;
  return 0;
}

/* Not given back: a plan outlives the descriptors that it was made of. */
int cudnnBackendDestroyDescriptor(struct descriptor *descriptor) { return 0; }

int cudnnBackendFinalize(struct descriptor *descriptor) { return 0; }

int cudnnBackendSetAttribute(struct descriptor *descriptor, int attribute, int type, int64_t n, const void *values) {
  int links = attribute == HEURISTIC_GRAPH || attribute == CONFIG_ENGINE || attribute == PLAN_CONFIG ||
              attribute == ENGINE_GRAPH || attribute == GRAPH_OPERATIONS;
  if (links && n > 0) memcpy(&descriptor->inner, values, sizeof descriptor->inner);
  return 0;
}

/* The caller makes the descriptors to be filled in: link them to what they were asked of. */
int cudnnBackendGetAttribute(struct descriptor *descriptor, int attribute, int type, int64_t most, int64_t *n,
                             void *values) {
  int one = attribute == HEURISTIC_RESULTS || attribute == CONFIG_ENGINE || attribute == PLAN_CONFIG;
  int none = type == TYPE_NUMERICAL_NOTE || type == TYPE_BEHAVIOR_NOTE || (type == TYPE_BACKEND_DESCRIPTOR && !one);
  if (n) *n = none ? 0 : 1;
  if (none || !values || most < 1) return 0;
  if (type == TYPE_BACKEND_DESCRIPTOR)
    (*(struct descriptor **)values)->inner = descriptor->inner;
  else
    memset(values, 0, sizeof(int64_t)); /* sizes, among them that of the workspace */
  return 0;
}

int cudnnBackendExecute(void *handle, struct descriptor *plan, struct descriptor *pointers) {
  struct descriptor *d = plan;
  while (d->inner) d = d->inner;
  const char *name = d->type >= 0 && d->type < 64 ? operations[d->type] : NULL;
  void *stream;
  cudnnGetStream(handle, &stream);
  nullgpu_log("CUDNN %s stream %d", name ? name : "operation", nullgpu_stream_number(stream));
  return 0;
}

#define REFUSED(function)                                   \
  int function() {                                          \
    nullgpu_log("MISSING " #function);                      \
    return NOT_SUPPORTED;                                   \
  }

REFUSED(cudnnBatchNormalizationForwardTrainingEx)
REFUSED(cudnnBatchNormalizationForwardInference)
REFUSED(cudnnBatchNormalizationBackwardEx)
REFUSED(cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize)
REFUSED(cudnnGetBatchNormalizationBackwardExWorkspaceSize)
REFUSED(cudnnGetBatchNormalizationTrainingExReserveSpaceSize)
REFUSED(cudnnRNNForward)
REFUSED(cudnnRNNBackwardData_v8)
REFUSED(cudnnRNNBackwardWeights_v8)
REFUSED(cudnnGetRNNTempSpaceSizes)
REFUSED(cudnnGetRNNWeightSpaceSize)
REFUSED(cudnnCTCLoss)
REFUSED(cudnnCTCLoss_v8)
