/* Attention over int8 pages, and packed kept pairs: softmax over a row's pages and sinks, for each row and KV head on its
   own: one page's scores at a time, then the weighted sum of values, exact for a page. A key that is not seen weighs exactly
   0; a page nobody sees is not read. */

#include "attention.h"

typedef struct {
  const float *q, *q_sink;         /* [B, T, H, D] */
  Pairs k, v;                      /* [B, N, K, P, D] */
  const float *sink_k, *sink_v;    /* [B, K, S, D] */
  const uint8_t *seen, *sinks_seen; /* [B, T, N, P], [B, T] */
  const float *scale;
  Pairs kept_k, kept_v; /* [B, M, K, P, D]; pages of all layers */
  const float *null_logit; /* [H], or NULL */
  const int32_t *kept;  /* [B, 2]: the layer's first page, and its pairs; or NULL */
  float *out;           /* [B, T, H, D] */
  int64_t tokens, heads, kv_heads, dim, pages, pool_pages, most_pages, sinks; /* most: that any row has filled */
} Attention;

/* A page of one KV head, of the ring or kept. */
typedef struct {
  Pairs k, v;
  const uint8_t *filled; /* what every token sees of a kept one */
  Seen seen;
} Page;

/* One query of one head. */
typedef struct {
  const float *q_sink;
  float *out;
  const uint8_t *seen;
  Terms ring, kept;
  float *score; /* [N + kept pages, P], later the weights */
  float *total; /* [D] */
  float peak, mass, null_score, sink_score[MOST_SINKS];
  int64_t sinks;
} Query;

/* Queries that meet a page's values together, and tokens of one part. */
enum { TOGETHER = 3, TOKENS = 8 };
/* Where the worth of a unit of a page's weights is kept: behind two bytes for each of them. */
enum { UNIT = PAGE / 2 };

/* 64 columns, from `place` on, of `count` of a page's values as [count / 4, 4, 16] of four bytes each: a vector has what 16
   columns of four tokens multiply with the same four weights. Number 4l + e of vector i is column 16l + 4i + e. */
static inline __attribute__((always_inline)) void repack_values(const Pairs *values, int bits, int64_t place,
                                                                int64_t count, int64_t dim, __m512i *packed) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  for (int64_t p = 0; p < count; p += 4, packed += 4) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = _mm512_xor_si512(flipped_numbers(values, place + (p + i) * dim, bits), flip);
    __m512i low = _mm512_unpacklo_epi8(v[0], v[1]), high = _mm512_unpackhi_epi8(v[0], v[1]);
    __m512i low2 = _mm512_unpacklo_epi8(v[2], v[3]), high2 = _mm512_unpackhi_epi8(v[2], v[3]);
    _mm512_store_si512(packed, _mm512_unpacklo_epi16(low, low2));
    _mm512_store_si512(packed + 1, _mm512_unpackhi_epi16(low, low2));
    _mm512_store_si512(packed + 2, _mm512_unpacklo_epi16(high, high2));
    _mm512_store_si512(packed + 3, _mm512_unpackhi_epi16(high, high2));
  }
}

/* Adds 64 columns of a page's values to the totals of `count` queries, each by its weights in 16 bits; sums are exact (128
   tokens over 32 pages, one core, 64 and 256 columns: 8.4 and 11.4 ms; 10.3 and 18.8 with sums in float32). */
static inline __attribute__((always_inline)) void add_values_to(Query *query, int count, const __m512i *packed, int64_t n,
                                                                Seen seen, int64_t d) {
  __m512i sum[TOGETHER * 8];
  const uint8_t *weight[TOGETHER];
#pragma GCC unroll 24
  for (int i = 0; i < count * 8; i++) sum[i] = _mm512_setzero_si512();
#pragma GCC unroll 3
  for (int j = 0; j < count; j++) weight[j] = (const uint8_t *)(query[j].score + n * PAGE) + 16 * seen.first;
  for (int64_t p = 0; p < 16 * seen.count; p += 4, packed += 4) {
    const __m512i v[4] = {packed[0], packed[1], packed[2], packed[3]};
#pragma GCC unroll 6
    for (int j = 0; j < count * 2; j++) {
      int32_t four;
      memcpy(&four, weight[j / 2] + j % 2 * PAGE + p, sizeof four);
      const __m512i w = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) add_dots(&sum[j * 4 + i], w, v[i]);
    }
  }
#pragma GCC unroll 3
  for (int j = 0; j < count; j++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      float *total = query[j].total + d + i * 16;
      const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(sum[j * 8 + i], 8), sum[j * 8 + 4 + i]);
      const __m512 unit = _mm512_set1_ps(query[j].score[n * PAGE + UNIT]);
      _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), unit, _mm512_loadu_ps(total)));
    }
}

