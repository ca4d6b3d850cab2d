/* Monomials of the memory's keys. */

#include "common.h"
#include "vectors.h"

enum { GROUP = 8 };

typedef struct {
  const float *key;       /* [B, T, R] */
  const int32_t *factors; /* [degrees, M, F], indices into a key; R stands for 1 */
  const float *weight;    /* [degrees, M] */
  const int32_t *degree;  /* [B] */
  void *out;              /* [B, T, M] */
  int64_t tokens, size, features, order;
} Monomials;

static inline int64_t groups_of(const Monomials *task) { return (task->tokens + GROUP - 1) / GROUP; }

/* To the nearest number of 16 bits, to the even one of two. */
static inline __m256i rounded(__m512 x) {
  __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

/* The features of a few tokens of a row: their factors are looked up once. */
static inline __attribute__((always_inline)) void monomials_of(const Monomials *task, int64_t part, bool rounds) {
  int64_t row = part / groups_of(task), first = part % groups_of(task) * GROUP;
  int64_t count = task->tokens - first < GROUP ? task->tokens - first : GROUP;
  int64_t degree = task->degree[row], token = row * task->tokens + first;
  const int32_t *factors = task->factors + degree * task->features * task->order;
  const float *weight = task->weight + degree * task->features;
  float key[GROUP][task->size + 1];
  for (int64_t t = 0; t < count; t++) {
    memcpy(key[t], task->key + (token + t) * task->size, (size_t)task->size * sizeof(float));
    key[t][task->size] = 1.0f;
  }
  const __m512i one = _mm512_set1_epi32((int32_t)task->size);
  const __m512i step = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32((int32_t)task->order));
  for (int64_t i = 0; i < task->features; i += 16) {
    __m512 product[GROUP];
    for (int64_t t = 0; t < count; t++) product[t] = _mm512_loadu_ps(weight + i);
    for (int64_t f = 0; f < task->order; f++) {
      __m512i at = _mm512_i32gather_epi32(step, factors + i * task->order + f, 4);
      if (!_mm512_cmpneq_epi32_mask(at, one)) continue;
      for (int64_t t = 0; t < count; t++) product[t] = _mm512_mul_ps(product[t], _mm512_i32gather_ps(at, key[t], 4));
    }
    for (int64_t t = 0; t < count; t++) {
      int64_t place = (token + t) * task->features + i;
      if (rounds) _mm256_storeu_si256((__m256i *)((uint16_t *)task->out + place), rounded(product[t]));
      else _mm512_storeu_ps((float *)task->out + place, product[t]);
    }
  }
}

static void monomials_part(const void *data, int64_t part) { monomials_of(data, part, false); }

static void rounded_monomials_part(const void *data, int64_t part) { monomials_of(data, part, true); }

static XLA_FFI_Error *monomials(XLA_FFI_CallFrame *frame, Part *run) {
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
  run_parts(frame, run, &task, key->dims[0] * groups_of(&task));
  return NULL;
}

/* (key f32 [B, T, R], factors s32 [degrees, M, F], weight f32 [degrees, M], degree s32 [B]) -> f32 [B, T, M];
   M a multiple of 16. */
EXPORT XLA_FFI_Error *atlas_monomials(XLA_FFI_CallFrame *frame) { return monomials(frame, monomials_part); }

/* The same -> bf16 [B, T, M]. */
EXPORT XLA_FFI_Error *atlas_rounded_monomials(XLA_FFI_CallFrame *frame) { return monomials(frame, rounded_monomials_part); }
