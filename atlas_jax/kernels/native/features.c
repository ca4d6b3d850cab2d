/* Features of the memory's keys. */

#include "common.h"
#include "vectors.h"

typedef struct {
  const float *key;       /* [B, T, R] */
  const int32_t *factors; /* [degrees, M, F], indices into a key; R stands for 1 */
  const float *weight;    /* [degrees, M] */
  const int32_t *degree;  /* [B] */
  float *out;             /* [B, T, M] */
  int64_t tokens, size, features, order;
} Monomials;

static void monomials_part(const void *data, int64_t part) {
  const Monomials *task = data;
  int64_t degree = task->degree[part / task->tokens];
  const int32_t *factors = task->factors + degree * task->features * task->order;
  const float *weight = task->weight + degree * task->features;
  float *out = task->out + part * task->features, key[task->size + 1];
  memcpy(key, task->key + part * task->size, (size_t)task->size * sizeof(float));
  key[task->size] = 1.0f;
  const __m512i step = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32((int32_t)task->order));
  for (int64_t i = 0; i < task->features; i += 16) {
    __m512 product = _mm512_loadu_ps(weight + i);
    for (int64_t f = 0; f < task->order; f++) {
      __m512i at = _mm512_i32gather_epi32(step, factors + i * task->order + f, 4);
      product = _mm512_mul_ps(product, _mm512_i32gather_ps(at, key, 4));
    }
    _mm512_storeu_ps(out + i, product);
  }
}

/* (key f32 [B, T, R], factors s32 [degrees, M, F], weight f32 [degrees, M], degree s32 [B]) -> f32 [B, T, M];
   M a multiple of 16. */
EXPORT XLA_FFI_Error *atlas_monomials(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *key = argument(frame, 0), *factors = argument(frame, 1);
  Monomials task = {.key = key->data,
                    .factors = factors->data,
                    .weight = argument(frame, 2)->data,
                    .degree = argument(frame, 3)->data,
                    .out = result(frame, 0)->data,
                    .tokens = key->dims[1],
                    .size = key->dims[2],
                    .features = factors->dims[1],
                    .order = factors->dims[2]};
  if (task.features % 16) return failed(frame, "atlas_monomials: shape");
  run_parts(frame, monomials_part, &task, key->dims[0] * task.tokens);
  return NULL;
}