/* Adds a page's values to the totals of `count` queries. */
static void add_values(Query *query, int count, const Pairs *values, int64_t n, Seen seen, int64_t dim, __m512i *packed) {
  for (int64_t d = 0; d < dim; d += 64) {
    const int64_t place = 16 * seen.first * dim + d;
    if (values->bits == VALUE_BITS) repack_values(values, VALUE_BITS, place, 16 * seen.count, dim, packed);
    else repack_values(values, RING_BITS, place, 16 * seen.count, dim, packed);
    for (int j = 0; j < count; j += TOGETHER) switch (count - j) {
        case 1: add_values_to(query + j, 1, packed, n, seen, d); break;
        case 2: add_values_to(query + j, 2, packed, n, seen, d); break;
        default: add_values_to(query + j, TOGETHER, packed, n, seen, d);
      }
  }
}

/* Totals as columns: of every 64, number 16i + 4l + e is that of column 16l + 4i + e. */
static void in_columns(float *total, int64_t dim) {
  for (float *last = total + dim; total < last; total += 64) {
    __m512 v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_ps(total + 16 * i);
    __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
    __m512 c = _mm512_shuffle_f32x4(v[0], v[1], 0xee), e = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    _mm512_storeu_ps(total, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(total + 16, _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(total + 32, _mm512_shuffle_f32x4(c, e, 0x88));
    _mm512_storeu_ps(total + 48, _mm512_shuffle_f32x4(c, e, 0xdd));
  }
}

/* Scores of a page become weights, not yet divided by the sum of all, times the scales of its values: 16 bits, the upper
   bytes of all before the lower ones, and what one unit of them is worth. Returns the sum of weights so far. */
static inline __attribute__((always_inline)) __m512 weigh_groups(float *page, const float *scale, int first, int count,
                                                                 float peak, __m512 mass) {
  __m512 w[GROUPS], largest = _mm512_setzero_ps();
  const float *score = page + 16 * first;
  scale += 16 * first;
#pragma GCC unroll 8
  for (int g = 0; g < count; g++) {
    w[g] = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(score + 16 * g), _mm512_set1_ps(peak)));
    mass = _mm512_add_ps(mass, w[g]);
    w[g] = _mm512_mul_ps(w[g], _mm512_loadu_ps(scale + 16 * g));
    largest = _mm512_max_ps(largest, w[g]);
  }
  const float top = _mm512_reduce_max_ps(_mm512_max_ps(largest, _mm512_set1_ps(1e-30f)));
  const __m512 inverse = _mm512_set1_ps(65535.0f / top);
#pragma GCC unroll 8
  for (int g = 0; g < count; g++) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(w[g], inverse));
    _mm_storeu_si128((__m128i *)page + first + g, _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
    _mm_storeu_si128((__m128i *)page + GROUPS + first + g, _mm512_cvtepi32_epi8(whole));
  }
  page[UNIT] = top * (1.0f / 65535.0f);
  return mass;
}

static __m512 weigh_page(float *page, const float *scale, Seen seen, float peak, __m512 mass) {
  switch (seen.count) {
    case 2: return weigh_groups(page, scale, seen.first, 2, peak, mass);
    case 4: return weigh_groups(page, scale, seen.first, 4, peak, mass);
    case 6: return weigh_groups(page, scale, seen.first, 6, peak, mass);
    default: return weigh_groups(page, scale, seen.first, 8, peak, mass);
  }
}

/* Softmax of a query's scores and sinks: its weights, not yet divided by their sum, times the scales of the values. */
static void weigh(const Attention *task, Query *query, const Page *page, int64_t pages, const float *sink_k) {
  query->peak = score_sinks(query->q_sink, sink_k, query->sinks, task->dim, *task->scale, query->sink_score, query->peak);
  query->peak = query->null_score > query->peak ? query->null_score : query->peak;
  __m512 mass = _mm512_setzero_ps();
  for (int64_t n = 0; n < pages; n++)
    if (page[n].seen.count) mass = weigh_page(query->score + n * PAGE, page[n].v.scale, page[n].seen, query->peak, mass);
  query->mass = _mm512_reduce_add_ps(mass);
  if (task->null_logit) query->mass += _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(query->null_score - query->peak)));
}

