/* How much attention a few queries of a row give to each of its pairs: sums of softmax probabilities. Queries are divided into
   blocks of a fixed length, whose sums are put together in order, so that they do not depend on the threads. */

#include "attention.h"

typedef struct {
  const float *q, *q_near; /* [samples, H, D] */
  Pairs k, kept_k;         /* [B, N, K, P, D], [B, M, K, P, D]: pages of all layers */
  const float *sink_k;     /* [B, K, S, D] */
  const uint8_t *seen;     /* [samples, N, P] */
  const float *null_logit; /* [H], or NULL */
  float scale;
  float *sums; /* [K, blocks, N + kept pages, P] */
  int64_t row, samples, heads, kv_heads, dim, pages, pool_pages, first_kept, kept_pages, sinks;
  int32_t kept;
} Received;

static int64_t blocks_of(const Received *task) {
  return (task->samples * (task->heads / task->kv_heads) + QUERIES - 1) / QUERIES;
}

/* 2^x for x ≤ 0 to a few parts in 10⁷, exactly 0 of what is not seen: with it instead of `exp_ps` a call takes 0.8 of
   the time. */
static inline __m512 exp2_ps(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.5353362e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3398874e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6184374e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5503325e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022648e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314720e-1f));
  return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), n);
}

/* Adds a query's probabilities to the sums of all pages; its scores become weights. */
static void add_probabilities(float *score, const Seen *seen, int64_t pages, const float *sink_score, int64_t sinks,
                              float null_score, float peak, float *sums) {
  const __m512 log2e = _mm512_set1_ps(1.44269504f), top = _mm512_set1_ps(peak * 1.44269504f);
  __m512 mass = _mm512_setzero_ps(), odd = mass; /* two, which do not wait for one another */
  for (int64_t n = 0; n < pages; n++)
    for (int g = seen[n].first; g < seen[n].first + seen[n].count; g += 2) {
      float *at = score + n * PAGE + g * 16;
      const __m512 w = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(at), log2e, top));
      const __m512 v = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(at + 16), log2e, top));
      _mm512_storeu_ps(at, w);
      _mm512_storeu_ps(at + 16, v);
      mass = _mm512_add_ps(mass, w);
      odd = _mm512_add_ps(odd, v);
    }
  mass = _mm512_add_ps(mass, odd);
  float all = _mm512_reduce_add_ps(mass);
  for (int64_t s = 0; s < sinks; s++) all += _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(sink_score[s] - peak)));
  all += _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(null_score - peak)));
  const __m512 share = _mm512_set1_ps(1.0f / all);
  for (int64_t n = 0; n < pages; n++)
    for (int g = seen[n].first; g < seen[n].first + seen[n].count; g++) {
      const int64_t at = n * PAGE + g * 16;
      _mm512_storeu_ps(sums + at, _mm512_fmadd_ps(_mm512_loadu_ps(score + at), share, _mm512_loadu_ps(sums + at)));
    }
}

/* `score_page` of two queries with a whole page. */
static void score_two(const Terms *query, const __m512i *packed, const float *scale, const uint8_t *const *places, int64_t dim,
                      float *const *score, __m512 *peak) {
  __m512i dots[2 * GROUPS];
#pragma GCC unroll 16
  for (int g = 0; g < 2 * GROUPS; g++) dots[g] = _mm512_set1_epi32(-query[g / GROUPS].offset);
  for (int64_t d = 0; d < dim; d += 4, packed += GROUPS) {
    int32_t four[2];
    memcpy(&four[0], query[0].terms + d, sizeof four[0]);
    memcpy(&four[1], query[1].terms + d, sizeof four[1]);
    const __m512i first = _mm512_set1_epi32(four[0]), second = _mm512_set1_epi32(four[1]);
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; g++) {
      const __m512i keys = packed[g];
      add_dots(&dots[g], keys, first);
      add_dots(&dots[GROUPS + g], keys, second);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; g++) {
      __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[i * GROUPS + g]), _mm512_set1_ps(query[i].unit));
      found = _mm512_mul_ps(found, _mm512_loadu_ps(scale + 16 * g));
      __m128i mask = _mm_loadu_si128((const __m128i *)(places[i] + 16 * g));
      found = _mm512_mask_blend_ps(_mm_test_epi8_mask(mask, mask), _mm512_set1_ps(-1e30f), found);
      peak[i] = _mm512_max_ps(peak[i], found);
      _mm512_storeu_ps(score[i] + 16 * g, found);
    }
}

