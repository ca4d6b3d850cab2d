/* CPU kernels of a decode step, called from compiled JAX functions through XLA's foreign function interface.

   XLA's own int8 GEMMs took 1.3 to 4 times as long for 2 to 256 rows of SmolLM2-135M's weights (medians, two shared cores
   with AMX). These read weights, keys and values once, as they lie. Dot products are exact integers, and what a row
   gets depends on that row alone, so results are the same for any batch, any number of threads, and with or without
   draft tokens. The definitions are `linear` and `ref_window_attention` in Python; the tests compare. */

#ifndef ATLAS_COMMON_H
#define ATLAS_COMMON_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

/* Called from Python; everything else stays inside the library. */
#define EXPORT __attribute__((visibility("default")))

/* Whether the processor has AMX; known once `atlas_supported` has been asked. */
extern bool atlas_has_tiles;

/* One part of a call's work. */
typedef void Part(const void *task, int64_t part);

/* Does all parts, on as many of XLA's threads as are free; returns when they are done. */
void run_parts(const XLA_FFI_CallFrame *frame, Part *run, const void *task, int64_t parts);

int64_t pool_threads(const XLA_FFI_CallFrame *frame);

XLA_FFI_Error *failed(const XLA_FFI_CallFrame *frame, const char *message);

/* XLA first asks every handler for the version it was built for. */
bool asked_for_version(XLA_FFI_CallFrame *frame);

/* Bytes filled up to whole cache lines. */
static inline int64_t in_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* A thread's own room for what a call works on. It is kept: these are threads of a pool, and fresh pages cost as much as a
   GEMM. */
typedef struct {
  char *bytes;
  int64_t size;
} Room;

/* At least so many bytes, aligned to cache lines; NULL if there are none. */
static inline char *grown(Room *room, int64_t needed) {
  if (room->size < needed) {
    free(room->bytes);
    room->bytes = aligned_alloc(64, (size_t)in_lines(needed));
    room->size = room->bytes ? needed : 0;
  }
  return room->bytes;
}

static inline XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *frame, int index) { return frame->args.args[index]; }

static inline XLA_FFI_Buffer *result(const XLA_FFI_CallFrame *frame, int index) { return frame->rets.rets[index]; }

/* The value of a scalar attribute, of the type Python gave it; a call without it is a fault of ours. */
static inline const void *attribute(const XLA_FFI_CallFrame *frame, const char *name) {
  const XLA_FFI_Attrs *attrs = &frame->attrs;
  for (int64_t i = 0; i < attrs->size; i++)
    if (attrs->names[i]->len == strlen(name) && !memcmp(attrs->names[i]->ptr, name, attrs->names[i]->len))
      return ((const XLA_FFI_Scalar *)attrs->attrs[i])->value;
  abort();
}

#endif