/* The pages of a row and KV head; `scale` is room for the scales of the kept ones' keys and values. */
static int64_t pages_of(const Attention *task, int64_t b, int64_t kv, Page *page, float *scale) {
  const int64_t first_kept = task->kept ? task->kept[2 * b] : 0;
  const int32_t kept = task->kept ? task->kept[2 * b + 1] : 0;
  const int64_t filled = filled_pages(kept, task->most_pages);
  for (int64_t n = 0; n < task->pages; n++) {
    const int64_t first = ((b * task->pages + n) * task->kv_heads + kv) * PAGE;
    page[n] = (Page){.k = pairs_from(&task->k, first, task->dim), .v = pairs_from(&task->v, first, task->dim)};
  }
  page += task->pages;
  for (int64_t n = 0; n < filled; n++, scale += 2 * PAGE) {
    const int64_t first = ((b * task->pool_pages + first_kept + n) * task->kv_heads + kv) * PAGE;
    page[n] = (Page){.k = pairs_from(&task->kept_k, first, task->dim),
                     .v = pairs_from(&task->kept_v, first, task->dim),
                     .filled = filled_places(kept, n)};
    page[n].seen = seen_places(page[n].filled);
    page_scale(&page[n].k, page[n].filled, scale);
    page_scale(&page[n].v, page[n].filled, scale + PAGE);
    page[n].k.scale = scale;
    page[n].v.scale = scale + PAGE;
  }
  return task->pages + filled;
}

/* Some tokens of one row and KV head, a few queries at a time. */
static void attention_part(const void *data, int64_t part) {
  static _Thread_local Room room;
  const Attention *task = data;
  int64_t blocks = (task->tokens + TOKENS - 1) / TOKENS;
  int64_t first = part % blocks * TOKENS, row = part / blocks, b = row / task->kv_heads, kv = row % task->kv_heads;
  int64_t tokens = task->tokens - first < TOKENS ? task->tokens - first : TOKENS;
  int64_t groups = task->heads / task->kv_heads, dim = task->dim, ring = task->pages * PAGE;
  const float *sink_k = task->sink_k + row * task->sinks * dim, *sink_v = task->sink_v + row * task->sinks * dim;
  const int64_t most = (task->pages + task->most_pages) * PAGE, scales = 2 * task->most_pages * PAGE * (int64_t)sizeof(float);
  int64_t each = (most + dim) * (int64_t)sizeof(float) + 2 * dim;
  char *memory = grown(&room, PAGE * dim + scales + each * QUERIES);
  if (!memory) abort();
  __m512i *packed = (__m512i *)memory;
  memory += PAGE * dim;
  Page page[task->pages + task->most_pages];
  const int64_t pages = pages_of(task, b, kv, page, (float *)memory), keys = pages * PAGE;
  memory += scales;
  for (int64_t i = 0; i < tokens * groups; i += QUERIES) {
    Query query[QUERIES];
    __m512 peak[QUERIES];
    int count = tokens * groups - i < QUERIES ? (int)(tokens * groups - i) : QUERIES;
    for (int j = 0; j < count; j++) {
      query[j].score = (float *)(memory + each * j);
      query[j].total = query[j].score + keys;
      int8_t *terms = (int8_t *)(query[j].total + dim);
      int64_t t = b * task->tokens + first + (i + j) / groups;
      int64_t place = (t * task->heads + kv * groups + (i + j) % groups) * dim;
      query[j].out = task->out + place;
      query[j].q_sink = task->q_sink + place;
      query[j].seen = task->seen + t * ring;
      query[j].sinks = task->sinks_seen[t] ? task->sinks : 0;
      query[j].null_score = null_score(task->null_logit, kv * groups + (i + j) % groups);
      query[j].ring = query_terms(task->q + place, dim, *task->scale, terms);
      if (pages > task->pages) query[j].kept = query_terms(query[j].q_sink, dim, *task->scale, terms + dim);
      memset(query[j].total, 0, sizeof(float) * (size_t)dim);
      peak[j] = _mm512_set1_ps(-1e30f);
    }
    for (int64_t n = 0; n < pages; n++) {
      Page *own = page + n;
      if (!own->filled) {
        __m512i lower = _mm512_setzero_si512(), upper = lower;
        for (int j = 0; j < count; j += groups - (i + j) % groups) { /* queries of one token see the same */
          lower = _mm512_or_si512(lower, _mm512_loadu_si512(query[j].seen + n * PAGE));
          upper = _mm512_or_si512(upper, _mm512_loadu_si512(query[j].seen + n * PAGE + PAGE / 2));
        }
        own->seen = seen_of(lower, upper);
        if (!own->seen.count) continue;
      }
      const Page *next = n + 1 < pages ? own + 1 : own;
      repack_keys(&own->k, own->v.numbers, next->k.numbers, dim, own->seen, packed);
      for (int j = 0; j < count; j++) {
        const Terms *terms = own->filled ? &query[j].kept : &query[j].ring;
        const uint8_t *places = own->filled ? own->filled : query[j].seen + n * PAGE;
        peak[j] = score_page(terms, packed, own->k.scale, places, dim, own->seen, query[j].score + n * PAGE, peak[j]);
      }
    }
    for (int j = 0; j < count; j++) {
      query[j].peak = _mm512_reduce_max_ps(peak[j]);
      weigh(task, &query[j], page, pages, sink_k);
    }
    for (int64_t n = 0; n < pages; n++)
      if (page[n].seen.count) add_values(query, count, &page[n].v, n, page[n].seen, dim, packed);
    for (int j = 0; j < count; j++) {
      float *total = query[j].total;
      in_columns(total, dim);
      for (int64_t s = 0; s < query[j].sinks; s++) {
        __m512 w = exp_ps(_mm512_set1_ps(query[j].sink_score[s] - query[j].peak));
        query[j].mass += _mm512_cvtss_f32(w);
        for (int64_t d = 0; d < dim; d += 16)
          _mm512_storeu_ps(total + d, _mm512_fmadd_ps(w, _mm512_loadu_ps(sink_v + s * dim + d), _mm512_loadu_ps(total + d)));
      }
      for (int64_t d = 0; d < dim; d++) query[j].out[d] = total[d] / query[j].mass;
    }
  }
}