/* A block of the queries of one KV head. */
static void received_attention_part(const void *data, int64_t part) {
  static _Thread_local Room room;
  const Received *task = data;
  const int64_t blocks = blocks_of(task), first = part % blocks * QUERIES, kv = part / blocks, dim = task->dim;
  const int64_t groups = task->heads / task->kv_heads, queries = task->samples * groups, ring = task->pages * PAGE;
  const int64_t most = task->pages + task->kept_pages, pages = task->pages + filled_pages(task->kept, task->kept_pages);
  const int64_t count = queries - first < QUERIES ? queries - first : QUERIES, keys = pages * PAGE;
  const float *sink_k = task->sink_k + (task->row * task->kv_heads + kv) * task->sinks * dim;
  const int64_t each = keys * (int64_t)sizeof(float) + 2 * dim;
  float *sums = task->sums + part * most * PAGE;
  memset(sums, 0, sizeof(float) * (size_t)(most * PAGE));
  char *memory = grown(&room, PAGE * dim + each * QUERIES);
  if (!memory) abort();
  __m512i *packed = (__m512i *)memory;
  memory += PAGE * dim;
  Seen seen[most];
  float kept_scale[PAGE], *score[QUERIES];
  const float *near[QUERIES];
  const uint8_t *places[QUERIES];
  Terms far_terms[QUERIES], near_terms[QUERIES];
  __m512 peak[QUERIES];
  for (int64_t j = 0; j < count; j++) {
    const int64_t sample = (first + j) / groups, place = (sample * task->heads + kv * groups + (first + j) % groups) * dim;
    score[j] = (float *)(memory + each * j);
    int8_t *terms = (int8_t *)(score[j] + keys);
    near[j] = task->q_near + place;
    places[j] = task->seen + sample * ring;
    far_terms[j] = query_terms(task->q + place, dim, task->scale, terms);
    near_terms[j] = query_terms(near[j], dim, task->scale, terms + dim);
    peak[j] = _mm512_set1_ps(-1e30f);
  }
  for (int64_t n = 0; n < pages; n++) {
    const uint8_t *filled = n < task->pages ? NULL : filled_places(task->kept, n - task->pages);
    if (filled) seen[n] = seen_places(filled);
    else {
      __m512i lower = _mm512_setzero_si512(), upper = lower;
      for (int64_t j = 0; j < count; j += groups - (first + j) % groups) { /* queries of one token see the same */
        lower = _mm512_or_si512(lower, _mm512_loadu_si512(places[j] + n * PAGE));
        upper = _mm512_or_si512(upper, _mm512_loadu_si512(places[j] + n * PAGE + PAGE / 2));
      }
      seen[n] = seen_of(lower, upper);
      if (!seen[n].count) continue;
    }
    const Pairs *from = filled ? &task->kept_k : &task->k;
    const int64_t page = filled ? task->row * task->pool_pages + task->first_kept + n - task->pages : task->row * task->pages + n;
    const Pairs keys_of_page = pairs_from(from, (page * task->kv_heads + kv) * PAGE, dim);
    /* behind the last page there may be nothing: the next is only prefetched */
    const Pairs next = pairs_from(&keys_of_page, task->kv_heads * PAGE, dim);
    repack_keys(&keys_of_page, next.numbers, next.numbers, dim, seen[n], packed);
    const Terms *terms = filled ? near_terms : far_terms;
    const float *scale = keys_of_page.scale;
    if (filled) page_scale(&keys_of_page, filled, kept_scale), scale = kept_scale;
    int64_t j = 0;
    if (seen[n].count == GROUPS)
      for (; j + 2 <= count; j += 2) {
        const uint8_t *seen_by[2] = {filled ? filled : places[j] + n * PAGE, filled ? filled : places[j + 1] + n * PAGE};
        float *to[2] = {score[j] + n * PAGE, score[j + 1] + n * PAGE};
        score_two(terms + j, packed, scale, seen_by, dim, to, peak + j);
      }
    for (; j < count; j++)
      peak[j] = score_page(terms + j, packed, scale, filled ? filled : places[j] + n * PAGE, dim, seen[n],
                           score[j] + n * PAGE, peak[j]);
  }
  for (int64_t j = 0; j < count; j++) {
    float sink_score[MOST_SINKS], top = _mm512_reduce_max_ps(peak[j]);
    top = score_sinks(near[j], sink_k, task->sinks, dim, task->scale, sink_score, top);
    if (top <= -1e30f) continue; /* sees no pair */
    const float null = null_score(task->null_logit, kv * groups + (first + j) % groups);
    add_probabilities(score[j], seen, pages, sink_score, task->sinks, null, null > top ? null : top, sums);
  }
}

