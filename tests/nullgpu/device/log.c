/* The log: one line per thing that the program asked of the device, in order, for ../device_log.py to read. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char **lines;
static long count, room;

void nullgpu_log(const char *format, ...) {
  char *line;
  va_list arguments;
  va_start(arguments, format);
  if (vasprintf(&line, format, arguments) < 0) abort();
  va_end(arguments);
  pthread_mutex_lock(&lock);
  if (count == room) {
    room = room ? 2 * room : 4096;
    lines = realloc(lines, room * sizeof *lines);
    if (!lines) abort();
  }
  lines[count++] = line;
  pthread_mutex_unlock(&lock);
}

/* For Python, through ctypes: forget all lines; how many there are; one of them. */
void nullgpu_reset(void) {
  pthread_mutex_lock(&lock);
  for (long i = 0; i < count; i++) free(lines[i]);
  count = 0;
  pthread_mutex_unlock(&lock);
}

long nullgpu_size(void) { return count; }

const char *nullgpu_line(long i) { return i < count ? lines[i] : ""; }