static XLA_FFI_Error *attention(XLA_FFI_CallFrame *frame, bool keeps) {
  XLA_FFI_Buffer *q = argument(frame, 0), *k = argument(frame, 2), *sink_k = argument(frame, 6);
  Attention task = {.q = q->data,
                    .q_sink = argument(frame, 1)->data,
                    .k = pairs_argument(frame, 2, RING_BITS),
                    .v = pairs_argument(frame, 4, RING_BITS),
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
  const int64_t given = keeps ? 20 : 11;
  if (frame->args.size > given) {
    task.null_logit = argument(frame, (int)given)->data;
    if (argument(frame, (int)given)->dims[0] != task.heads) return failed(frame, "atlas_attention: null logits");
  }
  if (keeps) {
    if (!has_bits(frame, 11, task.dim, KEY_BITS) || !has_bits(frame, 15, task.dim, VALUE_BITS))
      return failed(frame, "atlas_attention: bits");
    task.kept_k = pairs_argument(frame, 11, KEY_BITS);
    task.kept_v = pairs_argument(frame, 15, VALUE_BITS);
    task.kept = argument(frame, 19)->data;
    task.pool_pages = argument(frame, 11)->dims[1];
    for (int64_t b = 0; b < q->dims[0]; b++) {
      const int64_t first = task.kept[2 * b], filled = filled_pages(task.kept[2 * b + 1], INT64_MAX);
      if (first < 0 || first + filled > task.pool_pages) return failed(frame, "atlas_attention: kept pairs");
      if (filled > task.most_pages) task.most_pages = filled;
    }
  }
  if (task.dim % 64 || k->dims[3] != PAGE || task.sinks > MOST_SINKS) return failed(frame, "atlas_attention: shape");
  run_parts(frame, attention_part, &task, q->dims[0] * task.kv_heads * ((task.tokens + TOKENS - 1) / TOKENS));
  return NULL;
}

/* (q, q_sink f32 [B, T, H, D]; k int8 [B, N, K, P, D], its scale f32 [B, N, K, P]; v and its scale; sink_k, sink_v f32
   [B, K, S, D]; seen bool [B, T, N, P]; sinks_seen bool [B, T]; scale f32 []) -> f32 [B, T, H, D];
   D a multiple of 64, P = 128, S ≤ 16. One more argument, f32 [H], has each head's score without a value. */
EXPORT XLA_FFI_Error *atlas_attention(XLA_FFI_CallFrame *frame) {
  return asked_for_version(frame) ? NULL : attention(frame, false);
}

/* The same, and (kept k of all layers: numbers u8 [B, M, K, P, D / 2], step u8 and offset int8 [B, M, K, P, D / 32], half of the
   scale u16 [B, M, K, P]; kept v likewise, its numbers [.., D / 4]; the layer's first page and its pairs i32 [B, 2]), before the scores without a
   value. */
EXPORT XLA_FFI_Error *atlas_kept_attention(XLA_FFI_CallFrame *frame) {
  return asked_for_version(frame) ? NULL : attention(frame, true);
}