/* out[page, kv] = the sums of all blocks, in order, of `count` pages from `first` on. */
static void put_together(const Received *task, int64_t first, int64_t count, float *out) {
  const int64_t blocks = blocks_of(task), block = (task->pages + task->kept_pages) * PAGE;
  for (int64_t n = 0; n < count; n++)
    for (int64_t kv = 0; kv < task->kv_heads; kv++)
      for (int64_t p = 0; p < PAGE; p += 16) {
        const float *sums = task->sums + kv * blocks * block + (first + n) * PAGE + p;
        __m512 total = _mm512_setzero_ps();
        for (int64_t i = 0; i < blocks; i++) total = _mm512_add_ps(total, _mm512_loadu_ps(sums + i * block));
        _mm512_storeu_ps(out + (n * task->kv_heads + kv) * PAGE + p, total);
      }
}

/* (q, q_near f32 [samples, H, D]; k int8 [B, N, K, P, D], its scale f32 [B, N, K, P]; sink_k f32 [B, K, S, D]; kept k of all
   layers: numbers u8 [B, M, K, P, D / 2], step u8, offset int8 [B, M, K, P, D / 32], half scale u16 [B, M, K, P]; row i32 [];
   seen bool [samples, N, P]; sinks_seen bool []; the layer's first page and its pairs i32 []; scale f32 []; and f32 [H], if
   heads have a score without a value) -> f32 [N, K, P], [kept pages, K, P], and a buffer [K, blocks, N + kept pages, P]; D a
   multiple of 64, P = 128, S ≤ 16, blocks of 32 queries. */
EXPORT XLA_FFI_Error *atlas_received_attention(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *q = argument(frame, 0), *k = argument(frame, 2), *sink_k = argument(frame, 4);
  Received task = {.q = q->data,
                   .q_near = argument(frame, 1)->data,
                   .k = pairs_argument(frame, 2, RING_BITS),
                   .kept_k = pairs_argument(frame, 5, KEY_BITS),
                   .sink_k = sink_k->data,
                   .seen = argument(frame, 10)->data,
                   .scale = *(const float *)argument(frame, 14)->data,
                   .sums = result(frame, 2)->data,
                   .row = *(const int32_t *)argument(frame, 9)->data,
                   .samples = q->dims[0],
                   .heads = q->dims[1],
                   .kv_heads = k->dims[2],
                   .dim = q->dims[2],
                   .pages = k->dims[1],
                   .pool_pages = argument(frame, 5)->dims[1],
                   .first_kept = *(const int32_t *)argument(frame, 12)->data,
                   .kept_pages = result(frame, 1)->dims[0],
                   .sinks = *(const uint8_t *)argument(frame, 11)->data ? sink_k->dims[2] : 0,
                   .kept = *(const int32_t *)argument(frame, 13)->data};
  if (frame->args.size > 15) {
    task.null_logit = argument(frame, 15)->data;
    if (argument(frame, 15)->dims[0] != task.heads) return failed(frame, "atlas_received_attention: null logits");
  }
  if (task.dim % 64 || !has_bits(frame, 5, task.dim, KEY_BITS) || k->dims[3] != PAGE || task.sinks > MOST_SINKS || result(frame, 2)->dims[1] != blocks_of(&task) ||
      task.row < 0 || task.row >= k->dims[0] || task.first_kept < 0 ||
      task.first_kept + filled_pages(task.kept, task.kept_pages) > task.pool_pages)
    return failed(frame, "atlas_received_attention: shape");
  run_parts(frame, received_attention_part, &task, task.kv_heads * blocks_of(&task));
  put_together(&task, 0, task.pages, result(frame, 0)->data);
  put_together(&task, task.pages, task.kept_pages, result(frame, 1)->data);
  return NULL;
}
