/* One call of the product outside XLA, on one thread: reads "tiles rows inner outputs record" from the arguments, x,
   weight and scale from the standard input, and writes the result to the standard output. A record is the bytes of 64
   weights, or of 256 above 64. */

#include "common.h"

#include <stdio.h>

bool atlas_has_tiles;

void run_parts(const XLA_FFI_CallFrame *frame, Part *run, const void *task, int64_t parts) {
  (void)frame;
  for (int64_t part = 0; part < parts; part++) run(task, part);
}

int64_t pool_threads(const XLA_FFI_CallFrame *frame) {
  (void)frame;
  return 2;
}

XLA_FFI_Error *failed(const XLA_FFI_CallFrame *frame, const char *message) {
  (void)frame;
  fprintf(stderr, "%s\n", message);
  exit(1);
}

bool asked_for_version(XLA_FFI_CallFrame *frame) {
  (void)frame;
  return false;
}

XLA_FFI_Error *atlas_linear(XLA_FFI_CallFrame *);

static void *given(size_t bytes) {
  void *data = aligned_alloc(64, (size_t)in_lines((int64_t)bytes));
  if (!data || fread(data, 1, bytes, stdin) != bytes) exit(2);
  return data;
}

int main(int count, char **words) {
  if (count != 6) return 2;
  int64_t rows = atoi(words[2]), inner = atoi(words[3]), outputs = atoi(words[4]);
  int64_t record = atoi(words[5]), records = inner / (record > 64 ? 256 : 64);
  bool coded = record != 64;
  atlas_has_tiles = atoi(words[1]);
  int64_t x_dims[] = {rows, inner}, scale_dims[] = {outputs}, out_dims[] = {rows, outputs};
  int64_t weight_dims[] = {outputs, coded ? records : inner, record};
  size_t bytes = (size_t)(rows * outputs) * sizeof(float);
  XLA_FFI_Buffer x = {.data = given((size_t)(rows * inner) * sizeof(float)), .rank = 2, .dims = x_dims};
  XLA_FFI_Buffer weight = {.data = given((size_t)(outputs * records * record)),
                           .dtype = coded ? XLA_FFI_DataType_U8 : XLA_FFI_DataType_S8,
                           .rank = 2 + coded,
                           .dims = weight_dims};
  XLA_FFI_Buffer scale = {.data = given((size_t)outputs * sizeof(float)), .rank = 1, .dims = scale_dims};
  XLA_FFI_Buffer out = {.data = aligned_alloc(64, (size_t)in_lines((int64_t)bytes)), .rank = 2, .dims = out_dims};
  void *arguments[] = {&x, &weight, &scale}, *results[] = {&out};
  XLA_FFI_CallFrame frame = {0};
  frame.args.args = arguments;
  frame.rets.rets = results;
  atlas_linear(&frame);
  return fwrite(out.data, 1, bytes, stdout) == bytes ? 0 : 2;
}
