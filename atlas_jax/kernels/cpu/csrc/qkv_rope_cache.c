/* What happens to a step's heads between the QKV GEMM and attention: queries and keys are normed and rotated,
   keys and values stored in the ring, and some of the queries noted where pairs are kept.

   XLA makes several programs of this, each of one thread (Gemma 3 270M, medians in one run: a decode step of 16 rows 22.1 ms,
   20.1 with this; 128 tokens of a prompt 37.5 and 35.4). */

#include "common.h"
#include "vectors.h"

enum { PAGE = 128, TOKENS = 4 };

/* Keys, or values. */
typedef struct {
  int8_t *values; /* [B, N, K, P, D] */
  float *scale;   /* [B, N, K, P] */
} Ring;

/* Cosines and sines of every token, [B, T, half]. */
typedef struct {
  const float *cos, *sin;
} Rotation;

typedef struct {
  const float *heads;           /* [B, T, K, G + 2, D]: a key's queries, the key, its value */
  const float *q_gain, *k_gain; /* [D], if they are normed */
  float eps;
  Rotation near, far; /* how queries meet sinks, and everything else */
  const int32_t *slot, *positions; /* [B], [B, T] */
  const uint8_t *valid;            /* [B, T] */
  Ring k, v;
  float *q, *q_sink; /* [B, T, H, D] */
  int8_t *noted;     /* [B, samples, H, D]: the last query of every stretch of a page, if there are samples */
  float *noted_scale; /* [B, samples, H] */
  int64_t batch, tokens, kv_heads, groups, dim, half, pages, samples;
} Heads;

/* Rotates pairs (i, i + half); what is behind them stays. */
static void rotate(const Heads *task, Rotation by, int64_t token, const float *x, float *out) {
  const float *cos = by.cos + token * task->half, *sin = by.sin + token * task->half;
  for (int64_t i = 0; i < task->half; i += 16) {
    __m512 first = _mm512_loadu_ps(x + i), second = _mm512_loadu_ps(x + i + task->half);
    __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    _mm512_storeu_ps(out + i, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
    _mm512_storeu_ps(out + i + task->half, _mm512_fmadd_ps(first, s, _mm512_mul_ps(second, c)));
  }
  for (int64_t i = 2 * task->half; i < task->dim; i += 16) _mm512_storeu_ps(out + i, _mm512_loadu_ps(x + i));
}

static const float *normed(const Heads *task, const float *x, const float *gain, float *room) {
  if (!gain) return x;
  norm_row(x, gain, task->eps, task->dim, room);
  return room;
}

/* Quantises a key or value and stores it where the token goes. */
static void store(const Heads *task, Ring ring, int64_t token, int64_t kv, const float *x) {
  const int64_t b = token / task->tokens;
  int64_t place = ((b * task->pages + task->slot[b]) * task->kv_heads + kv) * PAGE + task->positions[token] % PAGE;
  ring.scale[place] = quantize_term(x, task->dim, ring.values + place * task->dim);
}

/* Notes a query of head `head` if it is its stretch's. */
static void note(const Heads *task, int64_t token, int64_t head, const float *q) {
  const int64_t stretch = PAGE / task->samples, offset = task->positions[token] % PAGE;
  if (offset % stretch != stretch - 1) return;
  const int64_t sample = token / task->tokens * task->samples + offset / stretch;
  const int64_t place = sample * task->kv_heads * task->groups + head;
  task->noted_scale[place] = quantize_term(q, task->dim, task->noted + place * task->dim);
}

static void qkv_rope_cache_part(const void *data, int64_t part) {
  const Heads *task = data;
  const int64_t dim = task->dim, first = part * TOKENS, most = task->batch * task->tokens;
  float made[dim] __attribute__((aligned(64))), rotated[dim] __attribute__((aligned(64)));
  for (int64_t token = first; token < first + TOKENS && token < most; token++)
    for (int64_t kv = 0; kv < task->kv_heads; kv++) {
      const float *x = task->heads + (token * task->kv_heads + kv) * (task->groups + 2) * dim;
      for (int64_t g = 0; g < task->groups; g++, x += dim) {
        const int64_t head = kv * task->groups + g, place = (token * task->kv_heads * task->groups + head) * dim;
        const float *q = normed(task, x, task->q_gain, made);
        rotate(task, task->far, token, q, task->q + place);
        rotate(task, task->near, token, q, task->q_sink + place);
        if (task->samples && task->valid[token]) note(task, token, head, task->q + place);
      }
      if (!task->valid[token]) continue;
      rotate(task, task->far, token, normed(task, x, task->k_gain, made), rotated);
      store(task, task->k, token, kv, rotated);
      store(task, task->v, token, kv, x + dim);
    }
}

/* (heads f32 [B, T, K, G + 2, D]; cos, sin, near_cos, near_sin f32 [B, T, half]; slot i32 [B]; positions i32 [B, T]; valid
   bool [B, T]; k int8 [B, N, K, P, D], its scale f32 [B, N, K, P]; v and its scale; if `notes` noted queries int8
   [B, samples, K · G, D] and their scale f32 [B, samples, K · G]; if `norms` q_gain, k_gain f32 [D]) -> q, q_sink f32
   [B, T, K · G, D] and, in place, k and v and what is noted, with their scales; D and half multiples of 16, P = 128. */
EXPORT XLA_FFI_Error *atlas_qkv_rope_cache(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *x = argument(frame, 0), *k = argument(frame, 8);
  const bool notes = *(const int64_t *)attribute(frame, "notes"), norms = *(const int64_t *)attribute(frame, "norms");
  Heads task = {.heads = x->data,
                .far = {argument(frame, 1)->data, argument(frame, 2)->data},
                .near = {argument(frame, 3)->data, argument(frame, 4)->data},
                .slot = argument(frame, 5)->data,
                .positions = argument(frame, 6)->data,
                .valid = argument(frame, 7)->data,
                .q = result(frame, 0)->data,
                .q_sink = result(frame, 1)->data,
                .k = {result(frame, 2)->data, result(frame, 3)->data},
                .v = {result(frame, 4)->data, result(frame, 5)->data},
                .eps = *(const float *)attribute(frame, "eps"),
                .batch = x->dims[0],
                .tokens = x->dims[1],
                .kv_heads = x->dims[2],
                .groups = x->dims[3] - 2,
                .dim = x->dims[4],
                .half = argument(frame, 1)->dims[2],
                .pages = k->dims[1]};
  if (notes) {
    task.noted = result(frame, 6)->data;
    task.noted_scale = result(frame, 7)->data;
    task.samples = argument(frame, 12)->dims[1];
  }
  if (norms) {
    task.q_gain = argument(frame, notes ? 14 : 12)->data;
    task.k_gain = argument(frame, notes ? 15 : 13)->data;
  }
  if (task.dim % 16 || task.half % 16 || 2 * task.half > task.dim || k->dims[3] != PAGE ||
      (notes && (task.samples < 1 || task.samples > PAGE)))
    return failed(frame, "atlas_qkv_rope_cache: shape");
  run_parts(frame, qkv_rope_cache_part, &task, (task.batch * task.tokens + TOKENS - 1) / TOKENS);
  return NULL;
}
