/* NCCL: groups are made, each call is a line of the log with its size and peer, and no byte moves.
 *
 * What ranks must really tell each other (objects, barriers of the run) goes through gloo, on the host.
 */
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

enum { SUCCESS = 0, INVALID_USAGE = 5 };

typedef struct {
  char bytes[128];
} Id;

struct communicator {
  int size, rank;
};

static int noted(const char *name, size_t count, int type, int peer, struct communicator *c, void *stream) {
  nullgpu_log("NCCL %s count %zu dtype %d peer %d of %d stream %d", name, count, type, peer, c->size,
              nullgpu_stream_number(stream));
  return SUCCESS;
}

int ncclGetVersion(int *version) {
  *version = 22809;
  return SUCCESS;
}

int ncclGetUniqueId(Id *id) {
  memset(id, 7, sizeof *id);
  return SUCCESS;
}

const char *ncclGetErrorString(int error) { return error ? "not in the null device" : "no error"; }

const char *ncclGetLastError(void *c) { return ""; }

int ncclCommInitRank(struct communicator **out, int size, Id id, int rank) {
  *out = malloc(sizeof **out);
  **out = (struct communicator){size, rank};
  return SUCCESS;
}

int ncclCommInitRankConfig(struct communicator **out, int size, Id id, int rank, void *config) {
  return ncclCommInitRank(out, size, id, rank);
}

int ncclCommInitRankScalable(struct communicator **out, int size, int rank, int n, Id *ids, void *config) {
  return ncclCommInitRank(out, size, ids[0], rank);
}

/* Refused: their size is known to the ranks together only, and these do not talk here. */
int ncclCommSplit(struct communicator *c, int color, int key, void **out, void *config) { return INVALID_USAGE; }

int ncclCommShrink() { return INVALID_USAGE; }

int ncclCommInitAll(void **out, int n, const int *devices) { return INVALID_USAGE; }

/* Not given back: torch's watchdog may still ask it for errors. */
int ncclCommFinalize(void *c) { return SUCCESS; }

int ncclCommDestroy(void *c) { return SUCCESS; }

int ncclCommAbort(void *c) { return SUCCESS; }

int ncclCommCount(struct communicator *c, int *size) {
  *size = c->size;
  return SUCCESS;
}

int ncclCommUserRank(struct communicator *c, int *rank) {
  *rank = c->rank;
  return SUCCESS;
}

int ncclCommGetAsyncError(void *c, int *error) {
  *error = SUCCESS;
  return SUCCESS;
}

int ncclCommRegister() { return SUCCESS; }

int ncclCommDeregister() { return SUCCESS; }

int ncclCommWindowRegister() { return SUCCESS; }

int ncclCommWindowDeregister() { return SUCCESS; }

int ncclMemAlloc(void **out, size_t bytes) {
  *out = malloc(bytes);
  return SUCCESS;
}

int ncclMemFree(void *start) {
  free(start);
  return SUCCESS;
}

int ncclRedOpCreatePreMulSum(int *operation) {
  *operation = 0;
  return SUCCESS;
}

int ncclRedOpDestroy() { return SUCCESS; }

/* What stands between start and end is one launch on a card. */
int ncclGroupStart(void) {
  nullgpu_log("GROUP start");
  return SUCCESS;
}

int ncclGroupEnd(void) {
  nullgpu_log("GROUP end");
  return SUCCESS;
}

int ncclAllReduce(const void *in, void *out, size_t n, int type, int op, struct communicator *c, void *stream) {
  return noted("all_reduce", n, type, -1, c, stream);
}

int ncclAllGather(const void *in, void *out, size_t n, int type, struct communicator *c, void *stream) {
  return noted("all_gather", n, type, -1, c, stream);
}

int ncclReduceScatter(const void *in, void *out, size_t n, int type, int op, struct communicator *c, void *stream) {
  return noted("reduce_scatter", n, type, -1, c, stream);
}

int ncclBroadcast(const void *in, void *out, size_t n, int type, int root, struct communicator *c, void *stream) {
  return noted("broadcast", n, type, root, c, stream);
}

int ncclBcast(void *data, size_t n, int type, int root, struct communicator *c, void *stream) {
  return noted("broadcast", n, type, root, c, stream);
}

int ncclReduce(const void *in, void *out, size_t n, int type, int op, int root, struct communicator *c, void *stream) {
  return noted("reduce", n, type, root, c, stream);
}

int ncclSend(const void *in, size_t n, int type, int peer, struct communicator *c, void *stream) {
  return noted("send", n, type, peer, c, stream);
}

int ncclRecv(void *out, size_t n, int type, int peer, struct communicator *c, void *stream) {
  return noted("recv", n, type, peer, c, stream);
}

int ncclAlltoAll(const void *in, void *out, size_t n, int type, struct communicator *c, void *stream) {
  return noted("all_to_all", n, type, -1, c, stream);
}
