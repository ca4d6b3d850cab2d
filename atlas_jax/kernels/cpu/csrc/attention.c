/* Attention over int8 pages: softmax over a row's pages and sinks, for each row and KV head on its own: one page's scores at
   a time, then the weighted sum of values, exact for a page. A key that is not seen weighs exactly 0; a page nobody sees is
   not read. */

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
  int8_t *quantized; /* [D] */
  float *score;    /* [N, P], later the weights */
  float *total;    /* [D] */
  float unit, peak, mass, sink_score[16];
  int32_t offset;
  int64_t sinks;
} Query;

/* Queries that meet a page while its keys are repacked, those that meet its values together, and tokens of one part. */
enum { QUERIES = 32, TOGETHER = 3, TOKENS = 8, GROUPS = PAGE / 16 };
/* Where the worth of a unit of a page's weights is kept: behind two bytes for each of them. */
enum { UNIT = PAGE / 2 };

/* The keys of a page that any query of some sees, in groups of 16: `count` of them, an even number, from `first` on. At the
   borders of a window and in a token's own page the others need no work (128 tokens with a window of 512, four queries of 256
   numbers, both cores: 0.36 ms instead of 0.42). */
typedef struct {
  int first, count;
} Seen;

static Seen seen_of(__m512i lower, __m512i upper) {
  const uint64_t found[2] = {_mm512_test_epi8_mask(lower, lower), _mm512_test_epi8_mask(upper, upper)};
  if (!found[0] && !found[1]) return (Seen){0};
  int first = found[0] ? __builtin_ctzll(found[0]) / 16 : 4 + __builtin_ctzll(found[1]) / 16;
  int last = found[1] ? 7 - __builtin_clzll(found[1]) / 16 : 3 - __builtin_clzll(found[0]) / 16;
  if ((last - first) % 2 == 0) last < GROUPS - 1 ? last++ : first--;
  return (Seen){.first = first, .count = last + 1 - first};
}

static void quantize_query(Query *query, const float *q, int64_t dim, float scale) {
  query->unit = quantize_term(q, dim, query->quantized) * scale;
  query->offset = offset_of(query->quantized, dim);
  memset(query->total, 0, sizeof(float) * (size_t)dim);
}

/* A page's keys as [D / 4, P] of four bytes each, the top bits flipped: a vector has what 16 keys multiply with the same four
   numbers of a query, so that sums need not be added up across lanes (128 tokens over 8 pages, one core: 2.3 ms instead of
   3.0). The page's values and the next page's keys are prefetched meanwhile (one token over 64 pages: 335 µs instead of 400). */
static void repack_keys(const int8_t *keys, const int8_t *values, const int8_t *next, int64_t dim, Seen seen,
                         __m512i *packed) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  for (int64_t d = 0; d < dim; d += 64)
    for (int g = seen.first; g < seen.first + seen.count; g++) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const int64_t place = (g * 16 + i) * dim + d;
        _mm_prefetch((const char *)values + place, _MM_HINT_T1);
        _mm_prefetch((const char *)next + place, _MM_HINT_T1);
        v[i] = _mm512_xor_si512(_mm512_loadu_si512(keys + place), flip);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_store_si512(packed + (d / 4 + i) * GROUPS + g, v[i]);
    }
}

/* Scores of `count` groups of a page's keys, the largest of them, and −1e30 for those not seen. */
static inline __attribute__((always_inline)) __m512 score_groups(const Query *query, const __m512i *packed, const float *scale,
                                                                 int64_t n, int64_t dim, int first, int count, __m512 peak) {
  __m512i dots[GROUPS];
#pragma GCC unroll 8
  for (int g = 0; g < count; g++) dots[g] = _mm512_set1_epi32(-query->offset);
  packed += first;
  for (int64_t d = 0; d < dim; d += 4, packed += GROUPS) {
    int32_t four;
    memcpy(&four, query->quantized + d, sizeof four);
    const __m512i q = _mm512_set1_epi32(four);
#pragma GCC unroll 8
    for (int g = 0; g < count; g++) add_dots(&dots[g], packed[g], q);
  }
#pragma GCC unroll 8
  for (int g = 0; g < count; g++) {
    const int64_t place = (first + g) * 16, p = n * PAGE + place;
    __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[g]), _mm512_set1_ps(query->unit));
    found = _mm512_mul_ps(found, _mm512_loadu_ps(scale + place));
    __m128i mask = _mm_loadu_si128((const __m128i *)(query->seen + p));
    found = _mm512_mask_blend_ps(_mm_test_epi8_mask(mask, mask), _mm512_set1_ps(-1e30f), found);
    peak = _mm512_max_ps(peak, found);
    _mm512_storeu_ps(query->score + p, found);
  }
  return peak;
}

static __m512 score_page(const Query *query, const __m512i *packed, const float *scale, int64_t n, int64_t dim, Seen seen,
                         __m512 peak) {
  switch (seen.count) {
    case 2: return score_groups(query, packed, scale, n, dim, seen.first, 2, peak);
    case 4: return score_groups(query, packed, scale, n, dim, seen.first, 4, peak);
    case 6: return score_groups(query, packed, scale, n, dim, seen.first, 6, peak);
    default: return score_groups(query, packed, scale, n, dim, seen.first, 8, peak);
  }
}

