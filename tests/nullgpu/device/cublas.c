/* cuBLAS: every product succeeds, is a line of the log, and computes nothing.
 *
 * Only the arguments up to the ones that are read are declared: the caller pushes more, which nobody looks at.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

#define GEMM(function, batch)                                                    \
  int function(void *handle, int ta, int tb, int m, int n, int k) {              \
    nullgpu_log("GEMM " #function " m %d n %d k %d batch %d", m, n, k, batch);   \
    return 0;                                                                    \
  }
#define GEMV(function)                                                           \
  int function(void *handle, int ta, int m, int n) {                             \
    nullgpu_log("GEMM " #function " m %d n %d k 1 batch 1", m, n);               \
    return 0;                                                                    \
  }
#define DOT(function)                                                            \
  int function(void *handle, int n) {                                            \
    nullgpu_log("GEMM " #function " m 1 n 1 k %d batch 1", n);                   \
    return 0;                                                                    \
  }
#define SUCCEEDS(function) \
  int function() { return 0; }
#define CREATES(function, bytes)       \
  int function(void **out) {           \
    *out = calloc(1, bytes);           \
    return *out ? 0 : 3;               \
  }
#define ANSWERS(function, value)             \
  int function(void *handle, int *out) {     \
    *out = value;                            \
    return 0;                                \
  }

CREATES(cublasCreate_v2, 64)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
ANSWERS(cublasGetMathMode, 0)
SUCCEEDS(cublasSetPointerMode_v2)
ANSWERS(cublasGetPointerMode_v2, 0)
ANSWERS(cublasGetVersion_v2, 130100)

GEMM(cublasSgemm_v2, 1)
GEMM(cublasDgemm_v2, 1)
GEMM(cublasSgemmEx, 1)
GEMM(cublasGemmEx, 1)
GEMM(cublasSgemmStridedBatched, -1)
GEMM(cublasDgemmStridedBatched, -1)
GEMM(cublasGemmStridedBatchedEx, -1)
GEMV(cublasSgemv_v2)
GEMV(cublasDgemv_v2)
DOT(cublasSdot_v2)
DOT(cublasDdot_v2)
DOT(cublasDotEx)

struct layout {
  uint64_t rows, columns;
};

CREATES(cublasLtCreate, 64)
SUCCEEDS(cublasLtDestroy)
CREATES(cublasLtMatmulDescCreate, 64)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
CREATES(cublasLtMatmulPreferenceCreate, 64)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)

int cublasLtMatrixLayoutCreate(struct layout **out, int type, uint64_t rows, uint64_t columns, int64_t step) {
  *out = malloc(sizeof **out);
  **out = (struct layout){rows, columns};
  return 0;
}

int cublasLtMatrixLayoutDestroy(struct layout *layout) {
  free(layout);
  return 0;
}

/* One algorithm, found good, that wants no workspace: sizeof(cublasLtMatmulHeuristicResult_t) is 96. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int most, void *results, int *count) {
  memset(results, 0, 96);
  *count = 1;
  return 0;
}

int cublasLtMatmul(void *handle, void *product, const void *alpha, const void *A, struct layout *a, const void *B,
                   struct layout *b) {
  nullgpu_log("GEMM cublasLtMatmul a %dx%d b %dx%d batch 1", (int)a->rows, (int)a->columns, (int)b->rows,
              (int)b->columns);
  return 0;
}
