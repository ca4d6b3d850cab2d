/* Attention over int8 pages: softmax over a row's pages and sinks, for each row and KV head on its own: one page's scores at
   a time, then the weighted sum of values in float32. A key that is not seen weighs exactly 0; a page nobody sees is not
   read. */

#include "common.h"
#include "vectors.h"

enum { PAGE = 128 };

typedef struct {
  const float *q, *q_sink;         /* [B, T, H, D] */
  const int8_t *k, *v;             /* [B, N, K, P, D] */
  const float *k_scale, *v_scale;  /* [B, N, K, P] */
  const float *sink_k, *sink_v;    /* [B, K, S, D] */
  const uint8_t *seen, *sinks_seen; /* [B, T, N, P], [B, T] */
  const float *scale;
  float *out; /* [B, T, H, D] */
  int64_t tokens, heads, kv_heads, dim, pages, sinks;
} Attention;

/* One query of one head. */
typedef struct {
  const float *q_sink;
  float *out;
  const uint8_t *seen;
  int8_t *rounded; /* [D] */
  float *score;    /* [N · P], later the weights */
  float *total;    /* [D] */
  float unit, peak, mass, sink_score[16];
  int32_t offset;
  int64_t sinks;
} Query;

enum { TOGETHER = 4, TOKENS = 8 };

static void round_query(Query *query, const float *q, int64_t dim, float scale) {
  float largest = 1e-30f;
  for (int64_t d = 0; d < dim; d++) largest = __builtin_fabsf(q[d]) > largest ? __builtin_fabsf(q[d]) : largest;
  int32_t sum = 0;
  for (int64_t d = 0; d < dim; d++) {
    query->rounded[d] = (int8_t)__builtin_rintf(q[d] * (127.0f / largest));
    sum += query->rounded[d];
  }
  query->offset = 128 * sum;
  query->unit = largest * (1.0f / 127.0f) * scale;
  memset(query->total, 0, sizeof(float) * (size_t)dim);
}

/* Scores of a page's keys, the largest of them, and −1e30 for those not seen. */
static inline __attribute__((always_inline)) __m512 score_page_of(const Query *query, const int8_t *keys,
                                                                  const float *scale, int64_t n, int64_t dim,
                                                                  __m512 peak) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  for (int64_t p = 0; p < PAGE; p += 16) {
    __m512i dots[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) dots[i] = _mm512_setzero_si512();
    for (int64_t d = 0; d < dim; d += 64) {
      __m512i q = _mm512_loadu_si512(query->rounded + d);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        dots[i] = _mm512_dpbusd_epi32(dots[i], _mm512_xor_si512(_mm512_loadu_si512(keys + (p + i) * dim + d), flip), q);
    }
    __m512i whole = _mm512_sub_epi32(lane_sums(dots), _mm512_set1_epi32(query->offset));
    __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(query->unit));
    found = _mm512_mul_ps(found, _mm512_loadu_ps(scale + p));
    __m128i mask = _mm_loadu_si128((const __m128i *)(query->seen + n * PAGE + p));
    found = _mm512_mask_blend_ps(_mm_test_epi8_mask(mask, mask), _mm512_set1_ps(-1e30f), found);
    peak = _mm512_max_ps(peak, found);
    _mm512_storeu_ps(query->score + n * PAGE + p, found);
  }
  return peak;
}

/* For the common size the loop over dimensions is gone, and all sums stay in registers. */
static __m512 score_page(const Query *query, const int8_t *keys, const float *scale, int64_t n, int64_t dim, __m512 peak) {
  return dim == 64 ? score_page_of(query, keys, scale, n, 64, peak) : score_page_of(query, keys, scale, n, dim, peak);
}

/* Adds a page's values to the totals of all queries, each by its weights. */
static void add_values(Query *query, const int8_t *values, int64_t n, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64) {
    __m512 sum[TOGETHER * 4];
#pragma GCC unroll 16
    for (int i = 0; i < TOGETHER * 4; i++) sum[i] = _mm512_loadu_ps(query[i / 4].total + d + i % 4 * 16);
    const float *weight[TOGETHER];
#pragma GCC unroll 4
    for (int j = 0; j < TOGETHER; j++) weight[j] = query[j].score + n * PAGE;
    for (int64_t p = 0; p < PAGE; p++) {
      const int8_t *value = values + p * dim + d;
      __m512 v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        v[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(value + 16 * i))));
#pragma GCC unroll 16
      for (int i = 0; i < TOGETHER * 4; i++) sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(weight[i / 4][p]), v[i % 4], sum[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < TOGETHER * 4; i++) _mm512_storeu_ps(query[i / 4].total + d + i % 4 * 16, sum[i]);
  }
}