/* 64 columns of `count` of a page's values as [count / 4, 4, 16] of four bytes each: a vector has what 16 columns of four
   tokens multiply with the same four weights. Number 4l + e of vector i is column 16l + 4i + e. */
static void repack_values(const int8_t *values, int64_t count, int64_t dim, __m512i *packed) {
  for (int64_t p = 0; p < count; p += 4, packed += 4) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_si512(values + (p + i) * dim);
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
static void add_values(Query *query, int count, const int8_t *values, int64_t n, Seen seen, int64_t dim, __m512i *packed) {
  for (int64_t d = 0; d < dim; d += 64) {
    repack_values(values + 16 * seen.first * dim + d, 16 * seen.count, dim, packed);
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
static void weigh(const Attention *task, Query *query, const Seen *seen, const float *sink_k, int64_t first_page,
                  int64_t page_step) {
  for (int64_t s = 0; s < query->sinks; s++) {
    __m512 dot = _mm512_setzero_ps();
    for (int64_t d = 0; d < task->dim; d += 16)
      dot = _mm512_fmadd_ps(_mm512_loadu_ps(query->q_sink + d), _mm512_loadu_ps(sink_k + s * task->dim + d), dot);
    float score = _mm512_reduce_add_ps(dot) * *task->scale;
    query->sink_score[s] = score;
    query->peak = score > query->peak ? score : query->peak;
  }
  __m512 mass = _mm512_setzero_ps();
  for (int64_t n = 0; n < task->pages; n++) {
    const float *scale = task->v_scale + first_page + n * page_step;
    if (seen[n].count) mass = weigh_page(query->score + n * PAGE, scale, seen[n], query->peak, mass);
  }
  query->mass = _mm512_reduce_add_ps(mass);
}

/* Some tokens of one row and KV head, a few queries at a time. */
static void attention_part(const void *data, int64_t part) {
  static _Thread_local Room kept;
  const Attention *task = data;
  int64_t blocks = (task->tokens + TOKENS - 1) / TOKENS;
  int64_t first = part % blocks * TOKENS, row = part / blocks, b = row / task->kv_heads, kv = row % task->kv_heads;
  int64_t tokens = task->tokens - first < TOKENS ? task->tokens - first : TOKENS;
  int64_t groups = task->heads / task->kv_heads, dim = task->dim, keys = task->pages * PAGE;
  /* scalars of this head's pages: page n has them from first_page + n · page_step */
  const int64_t first_page = (b * task->pages * task->kv_heads + kv) * PAGE, page_step = task->kv_heads * PAGE;
  const float *sink_k = task->sink_k + row * task->sinks * dim, *sink_v = task->sink_v + row * task->sinks * dim;
  int64_t each = (keys + dim) * (int64_t)sizeof(float) + dim;
  char *memory = grown(&kept, PAGE * dim + each * QUERIES);
  if (!memory) abort();
  __m512i *packed = (__m512i *)memory;
  memory += PAGE * dim;
  Seen seen[task->pages];
  for (int64_t i = 0; i < tokens * groups; i += QUERIES) {
    Query query[QUERIES];
    __m512 peak[QUERIES];
    int count = tokens * groups - i < QUERIES ? (int)(tokens * groups - i) : QUERIES;
    for (int j = 0; j < count; j++) {
      query[j].score = (float *)(memory + each * j);
      query[j].total = query[j].score + keys;
      query[j].quantized = (int8_t *)(query[j].total + dim);
      int64_t t = b * task->tokens + first + (i + j) / groups;
      int64_t place = (t * task->heads + kv * groups + (i + j) % groups) * dim;
      query[j].out = task->out + place;
      query[j].q_sink = task->q_sink + place;
      query[j].seen = task->seen + t * keys;
      query[j].sinks = task->sinks_seen[t] ? task->sinks : 0;
      quantize_query(&query[j], task->q + place, dim, *task->scale);
      peak[j] = _mm512_set1_ps(-1e30f);
    }
    for (int64_t n = 0; n < task->pages; n++) {
      __m512i lower = _mm512_setzero_si512(), upper = lower;
      for (int j = 0; j < count; j += groups - (i + j) % groups) { /* queries of one token see the same */
        lower = _mm512_or_si512(lower, _mm512_loadu_si512(query[j].seen + n * PAGE));
        upper = _mm512_or_si512(upper, _mm512_loadu_si512(query[j].seen + n * PAGE + PAGE / 2));
      }
      seen[n] = seen_of(lower, upper);
      if (!seen[n].count) continue;
      int64_t page = first_page + n * page_step;
      int64_t next = n + 1 < task->pages ? page + page_step : page;
      repack_keys(task->k + page * dim, task->v + page * dim, task->k + next * dim, dim, seen[n], packed);
      for (int j = 0; j < count; j++) peak[j] = score_page(&query[j], packed, task->k_scale + page, n, dim, seen[n], peak[j]);
    }
    for (int j = 0; j < count; j++) {
      query[j].peak = _mm512_reduce_max_ps(peak[j]);
      weigh(task, &query[j], seen, sink_k, first_page, page_step);
    }
    for (int64_t n = 0; n < task->pages; n++)
      if (seen[n].count) add_values(query, count, task->v + (first_page + n * page_step) * dim, n, seen[n], dim, packed);
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
