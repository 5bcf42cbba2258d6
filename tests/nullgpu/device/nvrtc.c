/* NVRTC: torch compiles some elementwise kernels (erfinv, ...) at their first use; here nothing would run them. */
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

#define NAME_BYTES 512
#define PROGRAM_BYTES 64

int nvrtcVersion(int *major, int *minor) {
  *major = CUDA_VERSION_SHOWN / 1000;
  *minor = 0;
  return 0;
}

const char *nvrtcGetErrorString(int error) { return "an error of the null device"; }

int nvrtcCreateProgram(void **program, const char *source, const char *name, int n, void *headers, void *names) {
  *program = calloc(1, NAME_BYTES);
  return 0;
}

int nvrtcDestroyProgram(void **program) { return 0; }

/* The one thing that is asked of a program later is the name of its kernel. */
int nvrtcAddNameExpression(char *program, const char *name) {
  strncpy(program, name, NAME_BYTES - 1);
  return 0;
}

int nvrtcGetLoweredName(char *program, const char *expression, const char **name) {
  *name = program;
  return 0;
}

int nvrtcCompileProgram(void *program, int n, void *options) { return 0; }

static int size(void *program, size_t *bytes) {
  *bytes = PROGRAM_BYTES;
  return 0;
}

static int code(void *program, char *bytes) {
  memset(bytes, 0, PROGRAM_BYTES);
  return 0;
}

int nvrtcGetCUBINSize(void *program, size_t *bytes) { return size(program, bytes); }

int nvrtcGetCUBIN(void *program, char *bytes) { return code(program, bytes); }

int nvrtcGetPTXSize(void *program, size_t *bytes) { return size(program, bytes); }

int nvrtcGetPTX(void *program, char *bytes) { return code(program, bytes); }

int nvrtcGetProgramLogSize(void *program, size_t *bytes) {
  *bytes = 1;
  return 0;
}

int nvrtcGetProgramLog(void *program, char *text) {
  *text = 0;
  return 0;
}