/* Some tokens of one row and KV head, a few queries at a time. */
static void attention_part(const void *data, int64_t part) {
  const Attention *task = data;
  int64_t blocks = (task->tokens + TOKENS - 1) / TOKENS;
  int64_t first = part % blocks * TOKENS, row = part / blocks, b = row / task->kv_heads, kv = row % task->kv_heads;
  int64_t tokens = task->tokens - first < TOKENS ? task->tokens - first : TOKENS;
  int64_t groups = task->heads / task->kv_heads, dim = task->dim, keys = task->pages * PAGE;
  const float *sink_k = task->sink_k + row * task->sinks * dim, *sink_v = task->sink_v + row * task->sinks * dim;
  size_t room = (size_t)(keys + dim) * sizeof(float) + (size_t)dim;
  char *memory = malloc(room * TOGETHER);
  if (!memory) abort();
  for (int64_t i = 0; i < tokens * groups; i += TOGETHER) {
    Query query[TOGETHER];
    int count = tokens * groups - i < TOGETHER ? (int)(tokens * groups - i) : TOGETHER;
    for (int j = 0; j < TOGETHER; j++) {
      query[j].score = (float *)(memory + room * (size_t)j);
      query[j].total = query[j].score + keys;
      query[j].rounded = (int8_t *)(query[j].total + dim);
      if (j >= count) { /* nobody: weights of 0 */
        memset(query[j].score, 0, sizeof(float) * (size_t)(keys + dim));
        continue;
      }
      int64_t t = b * task->tokens + first + (i + j) / groups;
      int64_t place = (t * task->heads + kv * groups + (i + j) % groups) * dim;
      query[j].out = task->out + place;
      query[j].q_sink = task->q_sink + place;
      query[j].seen = task->seen + t * keys;
      query[j].sinks = task->sinks_seen[t] ? task->sinks : 0;
      round_query(&query[j], task->q + place, dim, *task->scale);
    }
    bool used[task->pages];
    for (int64_t n = 0; n < task->pages; n++) {
      __m512i any = _mm512_setzero_si512();
      for (int j = 0; j < count; j++)
        for (int64_t p = 0; p < PAGE; p += 64) any = _mm512_or_si512(any, _mm512_loadu_si512(query[j].seen + n * PAGE + p));
      used[n] = _mm512_test_epi8_mask(any, any) != 0;
    }
    for (int j = 0; j < count; j++) {
      __m512 peak = _mm512_set1_ps(-1e30f);
      for (int64_t n = 0; n < task->pages; n++) {
        int64_t page = ((b * task->pages + n) * task->kv_heads + kv) * PAGE;
        if (used[n]) peak = score_page(&query[j], task->k + page * dim, task->k_scale + page, n, dim, peak);
      }
      query[j].peak = _mm512_reduce_max_ps(peak);
      for (int64_t s = 0; s < query[j].sinks; s++) {
        __m512 dot = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += 16)
          dot = _mm512_fmadd_ps(_mm512_loadu_ps(query[j].q_sink + d), _mm512_loadu_ps(sink_k + s * dim + d), dot);
        float score = _mm512_reduce_add_ps(dot) * *task->scale;
        query[j].sink_score[s] = score;
        query[j].peak = score > query[j].peak ? score : query[j].peak;
      }
      __m512 mass = _mm512_setzero_ps();
      for (int64_t n = 0; n < task->pages; n++) {
        int64_t page = ((b * task->pages + n) * task->kv_heads + kv) * PAGE;
        float *weight = query[j].score + n * PAGE;
        for (int64_t p = 0; used[n] && p < PAGE; p += 16) {
          __m512 w = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(weight + p), _mm512_set1_ps(query[j].peak)));
          mass = _mm512_add_ps(mass, w);
          _mm512_storeu_ps(weight + p, _mm512_mul_ps(w, _mm512_loadu_ps(task->v_scale + page + p)));
        }
      }
      query[j].mass = _mm512_reduce_add_ps(mass);
    }
    for (int64_t n = 0; n < task->pages; n++)
      if (used[n]) add_values(query, task->v + ((b * task->pages + n) * task->kv_heads + kv) * PAGE * dim, n, dim);
    for (int j = 0; j < count; j++) {
      float *total = query[j].total;
      for (int64_t s = 0; s < query[j].sinks; s++) {
        __m512 w = exp_ps(_mm512_set1_ps(query[j].sink_score[s] - query[j].peak));
        query[j].mass += _mm512_cvtss_f32(w);
        for (int64_t d = 0; d < dim; d += 16)
          _mm512_storeu_ps(total + d, _mm512_fmadd_ps(w, _mm512_loadu_ps(sink_v + s * dim + d), _mm512_loadu_ps(total + d)));
      }
      for (int64_t d = 0; d < dim; d++) query[j].out[d] = total[d] / query[j].mass;
    }
  }
  free(memory);
}

/* (q, q_sink f32 [B, T, H, D]; k int8 [B, N, K, P, D], its scale f32 [B, N, K, P]; v and its scale; sink_k, sink_v f32
   [B, K, S, D]; seen bool [B, T, N, P]; sinks_seen bool [B, T]; scale f32 []) -> f32 [B, T, H, D];
   D a multiple of 64, P = 128, S ≤ 16. */
EXPORT XLA_FFI_Error *atlas_attention(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *q = argument(frame, 0), *k = argument(frame, 2), *sink_k = argument(frame, 6);
  Attention task = {.q = q->data,
                    .q_sink = argument(frame, 1)->data,
                    .k = k->data,
                    .k_scale = argument(frame, 3)->data,
                    .v = argument(frame, 4)->data,
                    .v_scale = argument(frame, 5)->data,
                    .sink_k = sink_k->data,
                    .sink_v = argument(frame, 7)->data,
                    .seen = argument(frame, 8)->data,
                    .sinks_seen = argument(frame, 9)->data,
                    .scale = argument(frame, 10)->data,
                    .out = result(frame, 0)->data,
                    .tokens = q->dims[1],
                    .heads = q->dims[2],
                    .kv_heads = k->dims[2],
                    .dim = q->dims[3],
                    .pages = k->dims[1],
                    .sinks = sink_k->dims[2]};
  if (task.dim % 64 || k->dims[3] != PAGE || task.sinks > 16) return failed(frame, "atlas_attention: shape");
  run_parts(frame, attention_part, &task, q->dims[0] * task.kv_heads * ((task.tokens + TOKENS - 1) / TOKENS));
  return NULL;
}
